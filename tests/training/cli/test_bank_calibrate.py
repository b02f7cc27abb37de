"""`tinyalign bank calibrate`: probabilities for a bank, and a threshold for a model."""

import numpy as np
import pytest
from PIL import Image

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank, TinyAlignConfig, TinyAlignForConditionalGeneration


def test_a_bank_is_calibrated_in_its_folder(folder, capsys):
    main(["train", "stage1.yaml", "--output_dir", "out"])
    before = {path: path.read_bytes() for path in folder.glob("bank/**/*") if path.is_file()}
    capsys.readouterr()
    # what the training was evaluated on is not read
    main("bank calibrate stage1.yaml --model out --eval_dataset nowhere --eval_benchmark pope".split())
    printed = capsys.readouterr().out
    assert "30 images, 2 neighbours of each" in printed and "Written to bank/bank_config.json" in printed
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == ["bank_config.json"] and len(list(folder.glob("bank/**/*.new"))) == 0
    bank = MemoryBank.from_pretrained("bank")
    assert (bank.config.calibration.top_k, bank.config.calibration.num_rows) == (2, 20)
    assert TinyAlignConfig.from_pretrained("out").retrieval_threshold is None
    model = TinyAlignForConditionalGeneration.from_pretrained("out")
    model.attach_memory_bank(bank)
    noise = Image.fromarray(np.random.default_rng(9).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    found = model.retrieve(["0.png", noise])
    assert found.probabilities[0, 0] > found.probabilities[1, 0]
    assert found.none_probability[0] < found.none_probability[1]


def test_a_threshold_is_written_where_a_probability_is_asked_for(folder, capsys):
    main(["train", "stage1.yaml", "--output_dir", "out"])
    main(["bank", "calibrate", "stage1.yaml", "--model", "out", "--min_probability", "0.2"])
    config = TinyAlignConfig.from_pretrained("out")
    assert (
        f"retrieval_threshold: {config.retrieval_threshold:.3f}, written to out/config.json" in capsys.readouterr().out
    )
    assert -1 < config.retrieval_threshold < 1
    main(["bank", "calibrate", "stage1.yaml", "--min_probability", "0.2"])
    assert '--model_kwargs \'{"retrieval_threshold": ' in capsys.readouterr().out


def test_what_cannot_be_meant_is_refused(folder):
    for option in ("--min_agreement", "--min_probability"):
        for share in ("2", "-0.1", "nan"):
            with pytest.raises(SystemExit, match=f"{option[2:]} is {share}.*, expected a share above 0 and up to 1"):
                main(["bank", "calibrate", "stage1.yaml", option, share])
    for fields in (["--memory_bank", "org/bank"], ["--any_tower", "true"]):
        with pytest.raises(SystemExit, match="calibrate takes the folder of a bank of this tower"):
            main(["bank", "calibrate", "stage1.yaml", *fields])
