"""What trimming a run's model and shipping it as GGUF costs and gives.

    python scripts/bench_export.py RUN [--test FILE] [--parts speed,batches,answers]
                                   [--sentences 300] [--threads 2] [--frequent 1000]

RUN is a finished translation run, and FILE has held-out pairs in place of its own. The run's model
is exported whole and trimmed, in bfloat16, with a GGUF file in Q8_0. Compared are the parameters,
the sizes, the speed of one answer at a time (transformers in float32, llama.cpp in Q8_0), the
answers to held-out sentences and their chrF. llama.cpp is that of the package xllamacpp.

"same answers" is the share of sentences with the same answer, among those whose prompt and full
answer stay in the tokens that are kept. Batched decoding of ours and of transformers' `generate`
are compared on 64 prompts with the whole model. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import spread

ROUNDS = 3
SPEED_TOKENS = 48  # of an answer whose speed is taken
BATCH = 64
PARTS = ("speed", "batches", "answers")


def export(run: Path, folder: Path, *, trim: bool, frequent: int) -> Path:
    """Export the run's model; return the folder."""
    from finetune.display import Display
    from finetune.recipes.export.export import export_target
    from finetune.recipes.export.trim import TrimOptions

    dest = folder / ("trimmed" if trim else "whole")
    options = TrimOptions(frequent=frequent) if trim else None
    export_target(
        run, dest, dtype="bfloat16", trim=options, gguf="q8_0", display=Display(enabled=False)
    )
    return dest


class Contestant:
    """One of the two exports, loaded in float32."""

    def __init__(self, folder: Path, config: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from finetune.models.tokenizers import stop_ids
        from finetune.recipes.build.data import make_format, open_records

        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.stops = stop_ids(self.model)
        data = config.data
        records = open_records(data.test or data.validation or data.train, data)
        self.format = make_format(data, self.tokenizer, records[0])
        self.records = [record for _, record in records]

    def prompts(self, count: int) -> list[Any]:
        """Return the first prompts that leave room for an answer."""
        found = [self.format.prompts(record)[0] for record in self.records]
        return [prompt for prompt in found if len(prompt.input_ids) <= 200][:count]

    def generate(self, prompts: Sequence[Any], count: int) -> list[list[int]]:
        """Answer prompts with our batched decoding, greedily."""
        from finetune.inference.generation import GenerationSettings, generate

        settings = GenerationSettings.greedy(count, self.stops)
        ids = [prompt.input_ids for prompt in prompts]
        return generate(self.model, ids, settings=settings, batch_size=BATCH)

    def theirs(self, prompts: Sequence[Any], count: int) -> list[list[int]]:
        """Answer prompts with transformers' `generate`, in one batch padded on the left."""
        import torch

        pad = self.tokenizer.pad_token_id or 0
        width = max(len(prompt.input_ids) for prompt in prompts)
        rows = [[pad] * (width - len(p.input_ids)) + list(p.input_ids) for p in prompts]
        mask = [[0] * (width - len(p.input_ids)) + [1] * len(p.input_ids) for p in prompts]
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=self.stops,
                pad_token_id=pad,
            )[:, width:]
        return [self._upto_stop(ids) for ids in out.tolist()]

    def _upto_stop(self, ids: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(ids) if token in self.stops]
        return ids[: ends[0]] if ends else ids

    def text(self, ids: Sequence[int]) -> str:
        """Return an answer as text."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def tokens_per_second(engine: str, folder: Path, prompt: Sequence[int], threads: int) -> float:
    """Return the tokens a second of one long answer, by an engine, in this process."""
    from runtime import running

    if engine == "llama_cpp":
        [file] = folder.glob("*.gguf")
        with running(file, threads=threads) as runtime:
            runtime.speed("Hello", 4)
            return runtime.speed("Hello", SPEED_TOKENS)
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        taken = []
        for count in (1, 1, SPEED_TOKENS + 1):
            started = time.perf_counter()
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            taken.append(time.perf_counter() - started)
    return SPEED_TOKENS / (taken[2] - taken[1])


def measure_sizes(each: Contestant) -> dict[str, float]:
    """Return parameters, and the megabytes of the weights and of the GGUF file."""
    [gguf] = each.folder.glob("*.gguf")
    plain = [path for path in each.folder.iterdir() if path.suffix not in (".gguf", "")]
    return {
        "rows": len(each.tokenizer),
        "parameters": sum(parameter.numel() for parameter in each.model.parameters()),
        "folder_mb": round(sum(path.stat().st_size for path in plain) / 1e6, 1),
        "gguf_mb": round(gguf.stat().st_size / 1e6, 1),
    }


def measure_answers(
    whole: Contestant, trimmed: Contestant, sentences: int, count: int, threads: int
) -> dict[str, Any]:
    """Return how the answers of the two models, and of the trimmed file, compare."""
    from runtime import running
    from sacrebleu.metrics import CHRF

    prompts = [each.prompts(sentences) for each in (whole, trimmed)]
    answers = [
        each.generate(asked, count) for each, asked in zip((whole, trimmed), prompts, strict=True)
    ]
    texts = [
        [each.text(ids) for ids in found]
        for each, found in zip((whole, trimmed), answers, strict=True)
    ]
    names = trimmed.tokenizer.get_vocab()
    within = [
        all(token in names for token in whole.tokenizer.convert_ids_to_tokens([*p.input_ids, *a]))
        for p, a in zip(prompts[0], answers[0], strict=True)
    ]
    same = [a == b for a, b in zip(*texts, strict=True)]
    [file] = trimmed.folder.glob("*.gguf")
    with running(file, context=512, threads=threads) as runtime:
        shipped = [runtime.answer(p.input_ids, count).strip() for p in prompts[1]]
    references = [[p.reference for p in prompts[0]]]
    score = [CHRF().corpus_score(found, references).score for found in (*texts, shipped)]
    return {
        "sentences": len(same),
        "within": sum(within),
        "same_within": sum(s for s, w in zip(same, within, strict=True) if w) / max(1, sum(within)),
        "chrf_whole": round(score[0], 2),
        "chrf_trimmed": round(score[1], 2),
        "chrf_gguf": round(score[2], 2),
    }


def measure_speed(pair: Sequence[Contestant], threads: int) -> dict[str, list[float]]:
    """Return tokens a second of one answer at a time: whole and trimmed, in turns.

    Each is measured in a process of its own: threads that wait for others spin.
    """
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for engine in ("transformers", "llama_cpp"):
            for name, each in zip(("whole", "trimmed"), pair, strict=True):
                prompt = json.dumps(list(each.prompts(1)[0].input_ids))
                options = [f"--engine={engine}", f"--prompt={prompt}", f"--threads={threads}"]
                command = [sys.executable, __file__, str(each.folder), *options]
                ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rate = float(ran.stdout.splitlines()[-1])
                found.setdefault(f"{engine}_{name}", []).append(rate)
    return found


def measure_batches(whole: Contestant, count: int) -> dict[str, Any]:
    """Return the seconds of ours and of transformers' for 64 prompts, and whether they agree."""
    prompts = whole.prompts(BATCH)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    answers: dict[str, list[list[int]]] = {}
    for _ in range(ROUNDS):
        for name, answer in (("ours", whole.generate), ("theirs", whole.theirs)):
            started = time.perf_counter()
            answers[name] = answer(prompts, count)
            seconds[name].append(time.perf_counter() - started)
    ratio = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    same = [a == b for a, b in zip(answers["ours"], answers["theirs"], strict=True)]
    return {"prompts": len(prompts), "same": sum(same) / len(same), "speed_ratio": spread(ratio)}


def print_table(found: dict[str, Any]) -> None:
    """Print the figures of the whole and of the trimmed model, and their ratio."""
    rows = [(key, found["whole"][key], found["trimmed"][key]) for key in found["whole"]]
    if speed := found.get("speed"):
        rows += [
            (f"{name}, tokens/s", *(statistics.median(speed[f"{key}_{which}"])
                                    for which in ("whole", "trimmed")))
            for name, key in (("transformers", "transformers"), ("llama.cpp", "llama_cpp"))
        ]  # fmt: skip
    if answers := found.get("answers"):
        rows.append(("chrF", answers["chrf_whole"], answers["chrf_trimmed"]))
    print(f"{'':24}{'whole':>14}{'trimmed':>14}{'ratio':>8}")
    for name, before, after in rows:
        ratio = f"{after / before:.3f}" if before else "-"  # the chrF of a random model is 0
        print(f"{name:24}{before:>14,.1f}{after:>14,.1f}{ratio:>8}")
    if answers:
        print(
            f"same answers: {answers['same_within']:.1%} of {answers['within']} sentences of "
            f"{answers['sentences']}; chrF of the trimmed Q8_0 file: {answers['chrf_gguf']}"
        )
    if batches := found.get("batches"):
        print(
            f"{batches['prompts']} prompts: ours over transformers' generate "
            f"{batches['speed_ratio'][0]:.2f} x, {batches['same']:.0%} of the answers the same"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished translation run")
    parser.add_argument("--test", type=Path, help="held-out pairs; default: the run's own")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure; default: all")
    parser.add_argument("--sentences", type=int, default=300, help="held-out sentences to answer")
    parser.add_argument("--tokens", type=int, default=64, help="length limit of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frequent", type=int, default=1000, help="as for `finetune export`")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        print(tokens_per_second(args.engine, args.run, args.prompt, args.threads))
        return
    if unknown := {*args.parts.split(",")} - {*PARTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    import torch

    from finetune.config import load_config
    from finetune.run.folder import RunDir

    torch.set_num_threads(args.threads)
    test = [f"data.test={args.test}"] if args.test else []
    config = load_config(RunDir(args.run).config, test)
    with tempfile.TemporaryDirectory() as folder:
        folders = [
            export(args.run, Path(folder), trim=trim, frequent=args.frequent)
            for trim in (False, True)
        ]
        pair = [Contestant(folder, config) for folder in folders]
        measure = {
            "speed": lambda: measure_speed(pair, args.threads),
            "batches": lambda: measure_batches(pair[0], args.tokens),
            "answers": lambda: measure_answers(*pair, args.sentences, args.tokens, args.threads),
        }
        found: dict[str, Any] = {
            "run": args.run.name,
            "threads": args.threads,
            "load": os.getloadavg()[0],
            "whole": measure_sizes(pair[0]),
            "trimmed": measure_sizes(pair[1]),
        }
        found |= {part: measure[part]() for part in args.parts.split(",")}
    print_table(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
