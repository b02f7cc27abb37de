"""`tinyalign bank view`: a memory bank as one HTML page that needs nothing else, not even a network."""

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...modeling_tinyalign import MemoryBank, TinyAlignForConditionalGeneration
from ...modeling_tinyalign.key_encoder import evaluating
from ...modeling_tinyalign.row_encoder import thumbnail_bytes
from ...processing import TinyAlignProcessor
from ...processing.images import decode_image
from ..disk import save_file
from .folders import folder_of_bank
from .info import bank_info

TEMPLATE = Path(__file__).with_name("view.html")
BINS = 50
PAIRED = 1000  # rows whose similarities with each other are counted
THUMBNAIL = 64  # of query images, in pixels


def view_bank(
    name: str | os.PathLike,
    page: str | os.PathLike,
    rows: int = 300,
    top_k: int = 5,
    seed: int = 0,
    wanted: Sequence[int] = (),
    images: Sequence[str] = (),
    model: str | None = None,
) -> None:
    """Write `page`: rows chosen by `seed` with their neighbours, the similarities, and a map of the keys.

    Args:
        rows: how many are chosen; they, their neighbours and their thumbnails are the size of the page.
        top_k: neighbours of each; rows of the same image are none.
        wanted: rows that are in the page anyway.
        images: files whose neighbours are shown, too; for their keys it takes
        model: the folder or repository of a TinyAlign model with the bank's vision tower.

    Raises `ValueError` if there is no bank, no such row, or images without a model, or of another vision tower, and
    `OSError` if the page cannot be written.
    """
    folder, page = folder_of_bank(name), Path(page)
    facts = bank_info(folder)
    bank = MemoryBank.from_pretrained(folder)
    wrong = [row for row in wanted if not 0 <= row < len(bank)]
    if wrong:
        raise ValueError(f"{name} has no row {wrong[0]}, expected 0 to {len(bank) - 1}.")
    if images and model is None:
        raise ValueError(
            "Found --image without --model, expected both: the model's vision tower makes the image's key."
        )
    if rows < 1 or top_k < 1 or seed < 0:
        raise ValueError(f"--rows is {rows}, --top_k {top_k}, --seed {seed}, expected 1, 1 and 0 or more.")
    chosen = np.random.default_rng(seed).permutation(len(bank))[:rows].tolist()
    chosen = np.array(list(dict.fromkeys([*wanted, *chosen])))
    queries, query_keys = _queries(bank, images, model)
    data = {
        "name": folder.resolve().name if Path(name).is_dir() else str(name),
        # the page may be passed on: no paths of this machine
        "facts": [line.split("  ", 1) for line in facts.splitlines() if not line.startswith("local copy")],
        **page_data(bank, chosen, min(top_k, len(bank)), queries, query_keys),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    save_file(page, render_page(data).encode())
    print(f"{page}: {len(chosen)} of {len(bank):,} rows with their neighbours, {page.stat().st_size / 2**20:.1f} MiB.")


def render_page(data: dict) -> str:
    """Return the page that shows this, in HTML."""
    text = json.dumps(data).replace("<", "\\u003c")  # in a script, "<" could end it
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1)


def page_data(bank: MemoryBank, chosen: np.ndarray, top_k: int, queries: list[dict], query_keys: np.ndarray) -> dict:
    """Return what the page shows of the chosen rows, and of images with these keys."""
    keys = bank.keys(chosen)
    names = [row["source_id"] for row in bank.rows(chosen)]
    scores, ids = bank.search(keys, top_k, exclude=names)
    query_scores, query_ids = bank.search(query_keys, top_k)
    found = np.setdiff1d(np.concatenate([ids, query_ids]), chosen)
    shown = np.concatenate([chosen, found[found >= 0]])
    all_keys = np.concatenate([keys, bank.keys(shown[len(chosen) :]), query_keys])
    places, explained = principal_components(all_keys, len(keys))
    for number, query in enumerate(queries):
        query["neighbours"] = _pairs(query_ids[number], query_scores[number])
        query["place"] = places[len(shown) + number].tolist()
    return {
        "size": len(bank),
        "tower": bank.config.tower.name,
        "columns": bank.config.columns,
        "sample": chosen.tolist(),
        "rows": {row["id"]: _row(bank, row) for row in bank.rows(shown)},
        "neighbours": {int(row): _pairs(*pairs) for row, *pairs in zip(chosen, ids, scores, strict=True)},
        "queries": queries,
        "similarities": similarities(keys, scores[:, 0], names),
        "map": [[int(row), *place] for row, place in zip(shown, places.tolist(), strict=False)],
        "explained": explained,
    }


def similarities(keys: np.ndarray, nearest: np.ndarray, names: Sequence[str]) -> dict:
    """Return the shares of rows by the similarity of their nearest neighbour, and of pairs of `keys` by theirs."""
    keys, names = keys[:PAIRED], np.array(names[:PAIRED])
    pairs = (keys @ keys.T)[np.triu(names[:, None] != names[None], 1)]
    nearest = nearest[np.isfinite(nearest)]
    both = np.concatenate([pairs, nearest, [0.0, 1.0]])
    low, high = float(both.min()), float(both.max())
    counts = [np.histogram(values, BINS, (low, high))[0] / max(1, len(values)) for values in (nearest, pairs)]
    return {"low": low, "high": high, "nearest": counts[0].tolist(), "random": counts[1].tolist()}


def principal_components(keys: np.ndarray, fitted: int) -> tuple[np.ndarray, float]:
    """Return `keys` on the two principal components of the first `fitted`, `(n, 2)`, and their share of variance."""
    mean = keys[:fitted].mean(axis=0)
    _, strengths, directions = np.linalg.svd(keys[:fitted] - mean, full_matrices=False)
    places = np.zeros((len(keys), 2))
    places[:, : len(directions[:2])] = (keys - mean) @ directions[:2].T
    total = (strengths**2).sum()
    return places, float((strengths[:2] ** 2).sum() / total) if total > 0 else 1.0


def _queries(bank: MemoryBank, images: Sequence[str], model: str | None) -> tuple[list[dict], np.ndarray]:
    """Return what the page shows of image files, and their keys `(n, key_dim)`."""
    if not images:
        return [], np.empty((0, bank.config.key_dim), np.float32)
    tower = TinyAlignForConditionalGeneration.from_pretrained(model)
    bank.check_probes(tower)
    loaded = [decode_image(path) for path in images]
    processor = TinyAlignProcessor.from_pretrained(model).image_processor
    with evaluating(tower), torch.no_grad():
        pixels = processor(images=loaded, return_tensors="pt")["pixel_values"]
        keys = bank.encode_queries(tower.get_vision_features(pixels)).cpu().numpy()
    queries = []
    for path, image in zip(images, loaded, strict=True):
        thumbnail = data_url(thumbnail_bytes(image, THUMBNAIL))
        queries.append({"caption": Path(path).name, "note": "image", "kept": {}, "thumbnail": thumbnail})
    return queries, keys


def _row(bank: MemoryBank, row: dict) -> dict:
    kept = {name: row[name] for name in bank.config.columns if row[name] is not None}
    picture = bank.table["thumbnail"][row["id"]].as_py() if bank.config.thumbnail_size else None
    thumbnail = data_url(picture["bytes"]) if picture and picture["bytes"] else None
    return {"caption": row["caption"], "source_id": row["source_id"], "kept": kept, "thumbnail": thumbnail}


def data_url(jpeg: bytes) -> str:
    """Return a picture as a URL: no file is written."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _pairs(ids: np.ndarray, scores: np.ndarray) -> list[list]:
    """Return `[row, similarity]` of neighbours, without the empty ones."""
    return [[int(row), round(float(score), 4)] for row, score in zip(ids, scores, strict=True) if row >= 0]
