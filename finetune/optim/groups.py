"""Parameter groups: every trainable parameter in one, with its final learning rate and decay.

What a parameter is follows from the module that holds it, never from its name. Groups hold a final
`lr`, so that any scheduler can drive them. Layer-wise decay is BEiT's,
https://arxiv.org/abs/2106.08254, appendix.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from finetune.errors import UserError, did_you_mean

PARAMETER_KINDS = ("embedding", "norm", "bias", "weight")
"""embedding: the table of an nn.Embedding, tied to an output head or not. norm: every parameter of
a normalisation. bias: every other vector or scalar (biases, layer scales). weight: the rest. If a
parameter is of several kinds, as a tied table is, the first in this order counts."""

DEFAULT_NO_DECAY = ("bias", "norm", "embedding")

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class _Member:
    """A trainable parameter and what is known of it."""

    name: str | None
    parameter: Tensor
    kind: str = ""  # one of PARAMETER_KINDS; "" if no model was given
    hidden_matrix: bool = False  # a matrix that is neither an embedding nor the output head
    layer: int | None = None  # 0 before the blocks, then one per block, then what follows them
    given: Mapping[str, Any] = field(default_factory=dict)  # the settings of the user's own group
    number: int = 0  # of the user's own group
    part_of: str = ""  # the name of the weight whose overrides hold for this too


def is_compact(module: nn.Module) -> bool:
    """Return whether an embedding is marked `compact`: its table holds only rows that are in use.

    With `is_part_of_weight` this is all that a module can declare to this package. Those of an
    active vocabulary do (`finetune.models`).
    """
    return getattr(module, "compact", False)


def is_part_of_weight(module: nn.Module) -> bool:
    """Return whether a module is marked `is_part_of_weight`.

    What is set for its parent's `weight` then also holds for its own parameters: the shift of an
    active vocabulary goes with the table.
    """
    return getattr(module, "is_part_of_weight", False)


def build_groups(
    source: nn.Module | Iterable[Any],
    *,
    lr: float | Tensor,
    weight_decay: float | None,
    no_decay: Sequence[str] | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    layer_decay: float | None = None,
    split_matrices: bool = False,
) -> list[dict[str, Any]]:
    """Group a model's parameters for a torch optimizer.

    Each group is a dict of `params`, `name`, `lr` and, unless it is None, `weight_decay`. Frozen
    parameters are left out, and tied ones are taken once.

    Args:
        source: a model, parameters, (name, parameter) pairs or torch's group dicts. Without a model
            all of them decay, as nothing shows what they are.
        no_decay: the PARAMETER_KINDS without weight decay; None is DEFAULT_NO_DECAY for a model.
        overrides: {"pattern", "lr", "weight_decay"} dicts. The pattern is fnmatch over parameter
            names. What it sets is final, and of several that match the last wins.
        layer_decay: lr is multiplied by layer_decay ^ (number of layers from this one to the top).
        split_matrices: also set a `rule` in each group: "muon" for hidden matrices, else "adamw".
            (The output head is known if the model has get_output_embeddings.)

    Raises:
        UserError: an option is out of its range, or nothing is trainable.
    """
    check_group_options(
        no_decay=no_decay or (),
        overrides=overrides,
        layer_decay=layer_decay,
        takes_decay=weight_decay is not None,
    )
    if isinstance(source, nn.Module):
        no_decay = DEFAULT_NO_DECAY if no_decay is None else no_decay
        scales = _layer_scales(source, layer_decay)
        members = _model_members(source, find_layers(source) if scales else None)
    else:
        if no_decay is not None or layer_decay is not None:
            raise UserError(
                "no_decay and layer_decay go by the modules of a model, but only parameters were "
                "given. Give build_optimizer the model"
            )
        no_decay, scales, members = (), None, _bare_members(source)
    if not members:
        raise UserError(
            "there is nothing to train: every parameter is frozen (requires_grad=False), or none "
            "was given"
        )
    matching = _match([(member.name or "", member.part_of) for member in members], overrides)
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for member, matched in zip(members, matching):
        label, settings = _settings(member, lr, weight_decay, no_decay, scales, split_matrices)
        for override in matched:
            settings |= {key: value for key, value in override.items() if key != "pattern"}
        name = ", ".join([*label, *(override["pattern"] for override in matched)]) or "all"
        group = groups.setdefault((member.number, name), {"params": [], **settings, "name": name})
        named = member.parameter if member.name is None else (member.name, member.parameter)
        group["params"].append(named)
    return list(groups.values())


def _settings(
    member: _Member,
    lr: float | Tensor,
    weight_decay: float | None,
    no_decay: Sequence[str],
    scales: Sequence[float] | None,
    split_matrices: bool,
) -> tuple[list[str], dict[str, Any]]:
    """Return the words that name the member's group, and the settings of the group.

    The words do not depend on the settings' values, so the grouping does not either.
    """
    label = [member.given["name"]] if "name" in member.given else []
    settings: dict[str, Any] = {"lr": lr}
    if scales is not None and member.layer is not None:
        settings["lr"] = lr * scales[member.layer]
        label.append(f"layer {member.layer}")
    if weight_decay is not None:
        decays = member.kind not in no_decay
        settings["weight_decay"] = weight_decay if decays else 0.0
        if member.kind:
            label.append("decay" if decays else "no decay")
    if split_matrices and "rule" not in member.given:
        settings["rule"] = "muon" if member.hidden_matrix else "adamw"
        label.append(settings["rule"])
    return label, settings | dict(member.given)


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and module of the stack of blocks, the one outermost nn.ModuleList.

    Only lists that hold parameters count. Raises UserError if there is none, or several.
    """
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{stack}.") for stack in stacks)
        if (
            isinstance(module, nn.ModuleList)
            and not nested
            and any(True for _ in module.parameters())
        ):
            stacks[name] = module
    if len(stacks) != 1:
        found = f"several: {', '.join(stacks)}" if stacks else "none"
        raise UserError(
            "layer_decay needs a model with one stack of layers (an nn.ModuleList), and found "
            f"{found}. Set lr by overrides"
        )
    return next(iter(stacks.items()))


def _layer_scales(model: nn.Module, layer_decay: float | None) -> list[float] | None:
    """Return the factor on lr by layer, from the embedding to what follows the blocks (1.0)."""
    if layer_decay is None:
        return None
    top = len(find_layers(model)[1]) + 1
    return [layer_decay ** (top - layer) for layer in range(top + 1)]


def _model_members(model: nn.Module, stack: tuple[str, nn.ModuleList] | None) -> list[_Member]:
    """Return the trainable parameters in the model's order.

    The order shows what comes before the stack of blocks and what follows it.
    """
    kinds: dict[Tensor, str] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            kind = _kind(module, parameter)
            kinds[parameter] = min(kind, kinds.get(parameter, kind), key=PARAMETER_KINDS.index)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    parts = {
        parameter: f"{name.rpartition('.')[0]}.weight"
        for name, module in model.named_modules()
        if is_part_of_weight(module)
        for parameter in module.parameters(recurse=False)
    }
    head_parameters = set(head.parameters()) if isinstance(head, nn.Module) else set()
    members: list[_Member] = []
    layer = 0
    for name, parameter in model.named_parameters():
        if stack is not None:
            block = re.match(re.escape(stack[0]) + r"\.(\d+)\.", name)
            layer = int(block[1]) + 1 if block else (len(stack[1]) + 1 if layer else 0)
        if parameter.requires_grad:
            kind = kinds[parameter]
            hidden = kind == "weight" and parameter.ndim == 2 and parameter not in head_parameters
            place, part_of = layer if stack else None, parts.get(parameter, "")
            members.append(_Member(name, parameter, kind, hidden, place, part_of=part_of))
    return members


def _bare_members(source: Iterable[Any]) -> list[_Member]:
    """Return the trainable ones of parameters, (name, parameter) pairs or group dicts.

    A parameter that is repeated within a group counts once.
    """
    given: list[Any] = [source] if isinstance(source, (Tensor, dict)) else list(source)
    if any(isinstance(item, dict) for item in given):
        if not all(isinstance(item, dict) for item in given):
            raise UserError(
                "parameters and group dicts are mixed. Give the optimizer one or the other"
            )
        groups = [{"name": f"group {number}", **group} for number, group in enumerate(given)]
    else:
        groups = [{"params": given}]
    owner: dict[Tensor, int] = {}
    members: list[_Member] = []
    for number, group in enumerate(groups):
        settings = {
            key: value for key, value in group.items() if key not in ("params", "param_names")
        }
        items = group["params"]
        for item in [items] if isinstance(items, Tensor) else items:
            name, parameter = item if isinstance(item, tuple) else (None, item)
            if not isinstance(parameter, Tensor):
                raise UserError(
                    "an optimizer takes a model, parameters or parameter groups, but was given "
                    f"{type(parameter).__name__!r}"
                )
            if owner.get(parameter, number) != number:
                raise UserError(
                    f"a parameter is in the groups {owner[parameter]} and {number}. "
                    "Put each parameter in one group"
                )
            if parameter.requires_grad and parameter not in owner:
                matrix = parameter.ndim == 2
                members.append(
                    _Member(name, parameter, hidden_matrix=matrix, given=settings, number=number)
                )
            owner[parameter] = number
    return members


def check_group_options(
    *,
    no_decay: Sequence[str],
    overrides: Sequence[Mapping[str, Any]],
    layer_decay: float | None,
    takes_decay: bool,
) -> None:
    """Raise UserError for what is wrong with these options in any model.

    `takes_decay`: the optimizer has the option weight_decay.
    """
    if isinstance(no_decay, str):
        raise UserError(
            f"no_decay is the text {no_decay!r}. Give a list of {', '.join(PARAMETER_KINDS)}"
        )
    for kind in no_decay:
        if kind not in PARAMETER_KINDS:
            near = did_you_mean(kind, PARAMETER_KINDS)
            raise UserError(
                f"no_decay names {kind!r}; the kinds of parameter are "
                f"{', '.join(PARAMETER_KINDS)}{near}"
            )
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay is {layer_decay}; it must lie above 0 and at most at 1")
    allowed = ["pattern", "lr", "weight_decay"] if takes_decay else ["pattern", "lr"]
    for override in overrides:
        for key in override:
            if key not in allowed:
                near = did_you_mean(key, allowed)
                raise UserError(f"an override holds {key!r}; it takes {', '.join(allowed)}{near}")
            value = override[key]
            if key != "pattern" and not (isinstance(value, (int, float)) and value >= 0):
                raise UserError(
                    f"the override {dict(override)} sets {key} to {value!r}. "
                    "Give a number from 0 up"
                )
        if "pattern" not in override or len(override) < 2:
            raise UserError(
                f"the override {dict(override)} needs a pattern and something to set: "
                f"{', '.join(allowed[1:])}"
            )


def _kind(module: nn.Module, parameter: Tensor) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    # transformers' models have norms of their own: LlamaRMSNorm, T5LayerNorm ...
    own_norm = parameter.ndim <= 1 and any(
        re.search(r"Norm(\dd)?$", base.__name__) for base in type(module).__mro__
    )
    if isinstance(module, _NORMS) or own_norm:
        return "norm"
    return "bias" if parameter.ndim <= 1 else "weight"


def _match(
    members: Sequence[tuple[str, str]], overrides: Sequence[Mapping[str, Any]]
) -> list[list[Mapping[str, Any]]]:
    """Return, for each member, the overrides whose pattern matches one of its names.

    Raises UserError for an override that matches nothing.
    """
    matching: list[list[Mapping[str, Any]]] = [[] for _ in members]
    for override in overrides:
        pattern = override["pattern"]
        hits = [
            index
            for index, names in enumerate(members)
            if any(fnmatch.fnmatchcase(name, pattern) for name in names)
        ]
        if not hits:
            names = [name for name, _ in members]
            near = did_you_mean(pattern, names) or (
                f"; one of them is {names[0]!r}" if names[0] else "; these have no names"
            )
            raise UserError(
                f"the override pattern {pattern!r} matches no trainable parameter{near}"
            )
        for index in hits:
            matching[index].append(override)
    return matching
