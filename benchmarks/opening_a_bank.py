"""
How long a process waits for a memory bank: the first load, which checks the rows and builds the index, and later ones.

    python benchmarks/opening_a_bank.py

100,000 rows, values of 32 x 96, keys of 1,152 (SigLIP so400m), thumbnails; numbers are random, 4 GB of disk are used.
Seconds are counted after the imports; every load is a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from PIL import Image
from transformers import LlamaConfig, SiglipImageProcessorPil, SiglipVisionConfig

from tinyalign_vlm import MemoryBank, TinyAlignConfig, TinyAlignModel, ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.modeling_tinyalign.bank_arrays import QUANTIZED_ROWS
from tinyalign_vlm.modeling_tinyalign.bank_format import BATCH_ROWS, list_column
from tinyalign_vlm.processing.images import decode_image

LOAD = """
import sys, time
import faiss, numpy as np, pyarrow.parquet
from tinyalign_vlm import MemoryBank

query = np.random.default_rng(0).standard_normal((1, 1152), dtype=np.float32)
start = time.perf_counter()
bank = MemoryBank.from_pretrained(sys.argv[1])
opened = time.perf_counter()
_, ids = bank.search(query, 5)
bank.gather(ids), bank.rows(ids)
print(f"| {len(bank):,} | {opened - start:.2f} | {time.perf_counter() - opened:.2f} |")
"""


def small_bank() -> MemoryBank:
    """Four rows made with a SigLIP tower of one layer, for its encoders."""
    vision = SiglipVisionConfig(hidden_size=1152, intermediate_size=64, num_hidden_layers=1, image_size=32)
    text = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = TinyAlignConfig(
        vision_config=vision, text_config=text, image_token_id=7, image_seq_length=4, vision_feature_layer=-1
    )
    pixels = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor = SimpleNamespace(image_processor=pixels, decode_image=decode_image)
    rows = [{"image": Image.new("RGB", (64, 64), (60 * i, 0, 0)), "caption": f"red {i}"} for i in range(4)]
    value_encoder = ValueEncoder(ValueEncoderConfig(num_vision_tokens=4))
    return MemoryBank.build(rows, TinyAlignModel(config).eval(), processor, value_encoder)


def random_rows(like: MemoryBank, num_rows: int) -> Iterator[pa.RecordBatch]:
    random, (example,) = np.random.default_rng(0), like.table.slice(0, 1).to_pylist()
    for start in range(0, num_rows, BATCH_ROWS):
        size = min(BATCH_ROWS, num_rows - start)
        keys = random.standard_normal((size, like.config.key_dim), dtype=np.float32)
        columns = {
            "id": pa.array(range(start, start + size), pa.int64()),
            "source_id": pa.array([f"{row:032x}" for row in range(start, start + size)]),
            "caption": pa.array([f"a caption of some length, number {row}" for row in range(start, start + size)]),
            "key": list_column(keys / np.linalg.norm(keys, axis=1, keepdims=True)),
            "value": list_column(
                random.standard_normal((size, like.config.value_size), np.float32).astype(np.float16)
            ),
            "thumbnail": pa.array([example["thumbnail"]] * size, like.table.schema.field("thumbnail").type),
        }
        yield pa.record_batch(columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        bank = small_bank()
        start = time.perf_counter()
        bank = bank.with_rows(random_rows(bank, rows), quantized=rows > QUANTIZED_ROWS)
        bank.save_pretrained(Path(folder, "bank"))
        size = sum(path.stat().st_size for path in Path(folder, "bank").rglob("*")) / 1e9
        print(f"{size:.2f} GB, made and saved in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        print("| rows | opened, s | first search, s |\n|---|---|---|")
        environment = {**os.environ, "HF_HOME": str(Path(folder, "home"))}
        for _ in range(3):
            subprocess.run([sys.executable, "-c", LOAD, Path(folder, "bank")], env=environment, check=True)


if __name__ == "__main__":
    main()
