"""Parameter groups: every trainable parameter in exactly one, with its final learning rate and weight decay.

Floor 1. What a parameter is follows from the module that holds it, never from its name. Groups hold a final `lr` (layer-wise
decay is BEiT's, https://arxiv.org/abs/2106.08254, appendix), so that any scheduler can drive them.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from finetune.errors import UserError, did_you_mean

KINDS = ("embedding", "norm", "bias", "weight")
"""embedding: the table of an nn.Embedding, tied to an output head or not. norm: every parameter of a normalisation. bias: every
other vector or scalar (biases, layer scales). weight: the rest. Of several, as in a tied table, the first named here counts."""

DEFAULT_NO_DECAY = ("bias", "norm", "embedding")

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class _Member:
    """A trainable parameter and what is known of it."""

    name: str | None
    parameter: Tensor
    kind: str = ""  # one of KINDS; "" where no model tells
    hidden_matrix: bool = False  # a matrix that is neither an embedding nor the output head
    layer: int | None = (
        None  # 0 for what comes before the blocks, then one per block, then what follows them
    )
    given: Mapping[str, Any] = field(default_factory=dict)  # the settings of the user's own group
    number: int = 0  # of the user's own group
    table: str = ""  # the name of the weight that this is a part of, for overrides: the shift of an active vocabulary


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
    """Group a model's parameters for a torch optimizer: dicts of `params`, `name`, `lr` and, unless it is None, `weight_decay`.

    `source` may also be parameters, (name, parameter) pairs or torch's group dicts; all of those decay, as nothing tells what
    they are. `no_decay`: the KINDS of a model without weight decay, DEFAULT_NO_DECAY where None. `layer_decay`: lr x
    layer_decay ^ (number of layers from this one to the top). `overrides`: {"pattern", "lr", "weight_decay"} dicts; the pattern
    is fnmatch over parameter names, what it sets is final, and of several that match the last wins. `split_matrices`: also a
    `rule` per group, "muon" for hidden matrices or "adamw" (the output head is known where the model has
    get_output_embeddings). Frozen parameters are left out, tied ones taken once. Raises UserError, also where nothing is
    trainable.
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
                "no_decay and layer_decay go by the modules of a model; give build_optimizer the model, not its parameters"
            )
        no_decay, scales, members = (), None, _bare_members(source)
    if not members:
        raise UserError(
            "there is nothing to train: every parameter is frozen (requires_grad=False), or none was given"
        )
    matching = _match([(member.name or "", member.table) for member in members], overrides)
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for member, matched in zip(members, matching):
        label, settings = _settings(member, lr, weight_decay, no_decay, scales, split_matrices)
        for override in matched:
            settings |= {key: value for key, value in override.items() if key != "pattern"}
        name = ", ".join([*label, *(override["pattern"] for override in matched)]) or "all"
        group = groups.setdefault((member.number, name), {"params": [], **settings, "name": name})
        group["params"].append(
            member.parameter if member.name is None else (member.name, member.parameter)
        )
    return list(groups.values())


def _settings(
    member: _Member,
    lr: float | Tensor,
    weight_decay: float | None,
    no_decay: Sequence[str],
    scales: Sequence[float] | None,
    split_matrices: bool,
) -> tuple[list[str], dict[str, Any]]:
    """The words that name the member's group, and what holds in it. The words do not depend on values, so neither do the groups."""
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
    """The stack of blocks: the one outermost nn.ModuleList that holds parameters. Raises UserError where there is none, or
    several."""
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
            f"layer_decay needs a model with one stack of layers (an nn.ModuleList), and found {found}; set lr by overrides"
        )
    return next(iter(stacks.items()))


def _layer_scales(model: nn.Module, layer_decay: float | None) -> list[float] | None:
    """The factor on lr by layer, from the embedding (the smallest) to what follows the blocks (1.0)."""
    if layer_decay is None:
        return None
    top = len(find_layers(model)[1]) + 1
    return [layer_decay ** (top - layer) for layer in range(top + 1)]


def _model_members(model: nn.Module, stack: tuple[str, nn.ModuleList] | None) -> list[_Member]:
    """The trainable parameters in the model's order, which tells what comes before the stack of blocks and what follows it."""
    kinds: dict[Tensor, str] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            kind = _kind(module, parameter)
            kinds[parameter] = min(kind, kinds.get(parameter, kind), key=KINDS.index)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    parts = {
        parameter: f"{name.rpartition('.')[0]}.weight"
        for name, module in model.named_modules()
        if getattr(module, "is_part_of_weight", False)
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
            members.append(
                _Member(
                    name,
                    parameter,
                    kind,
                    hidden,
                    layer if stack else None,
                    table=parts.get(parameter, ""),
                )
            )
    return members


def _bare_members(source: Iterable[Any]) -> list[_Member]:
    """The trainable ones of parameters, (name, parameter) pairs or group dicts; a repeated parameter counts once within a group."""
    given: list[Any] = [source] if isinstance(source, (Tensor, dict)) else list(source)
    if any(isinstance(item, dict) for item in given):
        if not all(isinstance(item, dict) for item in given):
            raise UserError(
                "parameters and group dicts are mixed; give the optimizer one or the other"
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
                    f"an optimizer takes a model, parameters or parameter groups, but was given {type(parameter).__name__!r}"
                )
            if owner.get(parameter, number) != number:
                raise UserError(
                    f"a parameter stands in the groups {owner[parameter]} and {number}; each may stand in one"
                )
            if parameter.requires_grad and parameter not in owner:
                members.append(
                    _Member(
                        name,
                        parameter,
                        hidden_matrix=parameter.ndim == 2,
                        given=settings,
                        number=number,
                    )
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
    """What can be said of these options without a model. Raises UserError."""
    if isinstance(no_decay, str):
        raise UserError(f"no_decay is the text {no_decay!r}; give a list of {', '.join(KINDS)}")
    for kind in no_decay:
        if kind not in KINDS:
            raise UserError(
                f"no_decay names {kind!r}{did_you_mean(kind, KINDS) or ';'} the kinds of parameter are {', '.join(KINDS)}"
            )
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay is {layer_decay}; it must lie above 0 and at most at 1")
    allowed = ["pattern", "lr", "weight_decay"] if takes_decay else ["pattern", "lr"]
    for override in overrides:
        for key in override:
            if key not in allowed:
                raise UserError(
                    f"an override holds {key!r}{did_you_mean(key, allowed) or ';'} it takes {', '.join(allowed)}"
                )
            if key != "pattern" and not (
                isinstance(override[key], (int, float)) and override[key] >= 0
            ):
                raise UserError(
                    f"the override {dict(override)} sets {key} to {override[key]!r}; give a number from 0 up"
                )
        if "pattern" not in override or len(override) < 2:
            raise UserError(
                f"the override {dict(override)} needs a pattern and something to set: {', '.join(allowed[1:])}"
            )


def _kind(module: nn.Module, parameter: Tensor) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    # transformers' models bring norms of their own: LlamaRMSNorm, T5LayerNorm ...
    own_norm = parameter.ndim <= 1 and any(
        re.search(r"Norm(\dd)?$", base.__name__) for base in type(module).__mro__
    )
    if isinstance(module, _NORMS) or own_norm:
        return "norm"
    return "bias" if parameter.ndim <= 1 else "weight"


def _match(
    members: Sequence[tuple[str, str]], overrides: Sequence[Mapping[str, Any]]
) -> list[list[Mapping[str, Any]]]:
    """For each member, by one of its names, the overrides that match it. Raises UserError for one that matches nothing."""
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
