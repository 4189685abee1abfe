"""Encoded data that is kept: from one run to the next, and for the other processes of a run.

What encoding gives depends on the records, on how the format and the tokenizer were made, and on
what the format and the list of bad records knew before. All that is in the key of an entry. The
entry has the examples, the counts, and what the format and the list knew afterwards. So a later run
says all that the first one said.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from finetune.data.bad_records import BadRecords
from finetune.data.encode import EncodedDataset
from finetune.data.encoding.store import Entry, EntryDraft, Store, key_of
from finetune.data.types import Format, Tokenizer


class KeptEncoding:
    """One data set in `store`: `key_parts` say what it is made from.

    `format` and `bad` are changed as encoding changes them.
    """

    def __init__(
        self, store: Store, format: Format, bad: BadRecords, *, key_parts: tuple[object, ...]
    ) -> None:
        self._store, self._format, self._bad = store, format, bad
        before = json.dumps([format.state(), asdict(bad)], sort_keys=True)
        self._key = key_of("examples", format.name, before, *key_parts)

    def get(
        self, encode: Callable[[EntryDraft | None], EncodedDataset], *, note: Callable[[str], None]
    ) -> EncodedDataset:
        """Return the data of an earlier run or another process, or else what `encode` returns.

        `encode(draft)` writes the examples to `draft` if it is not None. `note` gets a sentence if
        the disk refuses. Raises what `encode` raises.
        """
        with self._store.making(self._key):
            entry = self._store.read(self._key)
            if entry is not None:
                return self._restored(entry)
            before = self._format.state(), asdict(self._bad)
            draft = None
            try:
                draft = self._store.draft(self._key)
                return self._finished(draft, encode(draft))
            except OSError as error:
                note(
                    f"the encoded data cannot be kept in {self._store.folder} "
                    f"({error.strerror or error}), so each start encodes it again. Set "
                    "FINETUNE_CACHE to another folder, or data.cache=false"
                )
            finally:
                if draft is not None:
                    draft.discard()
            self._format.restore(before[0])
            vars(self._bad).update(before[1])
            return encode(None)

    def _finished(self, draft: EntryDraft, encoded: EncodedDataset) -> EncodedDataset:
        values = {
            "statistics": encoded.statistics.as_dict(),
            "state": self._format.state(),
            "bad": asdict(self._bad),
        }
        return EncodedDataset.stored(draft.finish(values))

    def _restored(self, entry: Entry) -> EncodedDataset:
        self._format.restore(entry.values["state"])
        vars(self._bad).update(entry.values["bad"])
        return EncodedDataset.stored(entry)


def said_of_tokenizer(tokenizer: Tokenizer) -> str:
    """Return what differs if a tokenizer gives other tokens or conversations."""
    tokenizer("", add_special_tokens=False)  # ends a truncation or padding
    kind = type(tokenizer)
    settings: Any = [
        f"{kind.__module__}.{kind.__qualname__}",
        tokenizer.chat_template,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        getattr(tokenizer, "special_tokens_map", None),
        getattr(tokenizer, "split_special_tokens", False),
    ]
    return key_of(repr(settings), tokenizer.backend_tokenizer.to_str())
