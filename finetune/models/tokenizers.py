"""Tokenizers: loaded with their model, or trained on a run's own data; and made ready for chat.

A model stops at its end-of-text token. So the mark that the chat template writes after an
assistant's turn must be that token, in the tokenizer, the model's config and its generation config.
A base model has neither markers nor template: ChatML
(https://github.com/openai/openai-python/blob/v0.28.1/chatml.md) gives it both.
"""

import contextlib
import logging
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from finetune.data.formats.borders import encode_text
from finetune.data.formats.rendering import ChatTemplate
from finetune.errors import Border, UserError
from finetune.models.describe import CausalLM, token_tables
from finetune.models.load import ModelSpec, why_refused
from finetune.models.locate import resolve_name
from finetune.run.files import path_of

_logger = logging.getLogger(__name__)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

RENDERING = 20.0  # seconds that a chat template may take for a question and its answer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the folder or repository of the model. Raises UserError."""
    assert spec.name is not None, "a model of random weights has no tokenizer of its own"
    place = resolve_name(spec.name, revision=spec.revision)
    with Border(f"the tokenizer of {spec.name!r} could not be loaded", reason=why_refused):
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {spec.name!r} is {type(tokenizer).__name__}, which is written in "
            "Python and knows no places of tokens in a text. Use a model with a fast tokenizer "
            "(tokenizer.json)"
        )
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        raise UserError(
            f"model_max_length in the tokenizer_config.json of {spec.name!r} is {longest!r:.80}. "
            "Give a number, or leave it out"
        )
    tokenizer.padding_side = "right"
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `vocab_size` entries.

    It has ChatML's markers and template. Any text can be encoded, since all 256 bytes are entries.
    Raises UserError if `vocab_size` has no room for them and the markers.
    """
    special = [END_OF_TEXT, TURN_START, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(special)
    if vocab_size < least:
        raise UserError(
            f"model.tokenizer.vocab_size is {vocab_size}; a byte-level tokenizer needs at least "
            f"{least}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class ChatTokens:
    """What a chat template changes in the model that it is used with."""

    added: tuple[int, ...] = ()  # ids that the tokenizer did not have before
    stops: tuple[int, ...] = ()  # ids that end an answer, the template's end of turn first
    completed: bool = False  # whether the template got the generation prompt that it lacked


def set_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> ChatTokens:
    """Set the template, its markers and the stop token in the tokenizer, in place.

    `chat_template`: None (the tokenizer's own, if any), "chatml", or the path of a Jinja file.
    Without any template the tokenizer's end-of-text token stays the stop token. Returns what
    `fit_to_tokenizer` needs. Raises UserError if the file is missing or fails to render.
    """
    before = set(tokenizer.get_vocab().values())
    if chat_template == "chatml":
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [TURN_START, TURN_END]}, replace_extra_special_tokens=False
        )
    elif chat_template is not None:
        path = path_of(chat_template)
        try:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not a file")
            tokenizer.chat_template = path.read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(
                f'model.chat_template {chat_template!r} is neither "chatml" nor a file that can be '
                f"read: {error}"
            ) from error
    stop = end_of_turn(tokenizer) if tokenizer.chat_template else None
    completed = _complete_template(tokenizer)
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if stop is not None:
        tokenizer.eos_token = stop
        stops = list(dict.fromkeys([tokenizer.eos_token_id, *stops]))
    if tokenizer.pad_token is None:
        # Never learnt: the labels of padding are IGNORE_INDEX.
        tokenizer.pad_token = tokenizer.eos_token
    added = sorted(set(tokenizer.get_vocab().values()) - before)
    return ChatTokens(tuple(added), tuple(stops), completed)


def _complete_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the template the generation prompt that it lacks; return whether it lacked one.

    Without one a model would have to write the header of its own turn, in every runtime.
    """
    if not isinstance(tokenizer.chat_template, str):
        return False
    complete = ChatTemplate(tokenizer).source()
    lacked = complete != tokenizer.chat_template
    tokenizer.chat_template = complete
    return lacked


def fit_to_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: ChatTokens
) -> None:
    """Give the model rows for the added tokens, and the tokenizer's stop tokens, in place.

    New rows start as the mean of the others. They are to be trained with LoRA too (see
    `adapters.add_lora`).
    """
    _fit_rows(model, list(tokens.added))
    _set_stops(model, tokenizer, list(tokens.stops))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the special token that the chat template writes right after an answer, or None."""
    answer = "Yes."
    try:
        with _time_limit(RENDERING):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}],
                tokenize=False,
            )
    except Exception as error:  # a template is a program of the user's: it may raise anything
        raise UserError(
            f"the chat template fails to render a question and its answer: {error}"
        ) from error
    _, found, after = str(text).rpartition(answer)
    special = [token for token in tokenizer.all_special_tokens if after.lstrip().startswith(token)]
    special += [
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if after.lstrip().startswith(str(token))
    ]
    return max(special, key=len) if found and special else None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds. Only the main thread can have one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _fit_rows(model: PreTrainedModel, added: list[int]) -> None:
    """Make room for the added ids and start their rows.

    The table never shrinks: Qwen's and Gemma's are padded. Without added ids nothing is resized: a
    tokenizer that is larger than the table is another model's, and encoding will report that.
    """
    if not added:
        return
    rows = token_tables(model)[0].shape[0]
    if max(added) >= rows:
        model.resize_token_embeddings(max(added) + 1, mean_resizing=False)
    with torch.no_grad():
        for parameter in (
            *token_tables(model),
            getattr(model.get_output_embeddings(), "bias", None),
        ):
            if parameter is not None:
                parameter[added] = parameter[: min(rows, *added)].mean(0)


def _set_stops(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> None:
    settings: Any = model.generation_config
    known = settings.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    ids = set(tokenizer.get_vocab().values())  # there may be gaps, so their number is no bound
    stops = list(dict.fromkeys([*stops, *(token for token in known if token in ids)]))
    if stops:
        model.config.eos_token_id = stops[0]
        settings.eos_token_id = stops if len(stops) > 1 else stops[0]
    # It has more than the config now: transformers must not derive it again.
    settings._from_model_config = False
    model.config.pad_token_id = settings.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        model.config.bos_token_id = settings.bos_token_id = tokenizer.bos_token_id
    model.generation_config = _savable(settings)


def _savable(settings: GenerationConfig) -> GenerationConfig:
    """Return the generation settings without those that transformers refuses to write.

    It reads many that it does not write, such as a temperature without do_sample: they have no
    effect. What is left out is logged.
    """
    try:
        settings.validate(strict=True)
        return settings
    except ValueError:
        kept = GenerationConfig()
    switches = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
    given = {key: value for key, value in settings.to_dict().items() if key[0] != "_"}
    dropped = []
    for key in sorted(given, key=lambda key: key not in switches):
        if given[key] == getattr(kept, key, None) or key == "transformers_version":
            continue
        before = getattr(kept, key, None)
        setattr(kept, key, given[key])
        try:
            kept.validate(strict=True)
        except ValueError:
            setattr(kept, key, before)
            dropped.append(f"{key} {given[key]}")
    kept._from_model_config = False
    _logger.warning(
        "the model's generation_config.json has settings that contradict each other, and could "
        "not be saved with the trained model; left out: %s",
        ", ".join(dropped),
    )
    return kept


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills padding: the tokenizer's, or 0 if it has none."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_ids(model: CausalLM) -> list[int]:
    """Return the tokens that end an answer, from the generation config of `model`."""
    stop = model.generation_config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


def byte_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens of single bytes, from which any text can be spelt.

    They are those of byte-level BPE, or sentencepiece's <0xNN>.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    return {
        i
        for token, i in tokenizer.get_vocab().items()
        if token in alphabet or re.fullmatch("<0x[0-9A-F]{2}>", token)
    }


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that the chat template writes around turns of all roles.

    The names of the roles are among them. Without a template there are none.
    """
    if not tokenizer.chat_template:
        return set()
    template = ChatTemplate(tokenizer)
    turns = [{"role": role, "content": "Yes."} for role in ("system", "user", "assistant")]
    turns = turns if template.writes("system") else turns[1:]
    return {
        *encode_text(tokenizer, template.render(turns), []).input_ids,
        *template.prompt(turns[:-1]),
    }
