"""A bank in a LanceDB database is the bank that was written there."""

import multiprocessing
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from huggingface_hub import constants
from isolation import set_hf_home

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign.bank_format import CalibrationConfig, config_schema, list_column
from tinyalign_vlm.training.bank import lance, lance_tables
from tinyalign_vlm.training.bank.lance import LanceBank, write_lance

lancedb = pytest.importorskip("lancedb")
ROWS = 700


def many_rows(bank: MemoryBank, rows: int) -> MemoryBank:
    """The bank's encoders over random rows; every image has two, and rows 0 to 9 have the same key."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((rows, bank.config.key_dim), np.float32)
    keys[:10] = keys[0]
    values = rng.standard_normal((rows, bank.config.value_size), np.float32).astype(np.float16)
    columns = {
        "id": pa.array(range(rows), pa.int64()),
        "source_id": pa.array([f"{row // 2:032x}" for row in range(rows)]),
        "caption": pa.array([f"it's number {row}" for row in range(rows)]),
        "key": list_column(keys / np.linalg.norm(keys, axis=1, keepdims=True)),
        "value": list_column(values),
        "thumbnail": pa.nulls(rows, config_schema(bank.config).field("thumbnail").type),
    }
    return bank.with_rows([pa.record_batch(columns, schema=config_schema(bank.config))])


@pytest.fixture(scope="module")
def large(bank) -> MemoryBank:
    return many_rows(bank, ROWS)


@pytest.fixture(scope="module")
def exact(large, tmp_path_factory) -> LanceBank:
    return write_lance(large, tmp_path_factory.mktemp("exact") / "lance")


@pytest.fixture(scope="module")
def indexed(large, tmp_path_factory) -> LanceBank:
    """In three lists."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance, "num_lists", lambda rows: 3)
        return write_lance(large, tmp_path_factory.mktemp("indexed") / "lance", index="IVF_RQ")


@pytest.fixture(scope="module")
def queries(large) -> np.ndarray:
    """Keys, one of them ten times in the bank, and others."""
    noise = np.random.default_rng(1).standard_normal((20, large.config.key_dim), np.float32)
    return np.concatenate([large.keys(np.arange(0, 60, 3)), noise])


def test_exact_search_is_that_of_the_local_bank(large, exact, queries):
    assert exact.index_facts["index"] == "exact" and exact.index_facts["recall_at_5"] == 1
    for top_k in (1, 7, ROWS):
        scores, ids = exact.search(queries, top_k)
        expected_scores, expected = large.search(queries, top_k)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(scores, expected_scores)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    # ten rows with one key, in the order of their ids
    assert exact.search(queries[:1], 10)[1].tolist() == [list(range(10))]


def test_the_index_finds_what_it_says(large, indexed, queries):
    facts = indexed.index_facts
    assert facts["index"] == "IVF_RQ" and facts["recall_at_5"] >= 0.99
    scores, ids = indexed.search(queries, 5)
    expected = large.search(queries, 5)[0]
    assert (scores >= expected[:, -1:] - 1e-6).mean() >= 0.98
    keys = large.keys(ids.reshape(-1)).reshape(*ids.shape, -1).astype(np.float64)
    np.testing.assert_array_equal(scores, np.einsum("nkd,nd->nk", keys, queries.astype(np.float64)).astype(np.float32))
    assert (np.diff(scores, axis=1) <= 0).all() and all(len({*row}) == 5 for row in ids.tolist())
    opened = LanceBank.from_pretrained(indexed.database.uri)
    assert opened.index_facts == facts
    np.testing.assert_array_equal(opened.search(queries, 5)[1], ids)
    opened = LanceBank.from_pretrained(indexed.database.uri, index="exact")
    assert opened.index_facts["index"] == "exact"
    np.testing.assert_array_equal(opened.search(queries, 5)[0], expected)


@pytest.mark.parametrize("kind", ["exact", "indexed"])
def test_a_batch_is_its_queries(kind, request, queries):
    bank = request.getfixturevalue(kind)
    scores, ids = bank.search(queries, 5)
    for row, query in enumerate(queries):
        alone = bank.search(query[None], 5)
        np.testing.assert_array_equal(alone[1][0], ids[row])
        np.testing.assert_array_equal(alone[0][0], scores[row])
    assert bank.search(queries[:0], 5)[1].shape == (0, 5)


@pytest.mark.parametrize("kind", ["exact", "indexed"])
def test_exclusion_still_returns_k_rows(kind, request, large, queries):
    bank = request.getfixturevalue(kind)
    names = [row["source_id"] for row in large.rows(np.arange(0, 60, 3))]
    exclude = [*names, *([None] * 18), list(range(600)), [names[0], 17, -1]]
    scores, ids = bank.search(queries, 6, exclude)
    assert (ids >= 0).all()
    for row, unwanted in enumerate(exclude[:20]):
        assert not set(ids[row].tolist()) & set(large.ids_of(unwanted).tolist())
    assert ids[38].min() >= 600 and not {0, 1, 17} & set(ids[39].tolist())
    if kind == "exact":
        np.testing.assert_array_equal(ids, large.search(queries, 6, exclude)[1])
    # fewer are left than are asked for
    scores, ids = bank.search(queries[:1], 6, [list(range(ROWS - 2))])
    assert ids[0, 2:].tolist() == [-1] * 4 and np.isneginf(scores[0, 2:]).all() and ids[0, :2].min() >= ROWS - 2


def test_rows_are_read_where_they_lie(large, exact):
    ids = np.array([[3, 699, -1], [3, 0, 256]])
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert exact.gather(ids, dtype).equal(large.gather(ids, dtype))
    assert exact.gather(torch.from_numpy(ids)).shape == (2, 3, 3, 5)
    assert exact.gather(np.empty((0, 5), int)).shape == (0, 5, 3, 5)
    assert exact.rows(ids) == large.rows(ids) and exact.rows([-1]) == [None] and exact.rows([]) == []
    np.testing.assert_array_equal(exact.keys([5, 2, 5]), large.keys([5, 2, 5]))
    assert exact.captions == large.captions
    assert exact.ids_of(f"{4:032x}").tolist() == [8, 9] and exact.ids_of("' or id > 0 --").tolist() == []
    with pytest.raises(ValueError, match="another bank"):
        exact.gather([ROWS])
    with pytest.raises(ValueError, match="expected"):
        exact.search(np.zeros((1, 5), np.float32), 1)


def test_a_model_answers_as_with_the_local_bank(make_model, processor, images, bank, tmp_path):
    model = make_model()
    stored = write_lance(bank, tmp_path / "lance")
    inputs = processor(images=images[:3], text=["<image>\nwhat is it?"] * 3, padding=True, return_tensors="pt")
    answers, found = [], []
    for attached in (bank, stored):
        model.attach_memory_bank(attached)
        answers.append(model.generate(**inputs, max_new_tokens=8, do_sample=False))
        found.append(
            model.retrieve(inputs["pixel_values"], top_k=4, exclude_ids=[[0], None, bank.rows([2])[0]["source_id"]])
        )
    assert answers[0].equal(answers[1])
    for name in ("scores", "ids"):
        assert getattr(found[0], name).equal(getattr(found[1], name))
    assert found[0].captions == found[1].captions and found[0].source_ids == found[1].source_ids
    assert stored.thumbnail(3).tobytes() == bank.thumbnail(3).tobytes()
    assert stored.config == replace(bank.config, sha256=stored.config.sha256, num_shards=1) and len(stored) == len(
        bank
    )
    with pytest.raises(ValueError, match="vision tower"):
        make_model("clip").attach_memory_bank(stored)


def test_it_can_be_taken_back(bank, model, processor, images, tmp_path):
    """Rows, columns, thumbnails and encoders are all there: a changed or saved bank is one of this machine."""
    stored = write_lance(bank, tmp_path / "lance")
    stored.save_pretrained(tmp_path / "bank")
    back = MemoryBank.from_pretrained(tmp_path / "bank")
    for name in ("keys", "values", "rows"):
        assert vars(back.config.sha256)[name] == vars(bank.config.sha256)[name]
    fewer = stored.remove(0)
    assert type(fewer) is MemoryBank and fewer.rows([0])[0]["caption"] == bank.rows([1])[0]["caption"]
    more = fewer.add([{"image": images[0], "caption": "again"}], model, processor)
    assert more.captions == [*bank.captions[1:], "again"]


def test_workers_read_values(large, exact, monkeypatch):
    rows = exact.rows_only()
    rows.gather([0])
    pickled = pickle.dumps(rows)
    assert len(pickled) < 20_000 and pickle.loads(pickled).gather([3]).equal(large.gather([3]))
    monkeypatch.setattr(lance_tables, "PROCESS", 0)  # as if it had been forked
    for use in (lambda: rows.gather([0]), lambda: exact.search(exact.keys([0]), 1), lambda: rows.rows([0])):
        with pytest.raises(RuntimeError, match="forked .*multiprocessing_context: spawn"):
            use()


def answers_elsewhere(rows, uri: Path, home: str) -> list:
    """In a process of its own: what is read from the rows of a bank, and what the bank answers that is opened anew."""
    constants.HF_HOME = home
    bank = LanceBank.from_pretrained(uri)
    scores, ids = bank.search(bank.keys(range(3)), 4)
    return [rows.gather([0, 1]).tolist(), scores.tolist(), ids.tolist(), bank.gather(ids).double().sum().item()]


def test_the_command_and_a_new_process(bank, tmp_path, capsys):
    bank.save_pretrained(tmp_path / "bank")
    main(["bank", "lance", str(tmp_path / "bank"), (tmp_path / "lance").as_uri()])
    assert f"{len(bank)} rows" in capsys.readouterr().out
    rows = LanceBank.from_pretrained(tmp_path / "lance").rows_only()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        gathered, *found = pool.apply(answers_elsewhere, (rows, tmp_path / "lance", str(tmp_path / "fresh_home")))
    scores, ids = bank.search(bank.keys(range(3)), 4)
    assert gathered == bank.gather([0, 1]).tolist()
    assert found == [scores.tolist(), ids.tolist(), bank.gather(ids).double().sum().item()]


def test_what_is_no_bank_is_refused(bank, tmp_path, monkeypatch):
    for uri in (tmp_path / "nowhere", (tmp_path / "nowhere").as_uri()):
        with pytest.raises(ValueError, match="no such folder"):
            LanceBank.from_pretrained(uri)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no whole memory bank"):
        LanceBank.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="IVF1024"):
        write_lance(bank, tmp_path / "lance", index="IVF1024")
    assert not (tmp_path / "lance").exists()
    write_lance(bank, tmp_path / "lance")
    with pytest.raises(ValueError, match="another memory bank already"):
        write_lance(bank.remove([0]), tmp_path / "lance")
    with pytest.raises(ValueError, match="index is 'IVF_RQ'"):
        LanceBank.from_pretrained(tmp_path / "lance", index="IVF_RQ")
    # a row too few, then another in its place
    table = lancedb.connect(tmp_path / "lance").open_table("rows")
    last = table.take_offsets([len(bank) - 1]).to_arrow()
    table.delete(f"id = {len(bank) - 1}")
    with pytest.raises(ValueError, match=f"has {len(bank) - 1} rows, expected {len(bank)}"):
        LanceBank.from_pretrained(tmp_path / "lance")
    table.add(last.set_column(0, "id", pa.array([99])))
    with pytest.raises(ValueError, match="changed after"):
        LanceBank.from_pretrained(tmp_path / "lance").gather([len(bank) - 1])
    (manifest, *_) = (tmp_path / "lance" / "bank.lance" / "_versions").glob("*.manifest")
    content = manifest.read_bytes()
    manifest.write_bytes(content[:9])
    with pytest.raises(ValueError, match="lance cannot be read .*write the bank again"):
        LanceBank.from_pretrained(tmp_path / "lance")
    manifest.write_bytes(content)
    lancedb.connect(tmp_path / "lance").open_table("bank").delete("name = 'bank_config.json'")
    with pytest.raises(ValueError, match="lacks bank_config.json"):
        LanceBank.from_pretrained(tmp_path / "lance")
    monkeypatch.setattr(lance_tables, "lancedb", None)
    for work in (lambda: LanceBank.from_pretrained(tmp_path / "lance"), lambda: write_lance(bank, tmp_path / "new")):
        with pytest.raises(ImportError, match=r"pip install tinyalign-vlm\[lance\]"):
            work()


def test_keys_of_another_width_are_refused(bank, large, tmp_path):
    for name in ("lance", "other"):
        write_lance(bank, tmp_path / name)
    database = lancedb.connect(tmp_path / "lance")
    rows = database.open_table("rows").to_arrow()
    database.drop_table("rows")
    narrow = list_column(np.zeros((len(bank), 3), np.float32))
    database.create_table("rows", rows.set_column(rows.column_names.index("key"), "key", narrow))
    with pytest.raises(ValueError, match="column 'key'"):
        LanceBank.from_pretrained(tmp_path / "lance")


def test_a_write_that_was_killed_is_begun_anew(bank, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoryBank, "write_encoders", killed)
        with pytest.raises(KeyboardInterrupt):
            write_lance(bank, tmp_path / "lance")
    with pytest.raises(ValueError, match="no whole memory bank"):
        LanceBank.from_pretrained(tmp_path / "lance")
    assert write_lance(bank, tmp_path / "lance").rows([1]) == bank.rows([1])


def test_a_write_that_was_killed_at_its_very_end(bank, tmp_path):
    """Within the table that is written last, or after it."""
    write_lance(bank, tmp_path / "lance")
    versions = tmp_path / "lance" / f"{lance.FILES}.lance" / "_versions"
    before = versions.stat().st_mtime_ns
    assert write_lance(bank, tmp_path / "lance").rows([1]) == bank.rows([1])
    assert versions.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another memory bank already"):
        write_lance(bank.with_calibration(CalibrationConfig(2, 5, [0.0] * 4, [0.0] * 4)), tmp_path / "lance")
    shutil.rmtree(versions)
    assert write_lance(bank, tmp_path / "lance").rows([1]) == bank.rows([1])


def test_a_full_disk(bank, tmp_path, small_disk):
    bank.save_pretrained(tmp_path / "bank")
    command = ["bank", "lance", str(tmp_path / "bank"), str(small_disk / "lance")]
    space = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 20_000))
    with pytest.raises(SystemExit, match="could not write the bank to .*No space left.*the same again"):
        main(command)
    (small_disk / "filler").unlink()
    with pytest.raises(SystemExit, match="--storage_option is 'x', expected NAME=VALUE"):
        main([*command, "--storage_option", "x"])
    main(command)
    assert LanceBank.from_pretrained(small_disk / "lance").rows([1]) == bank.rows([1])


def test_above_a_size_there_is_an_index(bank, tmp_path, monkeypatch):
    monkeypatch.setattr(lance, "EXACT_ROWS", 500)
    assert write_lance(many_rows(bank, 600), tmp_path / "lance").index_facts["index"] == "IVF_RQ"
    assert write_lance(many_rows(bank, 600), tmp_path / "sq", index="IVF_SQ").index_facts["index"] == "IVF_SQ"
    assert write_lance(many_rows(bank, 600), tmp_path / "exact", index="exact").index_facts["index"] == "exact"


def test_a_poor_index_is_not_used(large, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lance, "num_lists", lambda rows: 1)
    monkeypatch.setattr(lance, "K_FACTORS", (1,))
    monkeypatch.setattr(lance, "GOOD_RECALL", 1.1)
    monkeypatch.setattr(lance, "MIN_RECALL", 1.1)
    assert write_lance(large, tmp_path / "lance", index="IVF_RQ").index_facts["index"] == "exact"


def test_encoders_are_kept_on_this_machine(bank, tmp_path, monkeypatch):
    write_lance(bank, tmp_path / "lance")
    set_hf_home(monkeypatch, tmp_path / "fresh_home")
    LanceBank.from_pretrained(tmp_path / "lance")
    (folder,) = (tmp_path / "fresh_home" / "tinyalign").iterdir()
    assert {path.name for path in Path(folder).iterdir()} >= {"bank_config.json", "key_encoder.safetensors"}
    (folder / "key_encoder.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256"):
        LanceBank.from_pretrained(tmp_path / "lance")
