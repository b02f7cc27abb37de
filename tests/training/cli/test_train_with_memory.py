"""`tinyalign train` with a memory bank, and the comparison points, from YAML to a trained model."""

import pytest
import yaml

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration
from tinyalign_vlm.training.stages.trainers import TRAINERS, AlignmentTrainer


def train(*fields: str) -> TinyAlignForConditionalGeneration:
    main(["train", "stage1.yaml", *fields])
    return TinyAlignForConditionalGeneration.from_pretrained(fields[fields.index("--output_dir") + 1])


def test_training_looks_them_up_itself(folder):
    train("--output_dir", "out", "--memory_dropout", "0.5", "--dataloader_num_workers", "2")
    assert len(list(folder.glob("home/tinyalign/neighbours/*.parquet"))) == 1
    with pytest.raises(SystemExit, match="out holds checkpoints of another run .*memory_dropout: 0.5 then, 0.1 now"):
        main(["train", "stage1.yaml", "--memory_dropout", "0.1"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--streaming", "True", "--memory_dropout", "0.5"], "neighbours looked up beforehand"),
        (["--streaming", "True", "--baseline", "static_rag"], "neighbours looked up beforehand"),
        (["--memory_dropout", "2"], "memory_dropout is 2.0, expected a share"),
        (["--baseline", "text_rag", "--model_kwargs", '{"memory_top_k": 0}'], "text_rag and memory_top_k 0"),
        (["--baseline", "wider_connector", "--model_kwargs", '{"memory_top_k": 0}'], "connector and memory_top_k 0"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message, folder):
    with pytest.raises(SystemExit, match=message):
        main(["train", "stage1.yaml", *fields])


@pytest.mark.parametrize("baseline", ["static_rag", "text_rag"])
def test_captions_need_a_bank(baseline, folder):
    settings = yaml.safe_load((folder / "stage1.yaml").read_text())
    del settings["memory_bank"]
    (folder / "stage1.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match="The model retrieves 2 neighbours an image, but there is no bank"):
        main(["train", "stage1.yaml", "--baseline", baseline])


def test_every_comparison_point_is_an_option(folder, compose, make_processor, value_encoder):
    memory = train("--output_dir", "tinyalign")
    assert memory.config.memory_top_k == 2
    assert train("--output_dir", "0", "--model_kwargs", '{"memory_top_k": 0}').config.num_memory_tokens == 0
    wider = train("--output_dir", "wider", "--baseline", "wider_connector")

    def connectors(model) -> int:
        return sum(tensor.numel() for name, tensor in model.named_parameters() if "connector." in name)

    assert wider.config.memory_top_k == 0 and abs(connectors(wider) - connectors(memory)) <= 16 + 1 + 32
    static = train("--output_dir", "static", "--baseline", "static_rag")
    text = train("--output_dir", "text", "--baseline", "text_rag")
    assert (static.config.memory_top_k, static.config.prompt_captions) == (0, 0)
    assert (text.config.memory_top_k, text.config.prompt_captions) == (0, 2)
    both = train("--output_dir", "both", "--model_kwargs", '{"memory_input": "both"}')
    assert both.config.num_memory_tokens == memory.config.num_memory_tokens
    model = compose(key_space="language")
    rows = [{"image": f"{index}.png", "caption": f"a square {index % 5}"} for index in range(20)]
    MemoryBank.build(rows, model, make_processor(model), value_encoder).save_pretrained("language")
    train("--output_dir", "l", "--model_kwargs", '{"key_space": "language"}', "--memory_bank", "language")
    # stage 2 goes on from each of them
    (folder / "stage2.yaml").write_text((folder / "stage1.yaml").read_text().replace("stage: 1", "stage: 2"))
    for name, options in (("wider", "wider_connector"), ("static", "static_rag"), ("text", "text_rag")):
        fields = ["--model", name, "--output_dir", f"{name}2", "--baseline", options]
        main(["train", "stage2.yaml", *fields, "--max_steps", "1"])
        second = TinyAlignForConditionalGeneration.from_pretrained(f"{name}2").config
        first = TinyAlignForConditionalGeneration.from_pretrained(name).config
        kept = ("memory_top_k", "connector_size", "prompt_captions")
        assert [vars(second)[field] for field in kept] == [vars(first)[field] for field in kept]
    fields = ["train", "stage2.yaml", "--model", "tinyalign", "--output_dir", "no"]
    with pytest.raises(SystemExit, match="the connector of tinyalign is not wider"):
        main([*fields, "--baseline", "wider_connector"])
    with pytest.raises(SystemExit, match="The weights of tinyalign are not of the shapes"):
        main([*fields, "--model_kwargs", '{"latent_dim": 6}'])


def test_static_captions_are_in_the_prompts_of_training(folder, monkeypatch):
    seen = []
    monkeypatch.setitem(TRAINERS, 1, lambda *args, **data: seen.append(data) or AlignmentTrainer(*args, **data))
    train("--output_dir", "static", "--baseline", "static_rag")
    rows, bank = seen[0]["train_dataset"], seen[0]["memory_bank"]
    asked = ["".join(part["text"] or "" for part in row["messages"][0]["content"]) for row in rows]
    assert bank is None and all(text.startswith("Similar: ") and text.endswith("\nwhat?") for text in asked)
    assert all(text.count(";") == 1 for text in asked)


def test_a_bank_of_another_tower_is_refused_and_forced(folder, checkpoints):
    fields = ["--vision_model", checkpoints["clip"], "--output_dir", "clip"]
    with pytest.raises(SystemExit, match="tinyalign: The memory bank was built with"):
        main(["train", "stage1.yaml", *fields])
    assert train(*fields, "--any_tower", "True").config.memory_top_k == 2
