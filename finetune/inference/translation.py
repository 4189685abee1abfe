"""Translation of lines, in batches: text in, the same number of lines out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from finetune.data.sources.files import read_lines
from finetune.data.types import Tokenizer
from finetune.errors import UserError
from finetune.inference.generation import GenerationSettings, generate
from finetune.models.describe import CausalLM

CHUNK_BATCHES = 8
"""Batches read ahead, so that lines of similar length can run together."""


def translate_lines(
    lines: Iterable[str],
    *,
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt_of: Callable[[str], Sequence[int]],
    settings: GenerationSettings,
    batch_size: int,
) -> Iterator[str]:
    """Yield the translation of each line, in order, each on one line; a blank line stays empty.

    `prompt_of` makes the prompt's token ids from a sentence, as in training
    (`TranslationFormat.prompt`). Raises UserError, which names the lines, if one is too long for
    the model.
    """
    texts = (line.strip() for line in lines)
    first, done = 1, 0
    while chunk := list(islice(texts, batch_size * CHUNK_BATCHES)):
        numbers = [number for number, text in enumerate(chunk) if text]
        prompts = [prompt_of(chunk[number]) for number in numbers]
        try:
            answers = generate(model, prompts, settings=settings, batch_size=batch_size, first=done)
        except UserError as error:
            raise UserError(
                f"lines {first} to {first + len(chunk) - 1} cannot be translated: {error}"
            ) from error
        translations = dict(zip(numbers, answers))
        for number in range(len(chunk)):
            answer = tokenizer.decode(translations.get(number, []), skip_special_tokens=True)
            # Not split(): French has spaces of its own.
            yield " ".join(line.strip() for line in answer.splitlines()).strip()
        first, done = first + len(chunk), done + len(prompts)


def translate_file(
    source: Path,
    target: Path,
    translate: Callable[[Iterable[str]], Iterable[str]],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the translation of the UTF-8 file `source` to `target`; return the number of lines.

    `translate` yields a translation for each line: `translate_lines` with its other arguments
    bound. Each line is written as soon as it is there, so an interrupted translation keeps what is
    done. `on_progress(done, total)` counts lines. Raises UserError if a file cannot be read or
    written.
    """
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} is the source itself. Name another file for the translation")
    try:
        total = sum(1 for _ in read_lines(source))
        with target.open("w", encoding="utf-8") as out:
            for done, translation in enumerate(translate(read_lines(source)), start=1):
                out.write(translation + "\n")
                out.flush()
                if on_progress is not None:
                    on_progress(done, total)
    except OSError as error:
        raise UserError(f"{source} cannot be translated into {target}: {error.strerror}") from error
    return total
