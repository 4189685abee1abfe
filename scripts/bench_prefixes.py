"""Whole steps with shared beginnings: this project with and without, and TRL's SFTTrainer.

    python scripts/bench_prefixes.py --model DIR [--trl DIR] [--cases a,b,c,d] [--rounds 3]

a: tool calls behind seven declarations (`tool_calls_data.py`); b: a support bot with house rules;
c: the translation demo; d: plain texts, with nothing in common. A step has 16 sequences of at most
512 tokens, in micro-batches of 4 (c and d: 4 sequences), in float32, with AdamW and clipping.

Contestants, each in a process of its own, in turn: "shared" and "unshared" are this project.
"trl-padded" and "trl-packed" are TRL's without and with its packing, at the same examples a step.
Examples a second: the median over the steps after the first. "above" is the peak of the process's
memory above that with weights, gradients and optimizer state (after a first step), in MiB. With
--clock cpu --threads 1 the seconds are those of the processor, for a busy machine. --layers cuts
the model down to its first layers, for a quick look. Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import tool_calls_data
from harness import CLOCKS, Stopwatch, spread
from rivals import trl_trainer

CASES = {
    "a": ("tool calls, 7 declarations", 16),
    "b": ("a support bot with rules", 16),
    "c": ("the translation demo", 4),
    "d": ("nothing in common", 4),
}
CONTESTANTS = ("shared", "unshared", "trl-padded", "trl-packed")
LENGTH, MICRO = 512, 4


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, or package:NAME")
    parser.add_argument("--trl", help="the folder into which TRL was installed; '.': it is there")
    parser.add_argument("--cases", default="a,b,c,d")
    parser.add_argument("--contestants", help="default: all, TRL's with --trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="with a first one that is not timed")
    parser.add_argument("--length", type=int, default=LENGTH, help="most tokens of a sequence")
    parser.add_argument("--micro", type=int, default=MICRO, help="sequences of a micro-batch")
    parser.add_argument("--chat-template", help="as model.chat_template, for a model without one")
    parser.add_argument("--mode", default="auto", help="our vocabulary.mode")
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = CONTESTANTS if args.trl else CONTESTANTS[:2]
    args.names = args.contestants.split(",") if args.contestants else names
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: idle threads wait by spinning")
    if not set(args.names) <= set(CONTESTANTS) or not set(args.cases.split(",")) <= set(CASES):
        parser.error(f"cases are {', '.join(CASES)}; contestants {', '.join(CONTESTANTS)}")
    return args


def data_of(case: str, length: int, folder: Path) -> dict[str, Any]:
    """Return the data section of a case."""
    held_out: dict[str, Any] = {"max_length": length, "max_validation_records": 8}
    if case == "c":
        return {"train": "package:translation.en-fr.train", "validation_fraction": 0.01} | held_out
    if case == "d":
        pairs = files("finetune.resources") / "data" / "translation.en-fr.train.jsonl"
        texts = [json.loads(line)["translation"]["fr"] for line in pairs.open(encoding="utf-8")]
        path = folder / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return {"train": str(path), "validation_fraction": 0.02} | held_out
    tool_calls_data.write(folder, {"a": "tools", "b": "support"}[case], 1000, 0)
    paths = {part: str(folder / f"{part}.jsonl") for part in ("train", "test")}
    return {"train": paths["train"], "validation": paths["test"]} | held_out


def config_of(args: argparse.Namespace, folder: Path) -> Any:
    """Return the config of our run; its data is everybody's."""
    from finetune.config import RunConfig

    training = {
        "max_steps": args.steps,
        "batch_size": CASES[args.case][1],
        "micro_batch_size": args.micro,
        "precision": "fp32",
        "share_prefixes": "auto" if args.worker == "shared" else False,
    }
    return RunConfig.model_validate(
        {
            "output_dir": folder / "run",
            "model": {"name": args.model, "chat_template": args.chat_template},
            "data": data_of(args.case, args.length, folder),
            "vocabulary": {"mode": args.mode},
            "optimizer": {"name": "adamw", "lr": 1e-5, "weight_decay": 0.0},
            "training": training,
        }
    )


def shorten(model: Any, layers: int | None) -> None:
    """Leave the model its first layers."""
    if layers is not None:
        model.base_model.layers = model.base_model.layers[:layers]


class Memory:
    """The most memory that the process held since the end of the first step, above that."""

    def __init__(self) -> None:
        self.resting = 0

    def peak(self) -> int:
        """Return the bytes. The first call is the end of the first step."""
        if not self.resting:
            self.resting = self._read("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        return self._read("VmHWM") - self.resting

    def _read(self, key: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith(key)))


def run_ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what this project measured of itself."""
    from finetune.display import Display
    from finetune.distributed.engines import prepare
    from finetune.recipes.build.accelerator import make_accelerator
    from finetune.recipes.build.material import read_material
    from finetune.recipes.build.optimizer import make_optimizer
    from finetune.recipes.build.parts import assemble
    from finetune.training.step import take_step

    config, display = config_of(args, folder), Display(enabled=False)
    accelerator = make_accelerator(config, display)
    parts = assemble(read_material(config, display), accelerator=accelerator, display=display)
    shorten(parts.language_model.causal_lm, args.layers)
    raw = make_optimizer(parts.model, config)
    module, optimizer, average = prepare(accelerator, parts.language_model, raw, display)
    watch, examples, counts = Stopwatch(args.clock, Memory().peak), list[int](), [0, 0]
    for number, batch in zip(range(args.steps), parts.batches):
        parts.vocabulary.before_step(number, batch)
        found = take_step(
            module, optimizer, batch, accelerator=accelerator, max_grad_norm=1.0,
            average_rows=average,
        )  # fmt: skip
        watch.step(found.loss)
        examples.append(sum(len(ids) for part in batch.example_ids for ids in part))
        counts = [counts[0] + batch.num_tokens, counts[1] + batch.num_computed]
    return watch.result({"examples": examples, "fewer_tokens": counts[0] / counts[1]})


def run_trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what was measured of TRL's SFTTrainer."""
    sys.path.append(str(args.trl))
    from transformers import TrainerCallback

    from finetune.display import Display
    from finetune.recipes.build.material import read_material
    from finetune.recipes.build.model import make_model

    config = config_of(args, folder)
    material = read_material(config, Display(enabled=False))
    model = make_model(config.model, material.tokenizer, material.tokens, seed=0)
    shorten(model, args.layers)
    train, sequences = material.train, CASES[args.case][1]
    packing, watch = args.worker == "trl-packed", Stopwatch(args.clock, Memory().peak)
    per_step, micro = sequences, args.micro
    if not packing and max(train.lengths) <= args.length // 2:
        # As many examples as the packed sequences of a step hold, in micro-batches of eight.
        per_step = max(sequences, round(sequences * args.length * len(train) / sum(train.lengths)))
        micro = 8

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step()

    seen = 0

    def counting(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def collate_and_count(features: Any) -> Any:
            nonlocal seen
            batch = collate(features)
            starts = batch.get("position_ids")
            seen += len(batch["input_ids"]) if starts is None else int((starts == 0).sum())
            return batch

        return collate_and_count

    trainer = trl_trainer(
        model, material.tokenizer, list(train), folder / "trl", callbacks=[Clock()],
        packing=packing, max_length=args.length, max_steps=args.steps, bf16=False,
        per_device_train_batch_size=micro, gradient_accumulation_steps=max(1, per_step // micro),
        learning_rate=1e-5, weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    trainer.data_collator = counting(trainer.data_collator)
    trainer.train()
    even = [seen / args.steps] * args.steps  # collating may run ahead of steps
    return watch.result({"examples": even})


def in_process(args: argparse.Namespace, case: str, name: str) -> dict[str, Any]:
    """Run a contestant in a process of its own."""
    keys = (
        "model",
        "chat_template",
        "trl",
        "steps",
        "length",
        "micro",
        "mode",
        "layers",
        "threads",
        "clock",
    )
    given = {key: getattr(args, key) for key in keys} | {"case": case, "worker": name}
    options = [
        f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None
    ]
    ran = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{name} failed in case {case}:\n{ran.stderr[-4000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def worker(args: argparse.Namespace) -> None:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = run_trl if args.worker.startswith("trl") else run_ours
        print(json.dumps(run(args, Path(folder))))


def main() -> None:
    args = parse()
    if args.worker:
        worker(args)
        return
    summary: dict[str, Any] = {}
    for case in args.cases.split(","):
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in args.names}
        for _ in range(args.rounds):
            for name in args.names:
                found = in_process(args, case, name)
                pairs = zip(found["examples"][1:], found["seconds"], strict=True)
                rate = statistics.median(count / seconds for count, seconds in pairs)
                rounds[name].append(found | {"examples_per_second": rate})
                print(f"  {case}: {name} {rate:.3f} examples/s", file=sys.stderr, flush=True)
        summary[case] = {"what": CASES[case][0]} | {
            name: {
                "examples_per_second": spread([one["examples_per_second"] for one in found]),
                "above_mib": spread([one["peak_memory_bytes"] / 2**20 for one in found]),
                **{key: found[0][key] for key in ("fewer_tokens", "losses") if key in found[0]},
            }
            for name, found in rounds.items()
        }
        for name in args.names[1:]:
            pairs = zip(rounds[args.names[0]], rounds[name], strict=True)
            ratios = [a["examples_per_second"] / b["examples_per_second"] for a, b in pairs]
            summary[case][name]["times_faster"] = spread(ratios)
    print(f"{'case':30} {'contestant':12} {'examples/s':>10} {'times':>7} {'above, MiB':>11}")
    for found in summary.values():
        for name in args.names:
            rate, above = (found[name][key][0] for key in ("examples_per_second", "above_mib"))
            times = found[name].get("times_faster", [1.0])[0]
            print(f"{found['what']:30} {name:12} {rate:10.3f} {times:7.2f} {above:11.0f}")
    print(json.dumps({"model": args.model, "layers": args.layers, "cases": summary}))


if __name__ == "__main__":
    main()
