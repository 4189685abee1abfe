"""`finetune serve` as it is typed: how it ends, and what it refuses before it serves."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.serve import open_service
from tests.cli.conftest import finetune
from tests.data import stock


def test_a_port_that_is_taken_is_named(chat_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = finetune("serve", str(chat_run), "--port", str(port))
    assert result.code == 2
    assert f"the address 127.0.0.1, port {port} cannot be used: " in result.err
    assert "Give another with --port" in result.err


def test_a_run_without_a_model_says_how_to_finish_it(chat_run, tmp_path):
    shutil.copytree(chat_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    result = finetune("serve", str(tmp_path / "run"))
    assert result.code == 2
    assert "has no model/ yet" in result.err


@pytest.mark.parametrize("template", [None, stock.GEMMA])
def test_a_system_prompt_that_no_template_takes_is_refused(template, chat_run, tmp_path):
    shutil.copytree(chat_run.parent / "base" / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    if template is not None:
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"takes a system prompt\. Leave out --system"):
        open_service(
            str(tmp_path / "model"),
            host="127.0.0.1",
            port=0,
            base=False,
            system_prompt="Be brief.",
            settings={},
            display=Display(enabled=False),
        )


@pytest.mark.slow
def test_ctrl_c_ends_a_server_in_the_middle_of_an_answer(chat_run):
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "serve", str(chat_run), "--port", "0"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"http://\S+", line):
            break
    # Random weights at this temperature hardly ever end an answer before the model is full.
    body = {"model": "trained", "messages": [{"role": "user", "content": "Hello"}], "stream": True,
            "max_tokens": 100, "temperature": 2}  # fmt: skip
    with httpx.stream("POST", f"{found[0]}/v1/chat/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        rest = list(lines)  # it ends whole, not with a connection that breaks
    said += process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert rest
    assert "Traceback" not in said
    assert said.endswith("the server has ended\n")
