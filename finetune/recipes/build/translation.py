"""How an opened run is asked to translate: in the words and the direction of its training."""

from finetune.data.formats.translation import TranslationFormat
from finetune.display import Display
from finetune.recipes.build.look import languages_asked
from finetune.recipes.build.target import Opened
from finetune.run.records import trained_languages


def translation_format(
    opened: Opened,
    source: str | None,
    to: str | None,
    display: Display,
    *,
    system_prompt: str | None = None,
) -> TranslationFormat:
    """Return the format of the run's own training, from `source` to `to`.

    By default the languages are those of the run, in the direction that it was trained in.
    `system_prompt`: None for that of the run, "" for the usual instruction.
    """
    data = opened.config.data if opened.config is not None else None
    languages = languages_asked(opened.run, opened.config, source, to)
    system = data.system_prompt if data is not None else None
    if system_prompt is not None:
        system = system_prompt or None
    elif system is not None:
        display.say(f"system prompt of the run: {system} (--system changes it)")
    return TranslationFormat(
        tokenizer=opened.tokenizer,
        languages=languages,
        direction="forward",
        template=data.translation.template if data is not None else None,
        targets="assistant",
        system_prompt=system,
        settings=opened.template_settings,
    )


def other_direction(opened: Opened, languages: tuple[str, str]) -> str | None:
    """Return a sentence if the run did not learn to translate in this direction, else None."""
    directions = learnt_directions(opened)
    if not directions or languages in directions:
        return None
    learnt = " and ".join(" → ".join(direction) for direction in directions)
    remedy = " (see data.translation.direction)" * (languages[::-1] in directions)
    return f"this run learnt {learnt}, not {' → '.join(languages)}{remedy}"


def learnt_directions(opened: Opened) -> list[tuple[str, str]]:
    """Return the pairs (source, target) that a translation run learnt; none for any other."""
    if opened.config is None or len(languages := trained_languages(opened.run)) != 2:
        return []
    forward = (languages[0], languages[1])
    return {"forward": [forward], "backward": [forward[::-1]], "both": [forward, forward[::-1]]}[
        opened.config.data.translation.direction
    ]
