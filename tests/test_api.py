"""The Python API: data in memory, results, mistakes, and a format of one's own."""

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest

import finetune
from finetune import RunResult, UserError
from finetune.data import register_format
from finetune.data.formats import detect
from finetune.data.formats.text import TextFormat
from finetune.run.records import Evaluation, StepRecord
from tests.conftest import LLAMA as SMALL
from tests.conftest import conversation

LLAMA = SMALL | {"max_position_embeddings": 512}
KEYS: dict[str, Any] = {
    "model": {"config": LLAMA, "tokenizer": {"vocab_size": 300}},
    "training": {"max_steps": 4, "batch_size": 4, "precision": "fp32"},
    "optimizer": {"lr": 3e-3},
    "evaluation": {"samples": 2, "generate": 0, "every": 10},
    "generation": {"max_new_tokens": 4},
}
ROWS = [conversation(n) for n in range(48)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    root = tmp_path_factory.mktemp("api")
    return finetune.train(data=ROWS, output_dir=str(root / "run"), quiet=True, **KEYS)


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    root = tmp_path_factory.mktemp("api")
    pairs = [{"en": f"the word {n}", "fr": f"le mot {n}"} for n in range(40)]
    return finetune.train(data=pairs, output_dir=str(root / "run"), quiet=True, **KEYS)


def test_a_result_has_paths_metrics_samples_and_how_it_ended(trained: RunResult) -> None:
    assert trained.stopped == "finished"
    assert trained.model_path == trained.path / "model"
    assert (trained.path / "model/model.safetensors").is_file()
    assert 0 < trained.metrics["loss"] < trained.metrics_before["loss"]
    assert {sample.step for sample in trained.samples} == {0, 4}
    assert trained._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(AttributeError):
        trained.stopped = "signal"  # type: ignore[misc]


def test_data_may_be_a_list_a_dataset_or_a_path(trained: RunResult, folder: Path, capfd) -> None:
    seen: list[StepRecord | Evaluation] = []
    dataset = datasets.Dataset.from_list(ROWS)
    one = finetune.train(data=dataset, output_dir="one", on_record=seen.append, quiet=True, **KEYS)
    assert capfd.readouterr() == ("", "")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    two = finetune.train(data=Path("rows.jsonl"), output_dir="two", quiet=True, **KEYS)
    assert one.metrics["loss"] == two.metrics["loss"] == trained.metrics["loss"]
    assert [record.step for record in seen if isinstance(record, StepRecord)] == [1, 2, 3, 4]
    assert [record.step for record in seen if isinstance(record, Evaluation)] == [0, 4]


def test_a_config_may_be_a_file_a_mapping_or_keywords(trained: RunResult, folder: Path) -> None:
    Path("my.yaml").write_text(json.dumps({**KEYS, "data": {"train": "rows.jsonl"}}))
    named = finetune.train("my.yaml", data=ROWS, training={"max_steps": 2}, quiet=True)
    assert named.path == Path("runs/my")
    assert named.samples[-1].step == 2
    again = finetune.train(finetune.load_config(Path("my.yaml")), data=ROWS, quiet=True,
                           output_dir="again")  # fmt: skip
    mapped = finetune.train({**KEYS, "output_dir": "mapped"}, data=ROWS, quiet=True)
    assert again.metrics["loss"] == mapped.metrics["loss"] == trained.metrics["loss"]
    other = finetune.train(data=ROWS, quiet=True, learning_rate=1e-3,
                           **{**KEYS, "optimizer": {}, "output_dir": "other"})  # fmt: skip
    assert other.metrics["loss"] != trained.metrics["loss"]


def test_another_tools_name_replaces_the_configs_own_key(folder: Path) -> None:
    config = {**KEYS, "num_epochs": 7, "scheduler": {"lr_scheduler_type": "cosine"}}
    keys = {"data": ROWS, "quiet": True, "learning_rate": 1e-3, "num_train_epochs": 2,
            "scheduler": {"name": "constant"}}  # fmt: skip
    result = finetune.train(config, output_dir="run", **keys)
    made = finetune.load_config(result.path / "config.yaml")
    assert (made.optimizer.lr, made.training.epochs) == (1e-3, 2)
    assert made.scheduler.name == "constant"
    assert config["optimizer"] == {"lr": 3e-3}, "the caller's mapping is left alone"
    again = finetune.train(made, output_dir="again", max_steps=3, data=ROWS, quiet=True)
    assert again.samples[-1].step == 3


def test_paths_are_written_out_as_in_a_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("RUNS", str(folder / "home"))
    result = finetune.train(data=ROWS, output_dir="~/run", quiet=True, **KEYS)
    assert result.path == folder / "home" / "run"
    assert [path.name for path in folder.iterdir()] == ["home"]
    more = {**KEYS, "training": {**KEYS["training"], "max_steps": 5}}
    on = finetune.train(data=ROWS, output_dir="$RUNS/other", resume="~/run", quiet=True, **more)
    assert on.samples[-1].step == 5
    assert finetune.load("~/run").chat("Hello") == finetune.load(result).chat("Hello")
    with pytest.raises(UserError, match=r"output_dir: .* variable that is not set"):
        finetune.train(data=ROWS, output_dir="$NO_SUCH/run", quiet=True, **KEYS)


def test_records_in_memory_are_kept_for_a_resume(folder: Path) -> None:
    first = finetune.train(data=ROWS, output_dir="run", quiet=True, **KEYS)
    more = {**KEYS, "training": {**KEYS["training"], "max_steps": 6}}
    on = finetune.train(data=ROWS, output_dir="run", resume="auto", quiet=True, **more)
    assert on.samples[-1].step == 6
    assert len(list(first.path.glob("train-*.jsonl"))) == 1
    with pytest.raises(UserError, match="holds a run already"):
        finetune.train(data=ROWS, output_dir="run", quiet=True, **KEYS)
    assert on.model_path is not None
    assert (on.model_path / "config.json").is_file()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"data": None}, "'data' is missing"),
    "a section": ({"data": {"max_len": 3, "train": "a"}}, "'max_len' is not a key"),
    "a number": ({"data": 3}, "the data is a int"),
    "a generator": ({"data": iter(ROWS)}, "Give a path, a list of dicts"),
    "no mappings": ({"data": ["a"]}, "record 1 of the data is a str"),
    "nothing": ({"data": []}, "the data has no records"),
    "no JSON": ({"data": [{"prompt": object(), "completion": "b"}]}, "cannot be kept as JSON"),
    "half a character": (
        {"data": [{"prompt": "a\ud83d", "completion": "b"}] * 9},
        r"column 'prompt' of record 1 has half of a surrogate pair, '\\ud83d'",
    ),
    "no value": ({"data": [{"prompt": float("nan"), "completion": "b"}] * 9}, "not None"),
    "a number as an answer": (
        {"data": [{"prompt": "a", "completion": 3}] * 9},
        "the data lines 1, 2, 3, 4, 5, 6, 7, 8, 9: 'completion' must be text or a list",
    ),
    "splits": (
        {"data": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))},
        r"the data has splits \(train\). Give one, as in data\['train'\]",
    ),
    "records in a section": ({"data": {"train": ROWS}}, "Give them as data="),
    "many mistakes": (
        {"nothing": 1, **{f"key{n}": 1 for n in range(99)}},
        "There are 88 more mistakes",
    ),
    "a switch": ({"resume": True}, "resume is True. Give 'auto'"),
    "no function": ({"on_record": 3}, "on_record is a int. Give a function"),
    "other columns": ({"data": [{"a": "b"}]}, "no format fits the columns"),
    "no such key": ({"trainning": {}}, "'trainning' is not a key"),
    "a wrong value": ({"training": {"epochs": -1}}, "training.epochs = -1 is not allowed"),
    "an optimizer": ({"optimizer": {"name": "adamww"}}, "Did you mean 'adamw'"),
    "a model": ({"model": "./none"}, "the model folder ./none does not exist"),
    "a file": ({"data": "none.jsonl"}, "there is no file or folder 'none.jsonl'"),
    "a config": ({"config": 7}, "config is a int"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_user_error_and_leaves_nothing(name: str, folder: Path) -> None:
    changes, says = MISTAKES[name]
    with pytest.raises(UserError, match=says):
        finetune.train(**{"data": ROWS, "quiet": True, **KEYS, **changes})
    assert list(folder.iterdir()) == []


def test_dates_and_empty_cells_of_other_columns_are_kept(folder: Path) -> None:
    rows = [{**row, "when": date(2020, 1, 2), "score": float("nan")} for row in ROWS]
    result = finetune.train(data=rows, output_dir="run", quiet=True, **KEYS)
    (kept,) = result.path.glob("train-*.jsonl")
    first = json.loads(kept.read_text().splitlines()[0])
    assert (first["when"], first["score"]) == ("2020-01-02", None)


def test_a_data_frame_is_a_list_of_its_rows(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")  # a dependency of datasets
    frame = pandas.DataFrame([{"prompt": f"{n} + 1?", "completion": str(n + 1)} for n in range(48)])
    assert finetune.train(data=frame, quiet=True, **KEYS).stopped == "finished"


def test_what_a_loaded_run_does_not_take_is_said(trained: RunResult) -> None:
    model = finetune.load(trained)
    with pytest.raises(UserError, match="the text is not UTF-8 text"):
        model.chat("caf\udce9")
    with pytest.raises(UserError, match=r"keys there are max_new_tokens.* mean 'max_new_tokens'"):
        model.chat("hi", max_tokens=3)


def test_a_loaded_run_chats_and_evaluates(trained: RunResult) -> None:
    model = finetune.load(trained)
    answer = model.chat("What is 1 plus 1?")
    assert isinstance(answer, str)
    assert model.chat(["What is 1 plus 1?", " "]) == [answer, ""]
    assert model.chat("Hm?", system="Be brief.", temperature=1.0, seed=3, max_new_tokens=2)
    assert model.evaluate()["loss"] == pytest.approx(trained.metrics["loss"], abs=1e-5)
    on_all = model.evaluate(ROWS)
    assert on_all["num_records"] == 48
    assert finetune.load(trained.path).evaluate(ROWS)["loss"] == on_all["loss"]
    plain = finetune.load(str(trained.model_path))
    # without a config its products are in bf16, where the chip has them
    assert plain.evaluate(ROWS)["loss"] == pytest.approx(on_all["loss"], rel=1e-3)
    with pytest.raises(UserError, match="Give data"):
        plain.evaluate()
    with pytest.raises(UserError, match="is a int"):
        model.chat(3)  # type: ignore[call-overload]
    with pytest.raises(UserError, match="temperature"):
        model.chat("Hm?", temperature=-1)
    with pytest.raises(UserError, match="does not exist"):
        finetune.load("./none")


def test_a_loaded_run_translates(translator: RunResult) -> None:
    model = finetune.load(translator)
    many = model.translate(["the word 3", ""])
    assert many[1] == ""
    assert model.translate("the word 3") == many[0]
    with pytest.raises(UserError, match="languages are not known"):
        finetune.load(str(translator.model_path)).translate("Hm")


class Shouted:
    """A format whose record is one text, learnt in capitals."""

    name = "shouted"

    def __init__(self, tokenizer: Any) -> None:
        self._text = TextFormat(tokenizer=tokenizer, columns={})

    def examples(self, record):
        return self._text.examples({"text": record["shout"].upper()})

    def prompts(self, record):
        return []

    def notes(self):
        return []

    common_system_prompt = None


@pytest.fixture
def registered() -> Iterator[None]:
    register_format("shouted", lambda tokenizer, wishes: Shouted(tokenizer), columns=["shout"])
    yield
    del detect._REGISTERED["shouted"]


def test_a_format_of_ones_own(registered: None, folder: Path) -> None:
    rows = [{"shout": f"the word {n} is said"} for n in range(40)]
    result = finetune.train(data=rows, output_dir="run", quiet=True, **KEYS)
    assert json.loads((result.path / "data.json").read_text())["format"] == "shouted"
    with pytest.raises(UserError, match=r"needs shout\. Set data\.columns"):
        finetune.train({**KEYS, "data": {"format": "shouted"}}, data=ROWS, quiet=True)
    with pytest.raises(UserError, match="is taken"):
        register_format("shouted", lambda tokenizer, wishes: Shouted(tokenizer), columns=["a"])
    with pytest.raises(UserError, match="is taken"):
        register_format("chat", lambda tokenizer, wishes: Shouted(tokenizer), columns=["a"])


def test_a_format_that_is_not_registered(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.format is 'shouted'; the formats are auto, chat"):
        finetune.train({**KEYS, "data": {"format": "shouted"}}, data=ROWS, quiet=True)
