"""A run loses nothing of anyone's, notices what is damaged, and stays what it is when resumed."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.train.evaluations import RunEvaluations
from finetune.recipes.train.train import run_training
from finetune.run.claim import write_marker
from finetune.run.folder import RunDir, checkpoint_path, complete_steps, newest_checkpoint
from finetune.run.log import MetricLogger
from finetune.run.marker import Marker
from finetune.training.checkpoint import damage_of
from tests.training.kills import kept


def train(tree, **options):
    display = Display(enabled=False)
    return run_training(make_config(tree), display=display, **options), display.notes


def steps_of(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def tree(tiny, tmp_path, monkeypatch):
    """A run of four steps, each saved and evaluated. The working directory is that of the run."""
    monkeypatch.chdir(tmp_path)
    return tiny(
        training={"max_steps": 4},
        checkpoint={"every": 1, "keep": 4},
        evaluation={"every": 1, "before": True},
    )


# What is not the run's


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("name", ["config.yaml", "data.json", "checkpoints/a.bin", "model/a.bin"])
def test_files_of_someone_else_are_not_replaced(tree, tmp_path, name, overwrite, resume):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("# my own\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"{name.split('/')[0]} would be replaced, and finetune "):
        train({**tree, "output_dir": ".", "overwrite_output_dir": overwrite}, resume=resume)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("key", ["model", "data"])
def test_a_run_does_not_replace_what_it_reads(tree, tmp_path, chat_file, key):
    train({**tree, "training": {**tree["training"], "max_steps": 1}})
    run = tmp_path / "run"
    if key == "model":
        changed = {"model": {"name": str(run / "model")}}
    else:
        shutil.copy(chat_file, run / "samples.jsonl")
        changed = {"data": {**tree["data"], "train": "run/samples.jsonl"}}
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"(model.name|data.train) is .*, and the run writes its o"):
        train({**tree, **changed, "overwrite_output_dir": True})
    assert contents(tmp_path) == before


def test_overwriting_deletes_what_the_run_wrote_and_no_more(tree, tmp_path):
    train(tree)
    run = RunDir(tmp_path / "run")
    mine = [run.root / "notes.txt", run.checkpoints / "a.bin", run.checkpoints / "step-00000004/a"]
    for path in mine:
        path.write_text("mine")
    train({**tree, "training": {**tree["training"], "max_steps": 2}, "overwrite_output_dir": True})
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert steps_of(run.root) == [1, 2]
    assert complete_steps(run.checkpoints) == [1, 2]
    (run.model / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"model/model\.gguf would be deleted with the model"):
        train(tree, resume="auto")
    assert complete_steps(run.checkpoints) == [1, 2]


@pytest.mark.parametrize("name", ["checkpoints", "model"])
def test_a_folder_on_another_disk_stays_there(tree, tmp_path, name):
    train(tree)
    run, disk = RunDir(tmp_path / "run"), tmp_path / "disk" / name
    disk.parent.mkdir()
    (run.root / name).rename(disk)
    (run.root / name).symlink_to(disk)
    longer = {**tree, "training": {**tree["training"], "max_steps": 5}}
    train(longer, resume="auto")
    assert complete_steps(run.checkpoints) == [2, 3, 4, 5]
    train({**tree, "overwrite_output_dir": True})
    assert complete_steps(run.checkpoints) == [1, 2, 3, 4]
    assert (run.root / name).readlink() == disk
    assert (run.model / "model.safetensors").is_file()
    assert [path.name for path in disk.parent.iterdir()] == [name]


def test_a_file_in_the_way_of_a_checkpoint_is_kept(tree, tmp_path):
    write_marker(tmp_path / "run", Marker("run"))
    mine = checkpoint_path(tmp_path / "run" / "checkpoints", 2) / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    train(tree)
    assert complete_steps(tmp_path / "run" / "checkpoints") == [1, 2, 3, 4]
    assert (mine.parent.with_name("step-00000002.other1") / "mine").read_text() == "mine"


def test_a_deletion_that_was_killed_is_finished_before_the_run_is_resumed(tree, tmp_path):
    """Else the checkpoints that were not deleted yet would be continued."""
    train({**tree, "output_dir": "whole"})
    other = {**tree, "optimizer": {"lr": 1e-4}}
    train(other)
    run = RunDir(tmp_path / "run")
    write_marker(run.root, Marker("run", emptying=True))
    run.config.unlink()
    train(tree, resume="auto")
    assert kept(run.root) == kept(tmp_path / "whole")


def test_a_second_run_is_kept_out_and_the_first_is_not_harmed(tree, tmp_path):
    train({**tree, "output_dir": "whole"})
    said = []

    def start_another(live):
        for resume in (None, "auto"):
            with pytest.raises(UserError) as error:
                train(tree, resume=resume)
            said.append(str(error.value))

    train(tree, on_start=start_another)
    assert len(said) == 2
    assert all("run is in use by process" in message for message in said)
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")


# What is damaged


class Killed(BaseException):
    """An exception that nothing catches."""


@pytest.fixture
def half(tree, tmp_path, monkeypatch):
    """Return the folder of a run that was killed after step 4 was logged, and its notes."""
    train({**tree, "output_dir": "whole"})
    log = MetricLogger.log

    def log_and_die(self, record):
        log(self, record)
        if record.step == 4:
            raise Killed

    monkeypatch.setattr(MetricLogger, "log", log_and_die)
    with pytest.raises(Killed):
        train(tree)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def turn_a_bit(path: Path, seed: int) -> None:
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "garbage": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    **{f"bit {seed}": lambda path, seed=seed: turn_a_bit(path, seed) for seed in range(5)},
}


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "training.pt", "complete.json"])
def test_every_damage_of_a_checkpoint_is_seen(half, name):
    newest = newest_checkpoint(half / "checkpoints")
    assert damage_of(newest) is None
    for number, (kind, damage) in enumerate(DAMAGES.items()):
        copy = newest.with_name(f"copy{number}")
        shutil.copytree(newest, copy)
        damage(copy / name)
        found = damage_of(copy)
        # a bit of the mark that says nothing, such as a space, is no damage
        assert found is not None or (name == "complete.json" and kind.startswith("bit")), kind


@pytest.mark.parametrize("name", ["model.pt", "complete.json"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(tree, half, tmp_path, name):
    DAMAGES["garbage"](checkpoint_path(half / "checkpoints", 3) / name)
    _, notes = train(tree, resume="auto")
    (note,) = [note for note in notes if "is damaged" in note]
    assert "checkpoints/step-00000003 is damaged: " in note
    assert name in note
    assert steps_of(half) == [1, 2, 3, 4]
    found, wanted = kept(half), kept(tmp_path / "whole")
    if name == "complete.json":  # without a mark it is not known what in the folder is ours
        aside = "checkpoints/step-00000003.other1"
        assert aside in found.pop("names")
        wanted.pop("names")
        found = {key: value for key, value in found.items() if not key.startswith(aside)}
    assert found == wanted


@pytest.mark.parametrize("inside", [None, "mine"])
def test_a_folder_in_the_place_of_a_file_ends_no_run(tree, half, tmp_path, inside):
    file = checkpoint_path(half / "checkpoints", 3) / "optimizer.pt"
    file.unlink()
    file.mkdir()
    if inside is not None:
        (file / inside).write_text(inside)
    _, notes = train(tree, resume="auto")
    assert [note for note in notes if "checkpoints/step-00000003 is damaged: optimizer.pt" in note]
    assert steps_of(half) == [1, 2, 3, 4]
    aside = [path.read_text() for path in half.glob("checkpoints/*.other1/optimizer.pt/*")]
    assert aside == ([] if inside is None else [inside])
    shutil.rmtree(half / "checkpoints" / "step-00000003.other1", ignore_errors=True)
    assert kept(half) == kept(tmp_path / "whole")


def test_if_every_checkpoint_is_damaged_the_run_begins_again(tree, half, tmp_path):
    for step in complete_steps(half / "checkpoints"):
        turn_a_bit(checkpoint_path(half / "checkpoints", step) / "optimizer.pt", step)
    before, first = contents(half / "checkpoints"), []

    def look(record):
        if record.step == 1 and hasattr(record, "lr"):
            first.append(contents(half / "checkpoints"))

    _, notes = train(tree, resume="auto", listener=look)
    damaged = [note for note in notes if "is damaged" in note]
    assert len(damaged) == 3
    assert not any("An older one is taken" in note for note in damaged)
    assert first == [before], "nothing is deleted before there is a better one"
    assert kept(half) == kept(tmp_path / "whole")


def test_a_finished_run_without_a_whole_checkpoint_is_not_trained_anew(tree, tmp_path):
    """What is left of a checkpoint has the weights, and model/ is the run's."""
    train(tree)
    run = tmp_path / "run"
    for file in run.glob("checkpoints/*/optimizer.pt"):
        file.unlink()
    before = contents(run)
    with pytest.raises(UserError, match="is finished, and none of its checkpoints is whole, so it"):
        train(tree, resume="auto")
    assert contents(run) == before


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(tree, half):
    asked = checkpoint_path(half / "checkpoints", 2)
    turn_a_bit(asked / "model.pt", 1)
    with pytest.raises(UserError, match=r"not a complete checkpoint: model\.pt does not hold what"):
        train(tree, resume=str(asked))


def test_a_best_checkpoint_that_is_damaged_is_not_exported(tree, tmp_path, monkeypatch):
    """The weights of the best evaluation, here the first, are read again at the end."""
    evaluate = RunEvaluations.__call__
    monkeypatch.setattr(
        RunEvaluations, "__call__", lambda self, step: {**evaluate(self, step), "loss": float(step)}
    )

    def damage_the_best(record):
        if record.step == 4 and hasattr(record, "loss"):
            turn_a_bit(checkpoint_path(tmp_path / "run" / "checkpoints", 1) / "model.pt", 3)

    refused = "step-00000001, the best evaluation, is damaged: model.pt"
    with pytest.raises(UserError, match=refused):
        train(tree, listener=damage_the_best)
    assert not (tmp_path / "run" / "model").exists()
    last = {**tree, "checkpoint": {**tree["checkpoint"], "save_best_model": False}}
    _, notes = train(last, resume="auto")
    assert [note for note in notes if "step-00000001, the best checkpoint so far" in note]
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("text", ["", "{", "[1]", "data:\n  train: a\n  valid", "\xff"])
@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "evaluation.json"])
def test_a_damaged_record_is_named_and_made_again(tree, half, tmp_path, name, text):
    (half / name).write_text(text, encoding="latin-1")
    stopped, notes = train(tree, resume="auto")
    assert stopped == "finished"
    assert [note for note in notes if f"run/{name} is damaged. It is made again" in note]
    assert kept(half) == kept(tmp_path / "whole")


def change_weights(checkpoint: Path, change) -> None:
    """Change the weights of a checkpoint, and its mark accordingly."""
    weights = torch.load(checkpoint / "model.pt")
    change(weights)
    torch.save(weights, checkpoint / "model.pt")
    from finetune.training.checkpoint import hash_of

    mark = json.loads((checkpoint / "complete.json").read_text())
    size = (checkpoint / "model.pt").stat().st_size
    mark["files"]["model.pt"] = {"bytes": size, "xxh3": hash_of(checkpoint / "model.pt")}
    (checkpoint / "complete.json").write_text(json.dumps(mark))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop(min(weights)), "lacks 1 weights, such as"),
        (lambda weights: weights.clear(), r"lacks \d+ weights, such as"),
        (lambda weights: weights.update(other=torch.ones(1)), "has, unlike the model, 1 weights"),
        (lambda weights: weights.update({min(weights): torch.ones(1)}), "has another shape than"),
    ],
    ids=["one is missing", "all are missing", "one more", "another shape"],
)
def test_weights_that_are_not_those_of_the_model_are_an_error(tree, half, change, says):
    change_weights(newest_checkpoint(half / "checkpoints"), change)
    before = contents(half)
    with pytest.raises(UserError, match=says):
        train(tree, resume="auto")
    assert contents(half) == before


# What is over, and what goes back


def test_a_finished_run_stays_what_it_is(tree, tmp_path):
    train(tree)
    run = tmp_path / "run"
    summary = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**summary, "test": {"loss": 1.5}}))
    before = kept(run)
    for _ in range(2):
        assert train(tree, resume="auto")[0] == "finished"
        assert kept(run) == before
    longer = {**tree, "training": {**tree["training"], "max_steps": 5}}
    assert train(longer, resume="auto")[0] == "finished"
    assert "test" not in json.loads((run / "evaluation.json").read_text())  # of another model


def test_a_run_that_stopped_early_stays_what_it_is(tree, tmp_path):
    evaluation = {**tree["evaluation"], "early_stopping_patience": 2}
    training = {**tree["training"], "max_steps": 30, "divergence_threshold": 1e9}
    tree = {**tree, "evaluation": evaluation, "training": training, "optimizer": {"lr": 1.0}}
    assert train(tree)[0] == "early stopping"
    run = tmp_path / "run"
    before, last = kept(run), steps_of(run)[-1]
    assert train(tree, resume="auto")[0] == "early stopping"
    assert kept(run) == before
    patient = {**tree, "evaluation": {**evaluation, "early_stopping_patience": 3}}
    train(patient, resume="auto")
    assert steps_of(run)[-1] > last


@pytest.fixture(params=["finished", "early stopping"])
def overfitted(tree, tmp_path, chat_file, request):
    """Return the config of a run whose best evaluation is not its last, and how it ended."""
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("".join(chat_file.read_text().splitlines(keepends=True)[:5]))
    tree["data"]["validation"] = str(held_out)
    tree["optimizer"] = {"lr": 1.0}
    tree["training"]["divergence_threshold"] = 1e9
    tree["checkpoint"]["keep"] = 1
    if request.param == "early stopping":
        tree["training"]["max_steps"] = 30
        tree["evaluation"]["early_stopping_patience"] = 2
    assert train(tree)[0] == request.param
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert summary["best"]["step"] < summary["last_step"]
    return tree, request.param


def best_of(run: Path) -> Path:
    summary = json.loads((run / "evaluation.json").read_text())
    return checkpoint_path(run / "checkpoints", summary["best"]["step"])


def more_held_out_data(tree, run, chat_file):
    with open(tree["data"]["validation"], "a") as file:
        file.write(chat_file.read_text().splitlines(keepends=True)[7])


def another_measure(tree, run, chat_file):
    tree["evaluation"] |= {"best": "chrf", "metrics": ["chrf"], "generate": 2}


@pytest.mark.parametrize(
    "change",
    [
        lambda tree, run, chat_file: None,
        lambda tree, run, chat_file: shutil.rmtree(best_of(run)),
        lambda tree, run, chat_file: (best_of(run) / "optimizer.pt").unlink(),
        more_held_out_data,
        another_measure,
    ],
    ids=["nothing", "the best is deleted", "a part of it is", "held-out data", "measure"],
)
def test_a_finished_run_stays_what_it_is_whatever_became_of_its_best(
    overfitted, tmp_path, chat_file, change
):
    """Its model has the best weights, which no checkpoint may have any more."""
    tree, ended = overfitted
    run = tmp_path / "run"
    (run / "model" / "README.md").write_text("a card that a person wrote")
    change(tree, run, chat_file)
    before, others = contents(run), ("train.log", "report.html")
    for _ in range(2):
        assert train(tree, resume="auto")[0] == ended
        after = contents(run)
        assert {name for name in before | after if before.get(name) != after.get(name)} <= {*others}
    steps = steps_of(run)[-1]
    tree["training"]["max_steps"] = steps + 1
    tree["evaluation"]["early_stopping_patience"] = None
    assert train(tree, resume="auto")[0] == "finished"
    assert steps_of(run)[-1] == steps + 1


def test_the_last_weights_of_a_finished_run_are_exported_if_they_are_asked_for(
    overfitted, tmp_path
):
    tree, _ = overfitted
    run = tmp_path / "run"
    best = (run / "model" / "model.safetensors").read_bytes()
    for save_best in (False, True):
        tree["checkpoint"]["save_best_model"] = save_best
        train(tree, resume="auto")
        summary = json.loads((run / "evaluation.json").read_text())
        wanted = summary["best"]["step"] if save_best else summary["last_step"]
        assert summary["after"]["step"] == wanted
        assert ((run / "model" / "model.safetensors").read_bytes() == best) == save_best


@pytest.mark.parametrize("way", ["back", "on"])
def test_figures_are_of_the_model_also_after_a_kill_in_the_export(tree, tmp_path, monkeypatch, way):
    """Else an end of other steps would be taken for the one that was not exported."""
    train(tree)
    run = tmp_path / "run"
    shutil.copytree(run, tmp_path / "whole")
    model = contents(run / "model")
    if way == "back":
        tree["optimizer"] = {"lr": 1e-3}
    else:
        tree["training"]["max_steps"] = 5
    resume = {"back": "{}/checkpoints/step-00000002", "on": "auto"}[way]
    train({**tree, "output_dir": str(tmp_path / "whole")}, resume=resume.format(tmp_path / "whole"))
    written = run.with_name("written")

    def die(*_, **__):
        shutil.copytree(run, written)
        raise Killed

    monkeypatch.setattr("finetune.recipes.train.finish.export_model", die)
    with pytest.raises(Killed):
        train(tree, resume=resume.format(run))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert contents(written / "model") == model
    summary = written / "evaluation.json"
    assert not summary.exists() if way == "back" else '"last_step": 4' in summary.read_text()
    train(tree, resume="auto")
    assert contents(run / "model") != model
    assert kept(run) == kept(tmp_path / "whole")


def test_going_back_and_a_kill_before_the_next_checkpoint_leave_no_hole(
    tree, tmp_path, monkeypatch
):
    train(tree)
    before = kept(tmp_path / "run")
    early = checkpoint_path(tmp_path / "run" / "checkpoints", 2)
    log = MetricLogger.log

    def log_and_die(self, record):
        log(self, record)
        raise Killed

    monkeypatch.setattr(MetricLogger, "log", log_and_die)
    with pytest.raises(Killed):
        train(tree, resume=str(early))
    monkeypatch.undo()
    train({**tree, "output_dir": str(tmp_path / "run")}, resume="auto")
    assert kept(tmp_path / "run") == before
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
