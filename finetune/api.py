"""The Python API: `train` a model, and `load` it for use. Both do what the command line does.

A mistake of the caller raises UserError, with the sentence that the command line prints.
"""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from finetune.config import RunConfig
from finetune.config.loading import make_config, read_tree, with_own_names
from finetune.config.values import expand
from finetune.display import Display
from finetune.errors import UserError, disk_refusal
from finetune.recipes.build.look import look_at, look_at_target
from finetune.run.folder import RunDir
from finetune.run.given import keep_given
from finetune.run.records import Evaluation, Evaluations, Sample, StepRecord, read_samples

if TYPE_CHECKING:
    from finetune.recipes.build.target import Opened

_DEFAULT_RUN = "runs/python"


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

    `data` and `validation`: a path, a hub name, a list of dicts, or a Dataset of `datasets`. Those
    in memory are kept in the run's folder. A mapping is the config's section `data`. The folder is
    `output_dir`, by default runs/python. `resume`: as --resume. `on_record` gets each step and each
    evaluation as it is logged. `quiet`: print nothing.

    Raises UserError for a mistake in what was given, and for a full disk.
    """
    if resume is not None and not isinstance(resume, str | PathLike):
        raise UserError(f"resume is {resume!r}. Give 'auto', or the folder of a checkpoint or run")
    if on_record is not None and not callable(on_record):
        raise UserError(f"on_record is a {type(on_record).__name__}. Give a function of a record")
    tree = with_own_names(_tree_of(config))
    _replace_keys(tree, keys)
    if isinstance(data, Mapping) and not _has_splits(data):  # the config's section, as in YAML
        for name in ("train", "validation", "test"):
            _refuse_records(name, data.get(name))
        tree["data"], data = {**(tree.get("data") or {}), **data}, None
    run = RunDir(Path(_expanded("output_dir", tree.setdefault("output_dir", _DEFAULT_RUN))))
    made = [path for path in (run.root, *run.root.parents) if not path.exists()]
    kept: list[Path] = []
    try:
        for name, given in (("train", data), ("validation", validation)):
            if given is not None:
                place = _path_of(given, run, kept, name)
                tree["data"] = {**(tree.get("data") or {}), name: place}
        settings = make_config(tree)
        look_at(settings)
        return _trained(
            settings,
            None if resume is None else _expanded("resume", resume),
            on_record,
            Display(enabled=not quiet),
        )
    except UserError as error:
        sentence = str(error)
        for path in () if run.is_run() else kept:  # it is gone when the sentence is read
            sentence = sentence.replace(str(path), "the data")
        if sentence == str(error):
            raise
        raise UserError(sentence) from error
    except OSError as error:
        if (said := disk_refusal(error)) is None:
            raise
        raise UserError(said) from error
    finally:
        if not run.is_run():  # refused before it began
            for path in kept:
                path.unlink(missing_ok=True)
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()


def load(target: "str | PathLike[str] | RunResult") -> "LoadedModel":
    """Return the model of a run, or any model by its name, ready for use.

    `target`: a RunResult, a run's folder, a model's folder, or a hub name. Raises UserError if
    there is no such model.
    """
    name = str(target.path if isinstance(target, RunResult) else target)
    look_at_target(name)
    from finetune.recipes.build.target import open_target

    return LoadedModel(open_target(name))


class LoadedModel:
    """A model in use: of a run, with its system prompt and its languages, or any other."""

    def __init__(self, opened: "Opened") -> None:
        self._opened = opened
        self.model: Any = opened.model  # of transformers, in evaluation mode
        self.tokenizer: Any = opened.tokenizer

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
        seed: int = 0,
        **settings: Any,
    ) -> str | list[str]:
        """Return the answer to a question, or the answers to several that are asked apart.

        `system`: the system prompt; None for the run's own, "" for none. `raw`: continue the text
        without the chat template. `settings`: keys of the config's section `generation`, such as
        `temperature=0.7` and `max_new_tokens=64`. Raises UserError.
        """
        from finetune.recipes.generate import answers_of

        answers = answers_of(
            self._opened, _texts(text), raw=raw, system_prompt=system, seed=seed,
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

        `source` and `to` are other languages, and `settings` are as in `chat`. Raises UserError.
        """
        from finetune.recipes.translate import translator_of

        translate = translator_of(
            self._opened, source=source, to=to, settings=settings, display=Display(enabled=False)
        )
        found = list(translate(_texts(text)))
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
        with TemporaryDirectory() as folder:
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
        return read_tree(Path(config))
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


def _refuse_records(name: str, value: Any) -> None:
    """Raise UserError if a key of the section `data` holds records in place of paths."""
    first = value[0] if isinstance(value, list | tuple) and value else None
    if isinstance(first, Mapping) and "path" not in first:
        given = {"train": "data=[…]", "validation": "validation=[…]"}.get(name, "a file")
        raise UserError(f"data[{name!r}] holds records, and it takes paths. Give them as {given}")


def _has_splits(data: Any) -> bool:
    """Return whether `datasets` made this of several datasets (DatasetDict)."""
    return isinstance(data, Mapping) and type(data).__module__.partition(".")[0] == "datasets"


def _path_of(data: Any, run: RunDir, kept: list[Path], what: str) -> str:
    """Return the path of the data. Records in memory are written into the run's folder first."""
    if isinstance(data, str | PathLike):
        return str(data)
    if _has_splits(data):
        first = next(iter(data))
        raise UserError(f"the data has splits ({', '.join(data)}). Give one, as in data[{first!r}]")
    if type(data).__module__.partition(".")[0] == "pandas":
        data = data.to_dict("records")
    if not isinstance(data, Iterable) or isinstance(data, Mapping) or not hasattr(data, "__len__"):
        raise UserError(
            f"the data is a {type(data).__name__}. Give a path, a list of dicts, or a "
            "datasets.Dataset"
        )
    path, is_new = keep_given(run, data, what)
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

    texts = [text] if isinstance(text, str) or not isinstance(text, Sequence) else list(text)
    for item in texts:
        if not isinstance(item, str):
            raise UserError(f"{item!r:.80} is a {type(item).__name__}. Give a text or several")
        require_utf8(item, "the text")
    return texts
