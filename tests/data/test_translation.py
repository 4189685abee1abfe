"""Pairs: the prompt in its three wordings, directions, templates, detection, and every refusal."""

from dataclasses import replace
from typing import Any

import pytest

from finetune.data.formats.detect import build_format
from finetune.data.formats.languages import is_language, language_name, language_tag
from finetune.data.formats.translation import TranslationFormat
from finetune.data.types import IGNORE_INDEX, Record
from finetune.errors import UserError
from tests.data import stock
from tests.data.settings import format_options
from tests.data.stock import MakeTokenizer

PAIR = {"translation": {"en": "Hello there", "fr": "Bonjour"}}


def build(tokenizer: Any, record: Record = PAIR, *, kind: str = "auto", **options: Any) -> Any:
    return build_format(kind, format_options(**options), tokenizer=tokenizer, first_record=record)


def shown(format: Any, tokenizer: Any, record: Record = PAIR) -> list[tuple[str, str]]:
    """(What is not learnt, what is) of each example of the record; the first is the prompt."""
    texts = []
    for example, prompt in zip(format.examples(record), format.prompts(record), strict=True):
        n = len(prompt.input_ids)
        assert list(example.input_ids[:n]) == list(prompt.input_ids)
        assert set(example.labels[:n]) == {IGNORE_INDEX}
        assert list(example.labels[n:]) == list(example.input_ids[n:])
        texts.append(
            (
                tokenizer.decode(list(prompt.input_ids)),
                tokenizer.decode(list(example.input_ids[n:])),
            )
        )
    return texts


def test_a_chat_turn_with_a_short_instruction_in_place_of_the_default_one(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(stock.DEFAULT_SYSTEM)
    prompt = "<|im_start|>system\nTranslate English to French.<|im_end|>\n"
    prompt += "<|im_start|>user\nHello there<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    assert shown(build(tokenizer), tokenizer) == [(prompt, "Bonjour<|im_end|>")]


def test_a_template_without_system_messages_has_the_instruction_in_the_users_turn(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(stock.GEMMA, adds_bos=True)
    prompt = "<s><start_of_turn>user\nTranslate English to French.\nHello there<end_of_turn>\n"
    prompt += "<start_of_turn>model\n"
    assert shown(build(tokenizer), tokenizer) == [(prompt, "Bonjour<end_of_turn>")]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_plain_text_without_a_chat_template(kind: str, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None, kind=kind)
    [(prompt, answer)] = shown(build(tokenizer), tokenizer)
    assert prompt == "English: Hello there\nFrench:"
    assert answer.strip() == "Bonjour</s>"


def test_plain_text_begins_with_bos_where_the_tokenizer_does(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)
    assert shown(build(tokenizer), tokenizer) == [
        ("<s>English: Hello there\nFrench:", " Bonjour</s>")
    ]


def test_directions(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None)
    forward, backward = (
        ("English: Hello there\nFrench:", " Bonjour</s>"),
        ("French: Bonjour\nEnglish:", " Hello there</s>"),
    )
    for direction, expected in {
        "forward": [forward],
        "backward": [backward],
        "both": [forward, backward],
    }.items():
        assert shown(build(tokenizer, direction=direction), tokenizer) == expected
    first, second = build(tokenizer, direction="both").prompts(PAIR)
    assert (first.text, first.reference, second.text, second.reference) == (
        "Hello there",
        "Bonjour",
        "Bonjour",
        "Hello there",
    )


def test_a_wording_of_ones_own(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None)
    template = "<{source_language}2{target_language}> {source} => "
    assert shown(build(tokenizer, template=template), tokenizer) == [
        ("<en2fr> Hello there =>", " Bonjour</s>")
    ]
    tokenizer = make_tokenizer()
    [(prompt, _)] = shown(
        build(tokenizer, template="Say in {target_name}: {source}", system_prompt="Be brief."),
        tokenizer,
    )
    assert "system\nBe brief.<" in prompt
    assert "user\nSay in French: Hello there<" in prompt
    assert "Translate" not in prompt


def test_a_system_prompt_moves_the_instruction_to_the_users_turn(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer()
    [(prompt, _)] = shown(build(tokenizer, system_prompt="Be brief."), tokenizer)
    assert "system\nBe brief.<" in prompt
    assert "user\nTranslate English to French.\nHello there<" in prompt


def test_everything_can_be_learnt(make_tokenizer: MakeTokenizer) -> None:
    for tokenizer in (make_tokenizer(), make_tokenizer(None), make_tokenizer(None, adds_bos=True)):
        [example] = build(tokenizer, targets="all").examples(PAIR)
        assert list(example.labels) == [IGNORE_INDEX, *example.input_ids[1:]]


COLUMNS: dict[str, tuple[Record, dict[str, Any]]] = {
    "two columns named by languages": ({"id": 3, "en": "Hello there", "fr": "Bonjour"}, {}),
    "languages chosen among several": (
        {"de": "Guten Tag", "en": "Hello there", "fr": "Bonjour"},
        {"source_language": "en", "target_language": "fr"},
    ),
    "source and target": (
        {"source": "Hello there", "target": "Bonjour"},
        {"source_language": "en", "target_language": "fr"},
    ),
    "source and target by other names": (
        {"a": "Hello there", "b": "Bonjour"},
        {
            "columns": {"source": "a", "target": "b"},
            "source_language": "en",
            "target_language": "fr",
        },
    ),
    "languages by other names": (
        {"english": "Hello there", "french": "Bonjour"},
        {
            "columns": {"en": "english", "fr": "french"},
            "source_language": "en",
            "target_language": "fr",
        },
    ),
    "a pair the other way round": (
        {"translation": {"fr": "Bonjour", "en": "Hello there"}},
        {"source_language": "en"},
    ),
    "a pair of several": (
        {"translation": {"de": None, "fr": "Bonjour", "en": "Hello there"}},
        {"source_language": "en", "target_language": "fr"},
    ),
    "languages by their names": ({"English": "Hello there", "French": "Bonjour"}, {}),
    "languages by codes of three letters": ({"eng": "Hello there", "fra": "Bonjour"}, {}),
    "languages by NLLB's codes": ({"eng_Latn": "Hello there", "fra_Latn": "Bonjour"}, {}),
    "languages in columns that are named by the user": (
        {"no": 7, "a": "Hello there", "b": "Bonjour"},
        {"columns": {"English": "a", "fr": "b"}},
    ),
    "a language by another name than its column's": (
        {"fra_Latn": "Bonjour", "English": "Hello there", "de": "Guten Tag"},
        {"source_language": "en", "target_language": "French"},
    ),
    "a key by another name": (
        {"translation": {"fra": "Bonjour", "eng": "Hello there"}},
        {"source_language": "English"},
    ),
    "a pair by another name": ({"pair": PAIR["translation"]}, {"columns": {"translation": "pair"}}),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_pairs_are_found_in_the_columns(case: str, make_tokenizer: MakeTokenizer) -> None:
    record, options = COLUMNS[case]
    tokenizer = make_tokenizer(None)
    format = build(tokenizer, record, **options)
    assert shown(format, tokenizer, record) == [("English: Hello there\nFrench:", " Bonjour</s>")]


def test_other_formats_are_found_in_the_columns(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert build(tokenizer, PAIR | {"source": "django"}).name == "translation"
    assert build(tokenizer, {"messages": []}).name == "chat"
    assert build(tokenizer, {"instruction": "", "output": "", "text": ""}).name == "chat"
    assert (
        build(tokenizer, {"instruction": "", "output": "", "text": ""}, kind="text").name == "text"
    )
    assert build(tokenizer, {"text": "", "id": 1}).name == "text"


REFUSED: dict[str, tuple[Record, dict[str, Any], str]] = {
    "no known columns": (
        {"a": "x", "b": "y"},
        {},
        "no format fits the columns (a, b); accepted are: messages;",
    ),
    "not chat": (
        PAIR,
        {"kind": "chat"},
        "the format 'chat' does not fit the columns (translation); accepted are: messages; or",
    ),
    "not text": (
        PAIR,
        {"kind": "text"},
        "the format 'text' does not fit the columns (translation); accepted are: text. If yours",
    ),
    "a column map that points nowhere": (
        PAIR,
        {"columns": {"prompt": "question"}},
        "'question', which is missing; the columns are tr",
    ),
    "a column map of nothing": (
        PAIR,
        {"columns": {"promt": "translation"}},
        "unknown name 'promt'; known are messages,",
    ),
    "languages not said": (
        {"source": "x", "target": "y"},
        {},
        "the columns do not show which languages they are in. Set data.translation.source_language",
    ),
    "three languages": (
        {"translation": {"de": "x", "en": "y", "fr": "z"}},
        {},
        "not clear (found: de, en, fr). Set",
    ),
    "one language for both sides": (
        PAIR,
        {"source_language": "en", "target_language": "English"},
        "source and target language are both 'en'. Set",
    ),
    "a column with a slip": ({"mesages": []}, {}, "Rename the column 'mesages', or set data.co"),
    "no header line": (
        {"Hello there, how are you today?": "x", "b": "y"},
        {},
        "If the file has no header line, add one",
    ),
    "template without the source": (
        PAIR,
        {"template": "To {target_name}:"},
        "must contain {source}",
    ),
    "template with an unknown field": (
        PAIR,
        {"template": "{source} {to}"},
        "unknown field {to}; known are {source}, {source_name}",
    ),
    "broken template": (PAIR, {"template": "{source"}, "is broken"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_example(
    case: str, make_tokenizer: MakeTokenizer
) -> None:
    record, options, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        build(make_tokenizer(), record, **options)
    assert expected in str(caught.value)


BAD_PAIRS: dict[str, tuple[Any, str]] = {
    "empty side": ({"translation": {"en": "Hello", "fr": ""}}, "the pair has an empty side: 'fr'"),
    "blank side": (
        {"translation": {"en": " \n", "fr": "Bonjour"}},
        "the pair has an empty side: 'en'",
    ),
    "null side": ({"translation": {"en": "Hello", "fr": None}}, "the pair has an empty side: 'fr'"),
    "missing side": (
        {"translation": {"en": "Hello", "de": "Hallo"}},
        "column 'fr' is missing; the columns are en, de",
    ),
    "missing column": ({"text": "Hello"}, "column 'translation' is missing; the columns are text"),
    "a string for the pair": (
        {"translation": "Hello"},
        "column 'translation' must hold an object such as",
    ),
    "a number for a side": (
        {"translation": {"en": 1, "fr": "un"}},
        "the side 'en' must be text, not 1",
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_pair_is_refused_in_one_sentence(case: str, make_tokenizer: MakeTokenizer) -> None:
    record, expected = BAD_PAIRS[case]
    with pytest.raises(UserError) as caught:
        build(make_tokenizer()).examples(record)
    assert expected in str(caught.value)


def test_a_tokenizer_without_an_end_of_text_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no end-of-text token"):
        build(tokenizer)


def test_a_prompt_needs_no_record(make_tokenizer: MakeTokenizer) -> None:
    """As `finetune translate` asks; records are then read in the shape {"translation": {...}}."""
    tokenizer = make_tokenizer()
    format = TranslationFormat(
        tokenizer=tokenizer,
        languages=("en", "fr"),
        direction="forward",
        template=None,
        targets="assistant",
        system_prompt=None,
    )
    assert format.prompt("Hello there", reverse=False) == replace(
        build(tokenizer).prompts(PAIR)[0], reference=""
    )
    assert format.examples(PAIR) == build(tokenizer).examples(PAIR)


NAMES = {  # name -> tag, English name, whether a column of this name is recognised
    "en": ("en", "English", True),
    "EN": ("en", "English", True),
    "eng": ("en", "English", True),
    "English": ("en", "English", True),
    "ENGLISH ": ("en", "English", True),
    "eng_Latn": ("en", "English", True),
    "en_XX": ("en", "English", True),
    "fra_Latn": ("fr", "French", True),
    "français": ("fr", "French", True),
    "arb_Arab": ("ar", "Arabic", True),
    "kor_Hang": ("ko", "Korean", True),
    "tl": ("fil", "Filipino", True),
    "Cantonese": ("yue", "Cantonese", True),
    "no": ("no", "Norwegian", True),
    "nb": ("nb", "Norwegian Bokmål", True),
    "pt-BR": ("pt-BR", "Portuguese (Brazil)", True),
    "Brazilian Portuguese": ("pt-BR", "Portuguese (Brazil)", True),
    "Portuguese (Brazil)": ("pt-BR", "Portuguese (Brazil)", True),
    "zh_Hans": ("zh", "Chinese", True),
    "zho_Hant": ("zh-Hant", "Chinese (Traditional)", True),
    "Chinese (Traditional)": ("zh-Hant", "Chinese (Traditional)", True),
    "sr-Latn": ("sr-Latn", "Serbian (Latin)", True),
    "Klingon": ("tlh", "Klingon", False),
    "Elvish": ("elvish", "Elvish", False),
    **{name: (name, None, False) for name in ("tag", "key", "url", "ids", "tgt", "row")},
    **{name: (name, name, False) for name in ("source", "text", "name", "mul", "und", "xx")},
    **dict.fromkeys(("label", "index", "src"), (None, None, False)),
}


@pytest.mark.parametrize("name", NAMES)
def test_languages_by_the_names_that_people_use(name: str) -> None:
    tag, english, is_column = NAMES[name]
    assert tag is None or language_tag(name) == tag
    assert english is None or language_name(name) == english
    assert is_language(name) == is_column


VARIANTS = [
    ("zh-Hans", "zh-Hant", "Chinese (Simplified)", "Chinese (Traditional)"),
    ("zho_Hans", "zho_Hant", "Chinese (Simplified)", "Chinese (Traditional)"),
    ("pt-BR", "pt-PT", "Portuguese (Brazil)", "Portuguese (Portugal)"),
    ("sr-Latn", "sr-Cyrl", "Serbian (Latin)", "Serbian (Cyrillic)"),
    ("en-GB", "en-US", "English (United Kingdom)", "English (United States)"),
    ("nb", "nn", "Norwegian Bokmål", "Norwegian Nynorsk"),
    ("eng_Latn", "fra_Latn", "English", "French"),
    ("en", "zh-Hans", "English", "Chinese"),
    ("en", "pt-BR", "English", "Portuguese (Brazil)"),
    ("en", "pt-PT", "English", "Portuguese (Portugal)"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_language_are_told_apart(
    variant: tuple[str, str, str, str], make_tokenizer: MakeTokenizer
) -> None:
    first, second, name, other = variant
    tokenizer, record = make_tokenizer(None), {"translation": {first: "a", second: "b"}}
    format = build(tokenizer, record, direction="both")
    assert [tokenizer.decode(list(prompt.input_ids)) for prompt in format.prompts(record)] == [
        f"{name}: a\n{other}:",
        f"{other}: b\n{name}:",
    ]


CHAT_COLUMNS: list[tuple[Record, str, str]] = [
    ({"question": "a", "answer": "b"}, "a", "b"),
    ({"Question": "a", "Answer": "b", "id": 3}, "a", "b"),
    ({"input": "a", "output": "b"}, "a", "b"),
    ({"user": "a", "assistant": "b"}, "a", "b"),
    ({"prompt": "a", "response": "b"}, "a", "b"),
    ({"instruction": "a", "context": "c", "response": "b"}, "a\n\nc", "b"),
    ({"instruction": "a", "context": "", "response": "b"}, "a", "b"),
    ({"instruction": "a", "context": "c", "output": "b"}, "a\n\nc", "b"),
    ({"Instruction": "a", "Context": "c", "Output": "b"}, "a\n\nc", "b"),
    ({"instruction": "a", "input": "c", "context": "d", "output": "b"}, "a\n\nc", "b"),
    ({"instruction": "a", "input": "c", "answer": "b"}, "a\n\nc", "b"),
    ({"question": "a", "context": "c", "answer": "b"}, "a\n\nc", "b"),
    ({"input": "a", "context": "c", "output": "b"}, "a\n\nc", "b"),
]


@pytest.mark.parametrize("case", CHAT_COLUMNS)
def test_questions_and_answers_by_the_names_that_people_use(
    case: tuple[Record, str, str], make_tokenizer: MakeTokenizer
) -> None:
    record, question, answer = case
    tokenizer = make_tokenizer()
    [(prompt, learnt)] = shown(build(tokenizer, record), tokenizer, record)
    assert prompt == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert learnt == f"{answer}<|im_end|>"


def test_each_record_has_what_its_instruction_is_about_under_its_own_name(
    make_tokenizer: MakeTokenizer,
) -> None:
    """As in sources of different shape, where the columns of the others are None."""
    tokenizer = make_tokenizer()
    records: list[Record] = [
        {"instruction": "a", "context": "c", "input": None, "output": "b"},
        {"instruction": "a", "context": None, "input": "d", "output": "b"},
        {"instruction": "a", "context": "c", "input": "d", "output": "b"},
        {"instruction": "a", "context": "", "input": "", "output": "b"},
        {"instruction": "a", "context": ["c", "d"], "input": None, "output": "b"},
    ]
    for first in records[:2]:
        format = build(tokenizer, {k: v for k, v in first.items() if v is not None})
        prompts = [shown(format, tokenizer, record)[0][0] for record in records]
        questions = [prompt.split("\n", 1)[1].split("<|im_end|>")[0] for prompt in prompts]
        assert questions == ["a\n\nc", "a\n\nd", "a\n\nd", "a", "a"]
        assert format.notes() == ["not used: the column 'context' (2 records)"]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"question": "a", "answer": "b", "response": "c"},
        {"question": "a", "instruction": "b", "answer": "c"},
        {"question": "a", "input": "b", "context": "c", "answer": "d"},
        {"answer": "a"},
    ],
)
def test_columns_that_could_be_meant_in_several_ways_are_refused(
    record: Record, make_tokenizer: MakeTokenizer
) -> None:
    with pytest.raises(UserError, match="no format fits the columns"):
        build(make_tokenizer(), record)


def test_plain_text_is_learnt_whole(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    format = build(tokenizer, {"text": "Hello"})
    [example] = format.examples({"text": "Hello there"})
    assert tokenizer.decode(list(example.input_ids)) == "<s>Hello there</s>"
    assert list(example.labels) == [IGNORE_INDEX, *example.input_ids[1:]]
    assert format.examples({"text": "  \n"}) == format.examples({"text": None}) == []
    assert format.prompts({"text": "Hello"}) == []
    with pytest.raises(UserError, match="column 'text' must hold text, not 3"):
        format.examples({"text": 3})


def test_there_was_something_to_check() -> None:
    assert (len(COLUMNS), len(REFUSED), len(BAD_PAIRS)) == (14, 13, 7)
    assert (len(NAMES), len(VARIANTS), len(CHAT_COLUMNS)) == (39, 10, 13)
