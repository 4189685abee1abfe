"""The plan of a run as tables. Floor 5."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from finetune.run.wording import clock, size

if TYPE_CHECKING:
    from finetune.recipes.plan.planner import Plan

NO_FIT = (
    "It does not fit, so no step was timed. What would save memory, each change alone:",
    "It does not fit, so no step was timed, and no single change that is tried here would help: take a smaller model.",
)


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def print_plan(plan: "Plan", console: Console) -> None:
    """To `console`, in the order in which a reader decides: the model, its memory, whether it fits, time, disk."""
    console.print(_model(plan))
    console.print(_memory(plan))
    where = "GPU" if plan.device == "cuda" else "main"
    moments = plan.memory.moments
    console.print(
        f"expected peak {size(plan.memory.peak)} ({max(moments, key=moments.__getitem__)}); this machine has "
        f"{size(plan.machine_memory)} of {where} memory, {size(plan.free_memory)} free: "
        f"[bold]{'it fits' if plan.fits else 'it does not fit'}[/bold]\n"
    )
    console.print(_work(plan))
    if plan.fits:
        return
    console.print(NO_FIT[0] if plan.advice else NO_FIT[1])
    for change, saved in plan.advice:
        enough = "fits" if plan.memory.peak - saved <= plan.free_memory else "still too much"
        console.print(
            f"  {change:<42} saves {size(saved):>10} -> {size(plan.memory.peak - saved)}, {enough}"
        )


def _model(plan: "Plan") -> Table:
    model = plan.model
    table = _table("the model")
    table.add_row("architecture", model["architecture"] + (" with LoRA" if model["lora"] else ""))
    table.add_row("parameters", f"{model['parameters']:,}")
    table.add_row(
        "trainable",
        f"{model['trainable_parameters']:,} ({model['trainable_parameters'] / model['parameters']:.1%})",
    )
    ties = "input and output tied" if model["tied"] else "input and output apart"
    table.add_row(
        "token tables",
        f"{model['token_table_parameters']:,} ({model['token_table_share']:.1%}), {ties}",
    )
    rows, used = model["vocab_size"], plan.work.used_rows
    covered = (
        ""
        if plan.work.coverage is None
        else f"; {plan.work.coverage:.2%} of the held-out tokens covered"
    )
    table.add_row(
        "rows that the training data uses", f"{used:,} of {rows:,} ({used / rows:.1%}){covered}"
    )
    table.add_row("vocabulary", model["vocabulary"])
    return table


def _memory(plan: "Plan") -> Table:
    memory, work = plan.memory, plan.work
    table = _table("memory, by part")
    table.add_row("process and libraries", size(memory.baseline))
    table.add_row("weights", size(memory.weights))
    table.add_row("gradients", size(memory.gradients))
    table.add_row("optimizer state", size(memory.optimizer_state))
    table.add_row(
        "activations",
        f"{size(memory.activations)}   (a micro-batch of {work.rows} x {work.length} tokens)",
    )
    table.add_row(
        "logits and loss", f"{size(memory.loss)}   (a chunk of logits, the gradient of the head)"
    )
    table.add_section()
    for moment, used in memory.moments.items():
        table.add_row(f"in use at once: {moment}", size(used))
    return table


def _work(plan: "Plan") -> Table:
    work, time = plan.work, plan.time
    table = _table("the work")
    table.add_row("steps", f"{work.num_steps:,}")
    tokens = f"{work.tokens_per_step:,.0f} a step, {work.tokens_per_step * work.num_steps:,.0f} in all, without padding"
    table.add_row("tokens", tokens)
    if time is not None:
        table.add_row(
            "training",
            f"{clock(time.training)}   ({time.step:.2f} s a step, {time.tokens_per_second:,.0f} tokens/s)",
        )
        each = f"{work.num_evaluations} times {clock(time.evaluation)} for the loss and at most {clock(time.generation)} for answers"
        table.add_row("evaluation", f"at most {clock(time.total - time.training)}   ({each})")
        table.add_row("in all", f"at most {clock(time.total)}, beside loading and saving")
    table.add_row(
        "disk",
        f"at most {size(plan.disk_bytes)}   (a checkpoint has {size(plan.checkpoint_bytes)})",
    )
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column()
    table.add_column()
    return table
