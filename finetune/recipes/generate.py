"""`finetune generate`: answers of a run or a model to arguments or to lines of stdin."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import starmap
from typing import Any

from finetune.data.formats.rendering import ChatTemplate, first_tokens
from finetune.display import Display, differences
from finetune.errors import UserError
from finetune.inference.generation import chunks, generate, require_room
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
        called="prompt" if prompts else "line",
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
    called: str = "prompt",
    raw: bool = False,
    system_prompt: str | None = None,
    seed: int | None = 0,
    settings: Mapping[str, Any],
    display: Display,
) -> Iterator[tuple[str, str]]:
    """Yield each prompt with its answer, in order. A blank prompt has a blank answer.

    `raw` continues the text as it is, without the chat template. `system_prompt`: None for that of
    the run, "" for none. `settings` change the generation settings of the run. A control token that
    a prompt spells out is plain text within a chat template. Raises UserError; for one of several
    prompts it says which, as `called`, and those before it are answered.
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
    generation = generation_settings(section, opened.model, seed=seed)
    alone = isinstance(prompts, Sequence) and len(prompts) == 1

    def read(number: int, text: str) -> tuple[str, Sequence[int] | None]:
        if not text.strip():
            return text, None
        named = "" if alone else f"{called} {number}: "
        return text, require_room(opened.model, encode(text), generation.max_new_tokens, named)

    done = 0
    for chunk in chunks(starmap(read, enumerate(prompts, start=1)), section.batch_size):
        asked = [ids for _, ids in chunk if ids is not None]
        with display.bar("generating", len(asked)) as advance:
            answers = generate(
                opened.model,
                asked,
                batch_size=section.batch_size,
                first=done,
                on_progress=differences(advance),
                settings=generation,
            )
        done += len(asked)
        decoded = (opened.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers)
        yield from ((text, "" if ids is None else next(decoded)) for text, ids in chunk)


def _chat_prompt(template: ChatTemplate, system_prompt: str | None) -> Callable[[str], list[int]]:
    """Return a function from a question to the token ids of a conversation that asks it."""
    if system_prompt is not None and not template.writes("system"):
        raise UserError("the chat template of this model takes no system prompt. Leave it out")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def prompt(text: str) -> list[int]:
        asked = [*system, {"role": "user", "content": text}]
        return template.prompt(asked, parse_control_tokens=False)

    return prompt


def _raw_prompt(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function from a text to its token ids, without an end mark after them."""
    bos = first_tokens(tokenizer)
    return lambda text: [*bos, *tokenizer(text, add_special_tokens=False).input_ids]
