"""The plan of a run as tables."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.config.values import MOST
from finetune.display import plain_console
from finetune.recipes.plan.planner import Plan
from finetune.recipes.plan.timing import TimeEstimate
from finetune.run.wording import clock, size

NOT_TIMED = "The run does not fit, so no step was timed."


def make_console() -> Console:
    """Return a console for standard output, wide enough for the tables if it is no terminal."""
    console = plain_console()
    return console if console.is_terminal else plain_console(width=120)


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan in the order in which a reader decides.

    First the model, then its memory and whether it fits, then the work with its time.
    """
    console.print(_model(plan))
    console.print(f"vocabulary: {plan.model['vocabulary']}")
    for part in (_parts(plan), _phases(plan), _verdict(plan), _work(plan)):
        console.print()
        console.print(part)
    if plan.time is not None:
        console.print()
        console.print(_time(plan.time))
    if not plan.fits:
        _print_advice(plan, console)


def _model(plan: Plan) -> Table:
    model, work = plan.model, plan.work
    rows, in_use = model["vocab_size"], work.used_rows
    table = _table("the model")
    table.add_row("architecture", model["architecture"])
    table.add_row("adapters", "LoRA" if model["lora"] else "none")
    table.add_row("parameters", f"{model['parameters']:,}")
    trainable = model["trainable_parameters"]
    table.add_row(
        "trainable parameters", f"{trainable:,}", f"{trainable / model['parameters']:.1%}"
    )
    in_tables = f"{model['token_table_parameters']:,}"
    table.add_row("parameters of token tables", in_tables, f"{model['token_table_share']:.1%}")
    table.add_row("input and output table", "tied" if model["tied"] else "not tied")
    table.add_row("rows of the token table", f"{rows:,}")
    table.add_row("rows that the training data uses", f"{in_use:,}", f"{in_use / rows:.1%}")
    if work.coverage is not None:
        table.add_row("held-out tokens with such a row", "", f"{work.coverage:.2%}")
    return table


def _parts(plan: Plan) -> Table:
    memory, work = plan.memory, plan.work
    table = _table("memory by part")
    table.add_row("process", size(memory.baseline), "Python, the libraries, the data")
    table.add_row("weights", size(memory.weights))
    table.add_row("gradients", size(memory.gradients))
    table.add_row("optimizer state", size(memory.optimizer_state))
    micro_batch = f"a micro-batch of {work.num_sequences} x {work.length} tokens"
    table.add_row("activations", size(memory.activations), micro_batch)
    table.add_row("loss", size(memory.loss), "a chunk of logits, the gradient of the head")
    return table


def _phases(plan: Plan) -> Table:
    table = _table("memory in use at once, at most")
    for phase, num_bytes in plan.memory.phases.items():
        table.add_row(phase, size(num_bytes))
    return table


def _verdict(plan: Plan) -> Text:
    phases = plan.memory.phases
    kind = "GPU" if plan.device == "cuda" else "main"
    return Text.assemble(
        f"expected peak: {size(plan.memory.peak)} ({max(phases, key=phases.__getitem__)}). This "
        f"machine has {size(plan.machine_memory)} of {kind} memory, {size(plan.free_memory)} of it "
        "free: ",
        ("the run fits" if plan.fits else "the run does not fit", "bold"),
    )


def _work(plan: Plan) -> Table:
    work = plan.work
    table = _table("the work")
    unknown = work.num_steps == MOST
    table.add_row("steps", "as many as fit" if unknown else f"{work.num_steps:,}")
    table.add_row("sequences of a step", f"{work.batch_size:,}", "training.batch_size")
    table.add_row("tokens of a step", f"{work.tokens_per_step:,.0f}", "mean, without padding")
    if work.computed_per_step < work.tokens_per_step:
        table.add_row(
            "tokens computed", f"{work.computed_per_step:,.0f}", "mean, shared beginnings once"
        )
    table.add_row("examples of a step", f"{work.examples_per_step:,.0f}", "mean")
    if not unknown:
        table.add_row("tokens of all steps", f"{work.tokens_per_step * work.num_steps:,.0f}")
    table.add_row("evaluations", f"{work.num_evaluations:,}")
    table.add_row("disk for a checkpoint", size(plan.checkpoint_bytes))
    table.add_row("disk for the run", size(plan.disk_bytes), "at most")
    return table


def _time(time: TimeEstimate) -> Table:
    table = _table("the time")
    table.add_row("speed", f"{time.tokens_per_second:,.0f} tokens/s")
    table.add_row("a step", f"{time.step:.2f} s")
    table.add_row("training", clock(time.training))
    if time.num_evaluations:
        table.add_row("loss of an evaluation", clock(time.evaluation))
        table.add_row("answers of an evaluation", clock(time.generation), "at most")
        table.add_row("all evaluations", clock(time.evaluations), "at most")
    table.add_row("the whole run", clock(time.total), "at most, without loading and saving")
    return table


def _print_advice(plan: Plan, console: Console) -> None:
    console.print()
    if not plan.advice:
        console.print(f"{NOT_TIMED} No single change that was tried helps. Take a smaller model.")
        return
    console.print(f"{NOT_TIMED} What each change alone would save:")
    table = Table(box=None, padding=(0, 2))
    for column in ("change", "saves", "peak", ""):
        table.add_column(column, justify="right" if column in ("saves", "peak") else "left")
    for change, saved in plan.advice:
        peak = plan.memory.peak - saved
        fits = "fits" if peak <= plan.free_memory else "still too much"
        table.add_row(change, size(saved), size(peak), fits)
    console.print(table)


def _table(title: str) -> Table:
    """Return an empty table of a label, a value, and a note on the value."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    return table
