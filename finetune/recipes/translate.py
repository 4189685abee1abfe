"""`finetune translate`: sentences, a file, or the lines of stdin, by a run or a model."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.formats.languages import language_tag
from finetune.data.formats.translation import TranslationFormat
from finetune.data.sources.files import read_lines
from finetune.display import Display, differences, on_terminal
from finetune.errors import UserError
from finetune.inference.translation import translate_file, translate_lines
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import Opened, open_target, require_utf8, stdin_lines
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
    system_prompt: str | None = None,
    settings: Mapping[str, Any],
    display: Display | None = None,
) -> None:
    """Translate `texts`, the file `input`, or the lines of stdin, line by line.

    The translations go to the file `output` or to stdout; an empty line stays empty.
    `system_prompt`: None for that of the run, "" for the usual instruction. Raises UserError for
    arguments that contradict each other, and for languages that are not known.
    """
    if texts and input is not None:
        raise UserError("both sentences and --input are given. Give sentences or --input, not both")
    if output is not None and input is None:
        raise UserError("--output is given without --input. Give --input, or redirect the output")
    if input is not None and not input.is_file():
        raise UserError(f"the input {input} is not a file (looked in {Path.cwd()})")
    texts = [require_utf8(text, "the sentence") for text in texts]
    for option in (source, to, system_prompt):
        require_utf8(option or "", "an option")
    opened, display = open_target(target), display or Display()
    format = _translation_format(opened, source, to, system_prompt, display)
    section = opened.settings(settings)
    _note_other_direction(opened, format, display)
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


def _translation_format(
    opened: Opened, source: str | None, to: str | None, system: str | None, display: Display
) -> TranslationFormat:
    """Return the format of the run's own training, from `source` to `to`.

    By default the languages are those of the run, in the direction that it was trained in.
    """
    data = opened.config.data if opened.config is not None else None
    trained = _trained_languages(opened.run)
    if data is not None and data.translation.direction == "backward":
        trained = trained[::-1]
    if trained:
        source = trained[0] if source is None else _as_trained(source, trained)
        to = trained[1] if to is None else _as_trained(to, trained)
    if source is None or to is None:
        raise UserError(
            "the languages are not known. Give --from and --to, such as --from en --to fr"
        )
    own = data.system_prompt if data is not None else None
    if system is None and own is not None:
        display.say(f"system prompt of the run: {own} (--system changes it)")
    system = own if system is None else system or None
    return TranslationFormat(
        tokenizer=opened.tokenizer,
        languages=(source, to),
        direction="forward",
        template=data.translation.template if data is not None else None,
        targets="assistant",
        system_prompt=system,
        settings=opened.template_settings,
    )


def _as_trained(language: str, trained: Sequence[str]) -> str:
    """Return the name that the run's data has for a language, or the one given."""
    same = [name for name in trained if language_tag(name) == language_tag(language)]
    return same[0] if same else language


def _note_other_direction(opened: Opened, format: TranslationFormat, display: Display) -> None:
    """Print a note if the run did not learn to translate in the direction of `format`."""
    trained = tuple(_trained_languages(opened.run))
    if opened.config is None or not trained:
        return
    directions = {
        "forward": [trained],
        "backward": [trained[::-1]],
        "both": [trained, trained[::-1]],
    }[opened.config.data.translation.direction]
    if format.languages not in directions:
        learnt = " and ".join(" → ".join(direction) for direction in directions)
        remedy = " (see data.translation.direction)" * (format.languages[::-1] in directions)
        display.say(f"note: this run learnt {learnt}, not {' → '.join(format.languages)}{remedy}")


def _trained_languages(run: RunDir | None) -> Sequence[str]:
    """Return the two languages that a run was trained on; none if that is not known."""
    return (DataCounts.read(run).languages or ()) if run is not None else ()
