"""`finetune generate` and `finetune chat`: answers of a run or a model.

The prompts are arguments, lines of stdin, or what someone types at a terminal.
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
    """Yield each prompt with its answer, in order; without prompts, each line of stdin is one.

    `raw` continues the text as it is, without the chat template. `settings` change the generation
    settings of the run. Raises UserError for a target that cannot be opened.
    """
    opened, display = open_target(target), display or Display()
    section = opened.settings(settings)
    plain = raw or not opened.tokenizer.chat_template
    encode = _raw_prompt(opened.tokenizer) if plain else _chat_prompt(opened.tokenizer)
    for texts in _chunks(prompts or stdin_lines(display, "one prompt a line"), section.batch_size):
        with display.bar("generating", len(texts)) as advance:
            answers = generate(
                opened.model,
                [encode(text) for text in texts],
                batch_size=section.batch_size,
                on_progress=differences(advance),
                settings=generation_settings(section, opened.model, seed=seed),
            )
        decoded = (opened.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers)
        yield from zip(texts, decoded, strict=True)


def chat_in_terminal(
    target: str, *, system_prompt: str | None, seed: int, settings: Mapping[str, Any]
) -> None:
    """Read questions from stdin and stream the answers, until the input ends or is /exit."""
    opened, display = open_target(target), Display()
    talk = Conversation(
        opened.model,
        opened.tokenizer,
        system_prompt=system_prompt,
        notify=display.say,
        settings=generation_settings(opened.settings(settings), opened.model, seed=seed),
    )
    display.say("Ask something. /reset forgets the conversation, /exit ends it.")
    while (question := _ask()) not in (None, "/exit", "/quit"):
        assert question is not None
        if question == "/reset":
            talk.reset()
            display.say("(forgotten)")
        elif question.strip():
            _print_reply(talk, question, display)


def _chat_prompt(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function from a question to the token ids of a conversation that asks it."""
    template = ChatTemplate(tokenizer)
    return lambda text: template.prompt([{"role": "user", "content": text}])


def _raw_prompt(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function from a text to its token ids."""
    return lambda text: tokenizer(text).input_ids


def _ask() -> str | None:
    """Return the next question, or None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _print_reply(talk: Conversation, question: str, display: Display) -> None:
    """Print the answer as it is generated; Ctrl-C cuts it short."""
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
