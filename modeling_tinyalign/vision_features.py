"""Reading a vision tower, transformer or convolutional."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput


def read_vision_tower(
    vision_tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int | list[int], strategy: str, **kwargs
) -> tuple[torch.Tensor, ModelOutput]:
    """Visual features `(n, T, C)` of images `(n, 3, H, W)`, and all that the tower put out."""
    pixel_values = pixel_values.to(vision_tower.device, vision_tower.dtype)
    outputs = vision_tower(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
    if outputs.last_hidden_state.ndim == 4:  # a convolutional tower: (n, C, H, W)
        return outputs.last_hidden_state.flatten(2).transpose(1, 2), outputs
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.cat([outputs.hidden_states[index] for index in layers], dim=-1)
    return (features[:, 1:] if strategy == "default" else features), outputs


def pool_grid(features: torch.Tensor, size: int | None) -> torch.Tensor:
    """Average-pools visual features `(n, T, C)` on a square grid to `(n, size * size, C)`; `None` keeps them all."""
    if size is None:
        return features
    n, tokens, width = features.shape
    side = int(tokens**0.5)
    if side**2 != tokens or side < size:
        raise ValueError(
            f"Found {tokens} visual tokens, expected a square of at least {size} x {size} to pool to {size} x {size} "
            "(vision_pool_size, or the grid of a bank's keys). A tower with a CLS token needs "
            'vision_feature_select_strategy="default".'
        )
    grid = features.transpose(1, 2).reshape(n, width, side, side)
    return F.adaptive_avg_pool2d(grid, size).flatten(2).transpose(1, 2)
