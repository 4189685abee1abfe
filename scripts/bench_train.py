"""Speed of a whole training step: this project, a bare PyTorch loop, and TRL's SFTTrainer, in turn, in one run.

    python scripts/bench_train.py --model DIR [--trl DIR]       rounds at 4 x 256 and 4 x 512
    python scripts/bench_train.py --model DIR --quick           a short look at 4 x 256
    python scripts/bench_train.py --model DIR --profile         where one of our steps spends its time

--model is a Hugging Face folder; --trl is where `pip install --no-deps --target DIR trl==1.16.0` put TRL, which is no dependency.
Every contestant runs in a process of its own, with the same weights, the same shipped conversations, AdamW (fused, lr 1e-4, no
decay), clipping at 1.0, and bf16 only where `finetune.models.precision` says that the chip multiplies it:

- finetune     the recipes' own parts and Trainer, packed rows, examples isolated from each other, loss on the assistant's turns
- bare         30 lines of PyTorch: token ids laid end to end and cut into rows, Hugging Face's own loss over all of them: the floor
- trl-packed   SFTTrainer, its best-fit packing: one padding-free row, examples isolated
- trl-wrapped  SFTTrainer, its other packing: rows cut anywhere, examples see each other (what the bare loop does)
- trl-padded   SFTTrainer without packing, rows of like length together, as many conversations a step as make as many tokens

TRL is given our token ids and labels, since its own assistant-only loss knows the templates of some model families only; gradient
checkpointing, which it has on by default, is off, and so is everything else that costs time.

tokens/s counts tokens that are not padding, from the end of one step to the end of the next, so that data and logging are in it.
A contestant's figure for one round is the median over its steps after the warm-up; ratios are taken within a round, and the spread
is over rounds. Other work on the machine falsifies all that: where there is some, `--threads 1 --clock cpu` counts the processor
seconds of one thread instead, which it changes little.

Held-out loss is taken by this project's evaluation, in each one's own process, after (nearly) the same number of tokens. Share of
the matmul peak: 6 x (parameters that are multiplied, so the head but not the look-up) x tokens / seconds, attention left out, over
the measured rate of the model's MLP product. A contestant that leaves out the head where there is no target is credited with that
work. Prints a table for each shape, then one JSON line.
"""

import argparse
import json
import os
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

LR, CLIP = 1e-4, 1.0
TRL_MODES = ("trl-packed", "trl-wrapped", "trl-padded")
SHAPES = ((4, 256), (4, 512))
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Stopwatch:
    """One entry a step: when it ended, and what was in it."""

    def __init__(self, clock: str) -> None:
        self.clock = CLOCKS[clock]
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.peak = 0

    def step(self, loss: float | None = None) -> None:
        self.ends.append(self.clock())
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if loss is not None:
            self.losses.append(loss)

    def result(self, held_out_loss: float) -> dict[str, Any]:
        steps = len(self.ends)
        return {
            "seconds": [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)],
            "tokens": self.tokens[1:steps],  # the first step is only the start of the clock
            "targets": self.targets[1:steps],
            "tokens_trained": sum(self.tokens[:steps]),
            "peak_memory_bytes": self.peak,
            "losses": self.losses,
            "held_out_loss": held_out_loss,
        }


# ---- the contestants: each the main function of a process ----------------------------------------------------------------------


def run_finetune(args: argparse.Namespace) -> dict[str, Any]:
    watch = Stopwatch(args.clock)

    def on_record(record: Any) -> None:
        watch.tokens.append(record["num_tokens"])
        watch.targets.append(record["num_target_tokens"])
        watch.step(record["loss"])

    with our_trainer(args, on_record) as (trainer, parts):
        trainer.train()
        return watch.result(held_out_loss(parts.language_model, parts.evaluation_batches(parts.validation), parts.tokenizer))


def run_bare(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.models.precision import resolve_precision

    tokenizer, train, batches = read_data(args)
    ids = torch.tensor([token for i in shuffled(len(train)) for token in train[i].input_ids])
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    bf16 = resolve_precision("auto", "cpu")[0] == "bf16"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
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
    return watch.result(held_out_loss(wrap(model), batches, tokenizer))


def run_trl(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    sys.path.append(str(args.trl))
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetune.models.precision import resolve_precision

    tokenizer, train, batches = read_data(args)
    examples = [train[i] for i in shuffled(len(train))]
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
        learning_rate=LR,
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

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()])
    trainer.data_collator = counting(trainer.data_collator)
    trainer.train()
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)  # TRL patches its model's forward
    plain.load_state_dict(model.state_dict())
    return watch.result(held_out_loss(wrap(plain), batches, tokenizer))


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


# ---- what they share -----------------------------------------------------------------------------------------------------------


def our_config(args: argparse.Namespace) -> Any:
    from finetune.config import RunConfig

    return RunConfig.model_validate(
        {
            "output_dir": args.folder,
            "model": {"name": str(args.model)},
            "data": {
                "train": "package:chat.en.train",
                "validation": "package:chat.en.test",
                "format": "chat",
                "max_length": args.length,
                "max_validation_rows": args.held_out,
            },
            "optimizer": {"name": "adamw", "lr": LR, "weight_decay": 0.0},
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
        ),
        parts,
    )


def read_data(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Tokenizer, encoded training examples, held-out batches: what our recipe reads, for those who do not use it."""
    from finetune.data.loader import EvaluationBatches
    from finetune.models.tokenizers import load_tokenizer, prepare_chat
    from finetune.recipes.data import encode_rows, load_raw_data, make_format
    from finetune.recipes.parts import pad_id

    config = our_config(args)
    tokenizer = load_tokenizer(name=str(args.model))
    prepare_chat(None, tokenizer)
    raw = load_raw_data(config.data, seed=0)
    format = make_format(config.data, tokenizer, raw.first_row)
    train, validation = (encode_rows(rows, format, config.data, vocab_size=len(tokenizer)) for rows in (raw.train, raw.validation))
    batches = EvaluationBatches(
        validation,
        max_length=args.length,
        packing=True,
        batch_size=args.rows,
        pad_id=pad_id(tokenizer),
        rank=0,
        num_processes=1,
    )
    return tokenizer, train, batches


def shuffled(count: int) -> list[int]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def wrap(model: Any) -> Any:
    from finetune.models.language_model import LanguageModel

    return LanguageModel(model)


def held_out_loss(language_model: Any, batches: Any, tokenizer: Any) -> float:
    import torch

    from finetune.evaluation import evaluate_loss

    return evaluate_loss(language_model, batches, tokenizer=tokenizer, device=torch.device("cpu")).loss


# ---- the profile ---------------------------------------------------------------------------------------------------------------


def run_profile(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each part of our step, then the operators of one more step."""
    import torch

    import finetune.trainer as trainer_module

    clock = CLOCKS[args.clock]
    parts: dict[str, float] = {}
    steps: list[dict[str, float]] = []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            started = clock()
            try:
                return function(*positional, **named)
            finally:
                parts[name] = parts.get(name, 0.0) + clock() - started

        return call

    ends: list[float] = []
    usage = [resource.getrusage(resource.RUSAGE_SELF)]

    def on_record(record: Any) -> None:
        ends.append(clock())
        usage.append(resource.getrusage(resource.RUSAGE_SELF))
        if len(ends) > 1:
            known = dict(parts) | {"tokens": record["num_tokens"], "targets": record["num_target_tokens"]}
            total = ends[-1] - ends[-2]
            known |= {"everything else": total - sum(parts.values()), "step": total}
            known |= {
                "system time": usage[-1].ru_stime - usage[-2].ru_stime,
                "page faults": usage[-1].ru_minflt - usage[-2].ru_minflt,
            }
            steps.append(known)
        parts.clear()
        if len(ends) == args.steps - 1:
            profiler.__enter__()

    with our_trainer(args, on_record) as (trainer, _):
        trainer.model.forward = timed("forward (with the loss's gradient)", trainer.model.forward)
        trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
        trainer_module.clip_grad_norm_ = timed("clip", trainer_module.clip_grad_norm_)
        trainer.optimizer.step = timed("optimizer", trainer.optimizer.step)
        trainer.optimizer.zero_grad = timed("zero_grad", trainer.optimizer.zero_grad)
        source = trainer.batches
        trainer.batches = _Timed(source, timed)
        trainer.train()
        profiler.__exit__(None, None, None)
    peak = run_peak(args)
    plain = steps[: args.steps - 2]
    medians = {key: statistics.median(step[key] for step in plain) for key in plain[0]}
    return {"parts": medians, "operators": _operators(profiler), "peak": peak}


class _Timed:
    def __init__(self, batches: Any, timed: Callable[..., Any]) -> None:
        self.batches, self.timed = batches, timed

    def __iter__(self) -> Iterator[Any]:
        steps = iter(self.batches)
        while True:
            yield self.timed("data", next)(steps)

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()


def _operators(profiler: Any, count: int = 22) -> list[dict[str, Any]]:
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [
        {
            "name": e.key,
            "calls": e.count,
            "seconds": e.self_cpu_time_total / 1e6,
            "gflops": e.flops / 1e3 / max(1.0, e.self_cpu_time_total),
        }
        for e in events[:count]
    ]


def print_profile(args: argparse.Namespace, profile: dict[str, Any]) -> None:
    parts, peak = profile["parts"], profile["peak"]
    total = parts["step"]
    rate = 6 * peak["multiplied_parameters"] * parts["tokens"] / total
    counts = f"{parts['tokens']:.0f} tokens, {parts['targets']:.0f} targets"
    print(f"\none step of ours at {args.rows} x {args.length}: {total:.2f} s, {counts}")
    print(f"{rate / 1e9:.0f} of {peak['flops'] / 1e9:.0f} GFLOP/s ({peak['dtype']}), {rate / peak['flops']:.0%} of the peak\n")
    for name, value in parts.items():
        if name not in ("tokens", "targets", "step", "system time", "page faults"):
            print(f"{name:38} {value:8.3f} s {value / total:6.1%}")
    print(f"{'of all that, in the kernel':38} {parts['system time']:8.3f} s, {parts['page faults']:,.0f} page faults\n")
    print(f"{'operator (of one more step)':48} {'calls':>6} {'seconds':>8} {'GFLOP/s':>8}")
    for row in profile["operators"]:
        print(f"{row['name'][:48]:48} {row['calls']:6} {row['seconds']:8.3f} {row['gflops']:8.1f}")


# ---- rounds, table, JSON -------------------------------------------------------------------------------------------------------


def in_process(args: argparse.Namespace, name: str, rows: int, length: int) -> dict[str, Any]:
    """Run one contestant in a process of its own and return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        given = {
            "worker": name,
            "model": args.model,
            "trl": args.trl,
            "rows": rows,
            "length": length,
            "steps": args.steps,
            "held-out": args.held_out,
            "threads": args.threads,
            "clock": args.clock,
            "folder": folder,
            "out": out,
        }
        command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in given.items() if value is not None)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            sys.exit(f"{name} failed:\n{ran.stdout[-4000:]}")
        return json.loads(out.read_text())


def measure(args: argparse.Namespace, rows: int, length: int) -> dict[str, Any]:
    """All rounds at one shape: for every contestant a list with one summary a round."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contestants}
    peaks = []
    for number in range(args.rounds):
        peaks.append(in_process(args, "peak", rows, length))
        for name in args.contestants:
            raw = in_process(args, name, rows, length)
            raw["tokens_per_second"] = _median_rate(raw, "tokens", args.warmup)
            raw["targets_per_second"] = _median_rate(raw, "targets", args.warmup)
            rounds[name].append(raw)
            load = os.getloadavg()[0]
            print(
                f"  round {number + 1}, {rows} x {length}: {name} {raw['tokens_per_second']:.1f} tokens/s (load {load:.1f})",
                flush=True,
            )
    return {"rows": rows, "length": length, "peak": max(peaks, key=lambda peak: peak["flops"]), "rounds": rounds}


def _median_rate(raw: dict[str, Any], what: str, warmup: int) -> float:
    rates = [count / seconds for count, seconds in zip(raw[what], raw["seconds"], strict=True)]
    return statistics.median(rates[max(0, warmup - 1) :])  # the clock starts after the first step


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds, [least, most], and the ratios of rounds."""
    rounds, peak = measured["rounds"], measured["peak"]
    trl = [name for name in rounds if name.startswith("trl")]
    speed = {name: [r["tokens_per_second"] for r in results] for name, results in rounds.items()}
    rivals = {name: speed[name] for name in ("bare",) if name in speed}
    if trl:
        best = max(trl, key=lambda name: statistics.median(speed[name]))
        rivals[f"the best of TRL ({best})"] = speed[best]
    rows = {}
    for name, results in rounds.items():
        rows[name] = {
            "tokens_per_second": _spread(speed[name]),
            "targets_per_second": _spread([r["targets_per_second"] for r in results]),
            "peak_memory_gb": _spread([r["peak_memory_bytes"] / 1e9 for r in results]),
            "share_of_matmul_peak": _spread([6 * peak["multiplied_parameters"] * s / peak["flops"] for s in speed[name]]),
            "held_out_loss": results[-1]["held_out_loss"],
            "tokens_trained": results[-1]["tokens_trained"],
        }
    ratios = {}
    if "finetune" in speed:
        ratios = {name: _spread([a / b for a, b in zip(speed["finetune"], theirs, strict=True)]) for name, theirs in rivals.items()}
    return {key: measured[key] for key in ("rows", "length", "peak")} | {"contestants": rows, "finetune_over": ratios}


def _spread(values: list[float]) -> list[float]:
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


def print_table(summary: dict[str, Any], rounds: int) -> None:
    peak = summary["peak"]
    print(
        f"\n{summary['rows']} x {summary['length']}, {rounds} rounds; median over rounds [least, most]; "
        f"matmul peak {peak['flops'] / 1e9:.0f} GFLOP/s ({peak['dtype']})"
    )
    print(f"{'':12} {'tokens/s':>20} {'targets/s':>20} {'memory GB':>10} {'of peak':>8} {'held-out loss':>14} {'tokens':>8}")
    for name, row in summary["contestants"].items():
        print(
            f"{name:12} {_cell(row['tokens_per_second']):>20} {_cell(row['targets_per_second']):>20} "
            f"{row['peak_memory_gb'][2]:10.2f} {row['share_of_matmul_peak'][0]:8.0%} "
            f"{row['held_out_loss']:14.3f} {row['tokens_trained']:8}"
        )
    for name, (middle, least, most) in summary["finetune_over"].items():
        print(f"finetune is {middle:.2f} times as fast as {name} [{least:.2f}, {most:.2f}]")


def _cell(spread: list[float]) -> str:
    return f"{spread[0]:.0f} [{spread[1]:.0f}, {spread[2]:.0f}]"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--trl", type=Path, help="the folder that TRL was installed into; without it TRL is left out")
    parser.add_argument("--shapes", default=",".join(f"{rows}x{length}" for rows, length in SHAPES), help="ROWSxLENGTH,...")
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps a contestant and round")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed, at least 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", help=f"of finetune, bare, {', '.join(TRL_MODES)}; default: all")
    parser.add_argument("--held-out", type=int, default=40, help="held-out conversations")
    parser.add_argument("--threads", type=int, help="of torch, default: its own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds, for a busy machine")
    parser.add_argument("--quick", action="store_true", help="4 x 256 only, 3 steps, 1 round")
    parser.add_argument("--profile", action="store_true")
    for hidden in ("worker", "folder", "out"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    for hidden in ("rows", "length"):
        parser.add_argument(f"--{hidden}", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: idle threads wait by spinning, and that would count")
    names = args.contestants.split(",") if args.contestants else ["finetune", "bare", *(TRL_MODES if args.trl else ())]
    if unknown := set(names) - {"finetune", "bare", *TRL_MODES}:
        parser.error(f"unknown contestants: {', '.join(sorted(unknown))}")
    if args.trl is None and set(names) & set(TRL_MODES):
        parser.error("TRL's contestants need --trl")
    args.contestants = names
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    if args.quick:
        args.shapes, args.steps, args.rounds, args.held_out, args.warmup = args.shapes[:1], 3, 1, 8, 1
    return args


def work(args: argparse.Namespace) -> None:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    workers = {"finetune": run_finetune, "bare": run_bare, "peak": run_peak, "profile": run_profile}
    args.folder = Path(args.folder)
    run = workers.get(args.worker)
    result = run_trl(args, args.worker) if run is None else run(args)
    Path(args.out).write_text(json.dumps(result))


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    if args.profile:
        for rows, length in args.shapes:
            args.rows, args.length = rows, length
            print_profile(args, in_process(args, "profile", rows, length))
        return
    summaries = []
    for rows, length in args.shapes:
        summaries.append(summarise(measure(args, rows, length)))
        print_table(summaries[-1], args.rounds)
    print(json.dumps({"steps": args.steps, "warmup": args.warmup, "rounds": args.rounds, "shapes": summaries}))


if __name__ == "__main__":
    main()
