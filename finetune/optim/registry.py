"""The optimizers by name: what each is, what it takes, what it costs.

Floor 1. The rows themselves stand in `catalogue.py`. A class is named as "module:Class" and imported when it is first needed,
so that a library that is not installed costs a sentence and not an ImportError.
"""

import fnmatch
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from finetune.errors import UserError, did_you_mean

SparseSupport = Literal["none", "exact", "lazy"]
"""What happens to row-sparse gradients. none: refused. exact: the result is that of the dense gradient. lazy: a row without a
gradient is left as it is, where the dense rule would still move it."""

ModelKnowledge = Literal["nothing", "hidden matrices", "embeddings"]
"""What the factory must tell the class about the model: which groups hold hidden matrices (Muon), which embeddings are
row-sparse."""


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer of the factory."""

    name: str
    what: str  # one line
    paper: str  # URL
    optimizer: type[torch.optim.Optimizer] | str  # the class, or "module:Class"
    sparse: SparseSupport
    state_bytes: float  # optimizer state, bytes per parameter, for a 1024 x 1024 matrix in fp32 once every row has been updated
    aliases: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(
        default_factory=dict
    )  # defaults that differ from the class's own
    fixed: Mapping[str, Any] = field(
        default_factory=dict
    )  # arguments that make the rule what its name says: no options
    fused_pays: bool = False  # torch's fused kernel is chosen where it can be
    must_know: ModelKnowledge = "nothing"
    takes_dense: bool = True  # gradients that are not row-sparse
    scale_free: bool = True  # a gradient ten times as large makes the same step, but for eps
    second_weights: bool = False  # its state holds weights beside the parameters', which forget what others write into these

    @property
    def origin(self) -> str:
        """Where the class comes from, as "module:Class"."""
        return (
            self.optimizer
            if isinstance(self.optimizer, str)
            else f"{self.optimizer.__module__}:{self.optimizer.__qualname__}"
        )

    @property
    def missing(self) -> str:
        """The library to install before this one can be built, or ""."""
        if not isinstance(self.optimizer, str):
            return ""
        library = re.split("[.:]", self.optimizer)[0]
        return "" if importlib.util.find_spec(library) else library

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default, from the class's signature. Empty while the library is missing."""
        if self.missing:
            return {}
        parameters = list(inspect.signature(self.load()).parameters.values())[1:]
        return {
            p.name: self.preset.get(p.name, p.default)
            for p in parameters
            if p.name not in self.fixed
        }

    def load(self) -> type[torch.optim.Optimizer]:
        """The class. Raises UserError where its library is not installed."""
        if self.missing:
            raise UserError(
                f"optimizer {self.name!r} needs {self.missing}, which is not installed; pip install {self.missing}"
            )
        if not isinstance(self.optimizer, str):
            return self.optimizer
        module, _, name = self.optimizer.partition(":")
        return getattr(importlib.import_module(module), name)


_BY_NAME: dict[str, OptimizerInfo] = {}
_BY_SPELLING: dict[str, OptimizerInfo] = {}


def register_optimizer(
    name: str,
    optimizer: type[torch.optim.Optimizer] | str,
    *,
    what: str,
    paper: str,
    state_bytes: float,
    sparse: SparseSupport = "none",
    aliases: Sequence[str] = (),
    preset: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    fused_pays: bool = False,
    must_know: ModelKnowledge = "nothing",
    takes_dense: bool = True,
    scale_free: bool = True,
    second_weights: bool = False,
) -> OptimizerInfo:
    """Add an optimizer to the factory, a class or "module:Class"; the fields are those of OptimizerInfo.

    Raises UserError where the name, or an alias, is taken (spellings that differ in case, dashes, spaces and underscores are
    one name).
    """
    info = OptimizerInfo(
        name=name,
        what=what,
        paper=paper,
        optimizer=optimizer,
        sparse=sparse,
        state_bytes=state_bytes,
        aliases=tuple(aliases),
        preset=preset or {},
        fixed=fixed or {},
        fused_pays=fused_pays,
        must_know=must_know,
        takes_dense=takes_dense,
        scale_free=scale_free,
        second_weights=second_weights,
    )
    spellings = {_spelling(spelling): spelling for spelling in (name, *aliases)}
    for key, spelling in spellings.items():
        if key in _BY_SPELLING:
            taken = _BY_SPELLING[key].name
            raise UserError(
                f"the optimizer name {spelling!r} is taken by {taken!r}; choose another name"
            )
    _BY_NAME[name] = info
    _BY_SPELLING.update(dict.fromkeys(spellings, info))
    return info


def list_optimizers(pattern: str = "*") -> list[str]:
    """The names that match `pattern` (fnmatch, any case), those whose library is missing included."""
    return [name for name in _BY_NAME if fnmatch.fnmatchcase(name, pattern.lower())]


def optimizer_info(name: str) -> OptimizerInfo:
    """The optimizer called `name`, in any spelling. Raises UserError with the nearest name and the list."""
    info = _BY_SPELLING.get(_spelling(name))
    if info is None:
        spellings = [*_BY_NAME, *(alias for info in _BY_NAME.values() for alias in info.aliases)]
        near = did_you_mean(name.lower(), spellings) or ";"
        raise UserError(
            f"there is no optimizer {name!r}{near} the optimizers are {', '.join(_BY_NAME)}"
        )
    return info


def optimizer_table(pattern: str = "*") -> list[dict[str, str]]:
    """The rows of `finetune optimizers`, one dict of text cells per optimizer, columns in the order of the keys."""
    return [_row(optimizer_info(name)) for name in list_optimizers(pattern)]


def _row(info: OptimizerInfo) -> dict[str, str]:
    return {
        "name": info.name,
        "what": info.what,
        "sparse gradients": info.sparse,
        "state bytes per parameter": f"{info.state_bytes:g}",
        "available": f"pip install {info.missing}" if info.missing else "yes",
        "paper": info.paper,
    }


def check_options(
    info: OptimizerInfo, options: Mapping[str, Any], *, also_taken: Sequence[str] = ()
) -> None:
    """Validate the options of an optimizer, down to their values, by building it over one small matrix.

    `also_taken` names options that are the factory's and not the class's. Raises UserError.
    """
    optimizer, known = info.load(), info.options
    allowed = [*known, *also_taken]
    for option, value in options.items():
        if option not in allowed and not (
            option == "weight_decay" and value == 0
        ):  # 0 asks nothing of one that has no decay
            near = did_you_mean(option, known) or ";"
            raise UserError(
                f"optimizer {info.name!r} does not take {option!r}{near} it takes {', '.join(allowed)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"optimizer {info.name!r}: {option} is {value}; give a finite number")
        _check_kind(info, option, value, known.get(option))
    values = {
        option: value
        for option, value in options.items()
        if option in known and option != "embeddings"
    }
    try:
        optimizer(
            [torch.nn.Parameter(torch.zeros(2, 2))], **{**info.preset, **info.fixed, **values}
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"optimizer {info.name!r} cannot be built with {values}: {error}"
        ) from error


def _check_kind(info: OptimizerInfo, option: str, value: Any, default: Any) -> None:
    """Where the default is a number, or several, the value must be as many."""
    if isinstance(default, tuple) and default and all(map(_is_number, default)):
        if not (
            isinstance(value, (list, tuple))
            and len(value) == len(default)
            and all(map(_is_number, value))
        ):
            raise UserError(
                f"optimizer {info.name!r}: {option} is {value!r}; give {len(default)} numbers, e.g. {list(default)}"
            )
    elif isinstance(default, float) and not _is_number(value):
        raise UserError(
            f"optimizer {info.name!r}: {option} is {value!r}; give a number, e.g. {default:g}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)


def _spelling(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()
