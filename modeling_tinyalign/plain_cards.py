"""README.md of a model or a bank that is pushed without a card: what its config says, and no blanks."""

from transformers import PreTrainedConfig

MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [{tags}]
{datasets}---

# {name}

A [TinyAlign](https://arxiv.org/abs/2505.12884) model of {vision} and {text}. {memory}

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{repo_id}", trust_remote_code=True)
```
"""
# Without `configs` the Hub's viewer and `load_dataset` would have to guess what the files are.
BANK_CARD = """---
tags: [tinyalign, memory-bank]
configs:
- config_name: default
  data_files:
  - split: train
    path: {shards}
---

# {name}

A memory bank of {num_rows} rows for [TinyAlign](https://arxiv.org/abs/2505.12884) models whose vision tower is
{tower}. The rows are a dataset, `load_dataset("{repo_id}", split="train")`; a model retrieves from them after
`model.attach_memory_bank("{repo_id}")`.
"""


def model_card(repo_id: str, config: PreTrainedConfig, tags: list[str]) -> str:
    vision, text = (
        (part._name_or_path or part.model_type) + (f" at `{revision}`" if revision else "")
        for part, revision in (
            (config.vision_config, config.vision_model_revision),
            (config.text_config, config.language_model_revision),
        )
    )
    memory, bank = "It has no memory.", config.memory_bank
    if config.memory_top_k > 0:
        source = f"`{bank}` at `{config.memory_bank_revision}`" if bank else "the bank that is attached"
        memory = f"For every image it retrieves {config.memory_top_k} training examples from {source}."
    return MODEL_CARD.format(
        tags=", ".join(dict.fromkeys(["tinyalign", "custom_code", *tags])),
        datasets=f"datasets: [{bank}]\n" if bank else "",
        name=repo_id.split("/")[-1],
        vision=vision,
        text=text,
        memory=memory,
        repo_id=repo_id,
    )


def bank_card(repo_id: str, config: dict, shards: str) -> str:
    """`config` is that of bank_config.json, `shards` the pattern of the Parquet files."""
    return BANK_CARD.format(
        shards=shards,
        name=repo_id.split("/")[-1],
        num_rows=config["num_rows"],
        tower=config["tower"]["name"],
        repo_id=repo_id,
    )
