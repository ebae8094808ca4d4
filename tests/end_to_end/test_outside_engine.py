"""A whole run whose opponent's answers come from completion servers, and one whose servers misbehave."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from completion_server import FAULTS, Server, answer
from runs import ROOT, Command, differences, read_metrics, read_pairs

from spin_jax import config, pairs
from spin_jax.selfplay.prepare import prepare

FLAGS = (
    "--config.data.limit=24",
    "--config.data.today=2026-01-31",
    "--config.sft.epochs=1",
    "--config.sft.batch_size=8",
    "--config.sft.control=False",
    "--config.train.batch_size=16",
    "--config.eval.kl=False",
    "--config.selfplay.samples=2",
    "--config.sampling.shard_size=8",
    "--config.sampling.batch_size=4",
)
COMMAND = f"{sys.executable} {ROOT}/tests/helpers/completion_server.py --port={{port}} --model={{model}}"
KEY = "0123456789-a-key-of-no-known-form"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, output) of an undisturbed run, for which sampling.command starts a well-behaved server."""
    workdir = tmp_path_factory.mktemp("outside") / "run"
    return workdir, Command()(workdir, *FLAGS, f"--config.sampling.command={COMMAND}")


def test_the_command_answers_for_the_opponent_of_each_iteration(whole):
    workdir, output = whole
    assert f"\nengine     {COMMAND}\n" in output
    for t, model in ((0, "start"), (1, "iteration_0")):
        assert f"serving {workdir / model / 'model'}" in (workdir / f"iteration_{t}" / "engine.log").read_text()
        rows = read_pairs(workdir / f"iteration_{t}" / "pairs")
        ids = [(row["prompt_id"], row["sample_id"]) for row in rows]
        assert len(ids) == len(set(ids)) == 22 * 2 + 2  # of held-out prompts one answer
        assert not [row for row in rows if len(row["prompt_tokens"]) + len(row["generated_tokens"]) > 16]
    assert not servers_of(workdir)
    assert (workdir / "config.json").read_text().count("completion_server.py") == 1


def servers_of(workdir):
    """The processes whose command line names the workdir's exports."""
    names = [path.read_bytes().decode() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [name for name in names if "completion_server" in name and str(workdir) in name]


def test_servers_that_misbehave_and_a_kill_change_nothing(whole, tmp_path, monkeypatch):
    """All faults, a server that ends and comes back, kill -9 while it samples, and other addresses afterwards."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    workdir, models = tmp_path / "run", ["/exports/run/start/model", "/exports/run/iteration_0/model"]
    options = {"faults": FAULTS, "key": KEY, "slow_s": 0.5}
    servers = [Server(models, **options), Server(models, **options)]

    def engine(*used):
        return "--config.sampling.engine=" + ",".join(f"{server.address}/v1" for server in used)

    log = tmp_path / "log"
    with log.open("w") as file:
        run = Command().start(workdir, *FLAGS, engine(*servers), stdout=file)
        try:
            wait_for(lambda: servers[0].asked, run, log)
            servers[0].close()
            time.sleep(0.3)
            servers[0] = Server(models, port=servers[0].server_address[1], **options)
            wait_for(lambda: list((workdir / "iteration_0" / "pairs").glob("train-*")), run, log)
        finally:
            run.kill()
            run.wait()
    files = sorted((workdir / "iteration_0" / "pairs").glob("train-*"))
    assert 1 <= len(files) < 3
    before = {path: path.read_bytes() for path in files}
    servers[1].close()
    servers[1] = Server(models, **options)
    output = Command()(workdir, *FLAGS, engine(servers[1]))
    servers[0].close()
    servers[1].close()

    assert {path: path.read_bytes() for path in files} == before
    assert f"continues although sampling.engine was '{servers[0].address}/v1" in output
    assert "differs" not in (found := "\n".join(different(workdir, whole[0]))), found
    assert not found
    for t in (0, 1):
        for row in read_pairs(workdir / f"iteration_{t}" / "pairs"):
            of_prompt = [asked for asked in servers[1].asked if asked["prompt"] == row["prompt_tokens"]]
            rights = [answer(one["prompt"], one["seed"], one["max_tokens"], one["stop_token_ids"]) for one in of_prompt]
            assert t == 0 or row["generated_tokens"] in rights
    printed = output + log.read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert KEY not in printed
    assert not written
    rows = [row for row in read_metrics(workdir) if row["phase"] == "sample"]
    assert sum(row["prompts"] for row in rows) == 2 * 46


def wait_for(condition, run, log, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.01)


def different(ours, theirs):
    """All differences of two runs, but for what names the engine."""
    named = ("engine.log", "config.json", "README.md", "SHA256SUMS")
    return [line for line in differences(ours, theirs) if not any(name in line for name in named)]


def test_k_answers_go_out_and_come_back_by_files(whole, tmp_path):
    """pairs --prompts and launch/vllm_answers.py give each prompt its K answers; the run reads its own pairs again."""
    workdir, prompts, given = tmp_path / "run", tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    shutil.copytree(whole[0], workdir)
    known = read_pairs(workdir / "iteration_0" / "pairs")
    shutil.rmtree(workdir / "iteration_0" / "pairs")
    assert pairs.write_prompts(str(workdir), str(prompts), 0).startswith(f"{prompts}: 24 prompts of iteration 0")
    samples = [json.loads(line)["samples"] for line in prompts.read_text().splitlines()[1:]]
    assert samples == [2] * 22 + [1] * 2

    (tmp_path / "site").mkdir()
    shutil.copy(ROOT / "tests" / "helpers" / "vllm_stub.py", tmp_path / "site" / "vllm.py")
    answers = [[row["prompt_tokens"], row["generated_tokens"]] for row in known]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    done = subprocess.run(
        [sys.executable, "-S", "launch/vllm_answers.py", f"--prompts={prompts}", f"--output={given}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "VLLM_STUB": str(tmp_path / "answers.json")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "46 pairs for iteration 0" in done.stdout, done.stderr

    c = config.resolve(json.loads((workdir / "config.json").read_text())["config"])
    prepared = prepare(c.changed({"selfplay.pairs": f"0={given}"}), None)
    found = [pair for split in prepared.given_pairs(0) for pair in split]
    assert [len(split) for split in prepared.given_pairs(0)] == [44, 2]

    def content(row):
        return row["prompt_id"], row["sample_id"], row["prompt_tokens"], row["real_tokens"], row["generated_tokens"]

    ours = [(p.prompt_id, p.sample_id, p.prompt.tolist(), p.real.tolist(), p.generated.tolist()) for p in found]
    assert sorted(ours) == sorted(map(content, known))
