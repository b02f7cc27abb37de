"""Sample answers: what the model says of a few rows, and what it retrieved, each time it is evaluated."""

import importlib
import json
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..data.chats import count_images
from ..disk import save_file
from ..evaluation.answers import greedy_answers, reference_of

logger = logging.get_logger(__name__)
SAMPLES_NAME = "samples.jsonl"
SAMPLE_TOKENS = 64
TRACKERS = ("wandb", "trackio")  # both have `log` and `Table`


class SampleAnswers(TrainerCallback):
    """Answer the first `eval_samples` evaluation rows at each evaluation, greedily. Answers, references and neighbours
    are printed, added to `samples.jsonl` in `output_dir` and, for W&B and trackio, logged as the table `samples`. A
    model that FSDP or DeepSpeed has divided is not asked: one process alone cannot answer with it.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_evaluate(self, args, state, control, **kwargs):
        if self.trainer.is_divided:
            logger.warning_once("No sample answers: the model is divided among processes (FSDP, DeepSpeed).")
        elif state.is_world_process_zero:
            samples = [{"step": state.global_step, **sample} for sample in self.answer()]
            write_samples(Path(args.output_dir, SAMPLES_NAME), samples)
            tqdm.write("\n".join(map(as_text, samples)))
            frame = pd.DataFrame([{**sample, "neighbours": _listed(sample["neighbours"])} for sample in samples])
            for name in set(TRACKERS) & set(args.report_to):
                tracker = importlib.import_module(name)
                tracker.log({"samples": tracker.Table(dataframe=frame), "train/global_step": state.global_step})

    @torch.no_grad()
    def answer(self) -> list[dict]:
        """One a row: its number, prompt, answer, reference, and neighbours."""
        trainer = self.trainer
        collator, model = trainer.data_collator.for_evaluation(), trainer.model
        samples, sets = [], trainer.eval_dataset
        rows = next(iter(sets.values())) if isinstance(sets, dict) else sets  # of several, the first
        for number, row in enumerate(islice(rows, trainer.args.eval_samples)):
            inputs = send_to_device(collator([row]), model.device)
            chat = collator.messages(row)
            (answer,), ids, scores = greedy_answers(model, collator.processor, [chat[:-1]], inputs, SAMPLE_TOKENS)
            neighbours = []
            if ids is not None and count_images(chat):
                scores = [None] * ids.numel() if scores is None else scores.flatten().tolist()
                found = [row for image in collator.bank.rows(ids.cpu()) for row in image]
                neighbours = [
                    {"caption": row["caption"], "score": score}
                    for row, score in zip(found, scores, strict=True)
                    if row is not None
                ]
            samples.append(
                {
                    "row": number,
                    "prompt": "\n".join(map(_turn, chat[:-1])),
                    "answer": answer,
                    "reference": reference_of(chat),
                    "neighbours": neighbours,
                }
            )
        return samples


def write_samples(path: Path, samples: list[dict]):
    """Add them to those of earlier steps; what a run that was interrupted wrote of later ones is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if json.loads(line)["step"] < samples[0]["step"]]
    lines += [json.dumps(sample, ensure_ascii=False) for sample in samples]
    save_file(path, "".join(f"{line}\n" for line in lines).encode())


def as_text(sample: dict) -> str:
    """Return a sample as the console shows it."""
    lines = [
        f"[step {sample['step']}, row {sample['row']}] {sample['prompt']}",
        f"  answer:     {sample['answer']}",
        f"  reference:  {sample['reference']}",
    ]
    return "\n".join([*lines, *([f"  neighbours: {_listed(sample['neighbours'])}"] if sample["neighbours"] else [])])


def _listed(neighbours: list[dict]) -> str:
    return "; ".join(row["caption"] + ("" if row["score"] is None else f" ({row['score']:.3f})") for row in neighbours)


def _turn(message: dict) -> str:
    content = message["content"]
    if isinstance(content, list):
        content = "".join("<image>" if part["type"] == "image" else part["text"] for part in content)
    return f"{message['role']}: {content}"
