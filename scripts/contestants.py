"""What the speed benchmarks compare: this project, a bare PyTorch loop, and TRL's SFTTrainer.

Each is the main function of a process. All of them get the same weights, the same examples (the
shipped conversations, unless others are given), and AdamW: fused, without weight decay, the
learning rate falling linearly to 0. All clip at 1.0, and use bf16 only if `finetune.models.speed`
says that the chip multiplies it.

- finetune      the recipes' own parts and Trainer: packed sequences, examples isolated from each
                other, loss on the assistant's turns. `finetune:MODE` has that vocabulary.mode,
                `finetune` alone the default
- bare          30 lines of PyTorch, as the lower bound of effort: token ids laid end to end and cut
                into sequences, Hugging Face's own loss over all
- trl-packed    SFTTrainer with its best-fit packing: one padding-free sequence, examples isolated
- trl-wrapped   SFTTrainer with its other packing: sequences cut anywhere, and examples see each
                other, as in the bare loop
- trl-padded    SFTTrainer without packing: sequences of similar length together, and as many
                conversations a step as have the same number of tokens

rivals.py says how TRL is driven.

Tokens are those that are not padding. Seconds go from the end of one step to the end of the next,
so they include data and logging. A contestant's figure for one round is the median over its steps
after the warm-up. Each trained model is evaluated by this project, in the contestant's own process.
Other work on the machine falsifies all this. If there is some, `--threads 1 --clock cpu` counts the
processor seconds of one thread instead, which other work changes little.
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
    evaluate_model,
    load_plain,
    our_flops,
    our_material,
    our_trainer,
    peak_memory,
    shuffled,
    training_state,
)
from harness import CLOCKS, Stopwatch, add_arguments
from rivals import batches_of, trl_trainer


def run_finetune(args: argparse.Namespace) -> dict[str, Any]:
    """Return what this project measured of itself."""
    import finetune.models.language_model as language_model
    from finetune.models.vocabulary.activate import deactivate_vocabulary

    watch, computed = Stopwatch(args.clock, peak_memory), 0

    def on_record(record: Any) -> None:
        nonlocal computed
        computed += record.num_computed_tokens
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
        flops["token"] *= computed / sum(watch.tokens)  # shared beginnings are computed once
        deactivate_vocabulary(parts.language_model)
        found = evaluate_model(args, parts.model)
    return watch.result({**found, "training_state_bytes": state, "flops": flops})


def run_bare(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of the bare loop."""
    import torch

    from finetune.models.speed import resolve_precision

    train = our_material(args).train
    order = shuffled(len(train), args.seed)
    ids = torch.tensor([token for i in order for token in train[i].input_ids], device=device())
    sequences = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    bf16 = resolve_precision(args.precision, device())[0] == "bf16"
    model = load_plain(args).to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    watch = Stopwatch(args.clock, peak_memory)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        first = step * args.sequences
        batch = sequences[[(first + i) % len(sequences) for i in range(args.sequences)]]
        with torch.autocast(device(), torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        watch.tokens.append(batch.numel())
        watch.targets.append(args.sequences * (args.length - 1))
        watch.step(loss.item())
    state = training_state(model, optimizer)
    return watch.result({"training_state_bytes": state, **evaluate_model(args, model)})


def run_trl(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Return what was measured of TRL in one of TRL_MODES."""
    sys.path.append(str(args.trl))
    from transformers import TrainerCallback

    from finetune.models.speed import resolve_precision

    material = our_material(args)
    order = shuffled(len(material.train), args.seed)
    examples = [material.train[i] for i in order]
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
    trainer = trl_trainer(
        model,
        material.tokenizer,
        examples,
        args.folder,
        callbacks=[Clock()],
        max_steps=args.steps,
        seed=args.seed,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        bf16=resolve_precision(args.precision, device())[0] == "bf16",
        **batches_of(mode, examples, sequences=args.sequences, length=args.length),
    )
    trainer.data_collator = counting(trainer.data_collator)
    trainer.train()
    state = training_state(model, trainer.optimizer)
    plain = load_plain(args)  # TRL patches its model's forward
    plain.load_state_dict(model.state_dict())
    return watch.result({"training_state_bytes": state, **evaluate_model(args, plain)})


def run_peak(args: argparse.Namespace) -> dict[str, Any]:
    """Return the machine's best rate for the model's MLP product, in the contestants' dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.models.speed import resolve_precision

    config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = [p for p in model.parameters() if p.ndim == 2 and (p is not table or p is head)]
    multiplied = sum(p.numel() for p in weights)
    dtype = (
        torch.bfloat16
        if resolve_precision(args.precision, device())[0] == "bf16"
        else torch.float32
    )
    tokens, width = args.sequences * args.length, config.hidden_size
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
    """Return the figures of the base model, evaluated as the others are after training."""
    return evaluate_model(args, load_plain(args))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="One contestant of bench_train.py or bench_vocabulary.py, in this process."
    )
    add_arguments(parser)
    required = {"worker": str, "folder": Path, "out": Path, "sequences": int, "length": int}
    for name, kind in required.items():
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
