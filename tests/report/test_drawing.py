"""Charts as matplotlib draws them."""

import base64
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
from example_run import remove
from matplotlib import image
from runs import ROOT

from spin_jax.report import drawing


def test_every_chart_as_png(copy, tmp_path):
    folder, page = copy
    remove("summary.json", "iteration_0")(folder)
    text = page(png=str(tmp_path / "png"))
    found = sorted((tmp_path / "png").glob("*.png"))
    assert len(found) == text.count("<figure>")
    content = found[0].read_bytes()
    at = content.index(b"pHYs") + 4
    assert int.from_bytes(content[at : at + 4]) >= 200 / 0.0254  # pixels a metre
    for path in found:
        pixels = image.imread(path)
        assert pixels[0, 0, :3].tolist() == [1, 1, 1]
        assert pixels.shape[1] >= 1000
        assert (pixels[..., :3] < 0.5).any()


def test_a_drawing_of_any_data():
    """A point alone, nothing finite at first, names that matplotlib would read as its own."""
    curves = [drawing.Curve("_hidden $a$", [0], [1.0]), drawing.Curve("", [0, 1, 2], [np.nan, 2e9, -1e-9])]
    chart = drawing.Chart("any", "$", "<x>", "y_{", curves, ticks={0: "start", 2: "$"})
    url = drawing.svg_url(chart)
    assert url == drawing.svg_url(chart)
    image_text = ElementTree.fromstring(base64.b64decode(url.partition(",")[2])).itertext()
    assert {"<x>", "y_{", "start", "$"} <= set(image_text)
    assert drawing.png(chart).startswith(b"\x89PNG")
    assert drawing.png_grid([chart] * 4).startswith(b"\x89PNG")


def test_a_legend_names_every_curve(monkeypatch):
    """Names that begin with _ too, which matplotlib leaves out of a legend of its own making."""
    from matplotlib.figure import Figure

    legends = []
    monkeypatch.setattr(Figure, "legend", lambda self, lines, labels, **options: legends.append(labels))
    curves = [drawing.Curve(label, [0, 1], [0.0, 1.0]) for label in ("_hidden", "$shown")]
    drawing.png(drawing.Chart("any", "title", "x", "y", curves))
    assert legends == [["_hidden", r"\$shown"]]


def test_a_run_that_draws_nothing_loads_no_matplotlib():
    program = (
        "import sys\n"
        "import spin_jax.report, spin_jax.report.numbers, spin_jax.report.charts, spin_jax.report.page\n"
        "import spin_jax.report.model_card\n"
        "spin_jax.report.numbers.summary_table([{'iteration': -1, 'nll': 0.5}])\n"
        "print([name for name in ('matplotlib', 'huggingface_hub') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
