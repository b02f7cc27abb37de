"""
A memory bank in a LanceDB database on this machine's disk beside the same bank on faiss, in one run.

    python benchmarks/lance_bank.py                              # 100,000 rows of 32 x 96 values
    python benchmarks/lance_bank.py --rows 1000000 --latents 2   # 25 GB of disk for a while; with 32 latents, 45 GB

Keys are the first kind of benchmarks/bank.py, values noise; the queries are 256 more keys. Recall is against products
with the unrounded float32 keys. Memory and start are measured in new processes; the disk's pages are in the system's
cache, for all has just been written.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bank as bench
import numpy as np
from huggingface_hub import constants

from tinyalign_vlm.training.bank.info import size_of
from tinyalign_vlm.training.bank.lance import write_lance


def nearest(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """`(n, 5)` ids, by products with all keys."""
    scores, ids = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for rows in bench.blocks(len(keys)):
        products = queries @ keys[rows.start : rows.stop].T
        scores = np.concatenate([scores, products], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(np.array(rows), products.shape)], axis=1)
        best = np.argsort(-scores, axis=1)[:, : bench.TOP_K]
        scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
    return ids


def step_attach(path: str, queries: str) -> dict:
    """Memory and milliseconds of the first search and of 256 searches with their values, in a process of their own."""
    vectors = np.load(queries)
    before, started = bench.anonymous_mb(), time.perf_counter()
    bank = pickle.loads(Path(path).read_bytes())
    bank.gather(bank.search(vectors[:1], bench.TOP_K)[1])
    first = time.perf_counter() - started
    one = bench.anonymous_mb() - before
    bank.gather(bank.search(vectors, bench.TOP_K)[1])
    return {"first": 1000 * first, "MB after 1": one, "MB after 256": bench.anonymous_mb() - before}


def in_new_process(path: Path, queries: Path) -> dict:
    command = [sys.executable, __file__, "--step", str(path), str(queries)]
    environment = {**os.environ, "HF_HOME": constants.HF_HOME}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(scratch: Path, rows: int, repeats: int) -> None:
    def say(name: str, *cells: str):
        print("|", " | ".join([name, *cells]), "|", flush=True)

    keys = bench.synthetic_keys(scratch / "keys.npy", bench.KINDS[0], rows)
    queries = np.array(keys[rows:])
    np.save(scratch / "queries.npy", queries)
    say(f"{rows:,} rows, values of {bench.VALUE_SHAPE[0]} x {bench.VALUE_SHAPE[1]}", "faiss", "LanceDB")
    say("---", "---", "---")
    local = bench.make_bank(keys[:rows])
    truth = nearest(keys[:rows], queries)
    keys = None
    (scratch / "keys.npy").unlink()
    seconds, _ = bench.timed(lambda: local.index_facts)
    lance_seconds, stored = bench.timed(lambda: write_lance(local, scratch / "lance"))
    say("build, s", f"{seconds:.1f} (index)", f"{lance_seconds:.1f} (rows, index and its settings)")
    banks = {"faiss": local, "lance": stored}
    facts = [bank.index_facts for bank in banks.values()]
    say("index", *(f"{fact['index']}, k_factor {fact['k_factor']}" for fact in facts))
    say("lists looked into", "1 of 1", f"{stored.search_settings['nprobes']}")
    say("recall@5, of its own keys", *(f"{fact['recall_at_5']:.4f}" for fact in facts))
    found = [bank.search(queries, bench.TOP_K)[1] for bank in banks.values()]
    hits = [np.mean([len({*a} & {*b}) for a, b in zip(ids, truth, strict=True)]) / bench.TOP_K for ids in found]
    say("recall@5, of other keys", *(f"{hit:.4f}" for hit in hits))
    say("on disk, MB", f"{size_of(local.folder) / 1e6:.0f}", f"{size_of(scratch / 'lance') / 1e6:.0f}")
    starts = []
    for name, bank in banks.items():
        (scratch / name).with_suffix(".pickle").write_bytes(pickle.dumps(bank))
        starts.append(in_new_process((scratch / name).with_suffix(".pickle"), scratch / "queries.npy"))
    say("first search in a new process, ms", *(f"{start['first']:.0f}" for start in starts))
    say("anonymous memory after it, MB", *(f"{start['MB after 1']:.0f}" for start in starts))
    say("anonymous memory after 256, MB", *(f"{start['MB after 256']:.0f}" for start in starts))
    singles = queries[: bench.SINGLES]
    one = {
        name: lambda bank=bank: [bank.search(query[None], bench.TOP_K) for query in singles]
        for name, bank in banks.items()
    }
    many = {name: lambda bank=bank: bank.search(queries, bench.TOP_K) for name, bank in banks.items()}
    gathers = {name: lambda bank=bank: bank.gather(truth) for name, bank in banks.items()}
    say("search, 1 query, ms", *(f"{time / len(singles):.2f}" for time in bench.in_turns(one, repeats).values()))
    say("search, 256 queries, ms", *(f"{time:.0f}" for time in bench.in_turns(many, repeats).values()))
    say("gather 256 x 5 values, ms", *(f"{time:.1f}" for time in bench.in_turns(gathers, repeats).values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--latents", type=int, default=32, help="of a value, each of 96 numbers")
    parser.add_argument("--repeats", type=int, default=5, help="the median of them is printed")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(step_attach(*arguments.step)))
        return
    bench.VALUE_SHAPE = (arguments.latents, 96)
    with tempfile.TemporaryDirectory() as scratch:
        constants.HF_HOME = str(Path(scratch) / "hf_home")
        measure(Path(scratch), arguments.rows, arguments.repeats)


if __name__ == "__main__":
    main()
