"""A server of a tiny run, in a thread of this process, on a free port of the loopback."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

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
