"""The two trainable connectors: visual features and memory values to language-model tokens."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_tinyalign import TinyAlignConfig
from .lexicon import LONGEST_REST, read_words


class Connector(nn.Module):
    """Two linear layers from one space to another, in float32 whatever torch's default dtype is."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, act: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size, dtype=torch.float32)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_size, out_size, dtype=torch.float32)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_size)` of any dtype -> `(..., out_size)` in the connector's dtype."""
        features = features.to(self.linear_1.weight)
        return self.linear_2(self.act(self.linear_1(features)))


class MemoryConnector(nn.Module):
    """
    Turns the values of the neighbours into memory tokens (paper, section 4.1: the RAG connector).

    A two-layer MLP, as in the paper. With a lexicon (`TinyAlignForConditionalGeneration.build_lexicon`) the word that
    each latent spells is added to it, in the language model's own embedding: what the bank says can be read at once,
    and training has to learn only what to make of it.
    """

    def __init__(self, config: TinyAlignConfig):
        super().__init__()
        self.memory_fusion = config.memory_fusion
        hidden_size = config.text_config.hidden_size
        self.memory_scores = config.memory_scores
        width = config.latent_dim + (1 if config.memory_scores else 0)
        in_size = width * (config.memory_top_k if config.memory_fusion == "channel" else 1)
        self.null_latents = nn.Parameter(torch.zeros(config.num_latents, config.latent_dim, dtype=torch.float32))
        self.slot_embedding = nn.Parameter(torch.zeros(config.num_latents, hidden_size, dtype=torch.float32))
        self.mlp = Connector(
            in_size, config.memory_connector_size or hidden_size, hidden_size, config.projector_hidden_act
        )
        words = config.memory_lexicon_size
        if words == 0:
            self.set_lexicon(None, None, None)
        else:
            self.set_lexicon(
                torch.zeros(words, config.latent_dim, dtype=torch.float32),
                torch.zeros(words, dtype=torch.float32),
                torch.full((config.latents_per_word, words, LONGEST_REST), -1),
            )

    def set_lexicon(self, keys: torch.Tensor | None, bias: torch.Tensor | None, tokens: torch.LongTensor | None):
        """See `read_words` for the shapes; without words (`None`) the connector is the MLP alone."""
        self.register_buffer("lexicon_keys", keys)
        self.register_buffer("lexicon_bias", bias)
        self.register_buffer("lexicon_tokens", tokens)

    def _apply(self, fn, recurse: bool = True):
        """Loading in half precision makes the token ids float32: as bfloat16 they would become other tokens."""
        if self.lexicon_tokens is not None:
            self.lexicon_tokens = self.lexicon_tokens.long()
        return super()._apply(fn, recurse)

    def forward(
        self,
        values: torch.Tensor,
        mask: torch.Tensor | None = None,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        `values (n, k, L, D)`, `mask (n, k)` that is False where nothing was retrieved, the language model's
        embedding layer (used if there is a lexicon) and the neighbours' similarities `(n, k)` (read with
        `config.memory_scores`) -> `(n, M, hidden_size)`: L tokens (`"channel"`), or k x L, neighbour by neighbour
        (`"sequence"`). Raises `ValueError` when the similarities are wanted and missing.
        """
        values = values.to(self.null_latents)
        mask = torch.ones(values.shape[:2]) if mask is None else mask
        mask = mask.to(values.device, torch.bool)[:, :, None, None]
        words = 0.0
        if self.lexicon_bias is not None:
            with torch.no_grad():
                words = read_words(values, self.lexicon_keys, self.lexicon_bias, self.lexicon_tokens, embed)
                words = torch.where(mask, words, 0.0)
                words = words.mean(1) if self.memory_fusion == "channel" else words
        values = torch.where(mask, values, self.null_latents)
        if self.memory_scores:
            if scores is None:
                raise ValueError(
                    "config.memory_scores: this model is told the similarity of each neighbour. Pass memory_scores "
                    "(images, top_k) with memory_ids or memory_values, or let the model retrieve."
                )
            scores = torch.where(mask, scores.to(values)[:, :, None, None], 0.0)
            values = torch.cat([values, scores.expand(*values.shape[:3], 1)], dim=-1)
        if self.memory_fusion == "channel":
            return self.mlp(values.transpose(1, 2).flatten(2)) + self.slot_embedding + words
        return (self.mlp(values) + self.slot_embedding + words).flatten(1, 2)
