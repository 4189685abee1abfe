"""Names that people use: of languages, of their variants, and of columns."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.formats.detect import build_format
from finetune.data.formats.languages import is_language, language_name, language_tag
from finetune.errors import UserError
from finetune.evaluation.answers import text_metrics
from tests.data.settings import format_options
from tests.data.stock import MakeTokenizer

SAME: list[tuple[str, ...]] = [
    # names of one language
    ("en", "EN", "eng", "English", "english ", "eng_Latn", "en_XX"),
    ("fr", "fra", "fre", "French", "français", "fra_Latn"),
    ("de", "deu", "ger", "German", "Deutsch"),
    ("es", "spa", "Spanish", "Español", "Castilian"),
    ("zh", "zho", "cmn", "Chinese", "Mandarin Chinese", "zho_Hans", "Simplified Chinese"),
    ("zh-Hant", "zho_Hant", "Traditional Chinese", "Chinese (Traditional)"),
    ("pt-BR", "pt_BR", "Brazilian Portuguese", "Portuguese (Brazil)"),
    ("pt-PT", "European Portuguese", "Portuguese (Portugal)"),
    ("fr-CA", "Canadian French", "French (Canada)"),
    ("fil", "tl", "tgl", "Tagalog", "Filipino"),
    ("fa", "fas", "per", "Persian", "Farsi", "pes_Arab"),
    ("ar", "ara", "arb", "Arabic", "arb_Arab"),
    ("he", "iw", "heb", "Hebrew"),
    ("el", "ell", "gre", "Greek"),
    ("nb", "nob", "Bokmål", "Norwegian Bokmål"),
    ("sr-Latn", "srp_Latn", "Serbian (Latin)"),
    ("sw", "swa", "swh_Latn", "Swahili"),
    ("sq", "sqi", "als_Latn", "Albanian"),
    ("lv", "lav", "lvs_Latn", "Latvian"),
    ("uk", "ukr", "Ukrainian"),
]


@pytest.mark.parametrize("names", SAME)
def test_names_of_one_language_are_equal(names: tuple[str, ...]) -> None:
    assert {language_tag(name) for name in names} == {language_tag(names[0])}
    assert {language_name(name) for name in names} == {language_name(names[0])}
    assert all(map(is_language, names))


@pytest.mark.parametrize(
    "name",
    ["Persona", "Personality", "Personal", "Male", "Dutch_or_not", "text", "id number", "a\0b", ""],
)
def test_a_name_that_only_begins_as_that_of_a_language_does_is_none(name: str) -> None:
    assert not is_language(name)


def test_the_texts_of_a_language_may_be_named_so() -> None:
    assert is_language("English text")
    assert is_language("german_sentence")


@pytest.mark.parametrize(
    "others",
    [{"cat": "billing", "tel": "555"}, {"it": "x", "no": "7"}, {"text": "a remark"}],
)
@pytest.mark.parametrize("names", [("question", "answer"), ("prompt", "response")])
def test_a_question_and_its_answer_come_before_what_else_a_table_has(
    others: dict[str, str], names: tuple[str, str], make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer()
    record = {**others, names[0]: "Where is it?", names[1]: "Here."}
    format = build_format("auto", format_options(), tokenizer=tokenizer, first_record=record)
    assert format.name == "chat"
    [prompt] = format.prompts(record)
    assert (prompt.text, prompt.reference) == ("Where is it?", "Here.")


MISSPELT = {
    "germn": "'germn'. Did you mean 'German'?",
    "Englsh": "'Englsh'. Did you mean 'English'?",
    "jp": "'jp', which is the code of no language",
    "": "'', and a language is one line of text. Give its name or its code, such as fr",
    " ": "' ', and a language is one line of text",
    "fr\nen": "'fr\\nen', and a language is one line of text",
}


@pytest.mark.parametrize("name", MISSPELT)
@pytest.mark.parametrize(
    "record", [{"source": "a", "target": "b"}, {"en": "a", "ja": "b"}, {"translation": {"en": "a"}}]
)
def test_a_misspelt_language_is_refused(
    name: str, record: dict[str, Any], make_tokenizer: MakeTokenizer
) -> None:
    options = format_options(source_language="en", target_language=name)
    with pytest.raises(UserError) as caught:
        build_format("auto", options, tokenizer=make_tokenizer(), first_record=record)
    assert f"data.translation.target_language is {MISSPELT[name]}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["SQL", "Legalese", "plain English", "slang", "Spanglish", "portuguese_br"]
)
def test_a_language_of_ones_own_is_taken(name: str, make_tokenizer: MakeTokenizer) -> None:
    options = format_options(source_language="en", target_language=name)
    for record in ({"source": "a", "target": "b"}, {"translation": {"en": "a", name: "b"}}):
        format = build_format("auto", options, tokenizer=make_tokenizer(), first_record=record)
        assert format.prompts(record)[0].reference == "b"


def test_a_column_of_a_misspelt_name_is_taken_as_it_is(make_tokenizer: MakeTokenizer) -> None:
    options = format_options(source_language="Englsh", target_language="germn")
    record = {"translation": {"Englsh": "a", "germn": "b"}}
    format = build_format("auto", options, tokenizer=make_tokenizer(), first_record=record)
    assert format.prompts(record)[0].reference == "b"


def test_a_language_without_a_column_is_refused_at_once(make_tokenizer: MakeTokenizer) -> None:
    options = format_options(source_language="en", target_language="de")
    with pytest.raises(UserError, match="column 'de' is missing; the columns are en, fr"):
        build_format(
            "auto", options, tokenizer=make_tokenizer(), first_record={"en": "a", "fr": "b"}
        )


LANGUAGES = sorted({names[0] for names in SAME} | {"zh-Hans", "zh-TW", "zh-CN", "nn", "no", "sr"})


@given(st.sampled_from(LANGUAGES), st.sampled_from(LANGUAGES))
def test_the_two_directions_of_a_pair_are_told_apart(first: str, second: str) -> None:
    if first != second:
        names = language_name(first, full=True), language_name(second, full=True)
        assert names[0] != names[1]


FOUND: list[tuple[dict[str, Any], dict[str, Any], list[tuple[str, str, str]]]] = [
    # record, options -> (instruction, question, answer) of each prompt
    ({"English": "a", "French": "b"}, {}, [("English to French", "a", "b")]),
    ({"english": "a", " FRENCH": "b"}, {}, [("English to French", "a", "b")]),
    ({"fra_Latn": "a", "eng_Latn": "b"}, {}, [("French to English", "a", "b")]),
    ({"en_XX": "a", "de_DE": "b"}, {}, [("English to German (Germany)", "a", "b")]),
    ({"id": "7", "en": "a", "fr": "b"}, {}, [("English to French", "a", "b")]),
    (
        {"id": "a", "en": "b"},
        {"source_language": "Indonesian"},
        [("Indonesian to English", "a", "b")],
    ),
    (
        {"en": "a", "fr": "b"},
        {"source_language": "French"},
        [("French to English", "b", "a")],
    ),
    (
        {"en": "a", "fr": "b"},
        {"target_language": "eng", "direction": "both"},
        [("French to English", "b", "a"), ("English to French", "a", "b")],
    ),
    (
        {"en": "a", "fr": "b", "de": "c"},
        {"source_language": "deu", "target_language": "English"},
        [("German to English", "c", "a")],
    ),
    (
        {"x": "a", "y": "b"},
        {"columns": {"English": "x", "fra": "y"}},
        [("English to French", "a", "b")],
    ),
    (
        {"x": "a", "y": "b"},
        {"columns": {"grc": "x", "la": "y"}},
        [("Ancient Greek to Latin", "a", "b")],
    ),
    (
        {"SOURCE": "a", "Target": "b"},
        {"source_language": "en", "target_language": "French"},
        [("English to French", "a", "b")],
    ),
    ({"translation": {"English": "a", "fr": "b"}}, {}, [("English to French", "a", "b")]),
    ({"Translation": {"grc": "a", "la": "b"}}, {}, [("Ancient Greek to Latin", "a", "b")]),
    (
        {"translation": {"zh-CN": "a", "zh-TW": "b"}},
        {"direction": "both"},
        [
            ("Chinese (China) to Chinese (Taiwan)", "a", "b"),
            ("Chinese (Taiwan) to Chinese (China)", "b", "a"),
        ],
    ),
    (
        {"translation": {"src": "a", "tgt": "b"}},
        {"source_language": "en", "target_language": "fr", "direction": "both"},
        [("English to French", "a", "b"), ("French to English", "b", "a")],
    ),
    (
        {"translation": {"en": "a", "SQL": "b"}},
        {"target_language": "SQL"},
        [("English to SQL", "a", "b")],
    ),
    ({"translation": {"en": "a", "fr": "b", "score": 3}}, {}, [("English to French", "a", "b")]),
    ({"zh": "a", "zh-Hans": "b"}, {}, [("Chinese to Chinese (Simplified)", "a", "b")]),
    ({"sr-Cyrl": "a", "sr-Latn": "b"}, {}, [("Serbian (Cyrillic) to Serbian (Latin)", "a", "b")]),
    (
        {"en-GB": "a", "en-US": "b"},
        {},
        [("English (United Kingdom) to English (United States)", "a", "b")],
    ),
    ({"no": "a", "nn": "b"}, {}, [("Norwegian to Norwegian Nynorsk", "a", "b")]),
    ({"en": "a", "French (Canada)": "b"}, {}, [("English to French (Canada)", "a", "b")]),
]


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_languages_are_found_and_named(number: int, make_tokenizer: MakeTokenizer) -> None:
    record, options, expected = FOUND[number]
    tokenizer = make_tokenizer()
    format = build_format(
        "auto", format_options(**options), tokenizer=tokenizer, first_record=record
    )
    assert format.name == "translation"
    assert len(format.examples(record)) == len(expected)
    for prompt, (instruction, question, answer) in zip(
        format.prompts(record), expected, strict=True
    ):
        text = tokenizer.decode(list(prompt.input_ids))
        assert text.startswith(f"<|im_start|>system\nTranslate {instruction}.<|im_end|>")
        assert (prompt.text, prompt.reference) == (question, answer)


NOT_FOUND: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"en": "a", "fr": "b", "de": "c"}, {}, "Set data.translation.source_language and target_lang"),
    ({"en": "a", "id": "b"}, {}, "to two columns, if the column 'id' is Indonesian"),
    ({"en": "a", "eng": "b"}, {}, "'en' and 'eng' are two names of one language, English"),
    ({"tl": "a", "Tagalog": "b"}, {}, "are two names of one language, Filipino"),
    ({"src": "a", "tgt": "b"}, {}, "no format fits the columns (src, tgt)"),
    (
        {"source": "a", "target": "b"},
        {},
        "Set data.translation.source_language and target_language",
    ),
    ({"translation": {"en": "a"}}, {}, "the languages of the pairs are not clear (found: en)"),
    ({"translation": {"x": "b", "SQL": "c"}}, {}, "pairs are not clear (found: none). Set"),
    ({"translation": {"src": "a", "tgt": "b"}}, {}, "the keys do not show which languages they"),
    (
        {"translation": {"Input": "a", "Output": "b"}},
        {"source_language": "en"},
        "the keys do not show which languages they are in. Set data.translation.source_language",
    ),
    ({"en": "a", "fr": "b"}, {"columns": {"xq-zz": "en"}}, "data.columns has the unknown name"),
    ({"en": "a", "fr": "b"}, {"source_language": "en", "target_language": "en"}, "are both 'en'"),
]


@pytest.mark.parametrize("number", range(len(NOT_FOUND)))
def test_languages_that_are_not_clear_are_asked_for(
    number: int, make_tokenizer: MakeTokenizer
) -> None:
    record, options, expected = NOT_FOUND[number]
    with pytest.raises(UserError) as caught:
        build_format(
            "auto", format_options(**options), tokenizer=make_tokenizer(), first_record=record
        )
    assert expected in str(caught.value)


COLUMNS: list[tuple[dict[str, Any], str, str]] = [
    # record -> question, answer
    ({"Human": "a", "Assistant": "b"}, "a", "b"),
    ({"human": "a", "gpt": "b"}, "a", "b"),
    ({"user": "a", "bot": "b"}, "a", "b"),
    ({"query": "a", "reply": "b"}, "a", "b"),
    ({"inputs": "a", "targets": "b"}, "a", "b"),
    ({"input": "a", "target": "b"}, "a", "b"),
    ({"Prompt": "a", "Completion": "b"}, "a", "b"),
    ({"INSTRUCTION": "a", "INPUT": "c", "OUTPUT": "b"}, "a\n\nc", "b"),
    ({"question": "a", "context": "c", "response": "b"}, "a\n\nc", "b"),
    ({"title": "t", "Question": "a", "Answer": "b"}, "a", "b"),
    (
        {"Messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "a",
        "b",
    ),
]


@pytest.mark.parametrize("number", range(len(COLUMNS)))
def test_columns_of_chats_by_their_usual_names(number: int, make_tokenizer: MakeTokenizer) -> None:
    record, question, answer = COLUMNS[number]
    tokenizer = make_tokenizer()
    format = build_format("auto", format_options(), tokenizer=tokenizer, first_record=record)
    [prompt] = format.prompts(record)
    assert (prompt.text, prompt.reference) == (question, answer)


def test_a_text_in_capitals(make_tokenizer: MakeTokenizer) -> None:
    record = {"Text": "a b c"}
    format = build_format("auto", format_options(), tokenizer=make_tokenizer(), first_record=record)
    assert format.name == "text"
    small = {"text": "a b c"}
    assert format.examples(small) == format.examples(record) != []
    format = build_format("auto", format_options(), tokenizer=make_tokenizer(), first_record=small)
    assert format.examples(small) == format.examples(record)
    assert format.notes() == []


BLEU = {  # language -> a sentence with no blank between its words, or few; the tokenizer
    "zh": ("我喜欢在北京的公园里散步和看书。", ("zh",)),
    "zho_Hant": ("今天天氣很好我們去學校吧。", ("zh",)),
    "Cantonese": ("我哋今日去公園玩啦好唔好。", ("zh",)),
    "ja": ("今日はとても天気がいいです。", ("ja-mecab", "char")),
    "jpn_Jpan": ("明日は学校に行きましょう。", ("ja-mecab", "char")),
    "ko": ("오늘은 날씨가 정말 좋습니다 그래서", ("ko-mecab", "char")),
    "Thai": ("วันนี้อากาศดีมากเราไปโรงเรียนกันเถอะ", ("char",)),
    "lo": ("ມື້ນີ້ອາກາດດີຫຼາຍ", ("char",)),
    "km": ("ថ្ងៃនេះអាកាសធាតុល្អណាស់", ("char",)),
    "Burmese": ("ဒီနေ့ရာသီဥတုကောင်းတယ်", ("char",)),
    "fr": ("Il fait très beau aujourd'hui.", ("13a",)),
    "ru": ("Сегодня очень хорошая погода.", ("13a",)),
    "vi": ("Hôm nay thời tiết rất đẹp .", ("13a",)),
    None: ("The weather is fine today .", ("13a",)),
}


@pytest.mark.parametrize("language", BLEU)
def test_a_perfect_translation_has_a_bleu_of_100(language: str | None) -> None:
    text, tokenizers = BLEU[language]
    scores = text_metrics(["bleu"], [text], [text], languages=[language])
    assert scores["bleu"] == pytest.approx(100)
    assert str(scores["bleu_signature"]).split("|tok:")[1].split("|")[0] in tokenizers


def test_bleu_of_both_directions_names_both_tokenizers() -> None:
    texts = [BLEU["zh"][0], BLEU["fr"][0]]
    scores = text_metrics(["bleu"], texts, texts, languages=["zh", "fr"])
    assert scores["bleu"] == pytest.approx(100)
    assert "tok:13a+zh" in str(scores["bleu_signature"])


def test_there_was_something_to_check() -> None:
    assert [len(table) for table in (SAME, FOUND, NOT_FOUND, COLUMNS, BLEU)] == [20, 23, 12, 11, 14]
