"""No benchmark is broken by a change of the package: each can be imported, which runs nothing of it."""

from pathlib import Path
from runpy import run_path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_a_benchmark_is_imported(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    assert run_path(str(FOLDER / name), run_name=Path(name).stem)["__doc__"]
