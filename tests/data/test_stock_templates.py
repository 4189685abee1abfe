"""The chat templates of known models, over real vocabularies: learnt as in use, or refused."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from finetune.data.formats.rendering import ChatTemplate, Dialog, TemplateSettings
from finetune.data.types import IGNORE_INDEX
from finetune.errors import UserError
from finetune.models.tokenizers import set_template
from tests.vocabularies import real_tokenizer, stock_template

from .test_chat_records import CALL, WEATHER, answer, chat, detected, user

pytestmark = pytest.mark.slow  # fetches up to 150 MB the first time

PHI = ("<|user|>", "<|assistant|>", "<|end|>", "<|system|>")
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    # template -> vocabulary, and the special tokens that it lacks
    "qwen2_5": ("qwen3", ()),
    "qwen3": ("qwen3", ()),
    "qwen3_instruct_2507": ("qwen3", ()),
    "qwen3_5_think": ("qwen3", ()),
    "llama3": ("llama3_1", ()),
    "llama3_1": ("llama3_1", ()),
    "llama3_2": ("llama3_1", ()),
    "gptoss": ("gptoss", ()),
    "deepseekv3": ("deepseek_v3", ()),
    "deepseek_r1_distill": ("deepseek_v3", ()),
    "gemma": ("gemma3", ()),
    "gemma3": ("gemma3", ()),
    "phi3": ("llama2", PHI),
    "phi3_5": ("llama2", PHI),
    "lfm2_v2": ("qwen3", ()),
    "nemotron_3_nano": ("qwen3", ()),
}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "5C"}
RECORDS: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    # record -> what is said in each answer that is learnt
    "a question": (chat(user(), answer()), [["4"]]),
    "two questions and a system prompt": (
        chat(SYSTEM, user(), answer("four"), user("3+3?"), answer("six")),
        [["four"], ["six"]],
    ),
    "a question that is not learnt": (
        chat(user(), answer("five", weight=0), user("Sure?"), answer("four")),
        [["four"]],
    ),
    "thoughts": (
        chat(user(), answer("four", thinking="Two and two."), user("So?"), answer("six")),
        [["Two and two.", "four"], ["six"]],
    ),
    "thoughts in the content": (
        chat(user(), answer("<think>\nTwo and two.\n</think>\n\nfour")),
        [["Two and two.", "four"]],
    ),
    "a call": (
        chat(user(), answer(None, tool_calls=[CALL]), TOOL, answer("5 degrees"), tools=[WEATHER]),
        [["weather", "city", "Oslo"], ["5 degrees"]],
    ),
    "a call and words": (
        chat(user("Oslo?"), answer("I look.", tool_calls=[CALL]), tools=[WEATHER]),
        [["I look.", "weather", "Oslo"]],
    ),
    "two calls": (
        chat(user("Oslo?"), answer("", tool_calls=[CALL, CALL]), tools=[WEATHER]),
        [["weather", "Oslo", "weather", "Oslo"]],
    ),
}  # fmt: skip
WITH_THOUGHTS = (
    "qwen3", "qwen3_5_think", "gptoss", "deepseekv3", "deepseek_r1_distill", "nemotron_3_nano",
)  # fmt: skip
WITH_CALLS = (
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "llama3_1", "llama3_2", "gptoss",
    "lfm2_v2", "nemotron_3_nano",
)  # fmt: skip
CAN = {"thoughts": set(WITH_THOUGHTS), "a call": set(WITH_CALLS)}
CAN |= {
    "a call and words": CAN["a call"] - {"llama3_1", "llama3_2"},
    "two calls": CAN["a call"] - {"llama3_1", "llama3_2", "gptoss"},
    "two questions and a system prompt": set(FAMILIES) - {"gemma"},
}


@pytest.fixture(scope="module")
def tokenizer_of() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def tokenizer_of(family: str) -> Any:
        if family not in made:
            name, special = FAMILIES[family]
            tokenizer = made[family] = real_tokenizer(name)
            if special:
                tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
            set_template(tokenizer, str(stock_template(family)))
        return made[family]

    return tokenizer_of


@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_learnt_after_the_prompt_in_use_or_refused(
    family: str, case: str, tokenizer_of: Callable[[str], Any]
) -> None:
    record, said = RECORDS[case]
    tokenizer = tokenizer_of(family)
    format = detected(tokenizer, record)
    if family not in CAN.get(case, FAMILIES):
        with pytest.raises(UserError, match=r"does not write|leaves out|fails on this"):
            format.examples(record)
        return
    examples, dialog = format.examples(record), format.dialog(record)
    assert isinstance(dialog, Dialog)
    prompts = [format.template.prompt(dialog.upto(place)) for place in dialog.answers]
    assert len(prompts) == len(said)
    assert len(examples) in (1, len(prompts))
    for example, prompt, words in zip(examples * len(prompts), prompts, said):
        ids, labels = list(example.input_ids), list(example.labels)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt) - 1] == IGNORE_INDEX
        end = next((i for i in range(len(prompt), len(ids)) if labels[i] == IGNORE_INDEX), len(ids))
        learnt = tokenizer.decode(labels[len(prompt) : end])
        place = 0
        for word in words:
            place = learnt.find(word, place)
            assert place >= 0, (learnt, word)
            place += len(word)
        assert tokenizer.added_tokens_decoder[ids[end - 1]].special
        if family != "gptoss":  # ends calls by a token of their own
            assert ids[end - 1] == tokenizer.eos_token_id
        for other in {word for words in said for word in words} - set(words) - {"Oslo", "city"}:
            assert other not in learnt


DATED = {"llama3_2": "09 Feb 2024", "gptoss": "2024-02-09"}


@pytest.mark.parametrize("family", DATED)
def test_a_date_is_that_of_the_run_in_training_and_of_today_in_use(
    family: str, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of(family)
    question = [{"role": "user", "content": "2+2?"}]
    then = TemplateSettings(now=datetime(2024, 2, 9, 23, 59))
    trained = ChatTemplate(tokenizer, then)
    text = trained.render(question, add_generation_prompt=True)
    today = ChatTemplate(tokenizer).render(question, add_generation_prompt=True)
    assert DATED[family] in text
    assert DATED[family] not in today
    kept = [a for a, b in zip(text.splitlines(), today.splitlines(), strict=True) if a == b]
    assert len(kept) == len(text.splitlines()) - 1
    turns = [*question, {"role": "assistant", "content": "4"}]
    [example] = trained.examples(turns, targets="assistant")
    assert list(example.input_ids[: len(trained.prompt(question))]) == trained.prompt(question)
