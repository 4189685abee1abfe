"""TRL's SFTTrainer on our examples, as the benchmarks run it.

TRL gets our token ids and labels, because its own assistant-only loss knows the templates of few
model families. Gradient checkpointing, which it has on by default, is off, and so is all else that
costs time. What is not set here is TRL's default.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ground import device


def trl_trainer(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Any],
    folder: Path,
    *,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """Return an SFTTrainer of `model` on `examples`, in this order. `options`: of SFTConfig."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from finetune.models.speed import resolve_precision

    dataset = Dataset.from_dict(
        {
            "input_ids": [list(example.input_ids) for example in examples],
            "labels": [list(example.labels) for example in examples],
        }
    )
    options.setdefault("bf16", resolve_precision("auto", device())[0] == "bf16")
    config = SFTConfig(
        output_dir=str(folder),
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        use_cpu=device() == "cpu",
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs=None,
        **options,
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def batches_of(
    mode: str, examples: Sequence[Any], *, sequences: int, length: int
) -> dict[str, Any]:
    """Return the options of SFTConfig for one of TRL_MODES, with as many tokens a step for all.

    A step has `sequences` of `length` tokens.
    """
    options: dict[str, Any] = {"max_length": length, "per_device_train_batch_size": sequences}
    if mode == "trl-padded":
        mean_length = sum(map(len, examples)) / len(examples)
        options["per_device_train_batch_size"] = max(1, round(sequences * length / mean_length))
        return options | {"packing": False, "train_sampling_strategy": "group_by_length"}
    strategy = "wrapped" if mode == "trl-wrapped" else "bfd"
    return options | {"packing": True, "packing_strategy": strategy}
