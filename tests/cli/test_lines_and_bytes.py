"""Lines in are lines out; bytes that are not UTF-8 get a sentence, and control characters show."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.display import Display
from finetune.errors import visible
from finetune.recipes.build.target import stdin_lines
from finetune.recipes.chat import _ask
from tests.cli.conftest import finetune

ESCAPES = "\x1b]0;owned\x07 \x9b2J"


@pytest.fixture
def chat_run(finished: Path, folder: Path) -> Path:
    """Return the working directory, with a copy of the run on conversations."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


class Silent:
    def say(self, text: str) -> None: ...


def read(data: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    # As in the C locale: bytes that are not UTF-8 are lone surrogates.
    stream = io.TextIOWrapper(io.BytesIO(data), "utf-8", errors="surrogateescape", newline="\n")
    monkeypatch.setattr(sys, "stdin", stream)
    return list(stdin_lines(Silent(), "a line"))  # type: ignore[arg-type]


def questions(data: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what `finetune chat` reads from a pipe."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
    return list(iter(lambda: _ask(Display(enabled=False), 1), None))


LINES = {
    b"one\ntwo\n": ["one", "two"],
    b"one\r\ntwo\r\n": ["one", "two"],
    b"one\rand\ntwo": ["one\rand", "two"],
    b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n": ["one", "two"],  # of two files, joined
    b"\n\n one \n\n": ["", "", " one ", ""],
    b"a\x0bb\x0c\x1cc\xc2\x85d\xe2\x80\xa8e\n": ["a\x0bb\x0c\x1cc\x85d\u2028e"],
    b"caf\xc3\xa9": ["café"],
    b"": [],
    b"\n": [""],
    b"\r\n\r\n": ["", ""],
    b"\r": [""],
    b"one\r\r\n": ["one\r"],
    b"\xef\xbb\xbf": [""],
    b"\xef\xbb\xbf\r\none": ["", "one"],
    b"one \xef\xbb\xbftwo\n": ["one \ufefftwo"],
    b"a\x00b\n": ["a\x00b"],
    b"a\tb \n": ["a\tb "],
    b"\x0b\n\x0c\n": ["\x0b", "\x0c"],
    b"\xe2\x80\xa8\n\xe2\x80\xa9\n": ["\u2028", "\u2029"],
    b"\xf0\x9f\x99\x82\n": ["🙂"],
    b"\x1b[2J\n": ["\x1b[2J"],
}


@pytest.mark.parametrize("data", LINES)
def test_lines_of_stdin_are_those_that_wc_counts(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(data, monkeypatch) == questions(data, monkeypatch) == LINES[data]


def program(*arguments: str | bytes, stdin: bytes = b"", **environment: str):
    """Return the exit code, stdout and stderr of `finetune ARGUMENTS` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *arguments],
        input=stdin, capture_output=True, timeout=240, check=False,
        env={**os.environ, "PYTHONUTF8": "0", **environment},
    )  # fmt: skip
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode()


def run(name: str, *arguments: str | bytes) -> tuple[str | bytes, ...]:
    return (name, "run", *arguments)


NOT_UTF8 = {
    "generate": (run("generate"), b"one\ncaf\xe9\n"),
    "generate, an argument": (run("generate", "--prompt", b"caf\xe9"), b""),
    "translate, an argument": (run("translate", "--from", "en", "--to", "fr", b"caf\xe9"), b""),
}


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("case", NOT_UTF8)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_bytes_that_are_not_utf8_are_refused_in_a_sentence(
    case: str, locale: str, chat_run: Path
) -> None:
    arguments, stdin = NOT_UTF8[case]
    code, _, err = program(*arguments, stdin=stdin, LC_ALL=locale)
    assert code == 2, err
    assert "is not UTF-8 text" in err
    assert "Traceback" not in err
    assert ("line 2 of stdin" in err) == bool(stdin)


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_question_that_is_not_utf8_is_passed_over(locale: str, chat_run: Path) -> None:
    asked = b"\xef\xbb\xbfHello?\r\ncaf\xe9\nAnd now?\n"
    code, _, err = program("chat", "run", stdin=asked, LC_ALL=locale)
    assert code == 0, err
    assert [line for line in err.splitlines() if line[:2] == "> " or "UTF-8" in line] == [
        "> Hello?",
        "line 2 of stdin is not UTF-8 text (byte 3 of the line). Convert it first",
        "> And now?",
    ]


def test_a_line_that_is_not_utf8_costs_no_other_question(monkeypatch: pytest.MonkeyPatch) -> None:
    assert questions(b"one\ncaf\xe9\ntwo", monkeypatch) == ["one", "", "two"]


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf8_gets_escapes(encoding: str, chat_run: Path) -> None:
    asked = "Hello ☃ 🙂"
    arguments = ("generate", "run", "--raw", "--prompt", asked, "--json")
    code, out, err = program(*arguments, PYTHONIOENCODING=encoding, LC_ALL="C.UTF-8")
    assert code == 0, err
    assert json.loads(out)["prompt"] == asked
    code, out, err = program("inspect", "c.yaml", PYTHONIOENCODING=encoding, LC_ALL="C.UTF-8")
    assert code == 0, err
    assert r"\u27e6" in out


def test_blank_lines_of_stdin_keep_their_place(chat_run: Path) -> None:
    result = finetune("generate", "run", "--raw", "--json", stdin="one\n\n  \ntwo\n")
    assert result.code == 0, result.err
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "", "  ", "two"]
    assert [answer["answer"] for answer in answers][1:3] == ["", ""]


ODD = "one\r\n\r\n \ttwo \rx\n\x0b\n\u2028y\n\x1cz\x85w\n\ufefflast"


def test_as_many_lines_come_out_as_go_in(
    chat_run: Path, translator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any line ends, also those that answers have."""
    result = finetune("generate", "run", stdin=ODD)
    assert result.code == 0, result.err
    assert result.out.count("\n") == 7
    with monkeypatch.context() as patch:
        answers = [("q", "a\nb"), ("", ""), ("r", "c\r\n\u2028d\n")]
        patch.setattr("finetune.recipes.generate.generate_answers", lambda *_, **__: answers)
        result = finetune("generate", "run", stdin="q\n\nr\n")
        assert result.out == "a\\nb\n\nc\\r\\n\\u2028d\\n\n"
        assert finetune("generate", "run", "--prompt", "q").out.startswith("a\nb\n")
    path = chat_run / "in.txt"
    path.write_bytes(ODD.encode())
    for arguments, stdin in ((("-i", str(path)), ""), ((), ODD)):
        run = str(translator / "run")
        translated = finetune("translate", run, *arguments, stdin=stdin)
        assert translated.code == 0, translated.err
        assert translated.out.count("\n") == 7
        assert translated.out.split("\n")[1] == ""
    finetune("translate", run, "-i", str(path), "-o", str(chat_run / "out.txt"))
    assert (chat_run / "out.txt").read_bytes().count(b"\n") == 7


def test_control_characters_are_shown_as_escapes() -> None:
    assert visible(ESCAPES + "\n\ta\r") == "\\x1b]0;owned\\x07 \\x9b2J\n\ta\\x0d"
    assert visible("café 日本 🙂 \u2028") == "café 日本 🙂 \u2028"


def test_an_error_is_one_line_without_control_characters(folder: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps({f"x{ESCAPES}\nfinetune: all is well": "a"}) + "\n")
    (folder / "c.yaml").write_text(
        "{output_dir: run, model: {config: {model_type: llama}}, data: {train: a.jsonl}}"
    )
    result = finetune("train", "c.yaml")
    assert result.code == 2
    assert [line for line in result.err.splitlines() if line.startswith("finetune: all")] == []
    assert "\x1b" not in result.err
    assert "\x9b" not in result.err


@pytest.mark.parametrize(
    "end", ["\n", "\r", "\r\n", *"\v\f\x1c\x1d\x1e\x85\u2028\u2029"], ids=ascii
)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_answer_is_one_line_for_every_reader(
    as_json: bool, end: str, chat_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"a{end}b\tc é"
    answers = [("one", said), ("two", said)]
    monkeypatch.setattr("finetune.recipes.generate.generate_answers", lambda *_, **__: answers)
    options = ["--json"] * as_json
    lines = finetune("generate", "run", *options, stdin="one\ntwo\n").out.splitlines()
    assert len(lines) == 2
    if as_json:
        assert [json.loads(line)["answer"] for line in lines] == [said, said]
    else:
        assert lines == [f"a{ascii(end)[1:-1]}b\tc é"] * 2


def test_the_line_that_is_too_long_is_named_and_those_before_it_are_answered(
    chat_run: Path,
) -> None:
    asked = "one\n\ntwo\n" + "word " * 3000 + "\nthree\n"
    result = finetune("generate", "run", "--json", stdin=asked)
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["one", "", "two"]
    assert result.code == 2
    assert "finetune: line 4: the prompt has " in result.err
    bad = finetune("generate", "run", "--prompt", "one", "--prompt", "word " * 3000)
    assert bad.code == 2
    assert "finetune: prompt 2: the prompt has " in bad.err
    assert bad.out.startswith("> one\n")


CLOSED = {  # a command that prints its result -> its arguments
    "evaluate": ("run",),
    "generate": ("run",),
    "chat": ("run",),
    "translate": ("run",),
    "compare": ("c.yaml",),
    "tune": ("c.yaml",),
    "train": ("c.yaml", "--dry-run"),
    "inspect": ("c.yaml",),
    "plan": ("c.yaml",),
    "keys": (),
    "runs": (),
    "optimizers": (),
    "push": ("run", "me/it", "--dry-run"),
    "--version": (),
}


def without_stdout(*arguments: str) -> tuple[int, str]:
    """Run `finetune ARGUMENTS >&-`; return the exit code and stderr."""
    err = io.StringIO()
    argv, sys.argv = sys.argv, ["finetune", *arguments]
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        return int(stop.code or 0), err.getvalue()
    finally:
        sys.argv = argv
    return 0, err.getvalue()


@pytest.mark.parametrize("command", CLOSED)
def test_a_result_that_cannot_be_printed_is_refused_at_the_start(
    command: str, write_config: Callable[..., Path]
) -> None:
    """There is no run to work on: the stream is looked at first."""
    write_config(data={"train": "a.txt", "format": "text"})
    Path("a.txt").write_text("one\ntwo\n")
    code, err = without_stdout(command, *CLOSED[command])
    assert code == 2
    assert err.startswith("finetune: stdout is closed, so the result cannot be printed. ")
    assert err.count("\n") == 1


def test_a_shell_that_closes_stdout_gets_the_sentence(folder: Path) -> None:
    shell = 'echo hi | "$0" -m finetune chat run >&-'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: stdout is closed")


def test_a_translation_into_a_file_needs_no_stdout(translator: Path, folder: Path) -> None:
    Path("in.txt").write_text("the word 3\n")
    arguments = (str(translator / "run"), "-i", "in.txt", "-o", "out.txt")
    code, err = without_stdout("translate", *arguments)
    assert code == 0, err
    assert Path("out.txt").read_text().count("\n") == 1
