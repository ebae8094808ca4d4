"""The page of a run: what is on it, and what it says of what is missing."""

import json
import math
import re
from xml.etree import ElementTree

import pytest
from example_run import Page, change, only_generated, remove, rows, without, written
from runs import run_module

from spin_jax.storage import files

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
        "log p of preferred answers may fall while the margin grows",
        "Above 0: 67%, 67%.",
        "human generated, by the start",
        "Means: 4.8 and 4.0 tokens.",
        "Question 0? human 42 start a guess iteration 0 answer of 0 iteration 1 answer of 1",
        "commit c0ffee",
        "model org/base at 0123abcd data org/chat at 4567ef (60 examples, 6 prompts held out)",
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
    assert len(page.charts) == len(titles)
    description, drawing = page.charts[1]
    assert "NLL: from 0.9 to 0.7; SFT control: from 0.9 to 0.85" in description
    assert "nats a token" in drawing


def test_the_page_stands_alone_and_is_the_same_each_time(finished, tmp_path):
    text = written([finished], tmp_path / "page.html")
    assert text == written([finished], tmp_path / "again.html")
    assert "://" not in text
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object"}
    assert all(a["src"].startswith("data:image/svg+xml;base64,") for tag, a in page.tags if tag == "img")
    assert [a["href"] for tag, a in page.tags if tag == "link"] == ["data:,"]
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', text)
    assert len(used) == 7
    assert set(used) <= set(ids)


@pytest.mark.parametrize(
    "hostile",
    ["<script>alert(1)</script>", "</dd></article>&amp;\"'", "{{ 7 * 7 }}", "$x_{$ _y", "\ud800\x01"],
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
    assert all(ElementTree.fromstring(drawing).tag.endswith("svg") for _, drawing in shown.charts)


def test_secrets_stay_out(copy, monkeypatch):
    folder, page = copy
    monkeypatch.setenv("SOME_TOKEN", "correct horse battery")
    secrets = "hf_abcdefgh12345678", "correct horse battery"
    for path in folder.glob("*/samples.jsonl"):
        change(path, lambda row: {**row, "generated": " ".join(secrets)})
    change(folder / "summary.json", lambda row: {**row, f"{secrets[0]}/acc": 0.5})
    change(folder / "metrics.jsonl", lambda row: {**row, f"{secrets[1]} curve": 0.5})
    text = page()
    assert "[secret] [SOME_TOKEN]" in text
    assert "<b>[SOME_TOKEN] curve</b>" in text
    assert not [secret for secret in secrets if secret in text]


# --- what may be missing -------------------------------------------------------------------------


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


CALLS = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "sum", "arguments": {"é": "<b>"}}}]},
    {"role": "tool", "content": "3"},
]


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
        (
            rows(lambda row: {**row, "nll": math.nan, "margin": None, "control": {"nll": None}}),
            "NLL of the human's, nats a token NaN NaN NaN SFT control NaN NaN NaN",
        ),
        (rows(lambda row: {**row, "steps": None, "gsm8k/acc": None}), "gsm8k/acc NaN NaN NaN"),
        (rows(not_finite, "metrics.jsonl"), "20 of 40 steps have no finite value"),
        (rows(only_generated, "metrics.jsonl"), "Rewards"),
        (rows(lambda row: {**row, "stopped": "no better"}), "Stopped early: no better."),
        (rows(lambda row: {**row, "novel": 7.5}, "metrics.jsonl"), "novel"),
        (
            rows(lambda row: {**row, "prompt": CALLS}, "start/samples.jsonl"),
            'user 1+2? assistant [{"function": {"name": "sum", "arguments": {"é": "<b>"}}}] tool 3',
        ),
    ],
)  # fmt: skip
def test_a_page_of_what_there_is(lose, said, copy):
    folder, page = copy
    lose(folder)
    assert said in Page(page()).words


def test_a_local_path_is_no_hub_id_wherever_the_report_is_made(copy, tmp_path, monkeypatch):
    """The run was made where these were folders; the report is made where they are not there."""
    folder, page = copy
    record = json.loads((folder / "config.json").read_text())
    record["config"]["model"]["path"], record["config"]["data"]["path"] = "models/base", "data/sums"
    record |= {"model_revision": None, "data_revision": None}
    (folder / "config.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    elsewhere = Page(page()).words
    assert "base on sums (60 examples, 6 prompts held out): logistic" in elsewhere
    assert "model base data sums (60" in elsewhere
    for path in ("models/base", "data/sums"):
        (tmp_path / path).mkdir(parents=True)
    assert Page(page()).words == elsewhere


def test_hub_ids_stay_where_folders_have_their_names(copy, tmp_path, monkeypatch):
    _, page = copy
    for path in ("org/base", "org/chat"):
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "org/base on org/chat (60 examples" in Page(page()).words


def test_several_datasets_are_named(copy):
    folder, page = copy
    record = json.loads((folder / "config.json").read_text())
    record["config"]["data"]["path"] = "org/chat, data/sums.jsonl"
    record["data_revision"] = {"org/chat": "4567ef", "data/sums.jsonl": None}
    (folder / "config.json").write_text(json.dumps(record))
    words = Page(page()).words
    assert "org/base on org/chat, sums.jsonl (60 examples" in words
    assert "data org/chat at 4567ef, sums.jsonl (60 examples" in words


def test_without_iterations_there_are_no_charts_of_them(copy):
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
                file.write(json.dumps({**row, "real_logp": -300.0 + step % 7, "generated_logp": -310.0}) + "\n")
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


# --- the command ---------------------------------------------------------------------------------


def test_the_command(copy, tmp_path):
    folder, _ = copy
    remove("metrics.jsonl", "iteration_*")(folder)
    done = run_module("report", f"--workdir={folder}/", f"--png={tmp_path / 'png'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{folder}/report.html: 5 charts, 0.")
    assert done.stdout.endswith(f"{tmp_path}/png: 5 charts as PNG\n")
    assert (folder / "report.html").exists()
    wrong = run_module("report", f"--workdir={tmp_path / 'nothing'}")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"error: {tmp_path}/nothing/config.json is missing: is {tmp_path}/nothing a run's?\n"
    (folder / "summary.json").unlink()
    (tmp_path / "file").touch()
    assert run_module("report", f"--workdir={folder}", f"--output={tmp_path}/file/page.html").returncode == 1
