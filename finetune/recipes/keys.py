"""`finetune keys`: what a config may hold, from the schema and the optimizers' sources."""

import json
import textwrap

from finetune.config.keys import json_schema, list_keys
from finetune.config.schema import OptimizerSection
from finetune.optim.registry import list_optimizers, optimizer_info, options_in_source


def print_keys(pattern: str, *, schema: bool) -> None:
    """Print the keys that match: name, default, values and meaning. `schema` prints all as JSON.

    An option of optimizers is printed with those that take it. Raises UserError if nothing matches.
    """
    if schema:
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
        return
    option = pattern.removeprefix("optimizer.")
    infos = map(optimizer_info, list_optimizers())
    takers = [info.name for info in infos if option in options_in_source(info)]
    if takers and option not in OptimizerSection.model_fields:
        print(f"optimizer.{option}: an option of {', '.join(takers)}")
        print("    `finetune optimizers` has the defaults")
        return
    for key in list_keys(pattern):
        print(f"{key.name}: {key.default or '(required)'}")
        print(f"    takes {key.values}")
        if key.meaning:
            indent = " " * 4
            print(textwrap.fill(key.meaning, 96, initial_indent=indent, subsequent_indent=indent))
