"""`finetune chat`: a conversation in the terminal, with the base model beside it if asked for."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from finetune.data.types import Message
from finetune.display import Display, on_terminal
from finetune.errors import UserError, did_you_mean, is_terminal
from finetune.inference.conversation import Conversation
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import (
    Opened,
    open_base,
    open_target,
    require_utf8,
    text_of_line,
)
from finetune.run.files import path_of

COMMANDS = {  # name -> (argument, what it does)
    "help": ("", "lists these commands"),
    "system": ("[TEXT]", "changes the system prompt; without a text, none"),
    "undo": ("", "forgets the last question and its answer"),
    "retry": ("", "answers the last question anew"),
    "reset": ("", "forgets the conversation"),
    "temperature": ("NUMBER", "changes the temperature; 0 is greedy"),
    "save": ("FILE", "adds the conversation to a JSONL file that can be trained on"),
    "exit": ("", "ends"),
}
"""The commands that a line beginning with / may give."""


def chat_in_terminal(
    target: str,
    *,
    base: bool = False,
    system_prompt: str | None,
    seed: int,
    settings: Mapping[str, Any],
    trust: bool = False,
) -> None:
    """Read questions from stdin and stream the answers, until the input ends or is /exit.

    `base` lets the model that the run began with answer, too. `trust`: run the code that comes with
    the model.
    """
    opened, display = open_target(target, trust=trust), Display()
    system = opened.system_prompt(system_prompt, display)
    talks = {"": _conversation(opened, system, seed, settings, display)}
    if base:
        before = _conversation(open_base(opened), system, seed, settings, display)
        talks = {"before": before, "after": talks[""]}
    session = _Session(talks, display)
    display.say("Ask something. /help lists the commands, /exit ends it.")
    for number in count(1):
        line = _ask(display, number)
        if line is None or not session.take(line):
            return


def _conversation(
    opened: Opened, system: str | None, seed: int, settings: Mapping[str, Any], display: Display
) -> Conversation:
    return Conversation(
        opened.model,
        opened.tokenizer,
        template=opened.template_settings,
        system_prompt=system,
        notify=display.say,
        settings=generation_settings(opened.settings(settings), opened.model, seed=seed),
    )


class _Session:
    """The conversations of one chat: one, or those with the base model and the trained one."""

    def __init__(self, talks: Mapping[str, Conversation], display: Display) -> None:
        self._talks, self._display = talks, display
        self._retries = 0

    def take(self, line: str) -> bool:
        """Answer a question or obey a command; return whether the chat goes on."""
        words = line.strip().split(maxsplit=1)
        if not words:
            return True
        if not words[0].startswith("/") or "/" in words[0][1:]:  # a path is a question
            self._ask(line)
            return True
        name, argument = words[0][1:], words[1] if len(words) > 1 else ""
        name = "exit" if name == "quit" else name
        try:
            return self._obey(name, argument)
        except UserError as error:
            self._display.answer(str(error))
            return True

    def _obey(self, name: str, argument: str) -> bool:
        if name not in COMMANDS:
            known = ", ".join(f"/{each}" for each in COMMANDS)
            raise UserError(
                f"there is no command /{name}; known are {known}{did_you_mean(name, COMMANDS)}"
            )
        if argument and not COMMANDS[name][0]:
            raise UserError(f"/{name} takes no text, but {argument!r:.80} follows it")
        if name == "exit":
            return False
        action: Callable[..., None] = getattr(self, f"_{name}")
        action(argument) if COMMANDS[name][0] else action()
        return True

    def _help(self) -> None:
        for name, (argument, meaning) in COMMANDS.items():
            self._display.answer(f"  {f'/{name} {argument}'.strip():<20} {meaning}")

    def _system(self, text: str) -> None:
        for talk in self._talks.values():
            talk.set_system_prompt(text)
        self._display.answer(f"(system prompt: {text})" if text else "(no system prompt)")

    def _undo(self) -> None:
        self._display.answer(f"(forgotten: {self._take_back('undo')})")

    def _retry(self) -> None:
        question = self._take_back("answer anew")
        self._retries += 1
        self._ask(question, retry=True)

    def _take_back(self, purpose: str) -> str:
        """Forget the last question and its answers; return it. Raises UserError without one."""
        if not all(talk.turns for talk in self._talks.values()):
            raise UserError(f"there is no question to {purpose}")
        questions = [talk.undo() for talk in self._talks.values()]
        assert questions[0] is not None
        return questions[0]

    def _reset(self) -> None:
        for talk in self._talks.values():
            talk.reset()
        self._display.answer("(conversation cleared)")

    def _temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 100:
            raise UserError(f"the temperature is {text!r:.40}, but must be from 0 to 100")
        for talk in self._talks.values():
            talk.settings = replace(talk.settings, temperature=value)
        self._display.answer(f"(temperature {value:g})")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save needs the name of a file, such as /save talk.jsonl")
        talk = list(self._talks.values())[-1]
        if not any(turn["content"].strip() for turn in talk.turns[1::2]):
            raise UserError("there is nothing to save yet: no question has an answer")
        line = json.dumps({"messages": _answered(talk)}, ensure_ascii=False)
        path = path_of(text)
        try:
            start = "" if _ends_with_a_line(path) else "\n"
            with path.open("a", encoding="utf-8") as out:
                out.write(f"{start}{line}\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        self._display.answer(f"(added to {path})")

    def _ask(self, question: str, *, retry: bool = False) -> None:
        for label, talk in self._talks.items():
            if label:
                self._display.answer(f"[{label}]")
            settings = talk.settings
            if retry and settings.seed is not None:  # another answer, unless it is greedy
                talk.settings = replace(settings, seed=settings.seed + self._retries)
            try:
                _print_reply(talk, question, self._display)
            finally:
                talk.settings = settings


def _ends_with_a_line(path: Path) -> bool:
    """Return whether what is added to a file begins a line of its own."""
    if not path.is_file() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _answered(talk: Conversation) -> list[Message]:
    """Return the messages without questions whose answer is empty, from which nothing is learnt."""
    pairs = zip(talk.turns[::2], talk.turns[1::2], strict=True)
    turns = [turn for pair in pairs if pair[1]["content"].strip() for turn in pair]
    return [*talk.messages[: len(talk.messages) - len(talk.turns)], *turns]


def _print_reply(talk: Conversation, question: str, display: Display) -> None:
    """Print the answer as it is generated, and its speed; Ctrl-C cuts it short."""
    began = time.perf_counter()
    try:
        for piece in talk.reply(question):
            print(on_terminal(piece), end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" …")
    except UserError as error:
        display.answer(str(error))
        return
    seconds = time.perf_counter() - began
    if is_terminal(sys.stdout) and seconds > 0:
        rate = talk.num_tokens / seconds
        display.say(f"({talk.num_tokens} tokens, {rate:.1f} tokens/s)")


def _ask(display: Display, number: int) -> str | None:
    """Return the next line, which is the one of this number, or None at the end of the input.

    A line from a file or a pipe is shown, so that one sees which question an answer belongs to.
    One that is not UTF-8 is reported, and is no question.
    """
    try:
        if sys.stdin is None:  # it is closed
            return None
        if is_terminal(sys.stdin):
            return require_utf8(input("> ").removesuffix("\r"), "the question")
        line = getattr(sys.stdin, "buffer", sys.stdin).readline()
        if not line:
            return None
        text = text_of_line(line, number)
        display.say(f"> {text}")
        return text
    except (EOFError, KeyboardInterrupt):
        return None
    except (UserError, UnicodeDecodeError) as error:
        display.answer(str(error))
        return ""
