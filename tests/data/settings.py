"""Settings in short, with the ones that a test does not care about filled in."""

from pathlib import Path
from typing import Any

from finetune.config.schema import SourceSection
from finetune.data.batches.steps import BatchShape
from finetune.data.formats.detect import FormatOptions
from finetune.data.formats.rendering import PLAIN
from finetune.data.sources import Source


def source(path: str | Path, **options: Any) -> Source:
    """Return a source as a config would give it."""
    return Source(**SourceSection(path=str(path), **options).model_dump())


def format_options(**options: Any) -> FormatOptions:
    defaults: dict[str, Any] = {
        "columns": {},
        "targets": "assistant",
        "system_prompt": None,
        "source_language": None,
        "target_language": None,
        "direction": "forward",
        "template": None,
        "settings": PLAIN,
        "refuse_control_tokens": False,
        "merge_turns": False,
    }
    return FormatOptions(**(defaults | options))


def batch_shape(**options: Any) -> BatchShape:
    defaults: dict[str, Any] = {
        "packing": True,
        "batch_size": 6,
        "micro_batch_size": 2,
        "pad_id": 0,
        "seed": 1,
    }
    return BatchShape(**(defaults | options))
