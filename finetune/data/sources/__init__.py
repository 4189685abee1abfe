"""Where records come from: the Hugging Face hub, local files and folders, the demo data.

Read in this order:

- `files`: names and lines;
- `tables` and `json_files`: the records in them;
- `local`: records found by their place, or streamed;
- `aligned`: two text files as one;
- `peek`: the first records of local files;
- `opening`: any source; this file and `explained` alone import `datasets`;
- `records`: several sources as one dataset or stream.

The names below are loaded when they are first used, since `datasets` takes a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.data.sources.opening import Source
    from finetune.data.sources.records import (
        Records,
        RecordStream,
        count_held_out,
        load_records,
        split_held_out,
        stream_records,
    )

__all__ = [
    "RecordStream",
    "Records",
    "Source",
    "count_held_out",
    "load_records",
    "split_held_out",
    "stream_records",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'finetune.data.sources' has no attribute {name!r}")
    home = "opening" if name == "Source" else "records"
    return getattr(import_module(f"finetune.data.sources.{home}"), name)
