"""What TinyAlign is compared with in the paper: the same run with one option, `baseline`, set."""

from collections.abc import Sequence

import datasets
from transformers import PreTrainedModel

from ..modeling_tinyalign.connectors import Connector
from ..modeling_tinyalign.memory_bank import MemoryBank
from ..processing.chat_templates import add_captions

BASELINES = ("no_memory", "wider_connector", "static_rag", "text_rag")


def widen_connector(model: PreTrainedModel):
    """
    Puts one connector in the place of connector and memory connector, wider, with as many parameters as both (to
    within those of one hidden unit): does the memory help, or do the parameters (paper, Table 2, row 2)?
    """
    base, config = model.base_model, model.config
    hidden_size = config.text_config.hidden_size
    added = sum(parameter.numel() for parameter in base.memory_connector.parameters())
    of_a_unit = config.vision_feature_size + 1 + hidden_size
    config.connector_size = (config.connector_size or hidden_size) + round(added / of_a_unit)
    config.memory_top_k = base._built_top_k = 0
    del base.memory_connector
    base.connector = Connector(
        config.vision_feature_size, config.connector_size, hidden_size, config.projector_hidden_act
    )
    base.connector.apply(model._init_weights)


def captions_of(bank: MemoryBank, memory_ids: Sequence) -> list[str]:
    """Captions of the neighbours of a row, `(k,)` or `(images, k)`, image by image; empty slots have none."""
    flat = [row for ids in memory_ids for row in (ids if isinstance(ids, Sequence) else [ids])]
    return [row["caption"] for row in bank.rows(flat) if row is not None]


def with_static_captions(rows: datasets.Dataset, bank: MemoryBank, top_k: int) -> datasets.Dataset:
    """
    Static RAG (paper, Table 2, row 3): the captions of each row's `top_k` neighbours are written into its question,
    once, and the rest of the run is a baseline's.
    """

    def write(row: dict) -> dict:
        ids = row["memory_ids"]
        nested = ids and isinstance(ids[0], list)
        nearest = [image[:top_k] for image in ids] if nested else ids[:top_k]
        return {"messages": add_captions(row["messages"], captions_of(bank, nearest))}

    return rows.map(write, desc="Writing captions").remove_columns(["memory_ids", "memory_scores"])
