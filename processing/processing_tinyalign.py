"""TinyAlign processor: text and images to model inputs."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import BatchFeature, GenerationConfig, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils import is_numpy_array, is_torch_tensor

from .images import check_output, check_sizes, decode_image, load_image, padding_to_square

MAX_IMAGE_TOKENS = 2**20
# What broken settings make transformers raise, beside ValueError and OSError.
BROKEN = (
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
)

# What a pipeline passes to the processor, because it does not know it, and `generate` takes.
RETRIEVAL_SETTINGS = {"memory", "exclude_ids", "memory_top_k", "retrieval_threshold"}
GENERATION_SETTINGS = vars(GenerationConfig()).keys() - {"max_length", "return_dict_in_generate"}
CALL_SETTINGS = RETRIEVAL_SETTINGS | GENERATION_SETTINGS | {"generation_config", "logits_processor", "streamer"}

# Both have images, and `{% generation %}` around answers, so that only they are trained on.
_CONTENT = """
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# SmolLM2, Qwen2, Qwen2.5: their own turns; no system prompt unless one is given.
CHATML_TEMPLATE = (
    _CONTENT
    + """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- render(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)

# Every other language model: the turns of LLaVA 1.5, which TinyLLaVA uses with TinyLlama and Phi-2. The space before
# the answer is part of it, because byte-level tokenizers merge it with the first word.
PLAIN_TEMPLATE = (
    _CONTENT
    + """
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' + render(message['content']) + eos_token -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' + render(message['content']) + ' ' -}}
{%- else -%}
{{- render(message['content']) + ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
)


class TinyAlignProcessor(ProcessorMixin):
    r"""
    An image processor and a tokenizer in one; each `<image>` becomes the placeholders of one image.

    Args:
        image_processor, tokenizer: Those of the vision tower and of the language model.
        chat_template (`str`, *optional*): Defaults to ChatML where the tokenizer has its tokens, else LLaVA's turns.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder; must be in the tokenizer.
        num_image_tokens (`int`, *optional*, defaults to 228):
            Placeholders of one image, `config.num_image_tokens`: visual tokens, then memory tokens.
        key_space (`str`, *optional*, defaults to `"vision"`):
            `config.key_space`. With `"language"` the question is given to retrieval, as `query_input_ids`.
        image_aspect_ratio (`str`, *optional*, defaults to `"square"`):
            Images that are not square: `"square"` leaves them to `image_processor`, `"pad"` pads them to a square with
            the mean colour first. A bank must have been built with the same.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        num_image_tokens=228,
        key_space="vision",
        image_aspect_ratio="square",
    ):
        if image_aspect_ratio not in ("square", "pad"):
            raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}, expected 'square' or 'pad'.")
        if key_space not in ("vision", "language"):
            raise ValueError(f"key_space is {key_space!r}, expected 'vision' or 'language'.")
        if type(num_image_tokens) is not int or not 1 <= num_image_tokens <= MAX_IMAGE_TOKENS:
            raise ValueError(f"num_image_tokens is {num_image_tokens!r}, expected 1 to {MAX_IMAGE_TOKENS}.")
        check_sizes(image_processor)
        if image_aspect_ratio == "pad":
            image_processor = padding_to_square(image_processor)
        self.image_aspect_ratio = image_aspect_ratio
        self.image_token = image_token
        self.image_token_id = tokenizer.get_vocab().get(image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"The tokenizer has no token {image_token!r}: add it as a special token, or use "
                "TinyAlignProcessor.from_vision_text_pretrained, which does."
            )
        self.num_image_tokens = num_image_tokens
        self.key_space = key_space
        if chat_template is None:
            chat_template = CHATML_TEMPLATE if "<|im_end|>" in tokenizer.get_vocab() else PLAIN_TEMPLATE
            chat_template = chat_template.replace("<image>", image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        """
        Load a processor like every other. One small image shows whether the settings fit together.

        Raises:
            ValueError: they don't.
        """
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            check_output(processor.image_processor)
        except BROKEN as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: processor_config.json does not describe a processor "
                f"({type(error).__name__}: {error}). Save or download it again."
            ) from error
        return processor

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_name_or_path: str, text_name_or_path: str, config: PreTrainedConfig, **kwargs
    ) -> "TinyAlignProcessor":
        """
        The processor of a model composed from the same two checkpoints; `config` is that model's.
        `tinyalign_vlm.training.composition.compose_processor` has the other arguments.

        Raises:
            ImportError: The package is not installed: a checkpoint's own code does not compose others.
        """
        try:
            from tinyalign_vlm.training.composition import compose_processor
        except ImportError as error:
            raise ImportError("Composing a processor needs the package: pip install tinyalign-vlm.") from error
        return compose_processor(cls, vision_name_or_path, text_name_or_path, config, **kwargs)

    @staticmethod
    def decode_image(image: Image.Image | str | Path | bytes | dict) -> Image.Image:
        """
        An image as model and memory bank see it: upright RGB, transparency white.

        Args:
            image: A PIL image, the path or the bytes of a file, or datasets' `{"bytes": ..., "path": ...}`.

        Raises:
            ValueError: There is none, or it is broken or too large.
        """
        return decode_image(image)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        query_text: str | list[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Make the model's inputs of texts and images.

        Args:
            images: One image, a list of images, or a list with a list of images for each text: PIL images, paths,
                URLs, base64 strings, bytes of files, arrays or tensors (of four dimensions: a batch).
            text: Prompts. `<rag>` is dropped: the memory tokens follow the visual tokens of the image before it.
            query_text: What to retrieve with beside the image, one for each text. Never put an answer in it. It is
                used only with `key_space="language"`.

        Returns:
            `input_ids`, `attention_mask`, `pixel_values (images, 3, H, W)`, and with `key_space="language"` and a
            query `query_input_ids`, `query_attention_mask (images, Q)`.
        """
        settings = taken_settings(kwargs)
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            texts = [self._fold_rag(sample) for sample in texts]
        images = self._flatten_images(images, texts)
        inputs = super().__call__(images=images, text=texts, **kwargs)
        if "offset_mapping" in inputs:
            inputs["offset_mapping"] = self._offsets_before_expansion(inputs["offset_mapping"], texts)
            inputs.pop("text_replacement_offsets", None)
        if self.key_space == "language" and query_text is not None and images is not None:
            queries = [query_text] if isinstance(query_text, str) else query_text
            counts = [sample.count(self.image_token) for sample in texts]
            if len(queries) != len(counts):
                raise ValueError(f"Found {len(queries)} query_text for {len(counts)} texts, expected one for each.")
            queries = [query for query, count in zip(queries, counts, strict=True) for _ in range(count)]
            query_inputs = self.tokenizer(
                queries, padding=True, padding_side="right", add_special_tokens=False, return_attention_mask=True
            )
            query_inputs = {f"query_{name}": query_inputs[name] for name in ("input_ids", "attention_mask")}
            inputs.update(BatchFeature(query_inputs, tensor_type=kwargs.get("return_tensors")))
        if settings:
            inputs["call_settings"] = settings
        return inputs

    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs=None, **kwargs):
        """
        Format and tokenize chats, like every processor of transformers; the query is the text of the user turns before
        the first answer.
        """
        batched = isinstance(conversation[0], (list, tuple))
        conversations = [
            [self.fold_message(message) for message in messages]
            for messages in (conversation if batched else [conversation])
        ]
        processor_kwargs = dict(processor_kwargs or {})
        if kwargs.get("return_dict"):
            processor_kwargs |= taken_settings(kwargs)
        if self.key_space == "language":
            processor_kwargs.setdefault("query_text", [self.query_text_of(messages) for messages in conversations])
            for name in {"padding", "padding_side", "truncation", "max_length"} & kwargs.keys():
                processor_kwargs[name] = kwargs.pop(name)  # transformers 5.17 would drop the query for them
        return super().apply_chat_template(
            conversations if batched else conversations[0],
            chat_template=chat_template,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    @property
    def model_input_names(self) -> list[str]:
        queries = ["query_input_ids", "query_attention_mask"] if self.key_space == "language" else []
        return super().model_input_names + queries

    def _flatten_images(self, images: Any, texts: list[str] | None) -> list | None:
        """Checks the number of images against the texts and loads them, in one list."""
        counts = None if texts is None else [sample.count(self.image_token) for sample in texts]
        should_be = f"the {self.image_token} tokens in the prompts should be the same as the number of their images"
        if images is None:
            images = []
        elif (is_numpy_array(images) or is_torch_tensor(images)) and images.ndim == 4:
            images = list(images)
        elif not isinstance(images, (list, tuple)):
            images = [images]
        if images and all(isinstance(row, (list, tuple)) for row in images):
            found = [len(row) for row in images]
            if counts is not None and found != counts:
                raise ValueError(
                    f"The texts have {counts} {self.image_token} placeholders, but {found} images were passed for "
                    f"them: {should_be}."
                )
            images = [image for row in images for image in row]
        elif counts is not None and sum(counts) != len(images):
            raise ValueError(
                f"The texts have {counts} {self.image_token} placeholders, {sum(counts)} in all, but {len(images)} "
                f"images were passed: {should_be}."
            )
        return [load_image(image, f"image {index}") for index, image in enumerate(images)] or None

    def _fold_rag(self, text: str) -> str:
        before, rag, _ = text.partition("<rag>")
        if rag and self.image_token not in before:
            raise ValueError(
                f"<rag> stands before the first {self.image_token} in {text[:100]!r}: put it after an image."
            )
        return re.sub(r"\s?<rag>", "", text)

    def fold_message(self, message: Any) -> dict:
        """In a chat the image may be an entry of its own, so `<rag>` is dropped wherever it stands."""
        message = _as_dict(message)
        content = message.get("content")
        if isinstance(content, str):
            message["content"] = _without_rag(content)
        elif isinstance(content, list):
            parts = [_as_dict(part) for part in content]
            for part in parts:
                if part["type"] == "text":
                    part["text"] = _without_rag(part["text"])
            message["content"] = parts
        return message

    def query_text_of(self, messages: list[dict]) -> str:
        texts = []
        for message in messages:
            if message["role"] == "assistant":
                break
            if message["role"] == "user":
                content = message["content"]
                parts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
                texts += [part.replace(self.image_token, "").strip() for part in parts]
        return "\n".join(texts)

    def _offsets_before_expansion(self, offset_mapping: list, texts: list[str]) -> list[list[tuple[int, int]]]:
        """Character spans in the texts as given, one placeholder an image: 5.17 takes them for that."""
        length = len(self.image_token)
        gained = length * (self.num_image_tokens - 1)
        restored = []
        for offsets, text in zip(offset_mapping, texts, strict=True):
            starts = [match.start() for match in re.finditer(re.escape(self.image_token), text)]

            def position(char: int, starts: list[int] = starts) -> int:
                for start in starts:
                    if char <= start:
                        break
                    char = max(start + length, char - gained)
                return char

            spans = []
            for start, end in offsets:
                start, end = position(int(start)), position(int(end))
                if end == 0 and spans:  # padding on the right: 5.17 needs the starts in order
                    start = end = spans[-1][1]
                spans.append((start, end))
            restored.append(spans)
        return restored


def taken_settings(kwargs: dict) -> dict:
    """Take the settings of `generate` out of the arguments of a call; `top_k` is `memory_top_k`.

    Raises:
        ValueError: `top_k` could be that of sampling.
    """
    settings = {name: kwargs.pop(name) for name in CALL_SETTINGS & kwargs.keys()}
    if "top_k" in settings and "do_sample" in settings:
        raise ValueError(
            "top_k could be the number of neighbours or that of sampling: say memory_top_k=..., or "
            "generate_kwargs={'do_sample': True, 'top_k': ...}."
        )
    if "top_k" in settings:
        settings["memory_top_k"] = settings.pop("top_k")
    return settings


def _as_dict(message: Any) -> dict:
    """A message, or a part of its content, as a new dict: it may be a dataclass or a pydantic model as well."""
    fields = message if isinstance(message, dict) else vars(message)
    return {name: value for name, value in fields.items() if value is not None}


def _without_rag(text: str) -> str:
    return text.replace("<rag>\n", "").replace("<rag>", "")


def add_captions(messages: list[dict], captions: Sequence[str]) -> list[dict]:
    """
    Text-only retrieval: the captions of the neighbours, written before the text of the first question.

        messages = add_captions(messages, model.retrieve(pixel_values, top_k=5).captions[0])
    """
    if not captions:
        return messages
    asked = next(index for index, message in enumerate(messages) if message["role"] == "user")
    content, hint = messages[asked]["content"], f"Similar: {'; '.join(captions)}\n"
    if isinstance(content, str):
        content = hint + content
    else:
        first = next((index for index, part in enumerate(content) if part["type"] == "text"), len(content))
        content = [*content[:first], {"type": "text", "text": hint}, *content[first:]]
    return [*messages[:asked], {**messages[asked], "content": content}, *messages[asked + 1 :]]


__all__ = ["TinyAlignProcessor"]
