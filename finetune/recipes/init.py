"""`finetune init`: a config for someone's files, with sizes that fit the data and the machine."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.loading import make_config
from finetune.data.batches.packing import pack
from finetune.data.formats.translation import TranslationFormat
from finetune.data.sources import Records
from finetune.data.sources.files import KINDS, kind_ending
from finetune.data.types import Tokenizer
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import describe_model
from finetune.models.tokenizers import load_tokenizer
from finetune.recipes.build.material import Material, read_material
from finetune.recipes.build.model import model_spec
from finetune.recipes.plan.planner import Planner
from finetune.run.files import write_text

ENOUGH_STEPS = 60  # fewer teach little
_BATCH_SIZES = (16, 8, 4)  # sequences of a step, the first that makes enough steps
_MOST_EPOCHS = 10
_HELD_OUT = 20  # examples that are held out, at least, of a small data set
_LARGEST_SHARE = 0.2  # of it that is held out, at most
_LENGTHS = tuple(range(64, 513, 64))  # tokens; the first that holds all but a few examples
_CUT = 0.01  # share of the examples that may be cut


@dataclass(frozen=True)
class Sizes:
    """What of a config depends on the data and the machine."""

    max_length: int
    packing: bool
    batch_size: int
    epochs: int
    steps_per_epoch: int
    validation_fraction: float


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
    if output.exists():
        raise UserError(f"{output} already exists. Name another file with --output")
    tree = _first_tree(files, model, languages)
    material = read_material(make_config(tree), Display(enabled=False))
    assert isinstance(material.raw.train, Records), "a first config does not stream"
    display.say(f"encoding {len(material.raw.train):,} records as {material.format.name}")
    sizes = sizes_for(material.train.lengths, len(material.raw.train))
    tree["data"] |= {
        "max_length": sizes.max_length,
        "packing": sizes.packing,
        "validation_fraction": sizes.validation_fraction,
    }
    tree["training"] = {"epochs": sizes.epochs, "batch_size": sizes.batch_size}
    described = describe_model(material.skeleton)
    tree["optimizer"] = {"lr": learning_rate(described["parameters"])}
    micro_batch, fits = _micro_batch(tree, sizes.batch_size, display)
    tree["training"]["micro_batch_size"] = micro_batch
    write_text(output, _as_text(tree, material, sizes, described["parameters"], output))
    display.say(
        f"{output}: {material.format.name}, {len(material.train):,} examples, about "
        f"{sizes.epochs * sizes.steps_per_epoch:,} steps of {sizes.batch_size} sequences"
    )
    if not fits:
        display.say(f"it may not fit into memory. `finetune plan {output}` says what would help")
    display.say(f"next: finetune inspect {output}; finetune train {output}")


def sizes_for(lengths: Sequence[int], num_records: int) -> Sizes:
    """Return sizes with which examples of these lengths, in tokens, make enough steps.

    The largest batch that makes ENOUGH_STEPS steps in three epochs is taken, packed if it can be.
    If there is none, the smallest batch is taken, and more epochs.
    """
    longest = sorted(lengths)[math.ceil((1 - _CUT) * len(lengths)) - 1]
    max_length = next((length for length in _LENGTHS if longest <= length), _LENGTHS[-1])
    share = min(_LARGEST_SHARE, max(0.05, _HELD_OUT / num_records))
    kept = 1 - share
    packed = max(
        1, math.floor(kept * len(pack([min(n, _LENGTHS[-1]) for n in lengths], _LENGTHS[-1])))
    )
    alone = max(1, math.floor(kept * len(lengths)))
    for packing, sequences in ((True, packed), (False, alone)):
        length = _LENGTHS[-1] if packing else max_length
        for batch_size in _BATCH_SIZES:
            steps = math.ceil(sequences / batch_size)
            if 3 * steps >= ENOUGH_STEPS:
                return Sizes(length, packing, batch_size, 3, steps, round(share, 2))
    steps = math.ceil(alone / _BATCH_SIZES[-1])
    epochs = min(_MOST_EPOCHS, math.ceil(ENOUGH_STEPS / steps))
    return Sizes(max_length, False, _BATCH_SIZES[-1], epochs, steps, round(share, 2))


def learning_rate(parameters: int) -> float:
    """Return the rate that worked for a model of this size (docs/guide.md)."""
    return 1e-4 if parameters < 300e6 else 2e-5


def _first_tree(
    files: Sequence[str], model: str, languages: tuple[str | None, str | None]
) -> dict[str, Any]:
    """Return a config of the files that leaves out bad records and holds nothing out."""
    sources: list[Any] = list(files)
    if len(files) == 2 and not any(_is_data(file) for file in files):
        sources = [{"path": files[0], "target_path": files[1]}]
    data: dict[str, Any] = {
        "train": sources[0] if len(sources) == 1 else sources,
        "on_bad_record": "drop",
        "validation_fraction": 0.0,
        "max_length": _LENGTHS[-1],
    }
    source, target = languages
    if source is not None or target is not None:
        data["translation"] = {"source_language": source, "target_language": target}
    tree: dict[str, Any] = {"output_dir": "run", "model": {"name": model}, "data": data}
    tokenizer: Tokenizer = load_tokenizer(model_spec(make_config(tree).model))
    if tokenizer.chat_template is None:
        tree["model"]["chat_template"] = "chatml"
    return tree


def _is_data(file: str) -> bool:
    return kind_ending(Path(file)) in KINDS


def _micro_batch(tree: dict[str, Any], batch_size: int, display: Display) -> tuple[int, bool]:
    """Return how many sequences of a step fit into memory at once, and whether one of them does."""
    sizes = [size for size in (8, 4, 2, 1) if size <= batch_size]
    for size in sizes:
        display.say(f"working out the memory of {size} sequences at once")
        training = {**tree["training"], "micro_batch_size": size}
        planner = Planner(make_config({**tree, "training": training}), Display(enabled=False))
        if planner.plan().fits:
            return size, True
    return 1, False


def _as_text(
    tree: dict[str, Any], material: Material, sizes: Sizes, parameters: int, output: Path
) -> str:
    """Return the config as YAML, with the reason of each choice beside it."""
    data, training, format = tree["data"], tree["training"], material.format
    counts = material.train.statistics
    held_out = round(sizes.validation_fraction * len(material.raw.train))  # type: ignore[arg-type]
    lines = [
        f"# Written by `finetune init` for {counts.records:,} records.",
        "# `finetune keys` lists all keys, `finetune plan` predicts memory and time.",
        f"# Command:  finetune train {output}",
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
    together = "several examples share a sequence" if sizes.packing else "one example a sequence"
    longest = max(material.train.lengths)
    lines += [
        f"  validation_fraction: {sizes.validation_fraction:g}  # {held_out:,} records held out",
        f"  max_length: {sizes.max_length}  # tokens; the longest example has {longest:,}",
        f"  packing: {str(sizes.packing).lower()}  # {together}",
        "",
        "optimizer:",
        f"  lr: {tree['optimizer']['lr']:g}  # divide it by 3 if the loss jumps",
        "",
        "training:",
        f"  epochs: {sizes.epochs}",
        f"  batch_size: {sizes.batch_size}  # sequences a step, which makes about "
        f"{sizes.steps_per_epoch:,} steps an epoch",
        f"  micro_batch_size: {training['micro_batch_size']}  # sequences in memory at once",
    ]
    return "\n".join(lines) + "\n"


def _quoted(value: Any) -> str:
    """Return a value as YAML takes it on one line."""
    return json.dumps(value, ensure_ascii=False)
