"""TRL's `SFTTrainer` on conversations. Needs TRL: `pip install trl`.

python examples/trl_sft.py [OPTIMIZER ...], lazy_adamw by default; prints one JSON line each.
"""

import json
import sys
import tempfile
from importlib.resources import files

import torch
from datasets import Dataset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from finetune.integrations.hugging_face import use_optimizer
from finetune.models.tokenizers import train_tokenizer

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}


def train(name: str, folder: str) -> tuple[torch.optim.Optimizer, list[float]]:
    set_seed(0)
    lines = (
        files("finetune")
        .joinpath("resources/data/chat.en.train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    conversations = [{"messages": json.loads(line)["messages"]} for line in lines[:48]]
    tokenizer = train_tokenizer(
        (turn["content"] for row in conversations for turn in row["messages"]), vocab_size=600
    )
    args = SFTConfig(
        output_dir=folder,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_length=64,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **TINY))
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
    )
    use_optimizer(trainer, name)
    trainer.train()
    return trainer.optimizer.optimizer, [
        entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    ]


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        with tempfile.TemporaryDirectory() as folder:
            optimizer, losses = train(name, folder)
        print(json.dumps({"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}))
