"""Neighbours in batches: similarities, spare ones, dropout, what workers hold, captions in prompts."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from banks import config_of, small_value_encoder
from torch.utils.data import DataLoader, Dataset

from tinyalign_vlm.modeling_tinyalign.bank_rows import BankRows
from tinyalign_vlm.processing import add_captions
from tinyalign_vlm.training.arguments.files import read_config
from tinyalign_vlm.training.data.chats import encode_chat, to_messages
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.memory_dropout import MemoryDropout
from tinyalign_vlm.training.data.neighbours import find_neighbours, source_ids_of
from tinyalign_vlm.training.data.preparation import prepare
from tinyalign_vlm.training.evaluation.answers import evaluate_answers

from .short_runs import losses
from .short_runs import run as short_run


@pytest.fixture
def rows(dataset, bank, model, features, images):
    """The rows with four neighbours each and their similarities; the models read two."""
    scores, ids = find_neighbours(bank, model, features, 4, source_ids_of(images))
    rows = dataset.remove_columns("memory_ids").add_column("memory_ids", ids.tolist())
    return rows.add_column("memory_scores", scores.tolist())


def indexed(rows) -> list[dict]:
    return [{**row, "feature_index": index} for index, row in enumerate(rows)]


def run(model, processor, rows, bank, features, folder, eval_dataset=None, **settings):
    return short_run(1, model, processor, rows, bank, folder, features, eval_dataset, seed=3, **settings)


def test_a_batch_has_the_nearest_and_their_similarities(processor, rows, bank, features):
    batch = TrainingCollator(processor, features, bank, dropout=MemoryDropout(0.0, 2))(indexed(rows))
    assert batch["memory_ids"].tolist() == [ids[:2] for ids in rows["memory_ids"]]
    np.testing.assert_allclose(batch["memory_scores"], np.array(rows["memory_scores"])[:, :2], rtol=1e-6)
    assert torch.equal(batch["memory_values"], bank.gather(batch["memory_ids"], torch.float16))


def test_similarities_of_other_neighbours_are_refused(processor, rows, bank, features):
    (row,) = indexed(rows)[:1]
    with pytest.raises(ValueError, match="they must be as many"):
        TrainingCollator(processor, features, bank)([{**row, "memory_scores": row["memory_scores"][:2]}])


def test_dropout_reaches_the_model(make_model, processor, rows, bank, features):
    """Off for all is the model with its memory off."""
    collator = TrainingCollator(processor, features, bank, dropout=MemoryDropout(1.0, 2))
    batch = collator(indexed(rows))
    ids = batch["memory_ids"]
    assert (ids[(ids < 0).all(1)].numel() > 0) and (ids >= 0).any()
    assert torch.equal(ids < 0, batch["memory_scores"].isinf())
    assert collator.for_evaluation()(indexed(rows))["memory_ids"].tolist() == [row[:2] for row in rows["memory_ids"]]
    model = make_model()
    off = (ids < 0).all(1)
    some = {name: tensor[off] for name, tensor in batch.items()}
    plain = {name: tensor for name, tensor in some.items() if not name.startswith("memory")}
    with torch.no_grad():
        torch.testing.assert_close(model(**some).logits, model(**plain, memory="off").logits)


def test_several_images_of_a_row_are_treated_each_for_itself(processor, bank, features):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "blue"}]
    row = {
        "messages": chat,
        "feature_index": [0, 1],
        "memory_ids": [[3, 4, 5], [6, 7, 8]],
        "memory_scores": [[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]],
    }
    text = {"messages": [{"role": "user", "content": "what?"}, chat[1]], "feature_index": [], "memory_ids": []}
    batch = TrainingCollator(processor, features, bank, dropout=MemoryDropout(0.0, 2))(
        [{**text, "memory_scores": []}, row]
    )
    assert batch["memory_ids"].tolist() == [[3, 4], [6, 7]]
    np.testing.assert_allclose(batch["memory_scores"], [[0.9, 0.8], [0.6, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_with_dropout_resumes_and_differs_by_epoch(
    workers, make_model, processor, rows, bank, features, tmp_path
):
    settings = {
        "memory_dropout": 0.7,
        "max_steps": 6,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
    }
    whole = run(make_model(), processor, rows, bank, features, tmp_path / "whole", **settings)
    without = run(make_model(), processor, rows, bank, features, tmp_path / "without", max_steps=6)
    assert losses(whole) != losses(without)
    assert int(whole.data_collator.dropout.epoch) == 1  # 12 rows in batches of 4: the second epoch began
    if workers == 0:
        run(make_model(), processor, rows, bank, features, tmp_path / "part", **settings, save_steps=2)
        for step in ("checkpoint-6", "checkpoint-4"):  # as if it had been killed in the second epoch
            for file in (tmp_path / "part" / step).glob("*"):
                file.unlink()
        resumed = run(make_model(), processor, rows, bank, features, tmp_path / "part", **settings, save_steps=2)
        assert losses(resumed) == losses(whole)


def test_dropout_is_the_same_in_large_and_small_batches(make_model, processor, rows, bank, features, tmp_path):
    settings = {"memory_dropout": 0.7, "max_grad_norm": 0.0, "optim": "sgd", "max_steps": 4}
    large = run(
        make_model(), processor, rows, bank, features, tmp_path / "l", **settings, per_device_train_batch_size=6
    )
    small = run(
        make_model(),
        processor,
        rows,
        bank,
        features,
        tmp_path / "s",
        **settings,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    np.testing.assert_allclose(losses(large), losses(small), rtol=1e-4)


def test_evaluation_has_no_dropout(make_model, processor, rows, bank, features, tmp_path):
    rows = rows.add_column("feature_index", list(range(12)))
    evaluated = []
    for rate in (0.0, 1.0):
        settings = {"max_steps": 1, "learning_rate": 0.0, "memory_dropout": rate}
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
        folder = tmp_path / str(rate)
        trainer = run(make_model(), processor, rows, bank, features, folder, rows, **settings)
        evaluated.append(losses(trainer, "eval_loss"))
    assert evaluated[0] == evaluated[1] != []


def test_scores_are_asked_for_where_the_model_needs_them(
    make_model, processor, dataset, rows, bank, features, tmp_path
):
    for config in ({"memory_scores": True}, {"retrieval_threshold": 0.5}):
        with pytest.raises(ValueError, match="no memory_scores, its columns are"):
            run(make_model(**config), processor, dataset, bank, features, tmp_path / "missing")
    trained = run(make_model(memory_scores=True), processor, rows, bank, features, tmp_path / "scores")
    assert np.isfinite(losses(trained)).all()
    everything = run(make_model(), processor, rows, bank, features, tmp_path / "everything")
    nothing = run(make_model(retrieval_threshold=1.1), processor, rows, bank, features, tmp_path / "nothing")
    assert losses(everything) != losses(nothing)
    spare = dataset.add_column("memory_scores", [row[:2] for row in rows["memory_scores"]])
    assert losses(run(make_model(), processor, spare, bank, features, tmp_path / "2")) == losses(everything)


# ---------------------------------------------------------------------- what workers hold


@pytest.fixture
def large_bank(tmp_path) -> BankRows:
    """200 MB of values."""
    rows, shape = 20_000, (50, 100)
    encoder = small_value_encoder(num_latents=shape[0], latent_dim=shape[1])
    bank = BankRows(replace(config_of(4, encoder, quantized=False), num_rows=rows))
    bank.files.folder.mkdir(parents=True, exist_ok=True)
    values = np.lib.format.open_memmap(bank.files.folder / "values.npy", "w+", np.float16, (rows, *shape))
    values[:] = 1
    values.flush()
    return bank


def own_megabytes() -> float:
    """Memory of this process that no file backs: what it would not share with others."""
    with open("/proc/self/smaps_rollup") as file:
        (line,) = [line for line in file if line.startswith("Anonymous:")]
    return int(line.split()[1]) / 1024


class Reads(Dataset):
    """Item i reads a tenth of the bank and says how much memory of its own the worker has."""

    def __init__(self, bank: BankRows):
        self.bank = bank

    def __len__(self) -> int:
        return 10

    def __getitem__(self, part: int) -> tuple[float, float, int]:
        before = own_megabytes()
        for start in range(part * 2000, (part + 1) * 2000, 50):
            assert self.bank.gather(np.arange(start, start + 50), torch.float16).min() == 1
        return before, own_megabytes(), torch.utils.data.get_worker_info().id


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_share_the_bank(start, large_bank):
    loader = DataLoader(Reads(large_bank), batch_size=None, num_workers=2, multiprocessing_context=start)
    read = list(loader)
    assert {worker for _, _, worker in read} == {0, 1}
    for worker in (0, 1):
        before, after = read[worker][0], read[8 + worker][1]
        assert after - before < 20  # of the 100 MB that it read


def test_a_collator_is_small_to_send(processor, bank, features, tmp_path):
    np.save(tmp_path / "features.npy", np.zeros((1000, 16, 16), np.float16))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    size = len(pickle.dumps(TrainingCollator(processor, mapped, bank, dropout=MemoryDropout(0.5, 2))))
    bare = len(pickle.dumps(processor))
    assert size - bare < 20_000
    assert len(pickle.dumps(bank)) > 20_000  # its encoders


# ---------------------------------------------------------------------- captions in prompts


def test_captions_come_before_the_question():
    chat = to_messages("what?", "blue")
    written = add_captions(chat, ["red", "green"])
    assert [part.get("text") for part in written[0]["content"]] == [None, "Similar: red; green\n", "what?"]
    assert written[1] == chat[1] and len(chat[0]["content"]) == 2
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "what?"}]
    assert add_captions(plain, ["red"])[1]["content"] == "Similar: red\nwhat?"
    assert add_captions(chat, []) is chat


def test_text_only_retrieval_reads_captions_at_run_time(
    make_model, make_processor, rows, bank, features, captions, tmp_path
):
    model = make_model(memory_top_k=0, prompt_captions=2)
    processor = make_processor(model)
    collator = TrainingCollator(processor, features, bank, dropout=MemoryDropout(0.0, 2), prompt_captions=2)
    (row,) = indexed(rows)[:1]
    batch = collator([row])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert f"Similar: {'; '.join(captions[index] for index in row['memory_ids'][:2])}\n" in text
    assert not {"memory_ids", "memory_values"} & batch.keys()
    trainer = run(model, processor, rows, bank, features, tmp_path)
    assert np.isfinite(losses(trainer)).all()
    other = rows.remove_columns(["memory_ids", "memory_scores"])
    other = other.add_column("memory_ids", [ids[2:] for ids in rows["memory_ids"]])
    first, second = (
        evaluate_answers(model, processor, one, bank, features, max_new_tokens=2) for one in (rows, other)
    )
    assert not np.allclose(first.losses, second.losses)


def test_captions_that_do_not_fit_are_left_out(make_model, make_processor, rows, bank, features):
    processor = make_processor(make_model(memory_top_k=0, prompt_captions=4))
    (row,) = indexed(rows)[:1]

    def length(limit: int) -> int:
        dropout = MemoryDropout(0.0, 4)
        collator = TrainingCollator(processor, features, bank, limit, dropout=dropout, prompt_captions=4)
        return collator([row])["input_ids"].shape[1]

    bare, full = len(encode_chat(processor, row["messages"])[0]), length(10_000)
    assert length(bare) == bare and bare < length(full - 1) < full


def test_rows_of_several_images_do_not_retrieve_each_other(files, captions, monkeypatch):
    monkeypatch.chdir(files)
    question = {"from": "human", "value": "<image><image><image>which is red?"}
    rows = [
        {"images": [f"{3 * row + i}.png" for i in range(3)]}
        | {"conversations": [question, {"from": "gpt", "value": captions[row]}]}
        for row in range(4)
    ]
    (files / "several.json").write_text(json.dumps(rows))
    rows = prepare(read_config(["stage1.yaml"], ["--dataset", "several.json"])).rows
    for number, row in enumerate(rows):
        found = {neighbour for image in row["memory_ids"] for neighbour in image}
        assert found and not found & set(range(3 * number, 3 * number + 3))
