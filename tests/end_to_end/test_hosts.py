"""Several processes, and a workdir that is no disk: the same numbers, one writer, nothing lost."""

import collections
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from spin_jax.runtime import processes as hosts

RUN = [
    "--config=configs/tiny.py:smoke",
    "--config.sft.control=False",
    "--config.selfplay.iterations=1",
    "--config.train.epochs=4",
]
# Matrix products are cut by the size of the thread pool, which NPROC sets; else a process of four devices
# has a smaller one than a process of eight, and sums another order.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "NPROC": "8", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir, processes, …) → the processes, 8 simulated devices in all, started alike."""
    cache, started = tmp_path_factory.mktemp("cache"), []

    def start(workdir, processes, *flags, of_each=lambda number: [], **environment):
        port = free_port()
        xla = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={8 // processes}"
        env = os.environ | ENVIRONMENT | {"XLA_FLAGS": xla, "XDG_CACHE_HOME": str(cache)} | environment
        rest = [f"--workdir={workdir}", f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
        commands = [
            [sys.executable, "-m", "spin_jax.main", *RUN, *flags, *rest, f"--process_id={n}", *of_each(n)]
            for n in range(processes)
        ]
        now = [
            subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands
        ]
        started.extend(now)
        return now

    yield start
    for process in started:
        process.kill()


def ended(processes, code=0):
    """What each printed, gloo's greetings among it (of two threads, which tear each other's lines)."""
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(texts)
    return texts


def numbers(text):
    """The rows of metrics.jsonl, but for what a clock says."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "minutes")} for row in rows]


def kept(folder):
    """Models, answers and scores: {path: bytes}."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".parquet") or path.name == "samples.jsonl"
    }


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """One process with eight devices, uninterrupted; its sums go through gloo, as those of several do."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ended(start(workdir, 1))
    return workdir


def reached(workdir, step, processes):
    """Waits until a run has trained so far."""
    metrics, until = workdir / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and f'"phase": "train", "iteration": 0, "step": {step}' in metrics.read_text()):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.05)


def test_two_processes_and_then_one_are_one(start, whole, tmp_path):
    """SIGTERM to one of two while they train saves and stops both; one process goes on, to the bit."""
    workdir = tmp_path / "run"
    processes = start(workdir, 2)
    reached(workdir, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    first, second = ended(processes, 143)
    assert "to continue: python -m spin_jax.main" in first
    assert not re.search("iteration|step|continue", second), second  # process 0 speaks
    assert (workdir / "iteration_0" / "train").exists()
    assert not (workdir / "iteration_0" / "checkpoint").exists()

    ended(start(workdir, 1))
    assert numbers((workdir / "metrics.jsonl").read_text()) == numbers((whole / "metrics.jsonl").read_text())
    assert kept(workdir) == kept(whole)
    assert not list(workdir.rglob(".*.tmp"))


@pytest.mark.long
def test_where_one_is_killed_the_other_ends_and_both_go_on(start, whole, tmp_path):
    """kill -9 to one: the other ends by itself and says why; both, started again, come to the same."""
    workdir, flags = tmp_path / "run", ["--config.checkpoint.every_steps=3", "--heartbeat_s=10"]
    left, killed = start(workdir, 2, *flags)
    reached(workdir, 4, [left, killed])
    killed.kill()
    text, _ = left.communicate(timeout=60)  # the heartbeat, and what a busy machine takes
    assert left.returncode in (1, -signal.SIGABRT)  # by itself, or by JAX
    assert "this process cannot go on" in text or "another task died" in text
    ended(start(workdir, 2, *flags))
    assert numbers((workdir / "metrics.jsonl").read_text()) == numbers((whole / "metrics.jsonl").read_text())
    assert kept(workdir) == kept(whole)


@pytest.fixture
def bucket(monkeypatch):
    """(URL of a local stand-in for Google's store, how often each object was written)."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    storage = pytest.importorskip("gcp_storage_emulator.storage").Storage
    writes = collections.Counter()
    create = storage.create_file

    def counted(self, bucket, file_name, *arguments, **keywords):
        writes[file_name] += 1
        return create(self, bucket, file_name, *arguments, **keywords)

    monkeypatch.setattr(storage, "create_file", counted)
    port = free_port()
    running = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    running.start()
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    yield "gs://bucket/run", writes
    running.stop()


@pytest.mark.long
def test_an_object_store_serves_as_workdir(start, whole, bucket, tmp_path):
    """Two processes without a shared disk: no rename, no append, and no object of two writers."""
    url, writes = bucket
    ended(start(url, 2))
    more = {name: count for name, count in writes.items() if count > 1}
    seals = [more.pop(f"run/{folder}/model/SHA256SUMS") for folder in ("start", "iteration_0")]
    assert seals == [2, 2]  # without the card, and with it
    assert {name.split("/")[1] for name in more} <= {"metrics.jsonl", "summary.json", "tensorboard", "times.json"}, more
    for name in ("config.json", "summary.png", "iteration_0/model/config.json"):
        assert writes[f"run/{name}"] == 1

    import fsspec

    fsspec.filesystem("gs").get(f"{url}/", str(tmp_path / "copy") + "/", recursive=True)
    copy = tmp_path / "copy"
    assert numbers((copy / "metrics.jsonl").read_text()) == numbers((whole / "metrics.jsonl").read_text())
    assert kept(copy) == kept(whole)

    made = {name: count for name, count in writes.items() if "iteration_0/" in name or "start/" in name}
    (text,) = ended(start(url, 1))  # nothing is left to do
    assert "iterations 0 to 0, 1 of them done" in text
    again = {name for name, count in writes.items() if "checkpoint" in name or "pairs" in name}
    assert {name: writes[name] for name in writes if "iteration_0/" in name or "start/" in name} == made
    assert again


@pytest.mark.parametrize(
    ("flag", "first", "second"),
    [
        ("--config.data.path=absent.jsonl", "another process failed", "absent.jsonl"),
        ("--config.data.limit=100", "config or data differ between processes", "differs from process 0"),
    ],
)
def test_processes_that_differ_stop_before_anything_is_made(flag, first, second, start, tmp_path):
    processes = start(tmp_path / "run", 2, of_each=lambda number: [flag] * number)
    texts = ended(processes, 2)
    assert first in texts[0]
    assert second in texts[1]
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_only_one_process_sees_is_an_error(start, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    texts = ended(start(folders[0], 2, of_each=lambda number: [f"--workdir={folders[number]}"]), 2)
    assert "another process failed" in texts[0]
    assert "processes need one workdir" in texts[1]


def test_a_process_that_cannot_write_stops_all(start, tmp_path):
    """Where process 0's workdir is a file, both end, and soon."""
    (tmp_path / "run").write_text("")
    first, second = start(tmp_path / "run" / "deeper", 2)
    texts = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert first.returncode
    assert second.returncode == 1
    assert "Not a directory" in texts[0]
    assert "another process failed" in texts[1]


def test_incomplete_flags_are_an_error():
    with pytest.raises(ValueError, match="go together"):
        hosts.connect("localhost:1234", None, None)
    with pytest.raises(ValueError, match="go together"):
        hosts.connect(None, 2, 0)


def test_alone_nothing_is_asked():
    assert hosts.first()
    assert hosts.turn(5)
    assert hosts.most(15) == 15
    assert hosts.exchanged([1, 2]) == [[1, 2]]
    hosts.check_same("anything", lambda: b"")
    with pytest.raises(ValueError, match="mine"):
        hosts.together(lambda: int("mine"))
