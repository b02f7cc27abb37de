"""Baselines of the paper: the same run, with the option `baseline` set."""

import datasets
from transformers import ProcessorMixin

from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.stage import StageArguments
from ..data.collator import TrainingCollator
from ..data.memory_dropout import MemoryDropout
from ..models import neighbours_of_baseline


def with_static_captions(
    config: StageArguments, processor: ProcessorMixin, rows: datasets.Dataset, bank: MemoryBank
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
