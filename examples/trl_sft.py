"""TRL's `SFTTrainer` on conversations. Needs TRL: `pip install trl`.

python examples/trl_sft.py [OPTIMIZER ...], lazy_adamw by default; prints a JSON line each.
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

QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
DATA = files("finetune") / "resources/data/chat.en.train.jsonl"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def train(name: str, folder: str) -> tuple[torch.optim.Optimizer, list[float]]:
    set_seed(0)
    lines = DATA.read_text(encoding="utf-8").splitlines()[:48]
    conversations = [{"messages": json.loads(line)["messages"]} for line in lines]
    texts = (turn["content"] for record in conversations for turn in record["messages"])
    tokenizer = train_tokenizer(texts, vocab_size=600)
    config = GPTNeoXConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **TINY)
    args = SFTConfig(
        output_dir=folder,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_length=64,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        **QUIET,
    )
    model, data = GPTNeoXForCausalLM(config), Dataset.from_list(conversations)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    use_optimizer(trainer, name)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.optimizer.optimizer, losses


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lazy_adamw"]:
        with tempfile.TemporaryDirectory() as folder:
            optimizer, losses = train(name, folder)
        print(json.dumps({"asked": name, "trained_by": type(optimizer).__name__, "losses": losses}))
