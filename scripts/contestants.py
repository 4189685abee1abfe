"""What the speed benchmarks compare: this project, a bare PyTorch loop, and TRL's SFTTrainer, each the main function of a process.

All of them get the same weights, the same examples (the shipped conversations, where no others are given), AdamW (fused, no weight
decay, the learning rate falling linearly to 0), clipping at 1.0, and bf16 only where `finetune.models.speed` says that the chip
multiplies it:

- finetune      the recipes' own parts and Trainer, packed rows, examples isolated from each other, loss on the assistant's turns;
                `finetune:MODE` with that vocabulary.mode, `finetune` alone with the default
- bare          30 lines of PyTorch: token ids laid end to end and cut into rows, Hugging Face's own loss over all: the floor
- trl-packed    SFTTrainer, its best-fit packing: one padding-free row, examples isolated
- trl-wrapped   SFTTrainer, its other packing: rows cut anywhere, examples see each other (what the bare loop does)
- trl-padded    SFTTrainer without packing, rows of like length together, as many conversations a step as make as many tokens

TRL is given our token ids and labels, since its own assistant-only loss knows the templates of some model families only; gradient
checkpointing, which it has on by default, is off, and so is everything else that costs time.

Tokens are those that are not padding, and seconds go from the end of one step to the end of the next, so that data and logging are
in them. A contestant's figure for one round is the median over its steps after the warm-up. What a model has become is read by this
project's evaluation, in each contestant's own process. Other work on the machine falsifies all that: where there is some,
`--threads 1 --clock cpu` counts the processor seconds of one thread instead, which it changes little.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ground import (
    CLIP,
    device,
    load_plain,
    our_flops,
    our_trainer,
    peak_memory,
    read_data,
    read_model,
    shuffled,
    training_state,
)
from harness import CLOCKS, Stopwatch, add_arguments


def run_finetune(args: argparse.Namespace) -> dict[str, Any]:
    import finetune.models.language_model as language_model
    from finetune.models.vocabulary.activate import deactivate_vocabulary

    watch = Stopwatch(args.clock, peak_memory)

    def on_record(record: Any) -> None:
        watch.tokens.append(record.num_tokens)
        watch.targets.append(record.num_target_tokens)
        watch.step(record.loss)
        if len(watch.ends) == 1:
            watch.phases.clear()

    language_model.causal_lm_loss = watch.timed("head", language_model.causal_lm_loss)
    with our_trainer(args, on_record) as (trainer, parts):
        trainer.optimizer.step = watch.timed("optimizer", trainer.optimizer.step)
        trainer.train()
        state = training_state(parts.language_model, trainer.optimizer)
        flops = our_flops(parts.model, parts.language_model.sample)
        deactivate_vocabulary(parts.language_model)
        return watch.result(
            {**read_model(args, parts.model), "training_state_bytes": state, "flops": flops}
        )


def run_bare(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from finetune.models.speed import resolve_precision

    _, train = read_data(args)
    ids = torch.tensor(
        [token for i in shuffled(len(train), args.seed) for token in train[i].input_ids]
    )
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    bf16 = resolve_precision("auto", device())[0] == "bf16"
    rows, model = rows.to(device()), load_plain(args).to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    watch = Stopwatch(args.clock, peak_memory)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        batch = rows[[(step * args.rows + row) % len(rows) for row in range(args.rows)]]
        with torch.autocast(device(), torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        watch.tokens.append(batch.numel())
        watch.targets.append(args.rows * (args.length - 1))
        watch.step(loss.item())
    return watch.result(
        {"training_state_bytes": training_state(model, optimizer), **read_model(args, model)}
    )


def run_trl(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    sys.path.append(str(args.trl))
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetune.models.speed import resolve_precision

    tokenizer, train = read_data(args)
    examples = [train[i] for i in shuffled(len(train), args.seed)]
    dataset = Dataset.from_dict(
        {
            "input_ids": [list(e.input_ids) for e in examples],
            "labels": [list(e.labels) for e in examples],
        }
    )
    rows, options = args.rows, {"packing": mode != "trl-padded"}
    if mode == "trl-padded":
        rows = max(1, round(args.rows * args.length * len(examples) / sum(map(len, examples))))
        options |= {"train_sampling_strategy": "group_by_length"}
    else:
        options |= {"packing_strategy": "wrapped" if mode == "trl-wrapped" else "bfd"}
    config = SFTConfig(
        output_dir=str(args.folder),
        max_length=args.length,
        per_device_train_batch_size=rows,
        max_steps=args.steps,
        seed=args.seed,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        bf16=resolve_precision("auto", device())[0] == "bf16",
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
    watch = Stopwatch(args.clock, peak_memory)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step()

    def counting(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def collate_and_count(features: Any) -> Any:
            batch = collate(features)
            mask = batch.get("attention_mask")
            watch.tokens.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
            watch.targets.append(int((batch["labels"][:, 1:] != -100).sum()))
            return batch

        return collate_and_count

    model = load_plain(args)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.data_collator = counting(trainer.data_collator)
    trainer.train()
    state = training_state(model, trainer.optimizer)
    plain = load_plain(args)  # TRL patches its model's forward
    plain.load_state_dict(model.state_dict())
    return watch.result({"training_state_bytes": state, **read_model(args, plain)})


def run_peak(args: argparse.Namespace) -> dict[str, Any]:
    """The machine's best rate for the model's MLP product, in the dtype that the contestants multiply in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.models.speed import resolve_precision

    config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tables = {id(module.weight) for module in (model.get_input_embeddings(),)} - {
        id(model.get_output_embeddings().weight)
    }
    multiplied = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)
    dtype = torch.bfloat16 if resolve_precision("auto", device())[0] == "bf16" else torch.float32
    tokens, width = args.rows * args.length, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    a, b, out = (
        torch.randn(*shape, dtype=dtype, device=device())
        for shape in ((tokens, width), (inner, width), (tokens, inner))
    )
    best, clock = 0.0, CLOCKS[args.clock]
    for _ in range(40):
        started = clock()
        torch.mm(a, b.t(), out=out)
        peak_memory()  # waits
        best = max(best, 2 * tokens * width * inner / (clock() - started))
    return {
        "flops": best,
        "dtype": str(dtype).removeprefix("torch."),
        "multiplied_parameters": multiplied,
    }


def run_untrained(args: argparse.Namespace) -> dict[str, Any]:
    """The base model, read as the others are after training."""
    return read_model(args, load_plain(args))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="One contestant of bench_train.py or bench_vocabulary.py, in this process."
    )
    add_arguments(parser)
    for name, kind in (
        ("worker", str),
        ("folder", Path),
        ("out", Path),
        ("rows", int),
        ("length", int),
    ):
        parser.add_argument(f"--{name}", type=kind, required=True)
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    workers = {
        "finetune": run_finetune,
        "bare": run_bare,
        "peak": run_peak,
        "untrained": run_untrained,
    }
    run = workers.get(args.worker.partition(":")[0])
    args.out.write_text(json.dumps(run_trl(args, args.worker) if run is None else run(args)))


if __name__ == "__main__":
    main()
