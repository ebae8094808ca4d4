"""The command line: overrides, mistakes, exit codes."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from runs import ROOT

from spin_jax import config as config_lib
from spin_jax import config_values, errors


def command(*arguments, timeout=120):
    """Runs main as a user does; on one device, whatever the test session has."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        [sys.executable, "-m", "spin_jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.loss.betta=1", "did you mean loss.beta?"),
        ("--config.los.beta=1", "did you mean loss?"),
        ("--config.train.batchsize=1", "did you mean train.batch_size?"),
        ("--config.seed.x=1", "config has no key seed.x"),
        ("--config.data.limit=abc", "config.data.limit=abc: a whole number is wanted"),
        ("--config.loss.beta=0", "loss.beta=(0,): above 0"),
        ("--config.loss.beta=(1.0,2.0)", "loss.beta has 2 values for 3 iterations"),
        ("--config.train.epochs=1.5", "train.epochs=(1.5,): a whole number is wanted"),
        ("--config.model.dtype=int8", "model.dtype='int8'"),
        ("--config.selfplay.start=9", "selfplay.start=9: at most selfplay.iterations=3"),
        ("--config.selfplay.pairs=7=x", "selfplay.pairs gives pairs for iteration 7"),
        ("--confg=x", "confg"),
        ("--only=tune", "only"),
        ("surplus", "unexpected argument 'surplus'"),
    ],
)
def test_mistakes_are_named_at_once(tmp_path, argument, message):
    """Before JAX is imported: within 2 seconds (a busy machine is given 4)."""
    began = time.monotonic()
    result = command("--config=configs/tiny.py", f"--workdir={tmp_path}", argument)
    assert time.monotonic() - began < 4
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.loss.name=logistik", "choose from logistic"),
        ("--config.mesh.fsdp=3", "asks for 3 devices and there are 1"),
        ("--config.eval.verifier=nobody", "eval.verifier='nobody'"),
        ("--config.model.path=/no/such/model", "no such directory"),
        ("--config.data.path=/no/such/file.jsonl", "no such file or directory"),
        ("--config.train.optimizer=adam", "choose from rmsprop, adamw, adafactor"),
        ("--config.sft.schedule=lin", "choose from linear, cosine, constant"),
        ("--config.sampling.top_p=1.5", "top_p=1.5"),
    ],
)
def test_impossible_runs_say_why(tmp_path, argument, message):
    result = command("--config=configs/tiny.py:smoke", f"--workdir={tmp_path / 'run'}", argument)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_unset_paths():
    with pytest.raises(errors.ConfigError, match=r"model\.path is not set"):
        config_lib.resolve({"data": {"path": "x"}})
    with pytest.raises(errors.ConfigError, match=r"data\.path is not set"):
        config_lib.resolve({"model": {"path": "x"}})


def test_resolve_lays_over_the_defaults():
    config = config_lib.resolve(
        {"model": {"path": "m"}, "data": {"path": "d"}, "loss": {"beta": 0.5}, "train": {"epochs": [1, 2, 3]}}
    )
    assert config.loss.beta == (0.5,)
    assert config.train.epochs == (1, 2, 3)
    assert config.sampling.max_new_tokens == config_lib.default().sampling.max_new_tokens
    assert [config_values.per_iteration(config.train.epochs, t) for t in range(3)] == [1, 2, 3]
    with pytest.raises(errors.ConfigError, match=r"did you mean train\.clip_norm"):
        config_lib.resolve({"train": {"clipnorm": 1.0}})
    with pytest.raises(errors.ConfigError, match="seed='x': a whole number is wanted"):
        config_lib.resolve({"seed": "x"})


def test_longer_tuples_are_cut_to_the_iterations():
    config = config_lib.default()
    config.model.path = config.data.path = "x"
    config.selfplay.iterations = 2
    config.loss.beta = (0.1, 0.2, 5.0)
    assert config_values.per_iteration(config_lib.resolve(config).loss.beta, 1) == 0.2


def test_pairs_by_iteration():
    config = config_lib.default()
    config.selfplay.start, config.selfplay.iterations = 1, 4
    config.selfplay.pairs = "a, b,0=c"
    assert config_values.given_pairs(config) == {1: "a", 2: "b", 0: "c"}
    for twice, said in (
        ("0=a,0=b", "0 twice, a and b"),
        ("a,b,1=c", "1 twice, a and c"),
        ("1=a,b", "1 twice, a and b"),
    ):
        config.selfplay.pairs = twice
        with pytest.raises(errors.ConfigError, match=f"selfplay.pairs gives pairs for iteration {said}: give one"):
            config_values.given_pairs(config)


@pytest.mark.parametrize("name", ["tiny.py", "tiny.py:smoke", "zephyr.py", "zephyr.py:official", "small_gsm8k.py"])
def test_shipped_configs_are_whole(name):
    """Every config is accepted as it is; small_gsm8k asks for its two paths."""
    from ml_collections import config_flags

    del config_flags
    path, _, variant = name.partition(":")
    namespace = {}
    exec(compile((ROOT / "configs" / path).read_text(), path, "exec"), namespace)
    config = namespace["get_config"](*[variant] if variant else [])
    if path == "small_gsm8k.py":
        config.model.path, config.data.path = "x", "y"
    resolved = config_lib.resolve(config)
    assert "python -m spin_jax.main" in namespace["__doc__"]
    if path == "zephyr.py":
        assert resolved.loss.beta == (0.1, 0.1, 0.1, 5.0)
        assert resolved.train.learning_rate == (5e-7, 5e-7, 1e-7, 1e-7)
        assert resolved.official == (variant == "official")


def test_every_key_is_read():
    """A key that nothing reads is dead: each last name occurs in the package outside of config.py."""
    sources = "".join(path.read_text() for path in (ROOT / "spin_jax").rglob("*.py") if path.name != "config.py")
    checks = (ROOT / "spin_jax" / "config.py").read_text().partition("def given_pairs")[2]

    def keys(section, prefix=""):
        for key, value in section.items():
            if hasattr(value, "items"):
                yield from keys(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    for name in keys(config_lib.default()):
        last = name.rpartition(".")[2]
        assert re.search(rf"\b{last}\b", sources + checks), name


def test_every_dependency_is_imported_and_torch_is_not():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = "".join(path.read_text() for path in (ROOT / "spin_jax").rglob("*.py"))
    modules = {"absl-py": "absl", "orbax-checkpoint": "orbax", "etils": "etils"}
    for requirement in project["dependencies"]:
        name = requirement.partition(">=")[0].partition("[")[0]
        module = modules.get(name, name)
        assert f"import {module}" in sources or f"from {module}" in sources, name
    assert "import torch" not in sources
    assert "from torch" not in sources


def test_nothing_imports_torch_at_run_time():
    """The whole package imports with torch forbidden, and its names are handed on lazily."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import spin_jax; assert 'jax' not in sys.modules\n"
        "import spin_jax.main, spin_jax.selfplay, spin_jax.data.official, spin_jax.report, spin_jax.tiny\n"
        "print([getattr(spin_jax, name).__name__ for name in spin_jax.__all__])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = ["spin_jax.config", "generate", "load", "logits", "spin_jax.losses", "run", "save", "score"]
    assert json.loads(result.stdout.replace("'", '"')) == expected


def test_unknown_name():
    import spin_jax

    with pytest.raises(AttributeError, match="nonsense"):
        _ = spin_jax.nonsense
