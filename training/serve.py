"""`tinyalign serve`: one model behind an OpenAI-style API, on the handlers of `transformers serve`."""

import asyncio
import json
import time
from collections.abc import Collection

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils.import_utils import is_serve_available

from ..modeling_tinyalign import TinyAlignForConditionalGeneration
from ..processing import TinyAlignProcessor
from .request_images import load_request_image

if not is_serve_available():
    raise ImportError(
        "`tinyalign serve` needs fastapi, uvicorn, pydantic and openai: pip install tinyalign-vlm[serve]"
    )

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

MAX_BODY_BYTES = 64 * 2**20
MAX_IMAGES = 16
HIGHEST = {"temperature": 2, "top_p": 1}
ROLES = ("system", "developer", "user", "assistant")
# Settings that the handler would pass on to transformers as they are, a template that is a program among them.
REFUSED_FIELDS = ("chat_template_kwargs", "generation_config", "tools")


class OneModel(ModelManager):
    """Holds the one model that is served. Unlike its base, it loads no other that a request names, and no code."""

    def __init__(self, name: str, model: PreTrainedModel, processor: ProcessorMixin):
        self.force_model, self.model, self.processor = name, model, processor

    def load_model_and_processor(self, *args, **kwargs) -> tuple[PreTrainedModel, ProcessorMixin]:
        return self.model, self.processor

    @staticmethod
    def get_model_modality(*args, **kwargs) -> Modality:
        return Modality.VLM


class ChatHandler(ChatCompletionHandler):
    """Chat completions of at most `max_tokens` tokens."""

    def __init__(self, model_manager: OneModel, max_tokens: int):
        super().__init__(model_manager, GenerationState())
        self.max_tokens = max_tokens

    def _build_generation_config(self, body: dict, *args, **kwargs):
        for name in ("temperature", "top_p"):
            if not 0 <= (body.get(name) or 0) <= HIGHEST[name]:
                raise ValueError(f"{name} is {body[name]}, expected 0 to {HIGHEST[name]}")
        config = super()._build_generation_config(body, *args, **kwargs)
        config.do_sample = bool(body.get("temperature", config.do_sample))
        config.max_new_tokens = min(config.max_new_tokens, self.max_tokens)
        config.validate()
        return config


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
    """
    Serves a model until it is stopped; the arguments are those of `tinyalign serve --help`.

    Raises:
        ValueError: The model has a memory, but no bank is named here or in its config.
    """
    loaded = load(model, revision, memory_bank, memory, device)
    uvicorn.run(build_app(model, *loaded, allow_image_host, max_tokens), host=host, port=port)


def load(
    name: str, revision: str, memory_bank: str | None, memory: str, device: str
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model with its bank, and its processor, by the classes of this package: no code of the checkpoint is run."""
    model = TinyAlignForConditionalGeneration.from_pretrained(name, revision=revision, dtype="auto", device_map=device)
    processor = TinyAlignProcessor.from_pretrained(name, revision=revision)
    generate, settings = model.generate, {"tokenizer": processor.tokenizer}  # the handler passes the processor for it
    if memory == "off":
        settings["memory"] = "off"
    elif model.config.memory_top_k > 0:
        if memory_bank is not None:
            model.attach_memory_bank(memory_bank)
        if model.memory_bank is None:
            raise ValueError(
                f"{name} retrieves {model.config.memory_top_k} neighbours an image, but its config names no memory "
                "bank: pass --memory_bank FOLDER_OR_REPOSITORY, or --memory off to answer without."
            )
    model.generate = lambda *args, **kwargs: generate(*args, **{**kwargs, **settings})
    return model, processor


def build_app(
    name: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    allowed_hosts: Collection[str] = (),
    max_tokens: int = 1024,
) -> FastAPI:
    """The server: chat completions with images, streamed or not, for this model alone."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    handler = ChatHandler(OneModel(name, model, processor), max_tokens)
    started = int(time.time())

    @app.exception_handler(HTTPException)
    async def in_the_words_of_openai(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": {"message": error.detail, "type": "invalid_request_error"}}, error.status_code)

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict:
        entry = {"id": name, "object": "model", "created": started, "owned_by": "tinyalign"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_body(request)
        try:
            # in a thread, for fetching and decoding take their time
            body["messages"] = await asyncio.to_thread(read_messages, body.get("messages"), allowed_hosts)
            return await handler.handle_request(body, f"chatcmpl-{time.time_ns():x}")
        except (ValueError, TypeError, KeyError) as error:
            raise HTTPException(400, str(error)) from error

    return app


async def read_body(request: Request) -> dict:
    """The request's JSON object; raises `HTTPException` if it is none, too large, or sets what it may not."""
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
    for field in REFUSED_FIELDS:
        if field in body:
            raise HTTPException(400, f"{field} is not supported: leave it out")
    if "max_completion_tokens" in body:  # transformers 5.17 reads the older name alone
        body["max_tokens"] = body.pop("max_completion_tokens")
    return body


def read_messages(messages: list, allowed_hosts: Collection[str]) -> list[dict]:
    """
    OpenAI's messages with the images in place of their URLs.

    Raises `ValueError`, naming the message, when it is malformed or an image is not to be had.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list with at least one message")
    checked, sizes = [], []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"messages[{number}]: found the role {role!r}, expected one of {', '.join(ROLES)}")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise ValueError(f"messages[{number}]: expected text or a list of parts as content")
        checked.append({"role": "system" if role == "developer" else role, "content": []})
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                checked[-1]["content"].append({"type": "text", "text": part["text"]})
            elif kind == "image_url" and isinstance(part.get("image_url"), dict):
                if len(sizes) == MAX_IMAGES:
                    raise ValueError(f"more than {MAX_IMAGES} images")
                try:
                    image = load_request_image(part["image_url"].get("url"), allowed_hosts)
                except ValueError as error:
                    raise ValueError(f"messages[{number}]: {error}") from error
                sizes.append(image.width * image.height)
                if sum(sizes) > (Image.MAX_IMAGE_PIXELS or sum(sizes)):
                    raise ValueError(f"the images have {sum(sizes)} pixels, expected {Image.MAX_IMAGE_PIXELS} in all")
                checked[-1]["content"].append({"type": "image_url", "image_url": {"url": image}})
            else:
                raise ValueError(
                    f"messages[{number}]: found a part of type {kind!r}, expected "
                    '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}'
                )
    return checked
