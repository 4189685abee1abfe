"""What a client may ask, and the shapes of replies: OpenAI's chat completions.

The shapes are those of https://platform.openai.com/docs/api-reference/chat. What a request says and
this server cannot do is refused, not left out.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune.errors import UserError

Shape = TypeVar("Shape", bound=BaseModel)
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
StopText = Annotated[str, Field(min_length=1)]


class _Asked(BaseModel):
    """What a client asks. A null asks for nothing, whatever its name; any other name is refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Direction(_Asked):
    """The languages of a translation; those of the run if they are not given."""

    source: str | None = Field(default=None, alias="from", max_length=100)
    target: str | None = Field(default=None, alias="to", max_length=100)


class StreamOptions(_Asked):
    """What a stream has besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # has no effect here


class ChatRequest(_Asked):
    """The body of POST /v1/chat/completions.

    `top_k`, `repetition_penalty` and `translate` are this server's own. With `translate` the last
    message is a sentence, which is asked for as in the training of a translation run.
    """

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    translate: Direction | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    # only these values can be served
    parallel_tool_calls: Literal[True] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    # about the sender, without an effect on the answer
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None

    def stops(self) -> list[str]:
        """Return the texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def drawing(self) -> dict[str, Any]:
        """Return the generation settings that are given, by name. Raises UserError."""
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise UserError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens is "
                f"{self.max_completion_tokens}, and both mean the same. Give one of them"
            )
        given = {
            "max_new_tokens": next(iter(lengths), None),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}


class ScoreRequest(_Asked):
    """The body of POST /api/score."""

    output: str
    reference: str


def read_request(shape: type[Shape], body: bytes) -> Shape:
    """Return the request in a body. Raises UserError with the first mistake."""
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        raise UserError(_first_mistake(error)) from error


def _first_mistake(error: ValidationError) -> str:
    """Return the first mistake in words.

    Of the ways to give one parameter, such as text or a list, the one that was taken is meant.
    """
    found = error.errors(include_url=False, include_context=False)
    name = found[0]["loc"][:1]
    same = [each for each in found if each["loc"][:1] == name]
    first = next((each for each in same if not each["type"].endswith("_type")), same[0])
    where = ".".join(map(str, name if len(same) > 1 else first["loc"][:3]))
    problem = first["msg"][:200].lower()
    if first["type"] == "extra_forbidden":
        problem = "is not a parameter of this server"
    if name == ("response_format",):
        where, problem = name[0], 'only {"type": "text"} can be served. Leave it out'
    elif first["type"] == "literal_error":
        problem += f", not {json.dumps(first['input']):.80}"
    return f"{where or 'the body'}: {problem}"


def new_id() -> str:
    """Return the id of a completion."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def error_body(
    message: str, *, type: str = "invalid_request_error", code: str | None = None
) -> dict[str, Any]:
    """Return the body of a refusal."""
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def model_entry(name: str) -> dict[str, Any]:
    """Return what is said of a model that is served."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "finetune"}


def usage_of(num_prompt_tokens: int, num_answer_tokens: int) -> dict[str, int]:
    """Return the counts of tokens of one completion."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
    }


def completion(
    id: str, model: str, message: Mapping[str, Any], ending: str, usage: Mapping[str, int]
) -> dict[str, Any]:
    """Return the reply to a request that is not streamed."""
    choice = {"index": 0, "message": message, "finish_reason": ending, "logprobs": None}
    return _reply(id, "chat.completion", model) | {"choices": [choice], "usage": usage}


def chunk(
    id: str, model: str, delta: Mapping[str, Any], ending: str | None = None
) -> dict[str, Any]:
    """Return one part of a stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": ending, "logprobs": None}
    return _reply(id, "chat.completion.chunk", model) | {"choices": [choice]}


def usage_chunk(id: str, model: str, usage: Mapping[str, int]) -> dict[str, Any]:
    """Return the last part of a stream that was asked for its usage."""
    return _reply(id, "chat.completion.chunk", model) | {"choices": [], "usage": usage}


def _reply(id: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def event(body: Mapping[str, Any]) -> str:
    """Return a part of a stream as a server-sent event."""
    # ASCII, because some readers take U+2028 and U+0085 for line breaks, and a break ends the data.
    return f"data: {json.dumps(body)}\n\n"


def message_of(text: str, calls: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Return the message of an answer: its text, and the calls of tools that it makes, if any.

    With calls, `text` is what is said beside them.
    """
    if not calls:
        return {"role": "assistant", "content": text}
    made = [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": call["name"],
                "arguments": json.dumps(call["arguments"], ensure_ascii=False),
            },
        }
        for call in calls
    ]
    return {"role": "assistant", "content": text or None, "tool_calls": made}
