"""Comparison of variants that answered the same questions: values and differences with their intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ..evaluation.bootstrap import interval_of, resampled
from .benchmarks import BENCHMARKS
from .published import PAPER_BENCHMARKS
from .samples import read_sample_facts

NEAR = 0.99  # a neighbour as similar as this may be the image itself, stored anew
Samples = dict[str, tuple[dict, pd.DataFrame]]  # facts and answers by variant


def read_samples(paths: Sequence[tuple[str, Path]]) -> dict[str, Samples]:
    """Return the facts and answers in files, by benchmark and variant.

    Args:
        paths: what the names of a file's variants begin with, and the file.

    Raises:
        ValueError: variants of a benchmark differ in their questions, right answers or judge; or benchmarks of a
            variant in its weights or bank.
    """
    found, origins = {}, {}
    for prefix, path in paths:
        facts = read_sample_facts(path)
        origin = origins.setdefault(prefix + facts["name"], facts)
        if any(facts[key] != origin[key] for key in ("weights", "bank_rows")):
            raise ValueError(
                f"{path} is of other weights or another bank than {facts['name']}'s {origin['benchmark']}, expected "
                "the same: delete it, or run it again."
            )
        found.setdefault(facts["benchmark"], {})[prefix + facts["name"]] = facts, pq.read_table(path).to_pandas()
    for benchmark, variants in found.items():
        _check_same(benchmark, variants)
    return {name: found[name] for name in BENCHMARKS if name in found}


def _check_same(benchmark: str, variants: Samples):
    frames = [frame for _, frame in variants.values()]
    judges = [str(facts["judge"]) for facts, _ in variants.values()]
    for what, values in (
        ("questions", [tuple(zip(frame["row"], frame["prompt"], strict=True)) for frame in frames]),
        ("right answers", [tuple(frame["target"]) for frame in frames]),
        (f"judges ({', '.join(judges)})", judges),
    ):
        if len(set(values)) > 1:
            raise ValueError(
                f"The variants {list(variants)} of {benchmark} have different {what}, expected the same: run them on "
                "the same data with the same --limit and --judge."
            )


def compare(benchmark: str, variants: Samples, exclude: bool = False) -> dict:
    """Return the results of variants in a benchmark: values, differences to the first variant, and values by category.

    Args:
        exclude: leave out questions about an image that the bank of any variant has; ValueError if none is left.
    """
    (facts, first), *_ = variants.values()
    in_bank = np.any([frame["in_bank"] for _, frame in variants.values()], axis=0)
    near = np.any([frame["neighbours"].map(_is_near) for _, frame in variants.values()], axis=0) & ~in_bank
    if exclude and in_bank.all():
        raise ValueError(f"The bank has all images of {benchmark}: leave out --exclude.")
    result = {name: facts[name] for name in ("source", "split", "data_version")}
    result |= {"prompts_sha256": facts["questions"], "judge": facts["judge"], "excluded": exclude}
    asked = first[~in_bank] if exclude else first
    result |= {"questions": len(asked), "images": int(asked["unit"].nunique())}
    result["near_unknown"] = [name for name, (facts, _) in variants.items() if facts["key_space"] == "language"]
    for name, rows in (("in_bank", in_bank), ("near_copies", near)):
        result[name] = {"rows": first["row"][rows].tolist(), "images": sorted(set(first["unit"][rows]))}
    result["variants"] = {}
    metric, shipped = BENCHMARKS[benchmark].metric, BENCHMARKS[benchmark].shipped
    base = None
    for name, (facts, frame) in variants.items():
        frame = frame.assign(category=frame["categories"].str[0])  # the first of GQA's and MM-Vet's several
        frame = frame[~in_bank] if exclude else frame
        entry = result["variants"][name] = {"too_long": int(frame["too_long"].sum())}
        if frame["score"].isna().any():
            entry["to_submit"] = facts["is_whole"]
            continue
        strata = metric.stratum and frame[metric.stratum]
        drawn = resampled(metric.sums(frame), frame["unit"], metric.main_value, strata)
        base = (drawn, frame["answer"]) if base is None else base
        entry |= {
            "value": list(interval_of(drawn)),
            "difference": list(interval_of(drawn - base[0])),
            "answers_that_differ": 100 * float((frame["answer"] != base[1]).mean()),
            "values": metric.of(frame),
            "lmms_eval": shipped and shipped.of(frame),
            "categories": {
                category: metric.category_value(rows)
                for category, rows in frame.explode("categories").groupby("categories")
            },
        }
    return result


def _is_near(neighbours: Sequence[dict]) -> bool:
    return any((found["score"] or 0) > NEAR for found in neighbours)


def value_in(results: dict[str, dict], benchmark: str, variant: str) -> float | None:
    """Return a variant's number in a benchmark, None where there is none."""
    return results[benchmark]["variants"].get(variant, {}).get("value", [None])[0]


def mean_score(results: dict[str, dict], variant: str) -> tuple[float | None, int]:
    """Return the mean of a variant's numbers in the paper's benchmarks, MME's divided by 20, and how many they are."""
    values = {name: value_in(results, name, variant) for name in PAPER_BENCHMARKS if name in results}
    known = [value / (20 if name == "mme" else 1) for name, value in values.items() if value is not None]
    return (float(np.mean(known)) if known else None), len(known)
