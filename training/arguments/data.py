"""Settings that choose the rows to train and to evaluate on, and how they are read."""

from dataclasses import dataclass

from .settings import setting


@dataclass
class DataArguments:
    """The data of a run, see docs/training.md for the forms that are read."""

    dataset: str | None = setting(
        None,
        'JSON, JSON lines, CSV, TSV, Parquet or WebDataset (.tar) files, a pattern of them ("shards/*.tar"), a '
        "folder, or a Hub dataset.",
    )
    dataset_config: str | None = setting(None, "Configuration of a Hub dataset.")
    dataset_revision: str | None = setting(None, "Revision of a Hub dataset.")
    dataset_split: str = setting("train", "Split of a folder or Hub dataset to train on.")
    streaming: bool = setting(
        False,
        "Read rows as they are needed, without a copy on disk. Needs max_steps. Rows are checked as they come, "
        "neighbours looked up in every step.",
    )
    image_folder: str | None = setting(
        None, "What paths of images in `dataset` are relative to, by default the folder of the file."
    )
    image_column: str | None = setting(None, "Column with images or their paths, by default image or images.")
    messages_column: str | None = setting(
        None, "Column with chats, by default messages, conversations, or prompt and completion."
    )
    answer_column: str | None = setting(
        None, "Without chats: column with labels or captions, of several the first, that answer `prompt`."
    )
    prompt: str | None = setting(None, "Without chats: the question about every image.")
    max_length: int | None = setting(
        None,
        "Tokens that a row may have, those of its images included, by default the language model's context. Longer"
        " rows are skipped, or cut (truncation).",
    )
    truncation: bool = setting(
        False,
        "Cut the tokens at the end of longer rows, but never one of an image, nor all that is to be learnt, "
        "instead of skipping these rows.",
    )
    strict: bool = setting(False, "Stop when a row is bad, instead of skipping it.")
    num_proc: int | None = setting(None, "Processes that read and check the rows.")
    cache_features: bool = setting(
        False,
        "Compute the visual features of the frozen tower once, and keep them under HF_HOME for other runs. Not "
        "with streaming.",
    )
    eval_dataset: str | None = setting(
        None, "Rows to evaluate on, as `dataset`; ten times, unless eval_strategy says otherwise."
    )
    eval_image_folder: str | None = setting(
        None, "What paths of images in `eval_dataset` are relative to, by default the folder of its file."
    )
    eval_split: str = setting("validation", "Split of a folder or Hub dataset to evaluate on.")
    eval_samples: int = setting(
        4,
        "Evaluation rows that the model answers at each evaluation: on the console, in samples.jsonl in "
        "output_dir, and as a table in W&B and trackio.",
    )
    eval_benchmark: str | None = setting(
        None,
        "gqa, pope, mme, ...: `eval_dataset` is the folder of this benchmark's Parquet files; its metric is logged at "
        "each evaluation, see docs/evaluation.md.",
    )
    eval_benchmark_images: int = setting(100, "Images of it that are asked about, drawn with a fixed seed.")
