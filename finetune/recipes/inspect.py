"""`finetune inspect`: what a model would see of the data, before anything is trained."""

from collections.abc import Sequence
from itertools import islice

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.config import RunConfig
from finetune.data.formats.languages import language_name
from finetune.data.formats.translation import TranslationFormat
from finetune.data.statistics import DataReport, characters_per_token, pieces, report_on
from finetune.data.types import Example, Tokenizer
from finetune.display import Display, plain_console
from finetune.errors import UserError, visible
from finetune.recipes.build.data import STREAM_SAMPLE, format_in_words, texts_in
from finetune.recipes.build.material import Material, read_material
from finetune.recipes.build.sharing import sharing_lines
from finetune.recipes.build.size import with_step_size
from finetune.recipes.build.vocabulary import plan_vocabulary

LABELS = {
    "records": "records",
    "blank_records": "records without text",
    "bad_records": "bad records dropped",
    "examples": "examples",
    "tokens": "tokens",
    "target_tokens": "target tokens",
    "truncated": "examples cut to data.max_length",
    "split": "texts split at data.max_length",
    "without_target": "cut examples left out, without a target",
    "dropped": "examples dropped as too long",
    "duplicates": "examples dropped as held out too",
    "longest": "longest example before a cut, tokens",
}
"""The label of each field of DataStatistics."""

LOSSES = (
    "blank_records", "bad_records", "truncated", "split", "without_target", "dropped", "duplicates",
)  # fmt: skip
"""Fields of what does not get into the training whole. If all are 0, one line says so."""

DENSITY_RECORDS = 1000  # from which characters per token are counted


def inspect_data(config: RunConfig, *, examples: int, console: Console | None = None) -> DataReport:
    """Print the first `examples` with their targets marked, then the figures; return the figures.

    The weights are not loaded. Raises UserError for anything wrong with data or tokenizer.
    """
    console = console or plain_console()
    display = Display()
    material = read_material(config, display)
    display.say(f"encoding the data as {format_in_words(material.format)}")
    train, tokenizer = material.train, material.tokenizer
    report = report_on(
        train, material.validation, tokenizer=tokenizer, vocab_size=material.table_rows
    )
    for number in range(min(examples, len(train))):
        _print_example(number + 1, train[number], tokenizer, console)
    if examples:
        console.rule(align="left")
        legend = [("targets are like this", True), ("; the rest is read, not learnt", False)]
        console.print(_marked(legend, in_colour=console.is_terminal))
    console.print(_figures(report, streamed=config.data.streaming))
    console.print(_histogram(report))
    densities = language_density(material)
    found = ", ".join(f"{language} {value:.2f}" for language, value in densities.items())
    console.print(f"characters per token: {found}", markup=False)
    vocabulary = plan_vocabulary(
        config, material.skeleton, tokenizer, material.corpora, material.tokens.added
    )
    console.print(f"vocabulary: {vocabulary.line()}")
    sized = with_step_size(material)
    for line in sharing_lines(sized):
        console.print(line, markup=False)
    for language, density in densities.items():
        if density < 1:
            display.note(
                f"{language} falls into bytes: a token has {density:.2f} characters, so its texts "
                "are long for this tokenizer. A model whose tokenizer knows it costs less"
            )
    for sentence in sized.advice():
        display.note(sentence)
    return report


def _print_example(number: int, example: Example, tokenizer: Tokenizer, console: Console) -> None:
    counts = f"{len(example)} tokens, {example.num_target_tokens} of them targets"
    console.rule(f"example {number}: {counts}", align="left")
    console.print(_marked(pieces(example, tokenizer), in_colour=console.is_terminal))


def _marked(stretches: Sequence[tuple[str, bool]], *, in_colour: bool) -> Text:
    """Return the text with its targets in colour, or in brackets."""
    if in_colour:
        return Text.assemble(
            *(
                (visible(text), "bold green" if is_target else "dim")
                for text, is_target in stretches
            )
        )
    return Text("".join(f"⟦{text}⟧" if is_target else text for text, is_target in stretches))


def _figures(report: DataReport, *, streamed: bool) -> Table:
    """Return the figures of the training data and of the held-out data, a column each."""
    part = f" (the first {STREAM_SAMPLE} records of the stream)" if streamed else ""
    table = Table(title=f"the data{part}", title_justify="left")
    for column in ("", "training", "held out"):
        table.add_column(column, justify="right" if column else "left")
    held_out = report.held_out or {}
    whole = not any(report.train[key] or held_out.get(key) for key in LOSSES)
    for key, count in report.train.items():
        if not (whole and key in LOSSES):
            cell = f"{held_out[key]:,}" if key in held_out else "-"
            table.add_row(LABELS[key], f"{count:,}", cell)
    table.add_section()
    table.add_row("target share", f"{report.target_share:.1%}")
    table.add_row("length p50, tokens", f"{report.length_p50:,}")
    table.add_row("length p95, tokens", f"{report.length_p95:,}")
    table.add_row("length max, tokens", f"{report.length_max:,}")
    table.add_row("tokens per word", f"{report.tokens_per_word:.2f}")
    table.add_row("duplicates", f"{report.duplicates:,}")
    leaked = "-" if report.leaked is None else f"{report.leaked:,}"
    table.add_row("examples that also occur in training", "", leaked)
    table.add_section()
    used, rows = report.vocabulary_rows_used, report.vocabulary_rows
    table.add_row("vocabulary rows", f"{rows:,}")
    table.add_row("vocabulary rows used", f"{used:,}")
    table.add_row("share of the rows used", f"{used / rows:.1%}")
    coverage = report.held_out_coverage
    table.add_row(
        "tokens that also occur in training", "", "-" if coverage is None else f"{coverage:.2%}"
    )
    if whole:
        table.caption = "nothing is blank, dropped, left out, cut or split"
        table.caption_justify = "left"
    return table


def language_density(material: Material) -> dict[str, float]:
    """Return the characters a token of each language of the data, in its first records.

    Data without languages has one entry.
    """
    texts: dict[str, list[str]] = {}
    records = (record for _, record in islice(iter(material.raw.train), DENSITY_RECORDS))
    for record in records:
        if isinstance(material.format, TranslationFormat):
            try:
                found = material.format.by_language(record).items()
            except UserError:  # a bad record, which the encoding has reported
                continue
            for language, text in found:
                texts.setdefault(language_name(language), []).append(text)
        else:
            texts.setdefault("all text", []).extend(texts_in(record))
    return {
        language: characters_per_token(kept, material.tokenizer) for language, kept in texts.items()
    }


def _histogram(report: DataReport) -> Table:
    """Return a bar for the number of training examples in each range of lengths."""
    title = "tokens per training example"
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    most = max(count for *_, count in report.length_histogram)
    for low, high, count in report.length_histogram:
        lengths = f"{low}–{high}" if low < high else f"{low}"
        table.add_row(lengths, "█" * round(40 * count / most), f"{count:,}")
    return table
