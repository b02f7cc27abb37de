"""Folders of the suite's own in place of the user's, and a look at what was written elsewhere.

To be imported before anything that reads the environment. All processes that tests start inherit it.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# These would lead past the new HOME, or to an account of the user's.
FORGOTTEN = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "MPL", "NUMBA_", "RAY_")
FORGOTTEN += ("LANCE_", "WANDB_", "TRACKIO_", "GRADIO_", "EVALUATE_")
# What tools are known to leave in a working tree.
TOOLS = (".git", ".venv*", "__pycache__", "*.egg-info", ".pytest_cache", ".ruff_cache", ".hypothesis", ".cache")
TOOLS += (".idea", ".vscode")
# The temporary folder belongs to all programs. These names are of libraries that may not follow TMPDIR.
TEMPORARY = ("ray", "torchinductor_*")


@dataclass
class Place:
    """A folder that tests must leave as it is.

    Attributes:
        folder: May be missing.
        depth: Levels below `folder` that are looked at.
        files: Notice changed files too, not only new names. Not where other programs write.
        names: Patterns of the names in `folder` that are looked at.
        ignored: Patterns of names that are passed over, at any depth.
    """

    folder: Path
    depth: int = 1
    files: bool = False
    names: tuple[str, ...] = ("*",)
    ignored: tuple[str, ...] = ()
    before: dict[str, int] = field(init=False)

    def __post_init__(self):
        self.before = dict(self.entries())

    def entries(self) -> Iterator[tuple[str, int]]:
        """Yield each path, with the time of its last change in ns where files are noticed, 0 otherwise."""
        levels = [(str(self.folder), 1)]
        while levels:
            folder, level = levels.pop()
            for entry in list_folder(folder):
                names = self.names if level == 1 else ("*",)
                if not matches(entry.name, names) or matches(entry.name, self.ignored):
                    continue
                is_folder = entry.is_dir(follow_symlinks=False)
                yield entry.path, 0 if is_folder or not self.files else changed_at(entry)
                if is_folder and level < self.depth:
                    levels.append((entry.path, level + 1))

    def changes(self) -> list[str]:
        """Return the paths that are new or have changed since this object was made."""
        return sorted(path for path, time in self.entries() if self.before.get(path) != time)


def list_folder(folder: str) -> list[os.DirEntry]:
    try:
        return list(os.scandir(folder))
    except OSError:  # it is missing, or not ours
        return []


def changed_at(entry: os.DirEntry) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_mtime_ns
    except FileNotFoundError:  # it was removed just now
        return 0


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def watched_places() -> list[Place]:
    """Return the user's folders and the working tree as they are now."""
    home = Path.home()
    hf_home = Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface"))
    temporary = {Path(tempfile.gettempdir()), Path("/tmp")}
    pictures = Path(os.environ.get("TINYALIGN_SCREENSHOTS", "-")).name  # of docs, which a test makes when asked to
    return [
        Place(ROOT, depth=20, files=True, ignored=(*TOOLS, pictures)),
        Place(hf_home, depth=20, files=True),
        Place(home),
        *(Place(home / name, depth=2) for name in (".cache", ".config", ".local")),
        *(Place(folder, names=TEMPORARY) for folder in temporary),
    ]


def enter_own_folders() -> None:
    """Let the environment name new folders, which are removed when this process ends."""
    system = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="tinyalign-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in [*os.environ]:
        if name.startswith(FORGOTTEN) and name != "HF_HUB_OFFLINE":
            del os.environ[name]
    for variable, name in (("HOME", "home"), ("TMPDIR", "tmp"), ("HF_HOME", "hf_home")):
        (folder / name).mkdir()
        os.environ[variable] = str(folder / name)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", system)  # what a failed test leaves is kept, as pytest does
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # all servers of tests are on this machine
    tempfile.tempdir = None  # it is looked up anew


def set_hf_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let this process, and those it starts, keep their caches in `folder`."""
    patch.setattr("huggingface_hub.constants.HF_HOME", str(folder))
    patch.setattr(os, "environ", os.environ)  # `datasets.map(num_proc=...)` leaves a copy, which nothing would undo
    patch.setenv("HF_HOME", str(folder))


def written_elsewhere() -> list[str]:
    """Return the paths outside the suite's own folders that have appeared or changed in the course of this run."""
    return sorted({path for place in PLACES for path in place.changes()})


def complaint(paths: list[str], most: int = 20) -> str:
    lines = [f"  {path}" for path in paths[:most]]
    if len(paths) > most:
        lines.append(f"  and {len(paths) - most} more")
    text = "The tests wrote outside their own folders, or another program did while they ran"
    return "\n".join([f"{text}: {len(paths)} new or changed, expected none:", *lines])


if "PYTEST_XDIST_WORKER" in os.environ:  # it has inherited all but a cache of its own: some tests remove banks there
    PLACES = []
    suffix = f"-{os.environ['PYTEST_XDIST_WORKER']}"
    os.environ["HF_HOME"] = os.environ["HF_HOME"].removesuffix(suffix) + suffix  # a spawned process comes here again
else:
    PLACES = watched_places()
    enter_own_folders()
