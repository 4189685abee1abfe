"""A record is whole or as it was; a disk that refuses is one message; `clear` forgets nothing."""

import errno
import os

import pytest

from finetune.errors import UserError, disk_refusal
from finetune.run.claim import write_marker
from finetune.run.files import append_lines, write_json, write_text
from finetune.run.folder import (
    Mark,
    RunDir,
    checkpoint_path,
    complete_steps,
    is_complete,
    newest_checkpoint,
    step_of,
)
from finetune.run.log import Journal, MetricLogger, forget_after
from finetune.run.marker import MARKER, Marker
from finetune.run.records import DataCounts, StepRecord, write_config

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """An exception that nothing catches."""


def raising(error):
    def refuse(*_):
        raise error

    return refuse


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    write_marker(run.root, Marker("run"))
    write_config(run, "seed: 0\n")
    DataCounts(format="chat").write(run)
    return run


def make_checkpoint(run, step):
    folder = checkpoint_path(run.checkpoints, step)
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"weights")
    (folder / "complete.json").write_text(Mark(step, {"model.pt": 7}, {"model.pt": "a"}).as_text())
    return folder


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_record(run, monkeypatch, call):
    before = {path: path.read_bytes() for path in run.root.iterdir()}
    monkeypatch.setattr(os, call, raising(FULL))
    with pytest.raises(UserError, match=r"run/data\.json could not be written: No space left"):
        DataCounts(format="text").write(run)
    assert {path: path.read_bytes() for path in run.root.iterdir()} == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_record_and_the_next_write_succeeds(
    run, monkeypatch, call
):
    monkeypatch.setattr(os, call, raising(Killed()))
    with pytest.raises(Killed):
        DataCounts(format="text").write(run)
    assert DataCounts.read(run).format == "chat"
    monkeypatch.undo()
    DataCounts(format="text").write(run)
    assert DataCounts.read(run).format == "text"
    assert sorted(path.name for path in run.root.iterdir()) == [MARKER, "config.yaml", "data.json"]


def test_a_record_is_on_the_disk_before_it_has_its_name(run, monkeypatch):
    calls = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)
        monkeypatch.setattr(
            os, call, lambda *given, real=real, call=call: calls.append(call) or real(*given)
        )
    DataCounts(format="text").write(run)
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_logging_a_step_does_not_wait_for_the_disk(run, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(Killed()))
    MetricLogger(run.metrics).log(StepRecord(1))
    assert len(run.metrics.read_text().splitlines()) == 1


def test_forgetting_is_all_or_nothing(run, monkeypatch):
    logger = MetricLogger(run.metrics)
    for step in (1, 2, 3):
        logger.log(StepRecord(step))
    before = run.metrics.read_bytes()
    monkeypatch.setattr(os, "replace", raising(FULL))
    with pytest.raises(UserError, match=r"run/metrics\.jsonl could not be written"):
        forget_after(run, 1)
    assert run.metrics.read_bytes() == before


def test_the_message_names_what_is_left_of_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", raising(FULL))
    with pytest.raises(UserError, match=r"No space left on device; there is no checkpoint yet$"):
        DataCounts().write(run)
    make_checkpoint(run, 2)
    make_checkpoint(run, 4)
    (make_checkpoint(run, 6) / "model.pt").write_bytes(b"cut")
    with pytest.raises(
        UserError, match=r"step-00000004 is untouched\. Continue with --resume auto$"
    ):
        DataCounts().write(run)
    with pytest.raises(UserError, match=r"other\.json could not be written: No space left on devi"):
        write_json(tmp_path / "other.json", {})


def test_a_line_that_cannot_be_appended_is_one_message(run):
    run.samples.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"run/samples\.jsonl could not be written: No space left"):
        append_lines(run.samples, [{"step": 1}])
    (run.root / "file").touch()
    with pytest.raises(UserError, match=r"could not be written: (Not a directory|File exists)"):
        MetricLogger(run.root / "file" / "metrics.jsonl")


def test_the_bytes_of_a_name_that_is_not_utf8(run):
    """A log has them in another spelling. Any other text is refused in one sentence."""
    journal, said = Journal(), "dropped: caf\udce9.csv line 1"
    journal.add(said)
    with journal.kept_in(run):
        journal.add(said)
    assert run.log.read_text(encoding="utf-8").count("caf\\udce9.csv line 1\n") == 2
    path = run.root / "a.yaml"
    with pytest.raises(UserError, match=r"a\.yaml' cannot be written: 'data: caf\\udce9\.csv' is"):
        write_text(path, "data: caf\udce9.csv")
    assert not path.exists()


def test_the_message_for_any_other_file_names_it_if_the_system_does():
    assert disk_refusal(FULL) == "a file could not be written: No space left on device"
    named = OSError(errno.EROFS, os.strerror(errno.EROFS), "out/a.txt")
    assert disk_refusal(named) == "out/a.txt could not be written: Read-only file system"
    closed = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out/a.txt")
    assert disk_refusal(closed) == "out/a.txt could not be opened: Permission denied"
    assert disk_refusal(ConnectionResetError(errno.ECONNRESET, "reset")) is None


def test_clear_deletes_everything_that_a_run_writes_and_nothing_else(run):
    names = [name for name, item in vars(RunDir).items() if isinstance(item, property)]
    assert len(names) > 10
    for name in names:
        path = getattr(run, name)
        path.mkdir() if "." not in path.name else path.touch()
    assert sorted(getattr(run, name) for name in names) == sorted(run.written())
    write_marker(run.model, Marker("model", files=("config.json", "inner/weights")))
    (run.model / "inner").mkdir()
    for name in ("config.json", "inner/weights"):
        (run.model / name).touch()
    make_checkpoint(run, 2)
    (make_checkpoint(run, 4) / "model.pt").unlink()  # half deleted
    (run.checkpoints / "step-00000006").mkdir()
    (run.checkpoints / ".step-00000008").mkdir()
    (run.root / "thesis.txt").write_text("years of work")
    run.clear()
    assert sorted(path.name for path in run.root.iterdir()) == [MARKER, "thesis.txt"]
    run.clear()


def test_clear_leaves_what_someone_put_into_the_folders_of_a_run(run):
    write_marker(run.model, Marker("model", files=("config.json", "../thesis.txt", "/etc/hosts")))
    mine = [
        run.root / "thesis.txt",
        run.model / "model.gguf",
        run.checkpoints / "precious.bin",
        make_checkpoint(run, 2) / "notes.txt",
        run.checkpoints / "step-00000004" / "model.pt",  # without a mark
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    run.clear()
    left = {path for path in run.root.rglob("*") if path.is_file()}
    assert left == {run.root / MARKER, *mine}


def test_checkpoints_are_found_by_their_mark(run):
    assert newest_checkpoint(run.checkpoints) is None
    whole = make_checkpoint(run, 2)
    cut = make_checkpoint(run, 4)
    (cut / "model.pt").write_bytes(b"cut")
    (run.checkpoints / "step-00000008").mkdir()
    assert complete_steps(run.checkpoints) == [2]
    assert newest_checkpoint(run.checkpoints) == whole
    assert not is_complete(cut)
    assert step_of(whole) == 2
