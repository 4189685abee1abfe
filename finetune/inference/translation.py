"""Translation of lines, in batches: text in, the same number of lines out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from finetune.data.sources.files import read_lines
from finetune.data.types import Tokenizer
from finetune.errors import UserError
from finetune.inference.generation import GenerationSettings, chunks, generate, require_room
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
    (`TranslationFormat.prompt`). Raises UserError, which names the line, if one is too long for
    the model; the lines before it are translated.
    """

    def prompt(number: int, text: str) -> Sequence[int] | None:
        if not text:
            return None
        named = f"line {number} cannot be translated: "
        return require_room(model, prompt_of(text), settings.max_new_tokens, named)

    read = (prompt(number, line.strip()) for number, line in enumerate(lines, start=1))
    done = 0
    for chunk in chunks(read, batch_size * CHUNK_BATCHES):
        prompts = [ids for ids in chunk if ids is not None]
        answers = iter(
            generate(model, prompts, settings=settings, batch_size=batch_size, first=done)
        )
        done += len(prompts)
        for ids in chunk:
            answer = [] if ids is None else next(answers)
            text = tokenizer.decode(answer, skip_special_tokens=True)
            # Not split(): French has spaces of its own.
            yield " ".join(line.strip() for line in text.splitlines()).strip()


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
