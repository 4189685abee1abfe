"""YAML as people expect it: the scalars of YAML 1.2's core schema, read by PyYAML.

PyYAML follows YAML 1.1, in which `2e-5` is text, `no` (Norwegian) is false, and `1:30` is ninety.
Of a key given twice it silently takes the last value. Here `2e-5` is a number, only true and false
are booleans, and a duplicate key is an error. Merge keys (`<<`) are those of YAML 1.1.
Source: https://yaml.org/spec/1.2.2/#103-core-schema

A document is small: aliases can make a few lines stand for a billion values, and brackets can
stand deeper than Python reads. Either is an error.
"""

import re
from typing import Any

import yaml

MOST_CHARACTERS = 4_000_000
MOST_VALUES = 100_000  # with aliases written out
MOST_LEVELS = 100  # of lists and mappings
MOST_DIGITS = 300  # of an integer

_MERGE = "tag:yaml.org,2002:merge"
_FLOAT_WORDS = re.compile(r"\.(inf|nan)")


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars and no duplicate keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    num_merged = 0  # pairs that merge keys stood for, in the whole document

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

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Write merge keys out, each key once: its own first, then the first of what is merged.

        Not by PyYAML, whose order changed with 6.0.4. Raises ConstructorError for what is no
        mapping, and if merge keys stand for too many values.
        """
        merged: dict[tuple[str, str], tuple[yaml.Node, yaml.Node]] = {}
        own = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                own[key.tag, key.value] = key, value
                continue
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(part, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(
                        None, None, "<< takes a mapping or a list of mappings", part.start_mark
                    )
                self.flatten_mapping(part)
                self.num_merged += len(part.value)
                if self.num_merged > MOST_VALUES:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"it merges more than {MOST_VALUES:,} values", part.start_mark
                    )
                for pair in part.value:
                    merged.setdefault((pair[0].tag, pair[0].value), pair)
        node.value = [*(merged | own).values()]

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return a text, with surrogate pairs as the characters that they stand for.

        JSON writes such pairs, and PyYAML leaves them apart. Raises ConstructorError for a half.
        """
        text = super().construct_scalar(node)
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError as error:
            raise yaml.constructor.ConstructorError(
                None, None, "a text has half of a surrogate pair", node.start_mark
            ) from error

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node. Raises ConstructorError if it is not what its tag says."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:40]!r} is not of the type {kind}", node.start_mark
            ) from error


CoreLoader.add_implicit_resolver(  # of YAML 1.1, and widely used: <<: *defaults
    _MERGE, re.compile(r"^(?:<<)$"), ["<"]
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
CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _integer(node.value))
CoreLoader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(_FLOAT_WORDS.sub(r"\1", node.value.lower())),
)


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError
    return int(text)


class CoreDumper(yaml.SafeDumper):
    """SafeDumper that also puts a text in quotation marks if it reads as a number here: 1e5."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *CoreLoader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {
            *yaml.SafeDumper.yaml_implicit_resolvers,
            *CoreLoader.yaml_implicit_resolvers,
        }
    }


def dump(value: Any) -> str:
    """Return the value as YAML, which `parse` reads back to an equal one."""
    return str(yaml.dump(value, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120))


def parse(text: str) -> Any:
    """Return the value of one YAML document. Raises yaml.YAMLError."""
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, and at most {MOST_CHARACTERS:,}")
    try:
        value = yaml.load(text, Loader=CoreLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError("a text has the number of no character") from error
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    """Raise yaml.YAMLError if there are too many values, or if they are nested without end."""
    count, pending = 0, [(value, 0)]
    while pending:
        item, depth = pending.pop()
        count += 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values, counting aliases")
        if depth > MOST_LEVELS:
            raise yaml.YAMLError("it is nested too deeply")
        if isinstance(item, dict):
            pending += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set):
            pending += [(part, depth + 1) for part in item]
