import copy
import errno
import io
import json
import os
import pickle
import shutil
import subprocess

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from isolation import set_hf_home
from PIL import Image
from torch.nn import functional as F

from tinyalign_vlm.modeling_tinyalign import bank_builder, bank_index, bank_shards, bank_storage, saved_bank
from tinyalign_vlm.modeling_tinyalign.bank_config import config_sha256, file_sha256
from tinyalign_vlm.modeling_tinyalign.bank_images import image_source_id, load_image
from tinyalign_vlm.modeling_tinyalign.bank_shards import list_column, row_schema
from tinyalign_vlm.modeling_tinyalign.bank_storage import write_local_files
from tinyalign_vlm.modeling_tinyalign.key_encoder import KeyEncoder, attention_pool
from tinyalign_vlm.modeling_tinyalign.memory_bank import MemoryBank
from tinyalign_vlm.modeling_tinyalign.value_encoder import ValueEncoder, ValueEncoderConfig

NUM_ROWS = 10


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Nothing was loaded before: the shards are read and checked."""
    set_hf_home(monkeypatch, tmp_path / "fresh_home")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def processor(make_processor, model):
    return make_processor(model)


SMALL = {"d_model": 16, "bytes_per_patch": 4, "num_self_attends_per_block": 1, "qk_channels": 5, "v_channels": 5}


@pytest.fixture(scope="module")
def value_encoder():
    torch.manual_seed(0)
    sizes = {"num_latents": 3, "latent_dim": 5, "vision_feature_size": 16, "num_vision_tokens": 16}
    heads = {"num_self_attention_heads": 1, "num_cross_attention_heads": 1}
    return ValueEncoder(ValueEncoderConfig(**sizes, **heads, **SMALL)).eval()


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((50, 60), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def dataset():
    return [{"image": noise(i), "caption": f"noise number {i}", "licence": "CC0"} for i in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def bank(dataset, model, processor, value_encoder):
    return MemoryBank.build(dataset, model, processor, value_encoder, keep_columns=["licence"], batch_size=4)


@pytest.fixture
def saved(bank, tmp_path):
    folder = tmp_path / "bank"
    bank.save_pretrained(folder)
    return folder


def features_of(images, model, processor):
    return model.get_vision_features(processor.image_processor(images=images, return_tensors="pt")["pixel_values"])


def bank_of(keys: np.ndarray, source_ids: list[str] | None = None) -> MemoryBank:
    """A bank of given keys; the value of row i is full of i."""
    n, dim = keys.shape
    values = np.repeat(np.arange(n, dtype=np.float16)[:, None], 6, axis=1)
    columns = {
        "id": pa.array(range(n), pa.int64()),
        "source_id": pa.array(source_ids or [f"{i:032x}" for i in range(n)]),
        "caption": pa.array([f"caption {i}" for i in range(n)]),
        "key": list_column(keys.astype(np.float32)),
        "value": list_column(values),
    }
    files = write_local_files([pa.record_batch(columns)], row_schema(dim, 6, False, ()), (2, 3), "test")
    sizes = {"num_rows": n, "key_dim": dim, "num_latents": 2, "latent_dim": 3}
    config = {**sizes, "tower": {"name": "test"}, "key_encoder": {"key_space": "vision"}, "skipped_rows": []}
    return MemoryBank(config, KeyEncoder(torch.zeros(dim)), torch.zeros(4, dim), files)


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


# ---------------------------------------------------------------------- building


def test_build(bank, dataset, model, processor, value_encoder):
    images, captions = [row["image"] for row in dataset], [row["caption"] for row in dataset]
    features = features_of(images, model, processor)
    raw = attention_pool(features)
    keys = F.normalize(raw - raw.mean(0), dim=-1)
    queries = bank.encode_queries(features)
    torch.testing.assert_close(queries, keys, atol=1e-4, rtol=0)
    scores, ids = bank.search(queries, 3)
    assert ids[:, 0].tolist() == list(range(NUM_ROWS))
    torch.testing.assert_close(scores[:, 0], torch.ones(NUM_ROWS))
    expected = value_encoder.encode(features, captions)
    torch.testing.assert_close(bank.gather(ids)[:, 0], expected, atol=2e-2, rtol=2e-3)
    assert bank.captions == captions
    first = {"id": 0, "source_id": image_source_id(images[0]), "caption": captions[0], "licence": "CC0"}
    assert bank.rows([[0], [-1]]) == [[first], [None]]
    assert bank.thumbnail(2).size == (50, 60)
    assert bank.ids_of(first["source_id"]).tolist() == [0] and bank.ids_of("0" * 32).tolist() == []
    assert len(bank) == NUM_ROWS and bank.skipped_rows == []


def test_build_from_hub_dataset_and_cached_features(bank, dataset, model, processor, value_encoder):
    table = datasets.Dataset.from_list(
        dataset,
        features=datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string"), "licence": datasets.Value("string")}
        ),
    )
    for source in (table, table.to_iterable_dataset()):
        other = MemoryBank.build(source, model, processor, value_encoder, keep_columns=["licence"], batch_size=4)
        assert other.config["sha256"] == bank.config["sha256"]
    features = features_of([row["image"] for row in dataset], model, processor)
    other = MemoryBank.build(
        iter(dataset), model, processor, value_encoder, batch_size=4, thumbnail_size=None, vision_features=features
    )
    torch.testing.assert_close(other.encode_queries(features), bank.encode_queries(features), atol=1e-4, rtol=0)
    assert other.thumbnail(0) is None
    with pytest.raises(ValueError, match=f"vision_features has {NUM_ROWS - 1} rows, but the dataset has {NUM_ROWS}"):
        MemoryBank.build(dataset, model, processor, value_encoder, vision_features=features[1:])


def test_build_leaves_the_models_alone(model, processor, value_encoder, dataset):
    model.train()
    modes = [part.training for part in model.modules()]
    bank = MemoryBank.build(dataset, model, processor, value_encoder)
    assert [part.training for part in model.modules()] == modes
    model.eval()
    assert all(parameter.requires_grad for parameter in value_encoder.parameters())
    assert bank.value_encoder is not value_encoder


def test_values_from_pixels(dataset, model, processor, value_encoder):
    config = ValueEncoderConfig(**{**value_encoder.config.to_dict(), "image_input": "pixels", "image_size": 32})
    config.patch_size = 8
    reader = ValueEncoder(config).eval()
    images, captions = [row["image"] for row in dataset], [row["caption"] for row in dataset]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    for features in (None, features_of(images, model, processor)):
        bank = MemoryBank.build(dataset, model, processor, reader, vision_features=features)
        values = bank.gather(range(NUM_ROWS))
        torch.testing.assert_close(values, reader.encode(pixels, captions), atol=2e-2, rtol=2e-3)


def test_whitened_bank(dataset, model, processor, value_encoder, tmp_path):
    bank = MemoryBank.build(dataset, model, processor, value_encoder, whiten_dim=5)
    bank.save_pretrained(tmp_path / "bank")
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    features = features_of([row["image"] for row in dataset], model, processor)
    assert loaded.key_dim == 5
    assert loaded.search(loaded.encode_queries(features), 1)[1].flatten().tolist() == list(range(NUM_ROWS))
    with pytest.raises(ValueError, match="whiten_dim is 10, but 10 rows of 16-wide keys have at most 9"):
        MemoryBank.build(dataset, model, processor, value_encoder, whiten_dim=10)


@pytest.mark.parametrize("whiten_dim", [None, 5])
def test_key_grid(whiten_dim, dataset, model, processor, value_encoder, tmp_path, monkeypatch):
    bank = MemoryBank.build(dataset, model, processor, value_encoder, key_grid=2, whiten_dim=whiten_dim, batch_size=4)
    bank.save_pretrained(tmp_path / "bank")
    set_hf_home(monkeypatch, tmp_path / "another_home")
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    assert loaded.config["key_encoder"]["grid"] == loaded.key_encoder.grid == 2
    assert loaded.probe_keys.shape == (4, 64) and loaded.key_dim == (whiten_dim or 64)
    features = features_of([row["image"] for row in dataset], model, processor)
    raw = attention_pool(features, grid=2)
    torch.testing.assert_close(loaded.key_encoder.mean, raw.mean(0), atol=1e-5, rtol=1e-4)
    scores, ids = loaded.search(loaded.encode_queries(features), 1)
    assert ids.flatten().tolist() == list(range(NUM_ROWS))
    torch.testing.assert_close(scores, torch.ones(NUM_ROWS, 1), atol=1e-4, rtol=0)
    loaded.check_probes(model)
    bigger = loaded.add([{**dataset[0], "image": noise(50)}], model, processor)
    assert bigger.search(bigger.encode_queries(features_of([noise(50)], model, processor)), 1)[1].item() == NUM_ROWS


def test_whitening_of_a_large_bank_takes_a_sample(dataset, model, processor, value_encoder, monkeypatch):
    monkeypatch.setattr(bank_builder, "MAX_WHITENING_ROWS", 7)
    bank = MemoryBank.build(dataset, model, processor, value_encoder, whiten_dim=6, batch_size=4)
    features = features_of([row["image"] for row in dataset], model, processor)
    raw = attention_pool(features)
    torch.testing.assert_close(bank.key_encoder.mean, raw.mean(0), atol=1e-5, rtol=1e-4)
    sample = np.sort(np.random.default_rng(0).permutation(NUM_ROWS)[:7])
    white = (raw - raw.mean(0))[sample] @ bank.key_encoder.projection
    torch.testing.assert_close(white.T @ white / 7, torch.eye(6), atol=1e-2, rtol=0)
    again = MemoryBank.build(dataset, model, processor, value_encoder, whiten_dim=6, batch_size=4)
    assert again.config["sha256"] == bank.config["sha256"]
    with pytest.raises(ValueError, match="7 rows of 16-wide keys have at most 6"):
        MemoryBank.build(dataset, model, processor, value_encoder, whiten_dim=7)


def test_key_grid_in_language_space(dataset, make_model, make_processor, value_encoder):
    model = make_model(key_space="language")
    with pytest.raises(ValueError, match='key grid is 2, expected 1 or, with key_space="vision"'):
        MemoryBank.build(dataset, model, make_processor(model), value_encoder, key_grid=2)


def test_language_space(dataset, make_model, make_processor, value_encoder, tmp_path):
    model = make_model(key_space="language")
    processor = make_processor(model)
    MemoryBank.build(dataset, model, processor, value_encoder).save_pretrained(tmp_path / "bank")
    bank = MemoryBank.from_pretrained(tmp_path / "bank")
    features = features_of([row["image"] for row in dataset], model, processor)
    text = processor.tokenizer(dataset[3]["caption"], return_tensors="pt", add_special_tokens=False)["input_ids"]
    scores, ids = bank.search(bank.encode_queries(features[3:4], text), 1)
    assert ids.item() == 3 and scores.item() == pytest.approx(1, abs=1e-4)
    bank.check_probes(model)
    model.attach_memory_bank(bank)


def broken_png() -> bytes:
    buffer = io.BytesIO()
    noise(0).resize((200, 200)).save(buffer, "PNG")
    return buffer.getvalue()[:500]


BAD_ROWS = [
    ({"image": {"bytes": b"not an image", "path": None}}, "cannot be read .UnidentifiedImageError"),
    ({"image": broken_png()}, "the image cannot be read"),
    ({"image": None}, "there is no image"),
    ({"image": "no/such/file.png"}, "FileNotFoundError"),
    ({"caption": None}, "the caption is None, expected text"),
    ({"caption": "  "}, "the caption is '  ', expected text"),
]


@pytest.mark.parametrize("change, message", BAD_ROWS)
def test_bad_row_is_named(change, message, dataset, model, processor, value_encoder):
    rows = [dataset[0], {**dataset[1], **change}, dataset[2]]
    with pytest.raises(ValueError, match=f"Row 1 of the dataset: .*{message}.*skip_bad_rows"):
        MemoryBank.build(rows, model, processor, value_encoder)


def test_bad_rows_are_skipped_and_listed(dataset, model, processor, value_encoder, tmp_path):
    rows = [row for change, _ in BAD_ROWS for row in (dataset[0], {**dataset[1], **change})] + dataset[2:]
    bank = MemoryBank.build(rows, model, processor, value_encoder, skip_bad_rows=True)
    assert [skipped["row"] for skipped in bank.skipped_rows] == [1, 3, 5, 7, 9, 11]
    assert len(bank) == len(rows) - 6
    bank.save_pretrained(tmp_path / "bank")
    assert MemoryBank.from_pretrained(tmp_path / "bank").skipped_rows == bank.skipped_rows


def test_corrupt_image_in_a_hub_dataset_is_named(dataset, model, processor, value_encoder):
    rows = {"image": [broken_png(), broken_png()], "caption": ["a", "b"]}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    )
    with pytest.raises(ValueError, match="Row 0 of the dataset: the image cannot be read"):
        MemoryBank.build(table, model, processor, value_encoder)


def test_decompression_bomb(dataset, model, processor, value_encoder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    buffer = io.BytesIO()
    noise(0).save(buffer, "PNG")
    rows = [{**dataset[0], "image": buffer.getvalue()}]
    with pytest.raises(ValueError, match=r"Row 0 .* too large .*3000 pixels.*, expected at most 2000"):
        MemoryBank.build(rows, model, processor, value_encoder)


def test_datasets_that_do_not_fit(dataset, model, processor, value_encoder):
    def build(rows, **options):
        return MemoryBank.build(rows, model, processor, value_encoder, **options)

    with pytest.raises(ValueError, match=r"no column 'caption'.*\['image', 'text'\].*caption_column="):
        build([{"image": noise(0), "text": "x"}], skip_bad_rows=True)
    with pytest.raises(ValueError, match="no column 'picture'"):
        build(dataset, image_column="picture")
    with pytest.raises(ValueError, match=r"DatasetDict.*\"train\""):
        build({"train": dataset})
    with pytest.raises(ValueError, match="no usable rows"):
        build([])
    with pytest.raises(ValueError, match="no usable rows .1 were skipped"):
        build([{"image": None, "caption": "x"}], skip_bad_rows=True)
    with pytest.raises(ValueError, match="no column 'author' to keep"):
        build(dataset, keep_columns=["author"])
    for columns in (["key"], ["licence", "licence"], "licence", ["lic\nence"], [""]):
        with pytest.raises(ValueError, match="expected a list of columns, each once, with printable names other than"):
            build(dataset, keep_columns=columns)
    with pytest.raises(ValueError, match="batch_size is -2, expected 1 or more"):
        build(dataset, batch_size=-2)
    for size in (-5, 0, 5000):
        with pytest.raises(ValueError, match=f"thumbnail_size is {size}, expected 1 to 4096"):
            build(dataset, thumbnail_size=size)
    with pytest.raises(ValueError, match="Row 0 of the dataset: .*surrogates not allowed"):
        build([{**dataset[0], "caption": "half a smile \ud83d"}])


def test_the_tower_of_the_current_folder_has_a_name(model, checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints["siglip"])
    monkeypatch.setattr(model.config.vision_config, "_name_or_path", ".")
    assert bank_builder.describe_tower(model, [3, 32, 32])["name"] == os.path.basename(checkpoints["siglip"])


def test_latents_of_another_shape(dataset, make_model, processor, value_encoder):
    with pytest.raises(ValueError, match=r"latents of shape \(3, 5\), but the model expects \(3, 7\)"):
        MemoryBank.build(dataset, make_model(latent_dim=7), processor, value_encoder)


def test_add(bank, model, processor, saved):
    new = [{"image": noise(100 + i), "caption": f"new {i}", "licence": "MIT"} for i in range(3)]
    bigger = MemoryBank.from_pretrained(saved).add(new, model, processor)
    assert (len(bank), len(bigger)) == (NUM_ROWS, NUM_ROWS + 3)
    assert bigger.rows(range(NUM_ROWS)) == bank.rows(range(NUM_ROWS))
    assert bigger.rows([NUM_ROWS])[0]["licence"] == "MIT"
    assert bigger.key_encoder.mean.equal(bank.key_encoder.mean)
    features = features_of([new[1]["image"]], model, processor)
    assert bigger.search(bigger.encode_queries(features), 1)[1].item() == NUM_ROWS + 1
    torch.testing.assert_close(bigger.gather([[NUM_ROWS - 1]]), bank.gather([[NUM_ROWS - 1]]))


def test_from_dataset_deletes_rows(bank, saved, tmp_path):
    table = datasets.load_dataset(str(saved), split="train", cache_dir=str(tmp_path))
    smaller = MemoryBank.from_dataset(table.filter(lambda row: row["id"] != 4), like=bank)
    assert smaller.captions == bank.captions[:4] + bank.captions[5:]
    torch.testing.assert_close(smaller.gather([4]), bank.gather([5]))


def test_no_row(bank):
    """-1 is no row, and not the last one."""
    with pytest.raises(ValueError, match="Row 1 of the ids is -1, which has no key"):
        bank.keys([0, -1])
    assert bank.thumbnail(-1) is None and bank.rows([-1]) == [None]
    assert len(bank.remove(np.int64(2))) == len(bank) - 1
    with pytest.raises(ValueError, match=r"The columns are \['a'\], expected those of a bank"):
        MemoryBank.from_dataset(datasets.Dataset.from_dict({"a": [1]}), like=bank)


def test_shuffled(bank):
    control = bank.shuffled(seed=0)
    assert control.captions == bank.captions
    assert control.gather(range(NUM_ROWS)).equal(bank.gather(range(NUM_ROWS)))
    keys = torch.tensor(bank._keys[:])
    found = control.search(keys, 1)[1].flatten()
    assert sorted(found.tolist()) == list(range(NUM_ROWS)) and not (found == torch.arange(NUM_ROWS)).any()
    assert bank.shuffled(seed=0).search(keys, 1)[1].flatten().equal(found)
    assert not bank.shuffled(seed=1).search(keys, 1)[1].flatten().equal(found)


# ---------------------------------------------------------------------- searching


def test_search_is_exact():
    keys, queries = unit(500, 24), unit(40, 24, seed=1)
    bank = bank_of(keys)
    scores, ids = bank.search(queries, 7)
    products = queries.astype(np.float64) @ keys.T.astype(np.float64)
    assert (ids == np.argsort(-products, axis=1)[:, :7]).all()
    np.testing.assert_allclose(scores, np.take_along_axis(products, ids, 1), rtol=1e-6)
    assert scores.dtype == np.float32 and ids.dtype == np.int64


def test_batch_equals_singles():
    bank, queries = bank_of(unit(3000, 48)), unit(300, 48, seed=1)
    scores, ids = bank.search(queries, 5)
    for i in range(0, 300, 7):
        one_scores, one_ids = bank.search(queries[i : i + 1], 5)
        assert (one_ids == ids[i]).all() and (one_scores == scores[i]).all()


@pytest.mark.parametrize("copies", [3, 20, 200])
def test_ties_are_ordered_by_id(copies):
    keys = np.concatenate([unit(30, 8)] + [unit(1, 8, seed=2)] * copies + [unit(30, 8, seed=3)])
    bank, query = bank_of(keys), unit(1, 8, seed=2)
    expected = list(range(30, 30 + min(copies, 5)))
    for queries in (query, np.repeat(query, 40, axis=0)):
        assert (bank.search(queries, 5)[1][:, : len(expected)] == expected).all()
    exclude = [[30, 31]]
    assert bank.search(query, 5, exclude=exclude)[1][0, : len(expected) - 2].tolist() == expected[2:] or copies > 5
    if copies > 6:
        assert bank.search(query, 5, exclude=exclude)[1].tolist() == [[32, 33, 34, 35, 36]]


def test_equal_keys_everywhere():
    assert bank_of(np.zeros((400, 4))).search(np.ones((2, 4)), 3)[1].tolist() == [[0, 1, 2]] * 2


def test_exclusion_still_returns_k():
    sources = [f"{i // 4:032x}" for i in range(80)]
    bank = bank_of(unit(80, 8), sources)
    queries = bank._keys[::4].copy()
    full = bank.search(queries, 80)[1]
    _, ids = bank.search(queries, 5, exclude=[sources[4 * i] for i in range(20)])
    for i in range(20):
        assert ids[i].tolist() == [j for j in full[i] if j // 4 != i][:5]
    mixed = [None, f"{1:032x}", [8, 9, -1], torch.tensor([12]), np.array([], int), 20, *[None] * 14]
    _, ids = bank.search(queries, 5, exclude=mixed)
    for i, unwanted in enumerate([[], [4, 5, 6, 7], [8, 9], [12], [], [20]]):
        assert ids[i].tolist() == [j for j in full[i] if j not in unwanted][:5]


def test_fewer_rows_than_asked_for():
    bank = bank_of(unit(4, 8))
    scores, ids = bank.search(torch.tensor(unit(2, 8)), 3, exclude=[[0, 2], None])
    assert ids[0].tolist()[2] == -1 and sorted(ids[0, :2].tolist()) == [1, 3]
    assert scores[0, 2] == -torch.inf and (ids[1] >= 0).all()
    values = bank.gather(ids)
    assert values.shape == (2, 3, 2, 3) and (values[0, 2] == 0).all()
    assert [row and row["id"] for row in bank.rows(ids)[0]] == [*ids[0, :2].tolist(), None]


def test_tensors_and_arrays():
    bank, queries = bank_of(unit(50, 8)), unit(6, 8, seed=1)
    scores, ids = bank.search(queries, 4)
    strided = np.asfortranarray(queries.astype(np.float64))
    assert (bank.search(strided, 4)[1] == ids).all()
    tensor = torch.tensor(queries, requires_grad=True)
    tensor_scores, tensor_ids = bank.search(tensor, 4)
    assert torch.is_tensor(tensor_ids) and (tensor_ids.numpy() == ids).all() and not tensor_scores.requires_grad
    assert bank.search(queries[:0], 4)[1].shape == (0, 4)
    assert bank.gather(ids).equal(bank.gather(tensor_ids)) and bank.gather(ids).dtype == torch.float32
    assert bank.gather(ids, torch.bfloat16).dtype == torch.bfloat16
    assert bank.gather(np.empty((0, 4), np.int64)).shape == (0, 4, 2, 3)
    assert (bank.gather([[3, 7]]) == torch.tensor([3.0, 7.0])[None, :, None, None]).all()


def test_wrong_searches():
    bank, queries = bank_of(unit(5, 8)), unit(2, 8)
    with pytest.raises(ValueError, match="top_k is 6, but the bank has 5 rows"):
        bank.search(queries, 6)
    with pytest.raises(ValueError, match="top_k is 0"):
        bank.search(queries, 0)
    with pytest.raises(ValueError, match=r"shape \(2, 7\), expected \(n, 8\)"):
        bank.search(queries[:, :7], 1)
    with pytest.raises(ValueError, match="exclude has 1 items for 2 queries"):
        bank.search(queries, 1, exclude=[None])
    with pytest.raises(ValueError, match="exclude is 'ab', expected a list with one item a query"):
        bank.search(queries, 1, exclude="ab")
    with pytest.raises(ValueError, match="top_k is 2.0"):
        bank.search(queries, 2.0)
    with pytest.raises(TypeError, match="row ids are of float64, expected integers"):
        bank.search(queries, 1, exclude=[[0.5], None])
    with pytest.raises(ValueError, match="NaN"):
        bank.search(np.full((1, 8), np.nan), 1)
    with pytest.raises(ValueError, match="Row ids run from 0 to 5, expected -1 .none. to 4"):
        bank.gather([0, 5])


class SearchingDataset(torch.utils.data.Dataset):
    def __init__(self, bank):
        self.bank = bank

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.bank.search(unit(1, 8), 1)


class GatheringDataset(SearchingDataset):
    def __getitem__(self, i):
        return self.bank.gather([i])


def test_workers_gather_and_never_search():
    bank = bank_of(unit(5, 8))
    bank.search(unit(1, 8), 1)
    values = torch.cat(list(torch.utils.data.DataLoader(GatheringDataset(bank), num_workers=1)))
    assert values[:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="DataLoader worker, where faiss hangs"):
        next(iter(torch.utils.data.DataLoader(SearchingDataset(bank), num_workers=1)))


def test_no_search_in_a_fork(monkeypatch):
    bank = bank_of(unit(5, 8))
    monkeypatch.setattr(bank_index, "_searching_process", os.getpid() + 1)
    with pytest.raises(RuntimeError, match="a forked process"):
        bank.search(unit(1, 8), 1)


def test_copies_share_the_files(bank):
    queries = torch.tensor(bank._keys[:])
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert "_values" not in other.__dict__ and "_keys" not in other.__dict__
        assert other.search(queries, 2)[1].equal(bank.search(queries, 2)[1])
        assert other.gather([1]).equal(bank.gather([1]))
    assert len(pickle.dumps(bank)) < 200_000
    assert not bank._values[:1].base.flags.writeable, "mapped, not read"


# ---------------------------------------------------------------------- probes


def test_probes(bank, model, make_model):
    bank.check_probes(model)
    other = make_model(text="qwen2")  # the language model does not matter
    other.model.vision_tower = model.model.vision_tower
    bank.check_probes(other)
    bank.check_probes(copy.deepcopy(model).bfloat16())


def test_other_towers_are_refused(bank, make_model, model):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.model.vision_tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ValueError, match=r"vision tower \S+, this model has \S+: .* cosine of their keys is -?0\.\d+"):
        bank.check_probes(other)
    with pytest.raises(ValueError, match=r"features 1280 wide.*16 wide"):
        bank.check_probes(make_model(vision="efficientnet"))
    with pytest.raises(ValueError, match="cosine"):
        bank.add([], other, None)


# ---------------------------------------------------------------------- saving and loading


def test_save_and_load(bank, saved, empty_cache, dataset, model, processor):
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert names == {
        "bank_config.json",
        "data/train-00000-of-00001.parquet",
        "key_encoder.safetensors",
        "value_encoder/config.json",
        "value_encoder/model.safetensors",
    }
    loaded = MemoryBank.from_pretrained(saved)
    queries = bank.encode_queries(features_of([row["image"] for row in dataset], model, processor))
    for ours, theirs in zip(bank.search(queries, 4), loaded.search(queries, 4), strict=True):
        assert ours.equal(theirs)
    ids = np.arange(NUM_ROWS)
    assert loaded.gather(ids).equal(bank.gather(ids)) and loaded.rows(ids) == bank.rows(ids)
    assert loaded.thumbnail(1).tobytes() == bank.thumbnail(1).tobytes()
    unsaved = {"num_shards": 0, "sha256": 0, "index": 0}
    assert {**loaded.config, **unsaved} == {**bank.config, **unsaved}
    assert str(saved) not in (saved / "bank_config.json").read_text()
    loaded.check_probes(model)
    expected = bank.value_encoder.state_dict()
    for name, tensor in loaded.value_encoder.state_dict().items():
        assert tensor.equal(expected[name])


def test_saved_again_it_is_the_same(saved, tmp_path, empty_cache):
    MemoryBank.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for path in saved.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(saved)).read_bytes(), path.name


def test_load_dataset(saved, tmp_path, bank):
    table = datasets.load_dataset(str(saved), split="train", cache_dir=str(tmp_path))
    assert table.features["key"] == datasets.List(datasets.Value("float32"), length=16)
    assert table.features["value"] == datasets.List(datasets.Value("float16"), length=15)
    assert isinstance(table.features["thumbnail"], datasets.Image)
    assert table["caption"][:] == bank.captions and table[0]["thumbnail"].size == bank.thumbnail(0).size
    assert next(iter(datasets.load_dataset(str(saved), split="train", streaming=True)))["id"] == 0


def test_many_shards(bank, tmp_path, monkeypatch, empty_cache):
    monkeypatch.setattr(bank_shards, "SHARD_BYTES", 1000)
    monkeypatch.setattr(bank_shards, "BATCH_ROWS", 2)
    bank.save_pretrained(tmp_path / "bank")
    shards = sorted((tmp_path / "bank" / "data").iterdir())
    assert len(shards) > 3 and sum(pq.read_metadata(shard).num_rows for shard in shards) == NUM_ROWS
    assert MemoryBank.from_pretrained(tmp_path / "bank").captions == bank.captions
    shards[2].unlink()
    with pytest.raises(ValueError, match=f"{shards[2].name} is missing"):
        MemoryBank.from_pretrained(tmp_path / "bank")


def test_second_load_reads_no_shard(saved, empty_cache, monkeypatch):
    MemoryBank.from_pretrained(saved)
    monkeypatch.setattr(saved_bank, "read_shards", None)
    monkeypatch.setattr(saved_bank, "write_local_files", None)
    for shard in (saved / "data").iterdir():
        shard.write_bytes(b"")
    MemoryBank.from_pretrained(saved).search(unit(1, 16), 1)


def test_saving_keeps_other_files(bank, saved):
    (saved / "README.md").write_text("A card.")
    (saved / "data" / "train-00000-of-00009.parquet").write_text("of an older version")
    bank.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "A card."
    assert [path.name for path in (saved / "data").iterdir()] == ["train-00000-of-00001.parquet"]


def test_saving_over_something_else_is_refused(bank, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no memory bank"):
        bank.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        bank.save_pretrained(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def content(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["write_table", "save_file", "fsync", "rename"])
def test_full_disk_leaves_the_old_bank(place, bank, saved, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = content(tmp_path)
    other = bank.shuffled()
    if place == "write_table":
        monkeypatch.setattr(bank_shards.pq.ParquetWriter, "write_table", full)
    elif place == "save_file":
        monkeypatch.setattr("tinyalign_vlm.modeling_tinyalign.key_encoder.save_file", full)
    else:
        monkeypatch.setattr(os, place, full)
    with pytest.raises(OSError, match="Saving the memory bank .* No space left .* unchanged") as error:
        other.save_pretrained(saved)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert content(tmp_path) == before, "the old bank changed, or something was left beside it"


def test_full_disk_at_the_last_rename(bank, saved, tmp_path, monkeypatch):
    before, rename = content(tmp_path), os.rename

    def full_for_the_new(source, target):
        if ".new-" in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", full_for_the_new)
    with pytest.raises(OSError, match="unchanged"):
        bank.save_pretrained(saved)
    assert content(tmp_path) == before


def test_full_cache(dataset, model, processor, value_encoder, empty_cache, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="local files .* No space left.*HF_HOME"):
        MemoryBank.build(dataset, model, processor, value_encoder)
    assert list(bank_storage.cache_root().rglob("*.*")) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a bank that was mapped there may still be


def test_really_full_disk(bank, saved, small_disk, monkeypatch, dataset, model, processor, value_encoder):
    folder = small_disk / "bank"
    bank.save_pretrained(folder)
    before = content(small_disk)
    for free in (120_000, 60_000, 20_000, 5_000, 0):
        used = os.statvfs(small_disk)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(max(used.f_bavail * used.f_frsize - free, 0)))
        try:
            bank.shuffled().save_pretrained(folder)
        except OSError as error:
            assert "unchanged" in str(error)
            filler.unlink()
            assert content(small_disk) == before
        else:
            filler.unlink()
            bank.save_pretrained(folder)
    assert len(MemoryBank.from_pretrained(folder)) == NUM_ROWS
    set_hf_home(monkeypatch, small_disk / "home")
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with pytest.raises(OSError, match="HF_HOME|No space left"):
        MemoryBank.build(dataset, model, processor, value_encoder)
    with pytest.raises(OSError, match="HF_HOME"):
        MemoryBank.from_pretrained(saved)
    # wherever it is full; a memory map that is written to would end the process
    failed = 0
    for free in range(4096, 80_000, 4096):
        filler.unlink()
        filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - free))
        try:
            MemoryBank.build(dataset, model, processor, value_encoder, packed=True)
            break
        except OSError as error:
            assert "No space left" in str(error)
            failed += 1
    assert failed > 3


# ---------------------------------------------------------------------- banks not to be trusted


def edit_config(folder, **changes):
    """Change a saved bank's config and its checksum."""
    path = folder / "bank_config.json"
    config = {**json.loads(path.read_text()), **changes}
    if isinstance(config["sha256"], dict):
        config["sha256"]["config"] = config_sha256(config)
    path.write_text(json.dumps(config))


def edit_table(folder, edit):
    """Change the rows of a saved bank; the config stays."""
    path = folder / "data" / "train-00000-of-00001.parquet"
    pq.write_table(edit(pq.read_table(path)), path)


def with_column(table, name, values, type=None):
    return table.set_column(table.column_names.index(name), name, pa.array(values, type))


def nan_key(table):
    keys = np.stack(table["key"].to_numpy(zero_copy_only=False)).astype(np.float32)
    keys[3, 2] = np.nan
    return table.set_column(table.column_names.index("key"), "key", list_column(keys))


BAD_TABLES = {
    "NaN key": (nan_key, "row 3 has key 'NaN or infinity'"),
    "double keys": (
        lambda t: with_column(t, "key", t["key"].to_pylist(), pa.list_(pa.float64(), 16)),
        "column 'key' is .*double.*, expected .*float",
    ),
    "ragged keys": (
        lambda t: with_column(t, "key", t["key"].to_pylist(), pa.list_(pa.float32())),
        "column 'key' is list<",
    ),
    "narrow values": (
        lambda t: with_column(t, "value", [v[:-1] for v in t["value"].to_pylist()], pa.list_(pa.float16(), 14)),
        "column 'value' is",
    ),
    "no captions": (lambda t: t.drop_columns(["caption"]), "column 'caption' is missing"),
    "null caption": (lambda t: with_column(t, "caption", [None] * len(t), pa.string()), "row 0 has caption null"),
    "null key": (
        lambda t: with_column(t, "key", [None, *t["key"].to_pylist()[1:]], pa.list_(pa.float32(), 16)),
        "row 0 has key null|cannot be read as Parquet",  # the latter by pyarrow 21
    ),
    "integer source": (lambda t: with_column(t, "source_id", range(len(t))), "column 'source_id' is int64"),
    "path as source": (
        lambda t: with_column(t, "source_id", ["../../etc/passwd"] * len(t)),
        "row 0 has source_id '../../etc/passwd', expected 32 hex digits",
    ),
    "text ids": (lambda t: with_column(t, "id", ["../x"] * len(t)), "column 'id' is string"),
    "reordered ids": (lambda t: with_column(t, "id", range(1, len(t) + 1)), "row 0 has id 1"),
    "fewer rows": (lambda t: t.slice(0, 4), "declares 10 rows, but the shards hold 4"),
    "other caption": (
        lambda t: with_column(t, "caption", ["lies"] * len(t)),
        "sha256 of the rows is .* but bank_config.json says",
    ),
    "other keys": (
        lambda t: t.set_column(t.column_names.index("key"), "key", list_column(unit(len(t), 16))),
        "sha256 of the keys",
    ),
    "other values": (
        lambda t: t.set_column(t.column_names.index("value"), "value", list_column(np.ones((len(t), 15), np.float16))),
        "sha256 of the values",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_rows_are_refused(name, saved, empty_cache):
    edit, message = BAD_TABLES[name]
    edit_table(saved, edit)
    with pytest.raises(ValueError, match=f"{saved}.*{message}"):
        MemoryBank.from_pretrained(saved)
    assert list(bank_storage.cache_root().rglob("*")) == []


KEYS = {"key_space": "vision", "grid": 1, "vision_pool_size": None, "alpha": 0.4, "connector_act": "gelu"}
BAD_CONFIGS = [
    ({"num_rows": 10**12}, "num_rows is 1000000000000, expected an integer between 1 and"),
    ({"num_rows": 10**9}, "declares 1000000000 rows, but the shards hold 10"),
    ({"num_rows": 0}, "num_rows is 0"),
    ({"num_rows": True}, "num_rows is True"),
    ({"num_rows": "10"}, "num_rows is '10'"),
    ({"key_dim": -1}, "key_dim is -1"),
    ({"key_dim": 17}, "expected .1, 17."),
    ({"num_latents": 4}, "value_encoder.num_latents is 3, expected num_latents = 4"),
    ({"num_shards": 2}, "train-00000-of-00002.parquet is missing"),
    ({"sha256": {}}, "sha256.keys is missing"),
    ({"sha256": None}, "sha256.keys is missing"),
    ({"sha256": {"keys": "../../../etc"}}, "sha256.keys is '../../../etc', expected 64 hex digits"),
    ({"format_version": 2}, "format_version is 2, expected 1"),
    ({"key_encoder": {**KEYS, "key_space": "audio"}}, "key_encoder.key_space is 'audio', expected \"vision\" or"),
    ({"key_encoder": {**KEYS, "key_space": "language"}}, "key_encoder.safetensors does not hold"),
    ({"key_encoder": {**KEYS, "alpha": float("nan")}}, "found NaN, expected numbers that are finite"),
    ({"key_encoder": {**KEYS, "alpha": "0.4"}}, "key_encoder.alpha is '0.4', expected a number between 0 and 1"),
    ({"key_encoder": {"key_space": "vision"}}, "key_encoder.grid is missing, expected an integer between 1 and 64"),
    ({"key_encoder": {**KEYS, "grid": 10**9}}, "key_encoder.grid is 1000000000"),
    ({"key_encoder": {**KEYS, "vision_pool_size": 10**9}}, "vision_pool_size is 1000000000"),
    ({"tower": None}, "tower.name is missing"),
    ({"tower": {"name": "x", "revision": None, "image_shape": [3, 10**9, 10**9]}}, "tower.image_shape"),
    ({"columns": [1]}, "columns is"),
    ({"value_encoder": None}, "value_encoder is None, expected an object"),
    ({"thumbnail_size": -5}, "thumbnail_size is -5"),
    ({"skipped_rows": 3}, "skipped_rows is 3"),
]


@pytest.mark.parametrize("changes, message", BAD_CONFIGS)
def test_bad_configs_are_refused(changes, message, saved, empty_cache):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=f"{saved}.*{message}"):
        MemoryBank.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00", '{"a": 1}'])
def test_bad_json_is_refused(text, saved):
    (saved / "bank_config.json").write_text(text)
    with pytest.raises(ValueError, match="bank_config.json"):
        MemoryBank.from_pretrained(saved)


@pytest.mark.parametrize("name", ["bank_config.json", "data/train-00000-of-00001.parquet", "key_encoder.safetensors"])
def test_missing_and_truncated_files(name, saved, empty_cache):
    path = saved / name
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=str(path)):
        MemoryBank.from_pretrained(saved)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path}.* missing"):
        MemoryBank.from_pretrained(saved)


def test_changed_value_encoder(saved):
    path = saved / "value_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    bank = MemoryBank.from_pretrained(saved)
    with pytest.raises(ValueError, match=f"{path}: its sha256 is"):
        bank.value_encoder  # noqa: B018


def test_planted_files_are_not_read(saved, empty_cache):
    """Pickles and an index in the bank's folder have no effect, whatever they are called."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(saved / "exploded"),)

    names = ("index.faiss", "keys.pkl", "values.pt", "pytorch_model.bin", "value_encoder/pytorch_model.bin")
    for name in (*names, "Merged_LLaVA_Dataset_Memory.pt", "data/values.npy", "key_encoder.pt"):
        (saved / name).write_bytes(pickle.dumps(Bomb()))
    bank = MemoryBank.from_pretrained(saved)
    bank.search(unit(1, 16), 3)
    assert bank.gather([0]).isfinite().all() and bank.value_encoder is not None
    assert not (saved / "exploded").exists()


def test_no_code_is_run_and_no_other_file_followed(saved, bank, empty_cache, tmp_path):
    """Whatever a config.json of transformers can name, a bank's folder cannot."""
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'exploded')!r}).touch()\n"
    code += "class ValueEncoder:\n    def __init__(self, *args, **kwargs): ...\n"
    folder = saved / "value_encoder"
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor"), "evil.ValueEncoder")
    auto_map["AutoImageProcessor"] = "evil.ValueEncoder"
    planted = {
        **json.loads((folder / "config.json").read_text()),
        "auto_map": auto_map,
        "trust_remote_code": True,
        "custom_pipelines": {"image-to-text": {"impl": "evil.ValueEncoder"}},
        "transformers_weights": "other.safetensors",
        "attn_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "num_latents": 4,
    }
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(bank.value_encoder.state_dict(), "other.safetensors")}
    for place in (folder, saved, saved / "data"):
        for name in ("evil.py", "modeling.py", "__init__.py", f"{saved.name}.py", "value_encoder.py"):
            (place / name).write_text(code)
        (place / "config.json").write_text(json.dumps(planted))
        (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in ("preprocessor_config.json", "tokenizer_config.json", "processor_config.json"):
            (place / name).write_text(json.dumps({"auto_map": auto_map}))
    loaded = MemoryBank.from_pretrained(saved)
    loaded.search(unit(1, 16), 3)
    expected = bank.value_encoder.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.value_encoder.state_dict().items())
    assert loaded.value_encoder.config.settings == bank.value_encoder.config.settings
    assert not any(parameter.requires_grad for parameter in loaded.value_encoder.parameters())
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        datasets.load_dataset(str(saved), cache_dir=str(tmp_path / "datasets"), trust_remote_code=True)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_latents": 10**12},
        {"num_self_attends_per_block": 60_000},
        {"d_model": "16"},
        {"d_model": True},
        {"qk_channels": 0},
        {"latent_dim": 6, "v_channels": 6},
        {"image_input": "../.."},
        {"num_vision_tokens": None},
        {"num_vision_tokens": 17},
    ],
)
def test_value_encoders_of_other_sizes_are_refused(changes, saved):
    config = json.loads((saved / "bank_config.json").read_text())
    edit_config(saved, value_encoder={**config["value_encoder"], **changes})
    message = r"model.safetensors does not hold this bank's value encoder \(\w+: |value_encoder\.\w+ is .*, expected"
    with pytest.raises(ValueError, match=f"{saved}.*({message})"):
        MemoryBank.from_pretrained(saved).value_encoder  # noqa: B018


def test_no_such_bank(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "nothing"), "org/missing"):
        with pytest.raises(OSError, match=f"'{name}' at revision main could not be downloaded.*it is no local folder"):
            MemoryBank.from_pretrained(name)


def test_missing_packages(saved, monkeypatch):
    monkeypatch.setattr(bank_storage, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu pyarrow"):
        MemoryBank.from_pretrained(saved)


def test_source_id_is_of_the_pixels(tmp_path):
    image = noise(0)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    names = {image_source_id(i) for i in (image, tmp_path / "a.png", str(tmp_path / "b.bmp"), image.convert("RGBA"))}
    assert names == {image_source_id({"bytes": (tmp_path / "a.png").read_bytes(), "path": None})}
    assert len(names.pop()) == 32
    assert image_source_id(image.rotate(90, expand=True)) != image_source_id(image) != image_source_id(noise(1))
    clear = load_image(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)
    assert file_sha256(tmp_path / "a.png") != file_sha256(tmp_path / "b.bmp")
