"""The two trainable connectors: visual features and memory values to language-model tokens."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_tinyalign import TinyAlignConfig


class Connector(nn.Module):
    """Two linear layers, from one space to another."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, act: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_size, out_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_size)` of any dtype -> `(..., out_size)` in the connector's dtype."""
        features = features.to(self.linear_1.weight)
        return self.linear_2(self.act(self.linear_1(features)))


class MemoryConnector(nn.Module):
    """Turns the values of the neighbours into memory tokens (paper, section 3.3)."""

    def __init__(self, config: TinyAlignConfig):
        super().__init__()
        self.memory_fusion = config.memory_fusion
        hidden_size = config.text_config.hidden_size
        in_size = config.latent_dim * (config.memory_top_k if config.memory_fusion == "channel" else 1)
        self.null_latents = nn.Parameter(torch.zeros(config.num_latents, config.latent_dim))
        self.slot_embedding = nn.Parameter(torch.zeros(config.num_latents, hidden_size))
        self.mlp = Connector(
            in_size, config.memory_connector_size or hidden_size, hidden_size, config.projector_hidden_act
        )

    def forward(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        `values (n, k, L, D)`, and `mask (n, k)` that is False where nothing was retrieved -> `(n, M, hidden_size)`:
        L tokens (`"channel"`), or k x L, neighbour by neighbour (`"sequence"`).
        """
        values = values.to(self.null_latents)
        mask = torch.ones(values.shape[:2]) if mask is None else mask
        values = torch.where(mask.to(values.device, torch.bool)[:, :, None, None], values, self.null_latents)
        if self.memory_fusion == "channel":
            return self.mlp(values.transpose(1, 2).flatten(2)) + self.slot_embedding
        return (self.mlp(values) + self.slot_embedding).flatten(1, 2)
