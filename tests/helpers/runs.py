"""Runs of the command, started as a user starts them, and how two of them are compared."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq

from spin_jax.runtime import platforms

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
FAST_COMPILATION = "--xla_backend_optimization_level=0"


def inherited_environment():
    """This process's, less the variables of a TPU host, which `plan` leaves behind a test that compiles for one."""
    return {name: value for name, value in os.environ.items() if name not in platforms.TPU_VARIABLES}


class Command:
    """`python -m spin_jax.main` on a number of simulated devices."""

    def __init__(self, cache: pathlib.Path | None = None):
        """`cache` is where compiled programs are kept; None: where the tests' are."""
        self.cache = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache)}

    def environment(self, devices=1, fast_compilation=True):
        flags = FAST_COMPILATION if fast_compilation else ""
        return {
            **inherited_environment(),
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
            **self.cache,
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, workdir, *arguments, config="configs/tiny.py:smoke", stdout=subprocess.PIPE, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "spin_jax.main", f"--config={config}", f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=self.environment(**environment),
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, workdir, *arguments, expect=0, **options):
        process = self.start(workdir, *arguments, **options)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == expect, output
        return output


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    """Rows less what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "minutes")} for row in rows]


def read_pairs(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def step_of(row):
    """What a row of metrics.jsonl is about; no two rows are about the same."""
    return row["phase"], row["iteration"], row["step"]


def assert_same_run(a, b, iterations=(0, 1)):
    """Pairs, scores, weights and numbers of two runs, to the bit."""
    for t in iterations:
        for kind in ("pairs", "scores"):
            assert read_pairs(a / f"iteration_{t}" / kind) == read_pairs(b / f"iteration_{t}" / kind)
        ours, theirs = (weights(x / f"iteration_{t}" / "model") for x in (a, b))
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert without_times(json.loads((a / "summary.json").read_text())) == without_times(
        json.loads((b / "summary.json").read_text())
    )
    ours, theirs = (sorted(without_times(read_metrics(x)), key=step_of) for x in (a, b))
    assert [step_of(row) for row in ours] == [step_of(row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other or mine["phase"] in ("sample", "score")


def differences(ours, theirs):
    """Where two finished runs differ: every file, tensor, row and number but those that a clock decides."""
    found = []
    mine, others = _compared(ours), _compared(theirs)
    for name in sorted(mine ^ others):
        found.append(f"{name} is only in {ours if name in mine else theirs}")
    for name in sorted(mine & others):
        a, b = _parts(ours / name), _parts(theirs / name)
        parts = [str(part) for part in dict.fromkeys([*a, *b]) if a.get(part) != b.get(part)]
        if parts or list(a) != list(b):
            found.append(f"{name} differs: {', '.join(parts[:5]) or 'its order'} ({len(parts)} in all)")
    for run in (ours, theirs):
        steps = [step_of(row) for row in read_metrics(run)]
        found += [f"{run}/metrics.jsonl has {step} twice" for step in set(steps) if steps.count(step) > 1]
    return found


def _compared(workdir):
    """What a run leaves: its checkpoints, as one thing each, and all files but TensorBoard's."""
    names = set()
    for path in workdir.rglob("*"):
        name = path.relative_to(workdir)
        if path.is_file() and name.parts[0] != "tensorboard" and not name.name.startswith("."):
            inside = name.parts.index("checkpoint") + 1 if "checkpoint" in name.parts else None
            names.add(pathlib.Path(*name.parts[:inside]))
    return names


def _parts(path):
    """{part: content} of a file or checkpoint, in order."""
    from safetensors.numpy import load_file

    if path.name == "times.json":
        return {}
    if path.name == "checkpoint":
        return _tensors(_load_checkpoint(path))
    if path.suffix == ".safetensors":
        return _tensors(load_file(path))
    if path.name == "adapter_config.json":  # it names its base by the whole path
        settings = json.loads(path.read_text())
        return settings | {"base_model_name_or_path": settings["base_model_name_or_path"].split("/")[-2:]}
    if path.name == "SHA256SUMS" and "adapter_config.json" in path.read_text():
        lines = path.read_text().splitlines()[1:]
        return {line: "" for line in lines if not line.endswith("adapter_config.json")}
    if path.suffix == ".parquet":
        return {f"row {number}": repr(row) for number, row in enumerate(pq.read_table(path).to_pylist())}
    if path.name == "metrics.jsonl":
        return {step_of(row): repr(row) for row in without_times(read_metrics(path.parent))}
    if path.name == "summary.json":
        return {row["iteration"]: repr(row) for row in without_times(json.loads(path.read_text()))}
    return {"its bytes": path.read_bytes()}


def _tensors(arrays):
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in arrays.items()}


def _load_checkpoint(path):
    """{name: array} of what orbax keeps, whatever devices wrote it."""
    import jax
    from orbax.checkpoint import v1 as ocp

    stored = ocp.metadata(path).metadata
    loaded = ocp.load(path, jax.tree.map(lambda x: np.empty(x.shape, x.dtype), stored))
    return {jax.tree_util.keystr(key): x for key, x in jax.tree_util.tree_flatten_with_path(loaded)[0]}


def run_module(module, *arguments, **environment):
    """What `python -m spin_jax.<module>` does with these arguments: a CompletedProcess."""
    return subprocess.run(
        [sys.executable, "-m", f"spin_jax.{module}", *arguments],
        cwd=ROOT,
        env={**inherited_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
