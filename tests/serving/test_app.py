"""The server as its clients meet it: the openai package, plain HTTP, and garbage."""

import json
import logging
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from finetune.recipes.serve import _question
from finetune.serving import app
from finetune.serving.app import MOST_BYTES
from finetune.serving.protocol import ChatRequest
from tests.cli.conftest import finetune
from tests.data import stock
from tests.serving.conftest import (
    ASK,
    CALLED,
    TOOL,
    answer,
    post,
    saying,
    slow_and_endless,
    with_template,
)


def test_both_models_are_listed_and_their_equal_weights_are_held_once(server):
    assert [model.id for model in server.client.models.list()] == ["trained", "model"]
    trained, base = (each.model for each in server.served.models.values())
    assert len(list(trained.parameters())) == len(list(base.parameters()))


def test_an_answer_is_that_of_the_command(server, chat_run):
    command = finetune("generate", str(chat_run), "--prompt", ASK[0]["content"])
    assert command.code == 0, command.err
    reply = answer(server)
    assert reply.choices[0].message.content == command.out.removesuffix("\n")
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens <= 4
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


@pytest.mark.parametrize("model", ["trained", "model"])
def test_a_streamed_answer_is_the_same(server, model):
    whole = answer(server, model=model, max_tokens=12)
    parts = list(
        answer(
            server, model=model, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    endings = [part.choices[0].finish_reason for part in parts if part.choices]
    assert endings[-1] == whole.choices[0].finish_reason
    assert set(endings[:-1]) == {None}
    assert parts[-1].usage == whole.usage


def test_the_systems_prompt_of_the_run_is_used_unless_another_is_given(server):
    def num_prompt_tokens(*before):
        return answer(server, messages=[*before, *ASK]).usage.prompt_tokens

    own = {"role": "system", "content": "Be exact."}
    assert num_prompt_tokens() == num_prompt_tokens(own)
    assert num_prompt_tokens({"role": "system", "content": ""}) < num_prompt_tokens()
    assert num_prompt_tokens({"role": "system", "content": "Be exact. Be kind."}) > (
        num_prompt_tokens()
    )


def test_a_seed_repeats_an_answer_and_settings_do_not_leak_between_requests(server):
    drawn = {"temperature": 2.0, "max_tokens": 12}
    texts = [answer(server, seed=seed, **drawn).choices[0].message.content for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda seed: answer(server, seed=seed, **drawn), [1, 2, 1, 2, 1, 2])
        )
    assert [reply.choices[0].message.content for reply in together] == texts[:2] * 3


def test_an_answer_ends_before_a_stop_text(server):
    whole = answer(server, max_tokens=12).choices[0].message.content
    middle = whole[len(whole) // 2 :][:2]
    cut = answer(server, max_tokens=12, stop=[middle]).choices[0]
    assert cut.message.content == whole[: whole.index(middle)]
    assert cut.finish_reason == "stop"


def test_a_stream_that_is_left_in_the_middle_ends_the_answer(server):
    drawn = []

    def slow(*_):
        drawn.append(time.sleep(0.05))

    hook = server.served.models["trained"].model.register_forward_pre_hook(slow)
    try:
        stream = answer(server, max_tokens=1000, stream=True, temperature=2.0, seed=3)
        next(iter(stream))
        stream.close()
        wait_for(lambda: not server.worker.is_busy)
    finally:
        hook.remove()
    assert len(drawn) < 40  # of about 90 that the model has room for


def test_an_answer_that_nobody_waits_for_ends(server):
    """A token comes every 0.1 s, so the server never waits long for one."""
    model = server.served.models["trained"].model
    hook = model.register_forward_hook(slow_and_endless)
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/chat/completions",
                json={"model": "trained", "messages": ASK, "max_tokens": 90, "temperature": 2},
                timeout=1.0,
            )
        began = time.monotonic()
        wait_for(lambda: not server.worker.is_busy)
        assert time.monotonic() - began < 5  # of about 9
    finally:
        hook.remove()


def test_an_upload_that_is_broken_off_is_no_error_of_the_server(server, caplog):
    errors = logging.getLogger("uvicorn.error")  # it passes nothing on to its parents
    errors.addHandler(caplog.handler)
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: " + address.netloc
            + b"\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )  # fmt: skip
        time.sleep(0.3)
    assert answer(server).choices
    errors.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


REFUSED = {  # what is sent -> status, and words of the sentence
    "model": ({"model": "gpt-4"}, 404, "there is no model 'gpt-4'; known are trained, model"),
    "nothing asked": ({"messages": []}, 400, "messages: "),
    "no user": ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "from user or tool"),
    "role": ({"messages": [{"role": "king", "content": "a"}]}, 400, "unknown role 'king'"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "not text alone",
    ),
    "two answers": ({"n": 2}, 400, "n: input should be 1, not 2"),
    "logprobs": ({"logprobs": True}, 400, "logprobs: "),
    "json": (
        {"response_format": {"type": "json_object"}},
        400,
        'response_format: only {"type": "text"} can be served. Leave it out',
    ),
    "a schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
        400,
        'response_format: only {"type": "text"} can be served',
    ),
    "a part that is an object": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}]},
        400,
        "has a part of the content whose text is {'a': 1}",
    ),
    "a part that is a number": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        400,
        "has a part of the content whose text is 3",
    ),
    "two lengths": (
        {"max_tokens": 3, "max_completion_tokens": 4},
        400,
        "max_tokens is 3 and max_completion_tokens is 4, and both mean the same",
    ),
    "unknown in a stream": (
        {"stream": True, "stream_options": {"include_usage": True, "zzz": 1}},
        400,
        "stream_options.zzz: is not a parameter of this server",
    ),
    "many system messages": (
        {"messages": [{"role": "system", "content": "a"}] * 500 + ASK},
        400,
        "at most 128",
    ),
    "hot": ({"temperature": 9}, 400, "temperature: "),
    "unknown": ({"tempature": 1}, 400, "tempature: is not a parameter of this server"),
    "many stops": ({"stop": ["a"] * 5}, 400, "stop: list should have at most 4 items"),
    "an empty stop": ({"stop": ""}, 400, "stop: string should have at least 1 character"),
    "an empty stop of two": (
        {"stop": ["a", ""]},
        400,
        "stop: string should have at least 1 character",
    ),
    "a stop": ({"stop": 7}, 400, "stop: input should be a valid string"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens: "),
    "too long": ({"messages": [{"role": "user", "content": "a b " * 400}]}, 400, "at most 128"),
    "no translator": ({"translate": {}}, 400, "was not trained to translate"),
    "seed": ({"seed": 2**70}, 400, "seed: "),
    "tools": ({"tools": [TOOL]}, 400, "does not write tools. Leave that out of the request"),
    "calls": (
        {"messages": [*ASK, CALLED, {"role": "tool", "content": "7"}]},
        400,
        "the chat template does not write 'tool_calls' (assistant). Leave that out",
    ),
    "one call": ({"parallel_tool_calls": False}, 400, "parallel_tool_calls: input should be true"),
    "tools for a sentence": ({"translate": {}, "tools": [TOOL]}, 400, "translate takes no tools"),
    "deep arguments": (
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[" * 9999}}],
                },
                *ASK,
            ]
        },
        400,
        "must be JSON",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_in_a_sentence(server, name):
    changes, status, words = REFUSED[name]
    reply = post(server, {"model": "trained", "messages": ASK, **changes})
    assert reply.status_code == status
    error = reply.json()["error"]
    assert words in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "name",
    ["stream", "stream_options", "stop", "tools", "n", "suffix", "prediction", "modalities"],
)
def test_a_null_asks_for_nothing(server, name):
    body = {"model": "trained", "messages": ASK, "temperature": 0, "max_tokens": 2}
    reply = post(server, {**body, name: None})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == post(server, body).json()["choices"]


def test_one_length_may_be_given_by_both_names(server):
    reply = answer(server, max_tokens=2, max_completion_tokens=2)
    assert reply.usage.completion_tokens <= 2


def test_one_model_can_be_asked_for(server):
    for model in server.client.models.list():
        assert server.client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; known are trained"):
        server.client.models.retrieve("gpt-4")
    assert httpx.get(f"{server.url}/v1/models/org/name").status_code == 404


@pytest.mark.parametrize("path", ["/", "/report", "/v1/models", "/v1/models/trained", "/api/about"])
def test_what_can_be_read_can_be_asked_for_without_its_body(server, path):
    whole, head = httpx.get(server.url + path), httpx.head(server.url + path)
    assert (head.status_code, head.content) == (200, b"") == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    refused = httpx.delete(server.url + path)
    assert refused.status_code == 405
    assert set(refused.headers["Allow"].split(", ")) == {"GET", "HEAD"}


def test_what_takes_a_body_says_so(server):
    refused = httpx.get(f"{server.url}/v1/chat/completions")
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")
    assert "Use POST" in refused.json()["error"]["message"]


def test_every_event_of_a_stream_is_one_line(server):
    """U+2028 and U+0085 end a line for httpx, and for Python's splitlines."""
    model, text = server.served.models["trained"], "a\u2028b\u0085c \U0001f600 \u00e9"
    body = {"model": "trained", "messages": ASK, "temperature": 0, "max_tokens": 60, "stream": True}
    hook = model.model.register_forward_hook(saying(model.tokenizer, text))
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply:
            lines = [line for line in reply.iter_lines() if line]
    finally:
        hook.remove()
    assert lines.pop() == "data: [DONE]"
    parts = [json.loads(line.removeprefix("data: ")) for line in lines]
    said = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert said == text


def test_the_openai_package_raises_its_own_errors(server):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        answer(server, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="Shorten the text"):
        answer(server, messages=[{"role": "user", "content": "a b " * 400}])


def test_a_body_that_is_too_large_and_what_is_not_there(server):
    body = {"model": "trained", "messages": [{"role": "user", "content": "a" * MOST_BYTES}]}
    assert post(server, body).status_code == 413
    for method, path, status in [
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/etc/passwd", 404),
        ("GET", "/../pyproject.toml", 404),
        ("POST", "/v1/embeddings", 404),
    ]:
        reply = httpx.request(method, server.url + path)
        assert reply.status_code == status
        assert "message" in reply.json()["error"]


def test_pages_of_other_sites_may_not_ask(server):
    body = {"model": "trained", "messages": ASK}
    assert post(server, body, headers={"Origin": "http://evil.example"}).status_code == 403
    for host in ("evil.example", "[", "localhost.evil.example"):
        assert post(server, body, headers={"Host": host}).status_code == 403
    assert post(server, body, headers={"Host": "localhost:1"}).status_code == 200
    assert post(server, body, headers={"Origin": server.url}).status_code == 200


def garbage(draw: random.Random) -> bytes:
    """Return a body that is broken in one of many ways."""
    good = {"model": "trained", "messages": ASK, "max_tokens": 1}
    text = json.dumps(good)
    odd = [None, 1, -1, 1e400, "", [], {}, [[]], {"a": []}, "\ud800", True, 10**30, "x" * 999]
    kind = draw.randrange(6)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        return text[: draw.randrange(len(text))].encode()
    if kind == 2:
        place = draw.randrange(len(text))
        return (text[:place] + chr(draw.randrange(32, 127)) + text[place + 1 :]).encode()
    if kind == 3:
        return json.dumps(
            {**good, draw.choice([*good, "stop", "tools"]): draw.choice(odd)}
        ).encode()
    if kind == 4:
        message = {"role": "user", "content": "a", draw.choice(["role", "content", "name"]): 0}
        message[draw.choice(list(message))] = draw.choice(odd)
        return json.dumps({**good, "messages": [message]}).encode()
    depth = draw.randrange(1, 100_000)
    return b'{"messages":' + draw.choice([b"[", b'{"a":']) * depth


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_garbage_is_refused_and_breaks_nothing(server, count):
    draw = random.Random(count)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        statuses = [
            client.post("/v1/chat/completions", content=garbage(draw)).status_code
            for _ in range(count)
        ]
    assert set(statuses) <= {200, 400, 404, 413}
    assert statuses.count(400) > count / 2
    assert answer(server).choices[0].message.content is not None


def test_twenty_clients_at_once_get_the_answers_they_get_alone(server):
    questions = [[{"role": "user", "content": f"What is {n} plus 1?"}] for n in range(20)]

    def ask(question):
        return answer(server, messages=question, max_tokens=8).choices[0].message.content

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, questions)) == alone


def test_a_full_queue_refuses(chat_run, serve):
    body = {"model": "trained", "messages": ASK}
    with serve(chat_run, most_waiting=2) as server, ThreadPoolExecutor(8) as pool:
        begun, free = threading.Event(), threading.Event()

        def held(*_):
            begun.set()
            free.wait(60)

        hook = server.served.models["trained"].model.register_forward_pre_hook(held)
        replies = [pool.submit(post, server, body)]
        try:
            assert begun.wait(60)
            replies += [pool.submit(post, server, body) for _ in range(5)]
            wait_for(lambda: sum(reply.done() for reply in replies) == 3)
        finally:
            hook.remove()
            free.set()
        results = [reply.result() for reply in replies]
    assert sorted(reply.status_code for reply in results) == [200] * 3 + [429] * 3
    refused = next(reply for reply in results if reply.status_code == 429)
    assert refused.headers["Retry-After"] == "2"
    assert refused.json()["error"]["type"] == "rate_limit_error"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answers_end_with_the_server(chat_run, serve, caplog):
    """A client of a stream, and one that waits, are told. Nothing is left on the terminal."""
    body = {"model": "trained", "messages": ASK, "max_tokens": 60, "temperature": 2}
    with ThreadPoolExecutor(4) as pool:
        with serve(chat_run) as server:
            hook = server.served.models["trained"].model.register_forward_hook(slow_and_endless)
            replies = [pool.submit(post, server, body | {"stream": n % 2 == 0}) for n in range(4)]
            wait_for(lambda: server.worker.is_busy)
            time.sleep(0.5)
            began = time.monotonic()
        assert time.monotonic() - began < 3  # uvicorn would wait for 3 s, and break them then
        hook.remove()
        streamed, waited, *_ = [reply.result() for reply in replies]
    assert "the server was stopped" in streamed.text.split("data: ")[-1]
    assert waited.status_code == 503
    assert "the server was stopped" in waited.json()["error"]["message"]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_batch_that_fails_is_an_error_and_the_server_lives(server, monkeypatch, caplog):
    model = server.served.models["trained"].model
    hook = model.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(openai.InternalServerError, match="the answer failed"):
            answer(server)
        with pytest.raises(openai.APIError, match="the answer failed"):
            list(answer(server, stream=True))
    finally:
        hook.remove()
    assert "ZeroDivisionError" in caplog.text
    assert answer(server).choices


def test_a_translation_run_takes_sentences(translation_run, serve):
    with serve(translation_run) as server:
        about = httpx.get(f"{server.url}/api/about").json()
        assert about["directions"] == [["en", "fr"]]
        assert {example["language"] for example in about["examples"]} == {"fr"}
        assert len(about["examples"]) == 2
        sentence = about["examples"][0]["prompt"]
        command = finetune("translate", str(translation_run), sentence)
        body = {"model": "run", "messages": [{"role": "user", "content": sentence}]}
        reply = post(server, {**body, "translate": {}, "temperature": 0}).json()
        assert reply["choices"][0]["message"]["content"].strip() == command.out.strip()
        system = {"role": "system", "content": "Be brief."}
        own = finetune("translate", str(translation_run), sentence, "--system", "Be brief.")
        body["messages"] = [system, *body["messages"]]
        reply = post(server, {**body, "translate": {}, "temperature": 0}).json()
        assert reply["choices"][0]["message"]["content"].strip() == own.out.strip()
        scored = httpx.post(f"{server.url}/api/score", json={"output": "a b", "reference": "a b"})
        assert scored.json() == {"chrf": pytest.approx(100)}


SKIPS_OTHERS = (
    "{% for m in messages if m['role'] in ('user', 'assistant') %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_messages_that_the_template_skips_are_refused(server, monkeypatch, role):
    with_template(server, monkeypatch, SKIPS_OTHERS)
    messages = [{"role": role, "content": "Be brief."}, *ASK]
    reply = post(server, {"model": "trained", "messages": messages})
    assert reply.status_code == 400
    said = f"leaves out messages of the role {role}. Leave that out of the request"
    assert said in reply.json()["error"]["message"]
    assert post(server, {"model": "trained", "messages": ASK}).status_code == 200


def test_tools_that_may_not_be_called_are_left_out(server):
    body = {"model": "trained", "messages": ASK, "tools": [TOOL], "tool_choice": "none"}
    assert post(server, body).status_code == 200


NODE = shutil.which("node")


def page_sends(system, box, translate=None):
    """Return the messages of the page's request, for the run's system prompt and the box's."""
    page = (Path(app.__file__).parent / "page.html").read_text(encoding="utf-8")
    [method] = re.findall(r"^  sent\(body\) \{\n.*?^  \}\n", page, re.DOTALL | re.MULTILINE)
    script = (
        f"const about = {json.dumps({'system_prompt': system})};"
        f"const byId = () => ({json.dumps({'value': box})});"
        f"class Side {{ messages = {json.dumps(ASK)};\n{method} }}"
        f"console.log(JSON.stringify(new Side().sent({json.dumps({'translate': translate})})));"
    )
    done = subprocess.run([NODE, "-e", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
@pytest.mark.parametrize(
    ("system", "box", "translate", "roles"),
    [
        ("", "", None, ["user"]),
        ("", "Be kind.", None, ["system", "user"]),
        ("Be exact.", "Be exact.", None, ["user"]),
        ("Be exact.", "", None, ["system", "user"]),
        ("Be exact.\r\nBe kind.", "Be exact.\nBe kind.", None, ["user"]),
        ("Be exact.", "Be exact.", {}, ["user"]),
        ("Be exact.", "", {}, ["system", "user"]),
    ],
)
def test_the_page_sends_a_system_prompt_that_is_not_the_runs(system, box, translate, roles):
    assert [message["role"] for message in page_sends(system, box, translate)] == roles


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
def test_a_run_that_was_trained_with_an_empty_system_message_is_asked_with_one(server, monkeypatch):
    """Without a message this template writes a text of its own."""
    model = with_template(server, monkeypatch, stock.DEFAULT_SYSTEM, system_prompt="")
    ids = model.prompt(ChatRequest(model="trained", messages=page_sends("", "")))
    begins = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
    assert model.tokenizer.decode(ids).startswith(begins)


@pytest.mark.parametrize(
    ("prompt", "system", "question"),
    [
        ("Hi", None, "Hi"),
        ("system: Be exact.\n\nuser: Hi", "Be exact.", "Hi"),
        ("system: \n\nuser: Hi", "", "Hi"),
        ("user: Hi\n\nassistant: Yes\n\nuser: Why?", None, None),
    ],
)
def test_held_out_prompts_that_are_one_question_are_offered(prompt, system, question):
    assert _question(prompt, system) == question
