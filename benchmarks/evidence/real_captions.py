"""Real captions: do pictures with captions that people wrote help to write the caption of another picture?"""

import json
from collections.abc import Sequence
from dataclasses import asdict

import datasets
import numpy as np
from openclipart import FEWEST_WORDS, ClipArt, art_tag, clip_art
from study import Study, tag
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import TinyAlignConfig
from tinyalign_vlm.modeling_tinyalign.bank_format import CONFIG_NAME
from tinyalign_vlm.modeling_tinyalign.connectors import CaptionTokenizer
from tinyalign_vlm.training.data.chats import add_captions, encode_chat, to_messages
from tinyalign_vlm.training.data.neighbours import find_neighbours
from tinyalign_vlm.training.demo import run, systems
from tinyalign_vlm.training.demo.pairs import Pairs, stems
from tinyalign_vlm.training.demo.state import TOP_K, Clock, Demo, DemoConfig, Result, write_json
from tinyalign_vlm.training.evaluation.choices import score_answers

SEED = 0  # of the split, the connectors and the order of data; another one takes 10 minutes more
NUM_ASKED = 200  # pictures that are asked about; all others with long captions are trained on
PROMPT = "Describe the picture."
SEARCHED = 64  # neighbours that are looked at, to have enough without near copies
# Of the keys, chosen on the training pictures by the words that their captions share with their neighbours': 64 and 32
# dimensions 0.40 of them, 128 0.39, all 226 0.18, and pictures drawn at random 0.20.
KEYS = {"key_grid": 3, "whiten_dim": 64}
# By name: the system that is trained, and the bank that it reads.
SYSTEMS = {
    "baseline": ("baseline", None),
    "tinyalign": ("tinyalign", "with"),
    "trained_on": ("tinyalign", "without"),
    "random": ("tinyalign", "random"),
    "off": ("tinyalign", "off"),
    "text_cut": ("text_cut", None),
}
TITLES = {
    "baseline": "baseline",
    "tinyalign": "**TinyAlign**",
    "trained_on": "TinyAlign, bank of the training pictures alone",
    "random": "TinyAlign, random bank",
    "off": "TinyAlign, memory off",
    "text_cut": "text-only RAG at equal tokens",
}
DESCRIPTION = """"{prompt}" is asked about {asked} pictures of the Open Clip Art Library (Debian's openclipart-png and
openclipart-svg) that were not trained on. The answer is a caption of {fewest} words or more, {words:.0f} on average:
title, description and keywords as people wrote them. All systems were trained to write them, on the {trained} other
pictures with such captions, in the demo's steps. The bank has those and the other pictures that are asked about, never
the picture itself nor one of the same title. Memory and the text of text-only RAG are {tokens} tokens of the captions
of {top_k} neighbours, in training, too. Before they are cut, these captions have {share:.0%} of the words of the right
one, those of a random bank {random:.0%}. Brackets: bootstrap over pictures."""


def split(groups: Sequence[str], asked: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to train on and at most `asked` rows to ask about; near copies are on the same side."""
    names, group = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(SEED).permutation(len(names))
    sizes = np.bincount(group)[order]
    is_asked = np.isin(group, order[np.cumsum(sizes) <= asked])
    return np.flatnonzero(~is_asked), np.flatnonzero(is_asked)


def without_near_copies(
    found: tuple[np.ndarray, np.ndarray], own: np.ndarray, groups: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `top_k` best neighbours of other groups, -inf and -1 where there are fewer.

    Args:
        found: scores and ids, `(queries, k)`, best first.
        own: `(queries,)`, the group of each query.
        groups: of the bank's rows.
    """
    scores, ids = found
    is_copy = (groups[ids] == own[:, None]) | (ids < 0)
    order = np.argsort(is_copy, axis=1, kind="stable")[:, :top_k]
    copies = np.take_along_axis(is_copy, order, 1)
    scores, ids = (np.take_along_axis(part, order, 1) for part in (scores, ids))
    return np.where(copies, -np.inf, scores).astype(np.float32), np.where(copies, -1, ids)


def prepared(study: Study, art: ClipArt) -> Demo:
    """Return a demo whose drawings are the clip art with long captions, with its features, banks and neighbours."""
    rows = art.rows.select(art.long)
    features, captions, groups = art.features[art.long], list(rows["caption"]), np.array(rows["group"])
    train, asked = split(groups, NUM_ASKED)
    rows = rows.remove_columns(["label", "caption"]).add_column("label", captions)
    group = np.unique(groups, return_inverse=True)[1]
    pairs = Pairs(rows, rows, [[] for _ in captions], group, train, train, np.array([], int), asked)
    kept = tag(SEED, PROMPT, KEYS, SEARCHED, art_tag(study))
    config, out = DemoConfig(queries=len(asked), seed=SEED), study.out / f"real_captions_{kept}"
    out.mkdir(parents=True, exist_ok=True)
    run.check_settings(out / "config.json", config)
    demo = Demo(out, False, config, pairs, study.weights, Clock(out / "clock.json"))
    demo.features = {"all": features, "train": features[train], "queries": features[asked]}
    find_all(demo, *systems.compose_demo(demo.weights, config, memory_top_k=TOP_K))
    return demo


def find_all(demo: Demo, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Make the bank of the training pictures and the one of all, and look up neighbours that are no near copies."""
    pairs, features = demo.pairs, demo.features
    demo.concepts = {"without": pairs.train, "with": np.concatenate([pairs.train, pairs.heldout])}
    begun = None
    for name, new in (("without", pairs.train), ("with", pairs.heldout)):
        path = demo.out / f"bank_{name}"
        if not (path / CONFIG_NAME).exists():
            bank = run.make_bank(model, processor, pairs.noto, features["all"], new, begun, **KEYS)
            bank.save_pretrained(path)
        demo.banks[name] = begun = MemoryBank.from_pretrained(path)
    demo.banks["random"] = demo.banks["off"] = begun
    groups = {name: pairs.group[rows] for name, rows in demo.concepts.items()}
    own = {"train": pairs.group[pairs.train], "queries": pairs.group[pairs.heldout]}
    for name, asked, bank in (
        ("train", "train", "without"),
        ("without", "queries", "without"),
        ("with", "queries", "with"),
    ):
        found = find_neighbours(demo.banks[bank], model, features[asked], SEARCHED)
        demo.found[name] = without_near_copies(found, own[asked], groups[bank], 2 * TOP_K)
    scores, ids = found
    others = scores, next_of_a_cycle(len(begun))[ids]
    demo.found["random"] = without_near_copies(others, own["queries"], groups["with"], 2 * TOP_K)
    scores, ids = demo.found["with"]
    demo.found["off"] = np.full_like(scores, -np.inf), np.full_like(ids, -1)


def next_of_a_cycle(count: int) -> np.ndarray:
    """Return another row for each row, in one cycle through all: every key leads to another row's caption."""
    order, following = np.random.default_rng(SEED).permutation(count), np.empty(count, int)
    following[order] = np.roll(order, 1)
    return following


def cut(tokenizer: PreTrainedTokenizerBase, captions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the captions of each picture as one text of as many tokens as the memory has places, packed alike."""
    packer = CaptionTokenizer(tokenizer, TinyAlignConfig().memory_tokens)
    packed = [packer.pack([packer.tokenize(caption) for caption in row]) for row in captions]
    return [[packer.tokenizer.decode(tokens).strip()] for tokens in packed]


def chats(demo: Demo, captions: Sequence[Sequence[str]] | None = None) -> datasets.Dataset:
    """Return the question and the caption of each training picture, with its neighbours' captions where given."""
    messages = [to_messages(PROMPT, label) for label in demo.labels(demo.pairs.train)]
    if captions is not None:
        messages = [add_captions(chat, row) for chat, row in zip(messages, captions, strict=True)]
    return datasets.Dataset.from_dict({"messages": messages})


def trained(demo: Demo, system: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Train a system, all in as many steps and on the same rows."""
    if system == "tinyalign":
        return systems.train_system(demo, system, "without", rows=chats(demo))
    captions = None
    if system == "text_cut":
        _, processor = systems.compose_demo(demo.weights, demo.config, memory_top_k=0)
        captions = cut(processor.tokenizer, demo.training_captions())
    return systems.train_system(demo, system, rows=chats(demo, captions), memory_top_k=0)


def evaluate(demo: Demo, name: str, model: PreTrainedModel, processor: ProcessorMixin, bank: str | None) -> Result:
    """Return the losses of the captions and the tokens of a prompt, kept in a file of this name."""
    path = demo.out / "evaluation" / f"{name}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        losses, tokens = np.array(kept["name_losses"]), np.array(kept["name_tokens"])
        return Result(name_losses=losses, name_tokens=tokens, tokens=kept["tokens"])
    captions = cut(processor.tokenizer, demo.captions("with")) if name == "text_cut" else None
    labels = demo.labels(demo.queried)
    rows = systems.questions(demo, PROMPT, range(len(labels)), bank, captions)
    attached = None
    if bank is not None:
        attached = demo.banks[bank]
        model.attach_memory_bank(attached, tokenizer=processor.tokenizer)
    answers = [[label] for label in labels]
    scores = score_answers(
        model, processor, rows, answers, attached, demo.features["queries"], systems.BATCH_SIZE, desc=name
    )
    lengths = [len(encode_chat(processor, row, add_generation_prompt=True)[0]) for row in rows["messages"]]
    result = Result(
        name_losses=scores.losses[:, 0], name_tokens=scores.num_tokens[:, 0], tokens=float(np.mean(lengths))
    )
    write_json(path, asdict(result))
    return result


def share_of_words(demo: Demo, bank: str) -> float:
    """Return the mean share of a caption's words that its neighbours' captions have."""
    shares = []
    for label, near in zip(demo.labels(demo.queried), demo.captions(bank), strict=True):
        words = stems(label)
        shares.append(len(words & stems(" ".join(near))) / len(words))
    return float(np.mean(shares))


def describe(demo: Demo) -> str:
    """Return how it was done: the data, and what the bank has."""
    labels = demo.labels(demo.queried)
    return DESCRIPTION.format(
        prompt=PROMPT,
        asked=len(labels),
        fewest=FEWEST_WORDS,
        words=np.mean([len(label.split()) for label in labels]),
        trained=len(demo.pairs.train),
        tokens=TinyAlignConfig().memory_tokens,
        top_k=TOP_K,
        share=share_of_words(demo, "with"),
        random=share_of_words(demo, "random"),
    )


def compare(study: Study) -> Demo | None:
    """Train and evaluate all systems, whose results are in the demo that is returned; None without clip art."""
    art = clip_art(study)
    if art is None:
        return None
    demo = prepared(study, art)
    for name, (system, bank) in SYSTEMS.items():
        demo.results[name] = {"with": evaluate(demo, name, *trained(demo, system), bank)}
        demo.clock("evaluated")
    return demo
