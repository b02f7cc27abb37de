"""`tinyalign bank calibrate`: a threshold for a model."""

import pytest

from tinyalign_cli.main import main
from tinyalign_vlm import TinyAlignConfig, TinyAlignForConditionalGeneration


def test_calibration_is_written_to_the_model(folder, capsys):
    main(["train", "stage1.yaml", "--output_dir", "out", "--memory_dropout", "0.5"])
    capsys.readouterr()
    main(["bank", "calibrate", "stage1.yaml", "--model", "out"])
    printed = capsys.readouterr().out
    config = TinyAlignConfig.from_pretrained("out")
    assert (
        f"retrieval_threshold: {config.retrieval_threshold:.3f}" in printed and "Written to out/config.json" in printed
    )
    assert -1 < config.retrieval_threshold < 1
    model = TinyAlignForConditionalGeneration.from_pretrained("out")
    assert model.config.retrieval_threshold == config.retrieval_threshold
    main(["bank", "calibrate", "stage1.yaml", "--min_agreement", "0.2"])
    assert '--model_kwargs \'{"retrieval_threshold": ' in capsys.readouterr().out
    for share in ("2", "-0.1", "nan"):
        with pytest.raises(SystemExit, match=f"min_agreement is {share}.*, expected a share"):
            main(["bank", "calibrate", "stage1.yaml", "--min_agreement", share])
