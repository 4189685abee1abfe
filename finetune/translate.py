"""Translation of lines, in batches: text in, the same number of lines out.

Floor 3.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

from finetune.data.types import Tokenizer
from finetune.errors import UserError
from finetune.generation import SamplingSettings, generate

CHUNK_BATCHES = 8  # batches read ahead, so that lines of like length can run together


def translate_lines(
    lines: Iterable[str],
    *,
    model: Any,
    tokenizer: Tokenizer,
    prompt_of: Callable[[str], Sequence[int]],
    batch_size: int,
    **settings: Unpack[SamplingSettings],
) -> Iterator[str]:
    """Yield the translation of each line, in order, each on one line; a blank line stays an empty one.

    `prompt_of` makes the prompt's token ids from a sentence, as in training (`TranslationFormat.prompt`).
    Raises UserError, naming the lines, where one is too long for the model.
    """
    texts = (line.strip() for line in lines)
    first = 1
    while chunk := list(islice(texts, batch_size * CHUNK_BATCHES)):
        numbers = [number for number, text in enumerate(chunk) if text]
        prompts = [prompt_of(chunk[number]) for number in numbers]
        try:
            answers = generate(model, prompts, batch_size=batch_size, **settings)
        except UserError as error:
            raise UserError(
                f"lines {first} to {first + len(chunk) - 1} cannot be translated: {error}"
            ) from error
        translations = dict(zip(numbers, answers))
        for number in range(len(chunk)):
            answer = tokenizer.decode(translations.get(number, []), skip_special_tokens=True)
            yield " ".join(
                line.strip() for line in answer.splitlines()
            ).strip()  # not split(): French has spaces of its own
        first += len(chunk)


def translate_file(
    source: Path,
    target: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> int:
    """Translate the UTF-8 file `source` line by line into `target` and return the number of lines.

    `options` are those of `translate_lines`. Lines are written as they come, so what is done is kept if the work is broken off.
    `on_progress(done, total)` counts lines. Raises UserError where a file cannot be read or written.
    """
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} is the source itself: name another file for the translation")
    try:
        with source.open(encoding="utf-8") as lines:
            total = sum(1 for _ in lines)
            lines.seek(0)
            with target.open("w", encoding="utf-8") as out:
                for done, translation in enumerate(translate_lines(lines, **options), start=1):
                    out.write(translation + "\n")
                    out.flush()
                    if on_progress is not None:
                        on_progress(done, total)
    except OSError as error:
        raise UserError(f"{source} cannot be translated into {target}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (byte {error.start}): convert it first"
        ) from error
    return total
