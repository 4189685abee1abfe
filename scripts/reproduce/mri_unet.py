"""A small U-Net that segments grey and white matter on MRI slices, trained by each optimizer.

Needs the extra `reproduce`: the wheel of nilearn ships the MNI152 template. It is one averaged
brain, and nothing here is clinical.
"""

import importlib.util
import itertools
import statistics
from pathlib import Path

import nibabel
import numpy as np
import torch
from claim import VERDICTS, Claim, main, mean_and_deviation
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, max_pool2d

from finetune.optim import build_lr_scheduler, build_optimizer

CENTRES = {"sgd": 1e-1, "momentum": 3e-2, "nesterov": 3e-2, "adagrad": 1e-2}  # learning rates
CENTRES |= dict.fromkeys(("rmsprop", "adam", "adamw"), 1e-3)
FACTORS = [0.3, 1, 3, 10]  # of the centre, for the rates that are tried
BLOCK, BATCH = 13, 4  # neighbouring slices that stay together; slices of a step
FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"  # in the wheel of nilearn
Part = tuple[Tensor, Tensor]  # images and labels


def slices() -> dict[str, Part]:
    """Return images [n, 1, 112, 96] and labels [n, 112, 96]: 0 other, 1 grey, 2 white.

    The slices are axial, 1 mm apart, in blocks; held-out blocks lose their rims.
    """
    spec = importlib.util.find_spec("nilearn")
    assert spec is not None, "pip install 'finetune-rows[reproduce]'"
    volumes = []
    for kind in ("t1", "gm", "wm"):
        image = nibabel.load(Path(str(spec.origin)).parent / FILE.format(kind))
        volume = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32)).permute(2, 1, 0)
        volumes.append(volume[35 : 35 + 10 * BLOCK, 4:228:2, 2:194:2] / volume.max())
    head, grey, white = volumes
    images = ((head - head.mean()) / head.std())[:, None]
    labels = torch.where(grey > 0.5, 1, torch.where(white > 0.5, 2, 0))
    parts: dict[str, list[int]] = {"training": [], "validation": [], "test": []}
    for number in range(10):
        part = {3: "validation", 7: "validation", 1: "test", 5: "test"}.get(number, "training")
        margin = 0 if part == "training" else 2
        parts[part] += range(number * BLOCK + margin, (number + 1) * BLOCK - margin)
    return {part: (images[chosen], labels[chosen]) for part, chosen in parts.items()}


def block(*widths: int) -> nn.Sequential:
    """Return convolutions from each width to the next."""
    layers = [
        [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.LeakyReLU(0.1)]
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(*itertools.chain(*layers))


class UNet(nn.Module):
    """Two levels down and up (https://arxiv.org/abs/1505.04597), with group normalisation."""

    def __init__(self, w: int = 8) -> None:
        super().__init__()
        blocks = [block(1, w, w), block(w, 2 * w, 2 * w), block(2 * w, 4 * w, 4 * w)]
        self.down = nn.ModuleList(blocks)
        self.up = nn.ModuleList([block(6 * w, 2 * w, 2 * w), block(3 * w, w, w)])
        self.head = nn.Conv2d(w, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.down[0](x)
        x2 = self.down[1](max_pool2d(x1, 2))
        x3 = self.down[2](max_pool2d(x2, 2))
        x2 = self.up[0](torch.cat([x2, interpolate(x3, scale_factor=2)], 1))
        return self.head(self.up[1](torch.cat([x1, interpolate(x2, scale_factor=2)], 1)))


def dice(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return the Dice coefficients of grey and white matter over all slices of a part."""
    with torch.no_grad():
        found = torch.cat([model(images).argmax(1) for images in part[0].split(16)])
    pairs = [(found == tissue, part[1] == tissue) for tissue in (1, 2)]
    return tuple(2 * float((a & b).sum() / (a.sum() + b.sum())) for a, b in pairs)


def train(
    name: str, lr: float, seed: int, data: dict[str, Part], epochs: int
) -> tuple[float, tuple[float, float]]:
    """Return the mean Dice on validation, and the Dice of grey and white matter on test."""
    torch.manual_seed(seed)
    model = UNet()
    optimizer = build_optimizer(model, name, lr=lr)
    images, labels = data["training"]
    steps = len(images) // BATCH
    schedule = {"num_steps": epochs * steps, "warmup_steps": 0, "min_lr_ratio": 0.0}
    scheduler = build_lr_scheduler(optimizer, "cosine", **schedule)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH)[:steps]:
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            scheduler.step()
    return statistics.mean(dice(model, data["validation"])), dice(model, data["test"])


def reproduce(quick: bool = False) -> Claim:
    """Compare the Dice coefficients of each optimizer at its best rate."""
    data = slices()
    epochs, factors, tuning, seeds = 8, FACTORS, [0, 1], [2, 3, 4]
    if quick:
        epochs, factors, tuning, seeds = 1, [1], [0], [2]
    lrs, found = {}, {}
    for name, centre in CENTRES.items():
        rates = [round(centre * factor, 6) for factor in factors]
        tried = {lr: [train(name, lr, seed, data, epochs)[0] for seed in tuning] for lr in rates}
        lrs[name] = max(tried, key=lambda lr: statistics.mean(tried[lr]))
        found[name] = [train(name, lrs[name], seed, data, epochs)[1] for seed in seeds]
    mean = {name: statistics.mean(map(statistics.mean, pairs)) for name, pairs in found.items()}
    order = sorted(mean, key=mean.get, reverse=True)
    behind = {name: mean[order[0]] - mean[name] for name in ("adam", "nesterov")}
    cells = {name: map(mean_and_deviation, zip(*pairs)) for name, pairs in found.items()}
    counts = [len(data[part][0]) for part in ("training", "validation", "test")]
    size = sum(p.numel() for p in UNet().parameters())
    return Claim(
        title="A convolutional network on MRI: which optimizers train it",
        source="Dahl et al. 2023, AlgoPerf, workload fastMRI",
        url="https://arxiv.org/abs/2306.07179",
        claim="Adam trains networks for MRI, and so does Nesterov's momentum, which set the target "
        "on such a network",
        setting=f"tissue segmentation on axial slices of the MNI152 template ({counts[0]} to "
        f"train, {counts[1]} to choose, {counts[2]} to test, in separate blocks), a U-Net of "
        f"{size / 1000:.0f}k parameters, {epochs} epochs of batches of {BATCH}, cosine schedule, "
        f"{len(factors)} learning rates around each method's usual one, the best by validation on "
        "seeds 0 and 1",
        seeds=f"seeds {seeds[0]} to {seeds[-1]}, ± standard deviation; one averaged brain, so the "
        "spread is of training alone",
        columns=["Dice on test", "lr", "grey matter", "white matter"],
        rows=[[name, f"{lrs[name]:g}", *cells[name]] for name in order],
        verdict=VERDICTS[2 - sum(gap < 0.02 for gap in behind.values())],
        because="mean of both tissues, once tuned: "
        f"{', '.join(f'{name} {mean[name]:.3f}' for name in order)}; behind the best: adam "
        f"{behind['adam']:.3f}, nesterov {behind['nesterov']:.3f}; where the spread is above 0.2, "
        "a seed had yet to learn one",
        checks={f"dice_{name}": value for name, value in mean.items()},
    )


if __name__ == "__main__":
    main(reproduce)
