"""`finetune evaluate`, `generate`, `chat` and `translate`: a trained run, or any model, in use."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.app import Overrides, Target, Trust, app, require_stdout, say_start
from finetune.errors import is_terminal, visible

MaxNewTokens = Annotated[int | None, typer.Option(help="Length limit of an answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most probable tokens, up to this total probability."),
]
TopK = Annotated[
    int | None, typer.Option(help="Sample from this many of the most probable tokens; 0 is off.")
]
Penalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Values above 1 discourage repetition.")
]
System = Annotated[
    str | None, typer.Option(help="System prompt; '' is none.", show_default="the run's own")
]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="Random seed for sampling.")]


@app.command()
def evaluate(
    target: Target,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="The config with the data.", show_default="the run's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at a terminal too.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Evaluate on data.test, or on the held-out data if there is none.

    Prints a table at a terminal, and JSON elsewhere.

    The metrics are loss, perplexity and bits per byte; for translation also chrF and BLEU.
    For conversations that call tools they are also the shares of right calls.
    """
    require_stdout()
    from finetune.recipes.build.look import look_at_evaluation

    look_at_evaluation(target, config, overrides or (), trust=trust_remote_code)
    say_start()
    from finetune.recipes.evaluate import evaluate_target

    evaluate_target(
        target,
        config=config,
        overrides=overrides or (),
        as_json=as_json,
        trust=trust_remote_code,
    )


@app.command()
def generate(
    target: Target,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt; may be repeated. Without it, each line of stdin is a prompt, and each "
            "answer is one line, in which \\n is a line break, and \\r a carriage return."
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the prompt as plain text, without the chat template."),
    ] = False,
    system: System = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line: prompt and answer.")
    ] = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Answer prompts, in batches.

    If --prompt is given more than once, each answer is printed under its prompt.
    """
    require_stdout()
    from finetune.display import on_terminal
    from finetune.recipes.build.look import look_at_use

    settings = given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )
    look_at_use(target, settings, trust=trust_remote_code)
    say_start()
    from finetune.recipes.generate import generate_answers

    for asked, answer in generate_answers(
        target,
        prompt or [],
        raw=raw,
        system_prompt=system,
        seed=seed,
        settings=settings,
        trust=trust_remote_code,
    ):
        plain = f"> {asked}\n{answer}\n" if prompt and len(prompt) > 1 else answer
        if not prompt and not is_terminal(sys.stdin):  # as many lines as there are prompts
            plain = on_one_line(plain)
        typer.echo(
            json_line({"prompt": asked, "answer": answer}) if as_json else on_terminal(plain)
        )


@app.command()
def chat(
    target: Target,
    base: Annotated[
        bool, typer.Option("--base", help="Let the run's base model answer, too.")
    ] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a model in the terminal. /help lists the commands there, /exit ends it."""
    require_stdout()
    from finetune.recipes.build.look import look_at_use

    settings = given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )
    look_at_use(target, settings, trust=trust_remote_code)
    say_start()
    from finetune.recipes.chat import chat_in_terminal

    chat_in_terminal(
        target,
        base=base,
        system_prompt=system,
        seed=seed,
        settings=settings,
        trust=trust_remote_code,
    )


@app.command()
def translate(
    target: Target,
    text: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="Sentences. Without them and without --input, the lines of stdin."
        ),
    ] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="A text file, one sentence a line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write the translations to.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Source language, e.g. en.", show_default="the run's own"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help="Target language, e.g. fr.", show_default="the run's own"),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    trust_remote_code: Trust = False,
) -> None:
    """Translate sentences, the lines of stdin, or a file, in batches."""
    if output is None:
        require_stdout()
    from finetune.recipes.build.look import languages_asked, look_at_texts, look_at_use

    look_at_texts(text, input=input, output=output)
    settings = given(max_new_tokens=max_new_tokens)
    languages_asked(*look_at_use(target, settings, trust=trust_remote_code), source, to)
    say_start()
    from finetune.recipes.translate import translate_text

    translate_text(
        target,
        text or [],
        input=input,
        output=output,
        source=source,
        to=to,
        system_prompt=system,
        settings=settings,
        trust=trust_remote_code,
    )


BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""The characters that end a line, for one reader or another: those of `str.splitlines`."""


def on_one_line(text: str) -> str:
    """Return `text` with the characters that end a line written as Python writes them."""
    return text.translate({ord(c): ascii(c)[1:-1] for c in BREAKS})


def json_line(values: dict[str, str]) -> str:
    """Return a line of JSON for stdout; for a terminal its control characters are escaped."""
    text = json.dumps(values, ensure_ascii=not speaks_utf8())
    text = text.translate({ord(c): f"\\u{ord(c):04x}" for c in BREAKS})
    if not is_terminal(sys.stdout):
        return text
    return "".join(f"\\u{ord(c):04x}" if visible(c) != c else c for c in text)


def speaks_utf8() -> bool:
    """Return whether stdout takes any text."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-") in (
        "utf-8",
        "utf8",
    )


def given(**settings: float | int | None) -> dict[str, float | int]:
    """Return the options that were given, by name."""
    return {key: value for key, value in settings.items() if value is not None}
