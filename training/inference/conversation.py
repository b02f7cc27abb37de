"""One visitor's conversation about a picture, over a model that visitors share."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign.connectors import check_retrieval
from ...modeling_tinyalign.row_encoder import image_source_id
from ..models import context_length
from .answers import PROMPT, Answer
from .lessons import Lessons, Neighbour

UNSURE = 0.5  # from this probability on that no neighbour is right, the visitor is told
QUERY = ("query_input_ids", "query_attention_mask")
KEPT_TURNS = 20
# What a picture, a setting, a full disk or a lack of memory ends in.
ERRORS = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


class Conversation:
    """Questions about one picture, and their answers. The model is shared: nothing is attached to it.

    Answers of several conversations are generated one after another, under `answers.LOCK`.

    Args:
        lessons: those of the visitor, with the bank they are over. By default none, over the model's bank.

    Attributes:
        image: the picture, RGB, or None.
        turns: the last questions and answers, `KEPT_TURNS` of them.
        sources: the neighbours of the picture that were found for the last question, best first.
        none_right: the probability that none of them is right; None unless the bank was calibrated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        lessons: Lessons | None = None,
        max_new_tokens: int = 256,
    ):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.lessons = Lessons(model, processor) if lessons is None else lessons
        self.image: Image.Image | None = None
        self.clear()

    def clear(self):
        """Forget questions and answers, not the picture."""
        self.turns: list[tuple[str, str]] = []
        self.sources: list[Neighbour] = []
        self.none_right: float | None = None

    def show(self, image: Any):
        """Talk about this picture (PIL, bytes, path) from now on; ValueError if it cannot be read. Another one than
        before starts anew.
        """
        image = self.processor.decode_image(image)
        if self.image is None or image_source_id(image) != image_source_id(self.image):
            self.clear()
        self.image = image

    def teach(self, image: Any, caption: str) -> dict:
        """Teach a lesson, as [`Lessons.teach`], and start anew: an earlier answer would be given again."""
        row = self.lessons.teach(image, caption)
        self.clear()
        return row

    def forget(self, source_id: str | None = None) -> int:
        """Forget lessons, as [`Lessons.forget`], and what was answered with them."""
        self.clear()
        return self.lessons.forget(source_id)

    def ask(
        self,
        question: str,
        image: Any = None,
        memory: Literal["on", "off"] = "on",
        top_k: int | None = None,
        retrieval_threshold: float | None = None,
        exclude: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the answer as it is generated; `sources` are known with its first piece.

        Args:
            image: see `show`; without one the picture stays.
            memory, top_k, retrieval_threshold: as of `model.generate`, whose `memory_top_k` it is.
            exclude: source_ids of rows and lessons to leave out.

        Raises:
            ValueError: a setting, the picture or the length of the question is wrong.
        """
        check_retrieval(self.model.config, memory, top_k, retrieval_threshold)
        try:
            question.encode()
        except UnicodeEncodeError as error:  # a terminal's
            raise ValueError(f"The question has half a character ({error}): type it again.") from error
        if image is not None:
            self.show(image)
        if top_k is None:
            top_k = self.model.config.memory_top_k
        if retrieval_threshold is None:
            retrieval_threshold = self.model.config.retrieval_threshold
        settings = {"top_k": 0 if memory == "off" else top_k, "threshold": retrieval_threshold, "exclude": exclude}
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens = self.max_new_tokens
        look_up, text = partial(self._look_up, **settings), ""
        for piece in Answer(self.model, self.processor, self._prompt(question), config, look_up).pieces():
            text += piece
            yield piece
        self.turns = [*self.turns, (question, text)][-KEPT_TURNS:]

    def _prompt(self, question: str) -> dict:
        """Return the processor's inputs for this question, behind as many of the turns before it as fit."""
        context = context_length(self.model)
        for start in range(len(self.turns) + 1):
            messages = []
            for text in [*itertools.chain(*self.turns[start:]), question]:
                role = "assistant" if len(messages) % 2 else "user"
                messages.append({"role": role, "content": [{"type": "text", "text": text}]})
            if self.image is not None:
                messages[0]["content"].insert(0, {"type": "image", "image": self.image})
            inputs = self.processor.apply_chat_template(messages, **PROMPT).to(self.model.device)
            if context is None or inputs["input_ids"].shape[1] + self.max_new_tokens <= context:
                break
        return inputs

    def _look_up(self, inputs: dict, top_k: int, threshold: float | None, exclude: Sequence[str]) -> dict:
        """Return the inputs of `generate`: features in place of pixels, and all that the model reads of neighbours."""
        self.sources, self.none_right = [], None
        inputs = dict(inputs)
        if len(inputs["pixel_values"]) == 0:
            return inputs
        picture = self.lessons.pictures.look_at(inputs.pop("pixel_values")[0])
        inputs["vision_features"] = picture.features
        query = {name: inputs.pop(name) for name in QUERY if name in inputs}
        if top_k == 0:
            return {**inputs, "memory": "off"}
        self.sources, self.none_right = self.lessons.neighbours(picture, top_k, query, exclude)
        for source in self.sources:
            source.used = threshold is None or source.similarity >= threshold
        return inputs | self._memory() | {"retrieval_threshold": threshold}

    def _memory(self) -> dict[str, torch.Tensor]:
        """Return what the model reads of the sources that are used."""
        config, lessons = self.model.config, self.lessons
        slots, sources = config.memory_top_k, self.sources
        ids, scores = torch.full((1, slots), -1), torch.full((1, slots), -torch.inf)
        values = torch.zeros(1, slots, config.memory_tokens, config.latent_dim)
        for slot, source in enumerate(sources):
            scores[0, slot] = source.similarity
            if source.used:
                ids[0, slot] = source.id
                if config.reads_latents:
                    values[0, slot] = lessons.value(source.id)
        memory = {"memory_ids": ids, "memory_scores": scores}
        if config.reads_latents:
            memory["memory_values"] = values
        if config.reads_captions:
            memory["memory_input_ids"] = self.model.caption_tokenizer([[s.caption for s in sources if s.used]])
        return memory
