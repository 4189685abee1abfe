"""The Python API: `train` a model, and `load` it for use. Both do what the command line does.

A mistake of the caller raises UserError, with the sentence that the command line prints.
"""

import html
import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from finetune.config import RunConfig
from finetune.config.loading import make_config, read_tree, with_own_names
from finetune.config.schema import DataSection, SourceSection
from finetune.config.values import expand
from finetune.display import Display
from finetune.errors import UserError, disk_refusal
from finetune.recipes.build.look import look_at, look_at_target
from finetune.run.folder import RunDir
from finetune.run.given import has_splits, keep_given, not_taken, records_of
from finetune.run.records import Evaluation, Evaluations, Sample, StepRecord, read_samples
from finetune.run.turns import TURNS

if TYPE_CHECKING:
    from finetune.recipes.build.target import Opened

_DEFAULT_RUN = "runs/python"
_OF_SOURCES = set(SourceSection.model_fields)


@dataclass(frozen=True)
class RunResult:
    """What a call of `train` left. In a notebook it shows the run's report."""

    path: Path  # the run's folder
    model_path: Path | None  # a plain Hugging Face folder; None if the run was stopped by a signal
    stopped: Literal["finished", "early stopping", "signal"]
    metrics: Mapping[str, Any] = field(default_factory=dict)  # on held-out data, of model_path
    metrics_before: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()  # answers to held-out prompts, of every evaluation

    @property
    def report_path(self) -> Path:
        """The page that shows the run."""
        return RunDir(self.path).report

    def _repr_html_(self) -> str:
        page = self.report_path
        if not page.is_file():
            return f"<p>the run {html.escape(str(self.path))} has no report yet</p>"
        source = html.escape(page.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{source}" style="width:100%;height:640px;border:0"></iframe>'


def train(
    config: RunConfig | Mapping[str, Any] | str | PathLike[str] | None = None,
    *,
    data: Any = None,
    validation: Any = None,
    resume: str | PathLike[str] | None = None,
    on_record: Callable[[StepRecord | Evaluation], None] | None = None,
    quiet: bool = False,
    **keys: Any,
) -> RunResult:
    """Fine-tune a model as `finetune train` does, and return what came of it.

    `config`: a YAML file, a mapping with the same keys, or a RunConfig. `keys` are keys of the
    config that replace its own: `model="Qwen/Qwen2.5-0.5B"`, `training={"epochs": 1}`, or other
    tools' names such as `learning_rate=1e-4`.

    `data` and `validation`: a path, a hub name, a list of dicts, a DataFrame of pandas, or a
    Dataset of `datasets`. Those in memory are kept in the run's folder. A mapping is the config's
    section `data`. The folder is `output_dir`, by default runs/python, or runs/NAME for
    NAME.yaml. `resume`: as --resume.
    `on_record` gets each step and each evaluation as it is logged. `quiet`: print nothing.

    Raises UserError for a mistake in what was given, for a full disk, and if another call trains in
    this process: torch's random state is that of the process.
    """
    if resume is not None and not isinstance(resume, str | PathLike):
        raise UserError(f"resume is {resume!r}. Give 'auto', or the folder of a checkpoint or run")
    if on_record is not None and not callable(on_record):
        raise UserError(f"on_record is a {type(on_record).__name__}. Give a function of a record")
    _switch("quiet", quiet)
    tree = with_own_names(_with_texts(_tree_of(config)))
    _replace_keys(tree, _with_texts(keys))
    if isinstance(data, Mapping) and not has_splits(data):  # the config's section, as in YAML
        _refuse_records(data)
        tree["data"], data = {**(tree.get("data") or {}), **_with_texts(data)}, None
    place = tree.setdefault("output_dir", _DEFAULT_RUN)
    if isinstance(place, str) and not place.strip():
        raise UserError(f"output_dir is {place!r}, which names no folder. Name one, such as runs/a")
    run = RunDir(Path(_expanded("output_dir", place)))
    began_at = None if resume is None else _expanded("resume", resume)
    with TURNS.training(), _leaving_nothing(run) as kept:
        for name, given in (("train", data), ("validation", validation)):
            if given is not None:
                path = _path_of(given, run, kept, name)
                tree["data"] = {**(tree.get("data") or {}), name: path}
        settings = make_config(tree)
        look_at(settings)
        return _trained(settings, began_at, on_record, Display(enabled=not quiet))


@contextmanager
def _leaving_nothing(run: RunDir) -> Iterator[list[Path]]:
    """Delete the files in the yielded list if a run is refused before it has taken them.

    Raises UserError also for a disk that refuses.
    """
    made = [path for path in (run.root, *run.root.parents) if not path.exists()]
    kept: list[Path] = []
    try:
        yield kept
    except UserError as error:
        sentence = str(error)
        for path in not_taken(run, kept):  # it is gone when the sentence is read
            sentence = sentence.replace(str(path), "the data")
        if sentence == str(error):
            raise
        raise UserError(sentence) from error
    except OSError as error:
        if (said := disk_refusal(error)) is None:
            raise
        raise UserError(said) from error
    finally:
        for path in not_taken(run, kept):
            path.unlink(missing_ok=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def load(target: "str | PathLike[str] | RunResult") -> "LoadedModel":
    """Return the model of a run, or any model by its name, ready for use.

    `target`: a RunResult, a run's folder, a model's folder, or a hub name. Raises UserError if
    there is no such model.
    """
    given = target.path if isinstance(target, RunResult) else target
    if not isinstance(given, str | PathLike):
        raise UserError(
            f"{given!r:.80} is a {type(given).__name__}. Give a RunResult, a run's or a model's "
            "folder, or a hub name"
        )
    name = _expanded("the model", given)
    if name and (place := Path(name)).exists():
        name = str(place.absolute())  # it stays the same if the current folder changes
    look_at_target(name)
    from finetune.recipes.build.target import open_target

    return LoadedModel(open_target(name))


class LoadedModel:
    """A model in use: of a run, with its system prompt and its languages, or any other.

    Threads may share it: its methods take turns.
    """

    def __init__(self, opened: "Opened") -> None:
        self._opened = opened
        self._turn = threading.RLock()  # an evaluation changes modes and modules of the model
        self.model: Any = opened.model  # of transformers, in evaluation mode
        self.tokenizer: Any = opened.tokenizer

    def __reduce__(self) -> tuple[type, tuple["Opened"]]:
        return LoadedModel, (self._opened,)

    @overload
    def chat(self, text: str, **options: Any) -> str: ...
    @overload
    def chat(self, text: Sequence[str], **options: Any) -> list[str]: ...
    def chat(
        self,
        text: str | Sequence[str],
        *,
        system: str | None = None,
        raw: bool = False,
        seed: int | None = 0,
        **settings: Any,
    ) -> str | list[str]:
        """Return the answer to a question, or the answers to several that are asked apart.

        `system`: the system prompt; None for the run's own, "" for none. `raw`: continue the text
        without the chat template. `seed`: a whole number, or None for another answer each time.
        `settings`: keys of the config's section `generation`, such as `temperature=0.7` and
        `max_new_tokens=64`. A control token that the text spells out, such as <|im_end|>, is plain
        text within the chat template. Raises UserError.
        """
        from finetune.recipes.generate import answers_of

        texts, seed = _texts(text), _seed(seed)
        _text("system", system)
        _switch("raw", raw)
        with self._turn:
            answers = answers_of(
                self._opened, texts, called="text", raw=raw, system_prompt=system, seed=seed,
                settings=settings, display=Display(enabled=False),
            )  # fmt: skip
            found = [answer for _, answer in answers]
        return found[0] if isinstance(text, str) else found

    @overload
    def translate(self, text: str, **options: Any) -> str: ...
    @overload
    def translate(self, text: Sequence[str], **options: Any) -> list[str]: ...
    def translate(
        self,
        text: str | Sequence[str],
        *,
        source: str | None = None,
        to: str | None = None,
        **settings: Any,
    ) -> str | list[str]:
        """Return the translation of a sentence, or of several. The languages are the run's own.

        `source` and `to` are other languages, and `settings` are as in `chat`. It warns if the run
        did not learn this direction. Raises UserError.
        """
        from finetune.recipes.translate import translator_of

        texts, said = _texts(text), list[str]()
        _text("source", source)
        _text("to", to)
        with self._turn:
            translate = translator_of(
                self._opened, source=source, to=to, settings=settings,
                display=Display(enabled=False), note=said.append,
            )  # fmt: skip
            for sentence in said:
                warnings.warn(sentence, stacklevel=2)
            found = list(translate(texts))
        return found[0] if isinstance(text, str) else found

    def evaluate(self, data: Any = None) -> dict[str, Any]:
        """Return the metrics on `data`, which is given as to `train`.

        By default it is the test data or the held-out data of the run. Raises UserError.
        """
        from tempfile import TemporaryDirectory

        from finetune.recipes.evaluate import evaluate_opened

        config = self._opened.config
        if config is None and data is None:
            raise UserError("this model is not of a run, so its data is not known. Give data")
        with TURNS.evaluating(), self._turn, TemporaryDirectory() as folder:
            tree: dict[str, Any] = {"model": {"name": str(self.model.name_or_path)}, "data": {}}
            tree = {"output_dir": folder, **tree} if config is None else _tree_of(config)
            if data is not None:
                path = _path_of(data, RunDir(Path(folder)), [], "test")
                tree["data"] |= {"test": path, "train": path}
            return evaluate_opened(self._opened, make_config(tree), Display(enabled=False))


def _tree_of(config: Any) -> dict[str, Any]:
    """Return the keys of a config as a tree, which may still lack some of them."""
    if config is None:
        return {}
    if isinstance(config, RunConfig):
        return config.model_dump(mode="json")
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str | PathLike):
        return read_tree(Path(_expanded("config", config)))
    raise UserError(
        f"config is a {type(config).__name__}. Give a YAML file, a mapping, or a RunConfig"
    )


def _replace_keys(tree: dict[str, Any], keys: Mapping[str, Any]) -> None:
    """Put keys of the config, or other tools' names of them, in the place of the tree's own."""
    for key, value in with_own_names(keys).items():
        own = tree.get(key)
        short = {"model": "name", "data": "train"}.get(key)
        value = {short: value} if short and isinstance(value, str) else value
        if isinstance(own, Mapping) and isinstance(value, Mapping):
            value = {**own, **value}
        tree[key] = value


def _expanded(key: str, path: Any) -> str:
    """Return a path as a config has it, with ~ and a variable written out. Raises UserError."""
    try:
        return expand(str(path))
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def _with_texts(value: Any) -> Any:
    """Return a tree with a text in the place of each path in it."""
    if isinstance(value, PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        return {key: _with_texts(item) for key, item in value.items()}
    return [_with_texts(item) for item in value] if isinstance(value, list | tuple) else value


def _refuse_records(section: Mapping[str, object]) -> None:
    """Raise UserError if a mapping is no section `data` of paths, but holds records."""
    columns = [name for name in section if name not in DataSection.model_fields]
    columns += ["translation"] if isinstance(section.get("translation"), list) else []
    is_table = not section.keys() & {"train", "validation", "test"}
    if is_table and columns and all(isinstance(section[name], list | tuple) for name in columns):
        raise UserError(
            f"the data is a mapping of columns ({', '.join(map(repr, columns))}). Give a list of "
            "dicts, one for each record"
        )
    for name in ("train", "validation", "test"):
        value = section.get(name)
        first = value[0] if isinstance(value, list | tuple) and value else None
        if isinstance(first, Mapping) and "path" not in first:
            given = {"train": "data=[…]", "validation": "validation=[…]"}.get(name, "a file")
            raise UserError(f"data[{name!r}] holds records, and it takes paths. Give {given}")


def _path_of(data: Any, run: RunDir, kept: list[Path], what: str) -> str:
    """Return the path of the data. Records in memory are written into the run's folder first."""
    if isinstance(data, str | PathLike):
        return os.fsdecode(data)
    first = data[0] if isinstance(data, list | tuple) and data else None
    if isinstance(first, Mapping) and "path" in first and first.keys() <= _OF_SOURCES:
        raise UserError(
            "the data is a list of sources with paths, and not of records. "
            + ("Give one path" if what == "test" else f"Give it as data={{{what!r}: […]}}")
        )
    path, is_new = keep_given(run, records_of(data), what)
    kept += [path] if is_new else []
    return str(path)


def _trained(
    settings: RunConfig, resume: str | None, on_record: Any, display: Display
) -> RunResult:
    from finetune.recipes.train.train import run_training

    stopped = run_training(settings, resume=resume, listener=on_record, display=display)
    run = RunDir(settings.output_dir)
    done = stopped != "signal"
    summary = Evaluations.read(run) if done else Evaluations()
    return RunResult(
        path=run.root,
        model_path=run.model if done else None,
        stopped=stopped,
        metrics=summary.after.metrics if summary.after else {},
        metrics_before=summary.before.metrics if summary.before else {},
        samples=tuple(read_samples(run)[0]),
    )


def _texts(text: str | Sequence[str]) -> list[str]:
    """Return the texts. Raises UserError for anything else."""
    from finetune.recipes.build.target import require_utf8

    is_one = isinstance(text, str | bytes | bytearray) or not isinstance(text, Sequence)
    texts: list[Any] = [text] if is_one else list(text)
    for item in texts:
        if not isinstance(item, str):
            raise UserError(f"{item!r:.80} is a {type(item).__name__}. Give a text or several")
        require_utf8(item, "the text")
    return texts


def _text(name: str, value: object) -> None:
    """Raise UserError unless an argument is a text that can be read, or None."""
    from finetune.recipes.build.target import require_utf8

    if value is not None and not isinstance(value, str):
        raise UserError(f"{name} is {value!r:.80}, of type {type(value).__name__}. Give a text")
    require_utf8(value or "", name)


def _switch(name: str, value: object) -> None:
    """Raise UserError unless an argument is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r:.80}. Give True or False")


def _seed(value: Any) -> int | None:
    """Return a seed as a plain number. Raises UserError for one that `--seed` refuses."""
    if value is None:
        return None
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << 32:
        raise UserError(
            f"seed is {value!r:.80}. Give a whole number from 0 to {(1 << 32) - 1:,}, or None for "
            "another answer each time"
        )
    return number
