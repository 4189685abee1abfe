"""One contestant of bench_equal_time.py: trained for a time, evaluated, its result in a file."""

import argparse
import json
import sys
import time
from typing import Any

from ground import CLIP, load_plain_of, make_trainer, peak_memory, shuffled
from rivals import batches_of, trl_trainer

RANK = 16  # of TRL's LoRA


def tool_of(name: str) -> str:
    """Return whose learning rate a contestant has.

    `finetune:sampled` and `finetune-train` have that of `finetune`.
    """
    return name.partition(":")[0].removesuffix("-train")


def config_of(args: argparse.Namespace) -> Any:
    """Return our config; data, lengths and prompts are everybody's."""
    from finetune.config.loading import make_config

    tree: dict[str, Any] = {
        "output_dir": str(args.folder / "run"),
        "overwrite_output_dir": True,  # so that a run that was killed can begin again
        "seed": args.seed,
        "model": {"name": args.model},
        "data": {
            "train": args.train.split(","),
            "validation": args.validation.split(","),
            "max_length": args.length,
            "max_validation_records": args.held_out,
        },
        "optimizer": {"lr": args.lr},
        "training": {
            "max_time": args.seconds,
            "batch_size": args.sequences,
            "micro_batch_size": args.sequences,
        },
        "evaluation": {"metrics": ["chrf", "bleu"], "generate": args.answers, "samples": 0},
        "generation": {"max_new_tokens": args.tokens},
    }
    if mode := args.worker.partition(":")[2]:
        tree["vocabulary"] = {"mode": mode}
    return make_config(_with_template(tree))


def _with_template(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree of a config, with a chat template if the model has none."""
    from finetune.config.loading import make_config
    from finetune.models.tokenizers import load_tokenizer
    from finetune.recipes.build.model import model_spec

    tokenizer: Any = load_tokenizer(model_spec(make_config(tree).model))
    template = {} if tokenizer.chat_template else {"chat_template": "chatml"}
    return {**tree, "model": {**tree["model"], **template}}


def run_finetune(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train with this project; return the plain model and what was measured."""
    from finetune.models.vocabulary.activate import deactivate_vocabulary

    records: list[Any] = []
    trainer, parts = make_trainer(config_of(args), records.append)
    started = time.monotonic()
    trainer.train()
    measured = {
        "training_seconds": time.monotonic() - started,
        "steps": len(records),
        "tokens": sum(record.num_tokens for record in records),
        "peak_memory_bytes": peak_memory(),
    }
    deactivate_vocabulary(parts.language_model)
    return parts.model, measured


def run_whole(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train as `finetune train` does; return the plain model that it kept and what was measured.

    It holds out some of the training data, evaluates on it after each epoch and keeps the best
    weights. The time includes these evaluations, but neither the first nor the last one.
    """
    from finetune import train
    from finetune.recipes.build.model import load_trained
    from finetune.run.records import Evaluation, StepRecord

    steps: list[tuple[float, StepRecord]] = []

    def on_record(record: StepRecord | Evaluation) -> None:
        if isinstance(record, StepRecord):
            steps.append((time.monotonic(), record))

    config = config_of(args)
    data = config.data.model_copy(update={"validation": None})
    evaluation = config.evaluation.model_copy(update={"metrics": (), "generate": 0})
    update = {"data": data, "evaluation": evaluation}
    result = train(config.model_copy(update=update), on_record=on_record, quiet=True)
    measured = {
        "training_seconds": steps[-1][0] - steps[0][0] + steps[0][1].seconds,
        "steps": len(steps),
        "tokens": sum(record.num_tokens for _, record in steps),
        "peak_memory_bytes": peak_memory(),
        "own_metrics": dict(result.metrics),
    }
    assert result.model_path is not None
    return load_trained(result.model_path, config.model)[0], measured


def run_trl(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train with TRL in the mode `args.mode`; return a plain model and what was measured."""
    from transformers import TrainerCallback

    from finetune.display import Display
    from finetune.recipes.build.material import read_material

    material = read_material(config_of(args), Display(enabled=False))
    examples = [material.train[i] for i in shuffled(len(material.train), args.seed)]
    counts = {"steps": 0, "tokens": 0, "started": 0.0, "ended": 0.0}

    def share() -> float:
        return (time.monotonic() - counts["started"]) / args.seconds

    class Clock(TrainerCallback):
        """The end of the time, and a rate that falls over it."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            counts["started"] = counts["started"] or time.monotonic()
            for group in trainer.optimizer.param_groups:
                group["lr"] = args.lr * max(0.0, 1 - share())

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            counts["steps"], counts["ended"] = state.global_step, time.monotonic()
            control.should_training_stop = share() >= 1

    model = _lora(load_plain_of(material)) if args.worker == "trl-lora" else load_plain_of(material)
    trainer = trl_trainer(
        model,
        material.tokenizer,
        examples,
        args.folder / "trl",
        callbacks=[Clock()],
        max_steps=10**6,
        seed=args.seed,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        **batches_of(args.mode, examples, sequences=args.sequences, length=args.length),
    )
    collate = trainer.data_collator

    def counting(features: Any) -> Any:
        batch = collate(features)
        mask = batch.get("attention_mask")
        counts["tokens"] += batch["input_ids"].numel() if mask is None else int(mask.sum())
        return batch

    trainer.data_collator = counting
    trainer.train()
    measured = {
        "training_seconds": counts["ended"] - counts["started"],
        "steps": counts["steps"],
        "tokens": counts["tokens"],
        "peak_memory_bytes": peak_memory(),
    }
    if args.worker == "trl-lora":
        model = model.merge_and_unload()
    plain = load_plain_of(material)  # TRL patches its model's forward
    plain.load_state_dict(model.state_dict())
    return plain, measured


def _lora(model: Any) -> Any:
    """Return the model with LoRA on all linear layers, as our own LoRA has it."""
    from finetune.models.adapters import add_lora

    return add_lora(
        model, rank=RANK, alpha=2.0 * RANK, dropout=0.0, target_modules="all-linear",
        new_token_ids=(),
    )  # fmt: skip


def evaluate(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Return the figures of a plain model, the same for all, in float32."""
    from finetune.display import Display
    from finetune.models.language_model import LanguageModel
    from finetune.recipes.build.accelerator import make_accelerator
    from finetune.recipes.build.evaluator import Evaluator
    from finetune.recipes.build.material import read_material

    config, quiet = config_of(args), Display(enabled=False)
    training = config.training.model_copy(update={"precision": "fp32"})
    config = config.model_copy(update={"training": training})
    material, accelerator = read_material(config, quiet), make_accelerator(config, quiet)
    evaluator = Evaluator(
        material, LanguageModel(model.to(accelerator.device).eval()), accelerator,
        num_answers=args.answers, display=quiet,
    )  # fmt: skip
    assert material.validation is not None
    found: dict[str, Any] = {"loss": evaluator.loss(material.validation).loss}
    if args.answers:
        scores, answers = evaluator.answer(evaluator.prompts)
        found |= {"chrf": scores["chrf"], "bleu": scores["bleu"], "num_answers": len(answers)}
        keys = ("prompt", "reference", "output")
        found["answers"] = [{key: a[key] for key in keys} for a in answers]  # type: ignore[literal-required]
    return found


def work(args: argparse.Namespace) -> None:
    """Train as one contestant, evaluate, and write the result to the run's folder."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.trl:
        sys.path.append(str(args.trl))
    measured: dict[str, Any] = {}
    if args.worker == "untrained":
        from finetune.display import Display
        from finetune.recipes.build.material import read_material

        model = load_plain_of(read_material(config_of(args), Display(enabled=False)))
    else:
        kind = args.worker.partition(":")[0]
        run = {"finetune": run_finetune, "finetune-train": run_whole}.get(kind, run_trl)
        model, measured = run(args)
    if args.worker != "speed":
        measured |= evaluate(args, model)
    partial = args.folder / "result.part"
    partial.write_text(json.dumps(measured, ensure_ascii=False), encoding="utf-8")
    partial.rename(args.folder / "result.json")
