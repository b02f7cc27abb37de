"""`tinyalign serve`: one model behind an API like OpenAI's."""

import asyncio
import copy
import json
import math
import time
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

from jinja2 import TemplateError
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils.import_utils import is_serve_available

from ..models import load_to_answer
from .answers import PROMPT, SAFE_HOSTS, Answer, ContextError
from .pictures import Pictures
from .request_images import load_request_image

if not is_serve_available():
    raise ImportError(
        "`tinyalign serve` needs fastapi, uvicorn, pydantic and openai: pip install tinyalign-vlm[serve]"
    )

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

MAX_BODY_BYTES = 64 * 2**20
MAX_IMAGES = 16
LEAST_TEMPERATURE = 1e-5  # below it the likeliest tokens are taken: probabilities would overflow
NonEmpty = Annotated[str, Field(min_length=1)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: dict


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class ChatRequest(BaseModel):
    """The body of a request: fields of OpenAI's, and two of ours. Other ones are refused, not passed over."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """Leave out what is null: clients write all that they know of so, and ask for nothing."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    seed: int | None = Field(None, gt=-(2**63), lt=2**63)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: dict | None = None
    memory: Literal["on", "off"] | None = None
    sources: bool | None = None
    # They say nothing about the answer.
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # They are not supported, and may only ask for nothing.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    store: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict | None = Field(None, max_length=0)
    tools: list | None = Field(None, max_length=0)
    tool_choice: Literal["none"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None


def serve(
    model: str,
    revision: str = "main",
    memory_bank: str | None = None,
    memory: str = "on",
    allow_image_host: Collection[str] = (),
    max_tokens: int = 1024,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
):
    """Serve a model until it is stopped; the arguments are those of `tinyalign serve --help`. ValueError if the model
    has a memory, but no bank is named here or in its config.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more.")
    loaded = load_to_answer(model, revision, memory_bank, memory, device)
    app = build_app(model, *loaded, memory, allow_image_host, max_tokens)
    if host in SAFE_HOSTS:  # else a page whose name leads here could read the bank
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=SAFE_HOSTS)
    uvicorn.run(app, host=host, port=port)


def build_app(
    name: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    memory: str = "on",
    allowed_hosts: Collection[str] = (),
    max_tokens: int = 1024,
) -> FastAPI:
    """Return the server: chat completions with images, streamed or not, for this model alone."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    pictures, watches = Pictures(model), set()
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tinyalign"}

    @app.exception_handler(AnyHTTPException)
    async def in_the_words_of_openai(request: Request, error: AnyHTTPException) -> JSONResponse:
        return error_response(str(error.detail), error.status_code)

    def read_request(body: ChatRequest) -> Answer:
        if memory == "off" and body.memory == "on":
            raise ValueError("memory is 'on', but this server answers without: leave it out")
        config = sampling_settings(body, model, max_tokens)
        inputs = processor.apply_chat_template(read_chat(body.messages, allowed_hosts), **PROMPT).to(model.device)
        inputs = {**inputs, "memory": body.memory or memory, "sources": []}
        return Answer(model, processor, inputs, config, pictures.looked_up, body.seed)

    # async: the threads may all be waiting for the model
    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_body(request)
        if body.model not in (None, name):
            return error_response(f"model is {body.model!r}, expected {name!r}", 404, "model_not_found")
        try:
            answer = await asyncio.to_thread(read_request, body)  # fetching and decoding take their time
            watch = asyncio.create_task(stop_if_left(answer, request))
            watches.add(watch)  # or Python may forget it
            watch.add_done_callback(watches.discard)
            if body.stream:
                return StreamingResponse(events(answer, body, name), media_type="text/event-stream")
            return JSONResponse(await asyncio.to_thread(completion, answer, body, name))
        except ContextError as error:
            return error_response(str(error), 400, "context_length_exceeded")
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            raise HTTPException(400, str(error)) from error
        except (RuntimeError, MemoryError) as error:  # torch's
            return error_response(f"{type(error).__name__}: {error}", 500)

    return app


async def stop_if_left(answer: Answer, request: Request):
    """End an answer when its client leaves: nobody reads it, and others wait."""
    while not answer.stopped.is_set():
        if await request.is_disconnected():
            answer.stopped.set()
        await asyncio.sleep(0.1)


def error_response(message: str, status: int, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status)


def neighbours_read(answer: Answer) -> list[dict]:
    """Return the neighbours that an answer has read; none if it was given up before it began."""
    return next(iter(answer.inputs["sources"]), [])


def completion(answer: Answer, body: ChatRequest, name: str) -> dict:
    """Return a whole answer as OpenAI's `chat.completion`."""
    message = {"role": "assistant", "content": "".join(answer.pieces())}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    found = {**_envelope("chat.completion", name), "choices": [choice], "usage": answer.usage}
    return found | ({"sources": neighbours_read(answer)} if body.sources else {})


def events(answer: Answer, body: ChatRequest, name: str) -> Iterator[str]:
    """Yield an answer as the server-sent events of OpenAI's `chat.completion.chunk`."""
    envelope = _envelope("chat.completion.chunk", name)

    def event(delta: dict, finish_reason: str | None = None, **more) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        return f"data: {json.dumps({**envelope, 'choices': choices, **more})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        for piece in answer.pieces():
            yield event({"content": piece})
        sources = {"sources": neighbours_read(answer)} if body.sources else {}
        yield event({}, answer.finish_reason, **sources)
        if (body.stream_options or {}).get("include_usage"):
            yield event({}, choices=[], usage=answer.usage)
    except Exception as error:  # the status was sent long ago
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
    yield "data: [DONE]\n\n"


def _envelope(kind: str, name: str) -> dict:
    return {"id": f"chatcmpl-{time.time_ns():x}", "object": kind, "created": int(time.time()), "model": name}


async def read_body(request: Request) -> ChatRequest:
    """Return a request's body; `HTTPException` if it is too large, or names the field that is wrong."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "expected content-type: application/json")  # a web page can't send it unasked
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request has more than {MAX_BODY_BYTES} bytes")
    try:
        return ChatRequest.model_validate_json(data)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[-1]  # of a union its last kind
    name = ".".join(str(step) for step in wrong["loc"] if "[" not in str(step)) or "the request"
    if wrong["type"] == "extra_forbidden":
        raise HTTPException(400, f"{name:.100} is not supported: leave it out")
    raise HTTPException(400, f"{name} is {wrong['input']!r:.100}: {wrong['msg']}")


def sampling_settings(body: ChatRequest, model: PreTrainedModel, max_tokens: int) -> GenerationConfig:
    """Return how to generate: what the model's generation_config.json says, changed by a request."""
    config = copy.deepcopy(model.generation_config)
    if body.temperature is not None:
        config.do_sample = body.temperature >= LEAST_TEMPERATURE
        config.temperature = body.temperature if config.do_sample else None
    if body.top_p is not None:
        config.top_p = body.top_p
        # 1 asks for nothing
        config.do_sample = config.do_sample or (body.temperature is None and body.top_p < 1)
    config.stop_strings = [body.stop] if isinstance(body.stop, str) else body.stop
    wanted = body.max_completion_tokens or body.max_tokens or max_tokens
    config.max_new_tokens = min(wanted, max_tokens)
    config.validate()
    return config


def read_chat(messages: list[Message], allowed_hosts: Collection[str]) -> list[dict]:
    """Return messages as a chat template takes them, with images in place of their URLs; `ValueError` if one cannot be
    had, or they are too many.
    """
    chat, images = [], []
    for number, message in enumerate(messages):
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        content = []
        for part in parts:
            if isinstance(part, TextPart):
                content.append(part.model_dump())
                continue
            try:
                images.append(load_request_image(part.image_url.get("url"), allowed_hosts))
            except ValueError as error:
                raise ValueError(f"messages.{number}: {error}") from error
            content.append({"type": "image", "image": images[-1]})
            pixels, most = sum(math.prod(image.size) for image in images), Image.MAX_IMAGE_PIXELS or math.inf
            if len(images) > MAX_IMAGES or pixels > most:
                raise ValueError(
                    f"{len(images)} images have {pixels} pixels, expected at most {MAX_IMAGES} of {most} in all: send "
                    "fewer, or smaller ones"
                )
        chat.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return chat
