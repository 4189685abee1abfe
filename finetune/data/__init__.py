"""Records become tensors. Read `types` first, then follow the flow; import from each module.

record    {"prompt": "Hi", "completion": "Hello!"}    sources/: a file, a folder, the hub
example   input_ids     5 9 3 8 2                     formats/: chat, translation or text
          labels        _ _ 3 8 2                     encode: checked, cut, counted (_ is -100)
sequence  [example 0, example 7]                      batches/packing: at most max_length tokens
batch     input_ids     5 9 3 8 2  4 2  0             batches/collate: [sequences, length]
          position_ids  0 1 2 3 4  0 1  0             padding is a segment of its own
          targets       1:3 2:8 3:2  5:2              place 1 predicts a 3 ...: [N, 2]

`register_format` adds a format of your own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.data.formats.detect import register_format

__all__ = ["register_format"]


def __getattr__(name: str) -> Any:
    if name == "register_format":
        from finetune.data.formats.detect import register_format

        return register_format
    raise AttributeError(f"module 'finetune.data' has no attribute {name!r}")
