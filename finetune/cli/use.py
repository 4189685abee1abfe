"""`finetune evaluate`, `generate`, `chat` and `translate`: a trained run, or any model, in use."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.app import Overrides, Target, app

MaxNewTokens = Annotated[
    int | None, typer.Option(help="Longest answer, in tokens.", show_default=False)
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False)]
TopP = Annotated[
    float | None,
    typer.Option(help="Nucleus sampling: keep this much probability.", show_default=False),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep so many tokens; 0 is off.", show_default=False)
]
Penalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", help="Above 1 discourages repetition.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="For sampling.")]


@app.command()
def evaluate(
    target: Target,
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(help="What to evaluate on; for a run, its own config.", show_default=False),
    ] = None,
) -> None:
    """Loss, perplexity, bits per byte on data.test (else on the held-out rows); for translation chrF and BLEU. Prints JSON."""
    from finetune.recipes.evaluate import evaluate_target

    evaluate_target(target, config=config, overrides=overrides or ())


@app.command()
def generate(
    target: Target,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt; may be repeated. Without it, one prompt a line of stdin."),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="Continue the text as it stands instead of answering it in the chat template.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: prompt and answer.")
    ] = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
) -> None:
    """Answer prompts, in batches; where several are given, each answer under its prompt."""
    import json

    from finetune.recipes.generate import generate_answers

    settings = given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )
    for asked, answer in generate_answers(
        target, prompt or [], raw=raw, seed=seed, settings=settings
    ):
        plain = f"> {asked}\n{answer}\n" if prompt and len(prompt) > 1 else answer
        typer.echo(
            json.dumps({"prompt": asked, "answer": answer}, ensure_ascii=False)
            if as_json
            else plain
        )


@app.command()
def chat(
    target: Target,
    system: Annotated[str | None, typer.Option(help="A system prompt.", show_default=False)] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
) -> None:
    """Talk with a model in the terminal: /reset forgets the conversation, /exit ends it."""
    from finetune.recipes.generate import chat_in_terminal

    settings = given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )
    chat_in_terminal(target, system_prompt=system, seed=seed, settings=settings)


@app.command()
def translate(
    target: Target,
    text: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="Sentences; without them and without --input, lines of stdin."
        ),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="A text file, one sentence a line.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write the translations.", show_default=False),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="Source language, e.g. en; for a run, its own.", show_default=False
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", help="Target language, e.g. fr; for a run, its own.", show_default=False
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Translate sentences, stdin, or a file to a file, in batches."""
    from finetune.recipes.translate import translate_text

    translate_text(
        target,
        text or [],
        input=input,
        output=output,
        source=source,
        to=to,
        settings=given(max_new_tokens=max_new_tokens),
    )


def given(**settings: float | int | None) -> dict[str, float | int]:
    """Return the options that were given."""
    return {key: value for key, value in settings.items() if value is not None}
