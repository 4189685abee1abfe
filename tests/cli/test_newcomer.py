"""What held a newcomer up (issue 23): a test for each fault that is mended."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.models.locate import find_local
from finetune.recipes.compare.trial import Tally
from finetune.run.records import StepRecord
from tests.cli.conftest import finetune
from tests.cli.test_commands import on_a_terminal


@pytest.fixture
def chat_run(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def translation_run(translator: Path, folder: Path) -> Path:
    shutil.copytree(translator, folder, dirs_exist_ok=True)
    return folder


# F10, F16: the live line


@pytest.fixture
def shown() -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None, soft_wrap=True)
    return Display(console=console), out


def test_the_live_line_says_elapsed_and_left(shown, monkeypatch) -> None:
    from rich.progress import Progress, Task

    from finetune.display import _TimesColumn

    now = [0.0]
    progress = Progress(get_time=lambda: now[0])
    number = progress.add_task("training", total=10)
    task: Task = progress.tasks[0]
    column, limited = _TimesColumn(None), _TimesColumn(400.0)
    assert column.render(task).plain == "0.0 s elapsed", "no time left before it is known"
    now[0] = 1000.0  # loading, and the evaluation before the first step
    assert column.render(task).plain == "16 min 40 s elapsed"
    assert limited.render(task).plain == "16 min 40 s elapsed, 6 min 40 s left"
    for done in range(1, 6):
        for each in (column, limited):
            each.begin(task, done)
        progress.update(number, completed=done)
        now[0] += 70.0
    assert column.render(task).plain == "22 min 30 s elapsed, 7 min 18 s left"
    assert limited.render(task).plain == "22 min 30 s elapsed, 50 s left"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_live_line_is_one_line(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with Display(console=console).steps(100, 0) as listen:
        for step in range(1, 4):
            listen(StepRecord(step=step, loss=2.345, lr=1e-4, tokens_per_second=27266.0))
    drawn = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", out.getvalue()))
    lines = [line for line in drawn if line.strip()]
    assert lines
    assert all(line.startswith("train") and len(line) <= width for line in lines), lines


def test_a_terminal_that_cannot_draw_gets_plain_lines(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    with Display(console=Console(file=out, force_terminal=True)).bar("reading", 3) as advance:
        advance(3)
    assert out.getvalue().startswith("reading 3/3")


def test_plain_lines_say_the_same(monkeypatch) -> None:
    from finetune import display

    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    shown = Display(console=Console(file=out, width=200))
    with shown.bar("evaluating", 4) as advance:
        for _ in range(4):
            now[0] += 6.0
            advance(1)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines == [
        "evaluating 1/4",
        "evaluating 2/4    6.0 s elapsed, 12 s left",
        "evaluating 3/4    12 s elapsed, 6.0 s left",
        "evaluating 4/4    18 s elapsed",
    ]


def test_a_comparison_says_which_run_of_how_many(tiny, folder) -> None:
    tally = Tally(6)
    config = make_config(tiny(optimizer={"name": "adam", "lr": 1e-3}))
    assert tally.label(config) == "run 1 of about 6: adam lr 0.001"
    tally.done |= {Path("a"), Path("b")}
    tally.seconds += [30.0, 50.0]
    expected = "run 3 of about 6: adam lr 0.001, all runs about 2 min 40 s left;"
    assert tally.label(config) == expected
    tally.done |= {Path(str(n)) for n in range(6)}
    assert tally.label(config).startswith("run 9 of about 9: ")


@pytest.mark.slow
def test_compare_shows_it(folder, write_config) -> None:
    write_config(training={"max_steps": 2})
    result = finetune("compare", "c.yaml", "optimizer.name=[adam, sgd]", "--trials", "1",
                      "--seeds", "1")  # fmt: skip
    assert result.code == 0, result.err
    assert len(set(re.findall(r"run (\d) of about 4: (?:adam|sgd) lr", result.err))) == 4


# F11: hints


def test_a_checkpoint_that_is_missing_names_those_that_are_there(chat_run) -> None:
    result = finetune("train", "c.yaml", "--resume", "run/checkpoints/step-00000039")
    assert result.code == 2
    assert "Give run/checkpoints/step-00000002, or auto" in result.err


# F14: translations of files


def test_a_translation_is_not_overwritten_and_is_counted(translation_run) -> None:
    Path("in.txt").write_text("One.\n\nTwo.\n")
    typed = ("translate", "run", "-i", "in.txt", "-o", "out.txt", "--max-new-tokens", "2")
    done = finetune(*typed)
    assert done.code == 0, done.err
    assert re.search(r"^out\.txt: 3 lines translated in \d", done.err, flags=re.M)
    assert "translating 3/3" in done.err
    before = Path("out.txt").read_bytes()
    again = finetune(*typed)
    assert again.code == 2
    assert "out.txt already exists" in again.err
    assert Path("out.txt").read_bytes() == before


@pytest.mark.slow
def test_translate_answers_each_line_at_a_terminal(translation_run) -> None:
    asked = iter(["One.\n", "Two.\n", "\x04"])

    def replies(shown: str) -> str | None:
        return next(asked, None) if "one sentence a line" in shown else None

    code, shown = on_a_terminal("translate", "run", "--max-new-tokens", "2", replies=replies)
    assert code == 0, shown
    assert shown.index("One.") < shown.index("Two.")


# F15: tracking


def test_tensorboard_has_its_folder_and_is_said(folder, write_config) -> None:
    write_config(training={"max_steps": 2}, tracking=["tensorboard"])
    result = finetune("train", "c.yaml", "output_dir=my run")
    assert result.code == 0, result.err
    assert "to see the curves: tensorboard --logdir 'my run/tracking'" in result.err
    assert list((folder / "my run/tracking").rglob("events.out.tfevents.*"))
    assert not (folder / "my run/my run").exists()


# F17: words


def test_what_was_cut_is_a_sentence(folder, write_config) -> None:
    write_config(data={"max_length": 18}, training={"max_steps": 1})
    result = finetune("train", "c.yaml")
    assert result.code == 0, result.err
    (said,) = re.findall(r"^training: of the examples.*$", result.err, flags=re.M)
    assert re.fullmatch(
        r"training: of the examples that are longer than 18 tokens \d+ were cut(, \d+ of these had "
        r"no target left and were left out)?; the longest has \d+ \(data\.max_length, "
        r"data\.overlong\)",
        said,
    ), said
    assert " 0 " not in said


# F19: tables and noise


def test_optimizers_are_listed_without_switches_of_torch() -> None:
    listed = finetune("optimizers").out
    assert "betas=" in listed
    for noise in ("foreach", "capturable", "differentiable", "fused", "maximize"):
        assert f"{noise}=" not in listed


@pytest.mark.slow
def test_evaluate_is_a_table_at_a_terminal_and_json_elsewhere(chat_run) -> None:
    code, shown = on_a_terminal("evaluate", "run")
    assert code == 0, shown
    assert "Held-out loss" in shown
    assert "nats per target token" in shown
    assert '"loss"' not in shown
    code, shown = on_a_terminal("evaluate", "run", "--json")
    assert '"loss":' in shown
    piped = finetune("evaluate", "run")
    assert json.loads(piped.out)["loss"] > 0


# what a later newcomer typed


def closed(command: str) -> subprocess.CompletedProcess:
    """Run `finetune COMMAND` with redirections of the shell."""
    typed = f"{shlex.quote(sys.executable)} -m finetune {command}"
    return subprocess.run(["sh", "-c", typed], capture_output=True, text=True, timeout=120)


def test_a_closed_stdin_is_an_end(chat_run) -> None:
    assert closed("chat run <&-").returncode == 0
    asked = closed("generate run <&-")
    assert asked.returncode == 2
    assert "stdin is closed, so nothing can be read" in asked.stderr


def test_init_says_what_it_leaves_out(base, folder) -> None:
    records = [{"prompt": f"{n} plus 1?", "completion": f"It is {n + 1}."} for n in range(60)]
    records[7]["completion"] = None
    records[8]["topic"] = "sums"
    (folder / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "pairs.tsv").write_text("en\tfr\n" + "a word\tun mot\n" * 60)
    said = finetune("init", "chat.jsonl", "--model", "base")
    assert said.code == 0, said.err
    assert "dropped: 1 record cannot be used: chat.jsonl line 8: 'completion' must be" in said.err
    assert "not used: the column 'topic' (1 record)" in said.err.splitlines()
    for typed, answer in {
        "chat.jsonl pairs.tsv -o b.yaml": "chat.jsonl is chat and pairs.tsv is translation. Make",
        "chat.jsonl --from en -o b.yaml": "(--from of `finetune init`) is given, but this data is",
        "pairs.tsv --from de --to es": "column 'de' is missing; the columns are en, fr",
        "pairs.tsv -o none/a.yaml": "none/a.yaml cannot be written",
        "''": "the name of a data file is empty",
    }.items():
        refused = finetune("init", *shlex.split(typed), "--model", "base")
        assert (refused.code, answer in refused.err) == (2, True), refused.err


def test_a_run_of_a_near_name_is_named_before_anything_is_imported(chat_run) -> None:
    (chat_run / "runs").mkdir()
    (chat_run / "runs/tiny").symlink_to(chat_run / "run")
    (chat_run / "runs/loop").symlink_to(".")
    near = finetune("chat", "runs/tny")
    assert near.code == 2
    assert "there is no 'tny' in the folder runs. Did you mean 'tiny'?" in near.err
    (chat_run / "Qwen/Qwen2.5-0.5B-mine").mkdir(parents=True)
    assert find_local("Qwen/Qwen2.5-0.5B") is None, (
        "a name on the hub, beside a folder of its owner"
    )
    assert "c.yaml is a file, not a model" in finetune("chat", "c.yaml").err
    assert "the name of the model is empty" in finetune("chat", "").err
    assert len(re.findall("tiny", finetune("runs", "runs").out)) == 1


def test_data_in_the_place_of_a_config(folder) -> None:
    (folder / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    refused = finetune("train", "a.jsonl")
    assert refused.code == 2
    assert "a.jsonl is data, and a config is needed. `finetune init a.jsonl` writes" in refused.err
    (folder / "my a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "`finetune init 'my a.jsonl'` writes one" in finetune("train", "my a.jsonl").err


def test_push_looks_at_the_name_and_the_file(chat_run) -> None:
    (chat_run / "a.gguf").write_text("no such thing")
    for typed, answer in {
        "noowner": "'noowner' is not a possible name on the hub",
        "a/b/c": "'a/b/c' is not a possible name",
        "'a/bad name'": "'a/bad name' is not a possible name",
        "a/b --gguf a.gguf": "a.gguf is no GGUF file",
    }.items():
        refused = finetune("push", "run", *shlex.split(typed), "--dry-run")
        assert (refused.code, answer in refused.err) == (2, True), refused.err
