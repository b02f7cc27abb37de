"""Ways to damage a file: bytes, JSON values, Parquet columns, tensors. All take and return the file's content."""

import io
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load, save

# What somebody could write where something else belongs.
NUMBERS = [0, 1, 2, 3, -1, 7, 64, 1024, 65_537, 10**9, 2**31, 2**63, 10**12, 10**30, 0.0, 0.5, -0.5, 1e-30, 1e30]
TEXTS = ["", "0", "x", "../../x", "/etc/passwd", "a\x00b", "\ud800", "a" * 5000, "0" * 64, "org/name--evil.Evil"]
WORDS = ["gelu", "relu", "vision", "language", "siglip_vision_model", "llama", "efficientnet"]
LISTS = [[], [[]], [0], [-1, 2, "x"], [3, 10**6, 10**6]]
OBJECTS = [{}, {"": None}, {"auto_map": {"AutoModel": "evil.Evil"}}, {"height": 10**9, "width": 10**9}]
VALUES = [None, True, False, float("nan"), float("inf"), *NUMBERS, *TEXTS, *WORDS, *LISTS, *OBJECTS]
NAMES = ["", "x", "auto_map", "trust_remote_code", "attn_implementation", "key", "sha256", "_name_or_path", "top_k"]
ARROW_TYPES = [
    pa.int64(),
    pa.int8(),
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.float64(),
    pa.float32(),
    pa.null(),
]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, left out, repeated or put in."""
    content = bytearray(data)
    place = rng.randrange(len(content) + 1)
    length = rng.choice([1, 2, 4, 8, 100, 1000])
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 3, 30])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        del content[place : place + length]
    elif kind == 3:
        content[place:place] = content[place : place + length]
    elif kind == 4:
        content[place:place] = rng.randbytes(length)
    else:
        content[place : place + length] = bytes([rng.choice([0, 255])]) * min(length, len(content) - place)
    return bytes(content)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON file made another one, or a key left out, renamed, added or there twice."""
    content = json.loads(data)
    places = [(content, key) for key in content]
    for parent, key in places:  # grows on the way
        child = parent[key]
        if isinstance(child, dict):
            places += [(child, inner) for inner in child]
        elif isinstance(child, list):
            places += [(child, index) for index in range(len(child))]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        parent, key = rng.choice(places)
        kind = rng.randrange(8)
        old = parent[key] if (key in parent if isinstance(parent, dict) else key < len(parent)) else None
        if kind == 0 and isinstance(parent, dict):
            parent.pop(key, None)
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(NAMES)] = parent.pop(key, None)
        elif kind == 2 and isinstance(old, dict):
            old[rng.choice(NAMES)] = rng.choice(VALUES)
        elif kind == 3 and type(old) in (int, float):
            parent[key] = rng.choice([old + 1, old - 1, -old, old * 2, old // 2, float(old), str(old)])
        elif kind == 4 and isinstance(old, str):
            parent[key] = rng.choice([old[:-1], old + "x", old.upper(), [old], old[::-1]])
        elif isinstance(parent, dict) or key < len(parent):
            parent[key] = rng.choice(VALUES)
    text = json.dumps(content)
    if rng.random() < 0.05:
        text = text.replace("{", '{"num_rows": 3, "num_rows": 4, ', 1)
    if rng.random() < 0.02:
        text = rng.choice(["[" * 200_000, '{"a":' * 50_000, "[]", "3", "null", "", "9" * 5000, f"[{text}]"])
    return text.encode("utf-8", "surrogatepass")


def change_parquet(data: bytes, rng: random.Random) -> bytes:
    """A column of a Parquet file with other values, of another type, missing or there twice; or another layout."""
    table = pq.read_table(io.BytesIO(data))
    name = rng.choice(table.column_names)
    place = table.column_names.index(name)
    column = table[name].combine_chunks()
    row = rng.randrange(len(table))
    kind = rng.choice(
        ["drop", "rename", "cast", "null", "value", "value", "value", "rows", "extra", "layout", "nested"]
    )
    options = {}
    try:
        if kind == "drop":
            table = table.drop_columns([name])
        elif kind == "rename":
            names = list(table.column_names)
            names[place] = rng.choice([*table.column_names, "x", ""])
            table = table.rename_columns(names)
        elif kind == "cast":
            table = table.set_column(place, name, column.cast(rng.choice(ARROW_TYPES), safe=False))
        elif kind == "null":
            column = pa.array([None if i == row else value for i, value in enumerate(column.to_pylist())], column.type)
            table = table.set_column(place, name, column)
        elif kind == "value":
            table = table.set_column(place, name, _with_other_value(column, row, rng))
        elif kind == "rows":
            rows = list(range(len(table)))
            rows = rng.choice([rows[::-1], rows[:-1], rows[1:], rows * 2, rows * 200, [], rng.sample(rows, len(rows))])
            table = table.take(pa.array(rows, pa.int64()))
        elif kind == "extra":
            table = table.append_column(rng.choice(["x", name, "key"]), pa.array(range(len(table))))
        elif kind == "nested":
            table = table.set_column(place, name, pa.array([[value] for value in column.to_pylist()]))
        else:
            options = {"row_group_size": rng.choice([1, 3, 10**6]), "use_dictionary": rng.random() < 0.5}
            options |= {"compression": rng.choice(["none", "zstd", "gzip"]), "store_schema": rng.random() < 0.7}
        file = io.BytesIO()
        pq.write_table(table, file, **options)
        return file.getvalue()
    except (pa.ArrowException, TypeError, OverflowError):  # it can't be changed or written so
        return damage_bytes(data, rng)


def _with_other_value(column: pa.Array, row: int, rng: random.Random) -> pa.Array:
    """One row of the column changed, within its type."""
    values = column.to_pylist()
    if pa.types.is_fixed_size_list(column.type):
        numbers = np.array(values, column.flatten().to_numpy().dtype)
        numbers[row, rng.randrange(numbers.shape[1])] = rng.choice([np.nan, np.inf, 6e4, -1, 0, 0.5])
        return pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])
    if pa.types.is_struct(column.type):
        values[row] = rng.choice(
            [
                {"bytes": b"", "path": None},
                {"bytes": None, "path": "/etc/passwd"},
                {"bytes": b"\x89PNG\r\n\x1a\n", "path": "x"},
            ]
        )
    elif pa.types.is_integer(column.type):
        values[row] = rng.choice([-1, 0, 1, 2**62, -(2**63)])
    else:
        values[row] = rng.choice(
            ["", "x", "../../x", "f" * 32, "0" * 31, "F" * 32, "a\x00b", "x" * 10**6, str(values[row])[::-1]]
        )
    return pa.array(values, column.type)


def change_tensors(data: bytes, rng: random.Random) -> bytes:
    """A tensor of a safetensors file with other values, of another type or shape, missing or renamed."""
    tensors = load(data)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.randrange(9)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(["x", *tensors])] = tensors.pop(name)
    elif kind == 2:
        types = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e5m2]
        tensors[name] = tensor.to(rng.choice(types))
    elif kind == 3:
        tensors[name] = tensor.reshape(rng.choice([(-1,), (1, -1), (-1, 1), (*tensor.shape, 1), tensor.shape[::-1]]))
    elif kind == 4:
        shape = list(tensor.shape) or [1]
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 3, 1000])
        tensors[name] = torch.zeros(shape)
    elif kind == 5:
        tensors[name] = torch.full_like(tensor, rng.choice([float("nan"), float("inf"), 1e30, -1.0, 0.0]))
    elif kind == 6:
        tensors["x"] = torch.ones(rng.choice([(), (3,), (0, 10**9)]))
    elif kind == 7:
        tensors[name] = torch.zeros(0, rng.choice([1, 10**9, 10**15]))
    else:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        tensors[name] = tensor + 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor)
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


CHANGES = {".json": change_json, ".parquet": change_parquet, ".safetensors": change_tensors}


def mutate(name: str, data: bytes, rng: random.Random) -> bytes:
    """A changed file: as its format has it, or byte by byte."""
    change = CHANGES["." + name.rsplit(".", 1)[1]]
    return change(data, rng) if rng.random() < 0.6 else damage_bytes(data, rng)
