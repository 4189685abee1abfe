"""A torch loop with the fast loss for large vocabularies, as in `vocabulary.mode: sampled`.

The rows of tokens in the data train. At each step a sample of the other rows stands for all.
python examples/sampled_vocabulary.py [OPTIMIZER ...], lazy_adamw by default; a JSON line each.
"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune import models
from finetune.data.types import targets_of
from finetune.optim import build_optimizer, clip_grad_norm_

VOCABULARY, USED, STEPS, SEQUENCES, LENGTH = 3000, 200, 20, 8, 16
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def train(name: str) -> tuple[torch.optim.Optimizer, list[float], float]:
    """Learn texts that use 200 of 3,000 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **TINY)
    model, zipf = LlamaForCausalLM(config), 1 / torch.arange(1.0, USED + 1)
    ids = torch.multinomial(zipf, STEPS * SEQUENCES * LENGTH, replacement=True)
    texts = ids.view(STEPS, SEQUENCES, LENGTH)
    batches = [{"input_ids": text, "targets": targets_of(text)} for text in texts]
    models.activate_vocabulary(model, ids.unique().tolist())
    language_model = models.LanguageModel(model)
    mass = models.measure_frozen_rows(language_model, batches[:4])
    sampler = models.FrozenSampler(language_model, models.inclusion_chances(mass, 300))
    optimizer = build_optimizer(model, name, lr=1e-2)
    losses = []
    for step, batch in enumerate(batches):  # the seed of a step is the same on each process
        sampler.before_step(step)
        loss = language_model(**batch) / (SEQUENCES * (LENGTH - 1))  # a sum, in nats
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    # The plain model again. The other rows are unchanged.
    models.deactivate_vocabulary(model)
    with torch.no_grad():
        whole = model.eval()(texts[-1], labels=texts[-1]).loss.item()  # over all tokens
    return optimizer, losses, whole


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        optimizer, losses, whole = train(name)
        found = {"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}
        print(json.dumps(found | {"whole": whole}))
