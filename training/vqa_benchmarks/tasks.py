"""Questions of a benchmark, asked and scored by the task of lmms-eval, but where the paper's protocol differs."""

import hashlib
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import HfApi
from PIL import ImageFile

from .benchmarks import BENCHMARKS
from .judge import judge_answer

try:
    import lmms_eval.api.metrics  # registers exact_match
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.protocol import ChatMessages
    from lmms_eval.utils import load_yaml_config
    from loguru import logger
except ModuleNotFoundError as error:
    raise ImportError(
        f"The benchmarks need lmms-eval and what it imports ({error}): pip install tinyalign-vlm[eval], and then "
        "pip install --no-deps lmms-eval==0.7.3."
    ) from error

ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval has set it, and broken images would be answered and trained on
logger.remove()  # lmms-eval's, which tells of each task at length
logger.add(sys.stderr, level="WARNING")
TASK_FILES = Path(lmms_eval.api.metrics.__file__).parents[1] / "tasks"
YES_NO = ("pope", "mme")  # are answered so


class LocalTask(ConfigurableMessagesTask):
    """A task of lmms-eval on rows that are here already: nothing is downloaded, and nothing tried again."""

    def __init__(self, config: dict, rows: datasets.Dataset):
        self._rows = rows
        super().__init__(config=config, model_name="tinyalign")

    def download(self, dataset_kwargs: dict | None = None):
        self.dataset = self.dataset_no_image = {self.config.test_split: self._rows}


class Questions:
    """The questions of a benchmark that are asked.

    Args:
        folder: Parquet files in the benchmark's schema: `NAME.parquet`, or a folder `NAME` of them. None: the Hub.
        limit: ask about so many images, drawn with a fixed seed, MME's within each category; all their questions.
        images: VQAv2's: ask only about the images with these ids.
        judge: MM-Vet's model.
        revisions: commits of the Hub's repositories; those that are asked for and missing are added.

    Raises:
        OSError: the Hub is not reached.
        ValueError: there are no such data, or they are not in the benchmark's schema, or no image is asked about.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None = None,
        limit: int | None = None,
        images: set[int] | None = None,
        judge: str | None = None,
        revisions: dict[str, str] | None = None,
    ):
        self.name, self.benchmark, self.judge = name, BENCHMARKS[name], judge
        config = load_yaml_config(TASK_FILES / self.benchmark.file, mode="simple" if name == "mmvet" else "full")
        config |= self.benchmark.settings
        config["lmms_eval_specific_kwargs"]["default"] |= self.benchmark.prompt
        self.source, self.split = config["dataset_path"], config["test_split"]
        revisions = {} if revisions is None else revisions
        subset = config.get("dataset_name")
        self.version, self.rows = _load(name.removesuffix("_without_ocr"), folder, config, subset, revisions)
        self.images = None
        if name == "gqa" and "image" not in self.rows.column_names:
            version, self.images = _load("gqa_images", folder, config, "testdev_balanced_images", revisions)
            self.version += "" if version == self.version else f", images {version}"
        unit = self.benchmark.unit
        with self._same_schema():
            self.task = LocalTask(config, self.rows)
            self.units = list(map(str, range(len(self.rows)) if unit is None else self.rows[unit]))
            if name == "mme" and set(Counter(self.units).values()) != {2}:
                raise ValueError("a question_id of MME is not that of two questions")
            asked = sorted(set(self.units))
            if images is not None:
                asked = [unit for unit in asked if int(unit) in images]
            asked = set(asked if limit is None else self._drawn(asked, limit))
        self.numbers = [number for number, unit in enumerate(self.units) if unit in asked]
        if not self.numbers:
            raise ValueError(f"{self.benchmark.title} has no question about the images that were asked for.")
        pictures = [column for column, kind in self.rows.features.items() if isinstance(kind, datasets.Image)]
        texts = self.rows.remove_columns(pictures)
        self.prompts = {number: self._checked_prompt(number, texts[number]) for number in self.numbers}

    def _drawn(self, units: list[str], limit: int) -> list[str]:
        """Return `limit` units, or so many of each stratum of the metric."""
        column = self.benchmark.metric.stratum  # MME's rows have it, too
        stratum = dict(zip(self.units, self.rows[column], strict=True)) if column else dict.fromkeys(units)
        drawn = {}
        for unit in np.random.default_rng(0).permutation(units):
            drawn.setdefault(stratum[unit], []).append(unit)
        return [unit for those in drawn.values() for unit in those[:limit]]

    def _checked_prompt(self, number: int, row: dict) -> str:
        """Return the prompt of a row without its images, or refuse (`ValueError`) what would end a run later on."""
        if number == self.numbers[0]:
            self.ask(number)
        with self._same_schema(number):
            prompt, target, categories = self.task.doc_to_text(row), self.target(row), self.benchmark.categories(row)
            if self.images is not None and row["imageId"] not in self._image_rows:
                raise ValueError(f"gqa_images has no {row['imageId']!r}")
            truth = row.get("answers", row.get("answer"))
            if truth in (None, []) and self.name != "vqav2_testdev":
                raise ValueError("it has no right answer")
            if None in categories:
                raise ValueError("it has no category")
            if self.name in YES_NO and target.strip(" .").lower() not in ("yes", "no"):
                raise ValueError(f"the answer is {target!r}, expected yes or no")
            if number == self.numbers[0] and self.name != "mmvet":  # whose judge would be asked
                self.score(row, "")
        return prompt

    @contextmanager
    def _same_schema(self, number: int = 0) -> Iterator[None]:
        """Refuse (`ValueError`) a row of another schema, or with a broken image."""
        try:
            yield
        except Exception as error:  # whatever lmms-eval makes of it
            raise ValueError(
                f"Row {number} of {self.name} cannot be asked ({type(error).__name__}: {error}): found the columns "
                f"{self.rows.column_names}, expected those of {self.source}, and values like its."
            ) from error

    @property
    def generation(self) -> dict:
        """Settings of generation, in lmms-eval's words."""
        return self.task.config.generation_kwargs

    @property
    def fingerprint(self) -> str:
        """A hash of all that is asked and of how it is scored."""
        content = [self.name, self.version, self.prompts, self.generation, self.judge]
        if self.judge is not None:
            content.append(os.environ.get("OPENAI_BASE_URL"))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _image_rows(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.images["id"])}

    def ask(self, number: int) -> tuple[dict, list[dict]]:
        """Return a row with its images, and the chat that asks its question; `ValueError` where one is broken."""
        with self._same_schema(number):
            row = self.rows[number]
            if self.images is not None:
                row["image"] = self.images[self._image_rows[row["imageId"]]]["image"]
            return row, ChatMessages(messages=self.task.doc_to_messages(row)).to_hf_messages()

    def score(self, row: dict, answer: str) -> float:
        """Return the score of an answer, NaN where others keep the truth."""
        if self.name == "mmvet":
            return judge_answer(self.judge, row["question"], row["answer"], answer)
        before = random.getstate()
        random.seed(row.get("id"))  # an answer that MMMU cannot read becomes a letter by chance: each row's own
        # without the tries again that hide an error
        results = LocalTask.process_results.__wrapped__(self.task, row, [answer])
        found = next(iter(results.values()))
        if self.name == "mmmu":
            from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

            found = evaluate_mmmu([found])[1]["acc"]
        random.setstate(before)
        return float(found.get("score", "nan") if isinstance(found, dict) else found)

    def target(self, row: dict) -> str:
        """Return the right answer, the most frequent one of several."""
        answers = [answer["answer"] if isinstance(answer, dict) else answer for answer in row.get("answers") or []]
        return Counter(answers).most_common(1)[0][0] if answers else str(self.task.doc_to_target(row))


def _load(
    name: str, folder: Path | None, config: dict, subset: str | None, revisions: dict[str, str]
) -> tuple[str, datasets.Dataset]:
    """Return the rows of a benchmark, and what they are: the commit of a repository, or the sha256 of files."""
    if folder is None:
        repository = config["dataset_path"]
        try:
            if repository not in revisions:
                revisions[repository] = HfApi().dataset_info(repository).sha
            settings = {"split": config["test_split"], "revision": revisions[repository]}
            return revisions[repository], datasets.load_dataset(repository, subset, **settings)
        except Exception as error:  # whatever HTTP libraries make of it
            at = f" at {revisions[repository]}" if repository in revisions else ""
            raise OSError(f"{repository}{at} cannot be read from the Hub ({error}): pass --data FOLDER.") from error
    files = sorted([*folder.glob(f"{name}.parquet"), *folder.glob(f"{name}/*.parquet")])
    if not files:
        raise ValueError(f"{folder} has neither {name}.parquet nor a folder {name} of Parquet files, expected one.")
    content = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
    try:
        rows = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
        for column, kind in rows.features.items():
            if isinstance(kind, dict) and re.fullmatch(r"image(_\d)?", column):  # as pandas writes them
                rows = rows.cast_column(column, datasets.Image())
    except Exception as error:  # whatever pyarrow and datasets make of it
        raise ValueError(
            f"{name} in {folder} cannot be read ({error.__cause__ or error}), expected Parquet files with rows."
        ) from error
    missing = np.flatnonzero(rows.data.column("image").is_null()) if "image" in rows.features else []
    if len(missing):
        raise ValueError(f"Row {missing[0]} of {name} has no image, expected one in every row.")
    return content.hexdigest(), rows
