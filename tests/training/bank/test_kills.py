"""`tinyalign bank add`, `remove`, `merge` and `compact`, killed at any moment or out of space, then run again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from isolation import set_hf_home

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.bank import encode
from tinyalign_vlm.training.bank.verify import bank_problems

SEEDS = 2
COMMANDS = {
    "add": ["bank", "--model", "ROOT/model", "--dataset", "ROOT/data.parquet", "--batch_size", "2"],
    "remove": ["bank", "--where", "license=cc0"],
    "merge": ["bank", "more", "--out", "all"],
    "compact": ["bank"],
}

LAST = 12
# In forked processes, so that imports, which take longer than the work, are done once. Each works in a copy of `start`
# with its own HF_HOME. A killed command is followed by a look at all banks that are there, in another process. Besides
# random moments, each command is killed before each of the last steps at which names of files and folders change.
CHANGES = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import numpy as np
from huggingface_hub import constants
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.bank import build, changes, encode
from tinyalign_cli.main import main
from tinyalign_vlm.training.bank.verify import bank_problems

encode.PART_ROWS = 2
root, seeds, last, commands = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])

def forked(place, work, home="home"):
    pid = os.fork()
    if pid == 0:
        os.chdir(place)
        constants.HF_HOME = str(place / home)
        try:
            work()
        except BaseException as error:
            print(place, repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

# killed before this step, if there is one; else `file` says how many there are
def before_step(step, run, file):
    steps = 0
    def hook(event, _):
        nonlocal steps
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
    def work():
        sys.addaudithook(hook)
        run()
        file.write_text(str(steps))
    return work

def answers(folder):
    bank = MemoryBank.from_pretrained(folder)
    ids = bank.search(bank.keys(np.arange(len(bank))), 2)[1]
    return [bank.captions, ids.tolist(), bank.gather(ids).sum().item()]

def look(expected):
    for name in ("bank", "more", "all"):
        if name == "all" and not Path(name).exists():
            continue
        found = answers(name)  # clears up, as everything that opens a bank does
        assert [*bank_problems(Path(name))] == [], name
        assert found in expected[name], name

def record(file):
    file.write_text(json.dumps({name: answers(name) for name in ("bank", "more", "all") if Path(name).exists()}))

for command, options in commands.items():
    run = lambda: main(["bank", command, *options])
    undisturbed = root / command / "undisturbed"
    shutil.copytree(root / "start", undisturbed)
    began = time.time()
    steps = root / command / "steps"
    assert os.waitpid(forked(undisturbed, before_step(None, run, steps)), 0)[1] == 0
    took = time.time() - began
    recorded = [root / "before.json", root / command / "after.json"]
    for place, file in zip((root / "start", undisturbed), recorded):
        assert os.waitpid(forked(place, lambda: record(file), "another home"), 0)[1] == 0
        shutil.rmtree(place / "another home")
    both = [json.loads(file.read_text()) for file in recorded]
    expected = {name: [found[name] for found in both if name in found] for name in ("bank", "more", "all")}
    for seed in range(seeds):
        generator, kills, place = random.Random(seed), 0, root / command / str(seed)
        shutil.copytree(root / "start", place)
        while True:
            pid = forked(place, run)
            time.sleep(generator.uniform(0.1, max(1, kills / 2)) * took)  # ever longer: the machine may get slower
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if status == 0 and kills:
                break
            if status == 0:  # too late: from the start, and sooner
                took *= 0.7
                shutil.rmtree(place)
                shutil.copytree(root / "start", place)
                continue
            assert os.WIFSIGNALED(status), status
            kills += 1
            if generator.random() < 0.5:
                status = os.waitpid(forked(place, lambda: look(expected), "another home"), 0)[1]
                assert status == 0, "what was killed has left no whole bank"
        shutil.rmtree(place / "another home", ignore_errors=True)
        assert os.waitpid(forked(place, lambda: look({n: found[-1:] for n, found in expected.items()})), 0)[1] == 0
        # it was complete: once more makes no difference
        before = (place / "bank" / "bank_config.json").stat().st_mtime_ns
        assert os.waitpid(forked(place, run), 0)[1] == 0
        assert (place / "bank" / "bank_config.json").stat().st_mtime_ns == before
        print(json.dumps([command, kills]))
    killed = 0  # nearly always: what others keep of the first run, in a cache say, may take later ones fewer steps
    for number in range(last):
        place = root / command / f"step {number}"
        shutil.copytree(root / "start", place)
        status = os.waitpid(forked(place, before_step(int(steps.read_text()) - 1 - number, run, steps)), 0)[1]
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or status == 0, status
        assert os.waitpid(forked(place, run), 0)[1] == 0
    assert killed > last / 2, killed
"""


def options(command: str, root: Path) -> list[str]:
    return [option.replace("ROOT", str(root)) for option in COMMANDS[command]]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def root(images, captions, model, processor, value_encoder, tmp_path_factory) -> Path:
    """model, data.parquet, and `start`: two banks of the same encoders, one of them changed before, and a home."""
    root = tmp_path_factory.mktemp("kills")
    rows = [
        {"image": image, "caption": caption, "license": ("cc0", "cc-by", "mit")[number % 3]}
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    features = {"image": datasets.Image(), **dict.fromkeys(("caption", "license"), datasets.Value("string"))}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(root / "data.parquet")
    with pytest.MonkeyPatch.context() as patch:
        set_hf_home(patch, root / "start" / "home")
        bank = MemoryBank.build(rows[:9], model, processor, value_encoder, keep_columns=["license"])
        bank.save_pretrained(root / "start" / "bank")
        bank.add(rows[9:], model, processor).remove(list(range(6))).save_pretrained(root / "start" / "more")
        main(["bank", "remove", str(root / "start" / "bank"), "--where", "license=mit"])
    return root


@pytest.fixture(scope="module")
def killed(root) -> dict[str, list[int]]:
    """How often each command was killed before it was complete, seed by seed."""
    if sys.platform == "win32":
        pytest.skip("needs fork and SIGKILL")
    command = [
        sys.executable,
        "-c",
        CHANGES,
        root,
        str(SEEDS),
        str(LAST),
        json.dumps({name: options(name, root) for name in COMMANDS}),
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    kills = {name: [] for name in COMMANDS}
    for line in done.stdout.splitlines():
        if line.startswith("["):
            name, count = json.loads(line)
            kills[name].append(count)
    return kills


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment_and_run_again(command, killed, root):
    assert len(killed[command]) == SEEDS
    out = "all" if command == "merge" else "bank"
    expected = content(root / command / "undisturbed")
    if command != "merge":
        assert content(root / "start" / "bank") != content(root / command / "undisturbed" / "bank")
    for name in [*range(SEEDS), *(f"step {number}" for number in range(LAST))]:
        place = root / command / str(name)
        assert content(place / out) == content(root / command / "undisturbed" / out)
        left = {name for name in content(place) if not name.startswith("home/")}
        assert left == {name for name in expected if not name.startswith("home/")}, "something was left beside it"


@pytest.mark.parametrize("command", COMMANDS)
def test_out_of_space_and_run_again(command, killed, root, small_disk, monkeypatch, capsys):
    monkeypatch.setattr(encode, "PART_ROWS", 2)
    place, elsewhere, filler = small_disk / "place", str(root / "another home"), small_disk / "filler"
    shutil.copytree(root / "start", place)
    monkeypatch.chdir(place)
    out, failed = "all" if command == "merge" else "bank", 0
    for free in (0, 8_000, 30_000, 60_000):
        before = content(place / "bank")
        space = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - free)))
        set_hf_home(monkeypatch, place / "home")
        try:
            main(["bank", command, *options(command, root)])
        except SystemExit as error:
            failed += 1
            assert "tinyalign: " in str(error.code) and "No space left" in str(error.code)
            assert content(place / "bank") == before and (out == "bank" or not Path(out).exists())
        filler.unlink()
        set_hf_home(monkeypatch, elsewhere)
        assert [*bank_problems(Path("bank"))] == [] and len(MemoryBank.from_pretrained("bank")) >= 4
    assert failed >= 2
    set_hf_home(monkeypatch, place / "home")
    main(["bank", command, *options(command, root)])
    assert content(place / out) == content(root / command / "undisturbed" / out)
    loaded = MemoryBank.from_pretrained(out)
    assert [*bank_problems(Path(out))] == [] and np.isfinite(loaded.keys(range(len(loaded)))).all()
    assert not list((place / "home" / "tinyalign").glob(".*"))
