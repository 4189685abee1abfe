"""A finished run, or any model, opened for a command, and the lines that it reads from stdin."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetune.config import RunConfig, load_config
from finetune.config.schema import GenerationSection
from finetune.data.formats.rendering import ChatTemplate, TemplateSettings
from finetune.data.sources.files import BOM
from finetune.display import Display
from finetune.errors import UserError, is_terminal
from finetune.models.load import ModelSpec, load_model
from finetune.models.tokenizers import fit_to_tokenizer, load_tokenizer, set_template
from finetune.recipes.build.look import changed_generation, look_at_target, trusting
from finetune.recipes.build.model import in_float32, load_trained, make_model, make_tokenizer
from finetune.run.folder import RunDir
from finetune.run.records import DataCounts


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode, and the run that it came from, if any."""

    model: Any
    tokenizer: Any
    run: RunDir | None
    config: RunConfig | None

    def system_prompt(self, given: str | None, display: Display) -> str | None:
        """Return the system prompt that was given, or that of the run's training, which is said.

        An empty one that is given is none. One that the training has is a system message without
        text: many templates write a text of their own if there is no message.
        """
        if given is not None or self.run is None:
            return require_utf8(given, "the system prompt") if given else None
        trained = DataCounts.read(self.run).system_prompt
        if trained is not None:
            display.say(f"system prompt of the run: {trained or '(empty)'} (--system changes it)")
        return trained

    def template(self) -> ChatTemplate:
        """Return the chat template, with the variables that the run gives to it.

        Raises UserError if there is none.
        """
        return ChatTemplate(self.tokenizer, self.template_settings)

    @property
    def template_settings(self) -> TemplateSettings:
        """What the chat template gets in use: the variables of the run, and today's date."""
        options = {} if self.config is None else self.config.data.chat_template_kwargs
        return TemplateSettings(options=options)

    def settings(self, given: Mapping[str, Any]) -> GenerationSection:
        """Return the generation section of the run, or the defaults, changed by `given`.

        Raises UserError for a value that is not allowed.
        """
        return changed_generation(self.config, given)


def open_target(target: str, *, trust: bool = False) -> Opened:
    """Load a run's model/, or a model by name, onto the GPU if there is one.

    `trust`: run the code that comes with the model. Raises UserError.
    """
    run = look_at_target(target)
    config = None if run is None else load_config(run.config, trusting(trust))
    model: Any
    if run is not None and config is not None:
        model, tokenizer = load_trained(run.model, config.model)
    else:
        spec = ModelSpec(name=target, trust_remote_code=trust)
        model, tokenizer = load_model(spec), load_tokenizer(spec)
    fit_to_tokenizer(model, tokenizer, set_template(tokenizer))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(model, tokenizer, run, config)


def open_base(opened: Opened) -> Opened:
    """Load the model that a run began with, as it was before the first step.

    Weights that the run did not change are shared with the trained model's. Raises UserError if
    `opened` is no run, or if it began with random weights.
    """
    config = opened.config
    if config is None or config.model.name is None:
        raise UserError(
            "there is no base model to compare with: "
            + ("this is no run" if config is None else "the run began with random weights")
        )
    tokenizer = make_tokenizer(config.model, ())
    tokens = set_template(tokenizer, config.model.chat_template)
    model = make_model(in_float32(config.model), tokenizer, tokens, seed=config.seed)
    model.to(opened.model.device).eval()
    _share_equal_weights(model, opened.model)
    return Opened(model, tokenizer, opened.run, config)


def _share_equal_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let `model` use the weights of `other` that have the same name and the same values.

    Neither model may be trained afterwards.
    """
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        twin = theirs.get(name)
        if twin is not None and twin.dtype == parameter.dtype and torch.equal(twin, parameter):
            parameter.data = twin.data


def require_utf8(text: str, what: str) -> str:
    """Return `text`. Raises UserError if it holds bytes that were not UTF-8.

    In the C locales Python reads such bytes as lone surrogates, which no tokenizer takes.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{what} is not UTF-8 text: {text!r:.80}. Convert it first")
    return text


def stdin_lines(display: Display, what: str) -> Iterator[str]:
    """Yield the lines of stdin; at a terminal, first print what to type.

    Only \\n and \\r\\n end a line. A byte order mark is no text, at the start of any line. Raises
    UserError for a line that is not UTF-8, in any locale.
    """
    if sys.stdin is None:
        raise UserError("stdin is closed, so nothing can be read. Give the text in the command")
    if is_terminal(sys.stdin):
        display.say(f"type {what}, and Ctrl-D at the end")
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), start=1):
        yield text_of_line(line, number)


def text_of_line(line: bytes | str, number: int) -> str:
    """Return the text of a line of stdin, without its end; see `stdin_lines`.

    Raises UserError with its `number`, which begins at 1, if it is not UTF-8.
    """
    try:
        text = line.decode() if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        raise UserError(
            f"line {number} of stdin is not UTF-8 text (byte {error.start} of the line). "
            "Convert it first"
        ) from error
    return text.lstrip(BOM).removesuffix("\n").removesuffix("\r")
