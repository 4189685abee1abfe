"""A folder is ours by its marker and held by one process; a folder is replaced whole or not."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.run.claim import LOCK, check_claim, claim_folder, locked, write_marker
from finetune.run.folder import RunDir
from finetune.run.marker import MARKER, Marker, is_marked, read_marker
from finetune.run.replace import check_replaceable, replacing


def no_note(text):
    raise AssertionError(text)


# The marker


@pytest.mark.parametrize(
    "marker",
    [Marker("run"), Marker("run", emptying=True), Marker("model", files=("a", "b/c"))],
)
def test_a_marker_comes_back(tmp_path, marker):
    write_marker(tmp_path / "new", marker)
    assert read_marker(tmp_path / "new") == marker
    assert is_marked(tmp_path / "new", marker.kind)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"format": 1}', '{"format": "x", "kind": "run"}', "[" * 100_000, "\xff"],
)
def test_a_damaged_marker_is_named(tmp_path, text):
    (tmp_path / MARKER).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"\.finetune\.json is damaged \("):
        read_marker(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        RunDir(tmp_path).is_run()


@pytest.mark.parametrize("values", [{"format": 2, "kind": "run"}, {"format": 1, "kind": "zoo"}])
def test_the_marker_of_a_later_version_is_named(tmp_path, values):
    (tmp_path / MARKER).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"this version knows format 1 .* Update finetune"):
        claim_folder(tmp_path, "run", [])


@pytest.mark.parametrize("path", RunDir(Path("run")).written(), ids=lambda path: path.name)
def test_a_folder_that_holds_one_of_our_names_is_refused_with_it(tmp_path, path):
    run = RunDir(tmp_path / "run")
    mine = run.root / path.name
    run.root.mkdir()
    mine.mkdir() if "." not in mine.name else mine.write_text("mine")
    with pytest.raises(UserError, match=rf"run/{path.name} would be replaced, and finetune did no"):
        claim_folder(run.root, "run", run.written())
    assert list(run.root.iterdir()) == [mine]


def test_a_folder_with_other_files_is_claimed_once_and_by_one_kind(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "my.yaml").write_text("mine")
    claim_folder(tmp_path, "run", run.written())
    run.config.touch()
    check_claim(tmp_path, "run", run.written())
    with pytest.raises(UserError, match="holds a run, and a comparison needs a folder of its own"):
        claim_folder(tmp_path, "comparison", [])
    assert read_marker(tmp_path) == Marker("run")


# The lock

HOLD = """
import sys, time
from pathlib import Path
from finetune.run.claim import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_folder_is_held_by_one_process_until_that_ends_in_any_way(tmp_path):
    run = tmp_path / "runs" / "a"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        who = rf"a is in use by process {holder.pid} on \S+\. Wait until that process ends"
        with pytest.raises(UserError, match=who), locked(run, no_note):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(run, no_note), pytest.raises(UserError, match="in use"), locked(run, no_note):
        pass


def test_a_folder_that_was_not_claimed_is_as_it_was(tmp_path):
    with locked(tmp_path / "runs" / "a", no_note):
        assert (tmp_path / "runs" / "a" / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").touch()
    with pytest.raises(KeyError), locked(tmp_path, no_note):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with locked(tmp_path / "b", no_note):
        claim_folder(tmp_path / "b", "run", [])
    assert is_marked(tmp_path / "b", "run")


def test_a_lock_that_its_holder_has_deleted_is_not_taken_for_one(tmp_path, monkeypatch):
    """Between the opening and the locking of the file, another process may end and delete it."""
    flock, calls = fcntl.flock, []

    def late(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    refused = pytest.raises(UserError, match="in use")
    with locked(tmp_path, no_note), refused, locked(tmp_path, no_note):
        pass
    assert len(calls) == 3


def test_a_disk_without_locks_is_noted(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    notes = []
    with locked(tmp_path, notes.append):
        pass
    assert len(notes) == 1
    assert "cannot be locked (No locks available)" in notes[0]


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("n" * 300)):
        refused = pytest.raises(UserError, match=r"the folder .* cannot be written: ")
        with refused, locked(place, no_note):
            pass


# A folder that is replaced


def write(dest, text, *names):
    with replacing(dest) as work:
        for name in names:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(text)


def files(folder):
    found = {path for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def test_a_folder_takes_the_place_of_the_earlier_one(tmp_path):
    dest = tmp_path / "deep" / "model"
    write(dest, "old", "a", "inner/b")
    write(dest, "new", "a", "c")
    found = files(tmp_path / "deep")
    marker = json.loads(found.pop(f"model/{MARKER}"))
    assert found == {"model/a": "new", "model/c": "new"}
    assert marker == {"format": 1, "kind": "model", "files": ["a", "c"]}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new", "a")


def test_what_fails_leaves_the_earlier_folder(tmp_path):
    write(tmp_path / "model", "old", "a")
    before = files(tmp_path)
    with pytest.raises(TypeError):
        write(tmp_path / "model", "new", "a", None)
    with pytest.raises(OSError, match="File exists"):
        write(tmp_path / "model" / "a" / "b", "new", "c")
    assert files(tmp_path) == before


@pytest.mark.parametrize("left", [(), (MARKER,), (MARKER, "a", "inner/b")])
def test_what_a_killed_process_left_is_put_in_order(tmp_path, left):
    part, old = tmp_path / ".model.part", tmp_path / ".model.old"
    part.mkdir()
    for name in left:
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).write_text(Marker("model").as_text())
    write(tmp_path / "elsewhere", "old", "a")
    (tmp_path / "elsewhere").rename(old)  # killed between the two renames
    write(tmp_path / "model", "new", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.copytree(tmp_path / "model", old)  # killed before the old one was deleted
    write(tmp_path / "model", "newer", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "newer"


@pytest.mark.parametrize("name", ["model", ".model.part", ".model.old"])
def test_what_we_did_not_make_is_not_replaced(tmp_path, name):
    mine = tmp_path / name / "config.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is (there|needed), and .*\. (Name|Move) "):
        write(tmp_path / "model", "new", "a")
    assert files(tmp_path) == {f"{name}/config.json": "mine"}


def test_a_file_that_was_added_is_named_and_kept(tmp_path):
    write(tmp_path / "model", "old", "a")
    check_replaceable(tmp_path / "model")
    (tmp_path / "model" / "inner").mkdir()
    (tmp_path / "model" / "inner" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"model/inner/mine would be deleted with the model in "):
        write(tmp_path / "model", "new", "a")
    assert files(tmp_path)["model/inner/mine"] == "mine"


def test_two_processes_do_not_write_one_folder(tmp_path):
    with replacing(tmp_path / "model") as work:
        (work / "a").write_text("first")
        with pytest.raises(UserError, match=r"another process is writing .*model"):
            write(tmp_path / "model", "second", "a")
    assert (tmp_path / "model" / "a").read_text() == "first"
