"""What is wrong with a source that `datasets` cannot read, in a sentence."""

import contextlib
import logging
import re
from collections.abc import Iterator

import datasets
from datasets.table import CastError

from finetune.errors import UserError


@contextlib.contextmanager
def explained(label: str) -> Iterator[None]:
    """Turn an exception of `datasets` into a UserError that says what is wrong with the source.

    What `datasets` logs meanwhile is hidden.
    """
    logger = datasets.logging.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explanation(label, error)) from error
    finally:
        logger.setLevel(level)


def _explanation(label: str, error: Exception) -> str:
    cause = error.__cause__ or error
    message = " ".join(str(cause).split()).rstrip(".")
    if isinstance(cause, CastError):
        first, other = (
            ", ".join(names) for names in (cause.requested_column_names, cause.table_column_names)
        )
        return (
            f"{label}: its rows do not have the same columns ({first}; further on {other}). Put "
            "each kind into files of its own, and list these as several sources"
        )
    no_rows = "corresponds to no data", "BatchSize must be greater than 0"  # the latter of Parquet
    if any(said in message for said in no_rows):
        return f"{label} is empty: it has no rows"
    message = message[:1].lower() + message[1:]
    if found := re.match(r"arrow type (.+) does not have a datasets dtype", message):
        return (
            f"{label} has a column of the type {found[1]}, which is not read. Write it as a struct "
            "or as text, or save the file as JSON lines"
        )
    if message.startswith("unknown split"):
        return f"{label}: {message.replace('. Should', '; it should')}"
    return f"{label} cannot be read: {message}"
