"""The Modelfile of Ollama: the file, the chat template in Ollama's language, stops, parameters.

Ollama reads no Jinja. A template is taken apart instead: a conversation of marks is rendered, and
what stands around each mark is written around its message. Templates that write earlier turns
differently (thoughts, system prompts in the last question) cannot be written so, and get none.
https://docs.ollama.com/modelfile
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from finetune.data.formats.rendering import ChatTemplate, TemplateSettings
from finetune.data.types import Message
from finetune.errors import UserError
from finetune.models.llama_cpp.tokens import adds_bos, begins_with_blank

MARKS = ("‹system›", "‹first›", "‹answer›", "‹second›", "‹again›")


def modelfile(
    file: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: TemplateSettings,
    *,
    stops: Sequence[str],
    parameters: Mapping[str, float],
    system: str | None = None,
) -> str:
    """Return the text of a Modelfile for the GGUF `file` beside it.

    `stops`: what ends an answer. `system`: the system prompt of every conversation.
    """
    lines = [f"FROM ./{file}"]
    template = ollama_template(tokenizer, settings)
    if template is None or (written := _written(template)) is None:
        lines.append("# The chat template is not one of single turns, so none is written here.")
    else:
        lines.append(f"TEMPLATE {written}")
    if system and (written := _written(system)):
        lines.append(f"SYSTEM {written}")
    elif system:
        lines.append("# The system prompt has quotation marks that a Modelfile cannot hold.")
    elif system is not None:
        lines.append("# The training had an empty system message, which Ollama does not write.")
    lines += [f"PARAMETER {name} {value:g}" for name, value in parameters.items()]
    for stop in stops:
        plain = '"' not in stop and "\n" not in stop
        written = f'"{stop}"' if plain else _written(stop)
        lines.append(f"PARAMETER stop {written}" if written else "# A stop has quotation marks.")
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: PreTrainedTokenizerBase, settings: TemplateSettings) -> str | None:
    """Return the chat template in Ollama's language; None if it cannot be written so.

    A tokenizer without a template continues plain text. What the runtime puts before a text itself
    is left out.
    """
    if not tokenizer.chat_template:
        return "{{ .Prompt }}"
    template = ChatTemplate(tokenizer, settings)
    first, answer, second, again = MARKS[1:]
    try:
        parts = _around(template, _turns(first, answer, second, again))
        asked = template.render(_turns(first, answer, second), add_generation_prompt=True)
    except UserError:
        return None
    opening, to_answer, to_question, to_again, ending = parts
    if any("{{" in part or "}}" in part for part in parts):
        return None  # the language of Ollama's templates
    question = to_question.removeprefix(ending)  # before a question, after the end of an answer
    whole = opening + first + to_answer + answer + to_question + second
    if (
        to_again != to_answer
        or to_question != ending + question
        or not opening.endswith(question)
        or asked != whole + to_answer
    ):
        return None
    start = opening.removesuffix(question)
    if adds_bos(tokenizer) and tokenizer.bos_token is not None:
        start = start.removeprefix(str(tokenizer.bos_token))
    start = " " + start if begins_with_blank(tokenizer) else start
    head = start
    turns = [f'if eq .Role "user" }}}}{question}{{{{ .Content }}}}{to_answer}{{{{ ']
    turns.append(f'else if eq .Role "assistant" }}}}{{{{ .Content }}}}{ending}{{{{ ')
    if template.writes("system"):
        system = _system(template, question)
        if system is None:
            return None
        before, after = system
        before = before.removeprefix(str(tokenizer.bos_token)) if adds_bos(tokenizer) else before
        before = " " + before if begins_with_blank(tokenizer) else before
        head = f"{{{{ if not .System }}}}{start}{{{{ end }}}}" if start else ""
        turns.append(f'else if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}{{{{ ')
    return head + "{{ range .Messages }}{{ " + "".join(turns) + "end }}{{ end }}"


def _turns(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def _around(template: ChatTemplate, messages: list[Message]) -> list[str]:
    """Return the texts before, between and after the contents. Raises UserError if one is lost."""
    text, parts = template.render(messages), []
    for message in messages:
        before, found, text = text.partition(str(message["content"]))
        if not found:
            raise UserError("the template changes the messages. Use another one")
        parts.append(before)
    return [*parts, text]


def _system(template: ChatTemplate, question: str) -> tuple[str, str] | None:
    """Return what the template writes before and after a system message."""
    system, first = MARKS[:2]
    turns: list[Message] = [{"role": "system", "content": system}, *_turns(first)]
    before, after, _ = _around(template, turns)
    if not after.endswith(question):
        return None
    return before, after.removesuffix(question)


def _written(text: str) -> str | None:
    """Return a text as a Modelfile holds it; None if its quotation marks cannot be written."""
    if '"""' in text or text.endswith('"'):
        plain = text.strip() == text and "\n" not in text and not text.startswith('"')
        return text if plain else None
    return f'"""{text}"""'
