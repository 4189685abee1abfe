"""`finetune translate`: sentences, a file, or the lines of stdin, by a run or a model."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.formats.translation import TranslationFormat
from finetune.data.sources.files import read_lines
from finetune.display import Display, differences
from finetune.errors import UserError
from finetune.inference.translation import translate_file, translate_lines
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import Opened, open_target, stdin_lines
from finetune.run.folder import RunDir
from finetune.run.records import DataCounts


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
    opened, display = open_target(target), display or Display()
    format, section = _translation_format(opened, source, to), opened.settings(settings)
    trained = _trained_languages(opened.run)
    if trained and not set(format.languages) <= set(trained):
        display.say(
            f"note: this run was trained on {' and '.join(trained)}, "
            f"not on {' and '.join(format.languages)}"
        )
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
        print(line, flush=True)


def _translation_format(opened: Opened, source: str | None, to: str | None) -> TranslationFormat:
    """Return the format of the run's own training, from `source` to `to`.

    By default the languages are those of the run, in the direction that it was trained in.
    """
    data = opened.config.data if opened.config is not None else None
    trained = _trained_languages(opened.run)
    if data is not None and data.translation.direction == "backward":
        trained = trained[::-1]
    if trained:
        source, to = source or trained[0], to or trained[1]
    if source is None or to is None:
        raise UserError(
            "the languages are not known. Give --from and --to, such as --from en --to fr"
        )
    return TranslationFormat(
        tokenizer=opened.tokenizer,
        languages=(source, to),
        direction="forward",
        template=data.translation.template if data is not None else None,
        targets="assistant",
        system_prompt=data.system_prompt if data is not None else None,
    )


def _trained_languages(run: RunDir | None) -> Sequence[str]:
    """Return the two languages that a run was trained on; none if that is not known."""
    return (DataCounts.read(run).languages or ()) if run is not None else ()
