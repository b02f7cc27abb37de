"""`tinyalign serve`: one model behind an API like OpenAI's."""

import asyncio
import copy
import json
import time
from collections.abc import Collection, Iterator
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils.import_utils import is_serve_available

from ..models import load_to_answer
from .answers import PROMPT, SAFE_HOSTS, Answer, ContextError, answer_room
from .pictures import Pictures
from .request_images import load_request_image

if not is_serve_available():
    raise ImportError(
        "`tinyalign serve` needs fastapi, uvicorn, pydantic and openai: pip install tinyalign-vlm[serve]"
    )

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

MAX_BODY_BYTES = 64 * 2**20
MAX_IMAGES = 16
MAX_STOPS = 4
LEAST_TEMPERATURE = 1e-5  # below it the likeliest tokens are taken: probabilities would overflow
ROLES = ("system", "developer", "user", "assistant")
# Fields of OpenAI's that are not supported, and the values that ask for nothing.
UNSUPPORTED = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "presence_penalty": 0, "store": False}
UNSUPPORTED |= {"frequency_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "none", "modalities": ["text"]}


def is_number(value: Any, low: float, high: float) -> bool:
    """Return True for a JSON number in these bounds; Python's `True` is a number, too, and JSON's is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def are_stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    is_short = isinstance(texts, list) and len(texts) <= MAX_STOPS
    return is_short and all(isinstance(text, str) and text for text in texts)


# Values that a field of a request may have, beside null.
EXPECTED = {
    "temperature": (lambda value: is_number(value, 0, 2), "0 to 2"),
    "top_p": (lambda value: is_number(value, 0, 1), "0 to 1"),
    "max_tokens": (is_count, "a whole number from 1 on"),
    "max_completion_tokens": (is_count, "a whole number from 1 on"),
    "seed": (lambda value: type(value) is int and abs(value) < 2**63, "a whole number of 64 bits"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "stream_options": (lambda value: isinstance(value, dict), "an object"),
    "stop": (are_stops, f"a text or a list of up to {MAX_STOPS} texts"),
    "memory": (lambda value: value in ("on", "off"), "'on' or 'off'"),
    "sources": (lambda value: isinstance(value, bool), "true or false"),
}
# Fields of a request that are read, or that say nothing about the answer.
FIELDS = {*EXPECTED, "model", "messages", "user", "metadata", "safety_identifier", "prompt_cache_key"}


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
    if host in (*SAFE_HOSTS, "::1"):  # else a page whose name leads here could read the bank
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
    pictures = Pictures(model)
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tinyalign"}

    @app.exception_handler(AnyHTTPException)
    async def in_the_words_of_openai(request: Request, error: AnyHTTPException) -> JSONResponse:
        return error_response(str(error.detail), error.status_code)

    # async: the threads may all be waiting for the model
    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_json_body(request)
        if body.get("model") not in (None, name):
            return error_response(f"model is {body['model']!r}, expected {name!r}", 404, "model_not_found")
        try:
            # in a thread, for fetching and decoding take their time
            settings = pictures, memory, allowed_hosts, max_tokens
            answer = await asyncio.to_thread(read_request, body, model, processor, *settings)
            if body.get("stream"):
                return Events(answer, events(answer, body, name))
            work = asyncio.ensure_future(asyncio.to_thread(completion, answer, body, name))
            while not (await asyncio.wait([work], timeout=0.5))[0]:
                if await request.is_disconnected():
                    answer.stopped.set()  # nobody reads it, and others wait
                    await asyncio.wait([work])
                    return Response(status_code=499)
            return JSONResponse(await work)
        except ContextError as error:
            return error_response(str(error), 400, "context_length_exceeded")
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            raise HTTPException(400, str(error)) from error
        except (RuntimeError, MemoryError) as error:  # torch's
            return error_response(f"{type(error).__name__}: {error}", 500)

    return app


class Events(StreamingResponse):
    """An answer as server-sent events, which ends when its client leaves: nobody reads it, and others wait."""

    def __init__(self, answer: Answer, content: Iterator[str]):
        super().__init__(content, media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.stopped.set()

    async def listen_for_disconnect(self, receive: Receive) -> None:
        await super().listen_for_disconnect(receive)
        self.answer.stopped.set()  # before the thread has its turn, in which it would begin


def error_response(message: str, status: int, code: str | None = None) -> JSONResponse:
    message = message.encode(errors="replace").decode()  # it may quote half a character
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status)


def completion(answer: Answer, body: dict, name: str) -> dict:
    """Return a whole answer as OpenAI's `chat.completion`."""
    message = {"role": "assistant", "content": "".join(answer.pieces())}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    found = {**_envelope("chat.completion", name), "choices": [choice], "usage": answer.usage}
    return found | ({"sources": answer.inputs["sources"][0]} if body.get("sources") else {})


def events(answer: Answer, body: dict, name: str) -> Iterator[str]:
    """Yield an answer as the server-sent events of OpenAI's `chat.completion.chunk`."""
    envelope = _envelope("chat.completion.chunk", name)

    def event(delta: dict, finish_reason: str | None = None, **more) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        return f"data: {json.dumps({**envelope, 'choices': choices, **more})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        for piece in answer.pieces():
            yield event({"content": piece})
        sources = {"sources": answer.inputs["sources"][0]} if body.get("sources") else {}
        yield event({}, answer.finish_reason, **sources)
        if (body.get("stream_options") or {}).get("include_usage"):
            yield event({}, choices=[], usage=answer.usage)
    except Exception as error:  # the status was sent long ago
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
    yield "data: [DONE]\n\n"


def _envelope(kind: str, name: str) -> dict:
    return {"id": f"chatcmpl-{time.time_ns():x}", "object": kind, "created": int(time.time()), "model": name}


def read_request(
    body: dict,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Pictures,
    memory: str,
    allowed_hosts: Collection[str],
    max_tokens: int,
) -> Answer:
    """Return the answer that a request asks for; `ValueError` names the field that is wrong."""
    for name, (fits, expected) in EXPECTED.items():
        if body.get(name) is not None and not fits(body[name]):
            raise ValueError(f"{name} is {body[name]!r:.100}, expected {expected}")
    if memory == "off" and body.get("memory") == "on":
        raise ValueError("memory is 'on', but this server answers without: leave it out")
    memory = body.get("memory") or memory
    config = sampling_settings(body, model, max_tokens)
    messages = read_messages(body.get("messages"), allowed_hosts)
    inputs = processor.apply_chat_template(messages, **PROMPT).to(model.device)
    config.max_new_tokens = answer_room(model, inputs["input_ids"].shape[1], config.max_new_tokens)
    inputs = {**inputs, "memory": memory, "sources": []}
    return Answer(model, processor, inputs, config, pictures.looked_up, body.get("seed"))


def sampling_settings(body: dict, model: PreTrainedModel, max_tokens: int) -> GenerationConfig:
    """Return how to generate: what the model's generation_config.json says, changed by a request."""
    config = copy.deepcopy(model.generation_config)
    temperature = body.get("temperature")
    if temperature is not None:
        config.do_sample = temperature >= LEAST_TEMPERATURE
        config.temperature = float(temperature) if config.do_sample else None
    if body.get("top_p") is not None:
        config.top_p = float(body["top_p"])
        config.do_sample = config.do_sample or (temperature is None and body["top_p"] < 1)  # 1 asks for nothing
    stops = body.get("stop") or None
    config.stop_strings = [stops] if isinstance(stops, str) else stops
    wanted = body.get("max_completion_tokens") or body.get("max_tokens") or max_tokens
    config.max_new_tokens = min(wanted, max_tokens)
    config.validate()
    return config


async def read_json_body(request: Request) -> dict:
    """Return a request's JSON object; `HTTPException` if it is none, too large, or has an unsupported field."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "expected content-type: application/json")  # a web page can't send it unasked
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request has more than {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise HTTPException(400, f"the request is a {type(body).__name__}, expected an object")
    for name, value in body.items():
        nothing = value is None or (name in UNSUPPORTED and value == UNSUPPORTED[name])
        if name not in FIELDS and not nothing:
            raise HTTPException(400, f"{name[:100]} is not supported: leave it out")
    return body


def read_messages(messages: list, allowed_hosts: Collection[str]) -> list[dict]:
    """Return OpenAI's messages with the images in place of their URLs; ValueError, naming the message, if one is
    malformed, or an image cannot be had.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list with at least one message")
    checked, images = [], []
    for number, message in enumerate(messages):
        try:
            role = message.get("role") if isinstance(message, dict) else None
            if role not in ROLES:
                raise ValueError(f"found the role {role!r}, expected one of {', '.join(ROLES)}")
            parts = message.get("content")
            if isinstance(parts, str):
                parts = [{"type": "text", "text": parts}]
            if not isinstance(parts, list):
                raise ValueError("expected text or a list of parts as content")
            content = [read_part(part, images, allowed_hosts) for part in parts]
        except ValueError as error:
            raise ValueError(f"messages[{number}]: {error}") from error
        checked.append({"role": "system" if role == "developer" else role, "content": content})
    return checked


def read_part(part: Any, images: list[Image.Image], allowed_hosts: Collection[str]) -> dict:
    """Return a part with its image, which joins those of the request: they have a limit together."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        part["text"].encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
        return {"type": "text", "text": part["text"]}
    if kind != "image_url" or not isinstance(part.get("image_url"), dict):
        raise ValueError(
            f"found a part of type {kind!r}, expected "
            '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}'
        )
    if len(images) == MAX_IMAGES:
        raise ValueError(f"more than {MAX_IMAGES} images")
    images.append(load_request_image(part["image_url"].get("url"), allowed_hosts))
    pixels, most = sum(image.width * image.height for image in images), Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:
        raise ValueError(f"the images have {pixels} pixels, expected {most} in all: send fewer, or smaller ones")
    return {"type": "image", "image": images[-1]}
