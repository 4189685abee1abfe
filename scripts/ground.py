"""What the contestants of a speed benchmark have in common: config, data, weights, and how a model is read afterwards."""

import argparse
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLIP = 1.0
ANSWERS = (
    16  # to the first held-out prompts, for the share of inactive tokens in what a model writes
)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_memory() -> int:
    """Bytes, so far: of the GPU, as its allocator counts them, or of the process. Waits until the GPU has done its work."""
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def training_state(model: Any, optimizer: Any) -> int:
    """Bytes of weights, gradients and optimizer state: what is there whatever the batch."""
    import torch

    weights = {id(p): p for p in model.parameters()}.values()
    moments = (
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return sum(p.nbytes * (2 if p.requires_grad else 1) for p in weights) + sum(
        value.nbytes for value in moments
    )


def our_flops(model: Any, sample: Any) -> dict[str, int]:
    """Operations of the matrix products of one step of ours, a token and a target token; attention is left out.

    model: the causal language model while it trains; sample: of frozen rows, or None.
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
    return (model / "chat_template.jinja").is_file() or "chat_template" in (
        model / "tokenizer_config.json"
    ).read_text()


def our_config(args: argparse.Namespace) -> Any:
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
                "max_length": args.length,
                "max_validation_records": args.held_out,
            },
            "optimizer": {"name": "adamw", "lr": args.lr, "weight_decay": 0.0},
            "scheduler": {"name": "linear", "warmup_steps": 0},
            "training": {
                "max_steps": args.steps,
                "batch_size": args.rows,
                "micro_batch_size": args.rows,
                "max_grad_norm": CLIP,
            },
            "evaluation": {"batch_size": args.rows},
        }
    )


@contextmanager
def our_trainer(
    args: argparse.Namespace, on_record: Callable[[Any], None]
) -> Iterator[tuple[Any, Any]]:
    """The trainer as the recipe builds it, without evaluations, checkpoints and export."""
    from finetune.display import Display
    from finetune.distributed.engines import prepare
    from finetune.optim import build_lr_scheduler, build_optimizer
    from finetune.recipes.build.accelerator import make_accelerator
    from finetune.recipes.build.material import read_material
    from finetune.recipes.build.optimizer import optimizer_options
    from finetune.recipes.build.parts import assemble
    from finetune.run.folder import RunDir
    from finetune.run.log import MetricLogger
    from finetune.training.stopping import DivergenceGuard
    from finetune.training.trainer import Cadence, Trainer

    class NoCheckpoints:
        def save(self, *_: Any, **__: Any) -> None:
            pass

    config, display = our_config(args), Display(enabled=False)
    accelerator = make_accelerator(config, display)
    material = read_material(config, display)
    parts = assemble(material, accelerator=accelerator, display=display)
    optimizer = build_optimizer(parts.model, config.optimizer.name, **optimizer_options(config))
    scheduler = build_lr_scheduler(
        optimizer, "linear", num_steps=args.steps, warmup_steps=0, min_lr_ratio=0.0
    )
    module, optimizer, average_rows = prepare(accelerator, parts.language_model, optimizer, display)
    run = RunDir(args.folder)
    yield (
        Trainer(
            accelerator=accelerator,
            model=module,
            optimizer=optimizer,
            scheduler=scheduler,
            batches=parts.batches,
            evaluate=lambda step: {},
            cadence=Cadence(args.steps, args.steps, args.steps, "loss", False, None),
            checkpoints=NoCheckpoints(),  # type: ignore[arg-type]
            logger=MetricLogger(run.metrics, listeners=(on_record,)),
            guard=DivergenceGuard(threshold=config.training.divergence_threshold),
            max_grad_norm=CLIP,
            seed=config.seed,
            identity=parts.identity,
            bad_batch_path=run.bad_batch,
            average_rows=average_rows,
            before_step=parts.vocabulary.before_step,
        ),
        parts,
    )


def read_data(args: argparse.Namespace) -> tuple[Any, Any]:
    """Tokenizer and encoded training examples: what our recipe reads, for those who do not use it."""
    material = _material(args)
    return material.tokenizer, material.train


def _material(args: argparse.Namespace) -> Any:
    from finetune.display import Display
    from finetune.recipes.build.material import read_material

    return read_material(our_config(args), Display(enabled=False))


def load_plain(args: argparse.Namespace) -> Any:
    """The model as its makers' library loads it, with rows for the template's new tokens."""
    from finetune.models.tokenizers import set_template
    from finetune.recipes.build.model import make_model, make_tokenizer

    config = our_config(args).model
    tokenizer = make_tokenizer(config, ())
    tokens = set_template(tokenizer, config.chat_template)
    return make_model(config, tokenizer, tokens, seed=0)


def read_model(args: argparse.Namespace, model: Any) -> dict[str, float]:
    """What a trained plain model has become: held-out loss over the full vocabulary, inside and outside of the training data's
    tokens, the probability that goes to inactive ones and their share in answers, the loss on unrelated text, and how far the
    rows of inactive ones moved."""
    import torch

    from finetune.config.schema import SourceSection
    from finetune.data.batches.dataset import EvaluationBatches
    from finetune.data.encode import encode
    from finetune.data.formats.text import TextFormat
    from finetune.data.sources import load_records
    from finetune.data.types import Prompt
    from finetune.evaluation import evaluate_generation, evaluate_loss
    from finetune.inference.generation import GenerationSettings
    from finetune.models.language_model import LanguageModel
    from finetune.models.tokenizers import pad_id
    from finetune.models.vocabulary.activate import activate_vocabulary
    from finetune.recipes.build.data import as_sources
    from finetune.recipes.build.vocabulary import active_ids

    material = _material(args)
    tokenizer, train, validation = material.tokenizer, material.train, material.validation
    base = load_plain(args).get_input_embeddings().weight
    ids = sorted(i for i in active_ids(tokenizer, [train, validation], ()) if i < len(base))
    inactive = torch.ones(len(base), dtype=torch.bool)
    inactive[ids] = False
    moved = (
        (model.get_input_embeddings().weight.detach().cpu() - base.detach())[inactive].abs().max()
    )
    del base
    activate_vocabulary(model, ids)
    wrapped = LanguageModel(model.to(device()))

    def loss_on(dataset: Any, mask: Any) -> dict[str, float]:
        batches = EvaluationBatches(
            dataset, max_length=args.length, packing=True, batch_size=args.rows, pad_id=pad_id(tokenizer)
        )  # fmt: skip
        return evaluate_loss(
            wrapped, batches, inactive=mask, tokenizer=tokenizer, device=torch.device(device())
        ).as_dict()

    unseen = torch.ones_like(inactive)
    unseen[[i for i in active_ids(tokenizer, [train], ()) if i < len(unseen)]] = False
    found = loss_on(validation, unseen)
    found["held_out_loss"], found["inactive_rows_moved"] = found.pop("loss"), float(moved)
    examples = [validation[i] for i in range(min(ANSWERS, len(validation)))]
    starts = [
        next(i for i, label in enumerate(example.labels) if label >= 0) for example in examples
    ]
    prompts = [
        Prompt(example.input_ids[:start], "", "")
        for example, start in zip(examples, starts, strict=True)
    ]
    scores, _ = evaluate_generation(
        model, tokenizer, prompts, metrics=(), inactive=unseen, batch_size=ANSWERS,
        settings=GenerationSettings(
            max_new_tokens=32, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0,
            stop_ids=[tokenizer.eos_token_id],
        ),
    )  # fmt: skip
    found |= scores
    if args.unrelated:
        rows = load_records(as_sources([SourceSection(path=str(args.unrelated))])).take(100)
        text = encode(
            rows,
            TextFormat(tokenizer=tokenizer, columns={}),
            max_length=args.length,
            overlong="truncate",
            vocab_size=len(inactive),
        )
        found["unrelated_loss"] = loss_on(text, None)["loss"]
    return found


def shuffled(count: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
