"""New numbers for the ids of tokens in the files of a model and of a tokenizer."""

from collections.abc import Mapping
from typing import Any

SINGLE = "token_id"  # the end of a key whose value is an id, or a list of ids
LISTS = ("suppress_tokens", "begin_suppress_tokens")
SEQUENCES = ("bad_words_ids", "force_words_ids")


def renumbered(key: str, value: Any, new_ids: Mapping[int, int]) -> Any:
    """Return the value of a key of a config, or of a generation config, with new ids.

    An id that is not kept is left out of a list. A sequence of ids of which one is not kept can
    no longer be written, so it is left out too. A key whose only id is not kept becomes None.
    """
    if key.endswith(SINGLE) and isinstance(value, int):
        return new_ids.get(value)
    if not isinstance(value, list):
        return value
    if key.endswith(SINGLE) or key in LISTS:
        return [new_ids[token] for token in value if token in new_ids]
    if key in SEQUENCES:
        return [[new_ids[token] for token in ids] for ids in value if new_ids.keys() >= {*ids}]
    if key == "sequence_bias":  # [[ids], bias]
        return [
            [[new_ids[token] for token in ids], bias]
            for ids, bias in value
            if new_ids.keys() >= {*ids}
        ]
    if key == "forced_decoder_ids":  # [place, id]
        return [[place, new_ids[token]] for place, token in value if token in new_ids]
    return value


def renumber_tokenizer(
    tree: Mapping[str, Any], kept: Mapping[str, int], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    """Return a tokenizer.json with the tokens `kept` (token -> new id) and the merges.

    The normalizer, what cuts a text into words, and the decoder stay.
    """
    model = dict(tree["model"])
    model["vocab"] = {token: kept[token] for token in model["vocab"] if token in kept}
    model["merges"] = [list(merge) for merge in merges]
    added = [
        {**token, "id": kept[token["content"]]}
        for token in tree["added_tokens"]
        if token["content"] in kept
    ]
    padding = tree.get("padding")
    if padding is not None:
        padding = {**padding, "pad_id": kept.get(padding["pad_token"], 0)}
    return {
        **tree,
        "model": model,
        "added_tokens": added,
        "padding": padding,
        "post_processor": _renumbered_processor(tree.get("post_processor"), kept),
    }


def _renumbered_processor(processor: Any, kept: Mapping[str, int]) -> Any:
    if not isinstance(processor, Mapping):
        return processor
    changed = dict(processor)
    if "processors" in changed:
        changed["processors"] = [
            _renumbered_processor(each, kept) for each in processor["processors"]
        ]
    for key in ("sep", "cls"):  # of BERT and RoBERTa: [token, id]
        if key in changed:
            changed[key] = [changed[key][0], kept[changed[key][0]]]
    if isinstance(changed.get("special_tokens"), Mapping):
        changed["special_tokens"] = {
            name: {**special, "ids": [kept[token] for token in special["tokens"]]}
            for name, special in changed["special_tokens"].items()
        }
    return changed


def without_tokens(value: Any, dropped: frozenset[str]) -> Any:
    """Return the tree of a tokenizer_config.json without the tokens that are not kept."""
    if isinstance(value, Mapping):
        return {
            key: without_tokens(item, dropped)
            for key, item in value.items()
            if not _is_dropped(item, dropped)
        }
    if isinstance(value, list):
        return [without_tokens(item, dropped) for item in value if not _is_dropped(item, dropped)]
    return value


def _is_dropped(item: Any, dropped: frozenset[str]) -> bool:
    content = item.get("content") if isinstance(item, Mapping) else item
    return isinstance(content, str) and content in dropped
