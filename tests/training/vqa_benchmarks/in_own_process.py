"""Tests that import lmms-eval, which changes the process: test_tasks.py runs them in one of their own."""

import io
import json
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from vqa_rows import gqa_rows, mme_rows, mmvet_rows, pope_rows, save, scienceqa_rows, textvqa_rows, write

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign.row_encoder import image_source_id
from tinyalign_vlm.processing.images import decode_image
from tinyalign_vlm.training.models import load_to_answer
from tinyalign_vlm.training.vqa_benchmarks import run
from tinyalign_vlm.training.vqa_benchmarks.benchmarks import BENCHMARKS
from tinyalign_vlm.training.vqa_benchmarks.comparison import compare, read_samples
from tinyalign_vlm.training.vqa_benchmarks.judge import judge_answer
from tinyalign_vlm.training.vqa_benchmarks.metrics import StrictPopeF1
from tinyalign_vlm.training.vqa_benchmarks.run import answer_questions, image_ids, variants_of, weights_sha256
from tinyalign_vlm.training.vqa_benchmarks.samples import samples_path
from tinyalign_vlm.training.vqa_benchmarks.tasks import LocalTask, Questions

SCORED = [name for name in BENCHMARKS if name not in ("mmvet", "vqav2_testdev")]
SUFFIX = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PROMPTS = {
    "gqa": "What is 0?" + SUFFIX,
    "pope": "Is there a 0 in the image?" + SUFFIX,
    "mme": "Is it Yes 0?" + SUFFIX,
    "scienceqa": f"Which is 0?\nA. one\nB. two\n{LETTER}",
    "textvqa": "What does sign 0 say?\nReference OCR token: STOP, 0" + SUFFIX,
    "textvqa_without_ocr": "What does sign 0 say?" + SUFFIX,
    "mmmu": f"What is <image 1> in 0?\nA. blue\nB. red\nC. green\n\n{LETTER}",
    "mmvet": "What is x in 0?",
    "vqav2_val": "How many are 0?" + SUFFIX,
    "vqav2_testdev": "How many are 0?" + SUFFIX,
}
TOKENS = {"pope": 128, "mmmu": 128, "textvqa": None, "textvqa_without_ocr": None, "mmvet": 1024}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def questions(data, monkeypatch_module):
    monkeypatch_module.setenv("OPENAI_API_KEY", "none")
    return {name: Questions(name, data, judge="judge") for name in BENCHMARKS}


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def sampled(questions: Questions, answer) -> pd.DataFrame:
    """Return the samples of a model: `answer` takes a row and its target."""
    samples = []
    for number in questions.numbers:
        row = questions.ask(number)[0]
        target = questions.target(row)
        text = answer(row, target)
        (category, *_) = [*questions.benchmark.categories(row), ""]
        sample = {"answer": text, "target": target, "category": category, "unit": questions.units[number]}
        samples.append({**sample, "score": questions.score(questions.ask(number)[0], text)})
    return pd.DataFrame(samples)


def values(questions: Questions, answer, metric=None) -> dict[str, float]:
    metric, frame = metric or questions.benchmark.metric, sampled(questions, answer)
    return metric().compute(**{column: frame[column].tolist() for column in metric.columns})


@pytest.mark.parametrize("name", SCORED)
def test_the_truth_has_all_points(questions, name):
    found = values(questions[name], lambda row, target: target)
    if name == "mme":
        assert found == pytest.approx({"perception": 2000, "cognition": 800})
    else:
        assert next(iter(found.values())) == 100


def test_constant_answers(questions):
    found = values(questions["pope"], lambda row, target: "Yes")
    assert (found["accuracy"], round(found["F1"], 1), found["yes answers"]) == (50, 66.7, 100)
    assert values(questions["pope"], lambda row, target: "No")["F1"] == 0
    assert values(questions["pope"], lambda row, target: "Yes.")["accuracy"] == 50
    assert values(questions["pope"], lambda row, target: "Yes.", StrictPopeF1)["accuracy"] == 0
    for said in ("Yes", "No", "Yes."):
        found = values(questions["mme"], lambda row, target, said=said: said)
        assert found == pytest.approx({"perception": 500, "cognition": 200})
    assert values(questions["mmmu"], lambda row, target: "A") == {"accuracy": 50}  # 6 of 12 rows
    letters = np.random.default_rng(0)
    said = [values(questions["scienceqa"], lambda row, target: letters.choice(list("ABCD")[: len(row["choices"])]))]
    said += [values(questions["scienceqa"], lambda row, target: letters.choice(list("ABCD")[: len(row["choices"])]))]
    expected = 100 * np.mean([1 / (2 + number % 3) for number in range(12)])
    assert abs(np.mean([found["accuracy"] for found in said]) - expected) < 35


@pytest.mark.parametrize("name", SCORED)
def test_metrics_equal_the_aggregates_of_lmms_eval(questions, name):
    """With answers that are right, wrong and odd; MMMU rounds to five digits."""
    asked, generator = questions[name], np.random.default_rng(3)
    said, results = [], {}
    for number in asked.numbers:
        row = asked.ask(number)[0]
        odd = generator.choice(["yes", "No", "Yes.", "A", "stop sign", "2", "B. two"])
        text = asked.target(row) if generator.random() < 0.4 else str(odd)
        said.append(text)
        random.seed(row.get("id"))  # as `score` does
        for key, value in LocalTask.process_results.__wrapped__(asked.task, row, [text]).items():
            results.setdefault(key, []).append(value)
    theirs = {
        key: 100 * aggregate(results[key])
        for key, aggregate in asked.task.aggregation().items()
        if key in results and key != "submission"
    }
    texts = iter(said)
    metric = asked.benchmark.shipped or asked.benchmark.metric
    ours = values(asked, lambda row, target: next(texts), metric)
    if name == "pope":
        theirs = {key.removeprefix("pope_").replace("f1_score", "F1"): value for key, value in theirs.items()}
        assert {key: ours[key] for key in ("accuracy", "precision", "F1")} == pytest.approx(
            {key: theirs[key] for key in ("accuracy", "precision", "F1")}, rel=1e-14
        )
    elif name == "mme":
        assert [ours["perception"], ours["cognition"]] == pytest.approx(
            [theirs["mme_perception_score"] / 100, theirs["mme_cognition_score"] / 100], rel=1e-14
        )
    else:
        (expected,) = theirs.values()
        assert ours["accuracy"] == pytest.approx(expected, rel=1e-14, abs=5e-4 if name == "mmmu" else 0)


def test_an_answer_that_mmmu_cannot_read_scores_the_same_whatever_came_before(questions):
    asked = questions["mmmu"]
    scores = [asked.score(asked.ask(number)[0], "I do not know") for number in asked.numbers]
    again = [asked.score(asked.ask(number)[0], "I do not know") for number in reversed(asked.numbers)]
    assert scores == again[::-1] and 0 < sum(scores) < len(scores)


def test_prompts_and_settings(questions):
    assert {name: asked.prompts[0] for name, asked in questions.items()} == PROMPTS
    tokens = {name: asked.generation.get("max_new_tokens") for name, asked in questions.items()}
    assert tokens == {name: TOKENS.get(name, 16) for name in questions}
    assert questions["mmvet"].generation["until"] == []  # an answer has several paragraphs
    chat = questions["mmmu"].ask(1)[1]
    assert [part["type"] for part in chat[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert questions["gqa"].ask(4)[0]["image"].size == (24, 24)


def test_a_limit_takes_whole_images(data):
    for name, each in {"mme": 2, "pope": 18, "gqa": 3, "scienceqa": 1}.items():
        asked = Questions(name, data, limit=2)
        assert set(Counter(asked.units[number] for number in asked.numbers).values()) == {each}
        categories = 14 if name == "mme" else 1  # two images in each of MME's
        assert len(asked.numbers) == 2 * each * categories
    assert {Questions("vqav2_val", data, images={1, 3}).units[n] for n in (2, 6)} == {"1", "3"}
    with pytest.raises(ValueError, match="VQAv2 val has no question about the images that were asked for"):
        Questions("vqav2_val", data, images={77})
    with pytest.raises(ValueError, match="has neither gqa.parquet nor a folder gqa of Parquet files"):
        Questions("gqa", data / "nowhere")


@pytest.fixture(scope="module")
def judge(monkeypatch_module):
    """A judge on this machine that says what `judge.says` is."""

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.server.prompts.append(asked.pop("messages")[0]["content"])
            self.server.settings = asked
            message = {"role": "assistant", "content": self.server.says}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            body = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
            content = self.server.body or json.dumps(body).encode()
            kind = "text/html" if content.startswith(b"<") else "application/json"
            self.send_response(200)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Judge)
    server.prompts, server.says, server.body = [], "0.5", None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch_module.setenv("OPENAI_API_KEY", "none")
    monkeypatch_module.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield server
    server.shutdown()


def test_a_judge_says_a_number_or_it_is_an_error(questions, judge, monkeypatch):
    judge.says = "0.5"
    assert values(questions["mmvet"], lambda row, target: "x = -1") == {"accuracy": 50}
    for says in (" 0.5.\nIt has one of two.", "0.5 | one of two", "0.5 since one of two is there"):
        judge.says = says
        assert values(questions["mmvet"], lambda row, target: "x = -1") == {"accuracy": 50}
    assert judge.prompts[-1].endswith("\nWhat is x in 3? | -1 <AND> -5 | x = -1 |")
    assert "\nQuestion | Ground truth | Prediction" in judge.prompts[-1]
    for says in (
        "1.7",
        "I would say so",
        "-0.5",
        "",
        "0,5",
        "1/5",
        "0.5x",
        "10",
        "1 out of 10",
        "1 / 10",
        "0 to 1",
        "1 7",
    ):
        judge.says = says
        with pytest.raises(ValueError, match="expected a number from 0 to 1"):
            values(questions["mmvet"], lambda row, target: "x = -1")
    for body in (b"<html>\nWelcome</html>", b'{"choices": null}', b'{"error": "no key"}'):
        monkeypatch.setattr(judge, "body", body)
        with pytest.raises(
            ValueError, match=r"judge cannot be asked \(it answers .*ends with /v1, OPENAI_API_KEY and"
        ):
            values(questions["mmvet"], lambda row, target: "x = -1")
    monkeypatch.setattr(judge, "body", None)
    before = questions["mmvet"].fingerprint
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert questions["mmvet"].fingerprint != before
    with pytest.raises(ValueError, match="The judge judge cannot be asked"):
        values(questions["mmvet"], lambda row, target: "x = -1")


def test_a_judge_that_reasons_is_asked_without_a_temperature(judge):
    judge.says, reasons = "1", {"model", "max_completion_tokens"}
    for name, settings in {
        "gpt-4.1": {"model", "temperature", "max_tokens"},
        "openai/gpt-5-mini": reasons,
        "o3": reasons,
    }.items():
        assert judge_answer(name, "What?", "1", "1") == 1
        assert judge.settings.keys() == settings


def test_batches_and_banks_do_not_change_answers(saved, data):
    asked = Questions("mmmu", data, limit=5)
    model, processor = load_to_answer(saved["model"], memory="off", device="cpu")
    bank = MemoryBank.from_pretrained(saved["bank"])

    def answers(batch_size: int, bank: MemoryBank | None) -> list[str]:
        if bank is not None:
            model.attach_memory_bank(bank, tokenizer=processor.tokenizer)
        memory = "off" if bank is None else "on"
        samples = answer_questions(model, processor, asked, memory, bank, batch_size, "test")
        assert all(bool(sample["neighbours"]) == (bank is not None) for sample in samples)
        return [sample["answer"] for sample in samples]

    first = answers(8, bank)
    off, again = answers(8, None), answers(1, bank)
    assert again == first != off
    assert answers(8, bank.shuffled()) != first


def test_names_of_variants(saved, make_model, tmp_path, monkeypatch):
    names = [variant.name for variant in variants_of(saved["model"], [saved["bank"]], True, True)]
    assert names == ["model, bank", "model, bank, shuffled", "model, memory off"]
    assert [variant.name for variant in variants_of(saved["model"], memory_off=True)] == ["model, memory off"]
    with pytest.raises(ValueError, match="Variants are called .* expected names that differ"):
        variants_of(saved["model"], [saved["bank"]], against=[saved["model"]])
    with pytest.raises(ValueError, match="model retrieves neighbours, but its config names no bank: pass --bank"):
        variants_of(saved["model"])
    make_model(memory_top_k=0).save_pretrained(tmp_path / "a/model")
    make_model().save_pretrained(tmp_path / "b/model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a/model is a model without memory: leave out --bank"):
        variants_of("a/model", [saved["bank"]])
    (tmp_path / "c").mkdir()
    (tmp_path / "b/model").rename(tmp_path / "c/model")
    make_model().save_pretrained(tmp_path / "b/model")
    # by the shortest ends that differ: what is above them is this machine's
    found = variants_of("b/model", ["bank"], against=["a/model", str(tmp_path / "c/model")])
    place = tmp_path.name
    assert [variant.name for variant in found] == [f"b/model, {place}/bank", "a/model", f"c/model, {place}/bank"]
    assert [variant.bank for variant in found] == ["bank", None, "bank"]
    with pytest.raises(ValueError, match="Variants are called .* expected names that differ"):
        variants_of("b/model", ["bank"], against=["./b/model"])


def test_images_of_a_list(tmp_path):
    (tmp_path / "ids").write_text("139\n000000000285.jpg\nval2017/000000000632.jpg\nCOCO_val2014_000000000724.jpg\n")
    assert image_ids(tmp_path / "ids") == {139, 285, 632, 724}
    for line, text in {1: "", 2: "139\nnone\n", 3: "139\n285.jpg\n632 724\n", 4: "1\n2\n3\n139,285\n"}.items():
        (tmp_path / "ids").write_text(text)
        with pytest.raises(
            ValueError, match=f"ids, line {line}, is .*, expected the id or the file name of one image"
        ):
            image_ids(tmp_path / "ids")


def without(rows: list[dict], column: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


def with_value(rows: list[dict], number: int, column: str, value) -> list[dict]:
    return [row | {column: value} if place == number else row for place, row in enumerate(rows)]


OTHER_SCHEMAS = {
    "no subject": (
        "scienceqa",
        without(scienceqa_rows(), "subject"),
        r"Row 0 .* \(KeyError: 'subject'\): found the col",
    ),
    "a question only": (
        "mmvet",
        [{"question": "what?"}],
        "Row 0 of mmvet cannot be asked .*expected those of lmms-lab",
    ),
    "no image_source": ("pope", without(pope_rows(), "image_source"), "Column 'image_source' doesn't exist"),
    "no question_id": ("pope", without(pope_rows(), "question_id"), r"Row 0 of pope .*\(KeyError: 'question_id'\)"),
    "no category": ("mme", without(mme_rows(), "category"), "Column 'category' doesn't exist"),
    "true": ("pope", with_value(pope_rows(), 7, "answer", "true"), "Row 7 of pope .*'true', expected yes or no"),
    "false": ("mme", with_value(mme_rows(), 3, "answer", "False"), "Row 3 of mme .*'False', expected yes or no"),
    "null": ("pope", with_value(pope_rows(), 4, "image", None), "Row 4 of pope has no image, expected one in every"),
    "paths": (
        "mmvet",
        [row | {"image": "a.png"} for row in mmvet_rows()],
        "Row 0 of mmvet cannot be asked .*'str' object has no attribute 'convert'",
    ),
    "no category of one": ("pope", with_value(pope_rows(), 5, "category", None), "Row 5 of pope .*no category"),
    "no truth": ("gqa", with_value(gqa_rows(4), 3, "answer", None), "Row 3 of gqa .*no right answer"),
    "no truths": ("textvqa", with_value(textvqa_rows(), 1, "answers", []), "Row 1 of textvqa .*no right answer"),
    "half a pair": ("mme", mme_rows()[:-1], "a question_id of MME is not that of two questions"),
    "no rows": ("pope", pope_rows()[:0], "pope in .* cannot be read .*expected Parquet files with rows"),
    "more images": ("gqa", gqa_rows(5), "Row 12 of gqa .*: gqa_images has no 'n4'"),
}


@pytest.mark.parametrize("case", OTHER_SCHEMAS)
def test_data_of_another_schema_are_refused(tmp_path, case):
    name, rows, message = OTHER_SCHEMAS[case]
    write(tmp_path, "gqa")
    if case == "paths":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    else:
        save(rows, tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=message):
        Questions(name, tmp_path, limit=99)


def test_other_questions_and_other_right_answers_have_another_fingerprint(tmp_path):
    """By which variants are compared: not those of other data or another --limit."""
    rows, found = pope_rows(2), []
    for asked, limit in ((rows, None), (rows, 1), (pope_rows(3), None), (with_value(rows, 0, "answer", "no"), None)):
        save(asked, tmp_path / "pope.parquet")
        found.append(Questions("pope", tmp_path, limit).fingerprint)
    save(rows, tmp_path / "pope.parquet")
    assert len(set(found)) == 4 and Questions("pope", tmp_path).fingerprint == found[0]


def test_images_as_pandas_writes_them_are_read(tmp_path):
    """In structs, without a word in the schema that says what they are."""
    save(pope_rows(1), tmp_path / "images.parquet")
    table = pq.read_table(tmp_path / "images.parquet").replace_schema_metadata()
    pq.write_table(table, tmp_path / "pope.parquet")
    row, _ = Questions("pope", tmp_path).ask(0)
    assert isinstance(row["image"], Image.Image)


def test_a_prompt_that_fills_the_context_is_told(saved, data, monkeypatch):
    asked = Questions("scienceqa", data)  # every other question has a hint
    model, processor = load_to_answer(saved["model"], memory="off", device="cpu")
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    chats = [asked.ask(number)[1] for number in asked.numbers]
    lengths = [len(processor.apply_chat_template([chat], **settings)["input_ids"][0]) for chat in chats]
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", max(lengths))
    samples = answer_questions(model, processor, asked, "off", None, 8, "test")
    assert [sample["too_long"] for sample in samples] == [length == max(lengths) for length in lengths]
    assert min(lengths) < max(lengths)


def test_images_of_the_bank_and_near_copies(saved, tmp_path):
    """In a bank of noise: its first image, the second one stored anew, and one that it does not have."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)  # those of `saved`
    images = [Image.fromarray(pixels[0]), Image.fromarray(pixels[1] ^ 1), Image.new("RGBA", (24, 24), "#ff000080")]
    rows = [row | {"image": image} for row, image in zip(scienceqa_rows(3), images, strict=True)]
    save(rows, tmp_path / "scienceqa.parquet")
    asked = [Questions("scienceqa", tmp_path)]
    variants = variants_of(saved["model"], [saved["bank"]], True)
    run.run_benchmarks(variants, asked, tmp_path)
    paths = [("", samples_path(tmp_path, variant.name, "scienceqa")) for variant in variants]
    for exclude in (False, True):
        found = compare("scienceqa", read_samples(paths)["scienceqa"], exclude)
        assert (found["in_bank"]["rows"], found["near_copies"]["rows"]) == ([0], [1])
    kept = pq.read_table(paths[0][1])["images"].to_pylist()
    assert kept == [[image_source_id(decode_image(image))] for image in images]  # as a bank has them


def test_an_interrupted_command_goes_on(saved, data, tmp_path, monkeypatch):
    """What is complete is not asked again, until the weights or the settings of generation are others."""
    asked = [Questions("scienceqa", data, limit=2), Questions("gqa", data, limit=1)]
    variants, calls, answer = variants_of(saved["model"], [saved["bank"]], True), [], run.answer_questions

    def count(model, processor, questions, memory, *arguments):
        calls.append((questions.name, memory))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(model, processor, questions, memory, *arguments)

    monkeypatch.setattr(run, "answer_questions", count)
    with pytest.raises(KeyboardInterrupt):
        run.run_benchmarks(variants, asked, tmp_path)
    assert calls == [("scienceqa", "on"), ("gqa", "on"), ("scienceqa", "off")]
    run.run_benchmarks(variants, asked, tmp_path)
    assert calls[3:] == [("scienceqa", "off"), ("gqa", "off")]
    run.run_benchmarks(variants, asked, tmp_path)
    assert len(calls) == 5
    path = samples_path(tmp_path, variants[0].name, "gqa")
    pq.write_table(pq.read_table(path).slice(1), path)
    run.run_benchmarks(variants, asked, tmp_path)
    assert calls[5:] == [("gqa", "on")]
    model, processor = load_to_answer(saved["model"], memory="off", device="cpu")
    first = weights_sha256(model, processor)
    model.generation_config.repetition_penalty = 1.2
    second = weights_sha256(model, processor)
    processor.chat_template += " "
    third = weights_sha256(model, processor)
    processor.tokenizer.add_tokens(["zyx"])
    assert len({first, second, third, weights_sha256(model, processor)}) == 4


def test_a_broken_image_is_refused_with_its_row(saved, tmp_path):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 99).save(file, "PNG")
    write(tmp_path, "mmmu", "pope")
    for name, column in (("pope", "image"), ("mmmu", "image_1")):
        path = tmp_path / f"{name}.parquet"
        rows = datasets.Dataset.from_parquet(str(path)).cast_column(column, datasets.Image(decode=False)).to_list()
        rows[1][column] = {"bytes": file.getvalue()[:-2000], "path": None} if name == "pope" else None
        features = datasets.Dataset.from_parquet(str(path)).features
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
        with pytest.raises(ValueError, match=f"Row 1 of {name} cannot be asked"):
            Questions(name, tmp_path).ask(1)
