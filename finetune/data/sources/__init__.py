"""Where records come from: the Hugging Face hub, local files and folders, the demo data.

Read in this order:

- `files`: names and lines;
- `tables` and `json_files`: the records in them;
- `local`: records found by their place, or streamed;
- `aligned`: two text files as one;
- `opening`: any source; the only file that imports `datasets`;
- `records`: several sources as one dataset or stream.
"""

from finetune.data.sources.opening import Source
from finetune.data.sources.records import (
    Records,
    RecordStream,
    load_records,
    split_held_out,
    stream_records,
)

__all__ = ["RecordStream", "Records", "Source", "load_records", "split_held_out", "stream_records"]
