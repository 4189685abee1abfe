"""A loop on Accelerate, with gradient accumulation and clipping.

`clip_rows` is for the optimizers with row-sparse gradients.
python examples/accelerate_loop.py [OPTIMIZER ...], lazy_adamw by default; prints a JSON line each.
"""

import json
import sys

import torch
from accelerate import Accelerator
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from finetune.integrations.accelerate import clip_rows
from finetune.optim import build_optimizer

VOCABULARY, LENGTH, STEPS = 1000, 16, 12
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def train(name: str) -> tuple[torch.optim.Optimizer, list[float]]:
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **TINY)
    model = GPTNeoXForCausalLM(config)
    zipf = 1 / torch.arange(1.0, VOCABULARY + 1)
    words = torch.multinomial(zipf, 2 * STEPS * 4 * LENGTH, replacement=True)
    loader = torch.utils.data.DataLoader(words.view(-1, LENGTH), batch_size=4)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    clip_rows(accelerator)
    optimizer = build_optimizer(model, name, lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return optimizer.optimizer, losses


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        optimizer, losses = train(name)
        print(json.dumps({"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}))
