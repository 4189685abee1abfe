"""`finetune init`: a config for someone's files, with sizes that fit the data and the machine."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from finetune.config.loading import make_config
from finetune.data.batches.size import ENOUGH_STEPS
from finetune.data.formats.translation import TranslationFormat
from finetune.data.sources import Records, count_held_out
from finetune.data.types import Tokenizer
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import describe_model
from finetune.models.tokenizers import load_tokenizer
from finetune.recipes.build.data import format_in_words
from finetune.recipes.build.look import sources_of
from finetune.recipes.build.material import Material, read_material
from finetune.recipes.build.model import model_spec
from finetune.recipes.plan.planner import Planner, Work
from finetune.run.files import write_text
from finetune.run.wording import counted

_EPOCHS, _MOST_EPOCHS = 3, 10
_MAX_LENGTH = 512  # tokens


def init_config(
    files: Sequence[str],
    *,
    model: str,
    output: Path,
    languages: tuple[str | None, str | None] = (None, None),
    display: Display | None = None,
) -> None:
    """Write a commented config for `files` to `output`.

    The data is encoded with the model's tokenizer, and the memory of a step is worked out.
    `languages` are those of the columns `source` and `target`. Raises UserError if `output` exists,
    if the model cannot be had, or if no format fits the files.
    """
    display = display or Display()
    tree = _first_tree(files, model, languages)
    material = _read(tree, display)
    assert isinstance(material.raw.train, Records), "a first config does not stream"
    display.say(
        f"encoding {len(material.raw.train):,} records as {format_in_words(material.format)}"
    )
    records = len(material.raw.train)
    held_out = count_held_out(records, most=make_config(tree).data.max_validation_records)
    tree["data"]["validation_fraction"] = "auto"
    tree["training"] = {"epochs": epochs_for((1 - held_out / records) * len(material.train))}
    described = describe_model(material.skeleton)
    tree["optimizer"] = {"lr": learning_rate(described["parameters"])}
    planner = _planner(tree)
    size, fits = _micro_batch(tree, planner, display)
    if size is not None:
        tree["training"]["micro_batch_size"] = size
    work = planner.work
    write_text(output, _as_text(tree, material, work, described["parameters"], held_out, output))
    display.say(
        f"{output}: {material.format.name}, {len(material.train):,} examples, about "
        f"{work.num_steps:,} steps of {counted(work.examples_per_step, 'example')}"
    )
    typed = quote(str(output))
    if not fits:
        display.say(f"it may not fit into memory. `finetune plan {typed}` says what would help")
    display.say(f"next: finetune inspect {typed}; finetune train {typed}")


def _read(tree: dict[str, Any], display: Display) -> Material:
    """Read the data, and say what of it is left out. Raises UserError if all records are."""
    quiet = Display(enabled=False)
    try:
        material = read_material(make_config(tree), quiet)
        count = len(material.train)  # they are encoded now
    except UserError:  # such as that all were dropped; with none dropped it says why
        strict = {**tree["data"], "on_bad_record": "error"}
        len(read_material(make_config({**tree, "data": strict}), quiet).train)
        raise
    if count < 2:
        raise UserError("there is only one record. Give at least two: one is held out")
    for note in quiet.notes:
        display.say(note)
    return material


def epochs_for(num_examples: float) -> int:
    """Return the epochs in which so many examples make enough steps.

    Three are enough for most data (`training.batch_size: auto`). Less data gets more.
    """
    needed = math.ceil(ENOUGH_STEPS / max(1, num_examples))  # with one example a step
    return min(_MOST_EPOCHS, max(_EPOCHS, needed))


def learning_rate(parameters: int) -> float:
    """Return the rate that worked for a model of this size (docs/guide.md)."""
    return 5e-5 if parameters < 300e6 else 2e-5


def _first_tree(
    files: Sequence[str], model: str, languages: tuple[str | None, str | None]
) -> dict[str, Any]:
    """Return a config of the files that leaves out bad records and holds nothing out."""
    sources = sources_of(files)
    data: dict[str, Any] = {
        "train": sources[0] if len(sources) == 1 else sources,
        "on_bad_record": "drop",
        "validation_fraction": 0.0,
        "max_length": _MAX_LENGTH,
    }
    source, target = languages
    if source is not None or target is not None:
        data["translation"] = {"source_language": source, "target_language": target}
    tree: dict[str, Any] = {"output_dir": "run", "model": {"name": model}, "data": data}
    tokenizer: Tokenizer = load_tokenizer(model_spec(make_config(tree).model))
    if tokenizer.chat_template is None:
        tree["model"]["chat_template"] = "chatml"
    return tree


def _micro_batch(
    tree: dict[str, Any], planner: Planner, display: Display
) -> tuple[int | None, bool]:
    """Return how many sequences of a step fit into memory at once, and if one does.

    None: the whole step fits, and it is no larger than the usual micro-batch.
    """
    whole, usual = planner.work.batch_size, planner.config.training.micro_batch_size
    for size in (size for size in (8, 4, 2, 1) if size <= whole):
        display.say(f"working out the memory of {counted(size, 'sequence')} at once")
        changed = {**tree, "training": {**tree["training"], "micro_batch_size": size}}
        if _planner(changed).plan().fits:
            return None if size == whole <= usual else size, True
    return 1, False


def _planner(tree: dict[str, Any]) -> Planner:
    return Planner(make_config(tree), Display(enabled=False))


def _as_text(
    tree: dict[str, Any],
    material: Material,
    work: Work,
    parameters: int,
    held_out: int,
    output: Path,
) -> str:
    """Return the config as YAML, with the reason of each choice beside it."""
    data, training, format = tree["data"], tree["training"], material.format
    counts = material.train.statistics
    lines = [
        f"# Written by `finetune init` for {counts.records:,} records.",
        "# `finetune keys` lists all keys, `finetune plan` predicts memory and time.",
        f"# Command:  finetune train {quote(str(output))}",
        "",
        "model:",
        f"  name: {_quoted(tree['model']['name'])}  # {parameters / 1e6:,.0f} M parameters",
    ]
    if "chat_template" in tree["model"]:
        lines.append("  chat_template: chatml  # the model comes without one")
    lines += ["", "data:", f"  train: {_quoted(data['train'])}", f"  format: {format.name}"]
    if isinstance(format, TranslationFormat):
        source, target = format.languages
        lines.append(
            f"  translation: {{source_language: {_quoted(source)}, "
            f"target_language: {_quoted(target)}, direction: forward}}"
        )
    if counts.bad_records:
        lines.append(f"  on_bad_record: drop  # {counts.bad_records:,} records cannot be used")
    longer = {"cut": counts.truncated + counts.without_target, "split": counts.split}
    cut = "".join(f", {number:,} are {done}" for done, number in longer.items() if number)
    lines += [
        f"  validation_fraction: auto  # {counted(held_out, 'record')} held out",
        f"  max_length: {data['max_length']}  # tokens; the longest example has "
        f"{counts.longest:,}{cut}",
        "",
        "optimizer:",
        f"  lr: {tree['optimizer']['lr']:g}  # divide it by 3 if the loss jumps",
        "",
        "training:",
        f"  epochs: {training['epochs']}",
        f"  batch_size: auto  # now {counted(work.batch_size, 'sequence')}, about "
        f"{counted(work.examples_per_step, 'example')}, a step, and {work.num_steps:,} steps",
    ]
    if "micro_batch_size" in training:
        lines.append(
            f"  micro_batch_size: {training['micro_batch_size']}  # sequences in memory at once"
        )
    return "\n".join(lines) + "\n"


def _quoted(value: Any) -> str:
    """Return a value as YAML takes it on one line."""
    return json.dumps(value, ensure_ascii=False)
