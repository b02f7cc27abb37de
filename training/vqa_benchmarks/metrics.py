"""Metrics of the benchmarks, computed from what was found of each question. Draws of images need them as sums."""

from typing import ClassVar

import datasets
import evaluate
import numpy as np
import pandas as pd


class BenchmarkMetric(evaluate.Metric):
    """A metric whose values follow from sums over questions.

    Attributes:
        columns: what is known of a question, with its type: the arguments of `compute`.
        stratum: the column within whose values images are drawn; None: among all.
    """

    columns: ClassVar[dict[str, str]] = {"score": "float64"}
    stratum: ClassVar[str | None] = None

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value(kind) for name, kind in self.columns.items()}
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=datasets.Features(features))

    def _compute(self, **columns: list) -> dict[str, float]:
        return self.of(pd.DataFrame(columns))

    @classmethod
    def of(cls, questions: pd.DataFrame) -> dict[str, float]:
        """Return the values by name of these questions; the table may have more columns than `columns`."""
        values = cls.values(cls.sums(questions).sum(0, keepdims=True))
        return {name: float(value[0]) for name, value in values.items()}

    @classmethod
    def sums(cls, questions: pd.DataFrame) -> np.ndarray:
        """Return `(questions, n)`, what the values are made of."""
        raise NotImplementedError

    @classmethod
    def values(cls, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the values by name, `(samples,)`, the benchmark's own first, of sums `(samples, n)`."""
        raise NotImplementedError

    @classmethod
    def main_value(cls, sums: np.ndarray) -> np.ndarray:
        """Return the benchmark's own value of each sample."""
        return next(iter(cls.values(sums).values()))

    @classmethod
    def category_value(cls, questions: pd.DataFrame) -> float:
        """Return the value of the questions of one category."""
        return next(iter(cls.of(questions).values()))


class VqaAccuracy(BenchmarkMetric):
    """Mean score of the questions, times 100: exact match, soft accuracy of VQA, or a judge's."""

    @classmethod
    def sums(cls, questions: pd.DataFrame) -> np.ndarray:
        score = questions["score"].to_numpy(float)
        return np.stack([score, np.ones_like(score)], axis=1)

    @classmethod
    def values(cls, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"accuracy": 100 * _share(sums[:, 0], sums[:, 1])}


class MmeScore(BenchmarkMetric):
    """Sum over the categories of 100 (acc + acc+), acc of the questions and acc+ of the images with both right.

    `perception` has 10 categories and is the paper's number, `cognition` has 4.
    """

    columns: ClassVar[dict[str, str]] = {"score": "float64", "category": "string", "unit": "string"}
    stratum: ClassVar[str | None] = "category"
    cognition = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

    @classmethod
    def sums(cls, questions: pd.DataFrame) -> np.ndarray:
        scores = questions.groupby(["category", "unit"])["score"]
        both = scores.transform("min") == 1
        images = questions.groupby("category")["unit"].transform("nunique")
        points = 100 * (questions["score"] + both) / scores.transform("size") / images
        is_cognition = questions["category"].isin(cls.cognition)
        return np.stack([points.where(~is_cognition, 0), points.where(is_cognition, 0)], axis=1)

    @classmethod
    def values(cls, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"perception": sums[:, 0], "cognition": sums[:, 1]}

    @classmethod
    def category_value(cls, questions: pd.DataFrame) -> float:
        return float(cls.sums(questions).sum())


class PopeF1(BenchmarkMetric):
    """Mean F1 of the splits, times 100, with answers read as LLaVA reads them (llava/eval/eval_pope.py)."""

    columns: ClassVar[dict[str, str]] = dict.fromkeys(("answer", "target", "category"), "string")

    @classmethod
    def read(cls, answers: pd.Series) -> tuple[pd.Series, pd.Series]:
        """Return which answers are a yes, and which are a no."""
        says = answers.map(says_yes)
        return says, ~says

    @classmethod
    def splits(cls, questions: pd.DataFrame) -> np.ndarray:
        """Return `(questions, splits)`, the split that each question is one of."""
        return pd.get_dummies(questions["category"]).to_numpy()

    @classmethod
    def sums(cls, questions: pd.DataFrame) -> np.ndarray:
        yes, no = cls.read(questions["answer"])
        truth = questions["target"].str.strip().str.lower() == "yes"
        counts = np.stack([yes & truth, yes & ~truth, no & truth, no & ~truth, np.ones(len(truth), bool)], axis=1)
        return (cls.splits(questions)[:, :, None] & counts[:, None]).reshape(len(questions), -1).astype(float)

    @classmethod
    def values(cls, sums: np.ndarray) -> dict[str, np.ndarray]:
        right_yes, wrong_yes, missed, right_no, asked = np.moveaxis(sums.reshape(len(sums), -1, 5), 2, 0)
        precision, recall = _share(right_yes, right_yes + wrong_yes), _share(right_yes, right_yes + missed)
        values = {
            "F1": _share(2 * precision * recall, precision + recall),
            "accuracy": _share(right_yes + right_no, asked),
            "precision": precision,
            "recall": recall,
            "yes answers": _share(right_yes + wrong_yes, asked),
        }
        return {name: 100 * value.mean(1) for name, value in values.items()}


class StrictPopeF1(PopeF1):
    """F1 of all splits together, times 100, where only the word alone is a yes or a no: lmms-eval's reading."""

    columns: ClassVar[dict[str, str]] = dict.fromkeys(("answer", "target"), "string")

    @classmethod
    def read(cls, answers: pd.Series) -> tuple[pd.Series, pd.Series]:
        words = answers.str.lower().str.strip()
        return words == "yes", words == "no"

    @classmethod
    def splits(cls, questions: pd.DataFrame) -> np.ndarray:
        return np.ones((len(questions), 1), bool)


def says_yes(answer: str) -> bool:
    """Return LLaVA's reading of an answer to a question of POPE: no where its first sentence says no or not."""
    words = answer.strip().partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, 0 where both are."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
