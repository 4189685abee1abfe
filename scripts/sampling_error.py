"""How far the gradient of a step of `vocabulary.mode: sampled` is from the exact one.

    python scripts/sampling_error.py --model DIR [--train FILE --validation FILE] [--steps 60] [--sizes 1024,4096,16384]

Trains --steps steps in that mode. Then, for a few batches more, takes the loss and its gradients exactly, and with samples of the
frozen rows: drawn by the model's probabilities before training ("before"), by those of now ("now"), or evenly. "error" is the
norm of sampled - exact over that of exact, over all parameters of a kind, the median over draws; "left" is the same of the mean
gradient of a batch's draws, which falls with their number where rare draws do not carry the estimate; "batch" is how far the
exact gradients of two batches are apart, for scale. The mode itself measures again before steps 16, 64, 256 and so on.
Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ground import our_trainer
from harness import add_arguments, spread

KINDS = ("shift", "table", "rest")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.set_defaults(steps=60)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--sizes", default="1024,4096,16384", help="rows in a sample")
    parser.add_argument("--batches", type=int, default=3, help="at least 2")
    parser.add_argument("--draws", type=int, default=4, help="samples a batch")
    args = parser.parse_args()
    args.sizes, args.worker = [int(size) for size in args.sizes.split(",")], "finetune:sampled"
    if args.batches < 2 or args.draws < 1 or args.steps < 1:
        parser.error("--batches takes 2 or more, --draws and --steps 1 or more")
    return args


def gradients(model: Any, batch: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Loss in nats per target token, and its gradient by parameter; what the parameters held is lost."""
    import torch

    torch.manual_seed(0)  # the same dropout
    model.zero_grad()
    model.train()
    loss = model(**batch) / int((batch["labels"][:, 1:] >= 0).sum())
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


def apart(
    found: Mapping[str, Any], right: Mapping[str, Any], tables: Collection[str]
) -> dict[str, float]:
    """|found - right| / |right| of each kind of parameters, those named in `tables` being one."""
    squares = {kind: [0.0, 0.0] for kind in KINDS}
    for name, gradient in right.items():
        kind = "shift" if name.endswith(".shift") else "table" if name in tables else "rest"
        squares[kind][0] += float((found[name] - gradient).square().sum())
        squares[kind][1] += float(gradient.square().sum())
    return {kind: (error / max(size, 1e-30)) ** 0.5 for kind, (error, size) in squares.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Of each way to sample: the difference of the loss, and for each kind of parameters error and what is left of it."""
    import torch

    from finetune.models.describe import token_tables
    from finetune.models.frozen_sample import FrozenSampler, inclusion_chances, measure_frozen_rows
    from finetune.models.tokenizers import pad_id
    from finetune.training.vocabulary import measuring_batches

    with our_trainer(args, lambda record: None) as (trainer, parts):
        model, language_model = trainer.model, parts.language_model
        weights = {id(weight) for weight in token_tables(language_model.causal_lm)}
        tables = {name for name, parameter in model.named_parameters() if id(parameter) in weights}
        measured = []
        for train in (lambda: None, trainer.train):
            train()
            with trainer.accelerator.autocast():
                sample = measuring_batches(
                    parts.batches.dataset, pad_id=pad_id(parts.material.tokenizer)
                )
                measured.append(measure_frozen_rows(language_model, sample))
        kinds = {"before": measured[0], "now": measured[1], "even": torch.zeros_like(measured[0])}
        ways = {
            f"{kind} {size}": inclusion_chances(mass, size)
            for kind, mass in kinds.items()
            for size in args.sizes
        }
        steps, before = iter(parts.batches), None
        found: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
        batch_noise: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(args.batches):
            batch = {
                key: value.to(trainer.accelerator.device)
                for key, value in next(steps).micro_batches[0].items()
            }
            language_model.sample = None
            loss, exact = gradients(model, batch)
            if before is not None:
                for kind, value in apart(before, exact, tables).items():
                    batch_noise[kind].append(value)
            for way, chances in ways.items():
                sampler, mean = (
                    FrozenSampler(language_model, chances),
                    {name: torch.zeros_like(g) for name, g in exact.items()},
                )
                for draw in range(args.draws):
                    sampler.before_step(number * args.draws + draw)
                    estimate, estimated = gradients(model, batch)
                    errors = {"loss": estimate - loss} | {
                        f"{kind} error": e for kind, e in apart(estimated, exact, tables).items()
                    }
                    for name, gradient in estimated.items():
                        mean[name].add_(gradient, alpha=1 / args.draws)
                    for key, value in errors.items():
                        found[way].setdefault(key, []).append(value)
                for kind, value in apart(mean, exact, tables).items():
                    found[way].setdefault(f"{kind} left", []).append(value)
            before = exact
    return {
        "ways": {
            way: {key: spread(values) for key, values in row.items()} for way, row in found.items()
        }
    } | {"batch": {kind: round(statistics.mean(values), 4) for kind, values in batch_noise.items()}}


def print_table(args: argparse.Namespace, measured: dict[str, Any]) -> None:
    print(
        f"\n{args.model.name}: {args.rows} x {args.length}, after {args.steps} steps at lr {args.lr:g}; medians [least, most]\n"
    )
    print(
        f"{'':16} {'loss - exact, nats':>28}"
        + "".join(f" {kind + ': error, left':>21}" for kind in KINDS)
    )
    for way, row in measured["ways"].items():
        middle, least, most = row["loss"]
        cells = "".join(
            f" {row[f'{kind} error'][0]:13.3f} {row[f'{kind} left'][0]:7.3f}" for kind in KINDS
        )
        print(f"{way:16} {f'{middle:+.4f} [{least:+.4f}, {most:+.4f}]':>28}{cells}")
    print(
        f"{'batch':16} {'':28}"
        + "".join(f" {measured['batch'][kind]:13.3f} {'':7}" for kind in KINDS)
    )


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
