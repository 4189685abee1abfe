"""The sum over missed steps as a Gauss rule of a few nodes: pure functions in float64.

A row last stepped at s and read after step t has missed the steps j = s+1 ... t, whose gradient was
zero. Dense AdamW moved it, for each of its elements with first moment m and x = sqrt(second
moment), by

    -m * sum_j  w_j / (x d_j + eps)
    w_j = lr_j beta1^(j-s) / (1 - beta1^j) * D_j     d_j = beta2^((j-s)/2) / sqrt(1 - beta2^j)

where D_j is the product of the decays (1 - lr_i weight_decay) of the later steps. Only scalars
depend on j. So the sum is the integral of f(d) = d / (x d + eps) over the atoms d_j with masses
w_j / d_j. f is constant if eps << x d, linear if eps >> x d, and smooth in between. A Gauss rule of
n nodes is exact for polynomials of degree 2n - 1, and therefore exact at both ends. With masses W_i
at nodes N_i the sum is  sum_i W_i / (x + eps / N_i):  n divisions an element, for any number of
missed steps.

A rule is grown step by step. The Gauss rule of n nodes depends on the first 2n moments of the
measure alone. So the Gauss rule of the rule so far together with one more atom is the Gauss rule of
all the atoms, and n + 1 numbers are enough for any number of steps.

Gauss rules of a discrete measure, with the recurrence by the Lanczos process: G. H. Golub and
J. H. Welsch, "Calculation of Gauss Quadrature Rules", Math. Comp. 23 (1969),
https://www.ams.org/journals/mcom/1969-23-106/S0025-5718-69-99647-1/
"""

import functools
import math

import torch
from torch import Tensor


def horizon(beta1: float, beta2: float, tolerance: float) -> int:
    """Return the number of missed steps after which the rest is below `tolerance` of the sum.

    (With eps = 0 and equal learning rates.)
    """
    if beta1 == 0:
        return 1
    return max(1, math.ceil(math.log(tolerance) / math.log(beta1 / math.sqrt(beta2))))


def missed_atoms(
    step: Tensor | int, missed: Tensor, betas: tuple[float, float], lr: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return mass w / d (without later decay) and place d of step `step` as an atom, each [k].

    `missed` [k]: it is missed step number 1, 2 ... in each of k sums.
    """
    beta1, beta2 = betas
    places = beta2 ** (missed / 2) / (1 - beta2**step) ** 0.5
    return lr * beta1**missed / (1 - beta1**step) / places, places


def grow_rule(
    masses: Tensor, nodes: Tensor, missed: Tensor, mass: Tensor, place: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return the rules of `count` nodes for `masses` at `nodes` and one more atom each.

    `masses` and `nodes` are [k, n]; `missed`, `mass` and `place` of the new atoms are [k], `missed`
    counting from 1. Both results are [k, count]. The atoms themselves are kept as long as there are
    no more of them than nodes.
    """
    column = torch.arange(count, device="cpu")
    kept_masses, kept_nodes = (
        torch.nn.functional.pad(x[:, :count], (0, max(0, count - x.shape[1])), value=1.0)
        for x in (masses, nodes)
    )
    own = column == missed[:, None] - 1
    kept = (
        mass[:, None].where(own, kept_masses.where(column < missed[:, None], 0.0)),
        place[:, None].where(own, kept_nodes),
    )
    if int(missed.max()) <= count:
        return kept
    few = missed[:, None] <= count
    rule = gauss_rule(
        torch.cat([masses, mass[:, None]], 1), torch.cat([nodes, place[:, None]], 1), count
    )
    return kept[0].where(few, rule[0]), kept[1].where(few, rule[1])


def gauss_rule(masses: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return masses and nodes [k, count] of Gauss rules of k measures.

    The measures have `masses` >= 0 at `places`, both [k, n].
    """
    assert count <= masses.shape[1]
    total = masses.sum(1, keepdim=True)
    vector = (masses / total.clamp_min(torch.finfo(masses.dtype).tiny)).sqrt()
    previous, off_diagonal = torch.zeros_like(vector), torch.zeros_like(total)
    jacobi = masses.new_zeros(len(masses), count, count)
    for i in range(count):
        image = places * vector - off_diagonal * previous
        diagonal = (image * vector).sum(1, keepdim=True)
        # With fewer atoms than nodes the vector becomes zero. What follows must only stay finite,
        # and apart from the other nodes.
        jacobi[:, i, i] = diagonal.where(vector.any(1, keepdim=True), places[:, :1]).squeeze(1)
        if i + 1 == count:
            break
        image = image - diagonal * vector
        norm = image.norm(dim=1, keepdim=True)
        off_diagonal = norm.where(norm > 1e-13 * places.amax(1, keepdim=True), 0.0)
        previous, vector = vector, torch.where(off_diagonal > 0, image / norm, 0.0)
        jacobi[:, i, i + 1] = jacobi[:, i + 1, i] = off_diagonal.squeeze(1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return total * vectors[:, 0].square(), nodes


@functools.lru_cache(maxsize=1024)
def nodes_needed(
    last_step: int, betas: tuple[float, float], tolerance: float, most: int
) -> tuple[int, float]:
    """Return the fewest nodes, at most `most`, that give a row's sum to within `tolerance` of it.

    Returns also the error that is left, which is above `tolerance` if `most` nodes do not do.
    `last_step` is the step at which the row was last stepped. The error is measured, not bounded:
    the sum over a whole horizon of missed steps against its rule, at a constant learning rate and
    at one that grows from zero, for every x for which the integrand is neither constant nor linear
    somewhere among the atoms. The bias correction spreads the atoms most after the first steps, so
    the answer falls with `last_step`; it is looked up at powers of two.
    """
    if last_step & (last_step - 1):
        return nodes_needed(1 << (last_step.bit_length() - 1), betas, tolerance, most)
    if betas[0] == 0:
        return 1, 0.0  # no momentum: a missed step is decay alone
    missed = torch.arange(
        1.0, horizon(*betas, tolerance / 100) + 1, dtype=torch.float64, device="cpu"
    )
    masses, places = missed_atoms(last_step + missed, missed, betas, 1.0)
    masses, places = torch.stack([masses, masses * missed]), places.expand(2, -1)
    low, high = -3 - math.log10(places.max()), 3 - math.log10(places.min())
    x = torch.logspace(low, high, 4 * math.ceil(high - low) + 1, dtype=torch.float64)[:, None, None]
    exact = (masses * places / (x * places + 1)).sum(-1)
    error = math.inf
    for count in range(1, min(most, len(missed)) + 1):
        rule_masses, nodes = gauss_rule(masses, places, count)
        found = (rule_masses / (x + 1 / nodes)).sum(-1)
        error = float((found / exact - 1).abs().max().nan_to_num(math.inf))
        if error < tolerance or count == len(missed):
            return count, error
    return most, error
