"""New numbers for the ids of tokens in the files of a model and of a tokenizer."""

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError

SINGLE = ("token_id", "token_index")  # ends of keys whose value is an id, or a list of ids
OF_TEXT = ("bos", "eos", "pad", "sep", "cls", "unk", "mask", "start")
"""Ends of what is before "_token_id" if the id may also be None. Those of pictures may not."""

LISTS = ("suppress_tokens", "begin_suppress_tokens")
SEQUENCES = ("bad_words_ids", "force_words_ids")
TOKEN_KEYS = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")
"""Keys of a tokenizer_config.json that hold tokens, besides those that end with _token."""


def renumbered(key: str, value: Any, new_ids: Mapping[int, int]) -> Any:
    """Return the value of a key of a config, or of a generation config, with new ids.

    An id that is not kept is left out of a list. A sequence of ids of which one is not kept can
    no longer be written, so it is left out too. What is empty then becomes None: `generate` refuses
    an empty list. An id of a picture that is not kept becomes a number that no token has.
    """
    if key.endswith(SINGLE) and isinstance(value, int):
        if value < 0:
            return value
        is_of_text = key.rpartition("_token_")[0].endswith(OF_TEXT)
        return new_ids.get(value, None if is_of_text else max(value, len(new_ids)))
    if not isinstance(value, list):
        return value
    found = value
    if key.endswith(SINGLE) or key in LISTS:
        found = [new_ids[token] for token in value if token in new_ids]
    elif key in SEQUENCES:
        found = [[new_ids[token] for token in ids] for ids in value if new_ids.keys() >= {*ids}]
    elif key == "sequence_bias":  # [[ids], bias]
        found = [
            [[new_ids[token] for token in ids], bias]
            for ids, bias in value
            if new_ids.keys() >= {*ids}
        ]
    elif key == "forced_decoder_ids":  # [place, id]
        found = [[place, new_ids[token]] for place, token in value if token in new_ids]
    return found or (None if value else value)


def stated_ids(settings: Mapping[Any, Any]) -> set[int]:
    """Return the ids that a config needs: where a text begins, ends, or is filled up."""
    found: set[int] = set()
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= stated_ids(value)
        elif str(key).endswith(SINGLE):
            ids = value if isinstance(value, list | tuple) else [value]
            found |= {token for token in ids if isinstance(token, int)}
    return found


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
    if missing := tokens_of_processor(processor) - kept.keys():
        raise UserError(
            f"the tokenizer puts {', '.join(sorted(missing))} beside each text, and the model has "
            "no row for it. Export without --trim"
        )
    for key in ("sep", "cls"):  # of BERT and RoBERTa: [token, id]
        if key in changed:
            changed[key] = [changed[key][0], kept[changed[key][0]]]
    if isinstance(changed.get("special_tokens"), Mapping):
        changed["special_tokens"] = {
            name: {**special, "ids": [kept[token] for token in special["tokens"]]}
            for name, special in changed["special_tokens"].items()
        }
    return changed


def tokens_of_processor(processor: Any) -> set[str]:
    """Return the tokens that the post-processor of a tokenizer.json puts beside a text."""
    if not isinstance(processor, Mapping):
        return set()
    found = {processor[key][0] for key in ("sep", "cls") if key in processor}
    for each in processor.get("processors") or ():
        found |= tokens_of_processor(each)
    special = processor.get("special_tokens")
    for each in special.values() if isinstance(special, Mapping) else ():
        found |= {*each["tokens"]}
    return found


def without_tokens(config: Mapping[str, Any], dropped: frozenset[str]) -> dict[str, Any]:
    """Return a tokenizer_config.json without the tokens that are not kept."""
    return {
        key: _without(item, dropped) if key in TOKEN_KEYS else item
        for key, item in config.items()
        if not (key.endswith("_token") and _is_dropped(item, dropped))
    }


def _without(value: Any, dropped: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if not _is_dropped(item, dropped)}
    if isinstance(value, list):
        return [item for item in value if not _is_dropped(item, dropped)]
    return value


def _is_dropped(item: Any, dropped: frozenset[str]) -> bool:
    content = item.get("content") if isinstance(item, Mapping) else item
    return isinstance(content, str) and content in dropped
