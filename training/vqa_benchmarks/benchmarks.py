"""The table of the benchmarks: which task of lmms-eval asks, what is drawn together, and the metric."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .metrics import BenchmarkMetric, MmeScore, PopeF1, StrictPopeF1, VqaAccuracy


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as it is asked.

    Attributes:
        title: its name in reports.
        file: of lmms-eval's task, below its folder `tasks`.
        unit: the column that names a question's image: questions about one are drawn together. None: the row.
        categories: what a row is counted among in the tables by category.
        metric, shipped: the paper's metric, and lmms-eval's where that is another one.
        prompt, settings: of the task, in the place of the shipped ones.
    """

    title: str
    file: str
    unit: str | None = None
    categories: Callable[[dict], list[str]] = lambda row: []
    metric: type[BenchmarkMetric] = VqaAccuracy
    shipped: type[BenchmarkMetric] | None = None
    prompt: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


TEXTVQA = "textvqa/textvqa_val.yaml"
BENCHMARKS = {
    "gqa": Benchmark(
        "GQA",
        "gqa/gqa.yaml",
        "imageId",
        lambda row: [f"{kind}: {row['types'][kind]}" for kind in ("structural", "semantic")],
        settings={"process_docs": None},  # which writes all questions anew, each with its image
    ),
    "pope": Benchmark(
        "POPE", "pope/pope.yaml", "image_source", lambda row: [row["category"]], PopeF1, shipped=StrictPopeF1
    ),
    "mme": Benchmark("MME", "mme/mme.yaml", "question_id", lambda row: [row["category"]], MmeScore),
    "scienceqa": Benchmark("ScienceQA-IMG", "scienceqa/scienceqa_img.yaml", None, lambda row: [row["subject"]]),
    "textvqa": Benchmark("TextVQA", TEXTVQA, "image_id", prompt={"ocr": True}),
    "textvqa_without_ocr": Benchmark("TextVQA, no OCR tokens in the prompt", TEXTVQA, "image_id"),
    "mmmu": Benchmark("MMMU val", "mmmu/mmmu_val.yaml", None, lambda row: [re.sub("^[^_]*_|_[0-9]*$", "", row["id"])]),
    "mmvet": Benchmark(
        "MM-Vet",
        "mmvet/mmvet.yaml",
        None,
        lambda row: row["capability"].split(","),
        settings={
            "doc_to_visual": lambda row: [row["image"].convert("RGB")],
            "doc_to_text": "question",  # the shipped one asks for reasoning first
            "process_results": lambda row, results: {},  # `Questions.score` asks the judge
            "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"max_new_tokens": 1024, "num_beams": 1, "until": []},  # lmms-eval adds a blank line
        },
    ),
    "vqav2_val": Benchmark("VQAv2 val", "vqav2/vqav2_val.yaml", "image_id", lambda row: [row["answer_type"]]),
    "vqav2_testdev": Benchmark(
        "VQAv2 test-dev", "vqav2/vqav2_test.yaml", "image_id", settings={"test_split": "testdev"}
    ),
}
