"""The smaller tokenizer: the tokens that are kept, in the old order, numbered from 0."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.errors import UserError, system_errors
from finetune.models.trim.keep import bpe_of
from finetune.models.trim.renumber import renumber_tokenizer, without_tokens

AS_WRITTEN = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is; LlamaTokenizer makes its parts anew."""
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt")  # of the whole vocabulary


@dataclass(frozen=True, eq=False)
class Trimmed:
    """A trimmed tokenizer, and where its tokens come from."""

    tokenizer: PreTrainedTokenizerBase
    kept: tuple[int, ...]  # the old id of each token: place n is the token n

    @property
    def new_ids(self) -> dict[int, int]:
        """Old id -> new id."""
        return {old: new for new, old in enumerate(self.kept)}


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, keep: Iterable[int], *, rows: int | None = None
) -> Trimmed:
    """Return a tokenizer with the tokens `keep`, and what their merges need (see the room).

    `keep` must have every special and byte token (`keep.needed_tokens`). A token beyond the `rows`
    of the model's table goes. Raises UserError for a tokenizer that is no byte-pair encoding.
    """
    bpe = bpe_of(tokenizer)
    vocabulary = tokenizer.get_vocab()
    names = {number: token for token, number in vocabulary.items()}
    wanted = {names[number] for number in keep if number in names}
    has_merges = {token for token in wanted if token in bpe.ids}
    tokens = bpe.closed(has_merges) | wanted
    limit = max(names) + 1 if rows is None else rows
    kept = sorted(vocabulary[token] for token in tokens if vocabulary[token] < limit)
    new_ids = {names[old]: new for new, old in enumerate(kept)}
    dropped = frozenset(vocabulary) - new_ids.keys()
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    smaller = renumber_tokenizer(tree, new_ids, bpe.merges_within(new_ids.keys()))
    with tempfile.TemporaryDirectory() as folder:
        with system_errors(folder):
            tokenizer.save_pretrained(folder)
        for name in SLOW_FILES:
            (Path(folder) / name).unlink(missing_ok=True)
        (Path(folder) / "tokenizer.json").write_text(
            json.dumps(smaller, ensure_ascii=False), encoding="utf-8"
        )
        settings = Path(folder) / "tokenizer_config.json"
        config = json.loads(settings.read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)  # tokenizer.json has them
        config["tokenizer_class"] = AS_WRITTEN
        settings.write_text(json.dumps(without_tokens(config, dropped)), encoding="utf-8")
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    made.padding_side = tokenizer.padding_side
    _check_loaded(made, new_ids, smaller)
    return Trimmed(made, tuple(kept))


def _check_loaded(
    made: PreTrainedTokenizerBase, new_ids: Mapping[str, int], written: Mapping[str, object]
) -> None:
    """Raise UserError unless transformers loads the tokenizer that was written."""
    loaded = json.loads(made.backend_tokenizer.to_str())
    wrong = [part for part in PARTS if loaded[part] != written[part]]
    if made.get_vocab() != new_ids:
        wrong.append("vocab")
    if wrong:
        raise UserError(
            f"the trimmed tokenizer does not load as it was written (its {wrong[0]} differs). "
            "Export without --trim"
        )
