"""What the contestants of a speed benchmark share: config, data, weights, and the evaluation."""

import argparse
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLIP = 1.0
ANSWERS = 16  # generated from the first held-out prompts, for the share of inactive tokens in them


def device() -> str:
    """Return the type of the device that everything runs on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_memory() -> int:
    """Return the most bytes in use so far: of the GPU's allocator, or of the process.

    Waits until the GPU has done its work.
    """
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def training_state(model: Any, optimizer: Any) -> int:
    """Return the bytes of weights, gradients and optimizer state, which no batch changes."""
    import torch

    weights = {id(p): p for p in model.parameters()}.values()
    states = (value for state in optimizer.state.values() for value in state.values())
    moments = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    return sum(p.nbytes * (2 if p.requires_grad else 1) for p in weights) + moments


def our_flops(model: Any, sample: Any) -> dict[str, float]:
    """Return the operations of one step's matrix products, for a computed and for a target token.

    Attention is left out. `model`: the causal language model while it trains. `sample`: the frozen
    rows that were drawn, or None.
    """
    from finetune.models.vocabulary.rows import ActiveHead

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = {id(p) for part in (embedding, head) for p in part.parameters()}
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in apart)
    frozen = 0
    if isinstance(head, ActiveHead):
        frozen = len(head.vocabulary.frozen if sample is None else sample[0].weight)
    rows, width = head.weight.shape
    return {"token": 6 * body, "target": (6 * rows + 4 * frozen) * width}


def has_template(model: Path) -> bool:
    """Return whether the model in a folder has a chat template."""
    if (model / "chat_template.jinja").is_file():
        return True
    return "chat_template" in (model / "tokenizer_config.json").read_text()


def our_config(args: argparse.Namespace, *, precision: str | None = None) -> Any:
    """Return the config of our contestant; its data is everybody's."""
    from finetune.config import RunConfig

    return RunConfig.model_validate(
        {
            "output_dir": args.folder,
            "seed": args.seed,
            "model": {
                "name": str(args.model),
                "chat_template": None if has_template(args.model) else "chatml",
            },
            "vocabulary": {
                "mode": args.worker.partition(":")[2] or "auto",
                "num_sampled": args.num_sampled,
            },
            "data": {
                "train": str(args.train or "package:chat.en.train"),
                "validation": str(args.validation or "package:chat.en.test"),
                "unrelated": None if args.unrelated is None else str(args.unrelated),
                "max_length": args.length,
                "max_validation_records": args.held_out,
            },
            "optimizer": {"name": "adamw", "lr": args.lr, "weight_decay": 0.0},
            "scheduler": {"name": "linear", "warmup_steps": 0},
            "training": {
                "max_steps": args.steps,
                "batch_size": args.sequences,
                "micro_batch_size": args.sequences,
                "max_grad_norm": CLIP,
                "precision": precision or args.precision,
            },
            "evaluation": {"batch_size": args.sequences, "metrics": []},
            "generation": {"batch_size": ANSWERS, "max_new_tokens": 32},
        }
    )


def our_material(args: argparse.Namespace, **changes: str) -> Any:
    """Return the records, the tokenizer and the encoded data of our config."""
    from finetune.display import Display
    from finetune.recipes.build.material import read_material

    return read_material(our_config(args, **changes), Display(enabled=False))


def make_trainer(
    config: Any,
    on_record: Callable[[Any], None],
    evaluate: Callable[[Any, int], dict[str, float]] = lambda parts, step: {},
) -> tuple[Any, Any]:
    """Return the trainer and the parts of a run, without checkpoints and export.

    `evaluate(parts, step)` is called at the end of each epoch, and at the end.
    """
    from finetune.display import Display
    from finetune.distributed.engines import prepare
    from finetune.recipes.build.accelerator import make_accelerator
    from finetune.recipes.build.material import read_material
    from finetune.recipes.build.optimizer import make_optimizer, make_scheduler
    from finetune.recipes.build.parts import assemble
    from finetune.run.folder import RunDir
    from finetune.run.log import MetricLogger
    from finetune.training.cadence import Cadence
    from finetune.training.clock import Clock
    from finetune.training.stopping import DivergenceGuard
    from finetune.training.trainer import Trainer

    class NoCheckpoints:
        def save(self, *_: Any, **__: Any) -> None:
            pass

    class Whole(Trainer):
        """A run that a signal ended has no figures."""

        def train(self) -> Any:
            if (stopped := super().train()) == "signal":
                sys.exit(130)
            return stopped

    display = Display(enabled=False)
    accelerator = make_accelerator(config, display)
    parts = assemble(read_material(config, display), accelerator=accelerator, display=display)
    config, limit = parts.config, parts.config.training.max_time
    optimizer = make_optimizer(parts.model, config)
    scheduler = make_scheduler(optimizer, config, parts.num_steps)
    module, optimizer, average_rows = prepare(accelerator, parts.language_model, optimizer, display)
    run = RunDir(config.output_dir)
    run.root.mkdir(parents=True, exist_ok=True)
    trainer = Whole(
        accelerator=accelerator,
        model=module,
        optimizer=optimizer,
        scheduler=scheduler,
        batches=parts.batches,
        evaluate=lambda step: evaluate(parts, step),
        cadence=Cadence(
            parts.num_steps, _epoch_of(parts), parts.num_steps, "loss", False, patience=None
        ),
        checkpoints=NoCheckpoints(),  # type: ignore[arg-type]
        logger=MetricLogger(run.metrics, listeners=(on_record,)),
        guard=DivergenceGuard(threshold=config.training.divergence_threshold),
        max_grad_norm=config.training.max_grad_norm,
        seed=config.seed,
        identity=parts.identity,
        bad_batch_path=run.bad_batch,
        clock=None if limit is None else Clock(limit, accelerator),
        average_rows=average_rows,
        before_step=parts.vocabulary.before_step,
    )
    return trainer, parts


def _epoch_of(parts: Any) -> int:
    """Return the steps of an epoch; of a run that something else ends, its steps."""
    training = parts.config.training
    limited = training.max_steps is not None or training.max_time is not None
    return parts.num_steps if limited else parts.batches.steps_per_epoch


@contextmanager
def our_trainer(
    args: argparse.Namespace, on_record: Callable[[Any], None]
) -> Iterator[tuple[Any, Any]]:
    """Yield the trainer and the parts of our contestant, without evaluations."""
    yield make_trainer(our_config(args), on_record)


def load_plain(args: argparse.Namespace) -> Any:
    """Return the model as transformers loads it, with rows for the template's new tokens."""
    return load_plain_of(our_material(args))


def load_plain_of(material: Any) -> Any:
    """Return the model of a material as `load_plain` does."""
    from finetune.recipes.build.model import make_model

    return make_model(material.config.model, material.tokenizer, material.tokens, seed=0)


def evaluate_model(args: argparse.Namespace, model: Any) -> dict[str, float]:
    """Return the figures of a trained plain model, in float32 over the full vocabulary.

    The held-out loss, also apart for the tokens that the training data has and for the inactive
    others. The probability of inactive tokens, and their share in answers. The loss on unrelated
    text. How far the rows of tokens moved that neither the training nor the held-out data has.
    """
    import torch

    from finetune.display import Display
    from finetune.models.language_model import LanguageModel
    from finetune.recipes.build.accelerator import make_accelerator
    from finetune.recipes.build.evaluator import Evaluator
    from finetune.recipes.build.vocabulary import active_ids

    material, display = our_material(args, precision="fp32"), Display(enabled=False)
    base = load_plain(args).get_input_embeddings().weight.detach()

    def outside(*corpora: Any) -> torch.Tensor:
        ids = active_ids(material.tokenizer, corpora, ())
        mask = torch.ones(len(base), dtype=torch.bool)
        mask[[i for i in ids if i < len(base)]] = False
        return mask

    now = model.get_input_embeddings().weight.detach().cpu()
    moved = (now - base)[outside(material.train, material.validation)].abs().max()
    accelerator = make_accelerator(material.config, display)
    evaluator = Evaluator(
        material,
        LanguageModel(model.to(accelerator.device)),
        accelerator,
        num_answers=ANSWERS,
        display=display,
        inactive=lambda: outside(material.train),
    )
    found, _ = evaluator.evaluate()
    return found | {"held_out_loss": found["loss"], "inactive_rows_moved": float(moved)}


def shuffled(count: int, seed: int) -> list[int]:
    """Return the numbers below `count` in an order that `seed` chooses."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
