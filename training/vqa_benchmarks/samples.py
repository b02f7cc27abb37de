"""Answers on disk: a Parquet file for each variant and benchmark, with what it is of in its metadata."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.neighbours import write_parquet

FACTS = b"tinyalign"  # key of the metadata
NEIGHBOUR = pa.struct(
    [("image", pa.int64()), ("source_id", pa.string()), ("caption", pa.string()), ("score", pa.float64())]
)
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("question_id", pa.string()),
        ("unit", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("target", pa.string()),
        ("score", pa.float64()),
        ("images", pa.list_(pa.string())),  # their source_id
        ("too_long", pa.bool_()),  # the prompt leaves no room in the model's context
        ("in_bank", pa.bool_()),  # the bank has one of the images, pixel for pixel
        ("neighbours", pa.list_(NEIGHBOUR)),
    ]
)


def samples_path(output: Path, variant: str, benchmark: str) -> Path:
    """Return the file of a variant's answers to a benchmark."""
    return output / "samples" / file_name(variant) / f"{benchmark}.parquet"


def file_name(variant: str) -> str:
    """Return a variant's name as one of a file."""
    return re.sub(r"[^\w.-]+", "-", variant)


def save_samples(path: Path, samples: list[dict], facts: dict):
    """Write the samples of a variant's answers to a benchmark, whole or not at all."""
    table = pa.Table.from_pylist(samples, SCHEMA).replace_schema_metadata({FACTS: json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(table, path)


def read_sample_facts(path: Path) -> dict:
    """Return the facts that [`save_samples`] wrote; `ValueError` for a file of something else."""
    try:
        return json.loads(pq.read_schema(path).metadata[FACTS])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is none of `tinyalign evaluate`, expected its answers: move it away.") from error


def is_answered(path: Path, facts: dict, count: int) -> bool:
    """Return whether a file has the answers of these weights with this bank to these questions, `count` of them."""
    keys = ("weights", "bank_rows", "memory", "questions")
    if not path.exists() or pq.read_metadata(path).num_rows != count:
        return False
    return all(read_sample_facts(path)[key] == facts[key] for key in keys)
