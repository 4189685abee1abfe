"""The one way to evaluate a model on data: its loss, its answers, and the metrics over them.

A run's own evaluations, `finetune evaluate`, a comparison's test loss and the timing of
`finetune plan` all come here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from finetune.data.batches.dataset import EvaluationBatches
from finetune.data.encode import EncodedDataset
from finetune.data.types import Prompt
from finetune.display import Display, differences
from finetune.errors import UserError
from finetune.evaluation import Answer, LossResult, evaluate_generation, evaluate_loss
from finetune.evaluation.loss import count_target_bytes
from finetune.inference.generation import GenerationSettings
from finetune.models.language_model import LanguageModel, keeping_casts
from finetune.models.speed import uncompiled
from finetune.models.tokenizers import pad_id
from finetune.recipes.build.data import first_prompts, generation_metrics
from finetune.recipes.build.material import Material
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.parts import Parts
from finetune.run.wording import listed


class Evaluator:
    """The evaluations of a language model, as it is at the time, on the data of `material`.

    Every process of a run calls the same methods; each evaluates its share. `inactive()` returns
    [V] bool, true for tokens that the run does not use, or None (see `evaluate_loss`).
    `num_answers`: how many held-out prompts are answered at most. `share`: examples may share their
    beginnings, if that saves enough.
    """

    def __init__(
        self,
        material: Material,
        language_model: LanguageModel,
        accelerator: Accelerator,
        *,
        num_answers: int,
        display: Display,
        inactive: Callable[[], torch.Tensor | None] = lambda: None,
        share: bool = False,
    ) -> None:
        config = material.config
        self.share = share
        self.material, self.language_model = material, language_model
        self.accelerator, self.inactive, self.display = accelerator, inactive, display
        self.metrics = generation_metrics(config, material.format)
        room = config.generation.max_new_tokens
        self.prompts = first_prompts(
            material.raw.validation,
            material.format,
            num_answers,
            model=language_model.model,
            room=room,
            note=display.note,
        )
        if self.metrics and num_answers and material.validation is not None and not self.prompts:
            raise UserError(
                f"no held-out record gives a prompt to compute {listed(self.metrics)} from. "
                f"Give other held-out data, lower generation.max_new_tokens, which is {room}, or "
                "set evaluation.generate=0"
            )

    def evaluate(self) -> tuple[dict[str, Any], list[Answer]]:
        """Return all metrics, and the answers in the order of the prompts."""
        results = self.losses()
        scores, answers = self.answer(self.prompts)
        return results | scores, answers

    def losses(self) -> dict[str, Any]:
        """Return the loss on the held-out data with its parts, and the one on unrelated text."""
        results: dict[str, Any] = {}
        if self.material.validation is not None:
            results = self.loss(self.material.validation, inactive=self.inactive()).as_dict()
        if self.material.unrelated is not None:
            results["unrelated_loss"] = self.loss(self.material.unrelated).loss
        return results

    def loss(
        self,
        dataset: EncodedDataset,
        *,
        inactive: torch.Tensor | None = None,
        groups: torch.Tensor | None = None,
        num_batches: int | None = None,
    ) -> LossResult:
        """Return the loss on `dataset`, or on the first `num_batches` of its batches.

        `inactive` and `groups` split the loss by target token, as in `evaluate_loss`.
        """
        accelerator, batches = self.accelerator, self.batches(dataset)
        count = len(batches) if num_batches is None else num_batches
        read = (i for part in batches.example_ids[:count] for ids in part for i in ids)
        tokenizer = self.material.tokenizer
        num_bytes = sum(count_target_bytes(dataset[i].labels, tokenizer) for i in read)
        bar = self.display.bar("evaluating the loss", count)
        with bar as advance, accelerator.autocast():
            return evaluate_loss(
                self.language_model,
                islice(batches, count),
                num_bytes=num_bytes,
                device=accelerator.device,
                reduce=self._add_up,
                inactive=inactive,
                groups=groups,
                on_progress=lambda done: advance(1),
            )

    def batches(self, dataset: EncodedDataset) -> EvaluationBatches:
        """Return this process's batches of `dataset`."""
        config = self.material.config
        return EvaluationBatches(
            dataset,
            max_length=config.data.max_length,
            packing=config.data.packing,
            batch_size=config.evaluation.batch_size,
            pad_id=pad_id(self.material.tokenizer),
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            share=self.share,
        )

    def answer(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Any], list[Answer]]:
        """Answer `prompts`; return the metrics over the answers, and the answers."""
        section = self.material.config.generation
        settings = generation_settings(
            section, self.language_model.model, seed=self.material.config.seed
        )
        return self._answer(prompts, settings, self.metrics)

    def begin_answers(self, prompts: Sequence[Prompt], num_tokens: int) -> None:
        """Generate the first tokens of the answers to `prompts`, to see how long that takes."""
        section = self.material.config.generation.model_copy(update={"max_new_tokens": num_tokens})
        settings = generation_settings(section, self.language_model.model, seed=0)
        self._answer(prompts, replace(settings, stop_ids=[]), ())

    def _answer(
        self, prompts: Sequence[Prompt], settings: GenerationSettings, metrics: Sequence[str]
    ) -> tuple[dict[str, Any], list[Answer]]:
        if not prompts:
            return {}, []
        config, accelerator = self.material.config, self.accelerator
        block = own_block(len(prompts), accelerator)
        own = prompts[block]
        bar = self.display.bar("generating", len(own))
        model, eager = self.language_model.model, uncompiled(config.training.compile)
        with bar as advance, accelerator.autocast(), keeping_casts(model), eager:
            scores, answers = evaluate_generation(
                model,
                self.material.tokenizer,
                own,
                metrics=metrics,
                batch_size=config.generation.batch_size,
                first=block.start,
                inactive=self.inactive(),
                gather=gather_object if accelerator.num_processes > 1 else list,
                on_progress=differences(advance),
                settings=settings,
            )
        return dict(scores), answers

    def _add_up(self, sums: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        on_device = sums.to(self.accelerator.device)
        return self.accelerator.reduce(on_device, reduction="sum").cpu()


def own_block(count: int, accelerator: Accelerator) -> slice:
    """Return this process's stretch of `count` prompts.

    Those of all processes, in order, are the whole.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    return slice(rank * count // processes, (rank + 1) * count // processes)


def evaluator_of(parts: Parts) -> Evaluator:
    """Return the evaluator of a run, which answers as many prompts as the config asks for."""
    section = parts.config.evaluation
    scored = generation_metrics(parts.config, parts.material.format)
    return Evaluator(
        parts.material,
        parts.language_model,
        parts.accelerator,
        num_answers=section.generate if scored else section.samples,
        display=parts.display,
        inactive=parts.vocabulary.inactive_tokens,
        share=parts.sharing.possible,
    )
