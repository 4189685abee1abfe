"""Momentum on a quadratic of condition number kappa: sqrt(kappa) iterations, not kappa.

There is no data and no chance. The best constant learning rate and momentum of each method are
known.
"""

import math

import torch
from claim import Claim, main

from finetune.optim import build_optimizer

CLOSE = 1e-6
METHODS = ["sgd", "momentum", "nesterov"]


def options(name: str, kappa: float) -> dict[str, float]:
    """Return the best constants for eigenvalues from 1 to kappa (Polyak 1964; Nesterov 1983)."""
    root = math.sqrt(kappa)
    if name == "sgd":
        return {"lr": 2 / (kappa + 1)}
    if name == "momentum":
        return {"lr": 4 / (root + 1) ** 2, "momentum": ((root - 1) / (root + 1)) ** 2}
    return {"lr": 1 / kappa, "momentum": (root - 1) / (root + 1)}


def iterations(name: str, kappa: float, size: int = 100) -> int:
    """Return the steps until the distance to the minimum is CLOSE of the first one."""
    eigenvalues = torch.logspace(0, math.log10(kappa), size, dtype=torch.float64)
    x = torch.ones(size, dtype=torch.float64, requires_grad=True)
    optimizer = build_optimizer([x], name, **options(name, kappa))
    start = float(x.detach().norm())
    for step in range(1, 1_000_000):
        x.grad = eigenvalues * x.detach()
        optimizer.step()
        if float(x.detach().norm()) <= CLOSE * start:
            return step
    raise AssertionError(f"{name} did not converge at kappa {kappa}")


def reproduce(quick: bool = False) -> Claim:
    """Count iterations for several condition numbers."""
    kappas = [10, 100, 1000] if quick else [10, 100, 1000, 10_000]
    needed = {name: [iterations(name, kappa) for kappa in kappas] for name in METHODS}
    exponent = {
        name: math.log(n[-1] / n[-2]) / math.log(kappas[-1] / kappas[-2])
        for name, n in needed.items()
    }
    holds = exponent["sgd"] > 0.9 and all(abs(exponent[name] - 0.5) < 0.1 for name in METHODS[1:])
    return Claim(
        title="Momentum on a quadratic: √κ iterations instead of κ",
        source="Polyak 1964; Nesterov 1983; as in Sutskever et al. 2013, section 2",
        url="https://proceedings.mlr.press/v28/sutskever13.html",
        claim="With the best constants, momentum reaches a given accuracy in about √κ iterations "
        "where gradient descent takes κ",
        setting="quadratic in 100 dimensions, eigenvalues log-spaced from 1 to κ, float64, until "
        f"the distance is {CLOSE:g} of the first",
        seeds="nothing is random",
        columns=["iterations", *(f"κ = {kappa:,}" for kappa in kappas), "exponent of κ (last two)"],
        rows=[
            [name, *(f"{n:,}" for n in needed[name]), f"{exponent[name]:.2f}"] for name in METHODS
        ],
        verdict="reproduced" if holds else "not reproduced",
        because=f"iterations grow as κ^{exponent['sgd']:.2f} without momentum, "
        f"κ^{exponent['momentum']:.2f} with the heavy ball, κ^{exponent['nesterov']:.2f} with "
        "Nesterov's",
        checks={f"exponent_{name}": value for name, value in exponent.items()},
    )


if __name__ == "__main__":
    main(reproduce)
