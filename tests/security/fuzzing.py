"""Damages a bank or a checkpoint again and again, in a process that may crash, and says how each case ended.

    python tests/security/fuzzing.py FOLDER bank model processor --count 1000 --seed 0 --first 0

FOLDER holds `bank` and `checkpoint`. Every case is a function of the seed and its number: `FOLDER bank --first 17
--count 1` runs case 17 again. Ends with 1, after a report, when a case was anything but refused with a clean error or
harmless.
"""

import argparse
import faulthandler
import json
import random
import re
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from mutations import mutate
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor
from tinyalign_vlm.modeling_tinyalign.bank_arrays import cache_root
from tinyalign_vlm.modeling_tinyalign.bank_format import config_sha256, file_sha256

SECONDS = 10  # of one case, of a processor's time
HANGING = 600  # seconds after which a case that waits for something, or hangs where no signal comes through, is ended
MEMORY = 2**31  # bytes that all cases together may take beyond what the process has at the start
SHARES = {"bank": 1, "model": 0.15, "processor": 0.6}  # of the cases that are asked for
BANK_FILES = {
    "bank_config.json": 4,
    "data/train-00000-of-00001.parquet": 3,
    "key_encoder.safetensors": 2,
    "value_encoder/model.safetensors": 2,
}
FEATURES = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))


class Hang(BaseException):
    """A case that takes too long; no `except Exception` can swallow it."""


def forge(folder: Path) -> None:
    """Make the checksums of a changed bank right, as its author could."""
    path = folder / "bank_config.json"
    try:
        config = json.loads(path.read_bytes())
        hashes = config["sha256"]
        for name, file in (("key_encoder", "key_encoder"), ("value_encoder", "value_encoder/model")):
            hashes[name] = file_sha256(folder / f"{file}.safetensors")
    except (ValueError, LookupError, TypeError, RecursionError):
        return
    for _ in range(4):
        hashes["config"] = config_sha256(config)
        path.write_text(json.dumps(config))
        try:
            MemoryBank.from_pretrained(folder)
        except ValueError as error:
            wrong = re.search(r"sha256 of the (\w+) is (\w{64}), but", str(error))
            if wrong:
                hashes[wrong[1]] = wrong[2]


def answers(bank: MemoryBank, model) -> dict:
    """All that a bank can be asked."""
    keys = bank.encode_queries(FEATURES)
    scores, ids = bank.search(keys, 3, exclude=[None, bank.rows([1])[0]["source_id"]])
    bank.check_probes(model)
    return {
        "keys": keys.tolist(),
        "scores": scores.tolist(),
        "ids": ids.tolist(),
        "values": bank.gather(ids).tolist(),
        "rows": bank.rows(ids),
        "captions": bank.captions,
        "thumbnail": bank.thumbnail(2).tobytes(),
        "encoded": bank.value_encoder.encode(FEATURES, ["a word", "another"]).tolist(),
        "says": repr(bank),
    }


def bank_case(folder: Path, rng: random.Random, model, expected: dict) -> str:
    """Damage one or two files of a bank; in every third case make the checksums right again."""
    shutil.rmtree(cache_root(), ignore_errors=True)
    names = set(rng.choices(list(BANK_FILES), BANK_FILES.values(), k=rng.choice([1, 1, 1, 2])))
    for name in sorted(names):
        (folder / name).write_bytes(mutate(name, (folder / name).read_bytes(), rng))
    forged = rng.random() < 0.35  # which takes longest
    if forged:
        forge(folder)
    try:
        bank = MemoryBank.from_pretrained(folder)
        found = answers(bank, model)
    except (ValueError, OSError) as error:
        if not forged:
            assert str(folder) in str(error), f"the error names no file: {error}"
        return "refused when forged" if forged else "refused"
    assert forged or found == expected, "another answer than that of the undamaged bank"
    return "forged and read" if forged else "harmless"


def checkpoint_case(folder: Path, rng: random.Random, name: str, read) -> str:
    """Damage a config of a checkpoint and load it."""
    path = folder / name
    path.write_bytes(mutate(name, path.read_bytes(), rng))
    try:
        read(folder, rng)
    except (ValueError, OSError):
        return "refused"
    except Exception as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not any(f"/{part}/" in name for name in frames for part in ("modeling_tinyalign", "processing")):
            return "refused by transformers, before it comes to our classes"
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            return "refused"  # transformers' own word for sizes that are not those of the weights
        raise
    return "read"


def read_model(folder: Path, rng: random.Random) -> None:
    rng.choice([AutoModelForImageTextToText, TinyAlignForConditionalGeneration]).from_pretrained(folder)


def read_processor(folder: Path, rng: random.Random) -> None:
    processor = rng.choice([AutoProcessor, TinyAlignProcessor]).from_pretrained(folder)
    processor(images=[Image.new("RGB", (40, 30), "red")], text="<image> what is it?", return_tensors="pt")


def run(kind: str, folder: Path, count: int, seed: int, first: int) -> int:
    """Returns the number of cases that ended badly."""
    source, work = folder / ("bank" if kind == "bank" else "checkpoint"), folder / f"{kind}_cases"
    if kind == "bank":
        model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
        expected = answers(MemoryBank.from_pretrained(source), model)
    originals = {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    shutil.copytree(source, work)
    ends, bad, slowest = Counter(), 0, (0.0, 0)
    for number in range(first, first + count):
        rng = random.Random(f"{kind} {seed} {number}")
        print(f"case {number} of {kind}", flush=True)
        for name, data in originals.items():
            if not (work / name).is_file() or (work / name).read_bytes() != data:
                (work / name).write_bytes(data)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        faulthandler.dump_traceback_later(HANGING, exit=True)
        try:
            if kind == "bank":
                end = bank_case(work, rng, model, expected)
            elif kind == "model":
                end = checkpoint_case(work, rng, "config.json", read_model)
            else:
                end = checkpoint_case(work, rng, "processor_config.json", read_processor)
        except BaseException as error:
            end = f"{type(error).__name__}"
            bad += 1
            lines = traceback.format_exc().strip().splitlines()
            print(f"BAD: {kind} case {number}", *lines[-7:], sep="\n  ", flush=True)
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
        ends[end] += 1
        slowest = max(slowest, (time.process_time() - start, number))
    report = ", ".join(f"{number} {end}" for end, number in ends.most_common())
    print(f"{kind}, seed {seed}, {count} cases: {report}. Slowest: {slowest[0]:.1f} s (case {slowest[1]})", flush=True)
    return bad


def raise_hang(*_) -> None:
    raise Hang(f"more than {SECONDS} seconds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="+", choices=SHARES)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    signal.signal(signal.SIGPROF, raise_hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    bad = 0
    for kind in arguments.kinds:
        count = max(1, int(arguments.count * SHARES[kind]))
        bad += run(kind, arguments.folder, count, arguments.seed, arguments.first)
    raise SystemExit(min(1, bad))
