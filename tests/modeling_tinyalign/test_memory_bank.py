"""A bank: built, changed, saved, loaded, and asked by models of its tower and of others."""

import copy
import os
import pickle
import re
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from banks import (
    NUM_ROWS,
    features_of,
    noise,
)
from huggingface_hub import constants
from isolation import set_hf_home
from PIL import Image
from torch.nn import functional as F

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_arrays
from tinyalign_vlm.modeling_tinyalign.bank_format import (
    BankHashes,
    CalibrationConfig,
)
from tinyalign_vlm.modeling_tinyalign.key_encoder import attention_pool, tower_name
from tinyalign_vlm.modeling_tinyalign.row_encoder import image_source_id


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
    assert len(bank) == NUM_ROWS and bank.left_out == []


def test_build_from_hub_dataset_and_cached_features(bank, dataset, model, processor, value_encoder):
    table = datasets.Dataset.from_list(
        dataset,
        features=datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string"), "licence": datasets.Value("string")}
        ),
    )
    for source in (table, table.to_iterable_dataset()):
        other = MemoryBank.build(source, model, processor, value_encoder, keep_columns=["licence"], batch_size=4)
        assert other.config.sha256 == bank.config.sha256
    features = features_of([row["image"] for row in dataset], model, processor)
    other = MemoryBank.build(
        iter(dataset), model, processor, value_encoder, batch_size=4, thumbnail_size=None, vision_features=features
    )
    torch.testing.assert_close(other.encode_queries(features), bank.encode_queries(features), atol=1e-4, rtol=0)
    assert other.thumbnail(0) is None
    for other in (features[1:], torch.cat([features, features[:1]])):
        with pytest.raises(
            ValueError, match=f"vision_features has {len(other)} rows, but there are {NUM_ROWS} images"
        ):
            MemoryBank.build(dataset, model, processor, value_encoder, vision_features=other)


def test_a_bank_of_one_row_grows(dataset, model, processor, value_encoder):
    """A single row is its own mean: were it taken away, its key would be 0 for ever."""
    bank = MemoryBank.build(dataset[:1], model, processor, value_encoder, keep_columns=["licence"])
    bank = bank.add(dataset[1:3], model, processor)
    queries = bank.encode_queries(features_of([row["image"] for row in dataset[:3]], model, processor))
    scores, ids = bank.search(queries, 1)
    assert ids.flatten().tolist() == [0, 1, 2]
    torch.testing.assert_close(scores, torch.ones(3, 1), atol=1e-4, rtol=0)


def test_build_leaves_the_models_alone(model, processor, value_encoder, dataset):
    model.train()
    modes = [part.training for part in model.modules()]
    bank = MemoryBank.build(dataset, model, processor, value_encoder)
    assert [part.training for part in model.modules()] == modes
    model.eval()
    assert all(parameter.requires_grad for parameter in value_encoder.parameters())
    assert bank.value_encoder is not value_encoder


def test_whitened_bank(dataset, model, processor, value_encoder, tmp_path):
    bank = MemoryBank.build(dataset, model, processor, value_encoder, whiten_dim=5)
    bank.save_pretrained(tmp_path / "bank")
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    features = features_of([row["image"] for row in dataset], model, processor)
    assert loaded.config.key_dim == 5
    assert loaded.search(loaded.encode_queries(features), 1)[1].flatten().tolist() == list(range(NUM_ROWS))
    with pytest.raises(ValueError, match="whiten_dim is 10, but 10 rows of 16-wide keys have at most 9"):
        MemoryBank.build(dataset, model, processor, value_encoder, whiten_dim=10)


@pytest.mark.parametrize("whiten_dim", [None, 5])
def test_key_grid(whiten_dim, dataset, model, processor, value_encoder, tmp_path, monkeypatch):
    bank = MemoryBank.build(dataset, model, processor, value_encoder, key_grid=2, whiten_dim=whiten_dim, batch_size=4)
    bank.save_pretrained(tmp_path / "bank")
    set_hf_home(monkeypatch, tmp_path / "another_home")
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    assert loaded.config.key_encoder.grid == loaded.key_encoder.grid == 2
    assert loaded.probe_keys.shape == (4, 64) and loaded.config.key_dim == (whiten_dim or 64)
    features = features_of([row["image"] for row in dataset], model, processor)
    raw = attention_pool(features, grid=2)
    torch.testing.assert_close(loaded.key_encoder.mean, raw.mean(0), atol=1e-5, rtol=1e-4)
    scores, ids = loaded.search(loaded.encode_queries(features), 1)
    assert ids.flatten().tolist() == list(range(NUM_ROWS))
    torch.testing.assert_close(scores, torch.ones(NUM_ROWS, 1), atol=1e-4, rtol=0)
    loaded.check_probes(model)
    bigger = loaded.add([noise(50)], model, processor, captions=["another"])
    assert bigger.search(bigger.encode_queries(features_of([noise(50)], model, processor)), 1)[1].item() == NUM_ROWS


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


def test_add_one(bank, model, processor, tmp_path):
    noise(100).save(tmp_path / "new.png")
    for image in (noise(100), str(tmp_path / "new.png")):
        bigger = bank.add(image, model, processor, captions="a new one")
        assert bigger.captions == [*bank.captions, "a new one"]
        assert bigger.rows([NUM_ROWS])[0]["licence"] is None  # a column that the bank keeps
    for wrong in ({"captions": ["one"]}, {"captions": ["one", "two"], "vision_features": np.zeros((1, 16, 16))}):
        with pytest.raises(ValueError, match="has 1 rows, but there are 2 images: pass one for each"):
            bank.add([noise(100), noise(101)], model, processor, **wrong)


def test_from_dataset_deletes_rows(bank, saved, tmp_path):
    table = datasets.load_dataset(str(saved), split="train", cache_dir=str(tmp_path))
    smaller = MemoryBank.from_dataset(table.filter(lambda row: row["id"] != 4), like=saved)
    assert smaller.captions == bank.captions[:4] + bank.captions[5:]
    assert MemoryBank.from_dataset(table, saved, None, True).config.quantized
    torch.testing.assert_close(smaller.gather([4]), bank.gather([5]))


def test_no_row(bank):
    """-1 is no row, and not the last one."""
    with pytest.raises(ValueError, match="Row 1 of the ids is -1, which has no key"):
        bank.keys([0, -1])
    assert bank.thumbnail(-1) is None and bank.rows([-1]) == [None]
    assert len(bank.remove(np.int64(2))) == len(bank) - 1
    with pytest.raises(ValueError, match=r"The columns are \['a'\], expected those of a bank"):
        MemoryBank.from_dataset(datasets.Dataset.from_dict({"a": [1]}), like=bank)


CALIBRATION = CalibrationConfig(top_k=2, num_rows=NUM_ROWS, right=[-4.0, 8.0, -20.0, 2.0], none=[3.0, -6.0, 0.0, -1.0])


def test_a_calibration_stays_with_the_rows(bank, tmp_path, model, processor, caplog):
    calibrated = bank.with_calibration(CALIBRATION)
    assert bank.config.calibration is None
    calibrated.save_pretrained(tmp_path / "bank")
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    assert loaded.config.calibration == CALIBRATION and not loaded.config.is_calibration_stale
    assert loaded.remove(0).config.calibration == CALIBRATION
    assert loaded.shuffled().config.calibration is None
    rows = [{"image": noise(90 + row), "caption": "new", "licence": "cc0"} for row in range(6)]
    five = loaded.add(rows[:5], model, processor)
    assert five.config.calibration == CALIBRATION and not five.config.is_calibration_stale and not caplog.records
    six = five.add(rows[5:], model, processor)
    assert six.config.is_calibration_stale
    assert "The bank of 16 rows was calibrated with 10: that no neighbour is right" in caplog.text
    six.save_pretrained(tmp_path / "grown")
    assert MemoryBank.from_pretrained(tmp_path / "grown").config.is_calibration_stale


def test_shuffled(bank):
    control = bank.shuffled(seed=0)
    assert control.captions == bank.captions
    assert control.gather(range(NUM_ROWS)).equal(bank.gather(range(NUM_ROWS)))
    keys = torch.tensor(bank.key_array[:])
    found = control.search(keys, 1)[1].flatten()
    assert sorted(found.tolist()) == list(range(NUM_ROWS)) and not (found == torch.arange(NUM_ROWS)).any()
    assert bank.shuffled(seed=0).search(keys, 1)[1].flatten().equal(found)
    assert not bank.shuffled(seed=1).search(keys, 1)[1].flatten().equal(found)


def test_probes(bank, model, make_model, caplog):
    bank.check_probes(model)
    other = make_model(text="qwen2")  # the language model does not matter
    other.model.vision_tower = model.model.vision_tower
    bank.check_probes(other)
    assert "vision tower" not in caplog.text
    bank.check_probes(copy.deepcopy(model).bfloat16())
    assert re.search(r"tower is in bfloat16, and the cosine of its keys and the bank's is (0\.99|1\.00)", caplog.text)


def test_other_towers_are_refused(bank, make_model, model, processor):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.model.vision_tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ValueError, match=r"vision tower \S+, this model has \S+: .* cosine of their keys is -?0\.\d+"):
        bank.check_probes(other)
    with pytest.raises(ValueError, match=r"features 16 wide, which this model's .* does not take or make .*1280 wide"):
        bank.check_probes(make_model(vision="efficientnet"))
    with pytest.raises(ValueError, match="cosine"):
        bank.add([], other, processor)


def test_the_tower_of_the_current_folder_has_a_name(model, checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints["siglip"])
    monkeypatch.setattr(model.config.vision_config, "_name_or_path", ".")
    assert tower_name(model) == os.path.basename(checkpoints["siglip"])


def test_save_and_load(bank, saved, empty_cache, dataset, model, processor):
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert names == {
        "bank_config.json",
        "card_facts.json",
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
    sha256 = {name: vars(loaded.config.sha256)[name] for name in ("keys", "values", "rows")}
    assert replace(loaded.config, num_shards=0, sha256=BankHashes(**sha256)) == bank.config
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


def test_copies_share_the_files(bank):
    queries = torch.tensor(bank.key_array[:])
    assert "values" not in pickle.loads(pickle.dumps(bank)).__dict__
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert other.search(queries, 2)[1].equal(bank.search(queries, 2)[1])
        assert other.gather([1]).equal(bank.gather([1]))
    assert len(pickle.dumps(bank)) < 200_000
    assert not bank.key_array.flags.writeable, "mapped, not read"


def test_no_such_bank(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "nothing"), "org/missing"):
        with pytest.raises(OSError, match=f"'{name}' at revision main could not be downloaded.*it is no local folder"):
            MemoryBank.from_pretrained(name)


def test_missing_packages(saved, monkeypatch):
    monkeypatch.setattr(bank_arrays, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu pyarrow"):
        MemoryBank.from_pretrained(saved)


def test_adding_what_is_there(bank, dataset, model, processor):
    new = [dataset[3], {**dataset[0], "image": noise(100)}, {**dataset[0], "image": noise(100)}]
    bigger = bank.add(new, model, processor)
    assert len(bigger) == NUM_ROWS + 1 and bigger.config.num_left_out == 2
    assert [(row.row, row.reason.split(":")[0]) for row in bigger.left_out] == [(0, "duplicate"), (2, "duplicate")]
    assert len(bank.add(new, model, processor, keep_duplicates=True)) == NUM_ROWS + 3
    assert bank.add(dataset, model, processor).captions == bank.captions


def test_building_needs_the_package(dataset, model, processor, value_encoder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tinyalign_vlm.training.bank.build", None)
        with pytest.raises(ImportError, match="import of tinyalign_vlm.training.bank.build halted"):  # another cause
            MemoryBank.build(dataset, model, processor, value_encoder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tinyalign_vlm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [])  # nothing can be found
    with pytest.raises(ImportError, match="Building a memory bank needs the package: pip install tinyalign-vlm"):
        MemoryBank.build(dataset, model, processor, value_encoder)


@pytest.mark.parametrize(
    "call",
    [
        lambda bank, model, processor: MemoryBank.from_pretrained(None),
        lambda bank, model, processor: bank.save_pretrained(3),
        lambda bank, model, processor: MemoryBank.build(None, model, processor),
        lambda bank, model, processor: MemoryBank.build(model, processor, bank),
        lambda bank, model, processor: bank.add(Image.new("RGB", (8, 8)), model, processor),
        lambda bank, model, processor: bank.search("red", 2),
        lambda bank, model, processor: bank.search(None, 2),
        lambda bank, model, processor: bank.gather(None),
        lambda bank, model, processor: bank.ids_of(3),
        lambda bank, model, processor: bank.ids_of(None),
    ],
)
def test_the_wrong_kind_of_thing(call, bank, model, processor):
    with pytest.raises(TypeError, match=r"^\w.* (is|are) .*expected"):
        call(bank, model, processor)


@pytest.mark.parametrize("wrong", [None, "red", [1.0], Image.new("RGB", (8, 8)), torch.zeros(3)])
def test_things_that_are_no_features(wrong, bank):
    with pytest.raises(ValueError, match=r"vision_features is .*, expected a tensor \(images, tokens, width\)"):
        bank.encode_queries(wrong)
