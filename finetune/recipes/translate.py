"""`finetune translate`: sentences, a file, or the lines of stdin, by a run or a model."""

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.sources.files import read_lines
from finetune.display import Display, differences, on_terminal
from finetune.errors import is_terminal
from finetune.inference.translation import translate_file, translate_lines
from finetune.recipes.build.look import look_at_texts
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import Opened, open_target, require_utf8, stdin_lines
from finetune.recipes.build.translation import other_direction, translation_format
from finetune.run.wording import clock


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
    trust: bool = False,
    display: Display | None = None,
) -> None:
    """Translate `texts`, the file `input`, or the lines of stdin, line by line.

    The translations go to the file `output` or to stdout; an empty line stays empty.
    `system_prompt`: None for that of the run, "" for the usual instruction. `trust`: run the code
    that comes with the model. Raises UserError for arguments that contradict each other, and for
    languages that are not known.
    """
    look_at_texts(texts, input=input, output=output)
    texts = [require_utf8(text, "the sentence") for text in texts]
    for option in (source, to, system_prompt):
        require_utf8(option or "", "an option")
    opened, display = open_target(target, trust=trust), display or Display()
    translate = translator_of(
        opened,
        source=source,
        to=to,
        system_prompt=system_prompt,
        settings=settings,
        display=display,
    )
    if input is not None and output is not None:
        started, total = time.monotonic(), sum(1 for _ in read_lines(input))
        with display.bar("translating", total, unit="lines") as advance:
            count = translate_file(input, output, translate, on_progress=differences(advance))
        seconds = clock(time.monotonic() - started)
        display.say(f"{output}: {count:,} lines translated in {seconds}")
        return
    if input is None and not texts and is_terminal(sys.stdin):  # each line is answered at once
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
    system_prompt: str | None = None,
    settings: Mapping[str, Any],
    display: Display,
    note: Callable[[str], None] | None = None,
) -> Callable[[Iterable[str]], Iterator[str]]:
    """Return a function from sentences to their translations, with the run's own languages.

    `note` gets a sentence about a direction that the run did not learn; None prints it. Raises
    UserError for languages that are not known.
    """
    format = translation_format(opened, source, to, display, system_prompt=system_prompt)
    section = opened.settings(settings)
    if (said := other_direction(opened, format.languages)) is not None:
        display.say(f"note: {said}") if note is None else note(said)
    return functools.partial(
        translate_lines,
        model=opened.model,
        tokenizer=opened.tokenizer,
        prompt_of=lambda text: (
            format.prompt(text, reverse=False, parse_control_tokens=False).input_ids
        ),
        settings=generation_settings(section, opened.model, seed=0),
        batch_size=section.batch_size,
    )
