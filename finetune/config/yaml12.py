"""YAML as people expect it: the scalars of YAML 1.2's core schema, read by PyYAML.

PyYAML follows YAML 1.1, in which `2e-5` is text, `no` (Norwegian) is false, and `1:30` is ninety.
Of a key given twice it silently takes the last value. Here `2e-5` is a number, only true and false
are booleans, and a duplicate key is an error. Merge keys (`<<`) are those of YAML 1.1.
Source: https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from typing import Any

import yaml

_FLOAT_WORDS = re.compile(r"\.(inf|nan)")


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars and no duplicate keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(
                    None, None, "a list or a mapping cannot be a key", key.start_mark
                )
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


CoreLoader.add_implicit_resolver(  # of YAML 1.1, and widely used: <<: *defaults
    "tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"]
)
CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")
)
CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
CoreLoader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(_FLOAT_WORDS.sub(r"\1", node.value.lower())),
)


def parse(text: str) -> Any:
    """Return the value of one YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=CoreLoader)
