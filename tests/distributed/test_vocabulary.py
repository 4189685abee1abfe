"""The active vocabulary and the drawn rows on two processes, which train what one trains."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.test_vocabulary import (  # noqa: F401  (base is a fixture)
    base,
    config_for,
    losses,
    sentences,
    write_texts,
)

CASES = {
    "sampled": ["vocabulary.mode=sampled", "vocabulary.num_sampled=40"],
    "growing": [
        "vocabulary.mode=active",
        "data.streaming=true",
        "data.shuffle_buffer=16",
        "data.max_length=32",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(base, tmp_path, case):  # noqa: F811
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        config_for(base, folder)
        if case == "growing":  # the second word list comes after the rows that are looked at first
            texts = [
                *sentences(1000, words=["cat", "sat"]),
                *sentences(100, words=["ban", "dep", "gir"]),
            ]
            write_texts(folder / "train.jsonl", texts)
        options = [*CASES[case], "training.max_steps=6", "training.batch_size=5"]
        if case == "growing":
            options[-2:] = [
                "training.max_steps=52",
                "training.batch_size=20",
                "training.micro_batch_size=5",
                "data.packing=false",
            ]
        command = [
            sys.executable,
            "-m",
            "finetune",
            "train",
            str(folder / "run.yaml"),
            *options,
            "--processes",
            str(processes),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = (
            list(losses(folder / "run").values()),
            load_file(folder / "run" / "model" / "model.safetensors"),
        )
        if case == "growing":
            notes = json.loads((folder / "run" / "environment.json").read_text())["notes"]
            assert any("tokens that its first records did not have" in note for note in notes)
    assert found[2][0] == pytest.approx(found[1][0], abs=1e-4)
    for name, weight in found[1][1].items():
        torch.testing.assert_close(found[2][1][name], weight, rtol=1e-3, atol=1e-4)
