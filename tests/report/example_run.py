"""Runs as a report finds them, with made-up numbers, and how a test reads the page."""

import base64
import html.parser
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_jax import config
from spin_jax.data import parquet
from spin_jax.data.records import Pair
from spin_jax.report import page
from spin_jax.selfplay import fingerprints
from spin_jax.storage import files, metrics


def write_run(folder, iterations=2, steps=20, **sections):
    """What a run leaves that a report reads, by the package's own writers; numbers are made up."""
    given = {"model": {"path": "org/base"}, "data": {"path": "org/chat"}, "eval": {"verifier": "exact"}}
    resolved = config.resolve({**given, "selfplay": {"iterations": iterations}, **sections})
    record = {
        "config": fingerprints.recorded(resolved),
        "model_revision": "0123abcd",
        "data_revision": "4567ef",
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


# --- changes to a run ---------------------------------------------------------------------------


def change(path, function):
    """Applies a function to each row of a JSON list or of JSONL."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(function(row)) + "\n" for row in rows))
    else:
        path.write_text(json.dumps([function(row) for row in json.loads(path.read_text())]))


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


# --- pages ---------------------------------------------------------------------------------------


def written(workdirs, output):
    page.write([str(path) for path in workdirs], str(output))
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

    @property
    def charts(self):
        """(description, SVG text) of each."""
        images = [attributes for tag, attributes in self.tags if tag == "img"]
        return [(a["alt"], base64.b64decode(a["src"].partition("base64,")[2]).decode()) for a in images]
