"""`finetune serve` under load: tokens per second, and seconds until the first token.

    python scripts/bench_serve.py TARGET [--clients 1,4,16] [--requests 32] [--max-tokens 64]

TARGET is a run or a model. The server is a process of its own, on a free port of the loopback. Each
client asks for one streamed answer after the other, all of `--max-tokens` tokens at most. The first
answer of a client count is not measured. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import httpx

QUESTION = "Question {number}: tell me about the number {number}, and what it is good for."


@dataclass(frozen=True)
class Answer:
    """One streamed answer. Times are those of time.monotonic()."""

    began: float
    first: float  # of the first text
    ended: float
    tokens: int


async def ask(client: httpx.AsyncClient, model: str, number: int, max_tokens: int) -> Answer:
    """Return what one answer took. Raises httpx.HTTPError if it is refused."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION.format(number=number)}],
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, tokens = time.monotonic(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line.removeprefix("data: "))
            assert "error" not in part, part
            if part["choices"] and part["choices"][0]["delta"].get("content"):
                first = first or time.monotonic()
            tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
    ended = time.monotonic()
    return Answer(began, first or ended, ended, tokens)


async def measure(url: str, clients: int, requests: int, max_tokens: int) -> dict[str, float]:
    """Return the figures of `requests` answers, asked for by `clients` at once."""
    numbers = iter(range(requests))
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await ask(client, model, 0, 4)

        async def work() -> list[Answer]:
            return [await ask(client, model, number, max_tokens) for number in numbers]

        began = time.monotonic()
        answers = [one for found in await asyncio.gather(*(work() for _ in range(clients)))
                   for one in found]  # fmt: skip
        seconds = time.monotonic() - began
    waits = sorted(answer.first - answer.began for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    return {
        "clients": clients,
        "answers": len(answers),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "first_token_median": round(statistics.median(waits), 3),
        "first_token_p95": round(waits[max(0, -(-95 * len(waits) // 100) - 1)], 3),
    }


def started(target: str) -> tuple[subprocess.Popen[str], str]:
    """Return the process of a server and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "serve", target, "--port", "0", "--no-base"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise SystemExit(said)


def main() -> None:
    """Print a table, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--clients", default="1,4,16", help="how many at once, separated by commas")
    parser.add_argument("--requests", type=int, default=32, help="answers of each client count")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    process, url = started(args.target)
    try:
        found = [
            asyncio.run(measure(url, clients, args.requests, args.max_tokens))
            for clients in map(int, args.clients.split(","))
        ]
    finally:
        process.terminate()
        process.wait()
    print(f"{'clients':>7}  {'tokens/s':>8}  {'first token, s: median':>22}  {'95 %':>6}")
    for row in found:
        print(
            f"{row['clients']:7}  {row['tokens_per_second']:8.1f}  "
            f"{row['first_token_median']:22.2f}  {row['first_token_p95']:6.2f}"
        )
    print(json.dumps({"target": args.target, "cpus": os.cpu_count(), "rows": found}))


if __name__ == "__main__":
    main()
