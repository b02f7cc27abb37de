"""Cached features."""

import io
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from isolation import set_hf_home
from PIL import Image

from tinyalign_cli.main import main
from tinyalign_vlm import TinyAlignForConditionalGeneration, TinyAlignProcessor
from tinyalign_vlm.training.data import features as module
from tinyalign_vlm.training.data import shared_array
from tinyalign_vlm.training.data.features import cache_vision_features


@pytest.fixture
def forward_passes(monkeypatch):
    """The numbers of images that went through the tower: first one, for the shape of its features."""
    calls = []
    original = module.feature_batches

    def batches(*args):
        for start, features in original(*args):
            calls.append(len(features))
            yield start, features

    monkeypatch.setattr(module, "feature_batches", batches)
    return calls


def test_features_are_computed_once(model, processor, images, dataset, features, tmp_path, forward_passes):
    found = cache_vision_features(model, processor, images, tmp_path / "a" / "features", batch_size=5)
    assert isinstance(found, np.memmap) and found.dtype == np.float16 and forward_passes == [1, 5, 5, 2]
    np.testing.assert_allclose(found, features, rtol=1e-3, atol=1e-3)
    again = cache_vision_features(model, processor, images, tmp_path / "a" / "features", batch_size=3)
    assert np.array_equal(found, again) and len(forward_passes) == 4
    of_column = cache_vision_features(model, processor, dataset["image"], tmp_path / "b")
    assert np.array_equal(found, of_column)
    assert len(list(tmp_path.glob("b-*.npy"))) == 1 and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("change", ["image", "order", "tower", "preprocessing"])
def test_a_changed_input_is_computed_anew(change, make_model, make_processor, images, tmp_path, forward_passes):
    model, images = make_model(), list(images[:4])
    processor = make_processor(model)
    cache_vision_features(model, processor, images, tmp_path / "features")
    if change == "image":
        images[2] = images[2].transpose(0)
    elif change == "order":
        images.reverse()
    elif change == "tower":
        next(model.model.vision_tower.parameters()).data.mul_(1.5)
    else:
        processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    found = cache_vision_features(model, processor, images, tmp_path / "features")
    assert forward_passes == [1, 4, 1, 4]
    pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(found, model.get_vision_features(pixel_values).numpy(), rtol=1e-3, atol=1e-3)


def test_the_next_stage_finds_the_features(make_model, make_processor, images, tmp_path, forward_passes):
    """Its model and processor are saved ones, those of the first were composed."""
    model = make_model()
    processor = make_processor(model)
    cache_vision_features(model, processor, images[:4], tmp_path / "features")
    model.save_pretrained(tmp_path / "stage1")
    processor.save_pretrained(tmp_path / "stage1")
    model = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "stage1")
    processor = TinyAlignProcessor.from_pretrained(tmp_path / "stage1")
    cache_vision_features(model, processor, images[:4], tmp_path / "features")
    assert forward_passes == [1, 4]


def test_goes_on_where_it_was_killed(model, processor, images, tmp_path, forward_passes, monkeypatch):
    whole = cache_vision_features(model, processor, images, tmp_path / "whole")
    forward_passes.clear()
    monkeypatch.setattr(shared_array, "PART_IMAGES", 5)
    original = module.read_image

    def killed(images, index):
        if index == 8:
            raise KeyboardInterrupt
        return original(images, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "read_image", killed)
        cache_vision_features(model, processor, images, tmp_path / "features", batch_size=3)
    assert forward_passes == [1, 3, 2, 3] and not list(tmp_path.glob("features*.npy"))
    found = cache_vision_features(model, processor, images, tmp_path / "features", batch_size=3)
    assert forward_passes == [1, 3, 2, 3, 1, 3, 2, 2] and np.array_equal(found, whole)
    assert [path.suffix for path in sorted(tmp_path.glob("features*"))] == [".lock", ".npy"]


def test_killed_when_all_was_written(model, processor, images, tmp_path, forward_passes):
    whole = cache_vision_features(model, processor, images, tmp_path / "features")
    (complete,) = tmp_path.glob("*.npy")
    complete.rename(complete.with_suffix(".partial"))
    assert np.array_equal(cache_vision_features(model, processor, images, tmp_path / "features"), whole)
    assert forward_passes == [1, 8, 4, 1]


@pytest.mark.parametrize("size", [0, 5, 200])
def test_a_cut_file_is_begun_anew(size, model, processor, images, tmp_path):
    whole = cache_vision_features(model, processor, images, tmp_path / "features")
    (complete,) = tmp_path.glob("*.npy")
    complete.with_suffix(".partial").write_bytes(complete.read_bytes()[:size])
    complete.unlink()
    assert np.array_equal(cache_vision_features(model, processor, images, tmp_path / "features"), whole)


PROCESSES = """
import pickle
from pathlib import Path
from accelerate import PartialState
from tinyalign_vlm import TinyAlignForConditionalGeneration
from tinyalign_vlm.training.data import features as module
from tinyalign_vlm.training.data import shared_array

state = PartialState(cpu=True)
shared_array.PART_IMAGES = 5
read_image, read = module.read_image, []
module.read_image = lambda images, index: read.append(index) or read_image(images, index)
processor, images = pickle.loads(Path("inputs.pkl").read_bytes())
model = TinyAlignForConditionalGeneration.from_pretrained("model")
found = module.cache_vision_features(model, processor, images, "features", batch_size=3)
Path(f"{state.process_index}.pkl").write_bytes(pickle.dumps((read, found[:])))
"""


def test_processes_share_the_work(model, processor, images, tmp_path):
    whole = cache_vision_features(model, processor, images, tmp_path / "whole")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "inputs.pkl").write_bytes(pickle.dumps((processor, images)))
    (tmp_path / "script.py").write_text(PROCESSES)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, *launcher, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    read, found = zip(*(pickle.loads((tmp_path / f"{number}.pkl").read_bytes()) for number in range(2)), strict=True)
    assert read == ([0, *range(5), 10, 11], [0, *range(5, 10)])
    for features in found:
        np.testing.assert_allclose(features, whole, rtol=1e-3, atol=1e-3)


def test_bad_images_are_named_and_none_is_refused(model, processor, images, tmp_path):
    buffer = io.BytesIO()
    images[0].save(buffer, "PNG")
    with pytest.raises(ValueError, match="Image 1: the image cannot be read"):
        cache_vision_features(model, processor, [images[0], buffer.getvalue()[:60]], tmp_path / "features")
    with pytest.raises(ValueError, match="no images"):
        cache_vision_features(model, processor, [], tmp_path / "features")


def test_features_are_kept_for_other_runs(files, monkeypatch):
    monkeypatch.chdir(files)
    set_hf_home(monkeypatch, files / "home")
    calls, compute = [], module._compute
    monkeypatch.setattr(module, "_compute", lambda *arguments: calls.append(1) or compute(*arguments))
    losses = []
    for name, cached in (("a", "True"), ("b", "True"), ("c", "False")):
        main(["train", "stage1.yaml", "--output_dir", name, "--cache_features", cached])
        state = json.loads((files / name / "checkpoint-2/trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert calls == [1] and len(list((files / "home/tinyalign/features").glob("vision-*.npy"))) == 1
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-3)


def test_augmented_images_have_no_features(make_model, processor, dataset, tmp_path):
    augmented = dataset.with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match="The data set has a transform"):
        cache_vision_features(make_model(), processor, augmented["image"], tmp_path / "features")


def test_features_that_the_disk_has_no_room_for(make_model, processor, images, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_array.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="Vision features: 12 images take 0.0 GB, but .* has 0.0 GB left"):
        module.cache_vision_features(make_model(), processor, images, tmp_path / "features")


def test_the_number_of_images_is_said_first(model, processor, images, tmp_path, capsys):
    cache_vision_features(model, processor, images[:4], tmp_path / "features", batch_size=4)
    assert "Vision features: 4 images." in capsys.readouterr().out


def test_pictures_that_differ_in_their_palettes_are_two(model, processor, images):
    first = images[0].convert("P", palette=Image.Palette.ADAPTIVE)
    other = first.copy()
    other.putpalette(other.getpalette()[::-1])
    assert module.fingerprint_images(model, processor, [first]) != module.fingerprint_images(model, processor, [other])
