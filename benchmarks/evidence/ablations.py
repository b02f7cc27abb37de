"""The paper's ablations of what is retrieved: size of the bank, tower, neighbours, source, and text in the query."""

from pathlib import Path

import numpy as np
import openclipart
import plots
import retrieval
from pooling import result_of
from sections import FAILS, HOLDS, UNTESTED, Section, ahead_of, beats, better, demos_of, scores_table, versus
from study import Study

from tinyalign_vlm.training.demo.state import PROMPT


def bank(study: Study, folder: Path) -> Section:
    """Compare banks of several sizes."""
    recalls = retrieval.all_changes(study)
    demos = demos_of(study, retrieval.SEEDS)
    banks = [f"size_{share:.0%}" for share in retrieval.BANK_SHARES[:-1]] + ["with", "size_distractors"]
    titles = {"with": "100%", "size_distractors": "100% and the validation concepts, which nobody asks for"}
    art = openclipart.clip_art(study)
    if art is not None:
        for seed, found in retrieval.clip_art_distractors(study, art).items():
            recalls[seed]["size_openclipart"] = found
        banks.append("size_openclipart")
        titles["size_openclipart"] = f"100% and {len(art.distractors)} pictures of clip art under their titles"
    found = {name: np.mean([recalls[seed][name] for seed in recalls]) for name in banks}
    shown = {name: f"{titles.get(name, name.removeprefix('size_'))} (recall {found[name]:.2f})" for name in banks}
    rows = {
        shown[name]: result_of("tinyalign", name) for name in ("with", *(name for name in banks if name != "with"))
    }
    whole, tenth = rows[shown["with"]], rows[shown[banks[0]]]
    extra = {titles[name]: rows[shown[name]] for name in banks if name in ("size_distractors", "size_openclipart")}
    sizes = dict(zip(retrieval.BANK_SHARES, banks, strict=False))
    plots.bank_sizes(demos, sizes, found, {name: rows[shown[name]] for name in banks}, folder / "bank.png")
    told = "; ".join(f"{title}: {versus(demos, pick, whole)}" for title, pick in extra.items())
    more_helps = any(any(better(demos, pick, whole).values()) for pick in extra.values())
    return Section(
        "How large a bank has to be",
        "100,000 rows are enough: 73.3, with 300,000 73.1, with 500,000 72.9 (Table 6).",
        "Rows of the bank left out at random at inference, or others added; recall: a right row is among the four "
        "neighbours.\n\n"
        + scores_table(demos, rows, whole)
        + f"\n\n![Scores and recall by the size of the bank]({folder.name}/bank.png)"
        + openclipart.note(study, art),
        f"{FAILS if more_helps else HOLDS} for rows that nobody asks for; beside the whole bank, {told}. What is "
        f"asked for has to be there: the whole bank beside a tenth of it is {versus(demos, whole, tenth)}.",
    )


def towers(study: Study, folder: Path) -> Section:
    """Compare neighbours that another tower finds."""
    recalls = retrieval.all_changes(study)
    demos = demos_of(study, retrieval.SEEDS)
    rows = {
        "TinyAlign": result_of("tinyalign", "with"),
        "neighbours by the small picture itself": result_of("tinyalign", "other_tower"),
        "wrong keys (random bank)": result_of("tinyalign", "random"),
        "baseline": result_of("baseline", "with"),
    }
    found = np.mean([recalls[seed]["other_tower"] for seed in recalls])
    own = np.mean([recalls[seed]["with"] for seed in recalls])
    small = rows["neighbours by the small picture itself"]
    ours, wrong, baseline = rows["TinyAlign"], rows["wrong keys (random bank)"], rows["baseline"]
    return Section(
        "Another tower's keys",
        "Keys of another encoder than the model's collapse: VQAv2 70.1 becomes 29.6 (Table 7).",
        "There is one tower here. A weak one stands for another, for keys and queries alike: pictures of 12 x 12 "
        f"pixels, whose keys were not learned. Recall {found:.2f}, the model's own {own:.2f}.\n\n"
        + scores_table(demos, rows, ours),
        f"{UNTESTED}: keys of one tower and queries of another are refused by this package. Nearest to it are wrong "
        f"keys: beside the baseline {versus(demos, wrong, baseline)}. A weaker tower for both: beside TinyAlign "
        f"{versus(demos, small, ours)}, beside the baseline {versus(demos, small, baseline)}.",
    )


def neighbours(study: Study, folder: Path) -> Section:
    """Compare numbers of neighbours."""
    retrieval.all_changes(study)
    demos = demos_of(study, retrieval.SEEDS)
    rows = {"4 neighbours": result_of("tinyalign", "with")}
    rows |= {f"{count}": result_of("tinyalign", f"top_{count}") for count in (3, 2, 1)}
    rows["none (memory off)"] = result_of("tinyalign", "off")
    four, *fewer = list(rows)[:4]
    holds = all(beats(demos, rows[four], rows[name]) for name in fewer)
    told = "; ".join(f"beside {name}: {versus(demos, rows[four], rows[name])}" for name in fewer)
    return Section(
        "How many neighbours",
        "TinyLLaMA with one, five, ten: 63.1, 68.7, 65.3 (Table 8).",
        "One model, trained with four, which favours four; fewer at inference. It has no place for more.\n\n"
        + scores_table(demos, rows, rows[four]),
        f"{HOLDS if holds else FAILS} up to four: four {told}. That ten are worse than five {UNTESTED}.",
        ahead_of(demos, rows[four], {f"{name} of them": rows[name] for name in fewer}),
    )


def sources(study: Study, folder: Path) -> Section:
    """Compare a bank of another source."""
    demos = demos_of(study, study.seeds)
    rows = {
        "TinyAlign": result_of("tinyalign", "with"),
        "bank of another source (characters of a font)": result_of("tinyalign", "other"),
        "bank of the same source that lacks the concepts": result_of("tinyalign", "without"),
        "baseline": result_of("baseline", "with"),
    }
    others, art = {"a font's characters": "other"}, openclipart.clip_art(study)
    if art is not None:
        retrieval.clip_art_alone(study, art)
        rows |= {"bank of another source (openclipart)": result_of("tinyalign", "openclipart")}
        others["clip art"] = "openclipart"
    told, ahead, holds = [], [], True
    for title, bank_name in others.items():
        other, base = result_of("tinyalign", bank_name), rows["baseline"]
        holds = holds and beats(demos, other, base)
        told.append(f"a bank of {title} is {versus(demos, other, base)}")
        ahead.append(ahead_of(demos, other, {f"the baseline, where the bank is of {title},": base}))
    return Section(
        "A bank of another source still helps",
        "No bank 70.5, one of another source 71.0, the own 73.3 (Table 9).",
        scores_table(demos, rows, rows["TinyAlign"]) + openclipart.note(study, art),
        f"{HOLDS if holds else FAILS}: against the baseline {'; '.join(told)}.",
        "; ".join(filter(None, ahead)),
    )


def queries(study: Study, folder: Path) -> Section:
    """Compare queries with the question and without."""
    recalls = retrieval.language_queries(study)
    demos = demos_of(study, retrieval.SEEDS)
    titles = {
        "with": "keys of the picture alone, in the tower's space",
        "query_image": "keys in the language model's space, query: the picture",
        "query_question": "the same, query: the picture and the question",
    }
    rows = {title: result_of("tinyalign", name) for name, title in titles.items()}
    picture, image, question = rows.values()
    found = ", ".join(f"{np.mean([seed[name] for seed in recalls.values()]):.2f}" for name in titles)
    return Section(
        "A query with the question's text",
        "A key is made of picture and text (eq. 4), a query of picture and instruction; no figure without the text.",
        f'The question in the query is "{PROMPT}", for both questions. One model, trained with the first row\'s '
        "neighbours, whose keys were learned, which those of the other rows were not. Recall, a right row among four, "
        f"by row: {found}.\n\n" + scores_table(demos, rows, picture),
        f"{UNTESTED}: all pictures are asked the same, so the question cannot tell them apart. Beside the query of "
        f"the picture alone, one with the question is {versus(demos, question, image)}. Keys of the tower's space, "
        f"beside it: {versus(demos, picture, question)}.",
    )
