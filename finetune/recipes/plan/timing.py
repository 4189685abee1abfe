"""How long a run will take, from a few of its own steps.

No file is written, and the model that was timed is thrown away.
"""

import time
from dataclasses import dataclass
from itertools import islice

from finetune.distributed.engines import prepare
from finetune.recipes.build.evaluator import Evaluator, evaluator_of
from finetune.recipes.build.optimizer import make_optimizer
from finetune.recipes.build.parts import Parts
from finetune.training.step import take_step

TIMED_STEPS = (3, 15)  # at least and at most, after a first one that makes the optimizer's state
TIMED_SECONDS = 10.0  # enough for more than the least: new shapes of products make steps uneven
TIMED_TOKENS = 8  # generated of each answer


@dataclass(frozen=True)
class TimeEstimate:
    """The times of a run in seconds, without loading, saving and the report."""

    step: float  # one optimizer step of the mean number of tokens
    tokens_per_second: float  # without padding
    training: float  # all steps of the run
    evaluation: float  # the loss of all held-out data, once
    generation: float  # all answers of one evaluation, none shorter than generation.max_new_tokens
    num_evaluations: int

    @property
    def evaluations(self) -> float:
        """Seconds of all evaluations of the run."""
        return self.num_evaluations * (self.evaluation + self.generation)

    @property
    def total(self) -> float:
        return self.training + self.evaluations


def steps_within(limit: float, time: TimeEstimate, *, evaluate_every: int) -> int:
    """Return how many steps fit into `limit` seconds, with the evaluations between them.

    There is one after every `evaluate_every` steps. The one at the end does not count.
    """
    evaluation = time.evaluation + time.generation
    rounds, rest = divmod(limit, evaluate_every * time.step + evaluation)
    further = min(evaluate_every, round(rest / time.step))
    return max(1, int(rounds) * evaluate_every + further)


def time_run(parts: Parts, *, tokens_per_step: float, num_evaluations: int) -> TimeEstimate:
    """Return the times of the run, extrapolated from a few steps and two batches.

    One batch is of held-out data. The other is of prompts, whose answers are only begun.
    """
    parts.language_model.to(parts.accelerator.device)
    evaluation = generation = 0.0
    if num_evaluations:
        evaluator = evaluator_of(parts)
        evaluation = _time_evaluation(parts, evaluator)
        generation = _time_generation(parts, evaluator)
    speed = _training_speed(parts)
    step = tokens_per_step / speed
    return TimeEstimate(
        step, speed, step * parts.num_steps, evaluation, generation, num_evaluations
    )


def _training_speed(parts: Parts) -> float:
    """Return the tokens per second of whole optimizer steps, as the trainer takes them."""
    config, accelerator = parts.config, parts.accelerator
    raw = make_optimizer(parts.model, config)
    module, optimizer, average_rows = prepare(accelerator, parts.language_model, raw, parts.display)
    seconds, tokens = 0.0, 0
    for number, batch in enumerate(islice(parts.batches, 1 + TIMED_STEPS[1])):
        started = time.perf_counter()
        parts.vocabulary.before_step(number, batch)
        take_step(
            module,
            optimizer,
            batch,
            accelerator=accelerator,
            max_grad_norm=config.training.max_grad_norm,
            average_rows=average_rows,
        )
        if number:
            seconds += time.perf_counter() - started
            tokens += batch.num_tokens
        if number >= TIMED_STEPS[0] and seconds >= TIMED_SECONDS:
            break
    return tokens / seconds


def _time_evaluation(parts: Parts, evaluator: Evaluator) -> float:
    """Return the seconds of the loss on all held-out data, from those of its first batch."""
    assert parts.material.validation is not None
    sizes = [batch["input_ids"].numel() for batch in evaluator.batches(parts.material.validation)]
    started = time.perf_counter()
    evaluator.loss(parts.material.validation, num_batches=1)
    return (time.perf_counter() - started) * sum(sizes) / sizes[0]


def _time_generation(parts: Parts, evaluator: Evaluator) -> float:
    """Return the seconds of all answers, from those of the first tokens of the first batch."""
    generation, prompts = parts.config.generation, evaluator.prompts
    if not prompts:
        return 0.0
    first = prompts[: generation.batch_size]
    num_tokens = min(TIMED_TOKENS, generation.max_new_tokens)
    started = time.perf_counter()
    evaluator.begin_answers(first, num_tokens)
    seconds = time.perf_counter() - started
    return seconds * generation.max_new_tokens / num_tokens * len(prompts) / len(first)
