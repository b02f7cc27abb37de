"""What TinyAlign is compared with in the paper: the same run, with the option `baseline` set."""

import datasets
from transformers import PreTrainedModel, ProcessorMixin

from ..modeling_tinyalign.configuration_tinyalign import TinyAlignConfig
from ..modeling_tinyalign.connectors import Connector
from ..modeling_tinyalign.memory_bank import MemoryBank
from .arguments import RunArguments
from .data import TrainingCollator
from .memory_dropout import MemoryDropout


def model_fields(config: RunArguments) -> dict:
    """The fields of [`TinyAlignConfig`] to set in a run's model: `model_kwargs`, and what its baseline changes."""
    fields = dict(config.model_kwargs or {})
    if config.baseline == "text_rag":
        fields["prompt_captions"] = neighbours_of_baseline(config)
    if config.baseline in ("static_rag", "text_rag") or (config.baseline and config.model):
        fields["memory_top_k"] = 0
    return fields


def neighbours_of_baseline(config: RunArguments) -> int:
    """Neighbours whose captions are written into a question: as many as TinyAlign would read latents of."""
    return (config.model_kwargs or {}).get("memory_top_k") or TinyAlignConfig().memory_top_k


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


def with_static_captions(
    config: RunArguments, processor: ProcessorMixin, rows: datasets.Dataset, bank: MemoryBank
) -> datasets.Dataset:
    """
    Static RAG (paper, Table 2, row 3): the captions of each row's neighbours are written into its question, once. The
    rest of the run is a baseline's, and so is inference.
    """
    captions = neighbours_of_baseline(config)
    writer = TrainingCollator(
        processor,
        bank=bank,
        max_length=config.max_length,
        dropout=MemoryDropout(0.0, captions),
        prompt_captions=captions,
    )
    rows = rows.map(lambda row: {"messages": writer.messages(row)}, desc="Writing captions")
    return rows.remove_columns(["memory_ids", "memory_scores", "source_ids"])
