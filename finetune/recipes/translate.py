"""`finetune translate`: sentences, a file, or the lines of stdin, by a run or a model."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.sources.files import read_lines
from finetune.display import Display, differences, on_terminal
from finetune.errors import UserError
from finetune.inference.translation import translate_file, translate_lines
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import open_target, require_utf8, stdin_lines
from finetune.recipes.build.translation import note_other_direction, translation_format


def translate_text(
    target: str,
    texts: Sequence[str],
    *,
    input: Path | None,
    output: Path | None,
    source: str | None,
    to: str | None,
    settings: Mapping[str, Any],
    display: Display | None = None,
) -> None:
    """Translate `texts`, the file `input`, or the lines of stdin, line by line.

    The translations go to the file `output` or to stdout; an empty line stays empty. Raises
    UserError for arguments that contradict each other, and for languages that are not known.
    """
    if texts and input is not None:
        raise UserError("both sentences and --input are given. Give sentences or --input, not both")
    if output is not None and input is None:
        raise UserError("--output is given without --input. Give --input, or redirect the output")
    if input is not None and not input.is_file():
        raise UserError(f"the input {input} is not a file (looked in {Path.cwd()})")
    texts = [require_utf8(text, "the sentence") for text in texts]
    opened, display = open_target(target), display or Display()
    format = translation_format(opened, source, to, display)
    section = opened.settings(settings)
    note_other_direction(opened, format, display)
    translate = functools.partial(
        translate_lines,
        model=opened.model,
        tokenizer=opened.tokenizer,
        prompt_of=lambda text: format.prompt(text, reverse=False).input_ids,
        settings=generation_settings(section, opened.model, seed=0),
        batch_size=section.batch_size,
    )
    if input is not None and output is not None:
        with display.bar("translating", None) as advance:
            translate_file(input, output, translate, on_progress=differences(advance))
        return
    lines = (
        read_lines(input)
        if input is not None
        else texts or stdin_lines(display, "one sentence a line")
    )
    for line in translate(lines):
        print(on_terminal(line), flush=True)
