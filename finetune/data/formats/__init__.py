"""Formats: what a record of each kind says, as token ids and labels.

Read `rendering` first (text to tokens), then `chat`, `translation` and `text`, with `columns` and
`languages` as their helpers. `detect.build_format` chooses the format and builds it. A new format
is a class with the methods of `finetune.data.types.Format`, and an entry in `detect`.
"""
