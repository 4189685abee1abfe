"""A torch loop with the fast loss for large vocabularies: rows of tokens in the data train, a sample of the others stands for all.

python examples/sampled_vocabulary.py [OPTIMIZER ...], lazy_adamw by default; prints one JSON line each.
"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.models import (
    FrozenSampler,
    LanguageModel,
    activate_vocabulary,
    deactivate_vocabulary,
    inclusion_chances,
    measure_frozen_rows,
)
from finetune.optim import build_optimizer, clip_grad_norm_

VOCABULARY, USED, STEPS, ROWS, LENGTH = 3000, 200, 20, 8, 16
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def train(name: str) -> tuple[torch.optim.Optimizer, list[float], float]:
    """Learn texts that use 200 of 3,000 tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPE))
    ids = torch.multinomial(
        1 / torch.arange(1.0, USED + 1), STEPS * ROWS * LENGTH, replacement=True
    ).view(STEPS, ROWS, LENGTH)
    batches = [
        {"input_ids": step, "labels": step} for step in ids
    ]  # not shifted: the loss does that

    activate_vocabulary(model, ids.unique().tolist())
    language_model = LanguageModel(model)
    chances = inclusion_chances(measure_frozen_rows(language_model, batches[:4]), 300)
    sampler = FrozenSampler(language_model, chances)
    optimizer = build_optimizer(model, name, lr=1e-2)
    losses = []
    for step, batch in enumerate(batches):
        sampler.before_step(step)  # its seed; before every step, on each process the same
        loss = language_model(**batch) / (ROWS * (LENGTH - 1))  # a sum, in nats
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    deactivate_vocabulary(
        model
    )  # the plain model again, which loses nothing when it is saved; the other rows are what they were
    with torch.no_grad():
        whole = model.eval()(**batches[-1]).loss.item()  # over all tokens
    return optimizer, losses, whole


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        optimizer, losses, whole = train(name)
        print(
            json.dumps(
                {
                    "asked": name,
                    "trained_by": type(optimizer).__name__,
                    "losses": losses,
                    "whole": whole,
                }
            )
        )
