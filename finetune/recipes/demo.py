"""`finetune demo`: the shipped configs on the shipped data, with the result printed."""

import json
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from finetune.config import RunConfig, load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.build.card import how_to_try
from finetune.recipes.build.look import look_at
from finetune.recipes.train.samples import say_samples
from finetune.run.folder import RunDir

if TYPE_CHECKING:
    from finetune.training.trainer import Stopped

SHORT = (
    "training.max_steps=3",
    "data.max_validation_records=8",
    "evaluation.generate=4",
    "evaluation.samples=2",
    "generation.max_new_tokens=16",
)


def demo_config(
    task: str, overrides: Sequence[str] = (), *, short: bool, output_dir: Path | None
) -> RunConfig:
    """Return resources/demo_TASK.yaml with `overrides` (key=value), and with SHORT if `short`.

    The demo's own folder is written anew each time. Raises UserError if `output_dir` holds a run,
    and as `look_at` does.
    """
    folder = [f"output_dir={json.dumps(str(output_dir))}"] if output_dir is not None else []
    with as_file(files("finetune.resources") / f"demo_{task}.yaml") as path:
        own = load_config(path)
        config = load_config(path, [*(SHORT if short else ()), *overrides, *folder])
    if config.output_dir != own.output_dir and RunDir(config.output_dir).is_run():
        raise UserError(
            f"{config.output_dir} holds a run already. Name another --output-dir, or delete it"
        )
    look_at(config)
    return config


def run_demo(config: RunConfig) -> "Stopped":
    """Fine-tune SmolLM2-135M as `config` says, and print what changed and what to do next."""
    from finetune.recipes.train.train import run_training

    display = Display()
    stopped = run_training(config, display=display)
    if stopped != "signal":
        run = RunDir(config.output_dir)
        say_samples(run, display)
        _say_next_steps(run, display)
    return stopped


def _say_next_steps(run: RunDir, display: Display) -> None:
    """Say the commands that try the model, and that make and run one file of it."""
    root, shipped, name = (
        quote(str(text)) for text in (run.root, f"{run.root}-shipped", run.root.name)
    )
    display.say(f"\nTry the model:    {how_to_try(run)}")
    display.say(
        f"Make one file:    finetune export {root} {shipped} --trim --gguf q8_0 --dtype bfloat16"
    )
    display.say(
        f"Run it in Ollama: ollama create {name} -f {shipped}/Modelfile && ollama run {name}"
    )
