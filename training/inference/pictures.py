"""Pictures, looked at once: a second question about one needs no vision tower."""

import hashlib
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ...modeling_tinyalign import MemoryBank

KEPT_PICTURES = 32


class Picture:
    """The vision features `(1, tokens, width)` of a picture, and its neighbours in the banks that were searched."""

    def __init__(self, name: str, features: torch.Tensor):
        self.name, self.features = name, features
        self._found = WeakKeyDictionary()  # a bank is immutable, and one that was replaced is not kept alive

    def neighbours(
        self, bank: MemoryBank, top_k: int, query: dict[str, torch.Tensor], exclude: Sequence[str] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the key `(1, key_dim)`, and scores and ids `(1, top_k)` as `bank.search`; kept unless they depend on
        more than the picture: on the question in `query`, for language-space keys, or on rows to leave out.
        """
        found = {} if query else self._found.setdefault(bank, {})
        if "key" not in found:
            found["key"] = bank.encode_queries(self.features, **query)
        if exclude:
            return found["key"], *bank.search(found["key"], top_k, [list(exclude)])
        if top_k not in found:
            found[top_k] = bank.search(found["key"], top_k)
        return found["key"], *found[top_k]


class Pictures:
    """The last pictures that a model has looked at, by their pixels. Threads that share it hold `answers.LOCK`."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._kept: dict[str, Picture] = {}

    @torch.no_grad()
    def look_at(self, pixels: torch.Tensor) -> Picture:
        """Return the picture of `(3, height, width)` pixels, as the processor makes them; the tower sees it once."""
        content = pixels.detach().cpu().contiguous()
        name = hashlib.sha256(f"{content.shape}{content.dtype}".encode() + content.view(torch.uint8).numpy().tobytes())
        name = name.hexdigest()
        picture = self._kept.pop(name, None) or Picture(name, self.model.get_vision_features(pixels[None]))
        self._kept[name] = picture  # as the last
        if len(self._kept) > KEPT_PICTURES:
            del self._kept[next(iter(self._kept))]
        return picture

    def forget(self, name: str):
        """Drop a picture, if it is there."""
        self._kept.pop(name, None)

    def looked_up(self, inputs: dict) -> dict:
        """Return inputs of `generate` with features and neighbours in the attached bank in place of the pixels."""
        pixels = inputs.get("pixel_values")
        if pixels is None or len(pixels) == 0:
            return dict(inputs)
        pictures = [self.look_at(image) for image in pixels]
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
        inputs["vision_features"] = torch.cat([picture.features for picture in pictures])
        config = self.model.config
        if config.memory_top_k and config.key_space == "vision" and inputs.get("memory") != "off":
            bank = self.model.require_bank()
            found = [picture.neighbours(bank, config.memory_top_k, {})[1:] for picture in pictures]
            inputs["memory_scores"], inputs["memory_ids"] = map(torch.cat, zip(*found, strict=True))
        return inputs
