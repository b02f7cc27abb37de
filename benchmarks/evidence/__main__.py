"""
Run every claim of the paper again, and what a sceptic asks, and write docs/evidence.md.

    make demo && make evidence
    make evidence EVIDENCE_ARGS="--only data_efficiency"
    python benchmarks/evidence evidence --seeds 0 --only loss bank --report evidence/report.md

Systems, evaluations and answers are kept in the folder, so a run that was killed goes on, and a section runs alone.
Clip art, for real_captions and a row in bank and sources: `apt-get install openclipart-png openclipart-svg`.
Sections: {sections}.
"""

import argparse
import re
from pathlib import Path

import claims
import datasets
import rivals
from sections import Section
from study import SEEDS, Study
from transformers.utils import logging

from tinyalign_vlm.training.demo.state import TOP_K, Clock, DemoConfig
from tinyalign_vlm.training.evaluation.bootstrap import DRAWS
from tinyalign_vlm.training.hub.run_facts import hardware, versions

SECTIONS = {
    "loss": claims.loss,
    "clusters": claims.clusters,
    "data_efficiency": claims.data_efficiency,
    "causes": claims.causes,
    "cost": claims.cost,
    "bank": claims.bank,
    "towers": claims.towers,
    "neighbours": claims.neighbours,
    "sources": claims.sources,
    "queries": claims.queries,
    "stages": claims.stages,
    "real_captions": claims.real_captions,
    "alternatives": rivals.alternatives,
    "pictures": rivals.pictures,
    "one_picture": rivals.one_picture,
    "easy_vqa": rivals.easy_vqa,
}
# Asked for by a careful reader and not run, and why.
NOT_RUN = {
    "A trained prefix": "it did not fit into the time.",
    "A second language model": "only one can be had without the Hub.",
}

REPORT = """# Evidence

{first}

Emoji in two styles of drawing, as in [the demo](demo/report.md): concepts that were never trained on, a bank that has
other drawings of them with their names. Each seed asks two questions about {config.queries} pictures. SmolLM2-135M
and EfficientNet-Lite0, {config.stage1_steps} + {config.stage2_steps} steps of {config.batch_size} rows, {top_k}
neighbours: it is the *kind* of claim that is tested, not the paper's benchmarks and models. Brackets are 95%
intervals of {draws} bootstrap draws of concepts, over all seeds of a table; differences are paired.
Where one run is compared with one run, differences of 0.15 in the loss of names can be the run's: so much is between
seeds. Seeds: {seeds}; the sections alternatives, data_efficiency, causes, stages, cost, real_captions, pictures,
one_picture and easy_vqa train on seed 0 alone.

| claim | verdict |
|---|---|
{verdicts}

{sections}

## Not run

{not_run}

## How it was run

`make demo`, then `make evidence EVIDENCE_ARGS="--seeds {seeds_given}"`; machine: {machine}; {packages}. Constants to
change, SEEDS and the like, stand at the top of each file in [benchmarks/evidence/](../benchmarks/evidence);
`EVIDENCE_ARGS="--only SECTION"` runs one section. Seconds are of whatever else the machine did at the time.

| step | seconds |
|---|---|
{seconds}
"""


def rendered(name: str, section: Section) -> str:
    """Return a section as Markdown."""
    return (
        f"## {section.title}\n\nPaper: {section.claim}\n\n**Verdict: {section.verdict}**\n\n{section.body}\n\n"
        f'Command: `make evidence EVIDENCE_ARGS="--only {name}"`\n'
    )


def assemble(folder: Path, report: Path, seeds: list[int], seconds: dict[str, float]) -> None:
    """Write the report of all sections that were run."""
    texts = {name: (folder / f"{name}.md") for name in SECTIONS}
    found = {name: path.read_text() for name, path in texts.items() if path.exists()}
    verdicts = {name: re.search(r"\*\*Verdict: (.*?)\*\*\n\n", text, re.DOTALL)[1] for name, text in found.items()}
    lines = [f"| {re.match('## (.*)', found[name])[1]} | {verdict} |" for name, verdict in verdicts.items()]
    missing = NOT_RUN | {name: "not run yet." for name in SECTIONS if name not in found}
    told = []
    for name in ("alternatives", "pictures", "real_captions", "one_picture"):  # what may be ahead of TinyAlign
        if name in found:
            told.append(f"{re.match('## (.*)', found[name])[1]}: {verdicts[name]}")
    controls = " ".join(told)
    text = REPORT.format(
        first="In short: " + (controls or "the controls have not been run yet."),
        config=DemoConfig(),
        top_k=TOP_K,
        draws=DRAWS,
        seeds=", ".join(map(str, seeds)),
        seeds_given=" ".join(map(str, seeds)),
        verdicts="\n".join(lines),
        sections="\n".join(found.values()).strip(),
        not_run="\n".join(f"- {name}: {why}" for name, why in missing.items()),
        machine=hardware(),
        packages=", ".join(f"{name} {version}" for name, version in versions().items()),
        seconds="\n".join(f"| {step} | {value:.0f} |" for step, value in seconds.items()),
    )
    report.write_text(text)


def main():
    text = __doc__.format(sections=", ".join(SECTIONS))
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of all results")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="of a finished demo (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(default: 0 1 2)")
    parser.add_argument("--report", type=Path, default=Path("docs/evidence.md"), help="(default: %(default)s)")
    parser.add_argument("--lesson", type=Path, help="folder of another lesson.json for one_picture")
    parser.add_argument(
        "--openclipart",
        type=Path,
        default=Study.openclipart,
        help="folder of Debian's openclipart packages (default: %(default)s)",
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder, pictures = arguments.out / "sections", arguments.report.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.out, arguments.demo, arguments.seeds, arguments.lesson, arguments.openclipart)
    clock = Clock(arguments.out / "clock.json")
    for name in arguments.only:
        section = SECTIONS[name](study, pictures)
        (folder / f"{name}.md").write_text(rendered(name, section))
        clock(name, section.verdict)
        assemble(folder, arguments.report, list(arguments.seeds), clock.seconds)
    print(f"{arguments.report} has the results.")


if __name__ == "__main__":
    main()
