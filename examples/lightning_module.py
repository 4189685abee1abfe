"""Lightning: the optimizer in `configure_optimizers`, clipping by `ClipsRows`.

Needs Lightning: `pip install lightning`. `ClipsRows` lets `gradient_clip_val` take row-sparse
gradients.
python examples/lightning_module.py [OPTIMIZER ...], lazy_adamw by default; prints a JSON line each.
"""

import json
import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional

from finetune.integrations.lightning import ClipsRows
from finetune.optim import build_lr_scheduler, build_optimizer

VOCABULARY, CONTEXT, STEPS = 1000, 4, 30
QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class NextWord(ClipsRows, LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer, self.losses = optimizer, []
        layers = [nn.Flatten(), nn.Linear(32 * CONTEXT, 64), nn.Tanh(), nn.Linear(64, VOCABULARY)]
        self.model = nn.Sequential(nn.Embedding(VOCABULARY, 32), *layers)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = functional.cross_entropy(self.model(batch[:, :CONTEXT]), batch[:, CONTEXT])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = build_optimizer(self, self.optimizer, lr=1e-2, weight_decay=0.1)
        options = {"num_steps": STEPS, "warmup_steps": 3, "min_lr_ratio": 0.0}
        scheduler = build_lr_scheduler(optimizer, "linear", **options)
        each_step = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": each_step}


def train(name: str) -> tuple[torch.optim.Optimizer, list[float]]:
    seed_everything(0, verbose=False)
    zipf = 1 / torch.arange(1.0, VOCABULARY + 1)
    words = torch.multinomial(zipf, STEPS * 32 * (CONTEXT + 1), replacement=True)
    loader = torch.utils.data.DataLoader(words.view(-1, CONTEXT + 1), batch_size=32)
    module = NextWord(name)
    options = {"accelerator": "cpu", "devices": 1, **dict.fromkeys(QUIET, False)}
    trainer = Trainer(max_epochs=1, gradient_clip_val=1.0, **options)
    trainer.fit(module, loader)
    return trainer.optimizers[0], module.losses


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        optimizer, losses = train(name)
        print(json.dumps({"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}))
