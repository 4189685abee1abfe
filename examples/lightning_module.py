"""Lightning: the optimizer in `configure_optimizers`; `ClipsRows` is for `gradient_clip_val` over row-sparse gradients.

Needs Lightning: `pip install lightning`.
python examples/lightning_module.py [OPTIMIZER ...], lazy_adamw by default; prints one JSON line each.
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


class NextWord(ClipsRows, LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer, self.losses = optimizer, []
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * CONTEXT, 64), nn.Tanh(), nn.Linear(64, VOCABULARY)
        )

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = functional.cross_entropy(
            self.head(self.embedding(batch[:, :CONTEXT])), batch[:, CONTEXT]
        )
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = build_optimizer(self, self.optimizer, lr=1e-2, weight_decay=0.1)
        scheduler = build_lr_scheduler(
            optimizer, "linear", num_steps=STEPS, warmup_steps=3, min_lr_ratio=0.0
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train(name: str) -> tuple[torch.optim.Optimizer, list[float]]:
    seed_everything(0, verbose=False)
    words = torch.multinomial(
        1 / torch.arange(1.0, VOCABULARY + 1), STEPS * 32 * (CONTEXT + 1), replacement=True
    )
    module = NextWord(name)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, gradient_clip_val=1.0, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(words.view(-1, CONTEXT + 1), batch_size=32))
    return trainer.optimizers[0], module.losses


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        optimizer, losses = train(name)
        print(json.dumps({"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}))
