"""Encoded data that is kept: the same as fresh in all that it says, and never a damaged one."""

import json
import multiprocessing
import os
import pickle
import resource
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config.loading import make_config
from finetune.data.encode import EncodedDataset
from finetune.data.encoding.store import Store, key_of
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.build import data as data_room
from finetune.recipes.build.material import Material, read_material
from finetune.recipes.build.size import with_step_size

MODEL = {
    "config": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 400,
    },
    "tokenizer": {"vocab_size": 400},
}  # fmt: skip
CHAT = [
    {"messages": [{"role": "user", "content": f"What is {n}+{n}?"},
                  {"role": "assistant", "content": f"It is {2 * n}."}], "source": "sums"}
    for n in range(60)
] + [
    {"messages": [{"role": "user", "content": "Mute?"},
                  {"role": "assistant", "content": "a <|im_end|> b", "weight": 1, "name": "Ann"}]},
    {"messages": [{"role": "user", "content": "No answer"}]},
    {"prompt": "long " * 90, "completion": "x"},
    {"prompt": "x", "completion": "word " * 90},
]  # fmt: skip
PAIRS = [{"translation": {"en": f"word {n}", "fr": f"mot {n}"}} for n in range(40)]
TEXTS = [{"text": f"This is text {n}. " * (n % 9), "id": n} for n in range(40)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


class Said(Display):
    """A display that keeps what is said."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def material(folder: Path, records: Any, **data: Any) -> tuple[Material, Said]:
    file = folder / "data.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    settings = {"train": str(file), "max_length": 64, "validation_fraction": 0.2, **data}
    config = {"model": MODEL, "data": settings, "output_dir": str(folder / "run")}
    said = Said()
    return read_material(make_config(config), said), said


def everything(folder: Path, records: Any, **data: Any) -> dict[str, Any]:
    """Return all that reading the data gives and says."""
    made, said = material(folder, records, **data)
    found: dict[str, Any] = {}
    for name in ("train", "validation"):
        try:
            dataset = getattr(made, name)
        except UserError as error:
            found[name] = str(error)
            continue
        found[name] = [(list(e.input_ids), list(e.labels)) for e in dataset]
        found[f"{name} counts"] = dataset.statistics.as_dict()
        found[f"{name} fingerprint"] = dataset.fingerprint
        found[f"{name} lengths"] = dataset.lengths
        found[f"{name} targets"] = list(dataset.target_counts)
        found[f"{name} used"] = dataset.used_ids
    found["notes"] = said.said
    found["format"] = made.format.state()
    found["system"] = made.format.common_system_prompt
    found["advice"] = with_step_size(made).advice() if "train counts" in found else []
    return found


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": (CHAT, {"on_bad_record": "drop"}),
    "chat, bad records": (CHAT, {}),
    "chat, all tokens": (CHAT, {"on_bad_record": "drop", "targets": "all"}),
    "chat, dropped": (CHAT, {"on_bad_record": "drop", "overlong": "drop"}),
    "chat, duplicates": (CHAT * 2, {"on_bad_record": "drop", "drop_duplicates": True}),
    "translation": (PAIRS, {"translation": {"direction": "both"}}),
    "text": (TEXTS, {}),
    "text, truncated": (TEXTS, {"overlong": "truncate"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_later_start_reads_and_says_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, data = CASES[case]
    fresh = everything(tmp_path, records, cache=False, **data)
    assert not (tmp_path / "cache").exists()
    assert everything(tmp_path, records, **data) == fresh
    is_refused = isinstance(fresh["train"], str)
    if not is_refused:
        monkeypatch.setattr(data_room, "encode", None)  # it would fail
    assert everything(tmp_path, records, **data) == fresh
    assert is_refused == (case == "chat, bad records")
    assert len(fresh["train"]) > 20
    assert fresh["notes"] or case.startswith("translation")


def test_what_is_kept_is_mapped_and_is_not_a_program(tmp_path: Path) -> None:
    made, _ = material(tmp_path, PAIRS)
    assert isinstance(made.train._ids, np.memmap)
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        start = file.read_bytes()[:2]
        assert not start.startswith(b"\x80"), f"{file} looks like a pickle"
        with pytest.raises(Exception):  # noqa: B017, PT011
            pickle.loads(file.read_bytes())
    record = json.loads(next(file for file in files if file.name == "entry.json").read_text())
    assert set(record) == {"hash", "body"}


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 50},
    "targets": {"targets": "all"},
    "system prompt": {"system_prompt": "Be brief."},
    "seed of the split": {"validation_fraction": 0.3},
    "template": {"chat_template_kwargs": {}, "translation": {"template": "Say: {source}"}},
    "direction": {"translation": {"direction": "backward"}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_wish_is_encoded_anew(change: str, tmp_path: Path) -> None:
    assert everything(tmp_path, PAIRS)
    for _ in range(2):
        kept = everything(tmp_path, PAIRS, **CHANGES[change])
        assert kept == everything(tmp_path, PAIRS, cache=False, **CHANGES[change])


def test_changed_bytes_of_the_same_size_and_time_are_read(tmp_path: Path) -> None:
    before = everything(tmp_path, PAIRS)
    file = tmp_path / "data.jsonl"
    stat = file.stat()
    file.write_text(file.read_text().replace("mot 7", "MOT 7"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = [
        {"translation": {"en": f"word {n}", "fr": f"{'MOT' if n == 7 else 'mot'} {n}"}}
        for n in range(40)
    ]
    after = everything(tmp_path, changed)
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert after == everything(tmp_path, changed, cache=False)
    assert after != before


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "turned bit": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    ),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0\0\0\0"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(damage: str, tmp_path: Path) -> None:
    fresh = everything(tmp_path, CHAT, on_bad_record="drop")
    names = {f.name for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.name[0] != "."}
    assert {"entry.json", "ids", "labels", "lengths", "targets", "starts"} <= names
    for name in sorted(names):
        for file in list((tmp_path / "cache").rglob(name)):
            DAMAGES[damage](file)
        assert everything(tmp_path, CHAT, on_bad_record="drop") == fresh, name
        for file in (tmp_path / "cache").rglob(name):
            assert file.is_file()


def test_a_disk_that_refuses_is_noted_and_the_data_is_encoded(tmp_path: Path) -> None:
    fresh = everything(tmp_path, CHAT, on_bad_record="drop", cache=False)
    (tmp_path / "cache").write_text("not a folder")
    refused = everything(tmp_path, CHAT, on_bad_record="drop")
    assert {key: value for key, value in refused.items() if key != "notes"} == {
        key: value for key, value in fresh.items() if key != "notes"
    }
    assert sum("cannot be kept" in note for note in refused["notes"]) == 2
    (tmp_path / "cache").unlink()

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # as if the disk were full
    try:
        full_disk = everything(tmp_path, CHAT, on_bad_record="drop")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full_disk["train"] == fresh["train"]
    assert full_disk["format"] == fresh["format"]
    assert full_disk["train counts"] == fresh["train counts"]
    assert any("File too large" in note for note in full_disk["notes"])
    assert [
        f for f in (tmp_path / "cache").rglob("*") if f.name.startswith(".") and f.is_dir()
    ] == []


def test_long_data_goes_to_the_disk_as_it_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = everything(tmp_path, CHAT * 30, on_bad_record="drop", cache=False)
    from finetune.data import encode as encode_room

    monkeypatch.setattr(encode_room, "_HELD_TOKENS", 1000)
    assert everything(tmp_path, CHAT * 30, on_bad_record="drop") == fresh
    assert everything(tmp_path, CHAT * 30, on_bad_record="drop") == fresh


def test_a_long_plain_text_is_split_and_no_conversation_is(tmp_path: Path) -> None:
    texts = [{"text": "one two three four five. " * 30}, {"text": "short"}]
    made, said = material(tmp_path, texts, validation_fraction=0.0)
    counts, example = made.train.statistics, list(made.train)
    assert (counts.records, counts.split, counts.truncated) == (2, 1, 0)
    assert len(example) > 3
    learnt = [label for part in example[:-1] for label in list(part.labels)[1:]]
    text = made.tokenizer.decode([example[0].input_ids[0], *learnt], skip_special_tokens=True)
    assert text == texts[0]["text"]
    assert learnt[-1] == made.tokenizer.eos_token_id
    counts = material(tmp_path, CHAT, on_bad_record="drop")[0].train.statistics
    assert (counts.split, counts.truncated > 0) == (0, True)
    for records, what in ((CHAT[:9], "chat"), (PAIRS, "translation")):
        with pytest.raises(UserError, match=rf"data\.overlong is split, .* of a {what} example"):
            material(tmp_path, records, overlong="split")
    assert said.said == []


# The store


def fill(store: Store, key: str, size: int = 1000) -> None:
    store.write(key, {"key": key}, {"numbers": array("i", [int(key[:4], 16) % 1000] * (size // 4))})


def test_the_oldest_entries_make_room(tmp_path: Path) -> None:
    store, keys = Store(tmp_path), [key_of(n) for n in range(6)]
    for number, key in enumerate(keys[:4]):
        fill(store, key)
        os.utime(tmp_path / key, (number, number))
    assert store.read(keys[0]) is not None  # used now
    broken_off = tmp_path / ".abc-def"
    broken_off.mkdir()
    os.utime(broken_off, (0, 0))
    (tmp_path / ".young").mkdir()
    store.most_bytes = 4000  # three entries
    fill(store, keys[4])
    left = [number for number, key in enumerate(keys) if (tmp_path / key).is_dir()]
    assert left == [0, 3, 4]
    assert not broken_off.exists()
    assert (tmp_path / ".young").exists()
    draft = store.draft(keys[5])
    draft.add("numbers", array("i", range(5000)))
    entry = draft.finish({})
    assert list(entry.arrays["numbers"][-3:]) == [4997, 4998, 4999], "mapped, though deleted"
    assert not (tmp_path / keys[5]).exists()


def test_empty_arrays_and_values_come_back(tmp_path: Path) -> None:
    store, key = Store(tmp_path), key_of("a")
    store.write(key, {"problems": [[1, "é\ud83d"]]}, {"none": array("q"), "some": array("q", [5])})
    entry = store.read(key)
    assert entry is not None
    assert entry.values == {"problems": [[1, "é\ud83d"]]}
    assert (len(entry.arrays["none"]), list(entry.arrays["some"])) == (0, [5])


def _write_often(folder: str, key: str, seconds: float) -> int:
    store, end, seen = Store(Path(folder)), time.time() + seconds, 0
    while time.time() < end:
        with store.making(key):
            if store.read(key) is None:
                fill(store, key, 40_000)
        fill(store, key, 40_000)
        entry = store.read(key)
        if entry is not None:
            assert len(entry.arrays["numbers"]) == 10_000
            seen += 1
        if seen % 5 == 0:
            Store(Path(folder), most_bytes=0).prune()
    return seen


@pytest.mark.slow
def test_processes_at_once_find_whole_entries_or_none(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        arguments = [(str(tmp_path), key_of("same"), 3.0)] * 3
        assert min(pool.starmap(_write_often, arguments)) > 3


def _encode_once(folder: str, start: float) -> tuple[str, bool]:
    os.environ["FINETUNE_CACHE"] = f"{folder}/cache"
    encoded = False

    def counted(*args: Any, **options: Any) -> EncodedDataset:
        nonlocal encoded
        encoded = True
        return encode(*args, **options)

    encode, data_room.encode = data_room.encode, counted  # type: ignore[assignment]
    time.sleep(max(0.0, start - time.time()))
    made, _ = material(Path(folder), CHAT * 50, on_bad_record="drop", validation_fraction=0.0)
    return made.train.fingerprint, encoded


@pytest.mark.slow
def test_of_two_processes_one_encodes_and_both_have_the_same(tmp_path: Path) -> None:
    material(tmp_path, CHAT * 50, cache=False, on_bad_record="drop", validation_fraction=0.0)
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        found = pool.starmap(_encode_once, [(str(tmp_path), time.time() + 20)] * 2)
    assert len({fingerprint for fingerprint, _ in found}) == 1
    assert sorted(encoded for _, encoded in found) == [False, True]
