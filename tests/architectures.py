"""The real sizes of the recipes' models, from their config.json on the Hub; weights are random in tests."""

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

TOWERS = {
    "google/siglip-so400m-patch14-384": (
        SiglipVisionConfig,
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    ),
    "openai/clip-vit-large-patch14-336": (
        CLIPVisionConfig,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
    ),
}
LANGUAGE_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen2-0.5B": (
        Qwen2Config,
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        LlamaConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
        },
    ),
    "microsoft/phi-2": (
        PhiConfig,
        {
            "vocab_size": 51200,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    "Qwen/Qwen2.5-3B": (
        Qwen2Config,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
}
CHATML = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2-0.5B", "Qwen/Qwen2.5-3B")


def image_processor(tower: str, size: int):
    """The tower's preprocessing, to another size."""
    square = {"height": size, "width": size}
    if tower.startswith("google"):
        return SiglipImageProcessorPil(size=square)
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
