"""A plain torch loop: an optimizer, a schedule, and clipping that takes row-sparse gradients.

python examples/plain_torch.py [OPTIMIZER ...], lazy_adamw by default; prints a JSON line each.
"""

import json
import sys

import torch
from torch import nn
from torch.nn import functional

from finetune.optim import build_lr_scheduler, build_optimizer, clip_grad_norm_

VOCABULARY, CONTEXT, STEPS = 1000, 4, 30


def train(name: str) -> tuple[torch.optim.Optimizer, list[float]]:
    """Predict the next word from the last four, with an embedding of which a batch uses a tenth."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(32 * CONTEXT, 64), nn.Tanh(), nn.Linear(64, VOCABULARY)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, 32), *layers)
    zipf = 1 / torch.arange(1.0, VOCABULARY + 1)
    words = torch.multinomial(zipf, STEPS * 32 * (CONTEXT + 1), replacement=True)
    batches = words.view(STEPS, 32, CONTEXT + 1)

    optimizer = build_optimizer(model, name, lr=1e-2)
    options = {"num_steps": STEPS, "warmup_steps": 3, "min_lr_ratio": 0.1}
    scheduler = build_lr_scheduler(optimizer, "cosine", **options)
    losses = []
    for batch in batches:
        loss = functional.cross_entropy(model(batch[:, :CONTEXT]), batch[:, CONTEXT])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return optimizer, losses


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        optimizer, losses = train(name)
        print(json.dumps({"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}))
