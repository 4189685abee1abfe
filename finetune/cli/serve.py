"""`finetune serve`: a model for other programs, and a page to try it."""

from typing import Annotated

import typer

from finetune.cli.app import Target, Trust, app, say_start
from finetune.cli.use import MaxNewTokens, System, Temperature, TopK, TopP, given


@app.command()
def serve(
    target: Target,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Another one lets other machines ask."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Serve the run's base model too.")
    ] = True,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    trust_remote_code: Trust = False,
) -> None:
    """Serve a model: a page to try it, and OpenAI's /v1/chat/completions.

    It is made for one person. The guide names servers for many.
    """
    from finetune.recipes.build.look import look_at_use

    settings = given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k
    )
    look_at_use(target, settings, trust=trust_remote_code)
    say_start()
    from finetune.display import Display
    from finetune.recipes.serve import open_service, run_service

    display = Display()
    service = open_service(
        target,
        host=host,
        port=port,
        base=base,
        system_prompt=system,
        settings=settings,
        trust=trust_remote_code,
        display=display,
    )
    run_service(service, display)
