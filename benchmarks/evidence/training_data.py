"""Shares of the training concepts: baseline and TinyAlign, in equal epochs and in equal steps."""

import numpy as np
from study import Study, run_system, tag, training_on

from tinyalign_vlm.training.demo.state import Demo

# In equal epochs, each picture once, and in as many steps as all of them take.
SHARES = {"epoch": (0.2, 0.4, 0.6, 0.8, 1.0), "steps": (0.4, 1.0)}
SEEDS = (0,)  # 45 minutes each
SYSTEMS = {"baseline": False, "tinyalign": True}  # does it read memory?
STAGE1 = 0.25  # of the steps


def runs(study: Study) -> list[tuple[Demo, str, float, str]]:
    """Train and evaluate all, and return demo, plan, share and system of each."""
    found = []
    for seed in study.of(SEEDS):
        demo = study.prepared(seed)
        order = np.random.default_rng(seed).permutation(len(demo.pairs.train))
        for plan, shares in SHARES.items():
            for share in shares:
                rows = np.sort(order[: round(share * len(order))])
                count = len(rows if plan == "epoch" else order) // demo.config.batch_size
                first = round(STAGE1 * count)
                kept = f"{share:.0%}_{'epoch' if share == 1 else plan}_{tag(STAGE1)}"  # with all, the plans are one
                view = training_on(demo, rows, stage1_steps=first, stage2_steps=count - first)
                for system, memory in SYSTEMS.items():
                    name = f"{system}_{share:.0%}_{plan}"
                    demo.results[name] = run_system(view, f"{system}_{kept}", memory)
                    found.append((demo, plan, share, name))
    return found
