"""Where a gain comes from (paper, Table 2) and one stage in place of two: other trainings of the same systems."""

from dataclasses import replace

import numpy as np
from study import Study, run_system

from tinyalign_vlm.training.data.neighbours import find_neighbours, source_ids_of
from tinyalign_vlm.training.demo import systems
from tinyalign_vlm.training.demo.state import BANKS, TOP_K, Demo

SEEDS = (0, 1, 2)  # 8 minutes each


def with_more_data(demo: Demo) -> Demo:
    """Return a view that trains on the bank's drawings, too, as many steps more as there are more rows."""
    known, train = demo.pairs.known, demo.pairs.train
    features = demo.features["noto"][known]
    model, _ = systems.compose_demo(demo.weights, demo.config, memory_top_k=TOP_K)
    own = source_ids_of(demo.pairs.noto.select(known)["image"])
    found = find_neighbours(demo.banks["without"], model, features, 2 * TOP_K, own)
    share = 1 + len(known) / len(train)
    steps = {name: round(share * vars(demo.config)[name]) for name in ("stage1_steps", "stage2_steps")}
    return replace(
        demo,
        config=replace(demo.config, **steps),
        pairs=replace(demo.pairs, train=np.concatenate([train, known])),
        features=demo.features | {"train": np.concatenate([demo.features["train"], features])},
        found=demo.found | {"train": tuple(map(np.concatenate, zip(demo.found["train"], found, strict=True)))},
        results={},
    )


def in_one_stage(demo: Demo) -> Demo:
    """Return a view that trains everything in the second stage, as many steps as both have."""
    steps = demo.config.stage1_steps + demo.config.stage2_steps
    return replace(demo, config=replace(demo.config, stage1_steps=0, stage2_steps=steps), results={})


def compare(study: Study) -> None:
    """Add static RAG, more data, both and one stage to the results of the demos."""
    for seed in study.of(SEEDS):
        demo = study.demo(seed)
        text = systems.train_system(demo, "text_rag", in_text=True, memory_top_k=0)
        demo.results["static_rag"] = dict.fromkeys(
            BANKS, systems.evaluate_system(demo, "static_rag", *text, answer=False)
        )
        more, single = with_more_data(demo), in_one_stage(demo)
        demo.results["more_data"] = run_system(more, "more_data", memory=False)
        demo.results["both"] = run_system(more, "both", memory=True)
        demo.results["one_stage_baseline"] = run_system(single, "one_stage_baseline", memory=False)
        demo.results["one_stage"] = run_system(single, "one_stage", memory=True)
