"""`finetune translate`: sentences, a file, or the lines of stdin, by a run or a model.

Floor 5.
"""

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
    """Translate `texts`, the file `input`, or the lines of stdin; to the file `output` or stdout. Empty lines stay empty."""
    if texts and input is not None:
        raise UserError("give sentences or --input, not both")
    if output is not None and input is None:
        raise UserError("--output goes with --input; without a file, redirect the output")
    if input is not None and not input.is_file():
        raise UserError(f"the input {input} is no file (looked in {Path.cwd()})")
    opened, display = open_target(target), display or Display()
    format, section = _translation_format(opened, source, to), opened.settings(settings)
    trained = _trained_languages(opened.run) if opened.run is not None else ()
    if None not in trained and trained and not set(format.languages) <= set(trained):
        display.say(
            f"note: this run was trained on {' and '.join(map(str, trained))}, not on {' and '.join(format.languages)}"
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
        else texts or stdin_lines(display, "a sentence a line")
    )
    for line in translate(lines):
        print(line, flush=True)


def _translation_format(opened: Opened, source: str | None, to: str | None) -> TranslationFormat:
    """The prompt of the run's own training, or for a plain model that of the two languages given."""
    pair = opened.config.data.translation if opened.config is not None else None
    trained: list[str | None] = (
        list(_trained_languages(opened.run)) if opened.run is not None else [None, None]
    )
    if pair is not None and pair.direction == "backward":
        trained.reverse()
    source, to = source or trained[0], to or trained[1]
    if source is None or to is None:
        raise UserError("which languages? give --from and --to, e.g. --from en --to fr")
    return TranslationFormat(
        tokenizer=opened.tokenizer,
        languages=(source, to),
        direction="forward",
        template=pair.template if pair is not None else None,
        targets="assistant",
        system_prompt=opened.config.data.system_prompt if opened.config is not None else None,
    )


def _trained_languages(run: RunDir) -> Sequence[str | None]:
    return DataCounts.read(run).languages or (None, None)
