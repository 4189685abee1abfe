"""How far the gradient of a step of `vocabulary.mode: sampled` is from the exact one.

    python scripts/sampling_error.py --model DIR [--train FILE --validation FILE]
                                     [--steps 60] [--sizes 1024,4096,16384]

Trains --steps steps in that mode. Then takes the loss and its gradients for a few more batches:
exactly, and over samples of the frozen rows. They are drawn by the model's probabilities before
training ("before"), by its present ones ("now"), or evenly ("even"). The mode itself measures the
probabilities again before steps 16, 64, 256 and so on.

"error" is the norm of sampled - exact over the norm of exact, over all parameters of a kind: the
median over draws. "left" is the error of the mean over a batch's draws. It shrinks with more draws,
unless a few rare draws dominate. "batch" is how far the exact gradients of two batches are apart,
for scale. Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ground import our_trainer
from harness import add_arguments, add_shape, median_and_range, spread

KINDS = ("shift", "table", "rest")


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.set_defaults(steps=60)
    add_shape(parser, length=256)
    parser.add_argument("--sizes", default="1024,4096,16384", help="rows of a sample")
    parser.add_argument("--batches", type=int, default=3, help="at least 2")
    parser.add_argument("--draws", type=int, default=4, help="samples for each batch")
    args = parser.parse_args()
    args.sizes, args.worker = [int(size) for size in args.sizes.split(",")], "finetune:sampled"
    if args.batches < 2 or args.draws < 1 or args.steps < 1:
        parser.error("--batches takes 2 or more, --draws and --steps 1 or more")
    return args


def gradients(model: Any, batch: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return the loss in nats per target token, and its gradient by parameter.

    Gradients that the parameters held are lost.
    """
    import torch

    torch.manual_seed(0)  # the same dropout
    model.zero_grad()
    model.train()
    loss = model(**batch) / len(batch["targets"])
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


def sampled(
    sampler: Any, seed: int, model: Any, batch: Mapping[str, Any]
) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients over the sample that `seed` draws."""
    sampler.before_step(seed)
    return gradients(model, batch)


def apart(
    found: Mapping[str, Any], right: Mapping[str, Any], tables: Collection[str]
) -> dict[str, float]:
    """Return |found - right| / |right| for each kind of parameters; `tables` names one kind."""
    squares = {kind: [0.0, 0.0] for kind in KINDS}
    for name, gradient in right.items():
        kind = "shift" if name.endswith(".shift") else "table" if name in tables else "rest"
        squares[kind][0] += float((found[name] - gradient).square().sum())
        squares[kind][1] += float(gradient.square().sum())
    return {kind: (error / max(size, 1e-30)) ** 0.5 for kind, (error, size) in squares.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was found for each way to sample, and how far batches are apart."""
    import torch

    from finetune.models.describe import token_tables
    from finetune.models.vocabulary.frozen_sample import (
        FrozenSampler,
        inclusion_chances,
        measure_frozen_rows,
    )

    with our_trainer(args, lambda record: None) as (trainer, parts):
        model, language_model = trainer.model, parts.language_model
        weights = {id(weight) for weight in token_tables(language_model.causal_lm)}
        tables = {name for name, parameter in model.named_parameters() if id(parameter) in weights}
        mass = []
        for train in (lambda: None, trainer.train):
            train()
            with trainer.accelerator.autocast():
                mass.append(measure_frozen_rows(language_model, parts.vocabulary.batches()))
        drawn = {"before": mass[0], "now": mass[1], "even": torch.zeros_like(mass[0])}
        ways = {
            f"{name} {size}": inclusion_chances(measured, size)
            for name, measured in drawn.items()
            for size in args.sizes
        }
        found: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
        apart_by_batch: dict[str, list[float]] = {kind: [] for kind in KINDS}
        steps, before = iter(parts.batches), None
        for number in range(args.batches):
            batch = {
                key: value.to(trainer.accelerator.device)
                for key, value in next(steps).micro_batches[0].items()
            }
            language_model.sample = None
            exact = gradients(model, batch)
            if before is not None:
                for kind, value in apart(before, exact[1], tables).items():
                    apart_by_batch[kind].append(value)
            seeds = range(number * args.draws, (number + 1) * args.draws)
            for way, chances in ways.items():
                sampler = FrozenSampler(language_model, chances)
                estimates = (sampled(sampler, seed, model, batch) for seed in seeds)
                for key, value in errors_of(exact, estimates, tables):
                    found[way].setdefault(key, []).append(value)
            before = exact[1]
    spreads = {
        way: {key: spread(values) for key, values in errors.items()}
        for way, errors in found.items()
    }
    noise = {kind: round(statistics.mean(values), 4) for kind, values in apart_by_batch.items()}
    return {"ways": spreads, "batch": noise}


def errors_of(
    exact: tuple[float, dict[str, Any]],
    estimates: Iterable[tuple[float, dict[str, Any]]],
    tables: Collection[str],
) -> Iterator[tuple[str, float]]:
    """Yield what is wrong with the estimates of one batch: a key and a value each."""
    loss, right = exact
    total, count = {name: 0 * gradient for name, gradient in right.items()}, 0
    for estimate, estimated in estimates:
        yield "loss", estimate - loss
        for kind, error in apart(estimated, right, tables).items():
            yield f"{kind} error", error
        for name, gradient in estimated.items():
            total[name] += gradient
        count += 1
    mean = {name: gradient / count for name, gradient in total.items()}
    for kind, error in apart(mean, right, tables).items():
        yield f"{kind} left", error


def print_table(args: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Print a line for each way to sample, and one for the batches."""
    print(
        f"\n{args.model.name}: {args.sequences} x {args.length}, after {args.steps} steps at lr "
        f"{args.lr:g}; medians [least, most]\n"
    )
    headings = "".join(f" {kind + ': error, left':>21}" for kind in KINDS)
    print(f"{'':16} {'loss - exact, nats':>28}{headings}")
    for way, found in measured["ways"].items():
        loss = median_and_range(found["loss"], "+.4f")
        errors = (found[f"{kind} error"][0] for kind in KINDS)
        left = (found[f"{kind} left"][0] for kind in KINDS)
        cells = "".join(f" {error:13.3f} {rest:7.3f}" for error, rest in zip(errors, left))
        print(f"{way:16} {loss:>28}{cells}")
    cells = "".join(f" {measured['batch'][kind]:13.3f} {'':7}" for kind in KINDS)
    print(f"{'batch':16} {'':28}{cells}")


def main() -> None:
    args = parse()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        measured = measure(args)
    print_table(args, measured)
    print(json.dumps({"model": args.model.name, "steps": args.steps, "lr": args.lr, **measured}))


if __name__ == "__main__":
    main()
