"""The optimizers by name: what each is, what it takes, what it costs.

The entries themselves are in `catalogue.py`. A class is named as "module:Class" and imported when
it is first needed, so that a missing library costs a sentence and not an ImportError. Names are
looked up without torch.
"""

import contextlib
import fnmatch
import importlib
import importlib.util
import inspect
import math
import numbers
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import UserError, did_you_mean
from finetune.optim.signature import read_signature

if TYPE_CHECKING:
    import torch

SparseSupport = Literal["none", "exact", "lazy"]
"""What happens to row-sparse gradients. none: they are refused. exact: the result is that of the
dense gradient. lazy: a row without a gradient is left as it is, though the dense rule would still
move it."""

ModelKnowledge = Literal["nothing", "hidden matrices", "embeddings"]
"""What the factory must pass on about the model: which groups hold hidden matrices (Muon), or which
embeddings are row-sparse."""

GROUP_OPTIONS = ("no_decay", "overrides", "layer_decay")  # of the groups, for every optimizer
_MODULE_OPTIONS = ("embeddings",)  # they take modules, which a config cannot name


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer of the factory, with the fields of `register_optimizer`."""

    name: str
    optimizer: "type[torch.optim.Optimizer] | str"  # the class, or "module:Class"
    what: str  # one line
    paper: str  # URL
    state_bytes: float  # per parameter: a 1024 x 1024 float32 matrix, once every row was updated
    sparse: SparseSupport = "none"
    aliases: Sequence[str] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)  # defaults unlike those of the class
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what makes the rule: not an option
    fused_pays: bool = False  # torch's fused kernel is chosen if it can be
    must_know: ModelKnowledge = "nothing"
    takes_dense: bool = True  # gradients that are not row-sparse
    scale_free: bool = True  # a gradient ten times as large makes the same step, except for eps
    rule: str = ""  # the optimizer with the same result, whose checkpoints it takes; "": itself
    second_weights: bool = False  # its state holds other weights, which overwrite the parameters'

    @property
    def origin(self) -> str:
        """Where the class comes from, as "module:Class"."""
        if isinstance(self.optimizer, str):
            return self.optimizer
        return f"{self.optimizer.__module__}:{self.optimizer.__qualname__}"

    @property
    def missing(self) -> str:
        """The library to install before this one can be built, or ""."""
        if not isinstance(self.optimizer, str):
            return ""
        library = re.split("[.:]", self.optimizer)[0]
        return "" if importlib.util.find_spec(library) else library

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default, from the class's signature; none if it is missing."""
        if self.missing:
            return {}
        parameters = list(inspect.signature(self.load()).parameters.values())[1:]
        return {
            p.name: self.preset.get(p.name, p.default)
            for p in parameters
            if p.name not in self.fixed
        }

    @property
    def config_options(self) -> dict[str, Any]:
        """The options that a config can set: all but those that take modules."""
        return {k: default for k, default in self.options.items() if k not in _MODULE_OPTIONS}

    def load(self) -> "type[torch.optim.Optimizer]":
        """Return the class. Raises UserError if its library is not installed."""
        if self.missing:
            raise UserError(
                f"optimizer {self.name!r} needs {self.missing}, which is not installed. "
                f"Run: pip install {self.missing}"
            )
        if not isinstance(self.optimizer, str):
            return self.optimizer
        module, _, name = self.optimizer.partition(":")
        return getattr(importlib.import_module(module), name)


_BY_NAME: dict[str, OptimizerInfo] = {}
_BY_SPELLING: dict[str, OptimizerInfo] = {}


def register_optimizer(
    name: str, optimizer: "type[torch.optim.Optimizer] | str", **fields: Any
) -> OptimizerInfo:
    """Add an optimizer to the factory and return its entry.

    `optimizer` is a class or "module:Class"; `fields` are the others of OptimizerInfo, of which
    `what`, `paper` and `state_bytes` must be given. Raises UserError if the name or an alias is
    taken. Spellings that differ in case, dashes, spaces and underscores are one name.
    """
    info = OptimizerInfo(name, optimizer, **fields)
    spellings = {_spelling(spelling): spelling for spelling in (name, *info.aliases)}
    for key, spelling in spellings.items():
        if key in _BY_SPELLING:
            taken = _BY_SPELLING[key].name
            raise UserError(
                f"the optimizer name {spelling!r} is taken by {taken!r}. Choose another name"
            )
    _BY_NAME[name] = info
    _BY_SPELLING.update(dict.fromkeys(spellings, info))
    return info


def list_optimizers(pattern: str = "*") -> list[str]:
    """Return the names that match `pattern` (fnmatch, any case), also if a library is missing."""
    return [name for name in _BY_NAME if fnmatch.fnmatchcase(name, pattern.lower())]


def optimizer_info(name: str) -> OptimizerInfo:
    """Return the optimizer called `name`, in any spelling.

    Raises UserError with the nearest name and the list.
    """
    info = _BY_SPELLING.get(_spelling(name))
    if info is None:
        spellings = [*_BY_NAME, *(alias for info in _BY_NAME.values() for alias in info.aliases)]
        near = did_you_mean(name.lower(), spellings)
        raise UserError(
            f"there is no optimizer {name!r}; the optimizers are {', '.join(_BY_NAME)}{near}"
        )
    return info


def is_adamw(name: str) -> bool:
    """Return whether `name`, in any spelling, is AdamW, lazy or not. It may be no optimizer's."""
    info = _BY_SPELLING.get(_spelling(name))
    return info is not None and "adamw" in (info.name, info.rule)


def optimizer_table(pattern: str = "*") -> list[dict[str, str]]:
    """Return a table of the optimizers: a dict of text cells each, with the same keys in order."""
    return [_cells(optimizer_info(name)) for name in list_optimizers(pattern)]


def _cells(info: OptimizerInfo) -> dict[str, str]:
    return {
        "name": info.name,
        "what": info.what,
        "sparse gradients": info.sparse,
        "state bytes per parameter": f"{info.state_bytes:g}",
        "available": f"pip install {info.missing}" if info.missing else "yes",
        "paper": info.paper,
    }


def check_options(
    info: OptimizerInfo, options: Mapping[str, Any], *, allowed: Sequence[str]
) -> None:
    """Validate the options of an optimizer, down to their values, by building it.

    It is built over one small matrix. `allowed` are the names that the caller takes, its own
    included. Raises UserError.
    """
    info.load()  # raises if its library is not installed
    known = info.options
    for option, value in options.items():
        _check_name(info, option, value, allowed, known)
        if isinstance(value, numbers.Real) and not _is_finite(value):
            raise UserError(f"optimizer {info.name!r}: {option} is {value}. Give a finite number")
        _check_kind(info, option, value, known.get(option))
    with _refusing(info, "be built", options):
        small_optimizer(info, options)


def check_step(info: OptimizerInfo, options: Mapping[str, Any]) -> None:
    """Raise UserError if the optimizer cannot take a step with these options on this machine."""
    with _refusing(info, "step", options):
        small_optimizer(info, options).step()


def small_optimizer(info: OptimizerInfo, options: Mapping[str, Any]) -> "torch.optim.Optimizer":
    """Return the optimizer over one matrix [2, 2] with a gradient. Raises what its class raises."""
    import torch

    on_gpu = options.get("capturable") and torch.cuda.is_available()  # it needs one
    matrix = torch.nn.Parameter(torch.zeros(2, 2, device="cuda" if on_gpu else "cpu"))
    matrix.grad = torch.ones_like(matrix)
    options = {**info.preset, **info.fixed, **_values(info, options)}
    optimizer = info.load()([matrix], **options)
    if hasattr(optimizer, "train"):  # schedule-free optimizers step in this mode alone
        optimizer.train()
    return optimizer


def _values(info: OptimizerInfo, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the class takes and that are plain values."""
    takes = info.options.keys() - {*_MODULE_OPTIONS}
    return {option: value for option, value in options.items() if option in takes}


@contextlib.contextmanager
def _refusing(info: OptimizerInfo, to: str, options: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"optimizer {info.name!r} cannot {to} with {_values(info, options)}: {error}"
        ) from error


def check_names(info: OptimizerInfo, options: Mapping[str, Any]) -> None:
    """Raise UserError for an option of a config that the optimizer does not take, without torch.

    An optimizer whose source does not show what it takes passes: `check_options` sees it later.
    """
    takes = options_in_source(info) if options else []
    for option, value in options.items() if takes else ():
        if option not in _MODULE_OPTIONS:  # of which `check_optimizer` says more
            _check_name(info, option, value, [*takes, *GROUP_OPTIONS], takes)


def options_in_source(info: OptimizerInfo) -> list[str]:
    """Return the names of `info.config_options` without torch; none if the source hides them."""
    read = read_signature(info.optimizer) if isinstance(info.optimizer, str) else ()
    return [name for name in read if name not in {*info.fixed, *_MODULE_OPTIONS}]


def _check_name(
    info: OptimizerInfo,
    option: str,
    value: Any,
    allowed: Sequence[str],
    known: Collection[str],
) -> None:
    asks_nothing = option == "weight_decay" and value == 0  # of an optimizer without decay
    if option not in allowed and not asks_nothing:
        near = did_you_mean(option, [name for name in allowed if name in known])
        raise UserError(
            f"optimizer {info.name!r} does not take {option!r}; it takes {', '.join(allowed)}{near}"
        )


def _check_kind(info: OptimizerInfo, option: str, value: Any, default: Any) -> None:
    """Raise UserError if the default is a number, or several, and the value is not as many."""
    if isinstance(default, tuple) and default and all(map(_is_number, default)):
        given = value if isinstance(value, (list, tuple)) else ()
        if len(given) != len(default) or not all(map(_is_number, given)):
            raise UserError(
                f"optimizer {info.name!r}: {option} is {value!r}. "
                f"Give {len(default)} numbers, e.g. {list(default)}"
            )
    elif isinstance(default, float) and not _is_number(value):
        raise UserError(
            f"optimizer {info.name!r}: {option} is {value!r}. Give a number, e.g. {default:g}"
        )


def _is_number(value: Any) -> bool:
    import torch

    return isinstance(value, (numbers.Real, torch.Tensor)) and not isinstance(value, bool)


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def as_plain(value: Any) -> Any:
    """Return `value` with its numbers as Python's own, also within lists, tuples and dicts.

    NumPy's scalars would go into the optimizer's state, which torch.load then refuses.
    """
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(as_plain, value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _spelling(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()
