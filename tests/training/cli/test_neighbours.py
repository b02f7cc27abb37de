"""`tinyalign neighbours`: neighbours are looked up once, for all runs with the same data and bank."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tinyalign_cli.main import main
from tinyalign_vlm.training.data.neighbours import NeighbourSearch


def tables(folder) -> list:
    return sorted((folder / "home" / "tinyalign" / "neighbours").glob("*.parquet"))


def test_neighbours_are_looked_up_once(folder, monkeypatch):
    main(["neighbours", "stage1.yaml"])
    (path,) = tables(folder)
    table = pq.read_table(path)
    assert table["own_rows"].to_pylist() == [1] * 20 + [0] * 10
    assert np.array(table["memory_ids"].to_pylist()).shape == (30, 4)  # twice memory_top_k
    assert all(index not in ids for index, ids in enumerate(table["memory_ids"].to_pylist()))
    monkeypatch.setattr(NeighbourSearch, "write_table", None)
    main(["train", "stage1.yaml", "--output_dir", "out"])  # finds them
    main(["train", "stage1.yaml", "--output_dir", "one", "--model_kwargs", '{"memory_top_k": 1}'])
    main(["train", "stage1.yaml", "--output_dir", "rag", "--baseline", "text_rag"])
    assert tables(folder) == [path]


def test_there_is_nothing_to_look_up_without_memory(folder):
    with pytest.raises(SystemExit, match="tinyalign: The model has no memory"):
        main(["neighbours", "stage1.yaml", "--model_kwargs", '{"memory_top_k": 0}'])
    with pytest.raises(SystemExit, match="tinyalign: streaming is true"):
        main(["neighbours", "stage1.yaml", "--streaming", "True"])
