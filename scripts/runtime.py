"""llama.cpp itself, from the package xllamacpp: what a GGUF file does when it is run."""

import contextlib
import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Runtime:
    """A server of llama.cpp with one file."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._address = server.listening_address

    def _post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self._address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, with what the file says is put before it."""
        return self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._post("/detokenize", tokens=list(tokens))["content"])

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation, through the template in the file."""
        return self.tokens(self._post("/apply-template", messages=list(messages))["prompt"])

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[float | None]]:
        """Return the greedy answer to token ids, and the log-probability of each of its tokens.

        It is None for a token that is only a part of a character: the runtime keeps that back.
        """
        tokens, scores = list(prompt), []
        for _ in range(count):
            found = self._post(
                "/completion",
                prompt=tokens,
                n_predict=1,
                temperature=0.0,
                n_probs=1,
                cache_prompt=False,
                return_tokens=True,
            )
            if not found["tokens"]:
                break
            tokens += found["tokens"]
            known = found.get("completion_probabilities", [])
            scores.append(known[0]["logprob"] if known else None)
        return tokens[len(prompt) :], scores

    def speed(self, prompt: str, count: int) -> float:
        """Return the tokens a second of a greedy answer of `count` tokens."""
        found = self._post(
            "/completion", prompt=prompt, n_predict=count, temperature=0.0, ignore_eos=True
        )
        return float(found["timings"]["predicted_per_second"])

    def chat(self, text: str, count: int) -> str:
        """Return the answer to one question, through the template in the file."""
        found = self._post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": text}],
            max_tokens=count,
            temperature=0.0,
        )
        return str(found["choices"][0]["message"]["content"])

    def answer(self, prompt: Sequence[int], count: int) -> str:
        """Return the text of the greedy answer to token ids, up to the file's end of turn."""
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0.0}
        return str(self._post("/completion", **body)["content"])


@contextlib.contextmanager
def running(path: Path, *, context: int = 256, threads: int = 1) -> Iterator[Runtime]:
    """Yield llama.cpp with a file loaded. Raises ImportError without xllamacpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = context, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = -1
    params.port = 0
    yield Runtime(xllamacpp.Server(params))
