"""Classes with a heavy tail: Adam learns the rare ones, gradient descent only the frequent ones.

Full batches, linear softmax.
"""

import torch
from claim import Claim, main, mean_and_deviation
from torch import Tensor
from torch.nn.functional import cross_entropy

from finetune.optim import build_optimizer

METHODS = ["sgd", "momentum", "adagrad", "adam"]
# of the learning rates, which are half a decade apart
DECADES = {"sgd": (-2, 1), "momentum": (-3, 0), "adagrad": (-3, 1), "adam": (-4, -1)}


def problem(seed: int, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs [n, width], labels [n], and the group of each label [n].

    Group g has 2^g classes of 2^(groups - 1 - g) examples each, so all groups have equally many.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.cat([torch.full((2**g,), 2 ** (groups - 1 - g)) for g in range(groups)])
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    inputs = torch.rand(len(labels), width, generator=generator)
    return inputs, labels, (labels + 1).log2().floor().long()


def group_losses(name: str, lr: float, seed: int, *, groups: int, width: int, steps: int) -> Tensor:
    """Return the training loss of each group [groups] after `steps` full-batch steps from zero."""
    inputs, labels, group = problem(seed, groups, width)
    weight = torch.zeros(int(labels.max()) + 1, width, requires_grad=True)
    optimizer = build_optimizer([weight], name, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(inputs @ weight.T, labels).backward()
        optimizer.step()
    with torch.no_grad():
        each = cross_entropy(inputs @ weight.T, labels, reduction="none")
    return torch.stack([each[group == g].mean() for g in range(groups)])


def reproduce(quick: bool = False) -> Claim:
    """Compare the loss on frequent and on rare classes, for each method at its best rate."""
    size, seeds = {"groups": 8, "width": 1024, "steps": 150}, [1, 2, 3]
    if quick:
        size, seeds = {"groups": 7, "width": 448, "steps": 60}, [1]
    chosen, found = {}, {}
    for name in METHODS:
        low, high = DECADES[name]
        rates = [10 ** (half / 2) for half in range(2 * low, 2 * high + 1, 2 if quick else 1)]
        tried = {
            lr: group_losses(name, lr, 0, **size).mean().nan_to_num(torch.inf).item()
            for lr in rates
        }
        chosen[name] = min(tried, key=tried.get), min(tried, key=tried.get) in (rates[0], rates[-1])
        found[name] = [group_losses(name, chosen[name][0], seed, **size) for seed in seeds]
    frequent, rare = (
        {name: sum(loss[i].item() for loss in found[name]) / len(seeds) for name in METHODS}
        for i in (0, -1)
    )
    classes, most = 2 ** size["groups"] - 1, 2 ** (size["groups"] - 1)
    holds = rare["adam"] < 0.5 * min(rare["sgd"], rare["momentum"])
    best = min(("sgd", "momentum"), key=rare.get)
    return Claim(
        title="Heavy-tailed classes: Adam learns the rare ones",
        source="Kunstner, Yadav, Milligan, Schmidt & Bietti 2024, section 2 and the linear model",
        url="https://arxiv.org/abs/2402.19449",
        claim="With heavy-tailed classes, the loss on rare ones falls far slower with gradient "
        "descent than with Adam, even full-batch and linear",
        setting=f"linear softmax, {classes} classes in {size['groups']} groups of equally many "
        f"examples, class sizes {most} down to 1, uniform inputs of width {size['width']}, "
        f"{size['steps']} full-batch steps from zero, the rate chosen on seed 0 by training loss",
        seeds=f"seeds {seeds[0]} to {seeds[-1]}, ± standard deviation",
        columns=["training loss", "lr", "all", "most frequent class", f"rarest {most} classes"],
        rows=[
            [name, f"{chosen[name][0]:.3g}{' (edge)' if chosen[name][1] else ''}"]
            + [
                mean_and_deviation([float(pick(loss)) for loss in found[name]])
                for pick in (Tensor.mean, lambda x: x[0], lambda x: x[-1])
            ]
            for name in METHODS
        ],
        verdict="reproduced" if holds else "not reproduced",
        because=f"rarest classes: adam {rare['adam']:.3f}, {best} {rare[best]:.3f}; most frequent "
        f"class: adam {frequent['adam']:.3f}, {best} {frequent[best]:.3f}",
        checks={f"rare_loss_{name}": value for name, value in rare.items()},
    )


if __name__ == "__main__":
    main(reproduce)
