"""Answers, generated one at a time in a thread of their own, and streamed as text."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from ..models import context_length

SAFE_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")  # names of this machine, for servers that nobody else reaches
LOCK = threading.Lock()  # held by whatever uses the model: one answer at a time
# Arguments of `processor.apply_chat_template` for a chat that ends with a question.
PROMPT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


class ContextError(ValueError):
    """A prompt that leaves no room in the model's context."""


class TokenQueue(BaseStreamer):
    """The prompt, and then the tokens of an answer for another thread, as they are generated."""

    def __init__(self):
        self.tokens = queue.Queue()

    def put(self, value: torch.Tensor):
        self.tokens.put(value.tolist())

    def end(self):
        self.tokens.put(None)


@dataclass
class Answer:
    """An answer that is generated: its text, and what is known at its end.

    Attributes:
        inputs: the prompt, as the processor made it; `ContextError` if it leaves no room in the model's context.
        config: its `max_new_tokens` are set, and become fewer where there is less room.
        look_up: returns the inputs of `generate` for these; called where nothing else uses the model.
        stopped: set, it ends the answer where it is.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    inputs: dict
    config: GenerationConfig
    look_up: Callable[[dict], dict] = dict
    seed: int | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        context, length = context_length(self.model), self.inputs["input_ids"].shape[1]
        if context is None:
            return
        if length >= context:
            raise ContextError(
                f"The prompt has {length} tokens, expected fewer than the model's context of {context}: ask less."
            )
        self.config.max_new_tokens = min(self.config.max_new_tokens, context - length)

    def pieces(self) -> Iterator[str]:
        """Yield the text as it comes, up to a stop string."""
        stops, streamer = self.config.stop_strings or [], TokenQueue()
        self.config.stop_strings = None  # `generate` would find them in the prompt's end, too
        text, sent, held = "", 0, max(map(len, stops), default=1) - 1
        with ThreadPoolExecutor(1) as thread:
            work = thread.submit(self._generate, streamer)
            work.add_done_callback(lambda work: streamer.end())  # also if it failed
            try:
                generated = iter(streamer.tokens.get, None)
                next(generated, None)  # the prompt
                for tokens in generated:
                    self.tokens += tokens
                    text = self.processor.decode(self.tokens, skip_special_tokens=True)
                    ends = [text.find(stop) for stop in stops if stop in text]
                    if ends:
                        text = text[: min(ends)]
                        break
                    ready = len(text.rstrip("\ufffd")) - held  # half a character, and what may begin a stop string
                    if ready > sent:
                        yield text[sent:ready]
                        sent = ready
                else:
                    self.finish_reason = self._reason()
            finally:  # also when nobody listens any more
                self.stopped.set()
        work.result()
        if text[sent:]:
            yield text[sent:]

    def _reason(self) -> str:
        ends = torch.tensor(self.config.eos_token_id or []).reshape(-1).tolist()
        is_full = len(self.tokens) >= self.config.max_new_tokens
        return "length" if is_full and self.tokens[-1] not in ends else "stop"

    def _generate(self, streamer: TokenQueue):
        devices = [self.model.device] * (self.model.device.type == "cuda")
        with LOCK, torch.no_grad(), torch.random.fork_rng(devices, enabled=self.seed is not None):
            if self.stopped.is_set():  # while others had the model
                return
            if self.seed is not None:
                torch.manual_seed(self.seed)
            self.model.generate(
                **self.look_up(self.inputs),
                generation_config=self.config,
                streamer=streamer,
                # on the device of the ids, where `generate` joins it with its own criteria
                stopping_criteria=[
                    lambda ids, scores: torch.full((len(ids),), self.stopped.is_set(), device=ids.device)
                ],
            )

    @property
    def usage(self) -> dict[str, int]:
        prompt, answer = self.inputs["input_ids"].shape[1], len(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
