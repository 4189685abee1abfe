"""The checks of a model that someone else made: its folder, its config and its weights.

transformers checks few of these. A value that is out of its range may then fill the memory, loop
for ever, or give a model of random weights without an error.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.errors import Border, UserError, visible
from finetune.models.describe import token_tables

_logger = logging.getLogger(__name__)

SHOWN = 3  # weights that a sentence names
MOST_LAYERS = 10_000
AGAIN = "Copy or download the model again"

_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "*.index.json")
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}


def check_folder(folder: Path) -> None:
    """Raise UserError if a JSON file of a model's folder is broken, or leads out of the folder."""
    for path in sorted(file for name in _FILES for file in folder.glob(name)):
        with Border(f"{path} is not valid JSON", do=AGAIN):
            tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise UserError(f"{path} does not hold a JSON object. {AGAIN}")
        names = tree.get("weight_map", {}) if path.name.endswith(".index.json") else {}
        for name in names.values() if isinstance(names, dict) else [names]:
            inside = PurePosixPath(str(name))
            if not isinstance(name, str) or inside.is_absolute() or ".." in inside.parts:
                raise UserError(
                    f"{path} names the file {name!r}, which is not in {folder}. {AGAIN}"
                )
        for key, value in _numbers(tree):
            check_number(f"{key} of {path}", key, value)


def check_config(config: Any, where: str) -> None:
    """Raise UserError if a value of a transformers config is out of its range."""
    text = config.get_text_config()
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        value = of_all_layers(text, key)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{key} of {where} is {value}. Give 1 or more")
    for key, value in text.to_dict().items():
        if isinstance(value, int | float):
            check_number(f"{key} of {where}", key, value)


def of_all_layers(config: Any, key: str) -> Any:
    """Return a value of a transformers config; None if there is none, or if layers differ in it."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # how transformers answers for a value that layers have of their own
        return None


def check_number(what: str, key: str, value: float) -> None:
    """Raise UserError if no model can have `value` under `key`."""
    if not math.isfinite(value):
        raise UserError(f"{what} is {value}. Give a finite number")
    if key in _LAYERS and value > MOST_LAYERS:
        raise UserError(f"{what} is {value:,}. Give at most {MOST_LAYERS:,}")
    if ("dropout" in key or key.endswith("pdrop")) and not 0 <= value <= 1:
        raise UserError(f"{what} is {value}. Give a probability, from 0 to 1")
    if key.endswith(("_eps", "_epsilon")) and value < 0:
        raise UserError(f"{what} is {value}. Give 0 or more")


def _numbers(tree: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a tree with their keys; those in a list are left out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float) and abs(value) < 1 << 63:
            yield key, value


def check_weights(model: torch.nn.Module, found: Mapping[str, Any], name: str) -> None:
    """Raise UserError if weights are missing, have other shapes, or are not numbers.

    `found` is what transformers reports of loading.
    """
    missing, shapes = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if shapes:
        weight, given, wanted = shapes[0]
        raise UserError(
            f"model {name!r} does not fit its config: {visible(weight)} has the shape "
            f"{tuple(given)}, and {tuple(wanted)} is needed. {AGAIN}"
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"model {name!r} is not whole: the weights {missing[0]}{more} are missing. {AGAIN}"
        )
    for weight, value in model.named_parameters():
        # the sum is quick, and finite only if every number is
        if not torch.isfinite(value.detach().sum()) and not torch.isfinite(value).all():
            raise UserError(f"model {name!r} holds NaN or infinity in {weight}. {AGAIN}")


def say_unread(model: torch.nn.Module, found: Mapping[str, Any], name: str) -> None:
    """Log the weights of the files that the model does not have; see `check_weights`."""
    if unread := [visible(weight) for weight in sorted(found["unexpected_keys"])]:
        more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
        _logger.warning(
            "model %r has weights that a %s does not read: %s%s",
            name,
            type(model).__name__,
            ", ".join(unread[:SHOWN]),
            more,
        )


def settle_tying(model: PreTrainedModel, name: str) -> None:
    """Let the config of `model` say that its tables are two if they are, and log it.

    transformers ties tables only if they are equal, whatever the config says. The config would go
    on saying so beside the trained weights, and other programs would read one of the tables only.
    """
    configs: list[Any] = [model.config, model.config.get_text_config()]
    tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    table, head = token_tables(model) if tied else (None, None)
    if head is None or head is table:
        return
    for config in tied:
        config.tie_word_embeddings = False
    _logger.warning(
        "model %r has an output head that differs from its token table, though its config says "
        "tie_word_embeddings: true: the two stay apart",
        name,
    )


def check_stops(ids: object, where: str) -> None:
    """Raise UserError unless `ids` are None, a token id, or a list of them."""
    listed: Sequence[Any] = ids if isinstance(ids, list) else [] if ids is None else [ids]
    wrong = [each for each in listed if not isinstance(each, int) or isinstance(each, bool)]
    if wrong or any(each < 0 for each in listed):
        raise UserError(f"the stop tokens of {where} are {ids!r}. Give ids of tokens")
