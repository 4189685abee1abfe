"""What data, models and errors write to a terminal: no sequence of theirs reaches it as it is."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.display import Display
from finetune.recipes.evaluate import _print_table
from finetune.recipes.runs import print_runs
from finetune.run.marker import MARKER
from tests.conftest import conversation

PACKAGE = Path(finetune.__file__).parent
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m"


def on_a_terminal(arguments: list[str], folder: Path) -> tuple[int, bytes]:
    """Run `finetune ARGUMENTS` on a terminal; return its exit code and what reached it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *arguments],
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        found += piece
    os.close(ours)
    return process.wait(), found


@pytest.fixture(scope="module")
def hostile(finished, tmp_path_factory):
    """A folder with data, columns, a template and a model that hold control characters."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copy(finished / "c.yaml", folder)
    lines = [conversation(number) for number in range(20)]
    for line in lines:
        line["messages"][1]["content"] += ESCAPE
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    odd = {ESCAPE: "a", "b\nfinetune: all is well": "c"}
    (folder / "columns.jsonl").write_text(json.dumps(odd) + "\n")
    shutil.copytree(finished / "run" / "model", folder / "model")
    path = folder / "model" / "tokenizer.json"
    tree = json.loads(path.read_text())
    decoders = [
        {"type": "Fuse"},
        {"type": "Replace", "pattern": {"Regex": "^.*$"}, "content": ESCAPE},
    ]
    path.write_text(json.dumps({**tree, "decoder": {"type": "Sequence", "decoders": decoders}}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "c.yaml"], 0),
        (["train", "c.yaml", "--dry-run", "data.train=columns.jsonl"], 2),
        (["train", "c.yaml", "--dry-run", f"output_dir={ESCAPE}x", "seed=-1"], 2),
        (["generate", "./model", "--prompt", "Hi", "--max-new-tokens", "3"], 0),
        (["generate", "./model", "--prompt", "Hi", "--max-new-tokens", "3", "--json"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_no_control_sequence_reaches_a_terminal(hostile, arguments, code):
    ended, found = on_a_terminal(arguments, hostile)
    assert ended == code, found.decode(errors="replace")
    assert b"\x1b]0;" not in found
    assert b"\x1b[2J" not in found
    assert "\x9b".encode() not in found
    assert b"\nfinetune: all is well" not in found
    assert b"owned" in found or code == 2


@pytest.mark.parametrize("name", ["[v1]", "b[/x]", ":x:", "[bold]"])
def test_what_would_be_markup_is_shown_as_it_is(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("")  # a run that is broken is listed too
    assert print_runs(Path()) == 1
    assert re.search(rf"^{re.escape(name)} +broken", capsys.readouterr().out, re.MULTILINE)
    results = {"data": f"data.test: {name}", "num_records": 3, "precision": "fp32", "loss": 1.0}
    _print_table(results)
    assert f"data.test: {name}" in capsys.readouterr().out
    Display().say(f"reading {name}")
    assert capsys.readouterr().err == f"reading {name}\n"


def test_every_console_is_a_plain_one():
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    made = {path.name for path, text in texts.items() if "Console(" in text}
    assert made == {"display.py"}
    assert sum("plain_console(" in text for text in texts.values()) == 6


class Closed(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def test_progress_that_nobody_hears_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Closed())
    display = Display()
    display.say("step 1")
    display.note("a choice")
    with display.bar("encoding", 3) as advance:
        for _ in range(3):
            advance(1)
    assert display.notes == ["a choice"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_mistake_that_nobody_hears_has_its_exit_code(tmp_path):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "finetune", "train", "none.yaml"], stderr=full
        )
    assert ended.returncode == 2


def with_stdout(stdout: Any, *command: str) -> tuple[int, str]:
    """Run `finetune COMMAND`, which collects what it prints; return its exit code and stderr."""
    collecting = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    typed = [sys.executable, "-m", "finetune", *command]
    ended = subprocess.run(typed, stdout=stdout, stderr=subprocess.PIPE, text=True, env=collecting)
    return ended.returncode, ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("command", [("keys", "seed"), ("keys",), ("--version",)], ids=" ".join)
def test_a_result_that_a_full_disk_refuses_is_said(command):
    """At the end of a short one, and in the midst of one that is longer than a buffer."""
    with open("/dev/full", "w") as full:
        code, err = with_stdout(full, *command)
    said = r"finetune: (stdout|a file) could not be written: No space left on device\n"
    assert (code, bool(re.fullmatch(said, err))) == (2, True), err


@pytest.mark.parametrize("command", [("keys", "seed"), ("keys",)], ids=" ".join)
def test_a_result_that_nobody_reads_ends_without_a_word(command):
    ours, theirs = os.pipe()
    os.close(ours)
    assert with_stdout(theirs, *command) == (1, "")
    os.close(theirs)
