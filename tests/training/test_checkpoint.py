"""A checkpoint is whole or not there, and a failed save leaves the earlier ones alone."""

import os
import resource

import pytest
import torch

from finetune.errors import UserError
from finetune.run.folder import is_complete, step_of
from finetune.training.checkpoint import CheckpointStore, damage_of, find_checkpoint, load


def save(store: CheckpointStore, step: int, best: int | None = None, size: int = 10):
    return store.save(step, {"model.pt": {"w": torch.full((size,), float(step))}}, best_step=best)


def test_round_trip_and_newest(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=5)
    assert store.newest() is None
    for step in (9, 10, 100):
        save(store, step)
    assert store.steps() == [9, 10, 100]
    assert load(store.newest(), "model.pt")["w"][0] == 100


def test_keeps_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        save(store, step, best)
    assert store.steps() == [2, 4, 5]


def test_later_checkpoints_go_with_the_first_save_after_going_back(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (700, 800, 900):
        save(store, step, best=700)
    assert store.steps() == [700, 800, 900]
    save(store, 720, best=700)
    assert store.steps() == [700, 720]
    save(store, 740, best=700)
    assert store.steps() == [700, 720, 740]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 3, size=4)
    assert load(save(store, 3, size=6), "model.pt")["w"].numel() == 6


def test_incomplete_folders_do_not_count_and_are_cleared(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    whole, cut = save(store, 1), save(store, 2)
    (tmp_path / ".step-00000003").mkdir()
    data = (cut / "model.pt").read_bytes()
    (cut / "model.pt").write_bytes(data[:-1])
    assert not is_complete(cut)
    assert store.newest() == whole
    save(store, 4)
    assert not (tmp_path / ".step-00000003").exists()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    previous = save(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"step 2 could not be written .*step-00000001 is untouched"
        ):
            save(store, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.newest() == previous
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    save(store, 2, size=100_000)
    assert store.steps() == [2]


def test_a_checkpoint_that_the_system_does_not_open_is_no_damaged_one(tmp_path):
    """Else an older one would be taken, and this one deleted. Here no more files can be opened."""
    folder = save(CheckpointStore(tmp_path, keep=1), 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be read \(Too many open files\), and may be"):
            damage_of(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert damage_of(folder) is None


def test_what_resume_may_name(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    assert find_checkpoint("auto", store.root) is None
    with pytest.raises(UserError, match="there is no checkpoint at"):
        find_checkpoint(str(tmp_path / "none"), store.root)
    folder = save(store, 7)
    assert find_checkpoint("auto", store.root) == folder
    assert find_checkpoint(str(folder), store.root) == folder
    assert find_checkpoint(str(tmp_path / "run"), store.root) == folder
    renamed = folder.rename(folder.with_name("mine"))
    assert find_checkpoint(str(renamed), store.root) == renamed
    assert step_of(renamed) == 7
    renamed.rename(folder)
    (folder / "complete.json").unlink()
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        find_checkpoint(str(folder), store.root)
    with pytest.raises(UserError, match="has no complete checkpoint"):
        find_checkpoint(str(tmp_path / "run"), store.root)
