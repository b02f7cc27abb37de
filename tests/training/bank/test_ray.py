"""`tinyalign bank build --ray`: two workers on a cluster of one machine, one of them killed, the same bank."""

import contextlib
import io
import os
import re
import secrets
import signal
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from banks import content_of
from PIL import Image

from tinyalign_vlm.training.bank import encode
from tinyalign_vlm.training.bank import ray as bank_ray

ROWS, PARTS = 60, 15


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray on this machine; no process and no file of it is left behind."""
    ray = pytest.importorskip("ray")
    token = tmp_path_factory.mktemp("ray") / "token"  # or Ray writes one into the home folder
    token.write_text(secrets.token_hex(32))
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_TMPDIR", folder)  # short: the names of sockets are
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or other tests that run starve the workers
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # or Ray kills workers when other tests take the memory
        patch.setenv("RAY_worker_register_timeout_seconds", "600")  # imports take long on a busy machine
        others = set(psutil.Process().children(recursive=True))  # of tests before
        ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
        processes = set(psutil.Process().children(recursive=True)) - others
        yield
        ray.shutdown()
        deadline = time.time() + 300
        while any(map(runs, processes)):
            assert time.time() < deadline
            time.sleep(0.1)


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended: one that nobody waits for, as in some containers, stays as a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def encoding() -> list[int]:
    """The processes of the actors that encode parts."""
    pids = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            pids += [process.pid] if any("EncodePart" in part for part in process.cmdline()) else []
    return pids


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, make_processor, bank) -> Path:
    """model, data.parquet (7 is broken, 30 has the picture of 2, 50 no caption), and bank, for its value encoder."""
    root = tmp_path_factory.mktemp("place")
    model = make_model()
    model.save_pretrained(root / "model")
    make_processor(model).save_pretrained(root / "model")
    bank.save_pretrained(root / "bank")
    generator, rows = np.random.default_rng(2), []
    for number in range(ROWS):
        picture = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (700, 600, 3), dtype=np.uint8)).save(
            picture, "PNG", compress_level=1
        )
        rows.append({"image": {"bytes": picture.getvalue(), "path": None}, "caption": f"picture {number}"})
    rows[7]["image"]["bytes"] = rows[7]["image"]["bytes"][:60]
    rows[30]["image"] = rows[2]["image"]
    rows[50]["caption"] = " "
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(root / "data.parquet")
    return root


@pytest.fixture
def build(place, tmp_path, monkeypatch, tinyalign):
    monkeypatch.setattr(encode, "PART_ROWS", ROWS // PARTS)

    def run(out: str, *options: str) -> dict[Path, bytes]:
        command = ["--model", place / "model", "--value_encoder", place / "bank", "--dataset", place / "data.parquet"]
        tinyalign("build", *command, "--batch_size", "2", "--out", tmp_path / out, *options)
        return content_of(tmp_path / out)

    run.out = tmp_path
    return run


def test_a_worker_is_killed_and_the_same_bank(build, cluster, monkeypatch, capsys):
    expected, said = build("bank"), capsys.readouterr().out
    assert said.startswith(f"{build.out / 'bank'}: {ROWS - 3} rows; 3 left out (")
    (build.out / "bank").rename(build.out / "local")
    saved, pids = [], []

    def save_file(path: Path, part):
        encode.save_file(path, part)
        saved.extend([path] if path.suffix == ".arrow" else [])
        if len(saved) == PARTS // 2 and not pids:
            pids.extend(encoding())
            os.kill(pids[0], signal.SIGKILL)

    monkeypatch.setattr(bank_ray, "save_file", save_file)
    # no part is encoded before both actors are there, however long one of them takes
    monkeypatch.setattr(bank_ray.ray.data.DataContext.get_current(), "wait_for_min_actors_s", 1200)
    assert build("bank", "--ray", "2") == expected
    assert capsys.readouterr().out.endswith(said)
    assert len(pids) == 2 and pids[0] not in encoding()
    assert len(saved) == PARTS and sorted(os.listdir(build.out)) == ["bank", "local"]


def test_adding_goes_on_where_it_stopped_with_and_without_ray(build, cluster, place, monkeypatch, capsys, tinyalign):
    """Ids go on from the bank's; rows that it has are left out, and others are chosen."""
    build("bank", "--rows", "8", "--seed", "1")
    saved = []

    def add(out: str, *options: str) -> dict[Path, bytes]:
        more = ["--model", place / "model", "--dataset", place / "data.parquet", "--batch_size", "2"]
        chosen = ["--rows", "40", "--seed", "1", "--out", build.out / out]
        tinyalign("add", build.out / "bank", *more, *chosen, *options)
        return content_of(build.out / out)

    def save_file(path: Path, part):
        if len(saved) == 4:
            raise KeyboardInterrupt
        encode.save_file(path, part)
        saved.extend([path] if path.suffix == ".arrow" else [])

    expected = add("local")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(bank_ray, "save_file", save_file)
        add("again", "--ray", "1")
    assert sorted((build.out / ".again.build").glob("*.arrow")) == sorted(saved)
    capsys.readouterr()
    assert add("again") == expected
    assert re.search(r"again: 48 rows, 40 of them new; \d+ left out .[89] duplicate", capsys.readouterr().out)
    assert sorted(os.listdir(build.out)) == ["again", "bank", "local"]


def test_a_number_of_actors(build):
    pytest.importorskip("ray")
    with pytest.raises(SystemExit, match="--ray is -1, expected a number of actors, 1 or more"):
        build("bank", "--ray", "-1")


def test_ray_is_missing(build, monkeypatch):
    monkeypatch.setattr(bank_ray, "ray", None)
    with pytest.raises(SystemExit, match=r'--ray needs Ray: `pip install "tinyalign-vlm\[ray\]"`'):
        build("bank", "--ray")
