"""Where rows come from: the Hugging Face hub, local files and folders, the demo data of the package.

Floor 2: the door to `datasets`.
"""

from finetune.data.sources.opening import Source
from finetune.data.sources.records import Rows, RowStream, load_rows, split_held_out, stream_rows

__all__ = ["RowStream", "Rows", "Source", "load_rows", "split_held_out", "stream_rows"]
