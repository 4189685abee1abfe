"""A server of a tiny run, in a thread of this process, on a free port of the loopback."""

import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import uvicorn

from finetune.display import Display
from finetune.recipes.build.target import open_target
from finetune.recipes.serve import LOOPBACK, _listen, _served
from finetune.serving.app import make_app
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
    served, batch_size = _served(
        open_target(str(run)), str(run), True, None, settings, Display(enabled=False)
    )
    worker = Worker(
        {name: each.model for name, each in served.models.items()},
        {name: copy.deepcopy(each.tokenizer) for name, each in served.models.items()},
        batch_size=batch_size,
        most_waiting=most_waiting,
    )
    listener = _listen("127.0.0.1", 0)
    app = make_app(served, worker, hosts=LOOPBACK)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=3)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", served, worker)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        worker.close()
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
