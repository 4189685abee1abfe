"""Many records at a time give the same ids and labels as each text by itself, bit for bit."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.encoding.drafts import TextEncoder
from finetune.data.formats.borders import Turn, encode_text, encode_turn, encode_turns
from finetune.data.formats.jinja import writes_content_as_it_is
from finetune.data.formats.rendering import ChatTemplate, Dialog, PlainText
from finetune.data.formats.spelling import require_texts
from finetune.data.types import IGNORE_INDEX, Example
from finetune.errors import UserError
from finetune.models.tokenizers import CHATML, set_template
from tests.data import stock
from tests.data.stock import MakeTokenizer
from tests.data.test_borders import PIECES
from tests.vocabularies import NAMES, real_tokenizer

LOOKS_AT_THE_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'user' and '!' in m.content %}{{ 'Loud: ' }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED_TO_THINK = (  # SmolLM3: the content of one message decides about another
    "{% set think = '/no_think' not in messages[-1].content %}" + stock.CHATML.replace(
        "assistant\n", "assistant\n{% if think %}<think>\n\n</think>\n\n{% endif %}"
    )
)  # fmt: skip
TEMPLATES = {
    name: text
    for name, text in vars(stock).items()
    if isinstance(text, str) and "messages" in text and name != "TODAY"
} | {"LOOKS_AT_THE_LAST": LOOKS_AT_THE_LAST, "ASKED_TO_THINK": ASKED_TO_THINK}

WORDS = st.one_of(
    PIECES,
    st.sampled_from(
        ["<|im_start|>", "<|im_", "<|im_end|>", "</think>", "<think>", "/no_think", "!", "system",
         "Zq0wx", "<|im_start|>assistant\n", "[INST]", "\n", " ", "Hello there"]
    ),
)  # fmt: skip
CONTENTS = st.lists(WORDS, min_size=1, max_size=6).map("".join)


@st.composite
def dialogs(draw: st.DrawFn) -> Dialog:
    """Conversations with answers that are not learnt, thoughts, tools and options."""
    messages: list[Any] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(CONTENTS)})
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(CONTENTS)})
        messages.append({"role": "assistant", "content": draw(CONTENTS)})
        if draw(st.integers(0, 9)) == 0:
            messages[-1]["reasoning_content"] = draw(CONTENTS)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    muted = draw(st.sets(st.sampled_from(places), max_size=len(places) - 1))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    options = {"enable_thinking": False} if draw(st.integers(0, 9)) == 0 else {}
    return Dialog(
        messages, tools if draw(st.integers(0, 9)) == 0 else None, options, frozenset(muted)
    )


def one_by_one(template: ChatTemplate, dialog: Dialog, targets: str) -> Any:
    """Return the examples of one conversation by prefixes, each text through the tokenizer alone.

    Instead of them there is what is wrong, as text.
    """
    tokenizer = template.tokenizer
    try:
        whole = template.render(dialog)
        if targets == "all":
            said = [m for i, m in enumerate(dialog.messages) if i not in dialog.muted]
            require_texts(said, whole)
            return [encode_text(tokenizer, whole, template._all_but_muted(dialog, whole))]
        turns = [template.turn(dialog, i, whole) for i in dialog.answers]
        require_texts([m for m in dialog.messages if m["role"] == "user"], whole)
        example = None
        if all(whole.startswith(turn.learnt) for turn in turns):
            example = encode_turns(tokenizer, turns[-1].learnt, turns)
        found = [encode_turn(tokenizer, turn) for turn in turns] if example is None else [example]
    except UserError as error:
        return str(error)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for each in found:
        after = [*each.labels[1:], IGNORE_INDEX]
        ends = {a for a, b in zip(each.labels, after) if b == IGNORE_INDEX != a}
        if not ends <= special | {tokenizer.eos_token_id}:
            return "never stop"
    return found


def many(template: ChatTemplate, given: list[Dialog], targets: str) -> list[Any]:
    drafts: list[Any] = []
    for dialog in given:
        try:
            drafts.append(template.drafts(dialog, targets=targets))
        except UserError as error:
            drafts.append(error)
    return template.texts.encode(drafts)


def check(tokenizer: Any, *, examples: int) -> int:
    """Assert that both ways agree, and return how many examples were compared."""
    template, seen = ChatTemplate(tokenizer), 0

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(st.lists(dialogs(), min_size=1, max_size=4), st.sampled_from(["assistant", "all"]))
    def agree(batch: list[Dialog], targets: str) -> None:
        nonlocal seen
        for dialog, made in zip(batch, many(template, batch, targets), strict=True):
            expected = one_by_one(ChatTemplate(tokenizer), dialog, targets)
            if isinstance(expected, str):
                assert isinstance(made, UserError)
                assert expected in str(made)
                continue
            assert not isinstance(made, UserError), made
            assert made == expected
            seen += len(expected)

    agree()
    return seen


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_all_kinds(name: str, make_tokenizer: MakeTokenizer) -> None:
    for kind in ("byte_level", "metaspace"):
        seen = check(make_tokenizer(TEMPLATES[name], kind=kind), examples=6)
        assert seen or name == "NO_END"


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_all_kinds_for_long(name: str, make_tokenizer: MakeTokenizer) -> None:
    for kind in ("byte_level", "metaspace"):
        assert check(make_tokenizer(TEMPLATES[name], kind=kind), examples=150) or name == "NO_END"


@pytest.mark.slow  # fetches up to 150 MB the first time
@pytest.mark.parametrize("name", [*NAMES, "smollm2"])
def test_real_tokenizers_with_their_own_templates(name: str) -> None:
    tokenizer = real_tokenizer(name)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    set_template(tokenizer)
    assert check(tokenizer, examples=100) > 50
    plain, texts = PlainText(tokenizer), TextEncoder(tokenizer)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(CONTENTS, CONTENTS, st.sampled_from(["all", "assistant"]))))
    def agree(given: list[tuple[str, str, str]]) -> None:
        drafts = [[plain.draft(a, b, targets=targets)] for a, b, targets in given]
        for (prompt, answer, targets), made in zip(given, texts.encode(drafts), strict=True):
            text = prompt + answer
            try:
                body = encode_turn(tokenizer, Turn(prompt.rstrip(), text, len(text)))
            except UserError as error:
                body, problem = None, str(error)
            if body is None:
                assert str(made) == problem
                continue
            labels = body.input_ids if targets == "all" else body.labels
            end, start = plain._eos, plain._bos
            before = [IGNORE_INDEX] * len(start)
            expected = [*before, *labels, *end]
            assert made == [Example([*start, *body.input_ids, *end], [-100, *expected[1:]])]

    agree()


EXACT = {
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m.content ~ eos_token }}{% endfor %}": True,
    stock.DEFAULT_SYSTEM: True,
    "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}": False,
    "{% for m in messages %}{{ m.get('content') }}{% endfor %}": False,
    "{% for m in messages %}{{ m['con' ~ 'tent'] }}{% endfor %}": False,
    "{% for m in messages %}{{ m | tojson }}{% endfor %}": False,
    "{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}": False,
    "{% for m in messages %}{% set c = m.content %}{{ c }}{% endfor %}": False,
    "{% for m in messages %}{{ m.content[:5] }}{% endfor %}": False,
    "{% for m in messages %}{{ (m.content + 'a') | upper }}{% endfor %}": False,
    "{% for m in messages if m.content %}{{ m.role }}{% endfor %}": False,
    "{% for m in messages %}{{ loop.nextitem | length }}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{% if loop.changed(m) %}a{% endif %}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{% filter upper %}{{ m.content }}{% endfilter %}{% endfor %}": False,
    "{% for m in messages[1:] %}{{ m.content }}{% endfor %}": False,
    "{{ messages[-1].content }}": False,
    "{{ messages }}": False,
    "{% set first = messages[0] %}{{ first.role }}": False,
    "{% for m in messages %}{{ strftime_now('%S') }}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}": False,
}


@pytest.mark.parametrize("template", EXACT)
def test_a_template_that_only_writes_contents_is_known_by_its_code(template: str) -> None:
    assert writes_content_as_it_is(template) is EXACT[template]


def test_a_conversation_of_known_roles_is_not_rendered_again(
    make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(stock.DEFAULT_SYSTEM)
    template, count = ChatTemplate(tokenizer), 0
    apply = tokenizer.apply_chat_template

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return apply(*args, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    pair = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    template.drafts(pair * 3, targets="assistant")
    before, count = count, 0
    assert before > 0
    for word in ("five", "six"):
        answer = {"role": "assistant", "content": word}
        [draft] = template.drafts([*pair * 2, pair[0], answer], targets="assistant")
        assert draft.turns[-1].answer == word
    assert count == 0
