"""What an attacker makes: pickles and modules that would be seen if they ran, changed banks with right checksums."""

import contextlib
import io
import json
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyalign_vlm.modeling_tinyalign.bank_format import config_sha256, file_sha256

SHARD = "data/train-00000-of-00001.parquet"


class Canary:
    """Code that would leave a folder behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self)

    @property
    def torch_file(self) -> bytes:
        """As `torch.save` lays it out."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", self.pickled)
            archive.writestr("archive/version", "3\n")
        return file.getvalue()

    @property
    def module(self) -> str:
        """A Python file with the classes that an auto_map may name."""
        bases = "class Evil:\n    def __init__(self, *args, **kwargs): ...\n"
        return f"import pathlib\npathlib.Path({str(self.path)!r}).mkdir(exist_ok=True)\n{bases}"

    @property
    def alive(self) -> bool:
        return not self.path.exists()


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def sign(bank: Path, **hashes: str) -> None:
    """Make the checksums of a changed bank's files right, as its author could; those of its rows are given."""

    def edit(config: dict) -> None:
        config["sha256"] |= hashes
        for name in ("key_encoder", "value_encoder/model"):
            config["sha256"][name.split("/")[0]] = file_sha256(bank / f"{name}.safetensors")
        config["sha256"]["config"] = config_sha256(config)

    edit_json(bank / "bank_config.json", edit)


@contextlib.contextmanager
def little_memory(megabytes: int = 400) -> Iterator[None]:
    """No more memory than so much beyond what the process has, and no more than ten seconds of a processor."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < 10
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
