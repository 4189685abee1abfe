"""`finetune generate` and `chat`: a run or a model answers prompts, lines of stdin, or someone at a terminal.

Floor 5.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from finetune.data.formats.rendering import ChatTemplate
from finetune.display import Display, differences
from finetune.errors import UserError
from finetune.inference.conversation import Conversation
from finetune.inference.generation import generate
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import open_target, stdin_lines


def generate_answers(
    target: str,
    prompts: Sequence[str],
    *,
    raw: bool,
    seed: int,
    settings: Mapping[str, Any],
    display: Display | None = None,
) -> Iterator[tuple[str, str]]:
    """Each prompt (without any: each line of stdin) and its answer, in order. `raw` continues the text."""
    opened, display = open_target(target), display or Display()
    section = opened.settings(settings)
    encode = (
        _raw_prompt(opened.tokenizer)
        if raw or not opened.tokenizer.chat_template
        else _chat_prompt(opened.tokenizer)
    )
    for texts in _chunks(prompts or stdin_lines(display, "a prompt a line"), section.batch_size):
        with display.bar("generating", len(texts)) as advance:
            answers = generate(
                opened.model,
                [encode(text) for text in texts],
                batch_size=section.batch_size,
                on_progress=differences(advance),
                settings=generation_settings(section, opened.model, seed=seed),
            )
        yield from zip(
            texts,
            (opened.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers),
            strict=True,
        )


def chat_in_terminal(
    target: str, *, system_prompt: str | None, seed: int, settings: Mapping[str, Any]
) -> None:
    """Read questions from stdin and stream the answers, until end of input or /exit."""
    opened, display = open_target(target), Display()
    talk = Conversation(
        opened.model,
        opened.tokenizer,
        system_prompt=system_prompt,
        notify=display.say,
        settings=generation_settings(opened.settings(settings), opened.model, seed=seed),
    )
    display.say("Ask something; /reset forgets the conversation, /exit ends it.")
    while (question := _ask()) not in (None, "/exit", "/quit"):
        assert question is not None
        if question == "/reset":
            talk.reset()
            display.say("(forgotten)")
        elif question.strip():
            _print_reply(talk, question, display)


def _chat_prompt(tokenizer: Any) -> Callable[[str], list[int]]:
    template = ChatTemplate(tokenizer)
    return lambda text: template.prompt([{"role": "user", "content": text}])


def _raw_prompt(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text).input_ids


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _print_reply(talk: Conversation, question: str, display: Display) -> None:
    try:
        for piece in talk.reply(question):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" …")
    except UserError as error:
        display.say(str(error))


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
