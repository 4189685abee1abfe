"""`finetune evaluate`, `generate`, `chat` and `translate`: a finished run, or any model, put to use.

Floor 5.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from finetune.config import RunConfig, load_config
from finetune.config.loading import validate
from finetune.config.schema import GenerationSection
from finetune.conversation import Conversation
from finetune.data.detect import build_format
from finetune.data.encode import EncodedDataset
from finetune.data.files import read_lines
from finetune.data.loader import EvaluationBatches
from finetune.data.rendering import ChatTemplate
from finetune.data.sources import Rows
from finetune.data.translation import TranslationFormat
from finetune.data.types import Format
from finetune.display import Display
from finetune.errors import UserError
from finetune.evaluation import LossResult, evaluate_generation, evaluate_loss
from finetune.generation import generate
from finetune.models.language_model import LanguageModel
from finetune.models.load import load_model
from finetune.models.tokenizers import load_tokenizer, prepare_chat
from finetune.recipes.data import encode_rows, first_prompts, generation_metrics, load_raw_data, make_format, unrelated_text
from finetune.recipes.evaluating import sampling
from finetune.recipes.model import check_length, load_trained
from finetune.recipes.parts import pad_id
from finetune.recipes.vocabulary import unused_tokens
from finetune.run_dir import RunDir
from finetune.tracking import finite
from finetune.translate import translate_file, translate_lines


@dataclass(frozen=True)
class Opened:
    """A model to read with, and the run that it came from, if any."""

    model: Any
    tokenizer: Any
    run: RunDir | None
    config: RunConfig | None

    def settings(self, given: Mapping[str, Any]) -> GenerationSection:
        """The generation settings of the run, or the defaults, changed by those given."""
        section = self.config.generation if self.config is not None else GenerationSection()
        return validate(GenerationSection, {**section.model_dump(), **given}, where="generation")


def open_target(target: str) -> Opened:
    """Load a run's model/, or a model by name, onto the GPU if there is one. Raises UserError."""
    run = RunDir(Path(target))
    is_run = run.is_run()
    if is_run and not (run.model / "config.json").is_file():
        raise UserError(f"the run {target} has no model/ yet; finish it with `finetune train {run.config} --resume auto`")
    config = load_config(run.config) if is_run else None
    model: Any
    if config is not None:
        model, tokenizer = load_trained(run.model, config.model)
    else:
        model, tokenizer = load_model(name=target), load_tokenizer(name=target)
    prepare_chat(model, tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(model, tokenizer, run if is_run else None, config)


def evaluate_target(
    target: str, *, config: Path | None, overrides: Sequence[str], display: Display | None = None
) -> dict[str, Any]:
    """Metrics on data.test, or on the held-out rows where the config names no test data; printed as JSON. For a run evaluated on
    its own config they are added to its evaluation.json as "test"."""
    display = display or Display()
    opened = open_target(target)
    if config is None and opened.run is None:
        raise UserError(f"{target} is a model, not a run, so there is no data to evaluate on: give --config FILE")
    settings = load_config(config if config is not None else opened.run.config, overrides)  # type: ignore[union-attr]
    data = settings.data
    check_length(opened.model, data.max_length)
    if data.test is not None:
        data = data.model_copy(update={"validation": data.test, "max_validation_rows": None})
    raw = load_raw_data(data, seed=settings.seed)
    if raw.validation is None:
        raise UserError("the config names no held-out data: set data.test, data.validation or data.validation_fraction")
    format = make_format(data, opened.tokenizer, raw.first_row)
    results = {"data": _said_data(settings), "num_rows": len(raw.validation)}
    vocab_size = opened.model.get_input_embeddings().weight.shape[0]
    dataset = encode_rows(raw.validation, format, data, vocab_size=vocab_size, display=display)
    results |= _loss_on(opened, dataset, settings, display, unused_tokens(opened.run, vocab_size)).as_dict()
    if (unrelated := unrelated_text(settings, opened.tokenizer, vocab_size)) is not None:
        results["unrelated_loss"] = _loss_on(opened, unrelated, settings, display).loss
    results |= _scores_on(opened, raw.validation, format, settings, display)
    print(json.dumps(finite(results), indent=2))
    if opened.run is not None and config is None and not overrides:
        summary = json.loads(opened.run.evaluation.read_text(encoding="utf-8")) if opened.run.evaluation.is_file() else {}
        opened.run.evaluation.write_text(json.dumps({**summary, "test": finite(results)}, indent=2), encoding="utf-8")
    return results


def _said_data(config: RunConfig) -> str:
    """Which rows of the config those are."""
    data = config.data
    sources = data.validation if data.test is None else data.test
    if sources is None:
        return f"{data.validation_fraction:g} of data.train, held out"
    return f"data.{'validation' if data.test is None else 'test'}: {', '.join(source.path for source in sources)}"


def _loss_on(opened: Opened, dataset: EncodedDataset, config: RunConfig, display: Display, inactive: Any = None) -> LossResult:
    batches = EvaluationBatches(
        dataset,
        max_length=config.data.max_length,
        packing=False,
        batch_size=config.evaluation.batch_size,
        pad_id=pad_id(opened.tokenizer),
        rank=0,
        num_processes=1,
    )
    with display.bar("evaluating the loss", len(batches)) as advance:
        return evaluate_loss(
            LanguageModel(opened.model),
            batches,
            tokenizer=opened.tokenizer,
            device=opened.model.device,
            inactive=inactive,
            on_progress=lambda done: advance(1),
        )


def _scores_on(opened: Opened, rows: Rows, format: Format, config: RunConfig, display: Display) -> dict[str, Any]:
    metrics = generation_metrics(config, format)
    count, room = config.evaluation.generate if metrics else 0, config.generation.max_new_tokens
    prompts = first_prompts(rows, format, count, model=opened.model, room=room, note=display.note)
    if not prompts:
        return {}
    with display.bar("generating", len(prompts)) as advance:
        scores, _ = evaluate_generation(
            opened.model,
            opened.tokenizer,
            prompts,
            metrics=metrics,
            batch_size=config.generation.batch_size,
            on_progress=_differences(advance),
            **sampling(config.generation, opened.model, seed=config.seed),
        )
    return {**scores, "num_generated": len(prompts)}


def generate_answers(
    target: str, prompts: Sequence[str], *, raw: bool, seed: int, settings: Mapping[str, Any], display: Display | None = None
) -> Iterator[tuple[str, str]]:
    """Each prompt (without any: each line of stdin) and its answer, in order. `raw` continues the text."""
    opened, display = open_target(target), display or Display()
    section = opened.settings(settings)
    encode = _raw_prompt(opened.tokenizer) if raw or not opened.tokenizer.chat_template else _chat_prompt(opened.tokenizer)
    for texts in _chunks(prompts or stdin_lines(display, "a prompt a line"), section.batch_size):
        with display.bar("generating", len(texts)) as advance:
            answers = generate(
                opened.model,
                [encode(text) for text in texts],
                batch_size=section.batch_size,
                on_progress=_differences(advance),
                **sampling(section, opened.model, seed=seed),
            )
        yield from zip(texts, (opened.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers), strict=True)


def chat_in_terminal(target: str, *, system_prompt: str | None, seed: int, settings: Mapping[str, Any]) -> None:
    """Read questions from stdin and stream the answers, until end of input or /exit."""
    opened, display = open_target(target), Display()
    talk = Conversation(
        opened.model,
        opened.tokenizer,
        system_prompt=system_prompt,
        notify=display.say,
        **sampling(opened.settings(settings), opened.model, seed=seed),
    )
    display.say("Ask something; /reset forgets the conversation, /exit ends it.")
    while (question := _ask()) not in (None, "/exit", "/quit"):
        assert question is not None
        if question == "/reset":
            talk.reset()
            display.say("(forgotten)")
        elif question.strip():
            _print_reply(talk, question, display)


def translate_text(
    target: str,
    texts: Sequence[str],
    *,
    input: Path | None,
    output: Path | None,
    source: str | None,
    to: str | None,
    settings: Mapping[str, Any],
    display: Display | None = None,
) -> None:
    """Translate `texts`, the file `input`, or the lines of stdin; to the file `output` or stdout. Empty lines stay empty."""
    if texts and input is not None:
        raise UserError("give sentences or --input, not both")
    if output is not None and input is None:
        raise UserError("--output goes with --input; without a file, redirect the output")
    if input is not None and not input.is_file():
        raise UserError(f"the input {input} is no file (looked in {Path.cwd()})")
    opened, display = open_target(target), display or Display()
    format, section = _translation_format(opened, source, to), opened.settings(settings)
    trained = _trained_languages(opened.run) if opened.run is not None else ()
    if None not in trained and trained and not set(format.languages) <= set(trained):
        display.say(f"note: this run was trained on {' and '.join(map(str, trained))}, not on {' and '.join(format.languages)}")
    options = {
        "model": opened.model,
        "tokenizer": opened.tokenizer,
        "prompt_of": lambda text: format.prompt(text, reverse=False).input_ids,
        "batch_size": section.batch_size,
        **sampling(section, opened.model, seed=0),
    }
    if input is not None and output is not None:
        with display.bar("translating", None) as advance:
            translate_file(input, output, on_progress=_differences(advance), **options)
        return
    lines = read_lines(input) if input is not None else texts or stdin_lines(display, "a sentence a line")
    for line in translate_lines(lines, **options):
        print(line, flush=True)


def _translation_format(opened: Opened, source: str | None, to: str | None) -> TranslationFormat:
    """The prompt of the run's own training, or for a plain model that of the two languages given."""
    pair = opened.config.data.translation if opened.config is not None else None
    trained: list[str | None] = list(_trained_languages(opened.run)) if opened.run is not None else [None, None]
    if pair is not None and pair.direction == "backward":
        trained.reverse()
    source, to = source or trained[0], to or trained[1]
    if source is None or to is None:
        raise UserError("which languages? give --from and --to, e.g. --from en --to fr")
    format = build_format(
        "translation",
        tokenizer=opened.tokenizer,
        first_row={"translation": {source: "", to: ""}},
        columns={},
        targets="assistant",
        system_prompt=opened.config.data.system_prompt if opened.config is not None else None,
        source_language=source,
        target_language=to,
        direction="forward",
        template=pair.template if pair is not None else None,
    )
    assert isinstance(format, TranslationFormat)
    return format


def _trained_languages(run: RunDir) -> Sequence[str | None]:
    counts = json.loads(run.data.read_text(encoding="utf-8")) if run.data.is_file() else {}
    return counts.get("languages", (None, None))


def _chat_prompt(tokenizer: Any) -> Callable[[str], list[int]]:
    template = ChatTemplate(tokenizer)
    return lambda text: template.prompt([{"role": "user", "content": text}])


def _raw_prompt(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text).input_ids


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _print_reply(talk: Conversation, question: str, display: Display) -> None:
    try:
        for piece in talk.reply(question):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" …")
    except UserError as error:
        display.say(str(error))


def stdin_lines(display: Display, what: str) -> Iterator[str]:
    """The lines of stdin. Someone at a terminal is told that it is their turn."""
    if sys.stdin.isatty():
        display.say(f"type {what}, and Ctrl-D at the end")
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 text (byte {error.start}): convert it first") from error


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _differences(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """From "so many are done" to "so many more are"."""
    seen = 0

    def progress(done: int, _: int) -> None:
        nonlocal seen
        advance(done - seen)
        seen = done

    return progress
