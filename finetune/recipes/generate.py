"""`finetune generate`: answers of a run or a model to arguments or to lines of stdin."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from finetune.data.formats.rendering import ChatTemplate, first_tokens
from finetune.display import Display, differences
from finetune.errors import UserError
from finetune.inference.generation import generate
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import Opened, open_target, require_utf8, stdin_lines


def generate_answers(
    target: str,
    prompts: Sequence[str],
    *,
    raw: bool,
    system_prompt: str | None = None,
    seed: int,
    settings: Mapping[str, Any],
    trust: bool = False,
    display: Display | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield each prompt with its answer, in order; without prompts, each line of stdin is one.

    The other arguments are those of `answers_of`. `trust`: run the code that comes with the model.
    Raises UserError for a target that cannot be opened.
    """
    display = display or Display()
    yield from answers_of(
        open_target(target, trust=trust),
        [require_utf8(prompt, "the prompt") for prompt in prompts]
        or stdin_lines(display, "one prompt a line"),
        raw=raw,
        system_prompt=system_prompt,
        seed=seed,
        settings=settings,
        display=display,
    )


def answers_of(
    opened: Opened,
    prompts: Iterable[str],
    *,
    raw: bool = False,
    system_prompt: str | None = None,
    seed: int = 0,
    settings: Mapping[str, Any],
    display: Display,
) -> Iterator[tuple[str, str]]:
    """Yield each prompt with its answer, in order. A blank prompt has a blank answer.

    `raw` continues the text as it is, without the chat template. `system_prompt`: None for that of
    the run, "" for none. `settings` change the generation settings of the run. Raises UserError.
    """
    section = opened.settings(settings)
    plain = raw or not opened.tokenizer.chat_template
    if plain and system_prompt:
        raise UserError(
            "a system prompt is given, but the text is continued without a chat template. Leave "
            "out --system or --raw"
        )
    encode = (
        _raw_prompt(opened.tokenizer)
        if plain
        else _chat_prompt(opened.template(), opened.system_prompt(system_prompt, display))
    )
    done = 0
    for texts in _chunks(prompts, section.batch_size):
        asked = [text for text in texts if text.strip()]
        with display.bar("generating", len(asked)) as advance:
            answers = generate(
                opened.model,
                [encode(text) for text in asked],
                batch_size=section.batch_size,
                first=done,
                on_progress=differences(advance),
                settings=generation_settings(section, opened.model, seed=seed),
            )
        done += len(asked)
        decoded = (opened.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers)
        yield from ((text, next(decoded) if text.strip() else "") for text in texts)


def _chat_prompt(template: ChatTemplate, system_prompt: str | None) -> Callable[[str], list[int]]:
    """Return a function from a question to the token ids of a conversation that asks it."""
    if system_prompt is not None and not template.writes("system"):
        raise UserError("the chat template of this model takes no system prompt. Leave it out")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return lambda text: template.prompt([*system, {"role": "user", "content": text}])


def _raw_prompt(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function from a text to its token ids, without an end mark after them."""
    bos = first_tokens(tokenizer)
    return lambda text: [*bos, *tokenizer(text, add_special_tokens=False).input_ids]


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
