"""The names that other tools have for the keys of a config."""

ALIASES = {
    "model_name_or_path": "model.name",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "optim": "optimizer.name",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "max_grad_norm": "training.max_grad_norm",
    "gradient_checkpointing": "training.activation_checkpointing",
    "torch_compile": "training.compile",
    "warmup_steps": "scheduler.warmup_steps",
    "warmup_ratio": "scheduler.warmup_ratio",
    "lr_scheduler_type": "scheduler.name",
    "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "packing": "data.packing",
    "attn_implementation": "model.attn_implementation",
    "report_to": "tracking",
    "base_model": "model.name",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "num_epochs": "training.epochs",
    "sample_packing": "data.packing",
    "max_seq_len": "data.max_length",
    "lr_scheduler": "scheduler.name",
    "evaluation_steps": "evaluation.every",
    "early_stopping_patience": "evaluation.early_stopping_patience",
}
"""Names of Hugging Face, Axolotl and LLaMA-Factory that mean the same."""

ABOUT_TRAINING = ("", "training", "data", "model", "optimizer", "scheduler")
"""The sections, and the top level, in which these names mean the same."""

ELSEWHERE = {
    **{
        f"generation.{name}": "Write generation.max_new_tokens: TOKENS"
        for name, key in ALIASES.items()
        if key == "data.max_length"
    },
    "evaluation.max_steps": "Write data.max_validation_records: COUNT",
}
"""What such a name may mean in another section. The value says what to do instead."""

NOT_ALIASES = {
    "gradient_accumulation_steps": "Set training.batch_size (sequences per step, over all "
    "processes) and training.micro_batch_size, from which it follows",
    "per_device_train_batch_size": "Set training.batch_size to it times the processes times "
    "gradient_accumulation_steps, and training.micro_batch_size to the sequences per forward",
    "bf16": "Write training.precision: bf16",
    "fp16": "Write training.precision: fp16",
    "dataset_name": "Write data.train: NAME",
    "dataset": "Write data.train: NAME",
    "datasets": "Write data.train: [NAME, ...]",
    "dataset_text_field": "Write data.columns: {text: NAME}",
    **dict.fromkeys(
        ("question", "answer", "completion", "instruction"),
        "Write data.columns: {prompt: question, completion: answer}, with your columns' names",
    ),
    "r": "Write model.lora.rank",
    "lora_r": "Write model.lora.rank",
    "lora_rank": "Write model.lora.rank",
    "lora_alpha": "Write model.lora.alpha",
    "lora_dropout": "Write model.lora.dropout",
    "lora_target": "Write model.lora.target_modules",
    "lora_target_modules": "Write model.lora.target_modules",
    "adapter": "Write model.lora: {rank: 16} for LoRA",
    "finetuning_type": "Write model.lora: {rank: 16} for LoRA",
    "load_in_4bit": "Leave it out: there is no quantised training here",
    "load_in_8bit": "Leave it out: there is no quantised training here",
    "val_set_size": "Write data.validation_fraction: SHARE",
    "eval_strategy": "Write evaluation.every: STEPS, or leave it out for each epoch",
    "evaluation_strategy": "Write evaluation.every: STEPS, or leave it out for each epoch",
    "save_strategy": "Write checkpoint.every: STEPS, or leave it out for each evaluation",
    "logging_steps": "Leave it out: each step is logged",
    "push_to_hub": "Leave it out: model/ is a plain Hugging Face folder",
    "load_best_model_at_end": "Write checkpoint.save_best_model: true",
    "metric_for_best_model": "Write evaluation.best: loss or chrf",
    "train_on_inputs": "Write data.targets: all to learn the questions too, or leave it out",
    "assistant_only_loss": "Leave it out: only answers are learnt, unless data.targets is all",
    "completion_only_loss": "Leave it out: only answers are learnt, unless data.targets is all",
    "train_file": "Write data.train: FILE",
    "validation_file": "Write data.validation: FILE",
    "dataset_path": "Write data.train: PATH",
    "data_path": "Write data.train: PATH",
    "data_files": "Write data.train: FILE, or a list of files",
    "eval_dataset": "Write data.validation: NAME",
    "test_datasets": "Write data.validation: [NAME, ...]",
    "val_size": "Write data.validation_fraction: SHARE",
    "max_samples": "Write data.train: {path: NAME, max_records: COUNT}",
    "dataset_num_proc": "Leave it out: there is no such setting here",
    "gradient_accumulation": "Set training.batch_size (sequences per step) and "
    "training.micro_batch_size, from which it follows",
    "use_peft": "Write model.lora: {rank: 16} for LoRA",
    "peft": "Write model.lora: {rank: 16} for LoRA",
    "lora_modules": "Write model.lora.target_modules",
    "torch_dtype": "Write training.precision: bf16, fp16 or fp32; weights are kept in fp32",
    "dtype": "Write training.precision: bf16, fp16 or fp32; weights are kept in fp32",
    "mixed_precision": "Write training.precision: bf16, fp16 or fp32",
    "quantization_bit": "Leave it out: there is no quantised training here",
    "flash_attention": "Write model.attn_implementation: flash_attention_2",
    "flash_attn": "Write model.attn_implementation: flash_attention_2",
    "adam_beta1": "Write optimizer.betas: [BETA1, BETA2]",
    "adam_beta2": "Write optimizer.betas: [BETA1, BETA2]",
    "adam_epsilon": "Write optimizer.eps",
    "warmup": "Write scheduler.warmup_steps, or scheduler.warmup_ratio",
    "resume_from_checkpoint": "Leave it out, and give --resume auto",
    "evals_per_epoch": "Write evaluation.every: STEPS, or leave it out for each epoch",
    "saves_per_epoch": "Write checkpoint.every: STEPS, or leave it out for each evaluation",
    "wandb_project": "Write tracking: [wandb]",
    "logging_dir": "Leave it out: records go to output_dir",
    "template": "Write model.chat_template: chatml, or the path of a Jinja file; the wording of a "
    "translation is data.translation.template",
    "max_rows": "Write max_records",
    "max_validation_rows": "Write data.max_validation_records",
}
"""Other tools' names without an equal, and former names. The value says what to do instead."""
