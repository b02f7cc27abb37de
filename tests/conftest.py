"""Tiny random towers, language models and a tokenizer, built offline and shared by all tests."""

# Before anything that reads the environment.
import isolation

# isort: split
import gc
import os
import shutil
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    EfficientNetConfig,
    EfficientNetImageProcessorPil,
    EfficientNetModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinyalign_vlm import TinyAlignForConditionalGeneration, TinyAlignProcessor

pytest_plugins = ["hub.fixtures"]  # of tests/hub and tests/training/hub
torch.set_num_threads(1)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # not 5 s after each epoch of streamed rows


def pytest_collection_finish():
    """Leave what imports and collection have made out of garbage collections, of which each training makes several."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session):
    """Fail a run that wrote into the user's folders, or into the working tree."""
    result = yield
    if isolation.written_elsewhere():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return result


def pytest_terminal_summary(terminalreporter):
    if paths := isolation.written_elsewhere():
        terminalreporter.section("written elsewhere", red=True)
        terminalreporter.line(isolation.complaint(paths))


IMAGE_SIZE = 32
CORPUS = ["a red square on a white background", "what is in the image? a blue circle.", "user assistant system"]


def build_tokenizer(chatml: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on three sentences, with ChatML's tokens or just `</s>`."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chatml else ["<pad>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[-1], padding_side="left"
    )


VISION_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
TEXT_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DUAL_TEXT_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def build_tower(name: str) -> torch.nn.Module:
    if name == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**VISION_SIZES))
    if name == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**VISION_SIZES))
    if name == "siglip-dual":
        return SiglipModel(SiglipConfig(vision_config=VISION_SIZES, text_config=DUAL_TEXT_SIZES))
    if name == "clip-dual":
        return CLIPModel(CLIPConfig(vision_config=VISION_SIZES, text_config=DUAL_TEXT_SIZES))
    config = EfficientNetConfig(
        image_size=IMAGE_SIZE,
        hidden_dim=1280,
        in_channels=[32, 16],
        out_channels=[16, 24],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 2],
        num_hidden_layers=8,
        width_coefficient=1.0,
        depth_coefficient=1.0,
    )
    return EfficientNetModel(config)


def build_image_processor(name: str):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if name.startswith("clip"):
        return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    if name.startswith("siglip"):
        return SiglipImageProcessorPil(size=size)
    return EfficientNetImageProcessorPil(size=size)


def build_language_model(name: str) -> torch.nn.Module:
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**TEXT_SIZES, tie_word_embeddings=True))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**{**TEXT_SIZES, "vocab_size": 320}))
    model = PhiForCausalLM(PhiConfig(**TEXT_SIZES))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


TOWERS = ("siglip", "clip", "siglip-dual", "clip-dual", "efficientnet")
LANGUAGE_MODELS = ("llama", "qwen2", "phi")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Folders of the tiny towers and language models, by name."""
    torch.manual_seed(0)
    folders = {}
    for name in TOWERS:
        folders[name] = str(tmp_path_factory.mktemp(name))
        build_tower(name).save_pretrained(folders[name])
        build_image_processor(name).save_pretrained(folders[name])
    for name in LANGUAGE_MODELS:
        folders[name] = str(tmp_path_factory.mktemp(name))
        build_language_model(name).save_pretrained(folders[name])
        build_tokenizer(chatml=name != "phi").save_pretrained(folders[name])
    return folders


SMALL = {"memory_tokens": 3, "latent_dim": 5, "memory_top_k": 2, "memory_input": "latents", "memory_scores": False}


@pytest.fixture(scope="session")
def make_model(checkpoints):
    """`make_model(vision, text, **config)` -> a new tiny model, always with the same weights."""

    def make(vision: str = "siglip", text: str = "llama", **config) -> TinyAlignForConditionalGeneration:
        torch.manual_seed(0)
        model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
            checkpoints[vision], checkpoints[text], **{**SMALL, **config}
        )
        for parameter in model.parameters():  # tiny standard deviations would hide mistakes
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_processor(checkpoints):
    """`make_processor(model, vision, text)` -> the processor of a model from `make_model`."""

    def make(model, vision: str = "siglip", text: str = "llama") -> TinyAlignProcessor:
        return TinyAlignProcessor.from_vision_text_pretrained(checkpoints[vision], checkpoints[text], model.config)

    return make


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Six plain images of different colours and sizes."""
    colours = ["red", "green", "blue", "white", "black", "yellow"]
    return [Image.new("RGB", (40 + 3 * i, 50), colour) for i, colour in enumerate(colours)]


@pytest.fixture(scope="module")
def model(make_model) -> TinyAlignForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="module")
def processor(make_processor, model) -> TinyAlignProcessor:
    return make_processor(model)


@pytest.fixture
def make_disk(tmp_path):
    """`make_disk(size)` -> the folder of a new file system, of "2m" say."""
    disk = tmp_path / "disk"

    def make(size: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs Linux and root")
        return disk

    yield make
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a bank that was mapped there may still be
