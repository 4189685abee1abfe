"""`finetune keys`: what a config may hold, from the schema alone."""

import json
import textwrap

from finetune.config.keys import json_schema, list_keys


def print_keys(pattern: str, *, schema: bool) -> None:
    """Print the keys that match: name, default, values and meaning. `schema` prints all as JSON.

    Raises UserError if no key matches.
    """
    if schema:
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
        return
    for key in list_keys(pattern):
        print(f"{key.name}: {key.default or '(required)'}")
        print(f"    takes {key.values}")
        if key.meaning:
            indent = " " * 4
            print(textwrap.fill(key.meaning, 96, initial_indent=indent, subsequent_indent=indent))
