"""Ultralytics YOLO26, untrained, on 16 drawn pictures of squares.

Needs Ultralytics: `pip install ultralytics`. Its licence is AGPL-3.0, which binds this script, like
any other that imports it, when it is passed on or served.
python examples/ultralytics_yolo.py [OPTIMIZER ...], AdaGrad by default; prints a JSON line each.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from finetune.integrations.ultralytics import with_factory

PIXELS, SQUARE = 64, 24


def draw(folder: Path, number: int) -> Path:
    """Draw pictures with one grey square each, and write the square's box as a label.

    A label is the class, then centre x and y, width and height as shares of the picture's size.
    """
    random = numpy.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for index in range(number):
        left, top = random.integers(0, PIXELS - SQUARE, 2)
        picture = random.integers(0, 60, (PIXELS, PIXELS, 3), dtype=numpy.uint8)
        picture[top : top + SQUARE, left : left + SQUARE] += 180
        box = [value / PIXELS for value in (left + SQUARE / 2, top + SQUARE / 2, SQUARE, SQUARE)]
        Image.fromarray(picture).save(folder / "images" / f"{index}.png")
        (folder / "labels" / f"{index}.txt").write_text(" ".join(map(str, [0, *box])))
    text = f"path: {folder}\ntrain: images\nval: images\nnames: [square]\n"
    (folder / "data.yaml").write_text(text)
    return folder / "data.yaml"


def train(
    name: str, folder: Path, trainer: type, **changes: object
) -> tuple[torch.optim.Optimizer, list[float]]:
    losses: list[float] = []
    model = YOLO("yolo26n.yaml")
    model.add_callback("on_train_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    settings = {"imgsz": PIXELS, "batch": 8, "nbs": 8, "epochs": 3, "lr0": 0.01, "device": "cpu"}
    run = {"data": draw(folder, 16), "project": str(folder / "runs"), "plots": False, "workers": 0}
    model.train(trainer=trainer, optimizer=name, **{**settings, **run, **changes})
    return model.trainer.optimizer, losses


if __name__ == "__main__":
    for name in sys.argv[1:] or ["AdaGrad"]:
        with tempfile.TemporaryDirectory() as folder:
            optimizer, losses = train(name, Path(folder), with_factory(DetectionTrainer))
        print(json.dumps({"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}))
