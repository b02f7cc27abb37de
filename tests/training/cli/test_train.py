"""`tinyalign train` in a process of its own, from YAML to a model that loads."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors import safe_open

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.stages import run
from tinyalign_vlm.training.stages.trainers import AlignmentTrainer

SMALL = {"memory_tokens": 3, "latent_dim": 5, "memory_top_k": 2, "memory_input": "latents", "memory_scores": False}


def tinyalign(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = "from tinyalign_cli.main import main; main()"
    environment = {**os.environ, "PATH": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=1200,
    )


def test_both_stages_from_yaml(files, images, monkeypatch):
    first = tinyalign(files, "train", "stage1.yaml", "--learning_rate", "5e-3", "--save_steps", "2")
    assert first.returncode == 0, first.stderr
    # of the neighbours, and no warning; transformers 5.17 tells of the model's end-of-text token
    lines = [line for line in first.stderr.splitlines() if "differ from the model config" not in line]
    assert len(lines) == 1 and re.fullmatch(r".*: 12 images, .*; mean similarity .*", lines[0])
    monkeypatch.chdir(files)
    main(["train", "stage2.yaml"])
    state = json.loads((files / "out1" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and "loss" in state["log_history"][0]
    start, first, second = (
        TinyAlignForConditionalGeneration.from_pretrained(files / name) for name in ("model", "out1", "out2")
    )
    assert not torch.equal(start.model.connector.linear_1.weight, first.model.connector.linear_1.weight)
    assert torch.equal(start.lm_head.weight, first.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    processor = TinyAlignProcessor.from_pretrained(files / "out2")
    second.attach_memory_bank(files / "bank")
    inputs = processor(images=images[:1], text=["<image>\nwhat?"], return_tensors="pt")
    assert second.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    # again: nothing is left to do
    main(["train", "stage1.yaml", "--learning_rate", "5e-3", "--save_steps", "2"])
    again = TinyAlignForConditionalGeneration.from_pretrained(files / "out1")
    assert torch.equal(first.model.connector.linear_1.weight, again.model.connector.linear_1.weight)
    with pytest.raises(SystemExit, match="tinyalign: out1 holds checkpoints of another run"):
        main(["train", "stage1.yaml", "--learning_rate", "6e-3"])


def test_the_baseline_is_composed_and_trained(files, monkeypatch):
    monkeypatch.chdir(files)
    main(["train", "baseline.yaml", "--cache_features", "False", "--dataloader_num_workers", "2"])
    model = TinyAlignForConditionalGeneration.from_pretrained(files / "baseline")
    assert model.config.memory_top_k == 0 and not list(files.rglob("vision_features-*"))


@pytest.mark.parametrize("fields", [["--model_kwargs", '{"memory_top_k": 0}'], ["--baseline", "text_rag"]])
def test_a_model_goes_on_without_its_memory(fields, files, monkeypatch):
    """The processor makes room for the visual tokens alone."""
    monkeypatch.chdir(files)
    main(["train", "stage2.yaml", "--model", "model", *fields])
    model = TinyAlignForConditionalGeneration.from_pretrained(files / "out2")
    processor = TinyAlignProcessor.from_pretrained(files / "out2")
    assert processor.num_image_tokens == model.config.num_image_tokens == model.config.image_seq_length


@pytest.mark.parametrize("stage", [1, 2])
def test_rows_are_streamed(stage, files, monkeypatch):
    """The model looks up their neighbours itself, also of rows that worker processes read."""
    monkeypatch.chdir(files)
    fields = ["--streaming", "True", "--model", "model", "--max_steps", "4", "--dataset", "chats.json"]
    main(["train", f"stage{stage}.yaml", *fields, "--dataloader_num_workers", "2"])
    (state,) = files.glob(f"out{stage}/checkpoint-4/trainer_state.json")
    losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    with pytest.raises(SystemExit, match="max_steps"):
        main(["train", f"stage{stage}.yaml", *fields, "--max_steps", "-1", "--output_dir", "endless"])


def test_streamed_rows_that_are_all_bad(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "bad.json").write_text(json.dumps([{"image": "0.png", "messages": []}] * 3))
    with pytest.raises(SystemExit, match="bad.json has no good row: none is left to train on"):
        main(["train", "stage1.yaml", "--streaming", "True", "--dataset", "bad.json"])


def test_streamed_rows_are_shuffled_by_seed_and_go_on_where_a_run_was_killed(files, monkeypatch):
    """In the second epoch, whose order is another than the first's."""
    monkeypatch.chdir(files)
    fields = ["--streaming", "True", "--max_steps", "7", "--dataset", "chats.json", "--save_steps", "5"]
    seen, collate = [], TrainingCollator.__call__

    def noting(collator, rows):
        seen.append([row["row"] for row in rows])
        return collate(collator, rows)

    monkeypatch.setattr(TrainingCollator, "__call__", noting)

    def train(folder: str, seed: int = 1, *more: str) -> tuple[list[float], list[list[int]]]:
        seen.clear()
        main(["train", "stage1.yaml", *fields, "--output_dir", folder, "--seed", str(seed), *more])
        (state,) = files.glob(f"{folder}/checkpoint-7/trainer_state.json")
        return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry], [*seen]

    losses, order = train("whole")
    epochs = [sum(order[start : start + 3], []) for start in (0, 3)]
    assert all(sorted(epoch) == list(range(12)) and epoch != sorted(epoch) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert train("again") == (losses, order)
    assert train("other", seed=2)[1] != order
    assert train("data", 2, "--data_seed", "1")[1] == order
    assert sum(train("sequential", 1, "--train_sampling_strategy", "sequential")[1][:3], []) == list(range(12))
    compute_loss = AlignmentTrainer.compute_loss

    def killed(trainer, *arguments, **kwargs):
        if trainer.state.global_step == 6:
            raise KeyboardInterrupt
        return compute_loss(trainer, *arguments, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(AlignmentTrainer, "compute_loss", killed)
        train("killed")
    assert train("killed")[0] == losses


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--model_kwargs", '{"memory_top_k": 2}'], "memory_top_k is 2, but baseline was trained without memory"),
        (["--baseline", "static_rag", "--memory_bank", ""], "retrieves 4 neighbours an image, but there is no bank"),
    ],
)
def test_what_a_baseline_without_memory_does_not_have(fields, message, files, monkeypatch):
    monkeypatch.chdir(files)
    main(["train", "baseline.yaml", "--max_steps", "1"])
    with pytest.raises(SystemExit, match=message):
        main(["train", "stage2.yaml", "--model", "baseline", *fields])


def test_padded_images_in_both_stages(files, checkpoints, monkeypatch):
    monkeypatch.chdir(files)
    main(["train", "baseline.yaml", "--image_aspect_ratio", "pad"])
    assert TinyAlignProcessor.from_pretrained(files / "baseline").image_aspect_ratio == "pad"
    fields = ["--memory_bank", "", "--model_kwargs", '{"memory_top_k": 0}', "--model", "baseline"]
    main(["train", "stage2.yaml", *fields])
    assert TinyAlignProcessor.from_pretrained(files / "out2").image_aspect_ratio == "pad"
    with pytest.raises(SystemExit, match="image_aspect_ratio is 'square', but baseline was trained with 'pad'"):
        main(["train", "stage2.yaml", *fields, "--image_aspect_ratio", "square"])
    with pytest.raises(SystemExit, match="is for towers that are preprocessed as CLIP or SigLIP"):
        main(["train", "baseline.yaml", "--image_aspect_ratio", "pad", "--vision_model", checkpoints["efficientnet"]])


def test_a_composed_model_reads_the_banks_captions(files, checkpoints, dataset, captions, monkeypatch):
    """The default: nothing but the bank's keys and captions, and the trained model reads them by itself."""
    monkeypatch.chdir(files)
    towers = checkpoints["siglip"], checkpoints["llama"]
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(*towers)
    processor = TinyAlignProcessor.from_vision_text_pretrained(*towers, model.config)
    rows = dataset.select_columns(["image"]).add_column("caption", captions)
    MemoryBank.build(rows, model, processor).save_pretrained("bank")
    settings = yaml.safe_load((files / "baseline.yaml").read_text()) | {"memory_bank": "bank"}
    (files / "composed.yaml").write_text(yaml.safe_dump({**settings, "model_kwargs": {}}))
    main(["train", "composed.yaml", "--output_dir", "trained"])
    trained = TinyAlignForConditionalGeneration.from_pretrained("trained")
    assert trained.config.memory_input == "captions" and trained.config.memory_scores
    trained.attach_memory_bank("bank")
    features = trained.get_image_features(torch.zeros(1, 3, 32, 32))
    captions = trained.memory_bank.rows(features.memory_ids)[0]
    ids = trained.caption_tokenizer([[row["caption"] for row in captions]])
    written = trained.caption_tokenizer.tokenizer.decode(ids[0][ids[0] >= 0])
    assert written.strip().startswith(captions[0]["caption"][:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 3}, "has stage: 3, expected `stage: 1`"),
        ({"stage": [1]}, r"has stage: \[1\], expected `stage: 1`"),
        ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps is -2, expected 1 or more"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_type .*, lr_scheduler_kwargs .*foo.*unexpected keyword"),
        ({"optim_args": "foo"}, "optim .*, optim_args 'foo': "),
        ({"output_dir": None}, "has no output_dir"),
        ({"memory_bank": None}, "retrieves 2 neighbours an image, but there is no bank"),
        ({"memory_bank": "nowhere"}, "memory_bank is 'nowhere': there is no .*nowhere, and the Hub .* is not asked"),
        ({"model": None}, "No model: set `model`"),
        ({"dataset": None}, "No data set"),
        ({"answer_column": "tags"}, "12 rows: 0 good, 12 bad .12 no chat.*found 'tags'"),
        ({"dataset": "changed.json"}, "changed.json cannot be read"),
        ({"image_column": "picture"}, "12 missing image.*no column 'picture'"),
        ({"global_batch_size": 6}, "global_batch_size is 6, expected a multiple of 4"),
        ({"learning_rate": [1, 2]}, r"learning_rate is \[1, 2\], expected float"),
        ({"dataset": ["pairs.parquet"]}, "dataset is .*, expected str"),
        ({"lerning_rate": 1e-3}, "lerning_rate is no setting of AlignmentConfig, did you mean learning_rate"),
        ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs is 0 and max_steps -1"),
        ({"resume_from_checkpoint": "out9/checkpoint-1"}, "complete checkpoints in out1 are none"),
    ],
)
def test_mistakes_in_the_file(change, message, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the Hub is not asked for "nowhere"
    settings = {**yaml.safe_load((files / "stage1.yaml").read_text()), **change}
    (files / "changed.yaml").write_text(
        yaml.safe_dump({name: value for name, value in settings.items() if value is not None})
    )
    (files / "changed.json").write_text("[no JSON")
    with pytest.raises(SystemExit, match=f"(?s)tinyalign: .*{message}"):
        main(["train", "changed.yaml"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--deepspeed", "zero.json"], "deepspeed is 'zero.json', but DeepSpeed is not installed"),
        (["--report_to", "swanlab"], "report_to is swanlab, which is not installed: pip install swanlab"),
        (["--report_to", "paper"], "report_to is paper, expected one of"),
        (["--stage", "2"], "stage1.yaml is of stage 1, found --stage 2"),
        (["--model_kwargs", "{memory_top_k: 3"], "expected JSON like"),
        (["--model_kwargs", "[3]"], r"model_kwargs is \[3\], expected {name: value"),
        (["--max_length", "0"], "max_length is 0, expected 1 or more"),
        (["--eval_samples", "-1"], "eval_samples is -1, expected 0 or more"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
    ],
)
def test_mistakes_in_the_fields_are_found_before_anything_is_read(fields, message, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(run, "prepare", None)
    if "--deepspeed" in fields and importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("DeepSpeed is installed")
    with pytest.raises(SystemExit, match=f"tinyalign: .*{message}"):
        main(["train", "stage1.yaml", *fields])


def test_what_is_wrong_is_told_without_a_traceback(files, checkpoints, monkeypatch):
    monkeypatch.chdir(files)
    (files / "broken.yaml").write_text("stage: [1")
    with pytest.raises(SystemExit, match="tinyalign: broken.yaml is no YAML in UTF-8 .while parsing"):
        main(["train", "broken.yaml"])
    with pytest.raises(SystemExit, match="tinyalign: .*memory_top_k"):
        main(["train", "baseline.yaml", "--model_kwargs", '{"memory_top_k": "two"}'])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["blue", None], "row 1: empty answer: an assistant turn is empty, expected text that is not blank"),
        (["blue", " "], "row 1: empty answer: an assistant turn is empty"),
        (["blue", 8], "row 1: no chat: a turn of 'assistant' has the text 8, expected a string"),
        ([{"role": "user", "content": "?"}], "row 0: turn order: the turns are of user"),
    ],
)
def test_rows_without_an_answer_are_named(labels, message, files, monkeypatch):
    monkeypatch.chdir(files)
    column = "messages" if isinstance(labels[0], dict) else "label"
    rows = [{"image": "0.png", column: [label] if column == "messages" else label} for label in labels]
    (files / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match=f"(?s)tinyalign: rows.json has .*{message}"):
        main(["train", "stage1.yaml", "--dataset", "rows.json", "--strict"])


def test_connectors_alone_from_stage_to_stage(files, checkpoints, make_model, processor, monkeypatch, capsys):
    """Saved without the models in stage 1, gone on from in stage 2 with adapters, whose result is complete."""
    monkeypatch.chdir(files)
    make_model().model.vision_tower.save_pretrained(files / "tower")  # the bank's
    processor.image_processor.save_pretrained(files / "tower")
    composed = {"vision_model": "tower", "language_model": checkpoints["llama"], "model_kwargs": SMALL}
    settings = yaml.safe_load((files / "stage1.yaml").read_text())
    del settings["model"]
    settings |= composed | {"save_only": "connectors"}
    (files / "alone.yaml").write_text(yaml.safe_dump(settings))
    main(["train", "alone.yaml"])
    with safe_open(files / "out1" / "model.safetensors", "pt") as file:
        assert all("connector" in name for name in file.keys())
    alone = TinyAlignForConditionalGeneration.from_pretrained(files / "out1")
    whole = TinyAlignForConditionalGeneration.from_pretrained(files / "out1").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in alone.state_dict().items())

    main(["train", "stage2.yaml", "--tune_language_model", "lora", "--language_model_lr", "1e-2"])
    table = capsys.readouterr().out
    assert "language model    lora" in table and "0.01" in table
    model = TinyAlignForConditionalGeneration.from_pretrained(files / "out2")
    assert not model.config.connectors_only and model.config.language_model is None
    trained = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert model.state_dict().keys() == whole.keys() and not torch.equal(model.state_dict()[trained], whole[trained])
    record = json.loads((files / "out2" / "training_record.json").read_text())[-1]
    assert record["hyperparameters"]["trains the language model"] == "lora"
    for command, message in (
        ("alone.yaml --tune_language_model full --output_dir other", "what the others learn would be lost"),
        ("stage1.yaml --model model --save_only connectors --output_dir b", "config.vision_model and"),
        ("stage1.yaml --tune_language_model qlora", "qlora, which needs a CUDA GPU, and found none"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["train", *command.split()])
    (files / "unknown.yaml").write_text(yaml.safe_dump(settings | {"tune_projector": "full"}))
    with pytest.raises(SystemExit, match="tune_projector"):
        main(["train", "unknown.yaml"])
