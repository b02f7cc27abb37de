"""Comparison of variants that answered the same questions: intervals, differences, and report.md and results.json."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ...hub_cards.markdown import table, text
from ..disk import save_file
from ..evaluation.bootstrap import interval_of, resampled
from .benchmarks import BENCHMARKS
from .published import BENCHMARKS as PAPER
from .published import NOTE, PUBLISHED, published
from .samples import file_name, read_facts

NEAR = 0.99  # a neighbour as similar as this may be the image itself, stored anew
RESULTS, REPORT = "results.json", "report.md"
INTRODUCTION = """
Numbers are of 0 to 100, MME's of 0 to 2000, with 95% intervals of 2,000 draws of images, the same for all variants:
the questions about an image are drawn together. A difference is one to the first variant, computed draw by draw: where
its interval holds 0, it is noise. TinyAlign answers; lmms-eval asks and scores. POPE is read as LLaVA reads it, the
mean F1 of the splits, and TextVQA's prompt has the OCR tokens, as in LLaVA's; other readings stand below.
""".strip()


def read_samples(paths: Sequence[tuple[str, Path]]) -> dict[str, dict[str, tuple[dict, pd.DataFrame]]]:
    """
    Return the facts and samples in files, by benchmark and variant.

    Args:
        paths: what the names of a file's variants begin with, and the file.

    Raises:
        ValueError: variants of a benchmark were not asked the same questions.
    """
    found = {}
    for prefix, path in paths:
        facts = read_facts(path)
        found.setdefault(facts["benchmark"], {})[prefix + facts["name"]] = facts, pq.read_table(path).to_pandas()
    for benchmark, variants in found.items():
        asked = {tuple(zip(frame["row"], frame["prompt"], strict=True)) for _, frame in variants.values()}
        if len(asked) > 1:
            raise ValueError(
                f"The variants {list(variants)} were asked different questions of {benchmark}, expected the same: run "
                "them on the same data with the same --limit."
            )
    return {name: found[name] for name in BENCHMARKS if name in found}


def compare(benchmark: str, variants: dict[str, tuple[dict, pd.DataFrame]], exclude: bool = False) -> dict:
    """
    Return the results of variants in a benchmark: values, differences to the first variant, and tables by category.

    Args:
        exclude: leave out questions about an image that the bank of any variant has.
    """
    metric, shipped = BENCHMARKS[benchmark].metric, BENCHMARKS[benchmark].shipped
    frames = {name: frame.assign(category=frame["categories"].str[0]) for name, (_, frame) in variants.items()}
    in_bank = np.any([frame["in_bank"] for frame in frames.values()], axis=0)
    near = np.any([frame["neighbours"].map(_best).to_numpy() > NEAR for frame in frames.values()], axis=0) & ~in_bank
    first = next(iter(frames.values()))
    result = {
        "questions": len(first),
        "images": int(first["unit"].nunique()),
        "in_bank": first["row"][in_bank].tolist(),
        "near_copies": first["row"][near].tolist(),
        "excluded": exclude,
        "variants": {},
    }
    if exclude:
        frames = {name: frame[~in_bank] for name, frame in frames.items()}
    base = None
    for name, frame in frames.items():
        sums = metric.sums(frame)
        if np.isnan(sums).any():
            result["variants"][name] = {"to_submit": True}
            continue
        strata = metric.stratum and frame[metric.stratum]
        drawn = resampled(sums, frame["unit"], metric.main_value, strata)
        base = (drawn, frame) if base is None else base
        values = {key: float(value[0]) for key, value in metric.values(sums.sum(0, keepdims=True)).items()}
        entry = {"value": list(interval_of(drawn)), "values": values}
        if shipped is not None:
            sums = shipped.sums(frame).sum(0, keepdims=True)
            entry["lmms_eval"] = {key: float(value[0]) for key, value in shipped.values(sums).items()}
        entry["difference"] = list(interval_of(drawn - base[0]))
        entry["answers_that_differ"] = 100 * float(np.mean(frame["answer"].to_numpy() != base[1]["answer"].to_numpy()))
        entry["categories"] = {
            category: metric.category_value(rows)
            for category, rows in frame.explode("categories").groupby("categories")
        }
        result["variants"][name] = entry
    return result


def _best(neighbours: Sequence[dict]) -> float:
    return max((found["score"] or 0.0 for found in neighbours), default=0.0)


def mean_score(results: dict[str, dict], variant: str) -> tuple[float | None, int]:
    """Return the mean of a variant's numbers in the paper's benchmarks, MME's divided by 20, and how many they are."""
    entries = {name: results[name]["variants"].get(variant, {}) for name in PAPER if name in results}
    values = [entry["value"][0] / (20 if name == "mme" else 1) for name, entry in entries.items() if "value" in entry]
    return (float(np.mean(values)) if values else None), len(values)


def write_report(paths: Sequence[tuple[str, Path]], output: Path, exclude: bool = False) -> dict[str, dict]:
    """Write report.md and results.json of files of samples, and EvalAI's files; return the results by benchmark."""
    samples = read_samples(paths)
    output.mkdir(parents=True, exist_ok=True)
    results = {benchmark: compare(benchmark, variants, exclude) for benchmark, variants in samples.items()}
    facts = {name: facts for variants in samples.values() for name, (facts, _) in variants.items()}
    for name, (_, frame) in samples.get("vqav2_testdev", {}).items():
        answers = frame[["question_id", "answer"]].astype({"question_id": int}).to_dict("records")
        save_file(output / f"evalai-{file_name(name)}.json", json.dumps(answers).encode())
    content = {"variants": facts, "benchmarks": results}
    save_file(output / RESULTS, json.dumps(content, indent=2).encode())
    save_file(output / REPORT, _report(results, facts).encode())
    return results


def _report(results: dict[str, dict], facts: dict[str, dict]) -> str:
    variants = list(facts)
    lines = ["# Benchmarks", "", INTRODUCTION, "", "## Results", ""]
    rows = []
    for benchmark, result in results.items():
        for name, entry in result["variants"].items():
            title = f"{BENCHMARKS[benchmark].title} ({result['questions']} questions, {result['images']} images)"
            rows.append([text(title), text(name), *_cells(entry)])
    lines += [table(["benchmark", "variant", "value", "difference to the first", "answers that differ"], rows), ""]
    lines += ["## The paper's Table 1", "", NOTE, ""]
    rows = []
    for benchmark, result in results.items():
        own = [_number(result["variants"].get(name, {}).get("value", [None])[0]) for name in variants]
        rows.append([text(BENCHMARKS[benchmark].title), *own, *map(_number, published(benchmark))])
    lines += [
        table(["benchmark", *map(text, variants), *map(text, PUBLISHED)], rows),
        "",
        "## The paper's Table 2",
        "",
    ]
    lines += ["The mean is of the benchmarks that were run, each as much as another, MME divided by 20. The paper's"]
    lines += ['"Score" cannot be computed from its own tables, and is another number.', ""]
    paper = [name for name in PAPER if name in results]
    rows = []
    for name in variants:
        mean, count = mean_score(results, name)
        numbers = [results[benchmark]["variants"].get(name, {}).get("value", [None])[0] for benchmark in paper]
        rows.append([text(name), *map(_number, numbers), f"{_number(mean)} (mean of {count})"])
    lines += [table(["variant", *(text(BENCHMARKS[name].title) for name in paper), "Score"], rows), ""]
    lines += _details(results)
    lines += ["## Where it comes from", "", table(["variant", "weights", "bank", "versions"], _origins(facts)), ""]
    return "\n".join(lines)


def _details(results: dict[str, dict]) -> list[str]:
    """Return the sections on images in banks, on other readings of the answers, and by category."""
    lines = ["## Images that a bank has", ""]
    for benchmark, result in results.items():
        exact, near = result["in_bank"], result["near_copies"]
        left = "left out here" if result["excluded"] else "not left out (--exclude)"
        lines.append(
            f"- {text(BENCHMARKS[benchmark].title)}: {len(exact)} questions are about an image of a bank, {left}; "
            f"{len(near)} have a neighbour as similar as {NEAR}. Rows: {text(exact[:20])}, {text(near[:20])}."
        )
    lines += ["", "## Other readings of the same answers", ""]
    for benchmark, result in results.items():
        for name, entry in result["variants"].items():
            readings = {"": entry.get("values", {}), ", as lmms-eval reads": entry.get("lmms_eval", {})}
            for reading, values in readings.items():
                numbers = ", ".join(f"{key} {_number(value)}" for key, value in values.items())
                if len(values) > 1:
                    lines.append(f"- {text(BENCHMARKS[benchmark].title)}, {text(name)}{reading}: {numbers}")
    lines += ["", "## By category", ""]
    for benchmark, result in results.items():
        columns = {name: entry["categories"] for name, entry in result["variants"].items() if entry.get("categories")}
        if columns:
            categories = sorted(set().union(*columns.values()))
            rows = [[text(key), *(_number(column.get(key)) for column in columns.values())] for key in categories]
            lines += [table([text(BENCHMARKS[benchmark].title), *map(text, columns)], rows), ""]
    return lines


def _origins(facts: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, fact in facts.items():
        versions = ", ".join(f"{package} {version}" for package, version in fact["versions"].items())
        bank = "none" if fact["bank_rows"] is None else fact["bank_rows"][:17]
        rows.append([text(name), fact["weights"][:12], bank, text(versions)])
    return rows


def _cells(entry: dict) -> list[str]:
    if "value" not in entry:
        return ["to submit to EvalAI", "", ""]
    changed = f"{entry['answers_that_differ']:.1f} %"
    return [_interval(entry["value"], ""), _interval(entry["difference"], "+"), changed]


def _interval(value: Sequence[float], sign: str) -> str:
    middle, low, high = (f"{number:{sign}.1f}" for number in value)
    return f"{middle} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
