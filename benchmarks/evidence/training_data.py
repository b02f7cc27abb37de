"""Shares of the training concepts: baseline and TinyAlign, in equal epochs and in equal steps."""

import numpy as np
from study import Study, run_system, training_on

from tinyalign_vlm.training.demo.state import Demo

# In equal epochs, each picture once, and in equal steps.
SHARES = {"epoch": (0.2, 0.4, 0.6, 0.8, 1.0), "steps": (0.4, 1.0)}
SEEDS = (0,)  # a third seed takes 35 minutes more
SYSTEMS = {"baseline": False, "tinyalign": True}  # does it read memory?
STAGE1 = 0.25  # of the steps


def runs(study: Study) -> list[tuple[Demo, str, float, str]]:
    """Train and evaluate all, and return demo, plan, share and system of each."""
    found = []
    for seed in SEEDS:
        demo = study.demo(seed)
        order = np.random.default_rng(seed).permutation(len(demo.pairs.train))
        steps = demo.config.stage1_steps + demo.config.stage2_steps
        for plan, shares in SHARES.items():
            for share in shares:
                rows = np.sort(order[: round(share * len(order))])
                count = round(len(rows) / demo.config.batch_size) if plan == "epoch" else steps
                first = round(STAGE1 * count)
                view = training_on(demo, rows, stage1_steps=first, stage2_steps=count - first)
                for system, memory in SYSTEMS.items():
                    name = f"{system}_{share:.0%}_{plan}"
                    if plan == "steps" and share == 1:
                        demo.results[name] = demo.results[system]
                    else:
                        demo.results[name] = run_system(view, name, memory)
                    found.append((demo, plan, share, name))
    return found
