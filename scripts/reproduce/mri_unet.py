"""A small U-Net that segments grey and white matter on slices of the MNI152 template, trained by each optimizer.

Needs the extra `reproduce` (nilearn, whose wheel ships the template).  It is one averaged brain: nothing here is clinical.
"""

import importlib.util
import itertools
import statistics
from pathlib import Path

import nibabel
import numpy as np
import torch
from claim import Claim, main, spread
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, max_pool2d

from finetune.optim import build_lr_scheduler, build_optimizer

CENTRES = {
    "sgd": 1e-1,
    "momentum": 3e-2,
    "nesterov": 3e-2,
    "adagrad": 1e-2,
    "rmsprop": 1e-3,
    "adam": 1e-3,
    "adamw": 1e-3,
}
FACTORS, BLOCK, BATCH = (
    [0.3, 1, 3, 10],
    13,
    4,
)  # rates on the centre; neighbouring slices kept together; slices a step
FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"  # in the wheel of nilearn
Part = tuple[Tensor, Tensor]  # images and labels


def slices() -> dict[str, Part]:
    """Images [n, 1, 112, 96] and labels [n, 112, 96] (0 other, 1 grey, 2 white), in blocks, held-out ones without rims."""
    spec = importlib.util.find_spec("nilearn")
    assert spec is not None, "pip install 'finetune-rows[reproduce]'"
    loaded = [
        nibabel.load(Path(str(spec.origin)).parent / FILE.format(kind))
        for kind in ("t1", "gm", "wm")
    ]
    volumes = [
        torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32)).permute(2, 1, 0)
        for image in loaded
    ]
    head, grey, white = (
        volume[35 : 35 + 10 * BLOCK, 4:228:2, 2:194:2] / volume.max() for volume in volumes
    )  # axial 1 mm apart
    images = ((head - head.mean()) / head.std())[:, None]
    labels = torch.where(grey > 0.5, 1, torch.where(white > 0.5, 2, 0))
    parts: dict[str, list[int]] = {"training": [], "validation": [], "test": []}
    for number in range(10):
        part = {3: "validation", 7: "validation", 1: "test", 5: "test"}.get(number, "training")
        margin = 0 if part == "training" else 2
        parts[part] += range(number * BLOCK + margin, (number + 1) * BLOCK - margin)
    return {part: (images[chosen], labels[chosen]) for part, chosen in parts.items()}


def block(*widths: int) -> nn.Sequential:
    layers = [
        [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.LeakyReLU(0.1)]
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(*itertools.chain(*layers))


class UNet(nn.Module):
    """Two levels down and up (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597), with group normalisation."""

    def __init__(self, w: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [block(1, w, w), block(w, 2 * w, 2 * w), block(2 * w, 4 * w, 4 * w)]
        )
        self.up = nn.ModuleList([block(6 * w, 2 * w, 2 * w), block(3 * w, w, w)])
        self.head = nn.Conv2d(w, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.down[0](x)
        x2 = self.down[1](max_pool2d(x1, 2))
        x2 = self.up[0](
            torch.cat([x2, interpolate(self.down[2](max_pool2d(x2, 2)), scale_factor=2)], 1)
        )
        return self.head(self.up[1](torch.cat([x1, interpolate(x2, scale_factor=2)], 1)))


def dice(model: nn.Module, part: Part) -> tuple[float, float]:
    """Dice coefficients of grey and white matter over all slices of a part."""
    with torch.no_grad():
        found = torch.cat([model(images).argmax(1) for images in part[0].split(16)])
    return tuple(
        2
        * float(((found == t) & (part[1] == t)).sum() / ((found == t).sum() + (part[1] == t).sum()))
        for t in (1, 2)
    )


def train(
    name: str, lr: float, seed: int, data: dict[str, Part], epochs: int
) -> tuple[float, tuple[float, float]]:
    """Mean Dice on validation, and Dice of grey and white matter on test."""
    torch.manual_seed(seed)
    model = UNet()
    optimizer = build_optimizer(model, name, lr=lr)
    images, labels = data["training"]
    scheduler = build_lr_scheduler(
        optimizer,
        "cosine",
        num_steps=epochs * (len(images) // BATCH),
        warmup_steps=0,
        min_lr_ratio=0.0,
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            scheduler.step()
    return statistics.mean(dice(model, data["validation"])), dice(model, data["test"])


def reproduce(quick: bool = False) -> Claim:
    """Dice of each optimizer at its best rate."""
    data = slices()
    epochs, factors, tuning, seeds = (
        (1, [1], [0], [2]) if quick else (8, FACTORS, [0, 1], [2, 3, 4])
    )
    lrs, found = {}, {}
    for name, centre in CENTRES.items():
        rates = [round(centre * factor, 6) for factor in factors]
        tried = {
            lr: statistics.mean(train(name, lr, seed, data, epochs)[0] for seed in tuning)
            for lr in rates
        }
        lrs[name] = max(tried, key=tried.get)
        found[name] = [train(name, lrs[name], seed, data, epochs)[1] for seed in seeds]
    mean = {name: statistics.mean(map(statistics.mean, pairs)) for name, pairs in found.items()}
    order = sorted(mean, key=mean.get, reverse=True)
    behind = {name: mean[order[0]] - mean[name] for name in ("adam", "nesterov")}
    return Claim(
        title="A convolutional network on MRI: which optimizers train it",
        source="Dahl et al. 2023, AlgoPerf, workload fastMRI",
        url="https://arxiv.org/abs/2306.07179",
        claim="Adam trains networks for MRI, and so does Nesterov's momentum, which set the target on such a network",
        setting=f"tissue segmentation on axial slices of the MNI152 template ({len(data['training'][0])} to train, "
        f"{len(data['validation'][0])} to choose, {len(data['test'][0])} to test, in separate blocks), a U-Net of "
        f"{sum(p.numel() for p in UNet().parameters()) / 1000:.0f}k parameters, {epochs} epochs of batches of {BATCH}, cosine "
        f"schedule, {len(factors)} learning rates around each method's usual one, the best by validation on seeds 0 and 1",
        seeds=f"seeds {seeds[0]} to {seeds[-1]}, ± standard deviation; one averaged brain, so the spread is of training alone",
        columns=["Dice on test", "lr", "grey matter", "white matter"],
        rows=[
            [
                name,
                f"{lrs[name]:g}",
                *(spread([pair[tissue] for pair in found[name]]) for tissue in (0, 1)),
            ]
            for name in order
        ],
        verdict=["not reproduced", "reproduced in part", "reproduced"][
            sum(gap < 0.02 for gap in behind.values())
        ],
        because=f"mean of both tissues, once tuned: {', '.join(f'{name} {mean[name]:.3f}' for name in order)}; behind the best: "
        f"adam {behind['adam']:.3f}, nesterov {behind['nesterov']:.3f}; where the spread is above 0.2, a seed had yet to learn one",
        checks={f"dice_{name}": value for name, value in mean.items()},
    )


if __name__ == "__main__":
    main(reproduce)
