"""What the speed benchmarks compare: this project, a bare PyTorch loop, and TRL's SFTTrainer, each the main function of a process.

All of them get the same weights, the same shipped conversations, AdamW (fused, no decay), clipping at 1.0, and bf16 only where
`finetune.models.precision` says that the chip multiplies it:

- finetune      the recipes' own parts and Trainer, packed rows, examples isolated from each other, loss on the assistant's turns;
                `finetune:MODE` with that vocabulary.mode, `finetune` alone with the default
- bare          30 lines of PyTorch: token ids laid end to end and cut into rows, Hugging Face's own loss over all: the floor
- trl-packed    SFTTrainer, its best-fit packing: one padding-free row, examples isolated
- trl-wrapped   SFTTrainer, its other packing: rows cut anywhere, examples see each other (what the bare loop does)
- trl-padded    SFTTrainer without packing, rows of like length together, as many conversations a step as make as many tokens

TRL is given our token ids and labels, since its own assistant-only loss knows the templates of some model families only; gradient
checkpointing, which it has on by default, is off, and so is everything else that costs time.

Tokens are those that are not padding, and seconds go from the end of one step to the end of the next, so that data and logging are
in them. A contestant's figure for one round is the median over its steps after the warm-up. What a model has become is read by this
project's evaluation, in each contestant's own process. Other work on the machine falsifies all that: where there is some,
`--threads 1 --clock cpu` counts the processor seconds of one thread instead, which it changes little.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLIP = 1.0
TRL_MODES = ("trl-packed", "trl-wrapped", "trl-padded")
MODES = ("auto", "full", "active", "sampled", "frozen")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Stopwatch:
    """One entry a step: when it ended, and what was in it."""

    def __init__(self, clock: str) -> None:
        self.clock = CLOCKS[clock]
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.phases: dict[str, float] = {}  # seconds in all
        self.peak = 0

    def step(self, loss: float | None = None) -> None:
        self.ends.append(self.clock())
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if loss is not None:
            self.losses.append(loss)

    def result(self, found: dict[str, float]) -> dict[str, Any]:
        steps = len(self.ends)
        return {
            "seconds": [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)],
            "tokens": self.tokens[1:steps],  # the first step is only the start of the clock
            "targets": self.targets[1:steps],
            "tokens_trained": sum(self.tokens[:steps]),
            "peak_memory_bytes": self.peak,
            "losses": self.losses,
            "phases": self.phases,
            **found,
        }

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            started = self.clock()
            try:
                return function(*positional, **named)
            finally:
                self.phases[name] = self.phases.get(name, 0.0) + self.clock() - started

        return call


def run_finetune(args: argparse.Namespace) -> dict[str, Any]:
    import finetune.models.language_model as language_model
    from finetune.models.vocabulary import deactivate_vocabulary

    watch = Stopwatch(args.clock)

    def on_record(record: Any) -> None:
        watch.tokens.append(record["num_tokens"])
        watch.targets.append(record["num_target_tokens"])
        watch.step(record["loss"])
        if len(watch.ends) == 1:
            watch.phases.clear()

    language_model.causal_lm_loss = watch.timed("head", language_model.causal_lm_loss)
    with our_trainer(args, on_record) as (trainer, parts):
        trainer.optimizer.step = watch.timed("optimizer", trainer.optimizer.step)
        trainer.train()
        deactivate_vocabulary(parts.language_model)
        return watch.result(read_model(args, parts.model))


def run_bare(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from finetune.models.precision import resolve_precision

    _, train = read_data(args)
    ids = torch.tensor([token for i in shuffled(len(train), args.seed) for token in train[i].input_ids])
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    bf16 = resolve_precision("auto", "cpu")[0] == "bf16"
    model = load_plain(args).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    watch = Stopwatch(args.clock)
    for step in range(args.steps):
        batch = rows[[(step * args.rows + row) % len(rows) for row in range(args.rows)]]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        watch.tokens.append(batch.numel())
        watch.targets.append(args.rows * (args.length - 1))
        watch.step(loss.item())
    return watch.result(read_model(args, model))


def run_trl(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    sys.path.append(str(args.trl))
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetune.models.precision import resolve_precision

    tokenizer, train = read_data(args)
    examples = [train[i] for i in shuffled(len(train), args.seed)]
    dataset = Dataset.from_dict({"input_ids": [list(e.input_ids) for e in examples], "labels": [list(e.labels) for e in examples]})
    rows, options = args.rows, {"packing": mode != "trl-padded"}
    if mode == "trl-padded":
        rows = max(1, round(args.rows * args.length * len(examples) / sum(map(len, examples))))
        options |= {"train_sampling_strategy": "group_by_length"}
    else:
        options |= {"packing_strategy": "wrapped" if mode == "trl-wrapped" else "bfd"}
    config = SFTConfig(
        output_dir=str(args.folder),
        max_length=args.length,
        per_device_train_batch_size=rows,
        max_steps=args.steps,
        seed=args.seed,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        bf16=resolve_precision("auto", "cpu")[0] == "bf16",
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs=None,
        **options,
    )
    watch = Stopwatch(args.clock)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step()

    def counting(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def collate_and_count(features: Any) -> Any:
            batch = collate(features)
            mask = batch.get("attention_mask")
            watch.tokens.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
            watch.targets.append(int((batch["labels"][:, 1:] != -100).sum()))
            return batch

        return collate_and_count

    model = load_plain(args)
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()])
    trainer.data_collator = counting(trainer.data_collator)
    trainer.train()
    plain = load_plain(args)  # TRL patches its model's forward
    plain.load_state_dict(model.state_dict())
    return watch.result(read_model(args, plain))


def run_peak(args: argparse.Namespace) -> dict[str, Any]:
    """The machine's best rate for the model's MLP product, in the dtype that the contestants multiply in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.models.precision import resolve_precision

    config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tables = {id(module.weight) for module in (model.get_input_embeddings(),)} - {id(model.get_output_embeddings().weight)}
    multiplied = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)
    dtype = torch.bfloat16 if resolve_precision("auto", "cpu")[0] == "bf16" else torch.float32
    tokens, width = args.rows * args.length, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    a, b, out = (torch.randn(*shape, dtype=dtype) for shape in ((tokens, width), (inner, width), (tokens, inner)))
    best, clock = 0.0, CLOCKS[args.clock]
    for _ in range(40):
        started = clock()
        torch.mm(a, b.t(), out=out)
        best = max(best, 2 * tokens * width * inner / (clock() - started))
    return {"flops": best, "dtype": str(dtype).removeprefix("torch."), "multiplied_parameters": multiplied}


def has_template(model: Path) -> bool:
    return (model / "chat_template.jinja").is_file() or "chat_template" in (model / "tokenizer_config.json").read_text()


def our_config(args: argparse.Namespace) -> Any:
    from finetune.config import RunConfig

    return RunConfig.model_validate(
        {
            "output_dir": args.folder,
            "seed": args.seed,
            "model": {"name": str(args.model), "chat_template": None if has_template(args.model) else "chatml"},
            "vocabulary": {"mode": args.worker.partition(":")[2] or "auto", "num_sampled": args.num_sampled},
            "data": {
                "train": "package:chat.en.train",
                "validation": "package:chat.en.test",
                "format": "chat",
                "max_length": args.length,
                "max_validation_rows": args.held_out,
            },
            "optimizer": {"name": "adamw", "lr": args.lr, "weight_decay": 0.0},
            "scheduler": {"name": "constant", "warmup_steps": 0},
            "training": {
                "max_steps": args.steps,
                "batch_size": args.rows,
                "micro_batch_size": args.rows,
                "max_grad_norm": CLIP,
            },
            "evaluation": {"batch_size": args.rows},
        }
    )


@contextmanager
def our_trainer(args: argparse.Namespace, on_record: Callable[[Any], None]) -> Iterator[tuple[Any, Any]]:
    """The trainer as the recipe builds it, without evaluations, checkpoints and export."""
    from finetune.display import Display
    from finetune.divergence import DivergenceGuard
    from finetune.optim import build_lr_scheduler, build_optimizer
    from finetune.recipes.parts import build_parts, make_accelerator
    from finetune.recipes.training import optimizer_options
    from finetune.run_dir import RunDir
    from finetune.tracking import MetricLogger
    from finetune.trainer import Cadence, Trainer

    class NoCheckpoints:
        def save(self, *_: Any, **__: Any) -> None:
            pass

    config, display = our_config(args), Display(enabled=False)
    accelerator = make_accelerator(config, display)
    parts = build_parts(config, accelerator=accelerator, display=display)
    optimizer = build_optimizer(parts.model, config.optimizer.name, **optimizer_options(config))
    scheduler = build_lr_scheduler(optimizer, "constant", num_steps=args.steps, warmup_steps=0, min_lr_ratio=0.0)
    module, optimizer = accelerator.prepare(parts.language_model, optimizer)
    run = RunDir(args.folder)
    yield (
        Trainer(
            accelerator=accelerator,
            model=module,
            optimizer=optimizer,
            scheduler=scheduler,
            batches=parts.batches,
            evaluate=lambda step: {},
            cadence=Cadence(args.steps, args.steps, args.steps, "loss", False, None),
            checkpoints=NoCheckpoints(),  # type: ignore[arg-type]
            logger=MetricLogger(run.metrics, listeners=(on_record,)),
            guard=DivergenceGuard(threshold=config.training.divergence_threshold),
            max_grad_norm=CLIP,
            seed=config.seed,
            identity=parts.identity,
            bad_batch_path=run.bad_batch,
            before_step=parts.vocabulary.before_step,
        ),
        parts,
    )


def read_data(args: argparse.Namespace) -> tuple[Any, Any]:
    """Tokenizer and encoded training examples: what our recipe reads, for those who do not use it."""
    tokenizer, train, _ = _data(args)
    return tokenizer, train


def _data(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from finetune.models.skeleton import load_skeleton
    from finetune.models.tokenizers import load_tokenizer, prepare_chat
    from finetune.recipes.data import encode_rows, load_raw_data, make_format

    config = our_config(args)
    tokenizer = load_tokenizer(name=str(args.model))
    prepare_chat(None, tokenizer, config.model.chat_template)
    raw = load_raw_data(config.data, seed=0)
    format = make_format(config.data, tokenizer, raw.first_row)
    rows = max(load_skeleton(name=str(args.model)).get_input_embeddings().weight.shape[0], len(tokenizer))
    train, validation = (encode_rows(part, format, config.data, vocab_size=rows) for part in (raw.train, raw.validation))
    return tokenizer, train, validation


def load_plain(args: argparse.Namespace) -> Any:
    """The model as its makers' library loads it, with rows for the template's new tokens."""
    from finetune.recipes.model import make_model, make_tokenizer

    config = our_config(args).model
    return make_model(config, make_tokenizer(config, ()), seed=0)[0]


def read_model(args: argparse.Namespace, model: Any) -> dict[str, float]:
    """What a trained plain model has become: held-out loss over the full vocabulary, inside and outside the active tokens, the
    probability that goes to inactive ones, the loss on unrelated text, and how far the rows of inactive tokens have moved."""
    import torch

    from finetune.data.encode import encode
    from finetune.data.loader import EvaluationBatches
    from finetune.data.sources import Source, load_rows
    from finetune.data.text import TextFormat
    from finetune.evaluation import evaluate_loss
    from finetune.models.language_model import LanguageModel
    from finetune.models.vocabulary import activate_vocabulary
    from finetune.recipes.parts import pad_id
    from finetune.recipes.vocabulary import active_ids

    tokenizer, train, validation = _data(args)
    base = load_plain(args).get_input_embeddings().weight
    ids = sorted(i for i in active_ids(tokenizer, [train, validation], ()) if i < len(base))
    inactive = torch.ones(len(base), dtype=torch.bool)
    inactive[ids] = False
    moved = (model.get_input_embeddings().weight.detach() - base.detach())[inactive].abs().max()
    del base
    activate_vocabulary(model, ids)
    wrapped = LanguageModel(model)

    def loss_on(dataset: Any, mask: Any) -> dict[str, float]:
        batches = EvaluationBatches(
            dataset, max_length=args.length, packing=True, batch_size=args.rows, pad_id=pad_id(tokenizer), rank=0, num_processes=1
        )  # fmt: skip
        return evaluate_loss(wrapped, batches, inactive=mask, tokenizer=tokenizer, device=torch.device("cpu")).as_dict()

    found = loss_on(validation, inactive)
    found["held_out_loss"], found["inactive_rows_moved"] = found.pop("loss"), float(moved)
    if args.unrelated:
        rows = load_rows([Source(path=str(args.unrelated))]).take(100)
        text = encode(
            rows, TextFormat(tokenizer=tokenizer, columns={}), max_length=args.length, overlong="truncate", vocab_size=len(inactive)
        )
        found["unrelated_loss"] = loss_on(text, None)["loss"]
    return found


def run_untrained(args: argparse.Namespace) -> dict[str, Any]:
    """The base model, read as the others are after training."""
    return read_model(args, load_plain(args))


def shuffled(count: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def in_process(args: argparse.Namespace, name: str, rows: int, length: int, **changed: Any) -> dict[str, Any]:
    """Run one contestant in a process of its own and return what it measured; `changed` arguments are its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        given = {key: getattr(args, key) for key in COMMON} | {
            "worker": name,
            "rows": rows,
            "length": length,
            "folder": folder,
            "out": out,
        }
        given |= changed
        options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]
        ran = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            sys.exit(f"{name} failed:\n{ran.stdout[-4000:]}")
        return json.loads(out.read_text())


COMMON = ("model", "trl", "unrelated", "steps", "seed", "lr", "held_out", "threads", "clock", "num_sampled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of whole steps takes."""
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--trl", type=Path, help="the folder that TRL was installed into; without it TRL is left out")
    parser.add_argument("--unrelated", type=Path, help="a .txt or .jsonl file of another kind, to see what is forgotten")
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps a contestant and round")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--held-out", type=int, default=40, help="held-out conversations")
    parser.add_argument("--threads", type=int, help="of torch, default: its own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds, for a busy machine")
    parser.add_argument("--num-sampled", type=int, default=4096, help="frozen rows in a sample")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop with a sentence where the arguments do not go together."""
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: idle threads wait by spinning, and that would count")
    known = {"finetune", "bare", "untrained", *TRL_MODES, *(f"finetune:{mode}" for mode in MODES)}
    if unknown := set(args.contestants) - known:
        parser.error(f"unknown contestants: {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    if args.trl is None and set(args.contestants) & set(TRL_MODES):
        parser.error("TRL's contestants need --trl")


def median_rate(raw: dict[str, Any], what: str, warmup: int) -> float:
    """`what` (tokens or targets) a second: the median over the steps after the warm-up."""
    rates = [count / seconds for count, seconds in zip(raw[what], raw["seconds"], strict=True)]
    return statistics.median(rates[max(0, warmup - 1) :])  # the clock starts after the first step


def spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description="One contestant of bench_train.py or bench_vocabulary.py, in this process.")
    add_arguments(parser)
    for name, kind in (("worker", str), ("folder", Path), ("out", Path), ("rows", int), ("length", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    workers = {"finetune": run_finetune, "bare": run_bare, "peak": run_peak, "untrained": run_untrained}
    run = workers.get(args.worker.partition(":")[0])
    args.out.write_text(json.dumps(run_trl(args, args.worker) if run is None else run(args)))


if __name__ == "__main__":
    main()
