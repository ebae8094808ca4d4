"""What the commands print without a run: help, the nearest flag, the config as a tree."""

import re
import time

import pytest
from runs import ROOT, run_module

from spin_jax import config
from spin_jax.selfplay import announce


def _source(module):
    file, package = ROOT / "spin_jax" / f"{module}.py", ROOT / "spin_jax" / module / "__main__.py"
    return (package if package.exists() else file).read_text()


@pytest.mark.parametrize("module", ["main", "pairs", "plan", "benchmark", "evaluate", "report"])
def test_help_names_every_flag_and_exit_code(module):
    began = time.monotonic()
    result = run_module(module, "--help")
    assert module in ("plan", "benchmark") or time.monotonic() - began < 4  # a busy machine; alone 0.2 s
    assert (result.returncode, result.stderr) == (0, "")
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', _source(module))
    assert len(defined) >= 3
    for name in defined:
        assert f"--{name}" in result.stdout
    assert f"python -m spin_jax.{module} --" in result.stdout
    assert "Exit codes: 0 " in result.stdout
    assert ("spin_jax/config.py" in result.stdout) == (module in ("main", "plan", "benchmark"))
    assert "absl" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110


def test_main_tells_of_other_processes_and_libraries_flags():
    said = run_module("main", "--config=no_such_file.py", "--helpfull").stdout
    for name in ("coordinator", "num_processes", "process_id", "heartbeat_s", "verbosity"):
        assert f"--{name}" in said


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("main", ["--config=configs/tiny.py", "--workdri=x"], "no flag --workdri; did you mean --workdir?"),
        ("main", ["--confg=configs/tiny.py"], "no flag --confg; did you mean --config?"),
        ("main", ["--conifg.loss.beta=1"], "no flag --conifg.loss.beta; did you mean --config.loss.beta?"),
        ("main", ["--chekc"], "no flag --chekc; did you mean --check?"),
        ("main", ["--processid=1"], "no flag --processid; did you mean --process_id?"),
        ("main", ["--zzzzzz"], "no flag --zzzzzz; see --help"),
        ("main", ["--verbosiy=1"], "no flag --verbosiy; see --help"),  # a library's
        ("main", [], "--config and --workdir are needed; see --help"),
        ("pairs", ["--workdir=x"], "--workdir is needed, and --output or --prompts; see --help"),
        ("pairs", ["--workdir=x", "--output=y"], "--output needs --iteration: whose pairs?"),
        ("pairs", ["--workdir=x", "--ouput=y"], "no flag --ouput; did you mean --output?"),
        ("report", [], "--workdir is needed; see --help"),
        (
            "report",
            ["--workdir=a,b"],
            "several workdirs need --output=FILE.html: their page has no folder of its own",
        ),
        ("report", ["--workdir=a", "--workdir=b,a"], "--workdir names a twice"),
        ("report", ["--workdri=x"], "no flag --workdri; did you mean --workdir?"),
    ],
)
def test_mistyped_flags(module, arguments, said):
    """No JAX is imported for that: it would fail here."""
    result = run_module(module, *arguments, JAX_NUM_CPU_DEVICES="none at all")
    assert (result.returncode, result.stderr) == (2, f"error: {said}\n")


def test_the_config_as_a_tree():
    c = config.resolve({"model": {"path": "m"}, "data": {"path": "d"}, "loss": {"beta": (0.1, 0.2, 5.0)}})
    assert announce.config_tree(c).splitlines() == [
        "config (what is not the default)",
        "  data",
        "    path  d              (unset)",
        "  loss",
        "    beta  0.1, 0.2, 5.0  (0.1)",
        "  model",
        "    path  m              (unset)",
    ]
    whole = announce.config_tree(c, everything=True).splitlines()
    marked = [line.split()[1] for line in whole if line.startswith("*")]
    assert marked == ["path", "beta", "path"]
    keys = sum(1 if not hasattr(v, "keys") else 1 + len(v) for v in config.default().values())
    assert len(whole) == 1 + keys - 1  # a line each, but for model.architecture, which is empty
    with_architecture = config.resolve({"model": {"architecture": {"x": "y" * 99}}, "data": {"path": "d"}})
    assert re.search(r"\n    architecture\n +x +y{59}…\n?", announce.config_tree(with_architecture))
    assert announce.config_tree(config.default()) == "config: the defaults"
