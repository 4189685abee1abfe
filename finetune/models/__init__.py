"""Borders to transformers and peft: loading, tokenizers, adapters, export.

transformers' own progress bars (per tensor, per shard) are off: the command line shows progress of its own. Downloads keep theirs.
"""

from transformers.utils import logging

logging.disable_progress_bar()
