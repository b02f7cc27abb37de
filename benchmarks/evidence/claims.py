"""The paper's claims: each runs a part of the study, and says what was found, and whether the claim holds."""

from pathlib import Path

import alignment
import costs
import mechanism
import numpy as np
import openclipart
import plots
import real_captions as captions_of_clip_art
import retrieval
import training_data
from pooling import is_less, result_of, score
from sections import FAILS, HOLDS, UNTESTED, Section, better, demos_of, said, scores_table
from study import Study

from tinyalign_vlm.hub_cards.markdown import table
from tinyalign_vlm.training.demo.report import METRICS, interval_cell
from tinyalign_vlm.training.demo.state import PROMPT


def loss(study: Study, folder: Path) -> Section:
    """Compare training losses."""
    curves = {seed: alignment.loss_curves(study.demo(seed)) for seed in study.seeds}
    plots.loss_curves(curves, folder / "loss.png")
    lines, less = [], {}
    for stage in range(2):
        for system in alignment.SYSTEMS:
            line = [f"stage {stage + 1}", system]
            for equal in ("steps", "seconds"):
                ends, shares = [], []
                for found in curves.values():
                    base, curve = found["baseline"][stage], found[system][stage]
                    ends.append(curve.end(base.seconds if equal == "seconds" else None))
                    shares.append(1 - ends[-1] / base.end())
                less[stage, system, equal] = shares
                line += [f"{np.mean(ends):.3f}", f"{np.mean(shares):+.1%} ({min(shares):+.1%} to {max(shares):+.1%})"]
            lines.append(line)
    header = ["", "", "loss, equal steps", "below the baseline", "loss, equal seconds", "below the baseline"]
    ours = [min(less[0, "tinyalign", equal]) > 0 for equal in ("steps", "seconds")]
    return Section(
        "Lower loss in alignment pre-training",
        "16.8% lower with Phi-2 (section 4.2, Fig. 2a), at equal steps.",
        "Mean training loss of the last 30% of the steps, mean of the seeds, and the lowest and highest seed. At "
        "equal seconds a system has as long as the baseline took.\n\n" + table(header, lines) + "\n\n"
        f"![Training losses]({folder.name}/loss.png)",
        f"{HOLDS if all(ours) else FAILS}: in stage 1 it is {'lower' if ours[0] else 'not lower'} in every seed at "
        f"equal steps, and {'lower' if ours[1] else 'not lower in every seed'} at equal seconds. In stage 2 it is "
        f"{np.mean(less[1, 'tinyalign', 'steps']):.1%} lower at equal steps, and with text in the prompt "
        f"{np.mean(less[1, 'text_rag', 'steps']):.1%}: memory brings the name itself into the prompt.",
    )


def clusters(study: Study, folder: Path) -> Section:
    """Compare how near pictures are to their names."""
    found = alignment.measure(study)
    plots.clouds(found[study.seeds[0]], folder / "clusters.png")
    names = list(found[study.seeds[0]])
    lines, means = [], {}
    for name in names:
        measures = np.array([[seed[name].gap, seed[name].spread, seed[name].own_name] for seed in found.values()])
        means[name] = measures.mean(0)
        lines.append(
            [name]
            + [
                f"{m:.3f} ({low:.3f} to {high:.3f})"
                for m, low, high in zip(means[name], measures.min(0), measures.max(0), strict=True)
            ]
        )
    base, visual, whole = (means[name] for name in names)
    tighter, nearer = visual[1] < base[1], visual[0] < base[0]
    return Section(
        "Tighter clusters and a smaller gap between pictures and words",
        "UMAP of image and text embeddings shows both (Fig. 2b), without a number.",
        "Mean of what the language model reads of a picture, and of its name's embeddings, unit length. Gap: distance "
        "of the two clouds' centres. Spread: distance within a kind of emoji over that between kinds, smaller is "
        "tighter. UMAP, by cosine; distances between its groups mean little.\n\n"
        + table(["", "gap", "spread", "own name is the nearest of 200"], lines)
        + f"\n\n![Pictures and names]({folder.name}/clusters.png)",
        f"{HOLDS if tighter and nearer else FAILS}: the visual tokens of TinyAlign are "
        f"{'tighter' if tighter else 'not tighter'} and {'nearer to' if nearer else 'not nearer to'} the names than "
        f"the baseline's. With memory the own name is the nearest for {whole[2]:.0%} of the pictures, in the baseline "
        f"for {base[2]:.0%}: memory *is* words.",
    )


def data_efficiency(study: Study, folder: Path) -> Section:
    """Compare systems that are trained on shares of the data."""
    runs = training_data.runs(study)
    demos = list({demo.config.seed: demo for demo, *_ in runs}.values())
    names = {(plan, share, name.split("_")[0]): name for _, plan, share, name in runs}
    plots.data_efficiency(demos, names, folder / "data_efficiency.png")
    lines, verdicts = [], {}
    for (plan, share, system), name in names.items():
        pick = result_of(name, "with")
        lines.append(
            [plan, f"{share:.0%}", system, *(interval_cell(score(demos, pick, metric)) for metric in METRICS)]
        )
    for plan in training_data.SHARES:
        ours, whole = (
            result_of(names[plan, share, system], "with") for share, system in ((0.4, "tinyalign"), (1.0, "baseline"))
        )
        verdicts[plan] = better(demos, ours, whole), better(demos, whole, ours)
    holds = all(more and not less for more, less in verdicts.values())
    told = "; ".join(
        f"equal {plan}{'s' if plan == 'epoch' else ''}: better in {said(more)}, worse in {said(less)}"
        for plan, (more, less) in verdicts.items()
    )
    return Section(
        "The baseline's level with 40% of the fine-tuning data",
        "TinyAlign with 40% of the data reaches the baseline with 100% (Fig. 3).",
        "Shares of the training concepts; the bank stays whole, and has the concepts that are asked for. *epoch*: "
        "each picture once, so fewer steps with less data; *steps*: always as many as all of the data take.\n\n"
        + table(["plan", "data", "system", *METRICS.values()], lines)
        + f"\n\n![Scores by share of the data]({folder.name}/data_efficiency.png)",
        f"{HOLDS if holds else FAILS}: 40% with TinyAlign against 100% with the baseline, {told}. The bank brings "
        "what no share of the training data has, the names of the concepts, which no baseline can know.",
    )


def causes(study: Study, folder: Path) -> Section:
    """Compare what else could have brought the gain."""
    mechanism.compare(study)
    demos = demos_of(study, mechanism.SEEDS)
    rows = {
        "TinyAlign": result_of("tinyalign", "with"),
        "baseline": result_of("baseline", "with"),
        "wider connector": result_of("wider_connector", "with"),
        "static RAG (captions in the training prompts)": result_of("static_rag", "with"),
        "more data (other drawings of training concepts, 1.7 times the steps)": result_of("more_data", "with"),
        "TinyAlign and more data": result_of("both", "with"),
    }
    ours = rows["TinyAlign"]
    rivals = {name: pick for name, pick in rows.items() if not name.startswith("TinyAlign")}
    beaten = {name: better(demos, ours, pick) for name, pick in rivals.items()}
    holds = all(beaten.values()) and not any(better(demos, pick, ours) for pick in rivals.values())
    return Section(
        "The gain comes from retrieval, not from parameters or data",
        "Wider connector, static RAG and more data each stay below TinyAlign; both together are best (Table 2).",
        scores_table(demos, rows, ours),
        f"{HOLDS if holds else FAILS}: TinyAlign is better "
        + "; ".join(f"than {name} in {said(found)}" for name, found in beaten.items())
        + ". Training on the bank's own rows is in the section What a sceptic asks.",
    )


def stages(study: Study, folder: Path) -> Section:
    """Compare two stages with one."""
    mechanism.compare(study)
    demos = demos_of(study, mechanism.SEEDS)
    rows = {
        "TinyAlign, two stages": result_of("tinyalign", "with"),
        "TinyAlign, one stage": result_of("one_stage", "with"),
        "baseline, two stages": result_of("baseline", "with"),
        "baseline, one stage": result_of("one_stage_baseline", "with"),
    }
    two, one = list(rows.values())[:2]
    more, less = better(demos, two, one), better(demos, one, two)
    return Section(
        "Two stages are better than one",
        "End-to-end training reaches 70.2, two stages 73.3 (section 4).",
        "As many steps in all.\n\n" + scores_table(demos, rows, two),
        f"{HOLDS if more and not less else FAILS}: two stages are better in {said(more)}, worse in {said(less)}. "
        "It is one run of each.",
    )


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
    lines = []
    for name in banks:
        found = np.mean([recalls[seed][name] for seed in recalls])
        scores = (interval_cell(score(demos, result_of("tinyalign", name), metric)) for metric in METRICS)
        lines.append([titles.get(name, name.removeprefix("size_")), f"{found:.2f}", *scores])
    whole, tenth = result_of("tinyalign", "with"), result_of("tinyalign", banks[0])
    more, less = better(demos, whole, tenth), better(demos, tenth, whole)
    return Section(
        "A larger bank is better",
        "Scores rise with the size of the bank (Table 6).",
        "Rows of the bank left out at random at inference; recall: a right row is among the four neighbours.\n\n"
        + table(["bank", "recall", *METRICS.values()], lines)
        + openclipart.note(study, art),
        f"{HOLDS if more and not less else FAILS}: the whole bank is better than a tenth in {said(more)}, worse in "
        f"{said(less)}. Recall, whether the bank has what is asked for, goes with it.",
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
    worse, ahead = better(demos, rows["TinyAlign"], small), better(demos, small, rows["TinyAlign"])
    return Section(
        "Another tower's neighbours",
        "Keys of another encoder than the model's collapse: VQAv2 70.1 becomes 29.6 (Table 7).",
        f"Here a weak tower stands for another one: pictures of 12 x 12 pixels. Recall {found:.2f}, the model's own "
        f"{own:.2f}.\n\n" + scores_table(demos, rows, rows["TinyAlign"]),
        f"{HOLDS if worse and not ahead else FAILS}: worse neighbours make it worse in {said(worse)}. Wrong keys are "
        "what mixing two towers' keys amounts to; this package refuses a bank of another tower.",
    )


def neighbours(study: Study, folder: Path) -> Section:
    """Compare numbers of neighbours."""
    retrieval.all_changes(study)
    demos = demos_of(study, retrieval.SEEDS)
    rows = {"4 neighbours": result_of("tinyalign", "with")}
    rows |= {f"{count}": result_of("tinyalign", f"top_{count}") for count in (3, 2, 1)}
    rows["none (memory off)"] = result_of("tinyalign", "off")
    four, *fewer = list(rows)[:4]
    beaten = {name: (better(demos, rows[four], rows[name]), better(demos, rows[name], rows[four])) for name in fewer}
    holds = all(more and not less for more, less in beaten.values())
    told = "; ".join(f"than {name} in {said(more)}, worse in {said(less)}" for name, (more, less) in beaten.items())
    return Section(
        "More neighbours are better",
        "Five neighbours are best of 1, 3, 5, 7 (Table 8).",
        "One model, trained with four, fewer at inference.\n\n" + scores_table(demos, rows, rows[four]),
        f"{HOLDS if holds else FAILS}: four are better {told}.",
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
    told, holds = [], True
    for title, bank_name in others.items():
        other, base = result_of("tinyalign", bank_name), rows["baseline"]
        more, less = better(demos, other, base), better(demos, base, other)
        holds = holds and bool(more) and not less
        told.append(f"a bank of {title} is better in {said(more)}, worse in {said(less)}")
    return Section(
        "A bank of another source still helps",
        "Banks of other data sets keep most of the gain (Table 9).",
        scores_table(demos, rows, rows["TinyAlign"]) + openclipart.note(study, art),
        f"{HOLDS if holds else FAILS}: against the baseline {'; '.join(told)}.",
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
    more, less = better(demos, question, image), better(demos, image, question)
    ahead = better(demos, picture, question)
    return Section(
        "A query with the question's text",
        "A key is made of picture and text (eq. 4), a query of picture and instruction; no figure without the text.",
        f'The question in the query is "{PROMPT}", for both questions. One model, trained with the first row\'s '
        f"neighbours. Recall, a right row among four, by row: {found}.\n\n" + scores_table(demos, rows, picture),
        f"{HOLDS if more and not less else FAILS}: beside the query of the picture alone, one with the question is "
        f"better in {said(more)}, worse in {said(less)}. Keys of the tower's space are better in {said(ahead)}. "
        "All pictures are asked the same here: text that tells pictures apart could help more.",
    )


def real_captions(study: Study, folder: Path) -> Section:
    """Compare losses of captions that people wrote."""
    title = "Real captions of ten and more words"
    claim = "Lower loss, with LLaVA's captions in the bank (section 4.2); no figure for captions that people wrote."
    demo = captions_of_clip_art.compare(study)
    if demo is None:
        return Section(title, claim, openclipart.note(study, None).strip(), f"{UNTESTED}: there is no clip art.")
    picks = {name: result_of(name, "with") for name in captions_of_clip_art.SYSTEMS}
    lines = []
    for name, pick in picks.items():
        line = [captions_of_clip_art.TITLES[name], f"{demo.results[name]['with'].tokens:.0f}"]
        line.append(interval_cell(score([demo], pick, "name_loss")))
        for other in ("baseline", "text_cut"):
            difference = interval_cell(score([demo], pick, "name_loss", minus=picks[other]), "+")
            line.append("" if other == name else difference)
        lines.append(line)
    header = ["", "tokens of the prompt", "loss per token", "minus the baseline", "minus text-only RAG"]
    ours = {
        other: score([demo], picks["tinyalign"], "name_loss", minus=picks[other])
        for other in ("baseline", "text_cut", "random")
    }
    return Section(
        title,
        claim,
        captions_of_clip_art.describe(demo) + "\n\n" + table(header, lines),
        f"{HOLDS if is_less(ours['baseline']) else FAILS}: a caption's loss per token is "
        f"{interval_cell(ours['baseline'], '+')} from the baseline's, {interval_cell(ours['random'], '+')} from that "
        f"with a random bank and {interval_cell(ours['text_cut'], '+')} from that of text-only RAG at equal tokens.",
    )


def cost(study: Study, folder: Path) -> Section:
    """Compare seconds and memory of memory tokens and text."""
    lengths, seconds = costs.prompt_lengths(), costs.seconds_of_answers()
    base = seconds["no memory"]
    lines = [
        [name, f"{lengths[name]}", f"{seconds[name] / base:.2f}", f"{costs.cache_megabytes(lengths[name]):.1f}"]
        for name in lengths
    ]
    found = costs.measure(study)
    demos = demos_of(study, costs.SEEDS)
    picks = {
        f"{title}, {kind}": lambda demo, system=system, kind=kind: found[demo.config.seed][system][kind]
        for kind in ("names alone", *costs.WRITTEN)
        for system, title in (("tinyalign", "TinyAlign"), ("text_cut", "text, cut"), ("text_rag", "text, whole"))
    }
    ours = seconds["TinyAlign"] / base
    longest = seconds[f"text, {costs.NEIGHBOURS[-1]} x {costs.WORDS[-1]} words"] / seconds["TinyAlign"]
    return Section(
        "Memory tokens cost the same, whatever the captions' length",
        "1.1 times the baseline's latency, text 21 times (Table 5).",
        "A prompt of 729 visual tokens and 60 of a question, a language model of Qwen2-0.5B's shape with random "
        "weights in bfloat16, 20 tokens of answer; the tower and the search are not in it (docs/bank_speed.md).\n\n"
        + table(["", "tokens of the prompt", "seconds, baseline = 1", "MB of keys and values"], lines)
        + "\n\nScores with captions that say more than the name (four neighbours, 32 memory tokens: eight each, which "
        "*text, cut* has as well). The name is their fourth word, or their last.\n\n" + scores_table(demos, picks),
        f"{HOLDS if ours < 1.1 else FAILS} for the 1.1: it is {ours:.2f}. "
        f"The 21 times is a matter of length: the longest text here costs {longest:.1f} times an answer with memory "
        "tokens. Captions that do not fit into the memory tokens are cut, and what stands at their end is lost.",
    )
