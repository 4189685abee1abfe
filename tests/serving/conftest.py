"""A server of a tiny run, in a thread of this process, on a free port of the loopback."""

import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest

from finetune.data.formats.rendering import ChatTemplate
from finetune.display import Display
from finetune.models.tokenizers import stop_ids
from finetune.recipes.serve import open_service
from finetune.serving.served import Served
from finetune.serving.worker import Worker
from tests.cli.conftest import train_in
from tests.conftest import conversation


@dataclass
class Running:
    """A server at `url`, what it serves, and the thread that answers."""

    url: str
    served: Served
    worker: Worker

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@contextlib.contextmanager
def running(run: Path, *, most_waiting: int = 64, **settings: float) -> Iterator[Running]:
    service = open_service(
        str(run),
        host="127.0.0.1",
        port=0,
        base=True,
        system_prompt=None,
        settings=settings,
        most_waiting=most_waiting,
        display=Display(enabled=False),
    )
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    try:
        while not service.server.started:
            time.sleep(0.01)
        yield Running(service.address, service.served, service.worker)
    finally:
        service.server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive(), "the server does not end"


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on conversations with a system prompt, whose base is another run's model."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(48))
    )
    data = {"train": "chat.jsonl", "validation_fraction": 0.1, "max_length": 96}
    train_in(folder, data=data, evaluation={"samples": 1, "before": False})
    (folder / "run").rename(folder / "base")
    train_in(
        folder,
        model={"name": str(folder / "base" / "model")},
        data={**data, "system_prompt": "Be exact."},
        optimizer={"lr": 0.01},
        evaluation={"samples": 2},
    )
    return (folder / "run").rename(folder / "trained")


@pytest.fixture(scope="session")
def translation_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on pairs of English and French."""
    pairs = "package:translation.en-fr"
    folder = train_in(
        tmp_path_factory.mktemp("translator"),
        data={
            "train": {"path": f"{pairs}.train", "max_records": 40},
            "validation": {"path": f"{pairs}.test", "max_records": 6},
            "max_length": 128,
        },
        evaluation={"samples": 2, "generate": 4},
    )
    return folder / "run"


@pytest.fixture(scope="session")
def server(chat_run: Path) -> Iterator[Running]:
    with running(chat_run) as started:
        yield started


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    return running


def slow_and_endless(model, _, output):
    """A forward hook with which an answer takes 0.1 s a token and never ends by itself."""
    time.sleep(0.1)
    output.logits[..., list(stop_ids(model))] = float("-inf")


def saying(tokenizer, text):
    """Return a forward hook with which one answer is `text`."""
    ids = iter([*tokenizer(text).input_ids, tokenizer.eos_token_id])

    def hook(model, _, output):
        output.logits[...] = float("-inf")
        output.logits[..., next(ids)] = 0.0

    return hook


ASK = [{"role": "user", "content": "What is 3 plus 4?"}]


def answer(server, **changes):
    asked = {"model": "trained", "messages": ASK, "temperature": 0, **changes}
    return server.client.chat.completions.create(**asked)


def post(server, body, **options):
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, **options)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}],
}
WRITES_TOOLS = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(server, monkeypatch, source, system_prompt=None):
    """Return the trained model, which has another template for the rest of the test."""
    model = server.served.models["trained"]
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = source
    changed = replace(model, template=ChatTemplate(tokenizer), system_prompt=system_prompt)
    monkeypatch.setitem(server.served.models, "trained", changed)
    return changed
