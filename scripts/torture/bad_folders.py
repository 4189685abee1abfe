"""Bad folders: models, .gguf files, checkpoints and runs whose files were changed by someone."""

import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.torture.bad_inputs import MARKER, Bad, Payload, change_json, deep, spoil_bytes, values

GENERATE = ["generate", "./model", "--prompt", "Hi", "--max-new-tokens", "2"]
FROM_MODEL = ["train", "c.yaml", "--dry-run", "model={name: ./model}"]
RESUME = ["train", "c.yaml", "output_dir=run", "--resume", "auto"]
EVIL = f"open({MARKER!r}, 'w')\nclass Evil:\n    pass\n"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
RECORDS = (
    *("environment.json", "data.json", "vocabulary.json", "evaluation.json", "metrics.jsonl"),
    *("samples.jsonl", "config.yaml", ".finetune.json", "model/.finetune.json"),
)
OF_A_RUN = (
    *(["report", "run"], ["evaluate", "run"], ["generate", "run", "--prompt", "Hi"], RESUME),
    *(["export", "run", "out"], ["export", "run", "out", "--checkpoint", "run"]),
    *(["train", "c.yaml", "output_dir=run", "overwrite_output_dir=true"], ["chat", "run"]),
)


def bad_models(chance: random.Random) -> Iterator[Bad]:
    """Yield models with changed configs, weights and tokenizers, and with code beside them."""
    while True:
        command = chance.choice((GENERATE, GENERATE, FROM_MODEL))
        name = chance.choice(("config.json", "generation_config.json", *TOKENIZER_FILES))
        key, value = chance.random(), chance.choice(values(chance))
        yield Bad(f"{name}, a key is {value!r:.40}", command, _other_value(name, key, value))
        name = chance.choice(("model.safetensors", "config.json", *TOKENIZER_FILES))
        yield Bad(f"{name} spoilt", command, _spoilt(f"model/{name}", chance.random()))
        yield Bad("bytes of the header", command, _header(chance.random()))
        name, change = chance.choice(list(_WEIGHTS.items()))
        yield Bad(f"weights: {name}", command, _weights(change), refused=True)
        name, spoil = chance.choice(list(_CODE.items()))
        yield Bad(f"code: {name}", command, spoil)
        text = chance.choice((deep(100_000), "{", "null", "[]", "", '{"a": 1e999}', "\ud800"))
        name = chance.choice(("config.json", "generation_config.json", *TOKENIZER_FILES))
        yield Bad(f"{name} is {text:.20}", command, _text(f"model/{name}", text))
        where = chance.choice(list(_TREES))
        key, value = chance.random(), chance.choice(values(chance))
        spoil = _in_tree("model/tokenizer.json", _TREES[where], key, value)
        yield Bad(f"tokenizer.json, {where} is {value!r:.40}", command, spoil)


def _other_value(name: str, key: float, value: Any) -> Callable[[Path], None]:
    def change(tree: Any) -> Any:
        names = [*sorted(tree), "rope_scaling", "quantization_config", "auto_map", "dtype"]
        return {**tree, names[int(key * len(names))]: value}

    return lambda folder: change_json(folder / "model" / name, change)


def _spoilt(path: str, seed: float) -> Callable[[Path], object]:
    return lambda folder: spoil_bytes(folder / path, random.Random(seed))


def _text(path: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(text.encode("utf-8", "surrogatepass"))


def _header(seed: float) -> Callable[[Path], None]:
    """Return what changes one place of the header of model.safetensors."""

    def spoil(folder: Path) -> None:
        path, chance = folder / "model" / "model.safetensors", random.Random(seed)
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        name = chance.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        entry[chance.choice(list(entry))] = chance.choice(
            [None, -1, "F8", "I64", [], [2, 3], [0, 10**18], [-1, 4], [[1]], [10**18], "BF16"]
        )
        text = json.dumps(header).encode()
        size = chance.choice((len(text), len(text), 2**63, 0, len(text) + 9))
        path.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])

    return spoil


def _weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "model" / "model.safetensors"
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    return spoil


def _reshape(state: dict[str, Any], shape: Callable[[Any], Any]) -> None:
    name = next(name for name in state if "mlp.up" in name)
    state[name] = shape(state[name]).contiguous()


_WEIGHTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a matrix is missing": lambda state: state.pop(next(n for n in state if "q_proj" in n)),
    "the table is missing": lambda state: state.pop("model.embed_tokens.weight"),
    "a norm is missing": lambda state: state.pop("model.norm.weight"),
    "all are missing": lambda state: [state.pop(name) for name in list(state)[1:]],
    "another shape": lambda state: _reshape(state, lambda tensor: tensor[:-1]),
    "transposed": lambda state: _reshape(state, lambda tensor: tensor.T),
    "another rank": lambda state: _reshape(state, lambda tensor: tensor[None]),
    "NaN in a matrix": lambda state: _reshape(state, lambda tensor: tensor * float("nan")),
    "infinity in a matrix": lambda state: _reshape(state, lambda tensor: tensor / 0),
}


def _pickled_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def _zipped_payload(folder: Path) -> None:
    import torch

    (folder / "model" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload()}, folder / "model" / "pytorch_model.bin")


def _index(target: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = folder / "model" / "model.safetensors"
        (folder / "stolen.safetensors").write_bytes(weights.read_bytes())
        (folder / "model" / "stolen.bin").write_bytes(pickle.dumps(Payload()))
        weights.unlink()
        index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": target}}
        ending = "bin" if target.endswith(".bin") else "safetensors"
        stem = "pytorch_model" if ending == "bin" else "model"
        (folder / "model" / f"{stem}.{ending}.index.json").write_text(json.dumps(index))

    return spoil


def _remote(name: str, entry: str, cls: str) -> Callable[[Path], None]:
    """Return what names code beside the model in one of its files."""

    def spoil(folder: Path) -> None:
        (folder / "model" / "evil.py").write_text(EVIL)
        change_json(
            folder / "model" / name,
            lambda tree: {**tree, "auto_map": {entry: cls}, "model_type": "evil", "trust": True},
        )

    return spoil


def _attention(name: str) -> Callable[[Path], None]:
    return lambda folder: change_json(
        folder / "model" / "config.json",
        lambda tree: {**tree, "attn_implementation": name, "_attn_implementation": name},
    )


def _adapter(folder: Path) -> None:
    (folder / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "../evil", "peft_type": "LORA"})
    )


_CODE: dict[str, Callable[[Path], None]] = {
    "pickled weights": _pickled_weights,
    "a pickle in an archive": _zipped_payload,
    "an index to a pickle": _index("stolen.bin"),
    "an index outside": _index("../stolen.safetensors"),
    "an index to the root": _index("/etc/passwd"),
    "auto_map of the model": _remote("config.json", "AutoModelForCausalLM", "evil.Evil"),
    "auto_map of the config": _remote("config.json", "AutoConfig", "evil.Evil"),
    "auto_map to a repository": _remote("config.json", "AutoConfig", "some/repo--evil.Evil"),
    "auto_map of the tokenizer": _remote(
        "tokenizer_config.json", "AutoTokenizer", ["evil.Evil", "evil.Evil"]
    ),
    "a kernel as attention": _attention("someone/kernel"),
    "a kernel of flash attention": _attention("kernels-community/flash-attn"),
    "flash attention": _attention("flash_attention_2"),
    "an adapter": _adapter,
}
_TREES = {
    "model": ("model",),
    "vocab": ("model", "vocab"),
    "merges": ("model", "merges"),
    "decoder": ("decoder",),
    "normalizer": ("normalizer",),
    "pre_tokenizer": ("pre_tokenizer",),
    "added_tokens": ("added_tokens",),
    "post_processor": ("post_processor",),
    "an added token": ("added_tokens", 0),
}


def _in_tree(path: str, place: tuple[Any, ...], key: float, value: Any) -> Callable[[Path], None]:
    def change(tree: Any) -> Any:
        found = tree
        for part in place[:-1]:
            found = found[part]
        inner = found[place[-1]]
        if isinstance(inner, dict) and inner and key < 0.6:
            inner[sorted(inner)[int(key / 0.6 * len(inner))]] = value
        else:
            found[place[-1]] = value
        return tree

    return lambda folder: change_json(folder / path, change)


def bad_ggufs(chance: random.Random) -> Iterator[Bad]:
    """Yield .gguf files that are cut, turned, or hold other values."""
    generate = ["generate", "tiny.gguf", "--prompt", "Hi", "--max-new-tokens", "2", "--raw"]
    train = ["train", "c.yaml", "--dry-run", "model={name: tiny.gguf}"]
    while True:
        command = chance.choice((generate, train))
        yield Bad("a .gguf spoilt", command, _spoilt("tiny.gguf", chance.random()))
        place, byte = chance.randrange(1200), chance.randrange(256)
        yield Bad(f"byte {place} of a .gguf is {byte}", command, _byte(place, byte))


def _byte(place: int, byte: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = bytearray((folder / "tiny.gguf").read_bytes())
        data[place] = byte
        (folder / "tiny.gguf").write_bytes(data)

    return spoil


def bad_checkpoints(chance: random.Random) -> Iterator[Bad]:
    """Yield checkpoints whose marks fit files that no run wrote."""
    while True:
        name = chance.choice(("model.pt", "optimizer.pt", "training.pt"))
        command = chance.choice((RESUME, RESUME, ["export", "run", "out", "--checkpoint", "run"]))
        path = f"{_newest}/{name}"
        yield Bad(f"{name} spoilt, and marked", command, _marked(_spoilt_file(name, chance)))
        payload = chance.choice(("bare", "in an archive", "in a tree"))
        yield Bad(f"{name} is a payload {payload}", command, _marked(_payload(name, payload)))
        keys, value = chance.random(), chance.choice(values(chance))
        spoil = _marked(_tree_of(name, keys, value))
        yield Bad(f"{path}, a leaf is {value!r:.40}", command, spoil)
        mark = chance.choice(("[]", "{}", '{"files": null}', '{"step": "x", "files": {}}', "", "x"))
        yield Bad(f"complete.json is {mark}", command, _mark(mark))
        mark = json.dumps({"step": chance.choice((-1, 10**30, 3)), "files": {"../../x": {}}})
        yield Bad(f"complete.json is {mark}", command, _mark(mark))
        yield Bad("a pickle as .metadata", command, _marked(_shards))


_newest = "run/checkpoints/step-00000004"


def _marked(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return what spoils a checkpoint, and then writes the mark that fits."""

    def spoil_and_mark(folder: Path) -> None:
        from finetune.run.folder import MARK, Mark
        from finetune.training.checkpoint import hash_of

        here = folder / _newest
        spoil(here)
        files = [path for path in here.rglob("*") if path.is_file() and path.name != MARK]
        names = {path.relative_to(here).as_posix(): path for path in files}
        sizes = {name: path.stat().st_size for name, path in names.items()}
        hashes = {name: hash_of(path) for name, path in names.items()}
        (here / MARK).write_text(Mark(4, sizes, hashes).as_text())

    return spoil_and_mark


def _spoilt_file(name: str, chance: random.Random) -> Callable[[Path], object]:
    return _spoilt(name, chance.random())


def _payload(name: str, how: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        import torch

        if how == "bare":
            (here / name).write_bytes(pickle.dumps(Payload()))
        else:
            torch.save(Payload() if how == "in an archive" else {"a": [Payload()]}, here / name)

    return spoil


def _tree_of(name: str, key: float, value: Any) -> Callable[[Path], None]:
    """Return what puts `value` in the place of a leaf or of a branch."""

    def spoil(here: Path) -> None:
        import torch

        tree = torch.load(here / name, weights_only=True)
        chance, place = random.Random(key), tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            picked = chance.choice(keys)
            below = place[picked]
            if not isinstance(below, dict | list) or not below or chance.random() < 0.3:
                break
            place = below
        how = chance.random()
        if how < 0.2 and isinstance(place, dict):
            del place[picked]
        elif how < 0.4 and isinstance(below, torch.Tensor):
            place[picked] = chance.choice([below[:0], below.double(), below * float("nan")])
        else:
            place[picked] = value
        torch.save(tree, here / name)

    return spoil


def _mark(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / _newest / "complete.json").write_text(text)


def _shards(here: Path) -> None:
    """Put a hole into model.pt, and a payload where the content of holes is described."""
    import torch

    tree = torch.load(here / "model.pt", weights_only=True)
    name = next(iter(tree))
    tree[name] = torch.empty(tree[name].shape, device="meta")
    torch.save(tree, here / "model.pt")
    (here / "shards").mkdir()
    (here / "shards" / ".metadata").write_bytes(pickle.dumps(Payload()))


def bad_runs(chance: random.Random) -> Iterator[Bad]:
    """Yield runs whose records were changed, or whose config asks for trust."""
    while True:
        command, name = list(chance.choice(OF_A_RUN)), chance.choice(RECORDS)
        yield Bad(f"{name} spoilt", command, _spoilt(f"run/{name}", chance.random()))
        name, value = chance.choice(RECORDS), chance.choice(values(chance))
        command, key = list(chance.choice(OF_A_RUN)), chance.random()
        spoil = _in_record(name, key, value)
        yield Bad(f"{name}, a value is {value!r:.40}", command, spoil)
        text = chance.choice((deep(100_000), "{", "null", "[]", "", "1", '{"a": NaN}', "\0"))
        name, command = chance.choice(RECORDS), list(chance.choice(OF_A_RUN))
        yield Bad(f"{name} is {text:.20}", command, _text(f"run/{name}", text))
        name, spoil = chance.choice(list(_CODE.items()))
        command = list(chance.choice(OF_A_RUN))
        yield Bad(f"a run that asks for trust, {name}", command, _trusting(spoil))


def _in_record(name: str, key: float, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "run" / name
        if name.endswith(".yaml"):
            import yaml

            tree = yaml.safe_load(path.read_text())
            section = tree[sorted(tree)[int(key * len(tree))]]
            if isinstance(section, dict) and section:
                section[sorted(section)[int(key * 97 % len(section))]] = value
            path.write_text(json.dumps(tree))
            return
        lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
        tree = json.loads(lines[-1])
        names = sorted(tree)
        place = tree[names[int(key * len(names))]]
        if isinstance(place, dict) and place and key * 10 % 1 < 0.5:
            place[sorted(place)[int(key * 97 % len(place))]] = value
        else:
            tree[names[int(key * len(names))]] = value
        lines[-1] = json.dumps(tree)
        path.write_text("\n".join(lines) + "\n")

    return spoil


def _trusting(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return what turns RUN/model into a model with code, and has RUN/config.yaml trust it."""

    def spoil_run(folder: Path) -> None:
        import shutil

        spoil(folder)
        shutil.rmtree(folder / "run" / "model")
        shutil.copytree(folder / "model", folder / "run" / "model")
        path = folder / "run" / "config.yaml"
        path.write_text(
            path.read_text().replace("trust_remote_code: false", "trust_remote_code: true")
        )

    return spoil_run
