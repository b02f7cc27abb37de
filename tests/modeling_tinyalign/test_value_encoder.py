"""Sizes of the value encoder; what it is trained to do is tested in training/bank."""

import pytest

from tinyalign_vlm import ValueEncoderConfig


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"d_model": 100}, "bytes_per_patch"),
        ({"latent_dim": 60}, r"latent_dim is 60, expected a multiple of the numbers of heads, \(8, 8\)"),
        ({"num_self_attention_heads": 0}, "num_self_attention_heads is 0, expected 1 or more"),
    ],
)
def test_value_encoder_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        ValueEncoderConfig(**sizes)


def test_a_config_is_read_as_it_was_written(tmp_path):
    config = ValueEncoderConfig(latent_dim=64, num_cross_attention_heads=4)
    assert all(type(value) in (int, str) for value in config.settings.values())
    config.save_pretrained(tmp_path)
    assert ValueEncoderConfig.from_pretrained(tmp_path).settings == config.settings
