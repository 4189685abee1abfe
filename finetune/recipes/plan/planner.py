"""`finetune plan`: what a run needs of memory, time and disk, before it is started.

Floor 5. Memory is worked out on a model without data (see `finetune.models.rehearsal`), so a plan costs little itself. Only where
the run fits is the real model loaded and a few of its steps are timed.
"""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from finetune.config import RunConfig
from finetune.data.batches.dataset import TrainingBatches
from finetune.data.batches.steps import BatchShape
from finetune.data.statistics import coverage
from finetune.data.types import IGNORE_INDEX
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import describe_model, tensor_bytes
from finetune.models.load import load_skeleton
from finetune.models.rehearsal import Rehearsal
from finetune.models.speed import resolve_precision
from finetune.models.tokenizers import pad_id
from finetune.optim import optimizer_info
from finetune.optim.lazy.eligible import row_sparse_embeddings
from finetune.recipes.build.material import Material, read_material
from finetune.recipes.build.model import adapt_model, model_spec
from finetune.recipes.build.parts import count_steps
from finetune.recipes.build.vocabulary import apply_vocabulary, plan_vocabulary
from finetune.recipes.plan.memory import (
    CUDA_CONTEXT,
    FP32,
    MemoryEstimate,
    add_up,
    machine_memory,
    optimizer_state_bytes,
    process_memory,
)
from finetune.recipes.plan.timing import TimeEstimate

STEPS_LOOKED_AT = 1000  # of the first epoch, for the largest micro-batch
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What a run goes through, in rows, tokens and steps, in one process."""

    rows: int  # of the largest micro-batch
    length: int  # of its rows, padding included
    num_targets: int  # the most in a micro-batch
    accumulates: bool  # a step has several micro-batches
    num_steps: int
    tokens_per_step: float  # mean, without padding
    num_evaluations: int
    used_rows: int  # of the token table, met in the training data
    coverage: float | None  # share of the held-out tokens that stand in the training data too
    prompt_length: int  # tokens of the longest held-out example


@dataclass(frozen=True)
class Plan:
    """What `finetune plan` prints. Sizes in bytes, times in seconds."""

    model: dict[str, Any]  # see `describe_model`
    work: Work
    memory: MemoryEstimate
    device: str
    machine_memory: int
    free_memory: int  # what a run may use now
    checkpoint_bytes: int  # one checkpoint
    disk_bytes: int  # the most that lies in the run's folder at once
    time: TimeEstimate | None  # None: not timed, because the run does not fit
    advice: tuple[
        tuple[str, int], ...
    ]  # (change, bytes saved), the largest first; only where the run does not fit

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.free_memory


class Planner:
    """Estimates for a config, and for changes to it, from data and tokenizer that are read once."""

    def __init__(
        self, config: RunConfig, display: Display, memory_limit: int | None = None
    ) -> None:
        self.config, self.display, self.memory_limit = config, display, memory_limit
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.material = read_material(config, display)
        self.work = work_of(self.material)
        self.baseline = CUDA_CONTEXT if self.device.type == "cuda" else process_memory()

    def plan(self) -> Plan:
        """Everything but the time and the advice."""
        config = self.config
        self.display.say("working out the memory of a step")
        description, memory, checkpoint = self.estimate(self.material, self.work)
        total, free = (
            machine_memory(self.device)
            if self.memory_limit is None
            else (self.memory_limit, self.memory_limit)
        )
        copies = (
            config.checkpoint.keep + 2
        )  # the best beside the newest, and the one that is being written
        disk = copies * checkpoint + description["parameters"] * FP32
        return Plan(
            description,
            self.work,
            memory,
            self.device.type,
            total,
            free,
            checkpoint,
            disk,
            time=None,
            advice=(),
        )

    def estimate(
        self, material: Material, work: Work
    ) -> tuple[dict[str, Any], MemoryEstimate, int]:
        """Return the model's description, its memory, and the size of a checkpoint."""
        config, tokens = material.config, material.tokens
        model, info = fitted_skeleton(material), optimizer_info(config.optimizer.name)
        vocabulary = plan_vocabulary(
            config, model, material.tokenizer, material.corpora, tokens.added
        )
        precision, _ = resolve_precision(config.training.precision, self.device)
        apply_vocabulary(vocabulary, model, config, bf16=precision == "bf16")
        with torch.device("meta"):
            model = adapt_model(model, config.model, tokens.added, seed=config.seed)
        tables = row_sparse_embeddings(model) if info.must_know == "embeddings" else []
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = optimizer_state_bytes(
            model, info.state_bytes, sparse_tables=tables, used_rows=work.used_rows
        )
        weights, buffers = tensor_bytes(model.parameters()), tensor_bytes(model.buffers())
        sparse = {id(table.weight) for table in tables}
        gradients = tensor_bytes(
            parameter for parameter in trainable if id(parameter) not in sparse
        )
        gradients += (
            min(work.used_rows, work.rows * work.length)
            * sum(table.embedding_dim for table in tables)
            * FP32
        )
        description = {**describe_model(model), "vocabulary": vocabulary.line()}
        rehearsal = Rehearsal(
            model, device=self.device.type, autocast=AUTOCAST[precision], sparse_tables=tables
        )
        rehearsal.num_sampled = vocabulary.num_sampled
        step = rehearsal.step(
            sequences=work.rows,
            length=work.length,
            num_targets=work.num_targets,
            packed=config.data.packing,
            accumulates=work.accumulates,
        )
        memory = add_up(
            baseline=self.baseline,
            weights=weights + buffers,
            gradients=gradients,
            optimizer_state=state,
            step=step,
            readings=self._readings(config, work, rehearsal),
            export=self._export_bytes(config, description, weights, bool(vocabulary.ids)),
            device=self.device.type,
        )
        return description, memory, tensor_bytes(trainable) + buffers + state

    @staticmethod
    def _export_bytes(
        config: RunConfig, description: dict[str, Any], weights: int, compact: bool
    ) -> int:
        """What the export holds beside the run: a copy with LoRA merged into it, and the full tables."""
        tables = description["token_table_parameters"] * FP32 if compact else 0
        return tables + (weights if config.model.lora is not None else 0)

    def _readings(self, config: RunConfig, work: Work, rehearsal: Rehearsal) -> dict[str, int]:
        if not work.num_evaluations:
            return {}
        rows = config.evaluation.batch_size
        length = config.data.max_length if config.data.packing else work.prompt_length
        found = {
            "evaluation": rehearsal.inference(
                sequences=rows, length=length, num_logits=256, use_cache=False
            )
        }
        answers = config.evaluation.generate or config.evaluation.samples
        if answers:
            rows = min(answers, config.generation.batch_size)
            length = work.prompt_length + config.generation.max_new_tokens
            found["generation"] = rehearsal.inference(
                sequences=rows, length=length, num_logits=rows, use_cache=True
            )
        return found

    def advice(self, peak: int) -> tuple[tuple[str, int], ...]:
        """What each change alone would save, worked out like the plan itself."""
        found = []
        for change, config in changes(self.config):
            self.display.say(f"trying {change}")
            try:
                material = self.material.with_config(config)
                _, memory, _ = self.estimate(material, work_of(material))
            except UserError:  # a change that this data or model does not take is no advice
                continue
            found.append((change, peak - memory.peak))
        return tuple(sorted((item for item in found if item[1] > 0), key=lambda item: -item[1]))


def fitted_skeleton(material: Material) -> Any:
    """Return the model on the meta device, with a row for each token, as it is trained."""
    config = material.config
    model: Any = load_skeleton(model_spec(config.model, material.tokenizer))
    with torch.device("meta"):
        if material.table_rows > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(material.table_rows, mean_resizing=False)
        if config.training.activation_checkpointing:
            model.activation_checkpointing_enable(
                {"use_reentrant": False, "preserve_rng_state": False}
            )
    return model


def work_of(material: Material) -> Work:
    """Return what a run on one process goes through."""
    config, train, held_out = material.config, material.train, material.validation
    shape = BatchShape(
        packing=config.data.packing,
        batch_size=config.training.batch_size,
        micro_batch_size=config.training.micro_batch_size,
        pad_id=pad_id(material.tokenizer),
        seed=config.seed,
    )
    batches = TrainingBatches(train, shape, max_length=config.data.max_length)
    per_epoch = None if config.data.streaming else batches.steps_per_epoch
    num_steps = count_steps(config, per_epoch)
    steps = list(islice(batches.epoch(0), min(num_steps, STEPS_LOOKED_AT)))
    micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
    rows, length = max((batch["input_ids"].shape for batch in micro_batches), key=math.prod)
    every = config.evaluation.every or per_epoch or num_steps
    return Work(
        rows=rows,
        length=length,
        num_targets=max(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches),
        accumulates=any(len(step.micro_batches) > 1 for step in steps),
        num_steps=num_steps,
        tokens_per_step=sum(step.num_tokens for step in steps) / len(steps),
        num_evaluations=0
        if held_out is None
        else config.evaluation.before + math.ceil(num_steps / every),
        used_rows=len(set(train.token_ids)),
        coverage=coverage(train, held_out),
        prompt_length=max(held_out.lengths) if held_out is not None else 0,
    )


def changes(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """What could be changed to save memory: (as on the command line, the config with it)."""
    tree = config.model_dump(mode="json")
    found: list[tuple[str, dict[str, Any]]] = []
    if config.training.micro_batch_size > 1:
        found.append(("training.micro_batch_size=1", {"training": {"micro_batch_size": 1}}))
    if not config.training.activation_checkpointing:
        found.append(
            (
                "training.activation_checkpointing=true",
                {"training": {"activation_checkpointing": True}},
            )
        )
    if config.data.max_length > 1:
        half = config.data.max_length // 2
        found.append((f"data.max_length={half}", {"data": {"max_length": half}}))
    if config.model.lora is None:
        found.append(("model.lora.rank=16", {"model": {"lora": {"rank": 16}}}))
    if optimizer_info(config.optimizer.name).state_bytes > optimizer_info("adafactor").state_bytes:
        found.append(("optimizer.name=adafactor", {}))
    if config.evaluation.batch_size > 1:
        found.append(("evaluation.batch_size=1", {"evaluation": {"batch_size": 1}}))
    if config.generation.batch_size > 1:
        found.append(("generation.batch_size=1", {"generation": {"batch_size": 1}}))
    return [(change, _changed(tree, sections, change)) for change, sections in found]


def _changed(tree: dict[str, Any], sections: dict[str, Any], change: str) -> RunConfig:
    changed = {name: {**tree[name], **section} for name, section in sections.items()}
    if change.startswith(
        "optimizer.name="
    ):  # the options of one optimizer are not those of another
        changed["optimizer"] = {"name": change.partition("=")[2], "lr": tree["optimizer"]["lr"]}
    return RunConfig.model_validate({**tree, **changed})
