"""Measures start-ups of runs on many short rows: seconds, and the peak of the host's memory before training.

    python tests/helpers/host_memory.py 10000 100000 1000000

For each number of rows it starts a run three times in new processes: with an empty cache; with the cache, as a new run
on the same data starts; and with the cache and a workdir, as a run that continues starts. Nothing is trained.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]


def write_rows(path, count):
    """Distinct rows of about 60 bytes."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for number in range(count):
            a, b = rng.randrange(1000), rng.randrange(1000)
            file.write(json.dumps({"question": f"{number}: {a}+{b}", "answer": str(a + b)}) + "\n")


def start(path, workdir):
    """One start-up in this process; returns what it took, in seconds and MiB, with what is in memory afterwards."""
    sys.path.insert(0, str(ROOT))
    began = time.perf_counter()
    import runpy

    from spin_jax import config
    from spin_jax.runtime import processes
    from spin_jax.selfplay import announce
    from spin_jax.selfplay.prepare import locked, prepare

    c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")
    c.data.path, c.data.limit, c.lengths.max_prompt, c.lengths.max_length = str(path), None, 24, 32
    processes.first()
    prepared = prepare(config.resolve(c), str(workdir))
    with locked(prepared):
        announce.run_overview(prepared, 0)
    seconds = time.perf_counter() - began
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    cpu = sum(os.times()[:4])
    memory = {name: int(status[name].split()[0]) // 1024 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}
    return {"seconds": round(seconds, 1), "cpu": round(cpu, 1), **memory, "examples": sum(map(len, prepared.datasets))}


def main(counts):
    print(f"{'rows':>9} {'start':<10} {'seconds':>8} {'CPU s':>7} {'peak MiB':>9} {'after MiB':>9} {'of it ours':>10}")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "rows.jsonl"
            write_rows(path, count)
            for name, workdir in (("first", "a"), ("cached", "b"), ("continued", "a")):
                environment = {**os.environ, "SPIN_JAX_CACHE": f"{folder}/cache", "JAX_PLATFORMS": "cpu"}
                command = [sys.executable, __file__, str(path), f"{folder}/{workdir}"]
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                shown = found["seconds"], found["cpu"], found["VmHWM"], found["VmRSS"], found["RssAnon"]
                print("{:>9} {:<10} {:>8} {:>7} {:>9} {:>9} {:>10}".format(count, name, *shown), flush=True)
            size = sum(file.stat().st_size for file in pathlib.Path(folder, "cache").rglob("*") if file.is_file())
            print(f"{count:>9} on disk: {path.stat().st_size >> 20} MiB of rows, {size >> 20} MiB of examples")


if __name__ == "__main__":
    if len(sys.argv) == 3 and not sys.argv[1].isdecimal():
        print(json.dumps(start(*sys.argv[1:])))
    else:
        main(list(map(int, sys.argv[1:])))
