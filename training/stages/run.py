"""`tinyalign train`: a stage from YAML files."""

import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
from transformers import ProcessorMixin, TrainerCallback

from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.files import CONFIGS, read_config, read_settings
from ..arguments.stage import StageArguments
from ..data.collator import TrainingCollator
from ..data.memory_dropout import MemoryDropout
from ..data.preparation import prepare
from ..disk import full_disk_advice, nothing_left
from ..hub.run_facts import RUN_NAME
from ..hub.training_card import write_training_card
from ..models import neighbours_of_baseline
from .checkpoints import complete_checkpoints
from .trainers import TRAINERS, SupervisedTrainer


def train_from_files(paths: Sequence[str | os.PathLike], fields: list[str]):
    """Train as the YAML files at `paths` say (later ones win), with `fields` (`["--learning_rate", "5e-4"]`) over
    them, and save model, processor and card to `output_dir`. What neither says depends on the size of the data.

    Raises `ValueError` or `OSError` that says what is wrong with the files, the data, the model or the bank.
    """
    config = read_config(paths, fields)
    out = Path(config.output_dir).absolute()
    with (
        nothing_left(out, RUN_NAME),
        full_disk_advice(config.output_dir, "the checkpoints so far"),
        interrupt_naming_steps(config.output_dir) as started,
    ):
        answers = []
        if config.eval_benchmark is not None:
            from ..vqa_benchmarks.in_training import BenchmarkAnswers, benchmark_as_chats

            answers.append(BenchmarkAnswers(benchmark_as_chats(config)))
        run = prepare(config)
        if isinstance(run.rows, datasets.Dataset):
            config.fit_to_data(len(run.rows), given_settings(paths, fields))
        bank = run.bank
        if config.baseline == "static_rag":
            run.rows = with_static_captions(config, run.processor, run.rows, bank)
            if run.eval_rows is not None:
                run.eval_rows = with_static_captions(config, run.processor, run.eval_rows, bank)
            bank = None
        trainer = TRAINERS[config.stage](
            run.model,
            config,
            train_dataset=run.rows,
            eval_dataset=run.eval_rows,
            processing_class=run.processor,
            memory_bank=bank,
            vision_features=run.features,
            callbacks=answers,
        )
        for callback in answers:
            callback.trainer = trainer
        started.append(trainer)
        with stop_between_steps(trainer):
            trainer.train()
        trainer.save_model()
        if trainer.is_world_process_zero():
            command = shlex.join(["tinyalign", "train", *map(str, paths), *fields])
            write_training_card(config, run.model, trainer, bank, command)


def with_static_captions(
    config: StageArguments, processor: ProcessorMixin, rows: datasets.Dataset, bank: MemoryBank
) -> datasets.Dataset:
    """Static RAG (paper, Table 2, row 3): the captions of each row's neighbours are written into its question, once.
    The rest of the run is a baseline's, and so is inference.
    """
    captions = neighbours_of_baseline(config)
    writer = TrainingCollator(
        processor,
        bank=bank,
        max_length=config.max_length,
        dropout=MemoryDropout(0.0, captions),
        prompt_captions=captions,
    )
    rows = rows.map(lambda row: {"messages": writer.messages(row)}, desc="Writing captions")
    return rows.remove_columns(["memory_ids", "memory_scores", "source_ids"])


def given_settings(paths: Sequence[str | os.PathLike], fields: list[str]) -> set[str]:
    """Return the names of the settings that the user has chosen: not those of this package's own files."""
    own = [path for path in paths if Path(path).exists() and Path(path).resolve().parent != CONFIGS]
    typed = {field[2:].partition("=")[0] for field in fields if field.startswith("--")}
    return read_settings(own).keys() | typed


class StopAtStep(TrainerCallback):
    """Raise `KeyboardInterrupt` between two steps: Python loses one that comes while it frees an object."""

    asked = False

    def ask(self, signal_number, frame):
        """Note a first Ctrl-C; raise at once at a second one."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            raise KeyboardInterrupt

    on_substep_end = on_prediction_step = on_step_end


@contextmanager
def stop_between_steps(trainer: SupervisedTrainer) -> Iterator[None]:
    """Let Ctrl-C stop a run at the end of a batch; also in the workers that are forked in between."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    stop = StopAtStep()
    trainer.add_callback(stop)
    earlier = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextmanager
def interrupt_naming_steps(output_dir: str) -> Iterator[list[SupervisedTrainer]]:
    """Say in a `KeyboardInterrupt` at which step training stops, and from which the same command goes on; the trainer
    is added to the list when there is one.
    """
    trainers = []
    try:
        yield trainers
    except KeyboardInterrupt as interrupt:
        checkpoints = complete_checkpoints(output_dir)
        step = f"at step {trainers[0].state.global_step}" if trainers else "before the first step"
        go_on = f"goes on from {checkpoints[-1]}" if checkpoints else "starts anew, no checkpoint was saved yet"
        raise KeyboardInterrupt(f"stopped {step}; the same command {go_on}") from interrupt
