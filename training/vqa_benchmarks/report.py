"""report.md and results.json of answers on disk, and the results in a checkpoint's card."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...hub_cards.cards import write_card
from ...hub_cards.facts import Evaluation, read_facts
from ...hub_cards.markdown import table, text
from ..disk import save_file
from ..evaluation.bootstrap import Interval
from .benchmarks import BENCHMARKS
from .comparison import NEAR, compare, mean_score, read_samples, value_in
from .published import NOTE, PAPER_BENCHMARKS, PUBLISHED, published
from .samples import file_name

RESULTS, REPORT = "results.json", "report.md"
INTRODUCTION = """
Numbers are of 0 to 100, MME's of 0 to 2000, with 95% intervals of 2,000 draws of images, the same for all variants:
the questions about an image are drawn together. A difference is one to the first variant, computed draw by draw: where
its interval holds 0, it is noise, and marked so. TinyAlign answers; lmms-eval asks and scores. POPE is read as LLaVA
reads it, the mean F1 of the splits, and TextVQA's prompt has the OCR tokens, as in LLaVA's; other readings are below.
""".strip()
SCORE = """
The mean is of the benchmarks that were run, each as much as another, MME divided by 20. The paper's "Score" cannot be
computed from its own tables, and is another number.
""".strip()


def compare_folders(folders: Sequence[Path], output: Path, exclude: bool = False):
    """Report on all variants that folders have, compared with the first one of the first folder."""
    folders = [folder.resolve() for folder in folders]
    names = [folder.name for folder in folders]
    paths = []
    for number, folder in enumerate(folders, 1):
        found = _in_order(folder)
        if not found:
            raise ValueError(f"{folder} has no samples/VARIANT/BENCHMARK.parquet, expected a folder of results.")
        label = folder.name if names.count(folder.name) == 1 else f"{folder.name} ({number})"
        paths += [(f"{label}: ", path) for path in found]
    write_comparison(paths, output, exclude)


def _in_order(folder: Path) -> list[Path]:
    """Return the files of answers in a folder, the variants in the order of its last report, if it has one."""
    try:
        names = list(json.loads((folder / RESULTS).read_text())["variants"])
    except (OSError, ValueError, LookupError, TypeError):
        names = []
    folders = [*map(file_name, names), *sorted(path.name for path in folder.glob("samples/*"))]
    return [path for name in dict.fromkeys(folders) for path in sorted(folder.glob(f"samples/{name}/*.parquet"))]


def write_comparison(paths: Sequence[tuple[str, Path]], output: Path, exclude: bool = False) -> dict[str, dict]:
    """Write report.md and results.json of files of answers, and EvalAI's files; return the results by benchmark.

    Arguments and errors as of [`read_samples`] and [`compare`].
    """
    samples = read_samples(paths)
    results = {benchmark: compare(benchmark, variants, exclude) for benchmark, variants in samples.items()}
    facts = {name: facts for variants in samples.values() for name, (facts, _) in variants.items()}
    output.mkdir(parents=True, exist_ok=True)
    for name, (own, frame) in samples.get("vqav2_testdev", {}).items():
        if own["is_whole"]:  # EvalAI takes no part of it
            answers = frame[["question_id", "answer"]].astype({"question_id": int}).to_dict("records")
            save_file(output / f"evalai-{file_name(name)}.json", json.dumps(answers).encode())
    save_file(output / RESULTS, json.dumps({"variants": facts, "benchmarks": results}, indent=2).encode())
    save_file(output / REPORT, _report(results, facts).encode())
    print(f"{output / REPORT} has the results.")
    return results


def _report(results: dict[str, dict], facts: dict[str, dict]) -> str:
    titles = {name: text(BENCHMARKS[name].title) for name in results}
    paper = [name for name in PAPER_BENCHMARKS if name in results]
    table1, table2, origins = [], [], []
    for benchmark, title in titles.items():
        own = [value_in(results, benchmark, name) for name in facts]
        table1.append([title, *map(_number, [*own, *published(benchmark)])])
    for name, fact in facts.items():
        mean, count = mean_score(results, name)
        numbers = [_number(value_in(results, benchmark, name)) for benchmark in paper]
        table2.append([text(name), *numbers, f"{_number(mean)} (mean of {count})"])
        versions = ", ".join(f"{package} {version}" for package, version in fact["versions"].items())
        origins.append([text(name), fact["weights"][:12], text(fact["bank_rows"] or "none")[:17], text(versions)])
    judges = [
        f"{titles[name]} was scored by the judge {text(result['judge'])}."
        for name, result in results.items()
        if result["judge"]
    ]
    sections = {
        "Results": _values(results, titles),
        "The paper's Table 1": f"{NOTE}\n\n{table(['benchmark', *map(text, [*facts, *PUBLISHED])], table1)}",
        "The paper's Table 2": f"{SCORE}\n\n{table(['variant', *map(titles.get, paper), 'Score'], table2)}",
        "Images that a bank has": _images(results, titles),
        "Other readings of the same answers": _readings(results, titles),
        "By category": _categories(results, titles),
        "Where it comes from": "\n\n".join([table(["variant", "weights", "bank", "versions"], origins), *judges]),
    }
    return "\n\n".join(
        ["# Benchmarks", INTRODUCTION, *(f"## {name}\n\n{body}" for name, body in sections.items()), ""]
    )


def _values(results: dict[str, dict], titles: dict[str, str]) -> str:
    rows, notes = [], []
    for benchmark, result in results.items():
        asked = f"{titles[benchmark]} ({result['questions']} questions, {result['images']} images)"
        for name, entry in result["variants"].items():
            if entry["too_long"]:
                notes.append(f"{entry['too_long']} prompts of {asked} fill the context of {text(name)}, or more.")
            cells = ["to submit to EvalAI" if entry.get("to_submit") else "not scored: a part", "", ""]
            if "value" in entry:
                cells = [f"{Interval(*entry['value']):.1f}", _difference(entry["difference"])]
                cells.append(f"{entry['answers_that_differ']:.1f} %")
            rows.append([asked, text(name), *cells])
    columns = ["benchmark", "variant", "value", "difference to the first", "answers that differ"]
    return "\n\n".join([table(columns, rows), *notes])


def _images(results: dict[str, dict], titles: dict[str, str]) -> str:
    lines = []
    for benchmark, result in results.items():
        exact, near = result["in_bank"], result["near_copies"]
        left = "left out here" if result["excluded"] else "not left out (--exclude)"
        lines.append(
            f"- {titles[benchmark]}: {len(exact['rows'])} questions are about an image that a bank has, pixel for "
            f"pixel, {left}{_some(exact['images'])}; {len(near['rows'])} others are about one with a neighbour more "
            f"similar than {NEAR}, which may be a copy{_some(near['images'])}."
        )
        if result["near_unknown"]:
            names = text(", ".join(result["near_unknown"]))
            lines.append(f"- {titles[benchmark]}, {names}: near copies cannot be told, as keys hold the question.")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    """Return the first names of images; results.json has all."""
    if not names:
        return ""
    return text(": " + ", ".join([*names[:10], "..."] if len(names) > 10 else names))


def _readings(results: dict[str, dict], titles: dict[str, str]) -> str:
    lines = []
    for benchmark, result in results.items():
        for name, entry in result["variants"].items():
            for source, reading in (("values", "as above"), ("lmms_eval", "as lmms-eval reads them")):
                numbers = ", ".join(f"{key} {_number(value)}" for key, value in (entry.get(source) or {}).items())
                if "," in numbers:
                    lines.append(f"- {titles[benchmark]}, {text(name)}, {reading}: {numbers}")
    return "\n".join(lines)


def _categories(results: dict[str, dict], titles: dict[str, str]) -> str:
    tables = []
    for benchmark, result in results.items():
        columns = {name: entry["categories"] for name, entry in result["variants"].items() if entry.get("categories")}
        rows = []
        for category in sorted(set().union(*columns.values())):
            rows.append([text(category), *(_number(column.get(category)) for column in columns.values())])
        if rows:
            tables.append(table([titles[benchmark], *map(text, columns)], rows))
    return "\n\n".join(tables)


def _difference(interval: Sequence[float]) -> str:
    value, low, high = interval
    note = " noise" if low <= 0 <= high and (low, high) != (0, 0) else ""
    if high - low < 1e-9 < abs(value):  # all draws are the same: one image, or one a stratum
        note = " too few images"
    return f"{Interval(*interval):+.1f}{note}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def write_results_card(checkpoint: Path, results: dict[str, dict], own: str):
    """Write the results into the checkpoint's card: a table of all variants, and those of `own` as its model-index."""
    scored = {name: result for name, result in results.items() if value_in(results, name, own) is not None}
    variants, sources = {}, {}
    for benchmark, result in scored.items():
        found = {"type": result["source"], "split": result["split"], "revision": result["data_version"]}
        sources[benchmark] = {f"dataset_{name}": value for name, value in found.items()}
        for name, entry in result["variants"].items():
            variants.setdefault(name, {})[benchmark] = entry["value"]
    evaluation = Evaluation(
        dataset="benchmarks of visual question answering",
        split=", ".join(sorted({result["split"] for result in scored.values()})),
        sources=sources,
        metrics={name: BENCHMARKS[name].title for name in scored},
        own={own: variants.pop(own)},
        others=variants,
    )
    write_card(checkpoint, replace(read_facts(checkpoint), evaluation=evaluation))
