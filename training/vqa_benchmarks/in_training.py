"""A benchmark that a model is evaluated on while it trains: its rows as chats, and its metric at each evaluation."""

from pathlib import Path

import datasets
import pandas as pd
from accelerate import PartialState
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..arguments.stage import StageArguments
from .benchmarks import BENCHMARKS
from .run import answer_questions
from .tasks import Questions

logger = logging.get_logger(__name__)
SCORED = [name for name in BENCHMARKS if name not in ("mmvet", "vqav2_testdev")]


def benchmark_as_chats(config: StageArguments) -> Questions:
    """Return the questions of `config.eval_benchmark`, and let `config.eval_dataset` be a file of them and their
    answers. ValueError if there is no such benchmark, or its data are not in the folder `config.eval_dataset`.
    """
    name = config.eval_benchmark
    if name not in SCORED or config.eval_dataset is None:
        raise ValueError(
            f"eval_benchmark is {name!r} and eval_dataset {config.eval_dataset!r}, expected one of "
            f"{', '.join(SCORED)}, and the folder of its Parquet files."
        )
    questions = Questions(name, Path(config.eval_dataset), limit=config.eval_benchmark_images)
    path = Path(config.output_dir, "evaluation", f"{name}.parquet")
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [_as_chat(questions, number) for number in questions.numbers]
        images, messages = config.image_column or "images", config.messages_column or "messages"
        columns = {images: [row[0] for row in rows], messages: [row[1] for row in rows], "id": questions.numbers}
        chats = datasets.Dataset.from_dict(columns).cast_column(images, datasets.List(datasets.Image()))
        chats.to_parquet(path)
    PartialState().wait_for_everyone()
    config.eval_dataset = str(path)
    return questions


def _as_chat(questions: Questions, number: int) -> tuple[list, list[dict]]:
    """Return the images of a question, and the chat with its answer."""
    row, (turn,) = questions.ask(number)
    images = [part["image"] for part in turn["content"] if part["type"] == "image"]
    content = [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]
    answer = [{"type": "text", "text": questions.target(row)}]
    return images, [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


class BenchmarkAnswers(TrainerCallback):
    """Answer a benchmark's questions at each evaluation as `tinyalign evaluate` does, and log its metrics, as
    `eval_pope_F1`, say. All processes share the work. Not a model that FSDP or DeepSpeed has divided.

    Attributes:
        trainer: to be set when there is one.
    """

    trainer: Trainer

    def __init__(self, questions: Questions):
        self.questions = questions

    def on_evaluate(self, args, state, control, metrics: dict[str, float] | None = None, **kwargs):
        if self.trainer.is_divided:
            logger.warning_once("No benchmark answers: the model is divided among processes (FSDP, DeepSpeed).")
            return
        trainer, questions = self.trainer, self.questions
        bank, batch_size = trainer.memory_bank, args.per_device_eval_batch_size
        model, processor = trainer.model, trainer.processing_class
        desc = f"{questions.benchmark.title}, step {state.global_step}"
        frame = pd.DataFrame(answer_questions(model, processor, questions, "on", bank, batch_size, desc))
        values = questions.benchmark.metric.of(frame.assign(category=frame["categories"].str[0]))
        found = {f"eval_{questions.name}_{name.replace(' ', '_')}": value for name, value in values.items()}
        metrics.update(found)  # for metric_for_best_model
        trainer.log(found)
