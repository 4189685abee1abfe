"""`transformers.Trainer`: rate, decay, schedule and clipping are those of its TrainingArguments.

python examples/hugging_face_trainer.py [OPTIMIZER ...], lazy_adamw by default; a JSON line each.
"""

import json
import sys
import tempfile

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments, set_seed

from finetune.integrations.hugging_face import use_optimizer

VOCABULARY, LENGTH = 1000, 16
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def train(name: str, folder: str) -> tuple[torch.optim.Optimizer, list[float]]:
    set_seed(0)
    zipf = 1 / torch.arange(1.0, VOCABULARY + 1)
    words = torch.multinomial(zipf, 96 * LENGTH, replacement=True).view(-1, LENGTH)
    config = GPTNeoXConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **TINY)
    args = TrainingArguments(
        output_dir=folder,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=1.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=GPTNeoXForCausalLM(config),
        args=args,
        train_dataset=[{"input_ids": text, "labels": text} for text in words],
    )
    use_optimizer(trainer, name)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.optimizer.optimizer, losses


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        with tempfile.TemporaryDirectory() as folder:
            optimizer, losses = train(name, folder)
        print(json.dumps({"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}))
