"""The pictures of the demo's report."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tinyalign_vlm.training.demo.report import COLORS, plot_losses, plot_neighbours
from tinyalign_vlm.training.demo.state import Result
from tinyalign_vlm.training.hub.run_facts import StageRecord, write_records


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: saved.append(figure))
    return saved


def test_losses_have_whole_steps_and_a_legend_beside_them(tmp_path, figures):
    for system in COLORS:
        (tmp_path / system / "model").mkdir(parents=True)
        records = [StageRecord(name, {}, [[1, 3.0], [3, 2.0]], [], 1.0, 1.0) for name in ("one", "two")]
        write_records(tmp_path / system / "model", records)
    figures.clear()
    plot_losses(SimpleNamespace(out=tmp_path))
    (figure,) = figures
    assert all(tick == round(tick) for axis in figure.axes for tick in axis.get_xticks())
    assert [axis.get_title() for axis in figure.axes] == ["one", "two"]
    assert len(figure.legends[0].get_texts()) == len(COLORS)
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x0 >= figure.axes[1].get_window_extent().x1


def test_neighbours_have_their_similarities(tmp_path, figures):
    picture = Image.new("RGB", (8, 8))
    bank = SimpleNamespace(rows=lambda ids: [{"caption": f"row {ids[0]}"}], thumbnail=lambda index: picture)
    demo = SimpleNamespace(
        out=tmp_path,
        banks={"with": bank},
        queries=[{"image": picture, "label": "jar"}],
        found={"with": (np.array([[0.75, 0.5, 0.25]]), np.array([[4, 5, 6]]))},
        results={name: {"with": Result(answers=[name])} for name in ("baseline", "tinyalign")},
        answered=np.array([0]),
    )
    plot_neighbours(demo)
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles == ["asked about", "row 4\nsimilarity 0.75", "row 5\nsimilarity 0.50", "row 6\nsimilarity 0.25", ""]
