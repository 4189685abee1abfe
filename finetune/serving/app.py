"""The web server: OpenAI's interface, the page, and what the page asks besides."""

import asyncio
import base64
import hashlib
import re
import socket
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.errors import UserError
from finetune.evaluation.answers import text_metrics
from finetune.serving import protocol
from finetune.serving.protocol import ChatRequest, ScoreRequest, Shape
from finetune.serving.served import Served, ServedModel
from finetune.serving.worker import Job, Piece, QueueFull, Worker

MOST_BYTES = 1_000_000  # of a body
_GONE = 499  # the status of an answer that nobody reads any more
_READING = ["GET", "HEAD"]
_PAGE = Path(__file__).parent / "page.html"


def make_app(served: Served, worker: Worker, *, hosts: Collection[str] | None) -> FastAPI:
    """Return the server of `served`, whose answers `worker` draws.

    Only requests to one of `hosts` are answered (None: to any), and no page of another site may
    ask: a browser would let any site talk to a server of its own machine.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(_Guard, hosts=hosts)

    @app.exception_handler(404)
    async def not_found(request: Request, _: Exception) -> Response:
        return _refusal(404, f"there is nothing at {request.url.path!r:.200}", code="not_found")

    @app.exception_handler(405)
    async def not_allowed(request: Request, error: Exception) -> Response:
        allowed = dict(getattr(error, "headers", None) or {})
        sentence = f"{request.method:.20} is not allowed at {request.url.path!r:.200}"
        reply = _refusal(405, f"{sentence}. Use {allowed.get('Allow', 'another method')}")
        reply.headers.update(allowed)
        return reply

    @app.exception_handler(500)
    async def failed(_: Request, __: Exception) -> Response:
        return _refusal(500, _FAILED, type="server_error")

    app.include_router(_interface(served, worker))
    app.include_router(_page(served))
    return app


def make_server(app: FastAPI, worker: Worker) -> "Server":
    """Return the server of `app`. When it ends, so do the answers that are being drawn."""
    return Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, lifespan="off"
        ),
        worker,
    )


class Server(uvicorn.Server):
    """uvicorn's server, which would wait for streams to end by themselves, and then break them."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all answers, then the server."""
        self._worker.stop()
        await super().shutdown(sockets)


class _Guard:
    """Refuses requests that are not for this server, or that a page of another site sends."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        refusal = None
        if self._hosts is not None and _split(f"//{host}")[0] not in self._hosts:
            refusal = _refusal(403, f"this server is not {host!r:.100}")
        elif origin is not None and _split(origin)[1] != host:
            refusal = _refusal(403, f"a page of {origin!r:.100} may not ask this server")

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await (refusal or self._app)(scope, receive, send_marked)


def _split(address: str) -> tuple[str | None, str | None]:
    """Return the host name and the host with its port of an address; None if it is none."""
    try:
        parts = urlsplit(address)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, None


def _interface(served: Served, worker: Worker) -> APIRouter:
    """Return OpenAI's interface."""
    routes = APIRouter()

    @routes.api_route("/v1/models", methods=_READING)
    async def models() -> Response:
        data = [protocol.model_entry(name) for name in served.models]
        return JSONResponse({"object": "list", "data": data})

    @routes.api_route("/v1/models/{name:path}", methods=_READING)
    async def model(name: str) -> Response:
        found = name in served.models
        return JSONResponse(protocol.model_entry(name)) if found else _no_model(served, name)

    @routes.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await _read(request, ChatRequest)
        if isinstance(asked, Response):
            return asked
        if asked.model not in served.models:
            return _no_model(served, asked.model)
        try:
            answer = _Answering(asked, served.models[asked.model])
            if answer.prompt:
                worker.submit(asked.model, answer.job)
            else:  # an empty sentence has an empty translation
                answer.job.emit(Piece("", 0, "stop"))
        except UserError as error:
            return _refusal(400, str(error))
        except QueueFull:
            sentence = "too many requests wait. Ask again in a few seconds"
            reply = _refusal(429, sentence, type="rate_limit_error", code="queue_full")
            reply.headers["Retry-After"] = "2"
            return reply
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return await answer.whole(request)

    return routes


def _page(served: Served) -> APIRouter:
    """Return the page, and what it asks besides answers."""
    routes = APIRouter()
    page = _PAGE.read_text(encoding="utf-8")
    policy = _policy(page)

    @routes.api_route("/", methods=_READING)
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @routes.api_route("/report", methods=_READING)
    async def show_report() -> Response:
        if served.report is None or not served.report.is_file():
            return _refusal(404, "there is no report", code="not_found")
        return FileResponse(served.report, media_type="text/html")

    @routes.api_route("/api/about", methods=_READING)
    async def about() -> Response:
        return JSONResponse(dict(served.about) | {"models": list(served.models)})

    @routes.post("/api/score")
    async def score(request: Request) -> Response:
        asked = await _read(request, ScoreRequest)
        if isinstance(asked, Response):
            return asked
        scores = text_metrics(["chrf"], [asked.output], [asked.reference])
        return JSONResponse({"chrf": scores["chrf"]})

    return routes


class _Answering:
    """One request while it is answered. Must be made in the server's event loop."""

    def __init__(self, asked: ChatRequest, model: ServedModel) -> None:
        self.asked, self.model, self.id = asked, model, protocol.new_id()
        self.prompt = model.prompt(asked)
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        settings = model.drawing(asked)
        self.job = Job(self.prompt, settings, self._emit, asked.stops())

    def _emit(self, piece: Piece) -> None:
        """Pass a piece from the worker's thread to the event loop."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the server was stopped
            self.job.cancel()

    @property
    def _may_call(self) -> bool:
        return bool(self.asked.tools) and self.asked.tool_choice != "none"

    async def whole(self, request: Request) -> Response:
        """Return the whole answer, unless the client goes away before."""
        texts: list[str] = []
        piece: Piece | None = None
        looked = self._loop.time()
        try:
            while piece is None or piece.ending is None:
                try:
                    piece = await asyncio.wait_for(self._pieces.get(), timeout=1.0)
                    texts.append(piece.text)
                except TimeoutError:
                    pass
                if self._loop.time() - looked >= 1.0:
                    looked = self._loop.time()
                    if await request.is_disconnected():
                        return Response(status_code=_GONE)
        finally:
            self.job.cancel()
        if piece.ending in _BROKEN:
            status = 503 if piece.ending == "closed" else 500
            return _refusal(status, _BROKEN[piece.ending], type="server_error")
        message, ending = self._message("".join(texts), piece)
        usage = protocol.usage_of(len(self.prompt), piece.num_tokens)
        name = self.asked.model
        return JSONResponse(protocol.completion(self.id, name, message, ending, usage))

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events; the job ends if nobody reads them any more."""
        id, name = self.id, self.asked.model
        held: list[str] = []  # all text, if it may turn out to be a call
        try:
            yield protocol.event(protocol.chunk(id, name, {"role": "assistant", "content": ""}))
            while True:
                piece = await self._pieces.get()
                if self._may_call:
                    held.append(piece.text)
                elif piece.text:
                    yield protocol.event(protocol.chunk(id, name, {"content": piece.text}))
                if piece.ending is not None:
                    break
            if piece.ending in _BROKEN:
                body = protocol.error_body(_BROKEN[piece.ending], type="server_error")
                yield protocol.event(body)
                return
            message, ending = self._message("".join(held), piece)
            if self._may_call:
                calls = message.get("tool_calls", ())
                if message["content"]:
                    said = {"content": message["content"]}
                    yield protocol.event(protocol.chunk(id, name, said))
                if calls:
                    made = {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}
                    yield protocol.event(protocol.chunk(id, name, made))
            yield protocol.event(protocol.chunk(id, name, {}, ending))
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                usage = protocol.usage_of(len(self.prompt), piece.num_tokens)
                yield protocol.event(protocol.usage_chunk(id, name, usage))
            yield "data: [DONE]\n\n"
        finally:
            self.job.cancel()

    def _message(self, text: str, last: Piece) -> tuple[dict[str, Any], str]:
        """Return the message of the whole answer, and why it ended in OpenAI's words."""
        calls = self.model.calls(self.prompt, last.ids) if self._may_call else None
        if not calls:
            return protocol.message_of(text, None), str(last.ending)
        said = self.model.text_beside_calls(self.prompt, last.ids, len(text))
        ending = "tool_calls" if last.ending == "stop" else str(last.ending)
        return protocol.message_of(said, calls), ending


_FAILED = "the answer failed; the server's terminal says why"
_BROKEN = {"error": _FAILED, "closed": "the server was stopped before the answer was whole"}


async def _read(request: Request, shape: type[Shape]) -> Shape | Response:
    """Return what is asked, or the refusal of a body that is too large or wrong."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return _refusal(413, f"the body has more than {MOST_BYTES:,} bytes. Send less")
    except ClientDisconnect:
        return Response(status_code=_GONE)
    try:
        return protocol.read_request(shape, bytes(body))
    except UserError as error:
        return _refusal(400, str(error))


def _refusal(
    status: int, message: str, *, type: str = "invalid_request_error", code: str | None = None
) -> JSONResponse:
    return JSONResponse(protocol.error_body(message, type=type, code=code), status_code=status)


def _no_model(served: Served, name: str) -> JSONResponse:
    sentence = f"there is no model {name!r:.100}; known are {', '.join(served.models)}"
    return _refusal(404, sentence, code="model_not_found")


def _policy(page: str) -> str:
    """Return the content security policy of the page: its own script and style, and this server."""
    own = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {own['script']}; style-src {own['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
