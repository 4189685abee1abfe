"""`finetune plan`: what a run needs, printed before it is started."""

import math
from dataclasses import replace

from rich.console import Console

from finetune.config import RunConfig
from finetune.display import Display
from finetune.optim import check_optimizer
from finetune.recipes.build.accelerator import make_accelerator
from finetune.recipes.build.material import Material
from finetune.recipes.build.optimizer import low_rate, optimizer_options
from finetune.recipes.build.parts import (
    NOT_PACKED,
    Parts,
    assemble,
    count_steps,
    evaluation_seconds,
    evaluations_of_stream,
)
from finetune.recipes.build.sharing import sharing_lines
from finetune.recipes.build.size import step_size_in_words
from finetune.recipes.plan.planner import Plan, Planner, Work
from finetune.recipes.plan.tables import make_console, print_plan
from finetune.recipes.plan.timing import TimeEstimate, steps_within, time_run


def plan_run(
    config: RunConfig, *, memory_limit: int | None = None, console: Console | None = None
) -> Plan:
    """Print the plan of a run to stdout, and return it. No file is written.

    `memory_limit`: bytes, instead of what the machine has. If the run does not fit, no step is
    taken, and the plan has advice instead of times. Raises UserError as training would.
    """
    check_optimizer(config.optimizer.name, optimizer_options(config))
    if config.data.streaming:
        count_steps(config, None)  # raises if the stream has no end
    display = Display()
    with display.warnings():
        planner = Planner(config, display, memory_limit)
        plan = planner.plan()
        if plan.fits:
            parts = _real_parts(planner.given, display)
            if parts.config.data.packing != config.data.packing:  # this model cannot be packed
                planner.use(parts.material)
                plan = planner.plan()
            plan = _limited(config, replace(plan, time=_time_steps(parts, plan.work)))
        else:
            plan = replace(plan, advice=planner.advice(plan.memory.peak))
    print_plan(plan, console or make_console())
    for line in sharing_lines(planner.material):
        display.say(line)
    if (size := step_size_in_words(config, planner.material.config)) is not None:
        display.note(size)
    for sentence in (*planner.material.advice(), evaluations_of_stream(config), low_rate(config)):
        if sentence is not None:
            display.note(sentence)
    return plan


def _real_parts(material: Material, display: Display) -> Parts:
    """Load the real model, and report what was chosen because of it."""
    display.say("the run fits: timing a few steps of the real model")
    accelerator, quiet = make_accelerator(material.config, display), Display(enabled=False)
    parts = assemble(material, accelerator=accelerator, display=quiet)
    for note in quiet.notes:
        if note.startswith(NOT_PACKED):
            display.note(note)
    return parts


def _time_steps(parts: Parts, work: Work) -> TimeEstimate:
    """Take a few of the run's steps."""
    return time_run(
        parts, tokens_per_step=work.tokens_per_step, num_evaluations=work.num_evaluations
    )


def _limited(config: RunConfig, plan: Plan) -> Plan:
    """Return the plan with as many steps as fit into `training.max_time`, if that is set."""
    limit, work, time = config.training.max_time, plan.work, plan.time
    if limit is None or time is None:
        return plan
    every = work.evaluate_every
    if (seconds := evaluation_seconds(config)) is not None:
        every = min(every, max(1, round(seconds / time.step)))
    steps = min(steps_within(limit, time, evaluate_every=every), work.num_steps)
    evaluations = work.num_evaluations and (config.evaluation.before + math.ceil(steps / every))
    work = replace(work, num_steps=steps, num_evaluations=evaluations, evaluate_every=every)
    return replace(
        plan,
        work=work,
        time=replace(time, training=time.step * steps, num_evaluations=evaluations),
    )
