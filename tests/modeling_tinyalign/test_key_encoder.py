from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tinyalign_vlm.modeling_tinyalign.bank_format import KeyEncoderConfig
from tinyalign_vlm.modeling_tinyalign.key_encoder import KeyEncoder, attention_pool
from tinyalign_vlm.training.bank.build import fit_whitening, new_key_encoder


def test_attention_pool_is_the_formula():
    features = torch.randn(2, 5, 3)
    for row, pooled in zip(features, attention_pool(features), strict=True):
        z = row / row.norm(dim=-1, keepdim=True)
        weights = (z @ z.T).softmax(-1).mean(0)
        torch.testing.assert_close(pooled, weights @ row)
        assert weights.sum() == pytest.approx(1)


def test_attention_pool_ignores_padding():
    features, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    pooled = attention_pool(features, mask)
    torch.testing.assert_close(pooled[:1], attention_pool(features[:1, :3]))
    torch.testing.assert_close(pooled[1:], attention_pool(features[1:]))


def test_keys_are_float32_whatever_the_features():
    features = torch.randn(3, 4, 6)
    encoder = KeyEncoder(torch.randn(6))
    keys = encoder(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(features).equal(keys)
    assert keys.dtype == encoder(features.half()).dtype == torch.float32
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(3))
    assert encoder(features[:0]).shape == (0, 6)


@pytest.mark.parametrize("rows, width, dim", [(200, 6, 4), (200, 6, 6), (30, 500, 29)])
def test_whitening(rows, width, dim):
    torch.manual_seed(0)
    raw = torch.randn(rows, width) @ torch.randn(width, width) + 3
    mean = raw.mean(0)
    projection = fit_whitening(raw, mean, dim)
    white = (raw - mean) @ projection
    torch.testing.assert_close(white.T @ white / rows, torch.eye(dim), atol=1e-3, rtol=0)
    variance, directions = torch.linalg.eigh(((raw - mean).T @ (raw - mean)).double() / rows)
    expected = (raw - mean).double() @ directions.flip(1)[:, :dim] / variance.flip(0)[:dim].sqrt()
    torch.testing.assert_close(white.abs(), expected.abs().float(), atol=1e-2, rtol=1e-3)
    assert KeyEncoder(mean, projection).key_dim == dim


def test_whitening_of_few_or_equal_rows():
    raw = torch.randn(5, 8)
    with pytest.raises(ValueError, match="whiten_dim is 5, but 5 rows of 8-wide keys have at most 4"):
        fit_whitening(raw, raw.mean(0), 5)
    twice = torch.cat([raw, raw])  # of rank 4
    assert (fit_whitening(twice, twice.mean(0), 8).norm(dim=0) < 10).all()
    assert fit_whitening(torch.ones(5, 8), torch.ones(8), 3).isfinite().all()


def test_grid():
    features = torch.randn(2, 16, 3)
    torch.testing.assert_close(attention_pool(features, grid=1), attention_pool(features))
    raw = KeyEncoder(torch.zeros(12), grid=2).raw_keys(features)
    cells = raw.reshape(2, 2, 2, 3)
    torch.testing.assert_close(cells.mean((1, 2)), attention_pool(features), atol=1e-6, rtol=1e-5)
    z = F.normalize(features[0], dim=-1)
    weighted = (16 * (z @ z.T).softmax(-1).mean(0)[:, None] * features[0]).reshape(4, 4, 3)
    torch.testing.assert_close(cells[0, 1, 0], weighted[2:, :2].mean((0, 1)))
    assert KeyEncoder(torch.zeros(27), grid=3).feature_dim == 3
    assert KeyEncoder(torch.zeros(3)).raw_keys(features[:, :7]).shape == (2, 3), "no square needed"
    for grid, tokens in ((2, 7), (5, 16)):
        with pytest.raises(ValueError, match=f"Found {tokens} visual tokens, expected a square of at least {grid}"):
            KeyEncoder(torch.zeros(3 * grid**2), grid=grid)(features[:, :tokens])
    with pytest.raises(ValueError, match="The key grid is 0"):
        KeyEncoder(torch.zeros(3), grid=0)


def test_width_of_another_tower():
    with pytest.raises(ValueError, match="7 wide.* built for 6"):
        KeyEncoder(torch.zeros(6))(torch.randn(1, 4, 7))


def test_language_space(make_model, make_processor):
    model = make_model(key_space="language", vision_pool_size=2, query_alpha=0.25)
    processor = make_processor(model)
    encoder = new_key_encoder(model, processor)
    features = torch.randn(2, 16, 16)
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    raw = encoder.raw_keys(features, ids, mask)

    connector, table = model.model.connector, model.get_input_embeddings().weight.half().float()
    pooled = features[1].reshape(2, 2, 2, 2, 16).mean((1, 3)).reshape(4, 16)
    image = 0.25 * F.normalize(connector(pooled), dim=-1)
    text = 0.75 * F.normalize(table[ids[1, :2]], dim=-1)
    torch.testing.assert_close(raw[1:], attention_pool(torch.cat([image, text])[None]), atol=1e-4, rtol=1e-3)
    assert not encoder.raw_keys(features).allclose(raw)

    with pytest.raises(ValueError, match='grid is 2, expected 1 or, with key_space="vision", more'):
        new_key_encoder(model, processor, grid=2)
    before = encoder(features)
    torch.nn.init.normal_(connector.linear_1.weight)
    assert encoder(features).equal(before), "training the connector moved the keys"
    with pytest.raises(ValueError, match="Query token 999 is outside the 301 tokens"):
        encoder(features, query_input_ids=torch.tensor([[999], [1]]))


def test_save_and_load(make_model, make_processor, tmp_path):
    config = KeyEncoderConfig("language", "gelu", vision_pool_size=None, alpha=0.4, grid=1)
    model = make_model(key_space="language")
    encoder = new_key_encoder(model, make_processor(model))
    features, probes = torch.randn(2, 16, 16), torch.randn(4, 32)
    path = tmp_path / "key_encoder.safetensors"
    encoder.save(path, probes)
    loaded, loaded_probes = KeyEncoder.load(path, config, 32)
    assert loaded(features).equal(encoder(features)) and loaded_probes.equal(probes)
    for change in ({"key_space": "vision"}, {"connector_act": "no"}, {"grid": 2}):
        with pytest.raises(ValueError, match="key_encoder.safetensors does not hold this bank's key encoder"):
            KeyEncoder.load(path, replace(config, **change), 32)
    with pytest.raises(ValueError, match=r"keys of shape \(1, 32\), expected \(1, 33\)"):
        KeyEncoder.load(path, config, 33)
    encoder.mean[3] = float("nan")
    encoder.save(path, probes)
    with pytest.raises(ValueError, match="not finite"):
        KeyEncoder.load(path, config, 32)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="key_encoder.safetensors"):
        KeyEncoder.load(path, config, 32)
