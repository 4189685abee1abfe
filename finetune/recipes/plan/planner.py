"""The planner of `finetune plan`: what a run needs of memory and disk, and what would save memory.

Memory is worked out on a model without data (see `finetune.models.rehearsal`), so a plan itself
costs little. The time is measured elsewhere, and only if the run fits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from finetune.config import RunConfig
from finetune.config.values import MOST
from finetune.data.batches.dataset import TrainingBatches
from finetune.data.statistics import coverage
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import describe_model, tensor_bytes
from finetune.models.load import load_skeleton
from finetune.models.rehearsal import Rehearsal
from finetune.models.speed import resolve_precision
from finetune.models.vocabulary.choice import VocabularyPlan
from finetune.optim import optimizer_info
from finetune.optim.lazy.eligible import row_sparse_embeddings
from finetune.recipes.build.accelerator import resolve_device
from finetune.recipes.build.material import Material, read_material
from finetune.recipes.build.model import adapt_model, model_spec
from finetune.recipes.build.optimizer import may_be_lazy
from finetune.recipes.build.parts import count_steps, evaluation_steps
from finetune.recipes.build.sharing import plan_sharing, step_shape
from finetune.recipes.build.size import packed_length_of, with_step_size
from finetune.recipes.build.vocabulary import apply_vocabulary, plan_vocabulary
from finetune.recipes.plan.memory import (
    CUDA_CONTEXT,
    FP32,
    MemoryEstimate,
    estimate_memory,
    machine_memory,
    optimizer_state_bytes,
    process_memory,
)
from finetune.recipes.plan.timing import TimeEstimate

STEPS_LOOKED_AT = 1000  # at most, of the first epoch, for the largest micro-batch
LOGITS_AT_ONCE = 256  # tokens whose logits an evaluation of the loss holds at once
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What a run goes through in one process, in sequences, tokens and steps."""

    batch_size: int  # sequences of a step
    num_sequences: int  # of the largest micro-batch
    length: int  # tokens of each of its sequences, padding included
    num_targets: int  # the most target tokens of a micro-batch
    accumulates: bool  # whether a step has several micro-batches
    num_steps: int  # MOST if a time ends the run, until steps were timed
    tokens_per_step: float  # mean, without padding
    computed_per_step: float  # mean; shared beginnings count once
    examples_per_step: float  # mean
    num_evaluations: int
    evaluate_every: int  # steps
    used_rows: int  # rows of the token table whose token occurs in the training data
    coverage: float | None  # share of the held-out tokens that occur in the training data
    prompt_length: int  # tokens of the longest held-out example


@dataclass(frozen=True)
class Plan:
    """What `finetune plan` prints. Sizes are in bytes, times in seconds."""

    model: dict[str, Any]  # see `describe_model`; "vocabulary" is the line of the vocabulary's plan
    work: Work
    memory: MemoryEstimate
    device: str  # "cpu" or "cuda"
    machine_memory: int
    free_memory: int  # what a run may use now
    checkpoint_bytes: int  # of one checkpoint
    disk_bytes: int  # the most in the run's folder at once
    time: TimeEstimate | None = None  # None if the run does not fit, so that it was not timed
    # (change, bytes saved), the largest first; only if the run does not fit
    advice: tuple[tuple[str, int], ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.free_memory


class Planner:
    """Estimates for a config and for changes to it. Data and tokenizer are read once."""

    def __init__(
        self, config: RunConfig, display: Display, memory_limit: int | None = None
    ) -> None:
        self.display, self.memory_limit = display, memory_limit
        wanted = resolve_device(config.training.device)
        self.device = torch.device("cpu" if wanted == "mps" else wanted)  # its memory is the CPU's
        self.given = read_material(config, display)
        self.material = with_step_size(self.given)
        self.config, self.work = self.material.config, work_of(self.material)
        self.baseline = CUDA_CONTEXT if self.device.type == "cuda" else process_memory()

    def use(self, material: Material) -> None:
        """Plan with another material of the same run, such as one that is not packed."""
        self.config, self.material, self.work = material.config, material, work_of(material)

    def plan(self) -> Plan:
        """Return the plan without time and advice."""
        self.display.say("working out the memory of a step")
        description, memory, checkpoint = self.estimate(self.material, self.work)
        limit = self.memory_limit
        total, free = machine_memory(self.device) if limit is None else (limit, limit)
        copies = self.config.checkpoint.keep + 2  # also the best, and the one being written
        return Plan(
            model=description,
            work=self.work,
            memory=memory,
            device=self.device.type,
            machine_memory=total,
            free_memory=free,
            checkpoint_bytes=checkpoint,
            disk_bytes=copies * checkpoint + description["parameters"] * FP32,
        )

    def estimate(
        self, material: Material, work: Work
    ) -> tuple[dict[str, Any], MemoryEstimate, int]:
        """Return the model's description, the memory of a run, and the bytes of a checkpoint."""
        config, tokens = material.config, material.tokens
        model, info = fitted_skeleton(material), optimizer_info(config.optimizer.name)
        vocabulary = plan_vocabulary(
            config, model, material.tokenizer, material.corpora, tokens.added
        )
        precision, _ = resolve_precision(config.training.precision, self.device)
        apply_vocabulary(vocabulary, model, config, bf16=precision == "bf16")
        with torch.device("meta"):
            model = adapt_model(model, config.model, tokens.added, seed=config.seed)
        tables = row_sparse_embeddings(model) if may_be_lazy(config) else []
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = optimizer_state_bytes(
            model, info.state_bytes, sparse_tables=tables, used_rows=work.used_rows
        )
        gradients = _gradient_bytes(trainable, tables, work)
        description = {**describe_model(model), "vocabulary": vocabulary.line()}
        weights, buffers = tensor_bytes(model.parameters()), tensor_bytes(model.buffers())
        rehearsal = Rehearsal(  # it takes the tensors of `model` away
            model, device=self.device.type, autocast=AUTOCAST[precision], sparse_tables=tables
        )
        rehearsal.num_sampled = vocabulary.num_sampled
        step = rehearsal.step(
            sequences=work.num_sequences,
            length=work.length,
            num_targets=work.num_targets,
            packed=config.data.packing,
            accumulates=work.accumulates,
        )
        memory = estimate_memory(
            baseline=self.baseline,
            weights=weights + buffers + self._mapped_bytes(material, vocabulary),
            gradients=gradients,
            optimizer_state=state,
            step=step,
            inference=_inference_bytes(config, work, rehearsal),
            export=_export_bytes(config, description, weights, compact=bool(vocabulary.ids)),
            device=self.device.type,
        )
        return description, memory, tensor_bytes(trainable) + buffers + state

    def _mapped_bytes(self, material: Material, vocabulary: VocabularyPlan) -> int:
        """Return the bytes of a token table that stay in memory after a compact one replaced it.

        A file of float32 is mapped into memory, and not copied. As long as other weights lie in the
        file, so does the old table.
        """
        config, read = material.config, material.skeleton.config
        from_file = config.model.name is not None and read.dtype == torch.float32
        if self.device.type != "cpu" or not (vocabulary.ids and from_file):
            return 0
        return material.skeleton.get_input_embeddings().weight.numel() * FP32

    def advice(self, peak: int) -> tuple[tuple[str, int], ...]:
        """Return (change, bytes saved) for the changes that lower `peak`, each made alone.

        They are worked out like the plan itself. The one that saves the most comes first.
        """
        found = []
        for change, config in changes(self.config):
            self.display.say(f"trying {change}")
            try:
                material = self.material.with_config(config)
                _, memory, _ = self.estimate(material, work_of(material))
            except UserError:  # this data or model does not allow the change
                continue
            found.append((change, peak - memory.peak))
        return tuple(sorted((item for item in found if item[1] > 0), key=lambda item: -item[1]))


def _gradient_bytes(
    trainable: Sequence[nn.Parameter], sparse_tables: Sequence[nn.Embedding], work: Work
) -> int:
    """Return the bytes of all gradients. A row-sparse one has only the rows of a micro-batch."""
    sparse = {id(table.weight) for table in sparse_tables}
    dense = tensor_bytes(parameter for parameter in trainable if id(parameter) not in sparse)
    rows = min(work.used_rows, work.num_sequences * work.length)
    return dense + rows * sum(table.embedding_dim for table in sparse_tables) * FP32


def _inference_bytes(config: RunConfig, work: Work, rehearsal: Rehearsal) -> dict[str, int]:
    """Return what evaluation and generation allocate, if the run has them."""
    if not work.num_evaluations:
        return {}
    found = {
        "evaluation": rehearsal.inference(
            sequences=config.evaluation.batch_size,
            length=config.data.max_length if config.data.packing else work.prompt_length,
            num_logits=LOGITS_AT_ONCE,
            use_cache=False,
        )
    }
    if num_answers := config.evaluation.generate or config.evaluation.samples:
        sequences = min(num_answers, config.generation.batch_size)
        found["generation"] = rehearsal.inference(
            sequences=sequences,
            length=work.prompt_length + config.generation.max_new_tokens,
            num_logits=sequences,
            use_cache=True,
        )
    return found


def _export_bytes(
    config: RunConfig, description: dict[str, Any], weights: int, *, compact: bool
) -> int:
    """Return what the export allocates.

    With LoRA it is a copy of the weights with LoRA merged into them. With compact tables it is the
    full tables.
    """
    tables = description["token_table_parameters"] * FP32 if compact else 0
    return tables + (weights if config.model.lora is not None else 0)


def fitted_skeleton(material: Material) -> Any:
    """Return the model as it is trained, on the meta device, with a row for each token."""
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
    shape = step_shape(config)
    sharing = plan_sharing(config, train, shape, model=material.skeleton)
    shape = replace(shape, share=sharing.shares)
    batches = TrainingBatches(train, shape, max_length=packed_length_of(config))
    per_epoch = None if config.data.streaming else batches.steps_per_epoch
    num_steps = count_steps(config, per_epoch)
    steps = list(islice(batches.epoch(0), min(num_steps, STEPS_LOOKED_AT)))
    examples = [i for step in steps for part in step.example_ids for ids in part for i in ids]
    micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
    rows, length = max((batch["input_ids"].shape for batch in micro_batches), key=math.prod)
    most = packed_length_of(config)
    if length > most:  # of trees: as much memory as sequences of one example
        rows, length = -(-length // most), most
    every = evaluation_steps(config, per_epoch)
    num_evaluations = config.evaluation.before + math.ceil(num_steps / every)
    if num_steps == MOST:
        num_evaluations = config.evaluation.before + 1
    return Work(
        batch_size=shape.batch_size,
        num_sequences=rows,
        length=length,
        num_targets=max(len(batch["targets"]) for batch in micro_batches),
        accumulates=any(len(step.micro_batches) > 1 for step in steps),
        num_steps=num_steps,
        tokens_per_step=sum(step.num_tokens for step in steps) / len(steps),
        computed_per_step=sum(step.num_computed for step in steps) / len(steps),
        examples_per_step=len(examples) / len(steps),
        num_evaluations=num_evaluations if held_out is not None else 0,
        evaluate_every=every,
        used_rows=len(train.used_ids),
        coverage=coverage(train, held_out),
        prompt_length=max(held_out.lengths) if held_out is not None else 0,
    )


def changes(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """Return the changes that could save memory, as overrides, each with the changed config."""
    tree = config.model_dump(mode="json")

    def changed(section: str, **values: Any) -> RunConfig:
        return RunConfig.model_validate({**tree, section: {**tree[section], **values}})

    found: list[tuple[str, RunConfig]] = []
    if config.training.micro_batch_size > 1:
        found.append(("training.micro_batch_size=1", changed("training", micro_batch_size=1)))
    if not config.training.activation_checkpointing:
        checkpointing = changed("training", activation_checkpointing=True)
        found.append(("training.activation_checkpointing=true", checkpointing))
    if config.data.max_length > 1:
        half = config.data.max_length // 2
        found.append((f"data.max_length={half}", changed("data", max_length=half)))
    if config.model.lora is None:
        found.append(("model.lora.rank=16", changed("model", lora={"rank": 16})))
    if optimizer_info(config.optimizer.name).state_bytes > optimizer_info("adafactor").state_bytes:
        # The options of one optimizer are not those of another.
        section = {"name": "adafactor", "lr": tree["optimizer"]["lr"]}
        adafactor = RunConfig.model_validate({**tree, "optimizer": section})
        found.append(("optimizer.name=adafactor", adafactor))
    if config.evaluation.batch_size > 1:
        found.append(("evaluation.batch_size=1", changed("evaluation", batch_size=1)))
    if config.generation.batch_size > 1:
        found.append(("generation.batch_size=1", changed("generation", batch_size=1)))
    return found
