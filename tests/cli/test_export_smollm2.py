"""SmolLM2 itself, trimmed to French pairs and run by llama.cpp, through the command."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.inference.generation import GenerationSettings, generate
from finetune.models.tokenizers import stop_ids
from scripts.runtime import running
from tests.cli.conftest import finetune
from tests.vocabularies import tokenizer_folder

DATA = Path(__file__).parents[2] / "finetune/resources/data"
SYSTEM = "Translate English to French."


def pairs(part: str) -> list[dict[str, str]]:
    lines = (DATA / f"translation.en-fr.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["translation"] for line in lines]


@pytest.mark.slow
def test_smollm2_is_trimmed_and_its_file_answers_as_it_does(folder):
    pytest.importorskip("xllamacpp")
    whole = str(tokenizer_folder("smollm2"))
    text = ("--text", str(DATA / "translation.en-fr.train.jsonl"), "--keep", SYSTEM)
    result = finetune("export", whole, "out", "--trim", *text, "--gguf", "f16")
    assert result.code == 0, result.err
    full, small = (
        (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), each)
        for path, each in ((path, AutoTokenizer.from_pretrained(path)) for path in (whole, "out"))
    )
    assert len(small[1]) < 8000 < len(full[1])
    old = full[1].convert_tokens_to_ids(small[1].convert_ids_to_tokens(range(len(small[1]))))
    assert torch.equal(
        full[0].get_input_embeddings().weight[old], small[0].get_input_embeddings().weight
    )
    prompts = []
    for pair in pairs("train")[:200]:
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": pair["en"]}]
        ids = [
            each.apply_chat_template(asked, add_generation_prompt=True).input_ids
            for _, each in (full, small)
        ]
        assert [old[token] for token in ids[1]] == ids[0]
        prompts.append(ids)
    settings = GenerationSettings.greedy(16, stop_ids(full[0]))
    answers = generate(full[0], [ids[0] for ids in prompts[:12]], settings=settings, batch_size=12)
    again = generate(
        small[0],
        [ids[1] for ids in prompts[:12]],
        settings=GenerationSettings.greedy(16, stop_ids(small[0])),
        batch_size=12,
    )
    within = [set(answer) <= set(old) for answer in answers]
    assert sum(within) >= 6
    for stays, answer, other in zip(within, answers, again, strict=True):
        assert not stays or [old[token] for token in other] == answer
    [file] = (folder / "out").glob("*.gguf")
    same = 0
    with running(file, context=512) as runtime:
        for pair in [*pairs("train")[:100], *pairs("test")]:
            assert runtime.tokens(pair["fr"]) == small[1](pair["fr"]).input_ids
        for (_, prompt), other in zip(prompts[:6], again):
            found, _ = runtime.greedy(prompt, 6)
            same += found == [*other, *stop_ids(small[0])][: len(found)]
        assert runtime.chat(pairs("train")[0]["en"], 4)
    assert same >= 5
