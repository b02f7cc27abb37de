"""Rows searched by key, gathered and read."""

import copy
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from banks import bank_of, unit

from tinyalign_vlm.modeling_tinyalign import bank_index


def full_of_row_numbers(rows: int) -> np.ndarray:
    return np.repeat(np.arange(rows, dtype=np.float16), 15).reshape(rows, 3, 5)


def test_search_is_exact():
    keys, queries = unit(500, 24), unit(40, 24, seed=1)
    bank = bank_of(keys)
    scores, ids = bank.search(queries, 7)
    products = queries.astype(np.float64) @ keys.T.astype(np.float64)
    assert (ids == np.argsort(-products, axis=1)[:, :7]).all()
    np.testing.assert_allclose(scores, np.take_along_axis(products, ids, 1), rtol=1e-6)
    assert scores.dtype == np.float32 and ids.dtype == np.int64


def test_batch_equals_singles():
    bank, queries = bank_of(unit(3000, 48)), unit(300, 48, seed=1)
    scores, ids = bank.search(queries, 5)
    for i in range(0, 300, 7):
        one_scores, one_ids = bank.search(queries[i : i + 1], 5)
        assert (one_ids == ids[i]).all() and (one_scores == scores[i]).all()


@pytest.mark.parametrize("copies", [3, 20, 200])
def test_ties_are_ordered_by_id(copies):
    keys = np.concatenate([unit(30, 8)] + [unit(1, 8, seed=2)] * copies + [unit(30, 8, seed=3)])
    bank, query = bank_of(keys), unit(1, 8, seed=2)
    expected = list(range(30, 30 + min(copies, 5)))
    for queries in (query, np.repeat(query, 40, axis=0)):
        assert (bank.search(queries, 5)[1][:, : len(expected)] == expected).all()
    exclude = [[30, 31]]
    assert bank.search(query, 5, exclude=exclude)[1][0, : len(expected) - 2].tolist() == expected[2:] or copies > 5
    if copies > 6:
        assert bank.search(query, 5, exclude=exclude)[1].tolist() == [[32, 33, 34, 35, 36]]


def test_equal_keys_everywhere():
    assert bank_of(np.zeros((400, 4))).search(np.ones((2, 4)), 3)[1].tolist() == [[0, 1, 2]] * 2


def test_exclusion_still_returns_k():
    sources = [f"{i // 4:032x}" for i in range(80)]
    bank = bank_of(unit(80, 8), source_ids=sources)
    queries = bank.key_array[::4].copy()
    full = bank.search(queries, 80)[1]
    _, ids = bank.search(queries, 5, exclude=[sources[4 * i] for i in range(20)])
    for i in range(20):
        assert ids[i].tolist() == [j for j in full[i] if j // 4 != i][:5]
    mixed = [None, f"{1:032x}", [8, 9, -1], torch.tensor([12]), np.array([], int), 20, *[None] * 14]
    _, ids = bank.search(queries, 5, exclude=mixed)
    for i, unwanted in enumerate([[], [4, 5, 6, 7], [8, 9], [12], [], [20]]):
        assert ids[i].tolist() == [j for j in full[i] if j not in unwanted][:5]


def test_fewer_rows_than_asked_for():
    bank = bank_of(unit(4, 8))
    scores, ids = bank.search(torch.tensor(unit(2, 8)), 3, exclude=[[0, 2], None])
    assert ids[0].tolist()[2] == -1 and sorted(ids[0, :2].tolist()) == [1, 3]
    assert scores[0, 2] == -torch.inf and (ids[1] >= 0).all()
    values = bank.gather(ids)
    assert values.shape == (2, 3, 3, 5) and (values[0, 2] == 0).all()
    assert [row and row["id"] for row in bank.rows(ids)[0]] == [*ids[0, :2].tolist(), None]


def test_tensors_and_arrays():
    bank, queries = bank_of(unit(50, 8), values=full_of_row_numbers(50)), unit(6, 8, seed=1)
    scores, ids = bank.search(queries, 4)
    strided = np.asfortranarray(queries.astype(np.float64))
    assert (bank.search(strided, 4)[1] == ids).all()
    tensor = torch.tensor(queries, requires_grad=True)
    tensor_scores, tensor_ids = bank.search(tensor, 4)
    assert torch.is_tensor(tensor_ids) and (tensor_ids.numpy() == ids).all() and not tensor_scores.requires_grad
    assert bank.search(queries[:0], 4)[1].shape == (0, 4)
    assert bank.gather(ids).equal(bank.gather(tensor_ids)) and bank.gather(ids).dtype == torch.float32
    assert bank.gather(ids, torch.bfloat16).dtype == torch.bfloat16
    assert bank.gather(np.empty((0, 4), np.int64)).shape == (0, 4, 3, 5)
    assert (bank.gather([[3, 7]]) == torch.tensor([3.0, 7.0])[None, :, None, None]).all()


def test_wrong_searches():
    bank, queries = bank_of(unit(5, 8)), unit(2, 8)
    with pytest.raises(ValueError, match="top_k is 6, but the bank has 5 rows"):
        bank.search(queries, 6)
    with pytest.raises(ValueError, match="top_k is 0"):
        bank.search(queries, 0)
    with pytest.raises(ValueError, match=r"shape \(2, 7\), expected \(n, 8\)"):
        bank.search(queries[:, :7], 1)
    with pytest.raises(ValueError, match="exclude has 1 items for 2 queries"):
        bank.search(queries, 1, exclude=[None])
    with pytest.raises(ValueError, match="exclude is 'ab', expected a list with one item a query"):
        bank.search(queries, 1, exclude="ab")
    with pytest.raises(ValueError, match="top_k is 2.0"):
        bank.search(queries, 2.0)
    with pytest.raises(TypeError, match="row ids are of float64, expected integers"):
        bank.search(queries, 1, exclude=[[0.5], None])
    with pytest.raises(ValueError, match="NaN"):
        bank.search(np.full((1, 8), np.nan), 1)
    with pytest.raises(ValueError, match="Row ids run from 0 to 5, expected -1 .none. to 4"):
        bank.gather([0, 5])


class SearchingDataset(torch.utils.data.Dataset):
    def __init__(self, bank):
        self.bank = bank

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.bank.search(unit(1, 8), 1)


class GatheringDataset(SearchingDataset):
    def __getitem__(self, i):
        return self.bank.gather([i])


def test_workers_gather_and_never_search():
    bank = bank_of(unit(5, 8), values=full_of_row_numbers(5))
    bank.search(unit(1, 8), 1)
    values = torch.cat(list(torch.utils.data.DataLoader(GatheringDataset(bank), num_workers=1)))
    assert values[:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="DataLoader worker, where faiss hangs"):
        next(iter(torch.utils.data.DataLoader(SearchingDataset(bank), num_workers=1)))


def test_no_search_in_a_fork(monkeypatch):
    bank = bank_of(unit(5, 8))
    monkeypatch.setattr(bank_index, "_searching_process", os.getpid() + 1)
    with pytest.raises(RuntimeError, match="a forked process"):
        bank.search(unit(1, 8), 1)


@pytest.mark.parametrize("quantized", [False, True])
def test_no_row(quantized):
    """Exclusion leaves none, or none is asked for."""
    bank = bank_of(unit(3, 7), quantized)
    scores, ids = bank.search(bank.keys([0]), 2, exclude=[[0, 1, 2]])
    assert ids.tolist() == [[-1, -1]] and np.isneginf(scores).all()
    assert bank.keys([]).shape == (0, 7) and bank.gather(np.zeros((2, 0), int)).shape == (2, 0, 3, 5)
    assert bank.rows(np.zeros((2, 0), int)) == [[], []] and bank.rows([]) == []


def test_rows_of_gigabytes_of_captions():
    """One text of 4 MiB, 600 times: a copy of all would not fit into one buffer of pyarrow's."""
    bank, text = copy.copy(bank_of(unit(10, 8))), "x" * 2**22
    table = bank.table.set_column(bank.table.schema.get_field_index("caption"), "caption", pa.array([text] * 10))
    bank.table, bank.config = pa.concat_tables([table] * 60), replace(bank.config, num_rows=600)
    assert [row["caption"] == text for row in bank.rows([3, 599])] == [True, True]
