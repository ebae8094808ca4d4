"""The report: what is on the page, what may be missing, and how a browser shows it."""

import html.parser
import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import image
from runs import ROOT, run_module

from spin_jax import config, figures, panels, report, workdir
from spin_jax.data import parquet
from spin_jax.data.records import Pair
from spin_jax.selfplay import fingerprints
from spin_jax.storage import files, metrics

LONG = "It depends on what is asked. " * 12


def write_run(folder, iterations=2, steps=20, **sections):
    """What a run leaves that a report reads, by the package's own writers; numbers are made up."""
    given = {"model": {"path": "org/base"}, "data": {"path": "org/chat"}, "eval": {"verifier": "exact"}}
    resolved = config.resolve({**given, "selfplay": {"iterations": iterations}, **sections})
    record = {
        "config": fingerprints.recorded(resolved),
        "model_revision": "0123abcd",
        "commit": "c0ffee",
        "fingerprints": {"data": "60 examples, 77", "code": "1"},
        "versions": {"jax": "0.10.2"},
        "overrides": [],
    }
    files.write_json(folder / "config.json", record)
    rows = [{"iteration": -1, "nll": 0.9, "greedy_accuracy": 0.5, "sampled_accuracy": 0.4, "gsm8k/acc": 0.25}]
    kept = metrics.Metrics(folder)
    for step in range(steps):
        kept.write("sft", -1, step, {"loss": 3 / (step + 1), "grad_norm": 1.0, "learning_rate": 1e-5})
    write_answers(folder / "start", "a guess")
    for t in range(iterations):
        for step in range(steps):
            kept.write("train", t, step, learned(step / steps))
            kept.write("control", t, step, {"loss": 0.8 - 0.1 * t})
        write_answers(folder / f"iteration_{t}", f"answer of {t}")
        write_pairs(folder / f"iteration_{t}" / "pairs", t)
        margins = pa.table({"margin": np.linspace(-1, 2, 30, dtype=np.float32)})
        pq.write_table(margins, folder / f"iteration_{t}" / "held_out.parquet")
        rows.append({"iteration": t, "beta": 0.1, "steps": steps, "pairs": 54, "skipped": 0, "margin": 0.75})
        rows[-1] |= {
            "nll": 0.8 - t / 10,
            "greedy_accuracy": 0.6,
            "gsm8k/acc": 0.5,
            "gsm8k/acc_stderr": 0.0125,
        }
        rows[-1] |= {"kl_start": 0.01 * t, "control": {"nll": 0.85}, "novel_number": 12.5}
    rows[-1]["final"] = True
    kept.close()
    files.write_json(folder / "summary.json", rows)
    return folder


def learned(share):
    """A row of training, a share of the way through an iteration."""
    numbers = {"loss": 0.7 - share / 2, "margin": share, "accuracy": 0.5 + share / 2, "skipped": 0.0}
    numbers |= {"real_reward": -share, "generated_reward": -2 * share, "grad_norm": 2.0}
    numbers |= {"real_logp": -20 - share, "generated_logp": -20 - 5 * share, "learning_rate": 1e-6}
    return numbers | {"identical": 0.1, "tokens_per_s": 1000.0}


def write_answers(folder, text):
    rows = [
        {
            "prompt_id": n,
            "prompt": [{"role": "user", "content": f"Question {n}?"}],
            "real": "42",
            "generated": text,
        }
        for n in range(3)
    ]
    files.write_jsonl(folder / "samples.jsonl", rows)


def write_pairs(folder, t):
    for split, count in (("train", 54), ("test", 6)):
        pairs = [
            Pair(
                n,
                0,
                [],
                [],
                np.zeros(3, np.int32),
                np.zeros(n % 9 + 1, np.int32),
                np.zeros(t + 4, np.int32),
                False,
            )
            for n in range(count)
        ]
        files.write(folder / f"{split}-00000-of-00001.parquet", parquet.pairs_to_parquet(pairs))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "logistic")


@pytest.fixture
def copy(finished, tmp_path):
    """A run to change, and its page."""

    def page(**options):
        report.write([str(tmp_path / "run")], str(tmp_path / "page.html"), **options)
        return (tmp_path / "page.html").read_text()

    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run", page


def change(path, function):
    """Applies a function to each row of a JSON list or of JSONL."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(function(row)) + "\n" for row in rows))
    else:
        path.write_text(json.dumps([function(row) for row in json.loads(path.read_text())]))


def written(workdirs, output):
    report.write([str(path) for path in workdirs], str(output))
    return output.read_text()


class Page(html.parser.HTMLParser):
    """A page's tags, and its text: a space for each tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += "" if tag == "wbr" else " "

    def handle_endtag(self, tag):
        self.text += " "

    def handle_data(self, data):
        self.text += data if self.tags[-1:] != [("style", {})] else ""

    @property
    def words(self):
        return " ".join(self.text.split())


# --- a run ---------------------------------------------------------------------------------------


def test_the_page_of_a_run(finished, tmp_path):
    text = written([finished], tmp_path / "page.html")
    page = Page(text)
    for said in (
        "logistic org/base on org/chat (60 examples, 6 prompts held out): logistic loss, β 0.1, seed 42.",
        "Finished: 2 of 2 iterations are done. Final model: iteration 1.",
        "NLL of the human's, nats a token 0.7000 start 0.9000 SFT control 0.8500",
        "iteration start 0 1 *",
        "right, greedy 0.500 0.600 0.600",
        "gsm8k/acc 0.2500 0.5000 ± 0.013 0.5000 ± 0.013",
        "novel_number – 12.5 12.5",
        "known to ±0.400 (two standard errors, 6 held-out prompts)",
        "log p of human answers may fall while the margin grows",
        "Above 0: 67%, 67%.",
        "human generated, by the start",
        "Means: 4.8 and 4.0 tokens.",
        "Question 0? human 42 start a guess iteration 0 answer of 0 iteration 1 answer of 1",
        "commit c0ffee",
        "model org/base at 0123abcd",
        "Config that is not the default: 4 keys",
        "selfplay.iterations 2 3",
    ):
        assert said in page.words, said
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert titles == [
        *(
            "Right answers",
            "NLL of held-out human answers",
            "Held-out margin",
            "KL divergence, from the start",
            "Tasks",
        ),
        *("Training loss", "Margin", "Human answer preferred", "Rewards", "Log-probability of answers"),
        *("Margins of held-out pairs", "Lengths, pairs of iteration 0", "Lengths, pairs of iteration 1"),
        *("Gradient norm", "Learning rate", "Identical pairs", "Speed", "SFT loss"),
    ]
    drawn = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(drawn) == len(titles)
    assert "NLL: from 0.9 to 0.7; SFT control: from 0.9 to 0.85" in drawn[1]


def test_the_page_stands_alone_and_is_the_same_each_time(finished, tmp_path):
    text = written([finished], tmp_path / "page.html")
    assert text == written([finished], tmp_path / "again.html")
    assert "://" not in text
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object"}
    assert [a["href"] for tag, a in page.tags if tag == "link"] == ["data:,"]
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used
    assert used <= set(ids)
    assert not re.search("#0a0[bc]0", text)  # each stand-in has its color


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "</dd></article>&amp;\"'", "$x_{$ _y", "\ud800"]
)
def test_what_comes_from_data_stays_text(hostile, copy):
    folder, page = copy
    turns = [{"role": hostile, "content": hostile}] * 2
    for path in folder.glob("*/samples.jsonl"):
        change(path, lambda row: {**row, "prompt": turns, "real": hostile, "generated": hostile})
    change(folder / "summary.json", lambda row: {**row, f"{hostile}/acc": 0.5, f"{hostile} number": 3.25})
    change(folder / "metrics.jsonl", lambda row: {**row, f"{hostile} curve": 0.5})
    record = json.loads((folder / "config.json").read_text())
    record["config"]["data"]["path"] = record["config"]["loss"]["name"] = record["commit"] = hostile
    (folder / "config.json").write_text(json.dumps(record))
    shown = Page(page())
    assert "script" not in {tag for tag, _ in shown.tags}
    assert shown.text.count(hostile.replace("\ud800", "?")) >= 20


def test_secrets_stay_out(copy, monkeypatch):
    folder, page = copy
    monkeypatch.setenv("SOME_TOKEN", "correct horse battery")
    secrets = "hf_abcdefgh12345678", "correct horse battery"
    for path in folder.glob("*/samples.jsonl"):
        change(path, lambda row: {**row, "generated": " ".join(secrets)})
    change(folder / "summary.json", lambda row: {**row, f"{secrets[0]}/acc": 0.5})
    text = page()
    assert "[secret] [SOME_TOKEN]" in text
    assert not [secret for secret in secrets if secret in text]


# --- what may be missing -------------------------------------------------------------------------


def remove(*names):
    def remove(folder):
        for name in names:
            for path in list(folder.glob(name)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def rows(function, name="summary.json"):
    return lambda folder: change(folder / name, function)


def without(*keys):
    return lambda row: {key: value for key, value in row.items() if key not in keys}


def only_generated(row):
    """As an algorithm logs that knows no pairs."""
    return {key: value for key, value in row.items() if not re.match("real|margin|accuracy|identical", key)}


def cut_off(folder):
    """A run that is writing a line, in the middle of iteration 1."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in lines if row["iteration"] < 1 or row["step"] < 5]
    text = "".join(json.dumps(row) + "\n" for row in kept if row["phase"] != "control")
    (folder / "metrics.jsonl").write_text(text + '{"phase": "tra')
    kept = json.loads((folder / "summary.json").read_text())[:2]
    (folder / "summary.json").write_text(json.dumps([without("final", "control")(row) for row in kept]))


def not_finite(row):
    """NaN and null, both of which older files have."""
    return {**row, "loss": math.nan, "margin": None} if row["step"] % 2 else row


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (cut_off, "1 of 2 iterations are done; last heard of in train, iteration 1, step 4."),
        (remove("summary.json", "metrics.jsonl", "iteration_*", "start"), "Nothing has been evaluated yet."),
        (remove("metrics.jsonl"), "No iteration has been trained yet."),
        (remove("iteration_*/pairs"), "No answers have been sampled yet."),
        (remove("*/samples.jsonl"), "No samples.jsonl is there yet"),
        (remove("start"), "None of the start are stored."),
        (remove("*/held_out.parquet"), "No held-out margins are stored"),
        (remove("iteration_1"), "Lengths, pairs of iteration 0"),
        (rows(without("control")), "There is no SFT control"),
        (rows(lambda row: {"iteration": row["iteration"]}), "2 of 2 iterations are done; last heard of in"),
        (rows(lambda row: {**row, "nll": math.nan, "margin": None}), "NLL"),
        (rows(not_finite, "metrics.jsonl"), "20 of 40 steps have no finite value"),
        (rows(only_generated, "metrics.jsonl"), "Rewards"),
        (rows(lambda row: {**row, "stopped": "no better"}), "Stopped early: no better."),
        (rows(lambda row: {**row, "novel": 7.5}, "metrics.jsonl"), "novel"),
    ],
)  # fmt: skip
def test_a_page_of_what_there_is(lose, said, copy):
    folder, page = copy
    lose(folder)
    assert said in Page(page()).words


def test_without_iterations_there_are_no_figures_of_them(copy):
    folder, page = copy
    remove("iteration_*", "metrics.jsonl")(folder)
    rows_kept = json.loads((folder / "summary.json").read_text())[:1]
    (folder / "summary.json").write_text(json.dumps(rows_kept))
    shown = Page(page()).words
    assert "0 of 2 iterations are done" in shown
    assert "NLL of held-out human answers" in shown
    assert "No answers have been sampled yet." in shown


def test_only_what_generated_answers_are_logged(copy):
    folder, page = copy
    change(folder / "metrics.jsonl", only_generated)
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page())
    assert "Margin" not in titles
    assert {"Rewards", "Log-probability of answers"} <= set(titles)


def test_a_long_run_makes_no_large_page(copy):
    """100,000 steps, and 40 prompts with answers of 20,000 characters."""
    folder, page = copy
    with open(folder / "metrics.jsonl", "w") as file:
        for t in range(2):
            for step in range(50_000):
                row = {
                    "phase": "train",
                    "iteration": t,
                    "step": step,
                    "loss": math.sin(step),
                    "margin": step / 1e4,
                }
                file.write(
                    json.dumps({**row, "real_logp": -300.0 + step % 7, "generated_logp": -310.0}) + "\n"
                )
    change(folder / "summary.json", lambda row: {**row, "steps": 50_000})
    for path in folder.glob("*/samples.jsonl"):
        row = json.loads(path.read_text().splitlines()[0])
        files.write_jsonl(path, [{**row, "prompt_id": n, "generated": "word " * 4000} for n in range(40)])
    text = page()
    assert len(text) < 3e6
    shown = Page(text).words
    assert "Each point is the mean of 250 steps." in shown
    assert "The first 24 of 40 prompts." in shown
    assert "(16,000 more characters are in samples.jsonl)" in shown


def test_curves_are_means_with_gaps(finished):
    run_ = workdir.read(str(finished))
    assert run_.begins == {0: 0, 1: 20}
    series = run_.series("train", "margin")
    assert series[1][0].tolist() == list(range(20, 40))
    assert run_.series("sft", "loss")[-1][0].tolist() == list(range(-20, 0))
    (curve,) = next(panel for panel in panels.learning(run_) if panel.title == "Margin").curves
    assert np.isnan(curve.y).tolist() == [n == 20 for n in range(41)]  # between the iterations
    np.testing.assert_array_equal(
        panels._means(np.array([1, 3, np.nan, 5, np.nan, np.nan, 7]), 2), [2, 5, np.nan, 7]
    )


# --- what is no run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json is missing: is .* a run's?"),
        ("config.json", "{", "config.json is damaged: no valid JSON"),
        ("config.json", "[]", "config.json is no run's of spin_jax"),
        ("summary.json", "[1]", "summary.json is damaged: no list of rows"),
        ("summary.json", '[{"nll": 1}]', "summary.json, row 0 is damaged: iteration is None"),
        ("summary.json", '[{"iteration": 0, "nll": "x"}]', "summary.json, row 0 is damaged: nll is 'x'"),
        ("summary.json", '[{"iteration": 0, "control": 3}]', "row 0 is damaged: control is 3"),
        ("metrics.jsonl", '{"phase": "train"}\n', "metrics.jsonl, line 1 is damaged: iteration is None"),
        ("metrics.jsonl", "{}\n{\n", "metrics.jsonl, line 1 is damaged: phase is None"),
        ("metrics.jsonl", "{\n{}\n", "metrics.jsonl, line 1 is damaged: no valid JSON"),
        ("metrics.jsonl", "3\n", "metrics.jsonl, line 1 is damaged: a JSON int in place of an object"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl is damaged: no UTF-8"),
        ("iteration_0/samples.jsonl", '{"prompt_id": 1, "prompt": []}\n', "line 1 is damaged: real is None"),
        ("iteration_1/pairs/train-00000-of-00001.parquet", "PAR1", r"iteration_1/.*1\.parquet is damaged"),
        ("iteration_1/held_out.parquet", "", r"iteration_1/held_out\.parquet is damaged"),
    ],
)  # fmt: skip
def test_damage_is_named(name, content, message, copy):
    folder, page = copy
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        page()


def test_a_flipped_bit_in_pairs_is_found(copy):
    folder, page = copy
    path = folder / "iteration_0" / "pairs" / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0)
    column = next(
        start.column(n) for n in range(start.num_columns) if "real_tokens" in start.column(n).path_in_schema
    )
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet is damaged"):
        page()


# --- several runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two seeds of one config, and another loss."""
    folder = tmp_path_factory.mktemp("several")
    runs = [write_run(folder / f"logistic_{seed}", seed=seed) for seed in (0, 1)]
    change(runs[1] / "summary.json", lambda row: {**row, "nll": row["nll"] + 0.1})
    return [*runs, write_run(folder / "hinge", loss={"name": "hinge", "beta": (0.1, 0.5)})]


def test_runs_beside_one_another(several, tmp_path):
    text = written(several, tmp_path / "page.html")
    page = Page(text)
    for said in (
        "3 runs, 2 of them apart from the seed: logistic (2 seeds), hinge.",
        "run logistic (2 seeds) hinge seed 0, 1 42 loss.beta 0.1 0.1, 0.5 loss.name logistic hinge",
        "NLL of the human's, nats a token 0.7500 0.7000 to 0.8000 0.7000",
        "start 0.9500 0.9000 to 1.0000 0.9000",
        "SFT control 0.8500 0.8500",
    ):
        assert said in page.words, said
    assert "Fixed prompts" not in page.text
    groups = report.grouped({path.name: workdir.read(str(path)) for path in several})
    nll = next(panel for panel in panels.compared_iterations(groups) if panel.name == "by_nll_0")
    assert [curve.label for curve in nll.curves] == ["logistic (2 seeds)", "hinge"]
    assert nll.curves[0].band is not None
    np.testing.assert_allclose(
        [nll.curves[0].y, *nll.curves[0].band], [[0.95, 0.85, 0.75], [0.9, 0.8, 0.7], [1, 0.9, 0.8]]
    )
    assert nll.curves[1].band is None


def test_runs_at_different_points_and_with_other_numbers(several, tmp_path):
    other = write_run(tmp_path / "other", iterations=1)
    change(other / "metrics.jsonl", only_generated)
    (other / "summary.json").unlink()
    words = Page(written([several[0], other], tmp_path / "page.html")).words
    assert re.search(r"final model run \S+/logistic_0 \S+/other iteration 1 – ", words)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b/run/"], ["run"]),
        (["/a/b/x", "/a/b/y"], ["x", "y"]),
        (["/a/x/run", "/a/y/run"], ["x/run", "y/run"]),
        (["gs://bucket/a", "gs://bucket/b/c"], ["a", "b/c"]),
        (["a/b", "a/b/c"], ["b", "b/c"]),
        (["x", "/a/x"], ["x", "/a/x"]),
        ([f"{ROOT}/tests/.."], [ROOT.name]),
    ],
)
def test_names_are_short(paths, names):
    assert report.names(paths) == names


def test_names_of_groups(several):
    runs = [workdir.read(str(path)) for path in several]

    def named(*names):
        pairs = zip(names, [runs[0], runs[1], runs[2], runs[2]], strict=False)
        return [group.name for group in report.grouped(dict(pairs))]

    assert named("a/spin_seed0", "a/spin_seed1", "a/b") == ["a/spin (2 seeds)", "a/b"]
    assert named("0", "1", "x") == ["0 (2 seeds)", "x"]
    assert named("a0", "a1", "a2", "a3") == ["a0, a1", "a2, a3"]


# --- PNGs ----------------------------------------------------------------------------------------


def test_every_figure_as_png(copy, tmp_path):
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
    curves = [figures.Curve("_hidden $a$", [0], [1.0]), figures.Curve("", [0, 1, 2], [np.nan, 2e9, -1e-9])]
    panel = figures.Panel("any", "$", "<x>", "y_{", curves, ticks={0: "start", 2: "$"})
    assert figures.svg(panel) == figures.svg(panel)
    assert "&lt;x&gt;" in figures.svg(panel)
    assert figures.png(panel).startswith(b"\x89PNG")


# --- the command ---------------------------------------------------------------------------------


def test_the_command(copy, tmp_path):
    folder, _ = copy
    remove("metrics.jsonl", "iteration_*")(folder)
    done = run_module("report", f"--workdir={folder}/", f"--png={tmp_path / 'png'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{folder}/report.html: 5 figures, 0.")
    assert done.stdout.endswith(f"{tmp_path}/png: 5 figures as PNG\n")
    assert (folder / "report.html").exists()
    wrong = run_module("report", f"--workdir={tmp_path / 'nothing'}")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert (
        wrong.stderr == f"error: {tmp_path}/nothing/config.json is missing: is {tmp_path}/nothing a run's?\n"
    )
    (folder / "summary.json").unlink()
    (tmp_path / "file").touch()
    assert run_module("report", f"--workdir={folder}", f"--output={tmp_path}/file/page.html").returncode == 1


# --- in a browser --------------------------------------------------------------------------------

_QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
_QUIET += "--disable-component-update --disable-sync"

# Each text's and curve's contrast with the ground behind it, by WCAG 2: [ratio, what], least first.
_CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].reduce((sum, value, n) => {
    const v = value / 255
    return sum + [0.2126, 0.7152, 0.0722][n] * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  }, 0)
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor)
      if (color.length < 4 || color[3] > 0) return color
    }
    return [255, 255, 255]
  }
  const found = []
  const add = (element, color, least) => {
    const [a, b] = [light(rgb(color)), light(ground(element))]
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    found.push([ratio / least, `${element.tagName} ${element.textContent.slice(0, 40)} ${ratio}`])
  }
  for (const element of document.querySelectorAll('body *')) {
    const style = getComputedStyle(element)
    if (element.closest('svg')) {
      if (element.tagName === 'text') add(element, style.fill, 4.5)
      if ((element.getAttribute('style') || '').includes('stroke: var(--c')) add(element, style.stroke, 3)
    } else if ([...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) {
      add(element, style.color, 4.5)
    }
  }
  return found.sort((a, b) => a[0] - b[0])
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if path is None:
        pytest.skip("no Chromium is here")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=_QUIET.split())
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=["a run", "long answers", "several runs"])
def shown(request, several, tmp_path_factory):
    """A page's file."""
    folder = tmp_path_factory.mktemp("shown")
    if request.param == "several runs":
        written(several, folder / "page.html")
        return folder / "page.html"
    copied = shutil.copytree(several[0], folder / "run")
    if request.param == "long answers":
        for path in copied.glob("*/samples.jsonl"):
            change(path, lambda row: {**row, "real": "x" * 300, "generated": LONG + "y" * 500})
        change(copied / "summary.json", lambda row: {**row, f"{'a_very_long_task_name' * 3}/acc": 0.5})
    written([copied], folder / "page.html")
    return folder / "page.html"


def open_page(browser, path, width, scheme):
    """The page, what it asked for, and what the browser complained of."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri(), wait_until="networkidle")
    return page, [url for url in asked if not url.startswith("data:")], complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_a_browser_shows_it(width, scheme, shown, browser):
    page, asked, complaints = open_page(browser, shown, width, scheme)
    assert asked == [shown.as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = page.evaluate(
        "[...document.querySelectorAll('figure text')].map(e => e.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 10  # pixels of a line: it can be read on a phone
    spilled = page.evaluate(
        "[...document.querySelectorAll('figure')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert spilled == 0
    contrasts = page.evaluate(_CONTRAST)
    assert len(contrasts) > 100
    assert contrasts[0][0] >= 1, contrasts[:3]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
    page.close()


def test_print_is_light(shown, browser):
    page, _, _ = open_page(browser, shown, 794, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    contrasts = page.evaluate(_CONTRAST)
    assert contrasts[0][0] >= 1, contrasts[:3]
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
