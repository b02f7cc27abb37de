"""Sections that the paper has not: what people do today instead, teaching with one picture, and a negative control."""

from pathlib import Path

import negative_control
import numpy as np
import pictures_in_prompt
import sceptic
import teaching
from pooling import is_less, is_more, result_of, score
from sections import FAILS, HOLDS, UNTESTED, Section, better, demos_of, said, scores_table
from study import Study

from tinyalign_vlm.hub_cards.markdown import table
from tinyalign_vlm.training.demo.report import interval_cell
from tinyalign_vlm.training.demo.state import Result
from tinyalign_vlm.training.evaluation.bootstrap import Interval, bootstrap_interval

TITLES = {
    "tinyalign": "**TinyAlign**",
    "text_cut": "text-only RAG at equal tokens, trained as long",
    "chosen": "untouched baseline chooses among the retrieved names, or none",
    "named": "untouched baseline chooses among the retrieved names, always one",
    "lora": "fine-tuned on the bank's rows, LoRA",
    "lora_negatives": "fine-tuned, LoRA, with negatives",
    "full": "fine-tuned on the bank's rows, all weights",
    "full_negatives": "fine-tuned, all weights, with negatives",
    "copy": "copy the nearest name",
    "mixed": "kNN over keys, mixed with the baseline by probability",
    "baseline": "baseline",
}


def alternatives(study: Study, folder: Path) -> Section:
    """Compare with what people do today instead."""
    found, triggered, seconds = sceptic.compare(study)
    demos = demos_of(study, sceptic.SEEDS)

    def pick(system: str, bank: str):
        return lambda demo: found[demo.config.seed][system].get(bank, Result())

    lines, ahead = [], {}
    for system, title in TITLES.items():
        if system in sceptic.FINE_TUNED:
            seen = sceptic.num_taught(demos[0], system) / len(demos[0].pairs.heldout)
            title += f", {seen:.0%} of them"
        line = [title]
        for bank_name in ("with", "without"):
            line += [
                interval_cell(score(demos, pick(system, bank_name), metric))
                for metric in ("exact_match", "name_loss", "choice")
            ]
        shares = [triggered[seed].get(system) for seed in triggered]
        line.append("-" if None in shares else f"{np.mean(shares):.2f}")
        line.append(interval_cell(others_loss(found, system)))
        line += seconds[system]
        lines.append(line)
        if system not in ("tinyalign", "baseline"):
            ahead[title] = better(demos, pick(system, "with"), pick("tinyalign", "with"))
    header = [
        "",
        "knows it: exact match",
        "name loss",
        "keywords",
        "does not know it: exact match",
        "name loss",
        "keywords",
    ]
    header += ["taught names said of other pictures", "name loss of other concepts"]
    header += ["tokens", "s to teach 100 concepts", "s to forget one"]
    beaten = {title: names for title, names in ahead.items() if names}
    return Section(
        "What a sceptic asks",
        "None: the paper compares with text-only RAG alone.",
        "The same data and questions. Fine-tuning starts from the trained baseline, and its steps are an epoch of the "
        "bank's new rows, of which each system has seen the share in its title; negatives are training concepts, one "
        "for each taught one. Other concepts: 100 that no bank has and nothing was trained on; on them the "
        "probabilities that two of the rules use were fitted.\n\n" + table(header, lines),
        "controls that are ahead of TinyAlign where the bank knows it: "
        + ("; ".join(f"{title} in {said(names)}" for title, names in beaten.items()) or "none")
        + ".",
    )


def pictures(study: Study, folder: Path) -> Section:
    """Compare with the neighbours' pictures in the prompt."""
    pictures_in_prompt.compare(study)
    demos = demos_of(study, pictures_in_prompt.SEEDS)
    names = {"tinyalign": "TinyAlign", "text_cut": "text-only RAG at equal tokens"}
    names[pictures_in_prompt.NAME] = "pictures and captions in the prompt"
    rows = {title: result_of(name, "with") for name, title in names.items()}
    rows["baseline"] = result_of("baseline", "with")
    rows |= {f"{title}, a bank that lacks the concepts": result_of(name, "without") for name, title in names.items()}
    ours, theirs = rows["TinyAlign"], rows["pictures and captions in the prompt"]
    more, less = better(demos, ours, theirs), better(demos, theirs, ours)
    tokens = {name: demos[0].results[name]["with"].tokens for name in names}
    return Section(
        "Neighbours as pictures in the prompt",
        "None.",
        "Each neighbour's visual tokens and its caption stand before the question, in training and after; as many "
        f"steps. A prompt has {tokens[pictures_in_prompt.NAME]:.0f} tokens so, {tokens['tinyalign']:.0f} with memory "
        f"tokens, {tokens['text_cut']:.0f} with text alone.\n\n" + scores_table(demos, rows, ours),
        f"Beside pictures in the prompt TinyAlign is better in {said(more)}, worse in {said(less)}.",
    )


def others_loss(found: dict, system: str) -> Interval | None:
    """Return the loss of the names of other concepts, of all seeds."""
    results = [seed[system].get("others", Result()) for seed in found.values()]
    if any(result.name_losses is None for result in results):
        return None
    return bootstrap_interval(
        np.concatenate([result.name_losses for result in results]),
        weights=np.concatenate([result.name_tokens for result in results]),
    )


def recognised(kinds: dict[str, np.ndarray]) -> float:
    """Return the mean of the shares of right answers to "Is this X?" where it is and where it is not."""
    return float((kinds["positive"].mean() + kinds["negative"].mean()) / 2)


def one_picture(study: Study, folder: Path) -> Section:
    """Compare systems that were taught with one picture."""
    found, seconds = teaching.teach(study, study.lesson)
    counts = sorted((kind for kind in found["ours"] if kind.isdigit()), key=int)
    titles = {
        "ours": "**TinyAlign**",
        "lora": "LoRA on the same pictures",
        "copy": "copy the nearest",
        "baseline": "baseline",
    }
    lines = []
    for system, title in titles.items():
        kinds = found[system]
        line = [title, *(f"{kinds[kind].mean():.3f}" for kind in ("positive", "negative")), f"{recognised(kinds):.3f}"]
        line += [f"{kinds[count].mean():.2f}" for count in counts]
        line += [f"{number:.2f}" for number in teaching.none_of_these(kinds)]
        lines.append(line)
    header = ["", "is this X: yes", "no, of its look-alike", "mean", *(f"which of {count}" for count in counts)]
    header += ["none of these: AUROC", "found at 5% false alarms"]
    is_taught = seconds["teach"] < 1 and seconds["taught"] > 0 and seconds["changed"] == 0
    shares = {"*is this X*, mean": {name: recognised(kinds) for name, kinds in found.items()}}
    if counts:
        shares[f"which of {counts[-1]}"] = {name: kinds[counts[-1]].mean() for name, kinds in found.items()}
    verdict = f"{HOLDS if is_taught else FAILS} for teaching in under a second and forgetting to the last logit"
    for title, share in shares.items():
        behind = [titles[name] for name in titles if share[name] > share["ours"]]
        told = ", ".join(f"{titles[name].strip('*')} {value:.2f}" for name, value in share.items())
        verdict += f"; {title} ({'behind ' + said(behind) if behind else 'ahead of all'}): {told}"
    verdict += ". A share of 0.5 of *is this X* is chance."
    return Section(
        "Teach it with one picture",
        "None. Published with one picture, on other data: RAP-Phi3-V 3.8B 0.922 / 0.988 / 0.955.",
        "Held-out concepts under made-up names, one drawing each in the bank, asked with another style's drawing. The "
        "questions are in lesson.json; `--lesson FOLDER` takes another one.\n\n"
        + table(header, lines)
        + f"\n\nTeaching one picture took {seconds['teach']:.2f} s, forgetting it {seconds['forget']:.2f} s; LoRA "
        f"{seconds['lora']:.1f} s a concept. Teaching moves a logit of the answer about the concept by "
        f"{seconds['taught']:.1f}; after forgetting, the largest difference from before is {seconds['changed']:g}. "
        "Copy looks among the taught pictures alone.",
        verdict,
    )


def easy_vqa(study: Study, folder: Path) -> Section:
    """Compare answers about pictures that say all."""
    title = "Memory costs nothing where the picture says all"
    claim = f"None. Published for easy-vqa: {negative_control.PUBLISHED_BLIND:.1%} from the questions alone."
    if not negative_control.is_installed():
        install = negative_control.INSTALL
        return Section(
            title,
            claim,
            f"The package with its pictures is missing: `{install}`, then run the section again.",
            f"{UNTESTED}: easy-vqa is not installed (`{install}`).",
        )
    found = negative_control.compare(study)
    titles = {
        "blind": "blind: the most frequent answer to the question",
        "baseline": "baseline",
        "own": "**TinyAlign**, a bank of other training pictures",
        "foreign": "TinyAlign, a bank that knows nothing of it (emoji)",
        "off": 'TinyAlign, memory="off"',
    }
    lines = []
    for system, text in titles.items():
        scores = [interval_cell(found.score(system, kind)) for kind in (*negative_control.KINDS, None)]
        more = "" if system == "baseline" else interval_cell(found.score(system, minus="baseline"), "+")
        lines.append([text, *scores, more])
    cost = {bank: found.score(bank, minus="baseline") for bank in negative_control.BANKS}
    sees = is_more(found.score("baseline", minus="blind"))
    verdict = HOLDS if sees else f"{UNTESTED} for what a baseline that sees would lose"
    if is_less(cost["own"]) or is_less(cost["foreign"]):
        verdict = FAILS
    config = negative_control.CONFIG
    return Section(
        title,
        claim,
        f"A shape in a colour, 64 x 64 pixels, 13 answers: {len(found.kinds)} test questions about "
        f"{len(set(found.pictures))} pictures, right where the greedy answer is. Both systems are trained on "
        f"{negative_control.NUM_TRAIN} training pictures, {config.stage1_steps} + {config.stage2_steps} steps of "
        f"{config.batch_size} chats; the bank has {negative_control.NUM_BANK} others, captioned 'a red circle'. "
        f"The nearest of them shows the same for {found.recall:.0%}. Intervals are of draws of pictures.\n\n"
        + table(["", *negative_control.KINDS, "all", "all, minus the baseline"], lines),
        f"{verdict}: beside the baseline TinyAlign's accuracy is {interval_cell(cost['own'], '+')} "
        f"with its bank, {interval_cell(cost['foreign'], '+')} with one that knows nothing of it, and "
        f"{interval_cell(cost['off'], '+')} without memory. Beside blind answers it is "
        f"{interval_cell(found.score('own', minus='blind'), '+')}, the baseline's "
        f"{interval_cell(found.score('baseline', minus='blind'), '+')}.",
    )
