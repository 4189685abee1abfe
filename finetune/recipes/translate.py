"""`finetune translate`: sentences, a file, or the lines of stdin, by a run or a model."""

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.formats.languages import language_tag
from finetune.data.formats.translation import TranslationFormat
from finetune.data.sources.files import read_lines
from finetune.display import Display, differences, on_terminal
from finetune.errors import UserError
from finetune.inference.translation import translate_file, translate_lines
from finetune.recipes.build.look import look_at_texts
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import Opened, open_target, require_utf8, stdin_lines
from finetune.run.folder import RunDir
from finetune.run.records import DataCounts
from finetune.run.wording import clock


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
    look_at_texts(texts, input=input, output=output)
    texts = [require_utf8(text, "the sentence") for text in texts]
    opened, display = open_target(target), display or Display()
    translate = translator_of(opened, source=source, to=to, settings=settings, display=display)
    if input is not None and output is not None:
        started, total = time.monotonic(), sum(1 for _ in read_lines(input))
        with display.bar("translating", total, unit="lines") as advance:
            count = translate_file(input, output, translate, on_progress=differences(advance))
        seconds = clock(time.monotonic() - started)
        display.say(f"{output}: {count:,} lines translated in {seconds}")
        return
    if input is None and not texts and sys.stdin.isatty():  # each line is answered at once
        for line in stdin_lines(display, "one sentence a line"):
            print(on_terminal(next(translate([line]))), flush=True)
        return
    lines = (
        read_lines(input)
        if input is not None
        else texts or stdin_lines(display, "one sentence a line")
    )
    for line in translate(lines):
        print(on_terminal(line), flush=True)


def translator_of(
    opened: Opened,
    *,
    source: str | None,
    to: str | None,
    settings: Mapping[str, Any],
    display: Display,
) -> Callable[[Iterable[str]], Iterator[str]]:
    """Return a function from sentences to their translations, with the run's own languages.

    Raises UserError for languages that are not known.
    """
    format = _translation_format(opened, source, to, display)
    section = opened.settings(settings)
    _note_other_direction(opened, format, display)
    return functools.partial(
        translate_lines,
        model=opened.model,
        tokenizer=opened.tokenizer,
        prompt_of=lambda text: format.prompt(text, reverse=False).input_ids,
        settings=generation_settings(section, opened.model, seed=0),
        batch_size=section.batch_size,
    )


def _translation_format(
    opened: Opened, source: str | None, to: str | None, display: Display
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
    system = data.system_prompt if data is not None else None
    if system is not None:
        display.say(f"system prompt of the run: {system}")
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
