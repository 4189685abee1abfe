"""The border of prompt and answer: in training as in use, for all kinds of tokenizers."""

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.formats.borders import Turn, encode_turn
from finetune.data.formats.rendering import ChatTemplate, Dialog, PlainText, TemplateSettings
from finetune.data.formats.translation import TranslationFormat
from finetune.data.types import IGNORE_INDEX, Example
from finetune.models.tokenizers import CHATML, set_template
from tests.data import stock
from tests.data.stock import MakeTokenizer
from tests.vocabularies import NAMES, real_tokenizer

QUESTION, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TWO_TURNS = [QUESTION, ANSWER, {"role": "user", "content": "Sure?"}, ANSWER]


def learnt(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def check_border(template: ChatTemplate, messages: list[Any]) -> list[Example]:
    """Assert that every answer is learnt after the tokens that the model gets in use."""
    dialog = Dialog(messages)
    examples = template.examples(dialog, targets="assistant")
    prompts = [template.prompt(dialog.upto(i)) for i in dialog.answers]
    if len(examples) == 1:
        examples = examples * len(prompts)
    for prompt, example in zip(prompts, examples, strict=True):
        assert list(example.input_ids[: len(prompt)]) == prompt
        assert example.labels[len(prompt) - 1] == IGNORE_INDEX
        assert example.labels[len(prompt)] == example.input_ids[len(prompt)]
    return examples


@pytest.mark.parametrize("targets_end", ["4<|im_end|>"])
def test_targets_end_at_the_stop_token_where_the_template_ends_in_eos(
    targets_end: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(stock.PHI3)
    for _ in range(2):  # as loaded, and with the end of turn as its eos_token
        [example] = ChatTemplate(tokenizer).examples(TWO_TURNS, targets="assistant")
        assert learnt(example, tokenizer) == targets_end * 2
        check_border(ChatTemplate(tokenizer), TWO_TURNS)
        set_template(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_header_is_never_learnt_and_the_template_gets_what_it_lacks(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(stock.NO_HEADER_ASKED)
    template = ChatTemplate(tokenizer)
    assert template.render([QUESTION], add_generation_prompt=True).endswith("assistant\n")
    [example] = check_border(template, TWO_TURNS)[:1]
    assert learnt(example, tokenizer) == "4<|im_end|>" * 2
    assert set_template(tokenizer).completed
    asked = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n"), "in other runtimes too"
    assert not set_template(tokenizer).completed


def test_a_template_without_any_header_needs_none(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(stock.LLAMA2)
    before = tokenizer.chat_template
    assert not set_template(tokenizer).completed
    assert tokenizer.chat_template == before


THOUGHTS = {
    "none": ({"content": "4"}, "\n</think>\n\n4<|im_end|>"),
    "in the content": (
        {"content": "<think>\nTwo and two.\n</think>\n\n4"},
        "Two and two.\n</think>\n\n4<|im_end|>",
    ),
    "only closed": ({"content": "sum it\n</think>\n\n4"}, "sum it\n</think>\n\n4<|im_end|>"),
    "apart": (
        {"content": "4", "reasoning_content": "Two and two."},
        "Two and two.\n</think>\n\n4<|im_end|>",
    ),
}


@pytest.mark.parametrize("case", THOUGHTS)
@pytest.mark.parametrize("template", ["R1", "FORCED_THOUGHT"])
def test_a_prompt_that_opens_thoughts_is_continued_by_thoughts(
    case: str, template: str, make_tokenizer: MakeTokenizer
) -> None:
    answer, expected = THOUGHTS[case]
    tokenizer = make_tokenizer(getattr(stock, template))
    messages = [*TWO_TURNS[:3], {"role": "assistant", **answer}]
    examples = check_border(ChatTemplate(tokenizer), messages)
    assert len(examples) == 2
    assert learnt(examples[1], tokenizer) == expected
    assert learnt(examples[0], tokenizer) == "\n</think>\n\n4<|im_end|>"


def test_a_date_stands_still_for_a_run_and_moves_without_one(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(stock.TODAY)
    then, now = datetime(2024, 2, 9, 23, 59), datetime.now()
    for day in (then, now):
        text = ChatTemplate(tokenizer, TemplateSettings(now=day)).render([QUESTION])
        assert f"Today is {day:%d %b %Y}, a {day:%A}.<" in text
        assert text == ChatTemplate(tokenizer).render([QUESTION]).replace(
            f"{now:%d %b %Y}, a {now:%A}", f"{day:%d %b %Y}, a {day:%A}"
        )
    [example] = check_border(ChatTemplate(tokenizer, TemplateSettings(now=then)), TWO_TURNS)[:1]
    assert "09 Feb 2024" in tokenizer.decode(list(example.input_ids))


def test_a_wording_that_ends_in_white_space_meets_the_answer_as_in_use(
    make_tokenizer: MakeTokenizer,
) -> None:
    for kind in ("byte_level", "metaspace"):
        for ending in (" ", "\n", "  ", " \n ", ""):
            check_wording(make_tokenizer(None, kind=kind), ending)


def check_wording(tokenizer: Any, ending: str) -> None:
    format = TranslationFormat(
        tokenizer=tokenizer,
        languages=("en", "fr"),
        direction="forward",
        template="{source_name}: {source}\n{target_name}:" + ending,
        targets="assistant",
        system_prompt=None,
    )
    record = {"translation": {"en": "Hello there", "fr": "Bonjour"}}
    [example], [prompt] = format.examples(record), format.prompts(record)
    n = len(prompt.input_ids)
    assert list(example.input_ids[:n]) == list(prompt.input_ids)
    assert example.labels[n - 1] == IGNORE_INDEX
    assert example.labels[n] == example.input_ids[n]
    assert learnt(example, tokenizer).strip() == "Bonjour" + tokenizer.eos_token


def test_an_answer_that_the_tokenizer_joins_with_its_prompt_keeps_the_prompts_tokens(
    make_tokenizer: MakeTokenizer,
) -> None:
    """Two line breaks become one token once the tokenizer knows it."""
    tokenizer = make_tokenizer(stock.CHATML)
    tokenizer.add_tokens(["\n\n"])
    messages = [*TWO_TURNS[:1], {"role": "assistant", "content": "\nparis"}, *TWO_TURNS[2:]]
    examples = check_border(ChatTemplate(tokenizer), messages)
    assert learnt(examples[0], tokenizer) == "\nparis<|im_end|>"
    assert tokenizer.decode(list(examples[0].input_ids)).endswith("assistant\n\nparis<|im_end|>")
    assert len(examples) == 2
    joined = tokenizer.convert_tokens_to_ids("\n\n")
    assert joined not in examples[0].input_ids
    assert joined in examples[1].input_ids, "what the model meets as an earlier turn"


PIECES = st.one_of(
    st.sampled_from(list("ab 12'.,!?\n\t \u00a0\u2028")),
    st.sampled_from(
        ["\n\n", "  ", "é", "e\u0301", "🙂", "👩‍👩‍👧", "日本", "مرحبا", "</s>", "don't"]
    ),
    st.characters(exclude_categories=["Cs"]),
)
TEXTS = st.lists(PIECES, min_size=1, max_size=12).map("".join).filter(str.strip)


@pytest.mark.slow  # fetches up to 150 MB the first time
@pytest.mark.parametrize("name", [*NAMES, "smollm2"])
def test_real_tokenizers_meet_every_answer_after_the_prompt_in_use(name: str) -> None:
    tokenizer = real_tokenizer(name)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    set_template(tokenizer)
    template = ChatTemplate(tokenizer)
    seen = 0

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(TEXTS, min_size=2, max_size=4))
    def every_answer(texts: list[str]) -> None:
        nonlocal seen
        texts = texts[: len(texts) // 2 * 2]
        roles = ["user", "assistant"] * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        examples = check_border(template, messages)
        seen += len(examples)
        for example in examples:
            targets = [label for label in example.labels if label != IGNORE_INDEX]
            assert targets[-1] == tokenizer.eos_token_id

    every_answer()
    assert seen >= 60


@pytest.mark.slow  # fetches up to 150 MB the first time
@pytest.mark.parametrize("name", [*NAMES, "smollm2"])
def test_real_tokenizers_meet_every_plain_answer_after_the_prompt_in_use(name: str) -> None:
    tokenizer = real_tokenizer(name)
    tokenizer.chat_template = None
    plain = PlainText(tokenizer)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(TEXTS, TEXTS)
    def every_answer(prompt: str, answer: str) -> None:
        example, alone = plain.example(prompt, answer, targets="assistant"), plain.prompt(prompt)
        assert list(example.input_ids[: len(alone)]) == alone
        assert set(example.labels[: len(alone)]) == {IGNORE_INDEX}
        assert list(example.labels[len(alone) :]) == list(example.input_ids[len(alone) :])

    every_answer()
    for ending in ("", " ", "\n"):
        check_wording(tokenizer, ending)


def test_a_turn_is_its_prompt_and_then_its_answer(make_tokenizer: MakeTokenizer) -> None:
    for kind in ("byte_level", "metaspace"):
        tokenizer = make_tokenizer(None, kind=kind)
        example = encode_turn(tokenizer, Turn("Hello ", "Hello there", 11))
        prompt = tokenizer("Hello ", add_special_tokens=False)["input_ids"]
        assert list(example.input_ids[: len(prompt)]) == prompt
        assert tokenizer.decode(list(example.input_ids)).split() == ["Hello", "there"]


def test_a_plain_text_with_its_own_marks_gets_no_second_ones(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)
    plain = PlainText(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text in ("Hello", "<s>Hello", "Hello</s>", "<s>Hello</s>"):
        example = plain.example("", text, targets="all")
        ids = list(example.input_ids)
        assert (ids.count(bos), ids.count(eos), ids[0], ids[-1]) == (1, 1, bos, eos)
        assert list(example.labels)[1:] == ids[1:]
    assert plain.prompt("<s>Hello") == plain.prompt("Hello")
