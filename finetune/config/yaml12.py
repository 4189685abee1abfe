"""YAML as people expect it: the scalars of YAML 1.2's core schema, read by PyYAML.

PyYAML follows YAML 1.1, in which `2e-5` is text, `no` (Norwegian) is false, and `1:30` is ninety.
Of a key given twice it silently takes the last value. Here `2e-5` is a number, only true and false
are booleans, and a duplicate key is an error.
Source: https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from typing import Any

import yaml

_FLOAT_WORDS = re.compile(r"\.(inf|nan)")


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars and no duplicate keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or a mapping cannot be a key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


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
