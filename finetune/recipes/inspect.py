"""`finetune inspect`: what a model would see of the data, before anything is trained.

Floor 5.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.config import RunConfig
from finetune.data.statistics import DataReport, pieces, report_on
from finetune.display import Display
from finetune.recipes.build.data import STREAM_SAMPLE
from finetune.recipes.build.material import read_material
from finetune.recipes.build.vocabulary import plan_vocabulary


def inspect_data(config: RunConfig, *, examples: int, console: Console | None = None) -> DataReport:
    """Print rendered examples with their targets coloured, then the figures. The weights are not loaded. Raises UserError."""
    console = console or Console(highlight=False)
    display = Display()
    material = read_material(config, display)
    display.say(f"encoding the data as {material.format.name}")
    train, tokenizer = material.train, material.tokenizer
    report = report_on(
        train, material.validation, tokenizer=tokenizer, vocab_size=material.table_rows
    )
    for number in range(min(examples, len(train))):
        console.rule(
            f"example {number + 1}: {len(train[number])} tokens, {train[number].num_target_tokens} targets",
            align="left",
        )
        console.print(_marked(pieces(train[number], tokenizer), in_colour=console.is_terminal))
    if examples:
        console.rule(align="left")
        console.print(
            _marked(
                [("targets are like this", True), ("; the rest is read, not learnt", False)],
                console.is_terminal,
            )
        )
    console.print(_figures(report, streamed=config.data.streaming))
    console.print(_histogram(report))
    vocabulary = plan_vocabulary(
        config, material.skeleton, tokenizer, material.corpora, material.tokens.added
    )
    console.print(f"vocabulary: {vocabulary.line()}")
    return report


def _marked(stretches: Sequence[tuple[str, bool]], in_colour: bool) -> Text:
    """Targets in colour on a terminal, in brackets elsewhere."""
    if in_colour:
        return Text.assemble(
            *((text, "bold green" if is_target else "dim") for text, is_target in stretches)
        )
    return Text("".join(f"⟦{text}⟧" if is_target else text for text, is_target in stretches))


def _figures(report: DataReport, *, streamed: bool) -> Table:
    table = Table(
        title="the data" + (f" (the first {STREAM_SAMPLE} rows of the stream)" if streamed else ""),
        title_justify="left",
    )
    for column in ("", "training", "held out"):
        table.add_column(column, justify="left" if not column else "right")
    held_out = report.held_out or {}
    for key, train in report.train.items():
        table.add_row(
            key.replace("_", " "), f"{train:,}", f"{held_out[key]:,}" if key in held_out else "-"
        )
    table.add_section()
    table.add_row("target share", f"{report.target_share:.1%}", "")
    table.add_row(
        "length p50 / p95 / max",
        f"{report.length_p50} / {report.length_p95} / {report.length_max}",
        "",
    )
    table.add_row("tokens per word", f"{report.tokens_per_word:.2f}", "")
    table.add_row(
        "duplicates",
        f"{report.duplicates:,}",
        "-" if report.leaked is None else f"{report.leaked:,} also in training",
    )
    share = report.vocabulary_rows_used / report.vocabulary_rows
    coverage = (
        "-"
        if report.held_out_coverage is None
        else f"{report.held_out_coverage:.2%} of tokens covered"
    )
    table.add_row(
        "vocabulary rows used",
        f"{report.vocabulary_rows_used:,} of {report.vocabulary_rows:,} ({share:.1%})",
        coverage,
    )
    return table


def _histogram(report: DataReport) -> Table:
    table = Table(
        title="tokens per training example", title_justify="left", box=None, show_header=False
    )
    most = max(count for *_, count in report.length_histogram)
    for low, high, count in report.length_histogram:
        table.add_row(f"{low}–{high}", "█" * round(40 * count / most), f"{count:,}")
    return table
