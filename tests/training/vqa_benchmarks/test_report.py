"""Reports on samples that are on disk, for which neither a model nor lmms-eval is needed."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from vqa_rows import mme_rows, pope_rows

from tinyalign_vlm.hub_cards.facts import ModelFacts, read_facts, write_facts
from tinyalign_vlm.training.vqa_benchmarks.comparison import mean_score, read_samples
from tinyalign_vlm.training.vqa_benchmarks.published import PUBLISHED, published
from tinyalign_vlm.training.vqa_benchmarks.report import compare_folders, write_comparison, write_results_card
from tinyalign_vlm.training.vqa_benchmarks.samples import samples_path, save_samples

FACTS = {
    "source": "made up",
    "split": "test",
    "data_version": "1",
    "questions": "1" * 64,
    "judge": None,
    "key_space": None,
    "is_whole": True,
    "weights": "0" * 64,
    "bank_rows": None,
    "versions": {"torch": "2"},
}
POPE, MME = pope_rows(20), mme_rows(5)


def save(folder, variant: str, benchmark: str, answers: list[str], facts=FACTS, **more) -> tuple[str, object]:
    """Write samples with these answers; of `more`, values by row: in_bank, neighbours."""
    samples, unit = [], {"pope": "image_source", "mme": "question_id"}.get(benchmark)
    rows = {"pope": POPE, "mme": MME}.get(benchmark) or [{"question": str(n)} for n in range(len(answers))]
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        target = row.get("answer", "")
        sample = {"row": number, "question_id": str(number), "unit": row[unit] if unit else str(number // 2)}
        sample |= {"categories": [row["category"]] if unit else [], "prompt": row["question"], "answer": answer}
        score = float("nan") if benchmark == "vqav2_testdev" else float(answer.lower() == target.lower())
        sample |= {"target": target, "score": score, "images": [], "in_bank": False, "neighbours": []}
        sample["too_long"] = False
        samples.append(sample | {name: values[number] for name, values in more.items()})
    path = samples_path(folder, variant, benchmark)
    save_samples(path, samples, {**FACTS, **facts, "name": variant, "benchmark": benchmark})
    return "", path


def answers_of(rows: list[dict], right: float, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    other = {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes"}
    return [row["answer"] if generator.random() < right else other[row["answer"]] for row in rows]


def test_differences_are_paired(tmp_path):
    """A variant that is wrong in one more answer in fifty is worse, though the intervals of both overlap."""
    good = answers_of(POPE, 0.8, 0)
    worse = ["no" if n % 25 == 0 else text for n, text in enumerate(good)]
    paths = [save(tmp_path, name, "pope", said) for name, said in (("good", good), ("worse", worse), ("same", good))]
    found = write_comparison(paths, tmp_path)["pope"]["variants"]
    assert found["good"]["difference"] == found["same"]["difference"] == [0, 0, 0]
    assert found["same"]["answers_that_differ"] == 0 < found["worse"]["answers_that_differ"] < 4
    difference, low, high = found["worse"]["difference"]
    assert low < difference < high < 0
    assert difference == pytest.approx(found["worse"]["value"][0] - found["good"]["value"][0])
    assert found["worse"]["value"][2] > found["good"]["value"][1]
    assert high - low < found["good"]["value"][2] - found["good"]["value"][1]
    assert " noise " not in (tmp_path / "report.md").read_text().partition("## The paper")[0].partition("##")[2]
    assert list(found["good"]["categories"]) == ["adversarial", "popular", "random"]
    assert {"F1", "precision", "recall", "accuracy", "yes answers"} == found["good"]["lmms_eval"].keys()


def test_a_difference_that_may_be_chance_is_called_noise(tmp_path):
    truth = [row["answer"] for row in POPE]
    said = {str(wrong): ["no" if n == wrong else text for n, text in enumerate(truth)] for wrong in (0, 60)}
    paths = [save(tmp_path, name, "pope", answers) for name, answers in said.items()]
    low, high = write_comparison(paths, tmp_path)["pope"]["variants"]["60"]["difference"][1:]
    assert low < 0 < high and f"{high:+.1f}] noise |" in (tmp_path / "report.md").read_text()


def test_folders_are_compared_with_the_first_variant_of_the_command(tmp_path):
    """Also where its answers are the newer ones, or a copy has lost the times of the files."""
    paths = [save(tmp_path / "a", name, "pope", answers_of(POPE, 0.8, 0)) for name in ("own", "baseline")]
    write_comparison(paths, tmp_path / "a")
    save(tmp_path / "a", "earlier", "pope", answers_of(POPE, 0.7, 1))
    os.utime(paths[0][1])
    compare_folders([tmp_path / "a"], tmp_path / "b")
    variants = json.loads((tmp_path / "b/results.json").read_text())["benchmarks"]["pope"]["variants"]
    assert list(variants) == ["a: own", "a: baseline", "a: earlier"]


def test_report_and_results(tmp_path):
    paths = [
        save(tmp_path, "own", "pope", answers_of(POPE, 0.8, 0)),
        save(tmp_path, "own", "mme", answers_of(MME, 0.9, 0)),
    ]
    paths.append(save(tmp_path, "own", "vqav2_testdev", ["2", "two"]))
    results = write_comparison(paths, tmp_path)
    report = (tmp_path / "report.md").read_text()
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["benchmarks"] == results and content["variants"]["own"]["weights"] == "0" * 64
    pope, mme = (results[name]["variants"]["own"]["value"][0] for name in ("pope", "mme"))
    assert mean_score(results, "own") == (pytest.approx((pope + mme / 20) / 2), 2)
    assert f"{(pope + mme / 20) / 2:.1f} (mean of 2)" in report and "to submit to EvalAI" in report
    assert "seven of the eight" in report and "| 1412.0 |" in report
    assert results["pope"]["prompts_sha256"] == "1" * 64
    evalai = json.loads((tmp_path / "evalai-own.json").read_text())
    assert evalai == [{"question_id": 0, "answer": "2"}, {"question_id": 1, "answer": "two"}]
    categories = results["mme"]["variants"]["own"]["categories"]
    assert sum(categories.values()) == pytest.approx(sum(results["mme"]["variants"]["own"]["values"].values()))
    assert len(categories) == 14


def test_images_of_a_bank_are_listed_and_left_out(tmp_path):
    """Those that any variant's bank has are left out of all variants; near copies are only listed."""
    in_bank = [row["image_source"] == "COCO_3" for row in POPE]
    near = [
        [{"image": 0, "source_id": "a", "caption": "b", "score": 0.995 if n == 7 else 0.9}] for n in range(len(POPE))
    ]
    said = [row["answer"] if row["image_source"] == "COCO_3" else "no" for row in POPE]
    paths = [
        save(tmp_path, "off", "pope", said),
        save(tmp_path, "bank", "pope", said, in_bank=in_bank, neighbours=near),
    ]
    rows = [number for number, row in enumerate(POPE) if row["image_source"] == "COCO_3"]
    exact, copies = {"rows": rows, "images": ["COCO_3"]}, {"rows": [7], "images": ["COCO_1"]}
    for exclude in (False, True):
        found = write_comparison(paths, tmp_path, exclude)["pope"]
        assert (found["in_bank"], found["near_copies"]) == (exact, copies)
        assert (found["questions"], found["images"]) == ((342, 19) if exclude else (360, 20))
        assert all((entry["value"][0] == 0) == exclude for entry in found["variants"].values())
    report = (tmp_path / "report.md").read_text()
    assert "18 questions are about an image that a bank has" in report and "left out here: COCO_3; 1 others" in report


def test_other_questions_are_refused(tmp_path):
    paths = [save(tmp_path, "a", "vqav2_val", ["1", "2"]), save(tmp_path, "b", "vqav2_val", ["1", "2", "3"])]
    with pytest.raises(ValueError, match="of vqav2_val have different questions, expected the same"):
        read_samples(paths)


def test_answers_of_other_weights_or_of_something_else_are_refused(tmp_path):
    save(tmp_path, "a", "pope", answers_of(POPE, 0.8, 0), facts={"weights": "1" * 64})
    save(tmp_path, "a", "mme", answers_of(MME, 0.8, 0))
    (tmp_path / "results.json").write_text('{"variants"')
    with pytest.raises(ValueError, match="pope.parquet is of other weights or another bank than a's mme, expected"):
        compare_folders([tmp_path], tmp_path / "out")
    pq.write_table(pa.table({"row": [1]}), samples_path(tmp_path, "a", "gqa"))
    with pytest.raises(ValueError, match=r"gqa.parquet is none of `tinyalign evaluate`, expected its answers"):
        compare_folders([tmp_path], tmp_path / "out")


def test_other_judges_and_right_answers_are_refused(tmp_path):
    paths = [
        save(tmp_path, "a", "mmvet", ["1", "2"], facts={"judge": "gpt-4.1"}),
        save(tmp_path, "b", "mmvet", ["1", "2"], facts={"judge": "o3"}),
    ]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] of mmvet have different judges \(gpt-4.1, o3\), expected the"):
        read_samples(paths)
    write_comparison(paths[:1], tmp_path)
    assert "MM-Vet was scored by the judge gpt-4.1." in (tmp_path / "report.md").read_text()
    paths = [save(tmp_path, "c", "vqav2_val", ["1"]), save(tmp_path, "d", "vqav2_val", ["1"], target=["2"])]
    with pytest.raises(ValueError, match="of vqav2_val have different right answers, expected the same"):
        read_samples(paths)


def test_what_limits_a_number_is_said(tmp_path):
    """One image, prompts that fill the context, keys with which a near copy is not found, a part of test-dev."""
    facts = {"key_space": "language", "is_whole": False}
    paths = [
        save(tmp_path, "right", "vqav2_val", ["", ""]),
        save(tmp_path, "submitted", "vqav2_testdev", ["2", "2"], facts=facts),
    ]
    paths.append(save(tmp_path, "wrong", "vqav2_val", ["1", "1"], facts=facts, too_long=[True, False]))
    write_comparison(paths, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| -100.0 [-100.0, -100.0] too few images |" in report
    assert "1 prompts of VQAv2 val (2 questions, 1 images) fill the context of wrong, or more." in report
    assert "- VQAv2 val, wrong: near copies cannot be told" in report
    assert "not scored: a part" in report and not list(tmp_path.glob("evalai*"))


def test_the_card_has_the_data_and_the_split_of_each_benchmark(tmp_path):
    write_facts(tmp_path, ModelFacts(repo_id=tmp_path.name, limits=["Slow."]))
    paths = [save(tmp_path, "own", "mme", answers_of(MME, 1, 0), facts={"split": "test", "data_version": "abc"})]
    paths.append(save(tmp_path, "own", "vqav2_val", ["1", "2"], facts={"split": "validation"}))
    write_results_card(tmp_path, write_comparison(paths, tmp_path), "own")
    card = ModelCard.load(tmp_path / "README.md")
    found = [(result.metric_type, result.dataset_split, result.dataset_revision) for result in card.data.eval_results]
    assert sorted(found) == [("mme", "test", "abc"), ("vqav2_val", "validation", "1")]
    assert "2000 (2000 to 2000)" in card.text
    assert read_facts(tmp_path).limits == ["Slow."]


def test_published_numbers():
    assert published("mme") == [1105, 1364, 1412, 1153.0, 1256.5, 1462.4, 1438.7]
    assert published("vqav2_val") == [None] * len(PUBLISHED)
    paper, factory = PUBLISHED["paper: Phi-2 TinyAlign"], PUBLISHED["Factory: Phi-2"]
    assert sum(theirs > ours for theirs, ours in zip(factory, paper, strict=True)) == 7
