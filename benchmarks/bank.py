"""
The memory bank beside the reference's way of doing it, in one run: memory, disk, start, search, gather, whole answers.

    make bench-bank                                         # 100,000 rows, then whole answers
    make bench-bank BENCH_ARGS="--rows 1000000 --no_answers"   # needs 30 GB of disk for a while
    make bench-bank BENCH_ARGS="--keys keys.npy"            # real keys: float32, bank.keys(range(len(bank)))

The reference keeps float32 keys in a flat faiss index, and the same keys again with float32 values, a list of tensors,
in one pickled file, which is written and read here only. Up to 100,000 rows are measured with it; what it would take
for more is reckoned. Keys are synthetic unless given, and say nothing about anybody's images: `clusters` of 50 rows; a
`spectrum` of variances that fall as 1/n; `low rank`, 64 directions and noise. The queries are 256 more of the same
kind (the last 256 of given keys), values are noise. Recall is against products with the unrounded float32 keys.
"""

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import constants
from whole_answers import measure_answers

from tinyalign_vlm import MemoryBank, ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.modeling_tinyalign.bank_format import (
    BankConfig,
    KeyEncoderConfig,
    TowerConfig,
    config_schema,
    list_column,
)
from tinyalign_vlm.modeling_tinyalign.bank_index import KeyIndex, default_factories, faiss_threads, train_index, tune
from tinyalign_vlm.modeling_tinyalign.key_encoder import KeyEncoder

KEY_DIM, VALUE_SHAPE = 1152, (32, 96)
TOP_K, QUERIES, BLOCK = 5, 256, 4096
KINDS = ("clusters", "spectrum", "low rank")
REFERENCE_ROWS = 100_000
SINGLES, GATHERS = 20, 5  # queries, and gathers, that are asked one after the other
SIZES = (5_000, 10_000, 20_000, 50_000)  # at which exact search is compared with the fast index


# ---------------------------------------------------------------------- data


def synthetic_keys(path: Path, kind: str, rows: int) -> np.ndarray:
    """`(rows + QUERIES, KEY_DIM)` float32, centred and of length 1, in a memory-mapped file."""
    rng = np.random.default_rng(0)
    keys = np.lib.format.open_memmap(path, "w+", np.float32, (rows + QUERIES, KEY_DIM))
    centres = rng.standard_normal((max(2, rows // 50), KEY_DIM), np.float32)
    rotation = np.linalg.qr(rng.standard_normal((KEY_DIM, KEY_DIM)))[0].astype(np.float32)
    for rows in blocks(len(keys)):
        noise = rng.standard_normal((len(rows), KEY_DIM), np.float32)
        if kind == "clusters":
            block = centres[rng.integers(len(centres), size=len(rows))] + noise
        elif kind == "spectrum":
            block = (noise * np.arange(1, KEY_DIM + 1, dtype=np.float32) ** -0.5) @ rotation
        else:
            block = noise[:, :64] @ rotation[:64] * 4 + 0.1 * noise
        keys[rows.start : rows.stop] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return keys


def blocks(num_rows: int) -> list[range]:
    return [range(start, min(start + BLOCK, num_rows)) for start in range(0, num_rows, BLOCK)]


def values_of(rows: range) -> np.ndarray:
    """`(rows, *VALUE_SHAPE)` float16, the same ones for the same rows."""
    return np.random.default_rng(rows.start).standard_normal((len(rows), *VALUE_SHAPE), np.float32).astype(np.float16)


def make_bank(keys: np.ndarray) -> MemoryBank:
    """A bank of these keys, as `MemoryBank.build` lays it out, without the tower that would have made them."""
    num_rows, key_dim = keys.shape
    encoder = ValueEncoder(
        ValueEncoderConfig(num_latents=VALUE_SHAPE[0], latent_dim=VALUE_SHAPE[1], vision_feature_size=key_dim)
    )
    config = BankConfig(
        key_dim=key_dim,
        num_latents=VALUE_SHAPE[0],
        latent_dim=VALUE_SHAPE[1],
        quantized=num_rows > 20_000,
        tower=TowerConfig("none", None, [3, 384, 384], {}, -2, "full"),
        preprocessing={},
        key_encoder=KeyEncoderConfig("vision", "gelu", None, 0.4, 1),
        value_encoder=encoder.config.settings,
        columns=[],
        thumbnail_size=None,
        versions={},
    )

    def batches() -> Iterator[pa.RecordBatch]:
        for rows in blocks(num_rows):
            columns = [
                pa.array(rows, pa.int64()),
                pa.array([f"{row:032x}" for row in rows]),
                pa.array([f"caption {row}" for row in rows]),
                list_column(np.array(keys[rows.start : rows.stop])),
                list_column(values_of(rows).reshape(len(rows), -1)),
            ]
            yield pa.record_batch(columns, schema=config_schema(config))

    return MemoryBank.from_batches(
        batches(), config, KeyEncoder(torch.zeros(key_dim)), torch.zeros(4, key_dim), encoder
    )


# ---------------------------------------------------------------------- the reference's way


def write_reference(path: Path, keys: np.ndarray) -> None:
    values = [value for rows in blocks(len(keys)) for value in values_of(rows).astype(np.float32)]
    with open(path, "wb") as file:
        pickle.dump({"keys": np.array(keys), "values": values}, file, protocol=4)


def read_reference(folder: Path) -> tuple[faiss.Index, np.ndarray, list[torch.Tensor]]:
    index = faiss.read_index(str(folder / "flat.index"))
    with open(folder / "bank.pickle", "rb") as file:
        content = pickle.load(file)
    return index, content["keys"], [torch.from_numpy(value) for value in content["values"]]


def gather_reference(values: list[torch.Tensor], ids: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.stack([values[row] for row in neighbours]) for neighbours in ids])


# ---------------------------------------------------------------------- measuring


def anonymous_mb() -> float:
    """Memory of this process that is no mapped file, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return kilobytes * 1024 / 1e6


def megabytes(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


def in_turns(works: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median milliseconds of each; taking turns, so that other load on the machine slows all of them alike."""
    seconds = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def in_new_process(step: str, *arguments: object) -> dict:
    """Run one step in a process of its own, and return what it printed last: memory is measured from a fresh start."""
    command = [sys.executable, __file__, "--step", step, *map(str, arguments)]
    environment = {**os.environ, "HF_HOME": constants.HF_HOME}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def step_attach(folder: Path, query_path: str) -> dict:
    """A second start: memory and time until a search can be made, and until one was."""
    query = np.load(query_path)[:1]
    before, started = anonymous_mb(), time.perf_counter()
    bank = MemoryBank.from_pretrained(folder)
    _ = bank.index_facts  # opens keys and index
    ready = time.perf_counter()
    _, ids = bank.search(query, TOP_K)
    bank.gather(ids)
    searched = time.perf_counter()
    return {
        "anonymous": anonymous_mb() - before,
        "attach": 1000 * (ready - started),
        "first search": 1000 * (searched - ready),
    }


def step_reference(folder: Path, query_path: str) -> dict:
    query = np.load(query_path)[:1]
    before, started = anonymous_mb(), time.perf_counter()
    index, keys, values = read_reference(folder)
    ready = time.perf_counter()
    gather_reference(values, index.search(query, TOP_K)[1])
    searched = time.perf_counter()
    return {
        "anonymous": anonymous_mb() - before,
        "attach": 1000 * (ready - started),
        "first search": 1000 * (searched - ready),
    }


# ---------------------------------------------------------------------- the table


def timed(work: Callable) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def searches(bank: MemoryBank, flat: faiss.Index, queries: np.ndarray, repeats: int) -> dict:
    """Milliseconds of a search both ways, and the bank's recall@5."""
    result = {"facts": bank.index_facts}
    _, found = bank.search(queries, TOP_K)
    _, truth = flat.search(queries, TOP_K)
    result["recall"] = float(np.mean([len(set(a) & set(b)) / TOP_K for a, b in zip(found, truth, strict=True)]))
    faiss.omp_set_num_threads(torch.get_num_threads())
    ways = {"reference": flat, "bank": bank}
    singles = [queries[[row]] for row in range(SINGLES)]
    for name, batches, times in (
        ("search 1", singles, repeats),
        ("search 1 cold", singles[:1], repeats),
        ("search 256", [queries], 3),
    ):
        works = {
            way: lambda searched=searched, batches=batches: [searched.search(batch, TOP_K) for batch in batches]
            for way, searched in ways.items()
        }
        result[name] = {way: time / len(batches) for way, time in in_turns(works, times).items()}
    return result


def flat_index(keys: np.ndarray) -> faiss.Index:
    index = faiss.IndexFlatIP(keys.shape[1])
    for rows in blocks(len(keys)):
        index.add(keys[rows.start : rows.stop])
    return index


def both_ways(keys: np.ndarray, queries: np.ndarray, repeats: int) -> dict:
    """Milliseconds of a search in a bank of this size, exact and through the default fast index."""
    factory, k_factors = next(iter(default_factories(keys.shape[1]).items()))

    def build() -> KeyIndex:
        with faiss_threads():
            return KeyIndex(keys, factory, train_index(keys, factory))

    seconds, fast = timed(build)
    found = {"build": seconds, "recall": tune(fast, k_factors)}
    for number in (1, len(queries)):
        asked, nothing = queries[:number], [np.empty(0, np.int64)] * number
        works = {
            name: lambda index=index, asked=asked, nothing=nothing: index.search(asked, TOP_K, nothing)
            for name, index in (("exact", KeyIndex(keys)), ("fast", fast))
        }
        found[number] = in_turns(works, repeats if number == 1 else 3)
    return found


def measure(kind: str, keys: np.ndarray, queries: np.ndarray, scratch: Path, repeats: int, whole: bool) -> dict:
    """All figures of one set of keys; only the searches unless `whole`."""
    np.save(scratch / "queries.npy", queries)
    lay_out, bank = timed(lambda: make_bank(keys))
    build, _ = timed(lambda: bank.index_facts)
    flat = flat_index(keys)
    result = {"kind": kind, "lay out": lay_out, "build": build, **searches(bank, flat, queries, repeats)}
    if not whole:
        return result
    small = [size for size in SIZES if size < len(keys)]
    result["sizes"] = {size: both_ways(np.ascontiguousarray(keys[:size]), queries, repeats) for size in small}
    folder = scratch / "bank"
    bank.save_pretrained(folder)
    result["disk"] = megabytes([path for path in bank.folder.iterdir() if path.suffix != ".arrow"])
    result["shards"] = megabytes(list((folder / "data").iterdir()))
    for _ in range(2):  # the files above have pushed its pages out of memory: the second start finds them again
        result["bank"] = in_new_process("attach", folder, scratch / "queries.npy")
    batches = np.random.default_rng(0).integers(len(keys), size=(GATHERS, QUERIES, TOP_K))
    works = {
        "bank": lambda: [bank.gather(ids) for ids in batches],
        "bank float16": lambda: [bank.gather(ids, torch.float16) for ids in batches],
    }
    if len(keys) <= REFERENCE_ROWS:
        faiss.write_index(flat, str(scratch / "flat.index"))
        write_reference(scratch / "bank.pickle", keys)
        result["reference disk"] = megabytes([scratch / "flat.index", scratch / "bank.pickle"])
        result["reference"] = in_new_process("reference", scratch, scratch / "queries.npy")
        values = [torch.from_numpy(value).float() for rows in blocks(len(keys)) for value in values_of(rows)]
        works["reference"] = lambda: [gather_reference(values, ids) for ids in batches]
    result["gather"] = {name: time / GATHERS for name, time in in_turns(works, repeats).items()}
    return result


def goals(results: list[dict], num_rows: int, answers: dict | None) -> Iterator[tuple[str, str, str, str, bool]]:
    """A row of the table: what was measured, the reference's figure, ours, the goal, and whether it is met."""
    first, million = results[0], num_rows > 500_000
    theirs, ours, gather = first.get("reference"), first["bank"], first["gather"]
    reckoned = f"{num_rows * 4 * (2 * KEY_DIM + VALUE_SHAPE[0] * VALUE_SHAPE[1]) / 1e6:,.0f} MB (reckoned)"
    memory = f"{theirs['anonymous']:,.0f} MB" if theirs else reckoned
    most = 400 if million else 60
    found = ours["anonymous"]
    yield "anonymous memory after attaching and one search", memory, f"{found:.1f} MB", f"<= {most} MB", found <= most
    disk = f"{first['reference disk']:,.0f} MB" if theirs else reckoned
    found = f"{first['disk']:,.0f} MB (the Parquet files to share: {first['shards']:,.0f} MB)"
    yield (
        "on disk: keys, values, index",
        disk,
        found,
        f"<= {num_rows * 6e-3:,.0f} MB",
        first["disk"] <= num_rows * 6e-3,
    )
    start = f"{theirs['attach']:,.0f} ms" if theirs else "reads all of it"
    found = f"{ours['attach']:.0f} ms; the first search {ours['first search']:.0f} ms"
    yield "attach, second start", start, found, "<= 50 ms", ours["attach"] <= 50
    for result in results:
        for name, times in (("1", 15), ("256", 2)):
            speed, recall = result[f"search {name}"], result["recall"]
            ratio = speed["reference"] / speed["bank"]
            found = f"{speed['bank']:.2f} ms: {ratio:.1f} times faster, recall@5 {recall:.4f}"
            if name == "1":
                found += f"; {result['search 1 cold']['bank']:.2f} ms after the other's scan"
            goal = f">= {times} times, recall@5 >= 0.99"
            is_met = ratio >= times and recall >= 0.99
            yield f"search, {name} at once, {result['kind']}", f"{speed['reference']:.2f} ms", found, goal, is_met
    for name, dtype in (("bank", "float32"), ("bank float16", "float16, as in training")):
        reference = f"{gather['reference']:.1f} ms" if theirs else "-"
        found = f"{gather[name]:.2f} ms"
        yield f"gather 256 x 5 values, {dtype}", reference, found, "<= 2 ms", gather[name] <= 2
    most = 60 if million else 5
    for result in results:
        facts = result["facts"]
        found = f"{result['build']:.1f} s ({facts['index']}, k_factor {facts['k_factor']})"
        yield f"build of the index, {result['kind']}", "-", found, f"<= {most} s", result["build"] <= most
    if answers is not None:
        ratio, share = (answers[name] / answers["baseline"] for name in ("memory", "retrieval"))
        found = f"{ratio:.3f}, of which retrieval {share:.4f} ({answers['baseline'] / 1000:.1f} s without memory)"
        goal, is_met = "<= 1.05, of which retrieval <= 0.02", ratio <= 1.05 and share <= 0.02
        yield "a whole answer, against no memory", "1.17 (paper)", found, goal, is_met


def report(results: list[dict], num_rows: int, answers: dict | None):
    """The table of the goals, and that of exact search beside the fast index."""
    versions = f"faiss {faiss.__version__}, torch {torch.__version__}"
    print(f"\n{num_rows:,} rows, {torch.get_num_threads()} threads, {versions}")
    print("\n| | reference's way | memory bank | goal | met |\n|---|---|---|---|---|")
    for *cells, is_met in goals(results, num_rows, answers):
        print(f"| {' | '.join(cells)} | {'yes' if is_met else '**no**'} |")
    print(
        "\n| rows | exact, 1 query | fast, 1 query | exact, 256 | fast, 256 | recall@5 | build |\n" + "|---" * 7 + "|"
    )
    for size, found in results[0].get("sizes", {}).items():
        times = (f"{found[number][how]:.2f} ms" for number in (1, QUERIES) for how in ("exact", "fast"))
        recall = "-" if found["recall"] is None else f"{found['recall']:.3f}"
        print(f"| {size:,} | {' | '.join(times)} | {recall} | {found['build']:.1f} s |")


def run(arguments: argparse.Namespace, scratch: Path):
    given = np.load(arguments.keys, mmap_mode="r", allow_pickle=False) if arguments.keys else None
    results = []
    for kind in [arguments.keys.stem] if arguments.keys else arguments.kinds:
        all_keys = synthetic_keys(scratch / "keys.npy", kind, arguments.rows) if given is None else given
        keys, queries = all_keys[:-QUERIES], np.array(all_keys[-QUERIES:])
        home = scratch / f"home {len(results)}"
        constants.HF_HOME = str(home)
        results.append(measure(kind, keys, queries, scratch, arguments.repeats, whole=not results))
        print(json.dumps(results[-1]), flush=True)
        if len(results) > 1:  # the first bank is asked again
            shutil.rmtree(home)
    answers = None
    if not arguments.no_answers and not arguments.keys:
        constants.HF_HOME = str(scratch / "home 0")
        answers = in_new_process("answers", scratch / "bank", 3)
    report(results, len(keys), answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="of the bank (default: %(default)s)")
    parser.add_argument("--keys", type=Path, help="a .npy file of float32 keys, instead of synthetic ones")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of synthetic keys (default: all)")
    parser.add_argument("--repeats", type=int, default=20, help="of what takes milliseconds (default: %(default)s)")
    parser.add_argument("--no_answers", action="store_true", help="leave out the whole answers")
    parser.add_argument("--scratch", type=Path, help="where to write files (default: a temporary folder)")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, folder, argument = arguments.step
        steps = {"attach": step_attach, "reference": step_reference, "answers": measure_answers}
        print(json.dumps(steps[step](Path(folder), argument)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        run(arguments, Path(scratch))


if __name__ == "__main__":
    main()
