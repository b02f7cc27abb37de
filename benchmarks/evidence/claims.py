"""The paper's claims: each runs a part of the study, and says what was found, and whether the claim holds."""

from pathlib import Path

import alignment
import costs
import mechanism
import numpy as np
import openclipart
import plots
import real_captions as captions_of_clip_art
import training_data
from pooling import is_less, is_more, result_of, score
from sections import FAILS, HOLDS, UNTESTED, Section, ahead_of, beats, cell, demos_of, scores_table, versus
from study import Study

from tinyalign_vlm.hub_cards.markdown import table
from tinyalign_vlm.training.demo.report import METRICS, interval_cell

# Systems that are shown with a bank that lacks what is asked for, too.
LACKING = ("tinyalign", "latents", "text_cut", "rule")
STATIC_RAG = "static RAG (captions in the training prompts)"
MORE_DATA = "more data (other drawings of training concepts, 1.7 times the steps)"


def systems(study: Study, folder: Path) -> Section:
    """Compare the demo's systems, all seeds together."""
    demos = demos_of(study, study.seeds)
    names = {
        "tinyalign": "TinyAlign: the captions as tokens",
        "baseline": "baseline",
        "wider_connector": "baseline, wider connector",
        "latents": "latents alone, the paper's way",
        "random_bank": "TinyAlign, random bank",
        "text_cut": "text-only RAG, cut at 32 tokens",
        "text_rag": "text-only RAG, whole",
        "copy": "copy the nearest name, no language model",
        "rule": "best rule from the names, no language model (chosen on these questions)",
        "true_name": "text-only RAG given the true name",
    }
    rows = {title: result_of(name, "with") for name, title in names.items()}
    lacking = {f"{names[name]}, a bank that lacks it": result_of(name, "without") for name in LACKING}
    ours, baseline = rows[names["tinyalign"]], rows[names["baseline"]]
    latents, text = rows[names["latents"]], rows[names["text_cut"]]
    rivals = {
        names[name]: rows[names[name]] for name in ("baseline", "latents", "text_cut", "text_rag", "copy", "rule")
    }
    return Section(
        "TinyAlign beside the baseline, text and rules",
        "Better than the baseline on eight benchmarks (Table 1); text-only RAG 74.7, TinyAlign 73.3 (Table 5).",
        "**TinyAlign here reads the captions of the neighbours as tokens; the paper's way, latents alone, is a row of "
        "its own.** The bank has what is asked for, but in the last rows.\n\n"
        + scores_table(demos, rows | lacking, ours),
        f"{HOLDS if beats(demos, ours, baseline) else FAILS}: TinyAlign beside the baseline is "
        f"{versus(demos, ours, baseline)}; beside text-only RAG cut at 32 tokens it is {versus(demos, ours, text)}; "
        f"beside the best rule {versus(demos, ours, rows[names['rule']])}. Latents alone beside the baseline are "
        f"{versus(demos, latents, baseline)}.",
        ahead_of(demos, ours, rivals),
    )


def loss(study: Study, folder: Path) -> Section:
    """Compare training losses."""
    curves = {seed: alignment.loss_curves(study.demo(seed)) for seed in study.seeds}
    plots.loss_curves(curves, folder / "loss.png")
    lines, less = [], {}
    for stage in range(2):
        for system in alignment.SYSTEMS:
            line = [f"stage {stage + 1}", plots.TITLES[system]]
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

    def lower(stage: int, system: str, equal: str = "steps") -> str:
        shares = less[stage, system, equal]
        return f"{-np.mean(shares):+.1%}, lower in {sum(np.array(shares) > 0)} of {len(shares)} seeds"

    holds = all(min(less[0, "tinyalign", equal]) > 0 for equal in ("steps", "seconds"))
    ahead = [
        f"{plots.TITLES[system]} in the loss of stage {stage + 1} at equal {equal}"
        for (stage, system, equal), shares in less.items()
        if system != "tinyalign" and min(np.subtract(shares, less[stage, "tinyalign", equal])) > 0  # in every seed
    ]
    return Section(
        "Lower loss in alignment pre-training",
        "16.8% lower with Phi-2 (section 5.2, Fig. 2a), at equal steps.",
        "Mean training loss of the last 30% of the steps, mean of the seeds, and the lowest and highest seed. At "
        "equal seconds a system has as long as the baseline took; the tower's features and the neighbours were made "
        "before, for all.\n\n" + table(header, lines) + "\n\n"
        f"![Training losses]({folder.name}/loss.png)",
        f"{HOLDS if holds else FAILS}: in stage 1, beside the baseline, {lower(0, 'tinyalign')} at equal steps and "
        f"{lower(0, 'tinyalign', 'seconds')} at equal seconds; latents alone {lower(0, 'latents')}, text in the "
        f"prompt {lower(0, 'text_rag')}, both at equal steps. In stage 2 {lower(1, 'tinyalign')}, text "
        f"{lower(1, 'text_rag')}: memory brings the name itself into the prompt.",
        "; ".join(ahead),
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
    base, _, whole = (means[name] for name in names)
    differences = {measure: alignment.difference(found, measure) for measure in ("gap", "spread")}
    nearer, tighter = (one.high < 0 for one in differences.values())
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
        f"the baseline's (spread {differences['spread']:+.3f}, gap {differences['gap']:+.3f}). With memory the own "
        f"name is the nearest for {whole[2]:.0%} of the pictures, in the baseline for {base[2]:.0%}: memory *is* "
        "words.",
    )


def data_efficiency(study: Study, folder: Path) -> Section:
    """Compare systems that are trained on shares of the data."""
    runs = training_data.runs(study)
    demos = list({demo.config.seed: demo for demo, *_ in runs}.values())
    names = {(plan, share, name.split("_")[0]): name for _, plan, share, name in runs}
    plots.data_efficiency(demos, names, folder / "data_efficiency.png")
    lines, verdicts, told, ahead = [], {}, [], []
    for (plan, share, system), name in names.items():
        pick = result_of(name, "with")
        lines.append([plan, f"{share:.0%}", plots.TITLES[system], *(cell(demos, pick, metric) for metric in METRICS)])
    for plan in training_data.SHARES:
        ours, whole = (
            result_of(names[plan, share, system], "with") for share, system in ((0.4, "tinyalign"), (1.0, "baseline"))
        )
        verdicts[plan] = beats(demos, ours, whole)
        equal = f"equal {plan}{'s' if plan == 'epoch' else ''}"
        told.append(f"{equal}: {versus(demos, ours, whole)}")
        ahead.append(ahead_of(demos, ours, {f"the baseline with all of the data ({equal})": whole}))
    return Section(
        "The baseline's level with 40% of the fine-tuning data",
        "TinyAlign with 40% of the instruction-tuning data reaches the baseline with 100% (Fig. 3).",
        "Shares of the training concepts, in both stages; the bank stays whole, and has the concepts that are asked "
        "for. *epoch*: each picture once, so fewer steps with less data; *steps*: always as many as all of the data "
        "take, at 40% and 100% alone, with pictures met again.\n\n"
        + table(["plan", "data", "system", *METRICS.values()], lines)
        + f"\n\n![Scores by share of the data]({folder.name}/data_efficiency.png)",
        f"{HOLDS if all(verdicts.values()) else FAILS}: 40% with TinyAlign against 100% with the baseline, "
        f"{'; '.join(told)}. Seeds: {len(demos)}. The bank brings "
        "what no share of the training data has, the names of the concepts, which no baseline can know.",
        "; ".join(filter(None, ahead)),
    )


def causes(study: Study, folder: Path) -> Section:
    """Compare what else could have brought the gain."""
    mechanism.compare(study)
    demos = demos_of(study, mechanism.SEEDS)
    rows = {
        "TinyAlign": result_of("tinyalign", "with"),
        "baseline": result_of("baseline", "with"),
        "wider connector": result_of("wider_connector", "with"),
        STATIC_RAG: result_of("static_rag", "with"),
        MORE_DATA: result_of("more_data", "with"),
        "TinyAlign and more data": result_of("both", "with"),
    }
    ours, data, both = rows["TinyAlign"], rows[MORE_DATA], rows["TinyAlign and more data"]
    pairs = {f"TinyAlign beside {name}": (ours, rows[name]) for name in ("baseline", "wider connector", STATIC_RAG)}
    pairs |= {"both beside more data": (both, data), "both beside TinyAlign": (both, ours)}
    rivals = {name: pick for name, pick in rows.items() if not name.startswith("TinyAlign")}
    told = "; ".join(f"{name}: {versus(demos, *pair)}" for name, pair in pairs.items())
    return Section(
        "The gain comes from retrieval, not from parameters or data",
        "Baseline 70.5; wider connector 71.2, static RAG 72.8, TinyAlign 73.3; baseline with more data 73.7, "
        "TinyAlign with it 74.1 (Table 2).",
        scores_table(demos, rows, ours),
        f"{HOLDS if all(beats(demos, *pair) for pair in pairs.values()) else FAILS}: {told}. "
        "Training on the bank's own rows is in the section What a sceptic asks.",
        ahead_of(demos, ours, rivals),
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
    two, one, _, plain = rows.values()
    return Section(
        "Two stages with memory are better than one without",
        "TinyAlign 73.3; a baseline that is trained end to end, 70.2 (section 5.3).",
        "As many steps in all; in one stage the language model's adapters are trained in all of them.\n\n"
        + scores_table(demos, rows, two),
        f"{HOLDS if beats(demos, two, plain) else FAILS}: TinyAlign in two stages beside a baseline in one is "
        f"{versus(demos, two, plain)}. TinyAlign in two stages beside itself in one is {versus(demos, two, one)}. "
        f"Seeds: {len(demos)}.",
        ahead_of(demos, two, {title: pick for title, pick in rows.items() if pick is not two}),
    )


def real_captions(study: Study, folder: Path) -> Section:
    """Compare losses of captions that people wrote."""
    title = "Real captions of ten and more words"
    claim = "Lower loss, with LLaVA's captions in the bank (section 5.2); no figure for captions that people wrote."
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
        f"{interval_cell(ours['baseline'], '+')} beside the baseline's, {interval_cell(ours['random'], '+')} beside "
        f"that with a random bank and {interval_cell(ours['text_cut'], '+')} beside that of text-only RAG, cut at as "
        "many tokens.",
        "; ".join(f"{captions_of_clip_art.TITLES[name]} in a caption's loss" for name in ours if is_more(ours[name])),
    )


def cost(study: Study, folder: Path) -> Section:
    """Compare seconds and memory of memory tokens and text."""
    lengths, seconds = costs.prompt_lengths(), costs.seconds_of_answers(study)
    base = seconds["no memory"]
    lines = [
        [name, f"{lengths[name]}", f"{seconds[name]:.2f}", f"{seconds[name] / base:.2f}"]
        + [f"{costs.cache_megabytes(lengths[name]):.1f}"]
        for name in lengths
    ]
    found = costs.measure(study)
    demos = demos_of(study, costs.SEEDS)
    picks = {
        f"{title}, {kind}": lambda demo, system=system, kind=kind: found[demo.config.seed][system][kind]
        for kind in ("names alone", *costs.WRITTEN)
        for system, title in costs.TITLES.items()
    }
    ours = seconds["TinyAlign"] / base
    longest = seconds[f"text, {costs.NEIGHBOURS[-1]} x {costs.WORDS[-1]} words"] / seconds["TinyAlign"]
    told, ahead = [], []
    for kind in ("names alone", *costs.WRITTEN):
        memory, cut, whole = (picks[f"{title}, {kind}"] for title in costs.TITLES.values())
        told.append(f"{kind}, TinyAlign beside text cut at as many tokens: {versus(demos, memory, cut)}")
        ahead.append(ahead_of(demos, memory, {f"text cut ({kind})": cut, f"text whole ({kind})": whole}))
    return Section(
        "Memory tokens cost the same, whatever the captions' length",
        "0.18 s for the baseline, 0.21 s for TinyAlign (1.1 times, as it says), text 21 times; 2 GB of memory and 40; "
        "70.5, 73.3 and 74.7 (Table 5).",
        "A prompt of 729 visual tokens and 60 of a question, a language model of Qwen2-0.5B's shape with random "
        "weights in bfloat16, 20 tokens of answer, the least of several times; the tower and the search are not in it "
        "(docs/bank_speed.md). Keys and values are reckoned.\n\n"
        + table(["", "tokens of the prompt", "seconds", "baseline = 1", "MB of keys and values"], lines)
        + "\n\nScores with captions that say more than the name (four neighbours, 32 memory tokens: eight each, which "
        "*text, cut* has as well, and costs as little). The name is their fourth word, or their last.\n\n"
        + scores_table(demos, picks),
        f"{HOLDS if ours < 1.1 else FAILS} for the 1.1: it is about {ours:.2f}, without the tower and the search. "
        f"The 21 times is a matter of length: the longest text here costs {longest:.1f} times an answer with memory "
        f"tokens. Scores by caption: {'; '.join(told)}. Captions that do not fit into the memory tokens are cut, and "
        "what stands at their end is lost.",
        "; ".join(filter(None, ahead)),
    )
