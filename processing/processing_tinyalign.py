"""TinyAlign processor: text and images to model inputs."""

import os
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tokenizers import AddedToken, normalizers
from transformers import BatchFeature, GenerationConfig, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils import is_numpy_array, is_torch_tensor

from .images import check_levels, check_output, check_sizes, decode_image, load_image, padding_to_square

MAX_IMAGE_TOKENS = 2**20
# Cuts the control tokens that stand in a text. The tokenizer looks for those, drops this, and reads on as if it had
# never been there. Unicode keeps the number free of characters.
CUT = "\ufdd0"
# What broken settings make transformers raise, beside ValueError and OSError.
BAD_FILE = StrictDataclassError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError
# What a pipeline passes to the processor, because it does not know it, and `generate` takes.
RETRIEVAL_SETTINGS = {"memory", "exclude_ids", "memory_top_k", "retrieval_threshold"}
GENERATION_SETTINGS = vars(GenerationConfig()).keys() - {"max_length", "return_dict_in_generate"}
CALL_SETTINGS = RETRIEVAL_SETTINGS | GENERATION_SETTINGS | {"generation_config", "logits_processor", "streamer"}


class TinyAlignProcessor(ProcessorMixin):
    r"""An image processor and a tokenizer in one; each `<image>` becomes one image's placeholders. Padding is left.

    Args:
        image_processor, tokenizer: Those of the vision tower and of the language model.
        chat_template (`str`, *optional*): Jinja; `from_vision_text_pretrained` chooses one by the tokenizer.
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
    decode_image = staticmethod(decode_image)

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
        if not tokenizer.is_fast:
            raise ValueError(f"The tokenizer is {type(tokenizer).__name__}, expected one that has a tokenizer.json.")
        check_sizes(image_processor)
        if image_aspect_ratio == "pad":
            image_processor = padding_to_square(image_processor)
        self.image_aspect_ratio, self.key_space = image_aspect_ratio, key_space
        self.num_image_tokens = num_image_tokens
        self.image_token, self.image_token_id = image_token, tokenizer.get_vocab().get(image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"The tokenizer has no token {image_token!r}: add it as a special token, or use "
                "TinyAlignProcessor.from_vision_text_pretrained, which does."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._prepare_tokenizer()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        """Load a processor like every other. Raises `ValueError` when its settings make nothing of a small image."""
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            check_output(processor.image_processor)
        except BAD_FILE as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: processor_config.json does not describe a processor "
                f"({type(error).__name__}: {error}). Save or download it again."
            ) from error
        return processor

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_name_or_path: str, text_name_or_path: str, config: PreTrainedConfig, **kwargs
    ) -> "TinyAlignProcessor":
        """Make the processor of a model composed from the same checkpoints: see `training.composition`."""
        try:
            from tinyalign_vlm.training.composition import compose_processor
        except ModuleNotFoundError as error:
            if error.name != "tinyalign_vlm":
                raise
            raise ImportError("Composing a processor needs the package: pip install tinyalign-vlm.") from error
        return compose_processor(cls, vision_name_or_path, text_name_or_path, config, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """Save like every processor, padding on the left, whatever was set for training."""
        self._prepare_tokenizer()
        return super().save_pretrained(*args, **kwargs)

    def _prepare_tokenizer(self):
        """Pad on the left, with the end token if there is no other, and let `CUT` vanish."""
        tokenizer = self.tokenizer
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what is saved
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        for token in self._control_tokens():
            if token.normalized:  # it would be looked for once more when `CUT` is gone
                exact = AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                tokenizer.add_tokens(exact, special_tokens=token.special)
        backend = tokenizer.backend_tokenizer
        if backend.normalizer is None:
            backend.normalizer = normalizers.Replace(CUT, "")
        elif CUT in backend.normalizer.normalize_str(CUT):
            backend.normalizer = normalizers.Sequence([normalizers.Replace(CUT, ""), backend.normalizer])

    def _control_tokens(self) -> list[AddedToken]:
        """Special tokens, and those that the chat template writes; what else was added to the vocabulary is words."""
        added, template = self.tokenizer.added_tokens_decoder.values(), str(self.chat_template)
        return [token for token in added if token.special or (token.content in template and token.content.strip())]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        query_text: str | list[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Make the model's inputs of texts and images.

        Args:
            images: One image, a list of images, or a list with a list of images for each text: PIL images, paths,
                URLs, base64 strings, bytes of files, arrays or tensors (of four dimensions: a batch).
            text: Prompts. `<rag>` is dropped: the memory tokens follow the visual tokens of the image before it.
            query_text: What to retrieve with, one a text, with `key_space="language"`. Never put an answer in it.

        Returns:
            `input_ids`, `attention_mask`, `pixel_values (images, 3, H, W)`, and with `key_space="language"` and a
            query `query_input_ids`, `query_attention_mask (texts, Q)`.
        """
        settings = taken_settings(kwargs)
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            if not (isinstance(texts, (list, tuple)) and texts and all(isinstance(item, str) for item in texts)):
                raise TypeError(f"text is {text!r:.100}, expected a text or a list of texts.")
            texts = [re.sub(r"\s?<rag>", "", sample) for sample in texts]
            "".join(texts).encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
            if self.tokenizer.bos_token and all(sample.startswith(self.tokenizer.bos_token) for sample in texts):
                kwargs.setdefault("add_special_tokens", False)  # what a template wrote is not written again
        images = self._load_images(images, texts)
        asked = kwargs | kwargs.get("images_kwargs", {})
        if asked.get("do_rescale", self.image_processor.do_rescale):
            for image in images or []:
                check_levels(image)
        inputs = super().__call__(images=images, text=texts, **kwargs)
        if "offset_mapping" in inputs:
            inputs["offset_mapping"] = self._offsets_before_expansion(inputs["offset_mapping"], texts)
            inputs.pop("text_replacement_offsets", None)
        if self.key_space == "language" and query_text is not None:
            queries, asked = [query_text] if isinstance(query_text, str) else query_text, texts or images or []
            if len(queries) != len(asked):
                raise ValueError(f"Found {len(queries)} query_text for {len(asked)} texts, expected one for each.")
            inputs.update(self.query_inputs(queries, kwargs.get("return_tensors")))
        if settings:
            inputs["call_settings"] = settings
        return inputs

    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs=None, **kwargs):
        """Format and tokenize chats like every processor. Only the template writes control tokens and only parts of
        type "image" become images: what looks like either in a text is text. Without images, `pixel_values (0, 3, H,
        W)`. The query is the user's text before the first answer. Raises `ValueError` as [`read_chat`].
        """
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"The chat is {conversation!r:.100}, expected a list of messages with role and content.")
        batched = isinstance(conversation[0], (list, tuple))
        if batched:
            conversations = [read_chat(messages, f"chat {number}, ") for number, messages in enumerate(conversation)]
        else:
            conversations = [read_chat(conversation)]
        processor_kwargs = {"add_special_tokens": False, **(processor_kwargs or {})}
        if kwargs.get("return_dict"):
            processor_kwargs |= taken_settings(kwargs)
        for name in {"padding", "padding_side", "truncation", "max_length"} & kwargs.keys():
            processor_kwargs[name] = kwargs.pop(name)  # transformers 5.17 would drop the others for them
        if self.key_space == "language":
            processor_kwargs.setdefault("query_text", [self.query_text_of(messages) for messages in conversations])
        if kwargs.get("tokenize"):
            conversations = self.as_text(conversations)
        kwargs |= {"chat_template": chat_template, "processor_kwargs": processor_kwargs}
        inputs = super().apply_chat_template(conversations if batched else conversations[0], **kwargs)
        if isinstance(inputs, BatchFeature) and is_torch_tensor(inputs["input_ids"]) and "pixel_values" not in inputs:
            # a pipeline's batch has chats with images as well, and all its rows need the same names
            blank = self.image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")
            inputs["pixel_values"] = blank["pixel_values"][:0]
        return inputs

    def as_text(self, value: Any) -> Any:
        """Texts, chats or lists of them, with `CUT` in all that the tokenizer would take for a control token."""
        tokens = "|".join(re.escape(token.content) for token in self._control_tokens())
        control = re.compile(f"(?={tokens})(.)", re.DOTALL)  # the lookahead finds those that overlap as well

        def cut(value: Any) -> Any:
            if isinstance(value, str):
                return control.sub(rf"\1{CUT}", value.replace(CUT, ""))
            if isinstance(value, dict) and value.get("type") != "image":
                return {name: cut(item) for name, item in value.items()}
            if not isinstance(value, list):
                return value
            values = [cut(item) for item in value]
            texts = [item for item in values if isinstance(item, dict) and item.get("type") == "text"]
            if control.search("".join(item["text"] for item in texts)):  # where two parts meet
                for item in texts[1:]:
                    item["text"] = CUT + item["text"]
            return values

        return cut(value)

    def query_inputs(self, queries: list[str], return_tensors: str | None = "pt") -> BatchFeature:
        """Questions as `query_input_ids` and `query_attention_mask` `(n, Q)`, for keys in the language space."""
        inputs = self.tokenizer(self.as_text(queries), padding=True, padding_side="right", add_special_tokens=False)
        if not any(inputs["input_ids"]):  # without words: a token that does not count
            inputs = self.tokenizer.pad(inputs, padding="max_length", max_length=1)
        inputs = {f"query_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(inputs, tensor_type=return_tensors)

    @staticmethod
    def query_text_of(messages: list[dict]) -> str:
        """The text of the user turns before the first answer."""
        texts = []
        for message in messages:
            if message["role"] == "assistant":
                break
            if message["role"] == "user":
                content = message["content"]
                parts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
                texts += [part.strip() for part in parts]
        return "\n".join(texts)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self) -> list[str]:
        queries = ["query_input_ids", "query_attention_mask"] if self.key_space == "language" else []
        return super().model_input_names + queries

    def _load_images(self, images: Any, texts: list[str] | None) -> list | None:
        """The images in one list, loaded; `ValueError` unless each text has a placeholder for each of its own."""
        if images is None:
            images = []
        elif (is_numpy_array(images) or is_torch_tensor(images)) and images.ndim == 4:
            images = list(images)
        elif not isinstance(images, (list, tuple)):
            images = [images]
        counts = None if texts is None else [sample.count(self.image_token) for sample in texts]
        found = [len(images)]
        if images and all(isinstance(row, (list, tuple)) for row in images):
            found = [len(row) for row in images]
            images = [image for row in images for image in row]
        elif counts is not None and sum(counts) == len(images):
            found = counts
        if counts is not None and counts != found:
            raise ValueError(
                f"The texts have {counts} {self.image_token} placeholders, but {found} images were passed: the "
                f"{self.image_token} tokens in the prompts should be the same as the number of their images."
            )
        return [load_image(image, f"image {index}") for index, image in enumerate(images)] or None

    def _offsets_before_expansion(self, offset_mapping: list, texts: list[str]) -> list[list[tuple[int, int]]]:
        """Character spans in the texts as given, one placeholder an image: 5.17 takes them for that."""
        restored = []
        for offsets, text in zip(offset_mapping, texts, strict=True):
            origins, last = [], 0  # of each character of the expanded text
            for match in re.finditer(re.escape(self.image_token), text):
                origins += range(last, match.start() + 1)
                origins += [match.end()] * (len(self.image_token) * self.num_image_tokens - 1)
                last = match.end()
            origins += range(last, len(text) + 1)
            spans = [(origins[int(start)], origins[int(end)]) for start, end in offsets]
            for index, (_, end) in enumerate(spans):
                if end == 0 and index:  # padding on the right: 5.17 needs the starts in order
                    spans[index] = (spans[index - 1][1],) * 2
            restored.append(spans)
        return restored


def taken_settings(kwargs: dict) -> dict:
    """Take the settings of `generate` out of a call's; `ValueError` if `top_k` could be that of sampling."""
    settings = {name: kwargs.pop(name) for name in CALL_SETTINGS & kwargs.keys()}
    if "top_k" in settings and "do_sample" in settings:
        raise ValueError(
            "top_k could be the number of neighbours or that of sampling: say memory_top_k=..., or "
            "generate_kwargs={'do_sample': True, 'top_k': ...}."
        )
    if "top_k" in settings:
        settings["memory_top_k"] = settings.pop("top_k")
    return settings


def read_chat(messages: Sequence[Any], name: str = "") -> list[dict]:
    """A chat as the template takes it: messages and the parts of their content as dictionaries. `name` is the chat's.
    Raises `ValueError` if a content is neither text nor a list of texts and images.
    """
    chat = [_as_dict(message) for message in messages]
    for number, message in enumerate(chat):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{name}messages[{number}]: found no role, expected user, assistant or system.")
        content = message.setdefault("content", "")
        if isinstance(content, (list, tuple)):
            message["content"] = [_read_part(part, f"{name}messages[{number}]") for part in content]
        elif not isinstance(content, str):
            raise ValueError(f"{name}messages[{number}]: found content {content!r}, expected text or a list of parts.")
    return chat


def _read_part(part: Any, name: str) -> dict:
    part = {"type": None} if isinstance(part, str) else _as_dict(part)
    kind, url = part.get("type"), part.get("image_url")
    if kind == "image_url" and url is not None:
        return {"type": "image", "url": url.get("url") if isinstance(url, dict) else url}
    if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
        raise ValueError(
            f"{name}: found a part of type {kind!r} with {sorted(part)}, expected "
            '{"type": "text", "text": ...} or {"type": "image", "image": ...}.'
        )
    return part


def _as_dict(message: Any) -> dict:
    """A message, or a part of its content, as a new dict: it may be a dataclass or a pydantic model as well."""
    if not isinstance(message, dict) and not hasattr(message, "__dict__"):
        raise ValueError(f"Found the message {message!r:.100}, expected a dictionary with a role and a content.")
    fields = message if isinstance(message, dict) else vars(message)
    return {name: value for name, value in fields.items() if value is not None}


__all__ = ["TinyAlignProcessor"]
