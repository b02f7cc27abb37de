"""
Run every claim of the paper again, and what a sceptic asks, and write docs/evidence.md.

    make demo && make evidence
    make evidence EVIDENCE_ARGS="--only data_efficiency"
    python benchmarks/evidence evidence --seeds 0 --only loss bank --report evidence/report.md

Systems, evaluations and answers are kept in the folder, so a run that was killed goes on, and a section runs alone.
Each system takes half a gigabyte of disk: three seeds of one section 11 GB, a whole run several times as many.
Clip art, for real_captions and a row in bank and sources: `apt-get install openclipart-png openclipart-svg`.
Sections: {sections}.
"""

import argparse
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import ablations
import claims
import datasets
import rivals
from sections import Section
from study import SEEDS, Study
from transformers.utils import logging

from tinyalign_vlm.training.demo.state import TOP_K, Clock, DemoConfig
from tinyalign_vlm.training.disk import save_file
from tinyalign_vlm.training.evaluation.bootstrap import DRAWS
from tinyalign_vlm.training.hub.run_facts import hardware, versions

FOLDER = Path(__file__).parent
SECTIONS = {
    "systems": claims.systems,
    "loss": claims.loss,
    "clusters": claims.clusters,
    "data_efficiency": claims.data_efficiency,
    "causes": claims.causes,
    "cost": claims.cost,
    "bank": ablations.bank,
    "towers": ablations.towers,
    "neighbours": ablations.neighbours,
    "sources": ablations.sources,
    "queries": ablations.queries,
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
    "A second language model, and a second tower": "only one of each can be had without the Hub.",
    "More than four neighbours": "a model has places for as many as it was trained with.",
    "Equal steps with 20, 60 and 80% of the data": "40 and 100% alone are the paper's claim.",
    "Scores with captions of three words, one, five and ten neighbours; latents with long captions": "seconds alone.",
}

REPORT = """# Evidence

Where something else is ahead of TinyAlign:

{first}

Emoji in two styles of drawing, as in [the demo](demo/report.md): concepts that were never trained on, a bank that has
other drawings of them with their names. Each seed asks two questions about {config.queries} pictures. SmolLM2-135M
and EfficientNet-Lite0, {config.stage1_steps} + {config.stage2_steps} steps of {config.batch_size} rows, {top_k}
neighbours: it is the *kind* of claim that is tested, not the paper's benchmarks and models. All systems that read
neighbours, as memory tokens, text or pictures, lose as many of them in training. Settings were chosen on the seeds'
validation concepts, some of which are test concepts of another seed.

Brackets are 95% intervals of {draws} bootstrap draws of concepts, over all seeds of a table, and are for these runs;
from which seed's result to which they go stands in parentheses, and a run of one seed differs from the next by as
much. "Better" is: in every seed, and with a paired interval off 0; what is so in the mean alone is marked. Four
metrics are looked at each time, so that of two equals one is better in something in up to one comparison of ten. None
of 200 is [0, 0] here; up to 1.5% is possible.

| claim | verdict |
|---|---|
{verdicts}

{sections}

## Not run

{not_run}

## How it was run

`make demo`, then `make evidence EVIDENCE_ARGS="--seeds {seeds_given}"`, at commit {commit}; machine: {machine};
{packages}. Constants to change, SEEDS and the like, stand at the top of each file in
[benchmarks/evidence/](../benchmarks/evidence); `EVIDENCE_ARGS="--only SECTION"` runs one section. Seconds are of
whatever else the machine did at the time.

| step | seconds |
|---|---|
{seconds}
| together | {together:.0f} |
"""


def rendered(name: str, section: Section, seeds: Sequence[int]) -> str:
    """Return a section as Markdown."""
    ahead = f"Ahead of TinyAlign: {section.ahead}.\n\n" if section.ahead else ""
    return (
        f"## {section.title}\n\nPaper: {section.claim}\n\n**Verdict: {section.verdict}**\n\n{ahead}{section.body}\n\n"
        f'Command: `make evidence EVIDENCE_ARGS="--seeds {" ".join(map(str, seeds))} --only {name}"`\n'
    )


def assemble(folder: Path, report: Path, seeds: Sequence[int], seconds: dict[str, float]) -> None:
    """Write the report of all sections that were run."""
    found = {name: (folder / f"{name}.md").read_text() for name in SECTIONS if (folder / f"{name}.md").exists()}
    titles = {name: re.match("## (.*)", text)[1] for name, text in found.items()}
    lines, ahead = [], []
    for name, text in found.items():
        verdict = re.search(r"\*\*Verdict: (.*?)\*\*\n\n", text, re.DOTALL)[1]
        lines.append(f"| {titles[name]} | {verdict} |")
        beaten = re.search("^Ahead of TinyAlign: (.*)$", text, re.MULTILINE)
        if beaten:
            ahead.append(f"- {titles[name]}: {beaten[1]}")
    missing = NOT_RUN | {name: "not run yet." for name in SECTIONS if name not in found}
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=FOLDER, capture_output=True, text=True)
    text = REPORT.format(
        first="\n".join(ahead) or "- in no section that looks for it.",
        config=DemoConfig(),
        top_k=TOP_K,
        draws=DRAWS,
        seeds_given=" ".join(map(str, seeds)),
        verdicts="\n".join(lines),
        sections="\n".join(found.values()).strip(),
        not_run="\n".join(f"- {name}: {why}" for name, why in missing.items()),
        commit=commit.stdout.strip() or "unknown",
        machine=hardware(),
        packages=", ".join(f"{name} {version}" for name, version in versions().items()),
        seconds="\n".join(f"| {step} | {value:.0f} |" for step, value in seconds.items()),
        together=sum(seconds.values()),
    )
    save_file(report, text.encode())


def main():
    text = __doc__.format(sections=", ".join(SECTIONS))
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of all results")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="of a finished demo (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(default: 0 1 2)")
    parser.add_argument("--report", type=Path, default=Path("docs/evidence.md"), help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of another lesson.json with its pictures, for one_picture")
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
    study = Study(arguments.out, arguments.demo, arguments.seeds, arguments.data, arguments.openclipart)
    clock = Clock(arguments.out / "clock.json")
    for name in arguments.only:
        section = SECTIONS[name](study, pictures)
        save_file(folder / f"{name}.md", rendered(name, section, arguments.seeds).encode())
        clock(name, section.verdict)
        assemble(folder, arguments.report, arguments.seeds, clock.seconds)
    print(f"{arguments.report} has the results.")


if __name__ == "__main__":
    main()
