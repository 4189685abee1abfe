"""How long a run will take, from a few of its own steps.

Floor 5. Nothing is written, and the model that was timed is thrown away.
"""

import math
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch

from finetune.evaluation import evaluate_loss
from finetune.inference.generation import GenerationSettings, generate
from finetune.models.language_model import LanguageModel
from finetune.optim import build_optimizer, clip_grad_norm_
from finetune.recipes.data import first_prompts, generation_metrics
from finetune.recipes.optimizer import optimizer_options
from finetune.recipes.parts import Parts

TIMED_STEPS = 3  # after one that is not counted, in which the optimizer makes its state
TIMED_TOKENS = 8  # of each answer


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds. Loading, saving and the report come on top."""

    step: float  # one optimizer step of the mean number of tokens
    tokens_per_second: float  # without padding
    training: float  # all steps
    evaluation: float  # the loss of all held-out data, once
    generation: float  # all answers of one evaluation, none shorter than generation.max_new_tokens
    num_evaluations: int

    @property
    def total(self) -> float:
        return self.training + self.num_evaluations * (self.evaluation + self.generation)


def time_run(parts: Parts, *, tokens_per_step: float, num_evaluations: int) -> TimeEstimate:
    """Take a few steps, read one batch of held-out data, begin one batch of answers, and extrapolate."""
    evaluation, generation = (
        (_time_evaluation(parts), _time_generation(parts)) if num_evaluations else (0.0, 0.0)
    )
    speed = _training_speed(parts)
    step = tokens_per_step / speed
    return TimeEstimate(
        step, speed, step * parts.num_steps, evaluation, generation, num_evaluations
    )


def _training_speed(parts: Parts) -> float:
    """Tokens per second of forward, backward, clip and optimizer step."""
    config, accelerator = parts.config, parts.accelerator
    optimizer: Any = build_optimizer(
        parts.model, config.optimizer.name, **optimizer_options(config)
    )
    module, optimizer = accelerator.prepare(parts.language_model, optimizer)
    module.train()
    seconds, tokens = 0.0, 0
    for number, batch in enumerate(islice(parts.batches, 1 + TIMED_STEPS)):
        started = time.perf_counter()
        parts.vocabulary.before_step(number, batch)
        for micro_batch in batch.micro_batches:
            tensors = cast(dict[str, torch.Tensor], micro_batch)
            loss = module(**{key: value.to(accelerator.device) for key, value in tensors.items()})
            accelerator.backward(loss / batch.num_target_tokens)
        float(
            clip_grad_norm_(module.parameters(), config.training.max_grad_norm or math.inf)
        )  # waits for the device
        optimizer.step()
        optimizer.zero_grad()
        if number:
            seconds += time.perf_counter() - started
            tokens += batch.num_tokens
    return tokens / seconds


def _time_evaluation(parts: Parts) -> float:
    assert parts.validation is not None
    batches = list(parts.evaluation_batches(parts.validation))
    started = time.perf_counter()
    with parts.accelerator.autocast():
        evaluate_loss(
            _module(parts), batches[:1], tokenizer=parts.tokenizer, device=parts.accelerator.device
        )
    sizes = [batch["input_ids"].numel() for batch in batches]
    return (time.perf_counter() - started) * sum(sizes) / sizes[0]


def _time_generation(parts: Parts) -> float:
    config = parts.config
    count = (
        config.evaluation.generate
        if generation_metrics(config, parts.format)
        else config.evaluation.samples
    )
    room = config.generation.max_new_tokens
    prompts = first_prompts(
        parts.raw.validation,
        parts.format,
        count,
        model=parts.model,
        room=room,
        note=parts.display.note,
    )
    if not prompts or not (config.evaluation.generate or config.evaluation.samples):
        return 0.0
    first = prompts[: config.generation.batch_size]
    new_tokens = min(TIMED_TOKENS, config.generation.max_new_tokens)
    settings = config.generation.model_dump(exclude={"batch_size"}) | {"max_new_tokens": new_tokens}
    started = time.perf_counter()
    with parts.accelerator.autocast():
        generate(
            _module(parts).model,
            [prompt.input_ids for prompt in first],
            batch_size=len(first),
            settings=GenerationSettings(**settings, stop_ids=[], seed=0),
        )
    seconds = time.perf_counter() - started
    return seconds * config.generation.max_new_tokens / new_tokens * len(prompts) / len(first)


def _module(parts: Parts) -> LanguageModel:
    return cast(LanguageModel, parts.language_model.to(parts.accelerator.device))
