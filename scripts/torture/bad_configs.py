"""Bad configs, values, paths, data, templates and arguments, drawn from lists by a seed."""

import json
import os
import random
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.torture.bad_inputs import MARKER, Bad, deep, values

YAML = {  # text of a value -> whether it must be refused for every key
    ".inf": False,
    ".nan": False,
    "-1": False,
    "1e308": False,
    "9" * 5000: False,
    "!!float abc": True,
    "!!int x": True,
    "!!bool perhaps": True,
    "!!timestamp x": True,
    "!!binary '%%%'": True,
    f"!!python/object/apply:os.system ['touch {MARKER}']": True,
    f"!!python/object/new:os.system ['touch {MARKER}']": True,
    "!!python/name:os.system": True,
    "!!set {a, b}": False,
    "!!omap [a: 1]": False,
    "2026-13-45": False,
    "&a [*a]": True,
    "*nothing": True,
    "{? [a, b] : c}": True,
    '"\\ud800"': False,
    '"\\0"': False,
    "x" * 5000: False,
    deep(2000): True,
    "{a: " * 500 + "1" + "}" * 500: True,
    "[" * 100_000: True,
    "'": True,
    "\x01": True,
    "- a: b\n c": True,
}
TRAIN = "train c.yaml --dry-run"
ARGUMENTS = (
    "train c.yaml --processes 0",
    "train c.yaml --processes -3",
    "train c.yaml --processes many",
    "train c.yaml --restarts -1",
    "train c.yaml --resume ''",
    "train c.yaml --resume c.yaml",
    "train c.yaml --resume /",
    f"{TRAIN} =1",
    f"{TRAIN} .=1",
    f"{TRAIN} a.b.c.d=1",
    f"{TRAIN} model.config.x.y=1",
    f"{TRAIN} data.train.0.path=x",
    f"{TRAIN} training=3",
    f"{TRAIN} --",
    "inspect c.yaml --examples -5",
    "inspect c.yaml --examples 99999999999999999999",
    "generate run --prompt Hi --max-new-tokens 0",
    "generate run --prompt Hi --max-new-tokens 999999999999",
    "generate run --prompt Hi --temperature nan",
    "generate run --prompt Hi --temperature inf",
    "generate run --prompt Hi --temperature 1e-320 --max-new-tokens 2",
    "generate run --prompt Hi --repetition-penalty inf",
    "generate run --prompt Hi --repetition-penalty nan",
    "generate run --prompt Hi --top-k -1",
    "generate run --prompt Hi --top-p nan",
    "generate run --prompt Hi --seed -1 --temperature 1 --max-new-tokens 2",
    "generate run --prompt Hi --seed 99999999999999999999 --temperature 1 --max-new-tokens 2",
    "generate run --prompt ''",
    "generate run --raw --prompt ''",
    "generate / --prompt Hi",
    "generate c.yaml --prompt Hi",
    "generate chat.jsonl --prompt Hi",
    "generate '' --prompt Hi",
    "generate package: --prompt Hi",
    "generate package:os --prompt Hi",
    "generate package:../x --prompt Hi",
    "export run run",
    "export run run/model",
    "export run c.yaml",
    "export run c.yaml/x",
    "export run /proc/x",
    "export run out --checkpoint /",
    "export run out --checkpoint c.yaml",
    "export run out --dtype int3",
    "report c.yaml",
    "report run/model",
    "report /dev/null",
    "evaluate run --config /dev/null",
    "evaluate run --config run",
    "evaluate run data.validation=none.jsonl",
    "evaluate tiny.gguf --config c.yaml model.name=x",
    "translate run Hi --from xx --to yy",
    "translate run Hi --from '' --to ''",
    "translate run -i /proc/self/mem",
    "translate run -i .",
    "optimizers '['",
    "optimizers '(?P<'",
    "compare c.yaml --trials 0",
    "compare c.yaml --seeds 0",
    "compare c.yaml --budget 0",
    "compare c.yaml --trials 99999999999999999999",
    "tune c.yaml --trials -1",
    "plan /dev/zero",
    "plan /",
    "inspect /dev/null",
)
PATHS = (  # of a file that cannot be one
    *("a" * 300 + ".jsonl", "b/" * 3000 + "c.jsonl", "\0.jsonl", "\udcff.jsonl", "~nobody/x.jsonl"),
    *("loop.jsonl", "/proc/self/mem", "folder.jsonl", "[.jsonl", "**/*.jsonl", "-.jsonl", "."),
    *("/dev/zero", "fifo.txt", "$NOTHING/x.jsonl", "c.yaml/x.jsonl", "tiny.gguf", "http://x/y"),
    *(
        "s3://x/y.jsonl",
        "zip://*::x.zip",
        "package:none",
        "package:../x",
        "a.jsonl::b",
        "/dev/fd/9",
    ),
)
PLACES = ("output_dir", "data.train", "data.validation", "model.name", "model.chat_template")


def keys(model: Any, above: str = "") -> list[str]:
    """Return the dotted keys of the config."""
    from finetune.config.loading import _section

    found: list[str] = []
    for key in model.model_fields:
        section = _section(model, key)
        found += [above + key, *(keys(section, f"{above}{key}.") if section else [])]
    return found


def bombs() -> dict[str, str]:
    """Return texts whose aliases stand for a billion values."""
    lists = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lists += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")]
    maps = ["a: &a {x: 1}"]
    maps += [
        f"{b}: &{b} {{{', '.join(f'k{n}: *{a}' for n in range(9))}}}"
        for a, b in zip("abcdefgh", "bcdefghi")
    ]
    return {"lists": "\n".join(lists), "mappings": "\n".join(maps)}


def bad_configs(chance: random.Random) -> Iterator[Bad]:
    """Yield values for keys, as YAML and as overrides; broken YAML; bombs."""
    from finetune.config import RunConfig

    known = [*keys(RunConfig), "model.config.hidden_size", "model.config.vocab_size"]
    known += ["optimizer.betas", "optimizer.eps", "model.config.num_hidden_layers"]
    known += ["model.lora.rank", "model.config.attention_dropout", "model.config.rms_norm_eps"]
    while True:
        key, text = chance.choice(known), chance.choice(list(YAML))
        yield Bad(f"{key}: {text:.60}", spoil=_with_value(key, text), refused=YAML[text])
        key, value = chance.choice(known), chance.choice(values(chance))
        shown = json.dumps(value)
        yield Bad(f"{key}={shown:.60}", [*TRAIN.split(), _argument(f"{key}={shown}")])
        key, text = chance.choice(known), chance.choice(list(YAML))
        yield Bad(f"{key}={text:.60} typed", [*TRAIN.split(), _argument(f"{key}={text}")])
        name, text = chance.choice(list(bombs().items()))
        where = chance.choice(("data.train", "optimizer.betas", "model", "x-y", *known))
        yield Bad(f"a bomb of {name} at {where}", spoil=_with_bomb(where, text), refused=True)
        yield Bad("YAML of any bytes", spoil=_with_bytes("c.yaml", chance.randbytes(300)))
        yield Bad("YAML that is cut", spoil=_cut("c.yaml", chance.random()))


def _argument(text: str) -> str:
    """Return what can be an argument: without NUL, and not longer than the system takes."""
    return (
        text.replace("\0", "\\0")
        .encode("utf-8", "surrogatepass")
        .decode("utf-8", "replace")[:100_000]
    )


def _with_value(key: str, text: str) -> Any:
    def spoil(folder: Path) -> None:
        tree = json.loads((folder / "c.yaml").read_text())
        *parents, leaf = key.split(".")
        place = tree
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[leaf] = "HERE"
        (folder / "c.yaml").write_text(json.dumps(tree).replace('"HERE"', text))

    return spoil


def _with_bomb(where: str, text: str) -> Any:
    def spoil(folder: Path) -> None:
        _with_value(where, "*i")(folder)
        path = folder / "c.yaml"
        tree = path.read_text()[1:-1]
        path.write_text("x-bomb:\n  " + text.replace("\n", "\n  ") + "\n? m\n: {" + tree + "}\n")
        path.write_text(path.read_text().replace("? m\n: {", "").removesuffix("}\n") + "\n")
        path.write_text(_block(text, tree))

    return spoil


def _block(bomb: str, tree: str) -> str:
    """Return a config in block style whose first key holds the bomb's anchors."""
    parts = json.loads("{" + tree.replace("*i", '"*i"') + "}")
    lines = [f"{key}: {json.dumps(value)}" for key, value in parts.items()]
    return "x-b:\n  " + bomb.replace("\n", "\n  ") + "\n" + "\n".join(lines).replace('"*i"', "*i")


def _with_bytes(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


def _cut(name: str, share: float) -> Any:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return spoil


def bad_arguments(chance: random.Random) -> Iterator[Bad]:
    """Yield command lines, and paths that cannot be a file."""
    while True:
        text = chance.choice(ARGUMENTS)
        yield Bad(text, shlex.split(text))
        place, path = chance.choice(PLACES), chance.choice(PATHS)
        spoil = _with_value(place, json.dumps(path))
        yield Bad(f"{place}: {path!r:.60}", spoil=lambda f, s=spoil: (_odd_files(f), s(f)))
        given = path.replace("\0", "")
        command = chance.choice(("generate", "report", "export", "train", "inspect", "evaluate"))
        arguments = {
            "generate": ["generate", given, "--prompt", "Hi"],
            "report": ["report", given],
            "export": ["export", chance.choice(("run", given)), given],
            "train": ["train", "c.yaml", "--resume", given],
            "inspect": ["inspect", given],
            "evaluate": ["evaluate", given],
        }[command]
        yield Bad(f"{command} {given!r:.60}", arguments, spoil=_odd_files)


def _odd_files(folder: Path) -> None:
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "folder.jsonl").mkdir()
    (folder / "[.jsonl").write_text("x")
    (folder / "-.jsonl").write_text("")


def bad_data(chance: random.Random) -> Iterator[Bad]:
    """Yield data files, chat templates and translation templates."""
    from tests.conftest import conversation

    good = json.dumps(conversation(3))
    roles = [json.dumps(value) for value in values(chance)]
    lines = [
        *(deep(2000), deep(100_000), '{"messages": ' + deep(100_000) + "}", "{" * 5000, "9" * 5000),
        *("null", '""', "[]", "{}", "NaN", "1e999", '{"messages": null}', '{"messages": {}}'),
        *('{"messages": [null]}', '{"messages": [[]]}', '{"messages": [{"role": "user"}]}'),
        *(f'{{"messages": [{{"role": {r}, "content": "x"}}]}}' for r in roles),
        *(
            f'{{"messages": [{{"role": "user", "content": {r}}}, '
            f'{{"role": "assistant", "content": "x"}}]}}'
            for r in roles
        ),
        *(f'{{"messages": {r}}}' for r in roles),
        *(f'{{"text": {r}}}' for r in roles),
        *(f'{{"prompt": {r}, "completion": "x"}}' for r in roles),
        *(f'{{"translation": {r}}}' for r in roles),
        *(f'{{"translation": {{"en": {r}, "fr": "x"}}}}' for r in roles),
        '{"text": "' + "x" * 200_000 + '"}',
        '{"text": "\\u0000\\u001b[2J"}',
    ]
    loops = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
    templates = [
        *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('touch %s') }}"),
        *("{% include '/etc/passwd' %}", "{{ 'x' * 10**10 }}", "{{ 9**9**9 }}", loops, "{{"),
        *("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ range(10**12) | list }}"),
        *("{{ messages.pop() }}", "{{ messages[9].content }}", "{% set x = messages[0].x.y %}"),
        *("{{ raise_exception('\\x1b]0;owned\\x07') }}", "\x00", "{{ strftime_now('%' * 9999) }}"),
    ]
    translations = ["{source.__class__}", "{source!r}", "{source:9999999999}", "{source", "{0}{}"]
    translations += ["{source[0]}", "{source} {target}", "{source:{source}}", "{source}" * 3]
    while True:
        line, ending = chance.choice(lines), chance.choice((".jsonl", ".json", ".jsonl"))
        more = [good] * 3 if chance.random() < 0.5 else []
        text = "\n".join([*more, line, ""])
        yield Bad(f"a line {line:.60}", *_file("bad" + ending, text.encode("utf-8", "replace")))
        kind = chance.choice((".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst", ".txt"))
        bad = chance.choice((chance.randbytes(500), b'a,b\n"x', b"a,b\n1\n", b"\xff\xfe\0a", b"\0"))
        yield Bad(f"{kind} with {bad[:20]!r}", *_file("bad" + kind, bad))
        template = chance.choice(templates).replace("%s", MARKER)
        name, arguments = "t.jinja", [*TRAIN.split(), "model.chat_template=t.jinja"]
        spoil = _with_bytes(name, template.encode())
        yield Bad(f"the template {template:.60}", arguments, spoil, refused=True)
        template = chance.choice(translations)
        arguments, spoil = _file("p.jsonl", b'{"translation": {"en": "a", "fr": "b"}}\n' * 5)
        arguments = [*arguments, "data.translation.template=" + json.dumps(template)]
        yield Bad(f"the translation template {template}", arguments, spoil)


def _file(name: str, data: bytes) -> tuple[list[str], Any]:
    arguments = [*TRAIN.split(), f"data.train={name}"]
    streamed = ["data.streaming=true"] if len(data) % 3 == 0 else []
    return [*arguments, *streamed], _with_bytes(name, data)


assert os.sep == "/"
