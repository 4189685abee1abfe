"""`finetune keys`: what a config may hold, from the schema and the optimizers' sources."""

import json
import textwrap
from collections.abc import Iterable
from contextlib import suppress

from finetune.config.keys import Key, json_schema, list_keys
from finetune.config.schema import OptimizerSection
from finetune.errors import UserError
from finetune.optim.registry import list_optimizers, optimizer_info, options_in_source


def print_keys(pattern: str, *, schema: bool) -> None:
    """Print the keys that match: name, default, values and meaning. `schema` prints all as JSON.

    An option of optimizers is printed with those that take it, and before the keys of that name.
    Raises UserError if nothing matches.
    """
    if schema:
        if pattern != "*":
            raise UserError(f"--schema prints every key. Leave {pattern!r} out, or --schema")
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
        return
    option = pattern.removeprefix("optimizer.")
    infos = map(optimizer_info, list_optimizers())
    takers = [info.name for info in infos if option in options_in_source(info)]
    if not takers or option in OptimizerSection.model_fields:
        _print(list_keys(pattern))
        return
    print(f"optimizer.{option}: an option of {', '.join(takers)}")
    print("    `finetune optimizers` has the defaults")
    with suppress(UserError):  # if the option is all
        _print(list_keys(pattern))


def _print(keys: Iterable[Key]) -> None:
    for key in keys:
        print(f"{key.name}: {key.default or '(required)'}")
        print(f"    takes {key.values}")
        if key.meaning:
            indent = " " * 4
            print(textwrap.fill(key.meaning, 96, initial_indent=indent, subsequent_indent=indent))
