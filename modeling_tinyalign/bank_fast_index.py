"""How a memory bank is searched: exactly, or through a fast index that is made once, measured, and kept."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from transformers.utils import logging

from .bank_config import file_sha256
from .bank_folders import locked, scratch_folder, sync
from .bank_index import TIE, KeyIndex, faiss_threads
from .bank_keys import BLOCK_ROWS, PackedKeys, PlainKeys, read_mapped
from .bank_storage import SCRATCH_PREFIX, cache_error, cache_root

try:
    import faiss
except ImportError:
    faiss = None

logger = logging.get_logger(__name__)

EXACT, GPU = "exact", "gpu"
# Up to here exact search takes a few milliseconds (docs/bank_speed.md has the table).
EXACT_ROWS = 20_000
# A fast index is used from this recall on; its settings are raised until it is a little better.
MIN_RECALL, GOOD_RECALL = 0.99, 0.995
# What follows the name of an index's file in the name of its lists' file.
LISTS = ".lists"
# How many numbers of a key share 4 bits of the default index, and how many of its candidates are compared for every
# neighbour: a coarse index for most banks, a finer one for those whose keys are close to each other.
DEFAULTS = {4: (16, 32, 64), 2: (16, 32, 64, 128, 256)}
# Queries, and their neighbours, that recall and latency are measured with.
SAMPLE, TOP_K, TIMED_QUERIES = 500, 5, 30
# The second for each cell of an inverted file.
TRAINING_ROWS, TRAINING_ROWS_A_CELL, TRAINING_ROUNDS = 4096, 64, 10


def open_index(keys: PlainKeys | PackedKeys, folder: Path, wanted: str | None) -> tuple[KeyIndex, dict | None]:
    """The index that a bank is searched with, and what was measured when it was made (see `describe`).

    A fast index is made by the first process that asks for it, and kept.

    Args:
        folder: of the keys in the local cache, never of a downloaded bank.
        wanted: "exact", a faiss factory string, or None: a GPU's if faiss has one, exact up to `EXACT_ROWS` rows, and
            beyond the fast index if it finds `MIN_RECALL` of the neighbours.

    Raises:
        ValueError: faiss can't make such an index.
        OSError: it can't be written.
        RuntimeError: in a DataLoader worker or another forked process.
    """
    if wanted is None and faiss.get_num_gpus() > 0:
        return KeyIndex(keys, GPU, gpu=gpu_index(keys)), None
    if wanted == EXACT or (wanted is None and len(keys) <= EXACT_ROWS):
        return KeyIndex(keys), None
    name = f"{quote(wanted or 'auto', safe='')}-faiss{faiss.__version__}"
    record = folder / f"{name}.json"
    if not record.exists():
        with locked(folder):
            if not record.exists():
                make_fast_index(keys, folder / f"{name}.faiss", record, wanted)
    try:
        facts = json.loads(record.read_text())
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error}). Delete {folder} and load the bank again.") from error
    facts.pop("sha256", None)
    if facts["index"] == EXACT:
        return KeyIndex(keys), facts
    return KeyIndex(keys, facts["index"], read_fast(folder / f"{name}.faiss", keys.shape), facts["k_factor"]), facts


def make_fast_index(keys: PlainKeys | PackedKeys, path: Path, record: Path, wanted: str | None) -> None:
    """Write a fast index and its facts, or those of exact search where the default ones are not good enough."""
    factories = {wanted: DEFAULTS[2]} if wanted else default_factories(keys.shape[1])
    for factory, k_factors in factories.items():
        with faiss_threads():
            index = KeyIndex(keys, factory, train_index(keys, factory))
        recall = tune(index, k_factors)
        if recall >= MIN_RECALL:
            break
    else:
        logger.warning(
            f"The index {factory} finds {recall:.1%} of the nearest neighbours in this bank, expected "
            f"{MIN_RECALL:.0%}{'' if wanted else ': it will be searched exactly'}."
        )
        if wanted is None:
            index, recall = KeyIndex(keys), 1.0
    facts = describe(index, recall)
    try:
        with scratch_folder(cache_root(), SCRATCH_PREFIX) as scratch:
            if index.fast is not None:
                write_fast(index.fast, scratch / path.name)
            sha256 = {file.name: file_sha256(file) for file in scratch.iterdir()}
            (scratch / record.name).write_text(json.dumps({**facts, "sha256": sha256}) + "\n")
            for file in (path.with_suffix(LISTS), path, record):  # the record comes last: without it there is no index
                if (scratch / file.name).exists():
                    sync(scratch / file.name)
                    os.replace(scratch / file.name, file)
    except RuntimeError as error:  # faiss's
        raise cache_error(OSError(errno.EIO, str(error))) from error
    except OSError as error:
        raise cache_error(error) from error


def index_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the fast indexes beside the keys in a folder of the local cache: their files have changed.

    They were made of these keys, and their recall was measured, when their sha256 was written down.
    """
    for record in sorted(folder.glob("*.json")):
        try:
            hashes = json.loads(record.read_text())["sha256"]
        except (ValueError, LookupError) as error:
            yield (
                f"{record} does not say what the index beside it was ({error!r}): it is damaged, or of an earlier "
                f"version. Delete {folder} and load the bank again."
            )
            continue
        for name, expected in hashes.items():
            file = folder / name
            found = file_sha256(file) if file.is_file() else "none, it is missing"
            if found != expected:
                yield (
                    f"{file} is not the index that was made of the bank's keys: its sha256 is {found}, expected "
                    f"{expected}. Delete {folder} and load the bank again."
                )


def write_fast(index: faiss.Index, path: Path) -> None:
    """Write an index. The lists of its 4-bit codes go to a file of their own, and the index is empty afterwards.

    faiss can only read such lists into memory, but it can search lists in a mapped file: of each its codes and its
    row numbers, with room for whole blocks of 32 rows; at the end of the file, how long the lists are.
    """
    if (scan := scanned_part(index)) is not None:
        sizes = np.array([scan.invlists.list_size(number) for number in range(scan.nlist)])
        with open(path.with_suffix(LISTS), "wb") as file:
            for number, (size, room) in enumerate(zip(sizes, whole_blocks(sizes, scan), strict=True)):
                if size:
                    codes = faiss.rev_swig_ptr(scan.invlists.get_codes(number), int(room) * scan.code_size)
                    rows = faiss.rev_swig_ptr(scan.invlists.get_ids(number), int(size))
                    file.write(codes)
                    file.write(np.pad(rows, (0, room - size)))
            file.write(sizes.tobytes())
        index.reset()
    faiss.write_index(index, str(path))


def read_fast(path: Path, shape: tuple[int, int]) -> faiss.Index:
    """An index that `write_fast` wrote, none of it in memory, for keys of this shape.

    Raises:
        ValueError: it is of other keys, or damaged.
    """
    lists_path = path.with_suffix(LISTS)
    if not lists_path.exists():
        return read_mapped(path, shape)
    index = read_mapped(path, (0, shape[1]))
    scan = scanned_part(index)
    sizes = np.fromfile(lists_path, np.int64, offset=max(0, lists_path.stat().st_size - 8 * scan.nlist))
    room = whole_blocks(sizes, scan)
    ends = np.cumsum(room * (scan.code_size + 8))
    if sizes.sum() != shape[0] or lists_path.stat().st_size != ends[-1] + sizes.nbytes:
        raise ValueError(f"{lists_path} is damaged. Delete {path.parent} and load the bank again.")
    mapped = faiss.OnDiskInvertedLists(scan.nlist, scan.code_size, str(lists_path))
    mapped.read_only, mapped.totsize, mapped.prefetch_nthread = True, lists_path.stat().st_size, 0
    mapped.lists.clear()
    for size, capacity, end in zip(sizes.tolist(), room.tolist(), ends.tolist(), strict=True):
        entry = faiss.OnDiskOneList()
        entry.size, entry.capacity, entry.offset = size, capacity, end - capacity * (scan.code_size + 8)
        mapped.lists.push_back(entry)
    mapped.do_mmap()
    scan.replace_invlists(mapped, True)
    mapped.this.disown()  # it is the index's now
    index.ntotal = scan.ntotal = shape[0]
    return index


def scanned_part(index: faiss.Index) -> faiss.Index | None:
    """The part of the index that looks product-quantised 4-bit codes up in registers, if it has one."""
    part = faiss.try_extract_index_ivf(index)
    part = part and faiss.downcast_index(part)
    return part if isinstance(part, faiss.IndexIVFPQFastScan) else None


def whole_blocks(sizes: np.ndarray, scan: faiss.Index) -> np.ndarray:
    return -(-sizes // scan.bbs) * scan.bbs


def default_factories(key_dim: int) -> dict[str, tuple[int, ...]]:
    """faiss factory strings and the k_factors to try: 4-bit codes, small enough to be looked up in registers.

    They are in one list (IVF1), because lists can be memory-mapped (`write_fast`).
    """
    pad = -key_dim % 4
    factory = f"{f'Pad{key_dim + pad},' if pad else ''}IVF1,PQ{{}}x4fs"
    return {factory.format((key_dim + pad) // width): k_factors for width, k_factors in DEFAULTS.items()}


def train_index(keys: PlainKeys | PackedKeys, factory: str) -> faiss.Index:
    """A faiss index of the keys. Without its "Refine" part: candidates are compared with the keys anyway."""
    try:
        index = faiss.index_factory(keys.shape[1], factory.split(",Refine")[0], faiss.METRIC_INNER_PRODUCT)
        cells = faiss.try_extract_index_ivf(index)
        sample = max(TRAINING_ROWS, TRAINING_ROWS_A_CELL * cells.nlist if cells else 0)
        rows = np.sort(np.random.default_rng(0).permutation(len(keys))[:sample])
        if cells is not None and isinstance(part := faiss.downcast_index(cells), faiss.IndexIVFPQFastScan):
            part.pq.cp.niter = TRAINING_ROUNDS
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1 if cells is None or cells.nlist == 1 else threads)  # its parts are too small
        index.train(keys[rows])
        faiss.omp_set_num_threads(threads)
        for start in range(0, len(keys), BLOCK_ROWS):
            index.add(keys.index.reconstruct_n(start, min(BLOCK_ROWS, len(keys) - start)))
    except RuntimeError as error:
        raise ValueError(
            f"faiss {faiss.__version__} can't make the index {factory!r} for {len(keys)} keys of {keys.shape[1]} "
            f"numbers ({error}). Pass index='exact', or another factory string of faiss."
        ) from error
    return index


def tune(index: KeyIndex, k_factors: Sequence[int]) -> float:
    """Raise the settings of a fast index until its recall is good: the cells it looks into, the candidates compared.

    Returns:
        recall@5 against exact search, of a sample of the keys, none of which is its own neighbour.
    """
    queries, own = sample_queries(index.keys)
    truth, _ = KeyIndex(index.keys).search(queries, TOP_K, own)

    def recall(k_factor: int) -> float:
        index.k_factor = k_factor * TOP_K / (TOP_K + 1)  # no more candidates than for a query that excludes nothing
        scores, _ = index.search(queries, TOP_K, own)
        index.k_factor = k_factor
        return float((scores >= truth[:, -1:] - TIE).mean())

    cells = faiss.try_extract_index_ivf(index.fast)
    if cells and cells.nlist > 1:
        for power in range(cells.nlist.bit_length()):
            cells.nprobe = 2**power
            if recall(k_factors[-1]) >= GOOD_RECALL:
                break
    for k_factor in k_factors:
        if (found := recall(k_factor)) >= GOOD_RECALL:
            break
    return found


def describe(index: KeyIndex, recall: float = 1.0) -> dict:
    """What is recorded of an index: `{"index": its name, "k_factor", "recall_at_5", "milliseconds": of one query}`.

    The time is that of the fastest of 30 queries, which other work on the machine disturbs least.
    """
    queries, own = sample_queries(index.keys)
    seconds = []
    for row in range(min(TIMED_QUERIES, len(queries))):
        started = time.perf_counter()
        index.search(queries[[row]], min(TOP_K, len(index.keys)), own[row : row + 1])
        seconds.append(time.perf_counter() - started)
    milliseconds = round(1000 * min(seconds), 3)
    return {"index": index.name, "k_factor": index.k_factor, "recall_at_5": recall, "milliseconds": milliseconds}


def first_measured(facts: dict, folder: Path) -> dict:
    """What was measured the first time that a bank of these keys was saved here: built again, it has the same bytes.

    Args:
        facts: measured now.
        folder: of the keys in the local cache. The facts of a fast index are kept there as it is.
    """
    if facts["index"] not in (EXACT, GPU):
        return facts
    record = folder / f"{facts['index']}.json"
    with contextlib.suppress(OSError):  # they are not kept where nothing can be written
        if not record.exists():
            with scratch_folder(cache_root(), SCRATCH_PREFIX) as scratch:
                (scratch / record.name).write_text(json.dumps({**facts, "sha256": {}}) + "\n")
                os.replace(scratch / record.name, record)
        facts = json.loads(record.read_text())
        del facts["sha256"]
    return facts


def recorded(facts: dict) -> dict:
    """What bank_config.json keeps of them: milliseconds rounded up to 1, 2, 5, 10, ...: like banks are equal."""
    steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return {**facts, "milliseconds": next(step for step in steps if facts["milliseconds"] <= step)}


def sample_queries(keys: PlainKeys | PackedKeys) -> tuple[np.ndarray, list[np.ndarray]]:
    """`(n, key_dim)` keys, always the same ones, and of each the row that it is."""
    rows = np.random.default_rng(1).permutation(len(keys))[:SAMPLE]
    return keys[rows], list(rows[:, None])


def gpu_index(keys: PlainKeys | PackedKeys) -> faiss.Index:
    """The keys as float16 on the current GPU, searched exactly."""
    settings = faiss.GpuIndexFlatConfig()
    settings.useFloat16 = True
    settings.device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), keys.shape[1], settings)
    for start in range(0, len(keys), BLOCK_ROWS):
        index.add(keys[start : start + BLOCK_ROWS])
    return index
