"""The benchmark command as its user runs it, and the arithmetic behind MFU and roofline."""

import json
import os
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT

from spin_jax.kernels.layout import Layout
from spin_jax.models import cost, loading
from spin_jax.models.decoder import Decoder, forward, output_head, project
from spin_jax.models.params import abstract_params
from spin_jax.plan import machine
from spin_jax.runtime import chips
from spin_jax.selfplay import from_config


def run(*flags, cache, devices=1):
    """(exit code, the JSON object of the last line or None, stderr)."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "spin_jax.benchmark", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else None, done.stderr


def test_on_a_config_alone(tmp_path):
    """Random weights and pairs; a trace is left."""
    code, result, error = run(
        "--config=configs/tiny.py",
        "--config.lengths.expected=(8,3,3)",
        "--batch_size=16",
        "--steps=2",
        "--num_prompts=8",
        f"--profile={tmp_path / 'trace'}",
        cache=tmp_path,
    )
    assert code == 0, error
    assert result["train"]["step_s"] > 0
    assert result["train"]["pairs_per_s"] == pytest.approx(16 / result["train"]["step_s"])
    assert result["train"]["trained"] == result["model"]["parameters"]
    assert 0 <= result["train"]["padding"] < 1
    assert 0 <= result["train"]["input_wait"] < 1
    assert result["train"]["mfu"] is None  # a CPU has no peak in the table
    assert result["sample"]["roofline"] is None
    assert result["sample"]["new_tokens"] == 4
    assert result["score"]["real_tokens_per_s"] > 0
    assert result["compile_s"] > 0
    assert 0.1 < result["peak_host_gb"] < 24
    assert result["versions"]["jax"] == jax.__version__
    assert list((tmp_path / "trace" / "train").rglob("*.xplane.pb"))
    assert list((tmp_path / "trace" / "sample").rglob("*.xplane.pb"))


def test_adapters_alone_are_trained_and_all_slots_are_busy(tmp_path):
    """Adapters of rank 2 for the queries. Each of two devices has a copy of the weights, and 3 slots."""
    code, result, error = run(
        "--config=configs/tiny.py:smoke",
        "--config.train.lora_rank=2",
        "--config.train.lora_targets=('wq',)",
        "--config.sampling.batch_size=3",
        "--config.sampling.tensor=1",
        "--batch_size=16",
        "--steps=1",
        devices=2,
        cache=tmp_path,
    )
    assert code == 0, error
    c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke").model.architecture
    queries = c.num_attention_heads * c.get("head_dim", c.hidden_size // c.num_attention_heads)
    assert result["train"]["trained"] == 2 * c.num_hidden_layers * (c.hidden_size + queries)
    assert result["train"]["trained"] < result["model"]["parameters"]
    assert result["sample"]["prompts"] == result["sample"]["slots"] == 6


def test_on_a_model_and_data(tiny_dir, tmp_path):
    """Pairs and prompts in the published format; every pair is scored."""
    rows = [
        {
            "real": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * n}],
            "generated": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "c"}],
        }
        for n in range(1, 7)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, result, error = run(
        f"--model={tiny_dir}",
        f"--pairs={data}",
        f"--prompts={data}",
        "--batch_size=4",
        "--steps=2",
        "--num_prompts=3",
        "--new_tokens=5",
        "--dtype=float32",
        cache=tmp_path,
    )
    assert code == 0, error
    assert result["score"]["pairs"] == 6
    train = result["train"]
    assert train["batch_size"] == 4
    assert train["remat"] == "none"
    # Steps of four pairs and of two, in turn: the median is between, and three pairs are the mean.
    assert train["pairs_per_s"] * train["step_s"] == pytest.approx(3, rel=1e-6)
    assert (result["sample"]["prompts"], result["sample"]["new_tokens"]) == (3, 5)
    assert result["model"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config or --model is needed"),
        (["--config=configs/small_gsm8k.py"], "has no model.architecture"),
        (["--config=configs/tiny.py", "--pairs=x.jsonl"], "need --model"),
        (["--config=configs/tiny.py", "--config.train.remt=full"], "did you mean train.remat?"),
        (["--model=/nowhere"], "/nowhere"),
        (["--model=/nowhere", "--batchsize=3"], "batch_size"),
    ],
)
def test_what_it_cannot_run(flags, message, tmp_path):
    code, result, error = run(*flags, cache=tmp_path)
    assert code == 2
    assert result is None
    assert message in error
    assert "Traceback" not in error


# --- arithmetic ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral_7b():
    from configs import zephyr

    options = zephyr.get_config().model.architecture.to_dict()
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    return loading.new_model(options, None, dtype="bfloat16", mesh=mesh).config


def test_flops_of_mistral_7b(mistral_7b):
    """Training takes 42.7 GFLOP a token, 6 N without the embedding, and 0.79 MFLOP a token of context."""
    parameters = abstract_params(mistral_7b)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters)) - 32000 * 4096
    norms = 65 * 4096
    assert 3 * cost.forward_flops(mistral_7b, 1, 1, 0) == 6 * (count - norms)
    assert 3 * cost.forward_flops(mistral_7b, 1, 1, 0) == pytest.approx(42.7e9, rel=1e-3)
    T = 2048
    attention = 3 * cost.forward_flops(mistral_7b, 0, 0, T * (T + 1) / 2)
    assert attention == pytest.approx(0.79e6 * T * T, rel=1e-2)


def test_flops_are_those_of_the_program(tiny_model):
    """Every dot of the traced forward pass; its attention is not causal: each token looks at all T."""
    B, T = 2, 16
    tokens = jnp.zeros((B, T), jnp.int32)
    decoder = Decoder(tiny_model.config)

    def logits(params):
        hidden, _ = forward(decoder, params, tokens, Layout(tokens, tokens))
        return project(hidden, output_head(decoder, params))

    with jax.set_mesh(tiny_model.mesh):
        counted = dots(jax.make_jaxpr(logits)(tiny_model.params).jaxpr)
    assert counted == cost.forward_flops(tiny_model.config, B * T, B * T, B * T * T)


def dots(jaxpr, times=1):
    """FLOPs of all dot_generals, those in a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2 * times * int(inner * np.prod(equation.outvars[0].aval.shape))
        repeated = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += dots(inner, repeated)
    return total


def test_decode_roofline(mistral_7b):
    """Few answers: the weights are read. Very many: they are multiplied. The cache is read besides."""
    h200 = chips.chip("NVIDIA H200")
    weights, cache = 7.11e9 * 2 / 4.8e12, 128 * 1024 * 330 / 4.8e12
    assert cost.decode_step_s(mistral_7b, h200, 64, 330, 2) == pytest.approx(weights + 64 * cache, rel=1e-2)
    multiplied = 2 * 7.11e9 * 512 / 989e12
    assert cost.decode_step_s(mistral_7b, h200, 512, 330, 2) == pytest.approx(multiplied + 512 * cache, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),  # half a chip
    ],
)
def test_chips(kind, flops):
    assert chips.chip(kind).flops == flops


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v5 litepod", "TPU v5x", "TPU7", "NVIDIA H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_unknown_chips(kind):
    """A name that only begins like a known one's is none: its peak would be another's."""
    assert chips.chip(kind) is None


def test_tpus_have_the_names_that_jax_knows():
    """Both names of a generation are the same chip, and no name is ours alone."""
    from jax._src.pallas.mosaic import tpu_info  # JAX's own table

    by_version = {}
    for kind, chip in chips.CHIPS.items():
        if kind.startswith("TPU"):
            version = tpu_info.chip_version_from_device_kind(kind)
            assert version is not None, kind
            assert by_version.setdefault(version, chip) == chip
    assert {str(version) for version in by_version} == {"v4", "v5e", "v5p", "v6e", "7x"}


def test_an_unknown_accelerator_is_told():
    """The number would be wrong; that there is none, and why, is said once. A CPU is asked for no peak."""
    said = chips.unknown_peak(machine.Device("TPU v99", "tpu"))
    assert "'TPU v99'" in said
    assert "MFU" in said
    assert chips.unknown_peak(machine.Device("TPU v5 lite", "tpu")) == ""
    assert chips.unknown_peak(machine.Device("cpu", "cpu")) == ""


def test_expected_pairs_have_the_lengths_asked_for():
    from configs import zephyr

    config = zephyr.get_config()
    pairs = from_config.expected_pairs(config, 32000, 400)
    lengths = np.array([(len(p.prompt), len(p.real), len(p.generated)) for p in pairs])
    np.testing.assert_allclose(lengths.mean(axis=0)[:2], (180, 300), rtol=0.05)
    assert lengths[:, 2].max() == 256  # sampling.max_new_tokens
    assert (lengths[:, 0] + lengths[:, 1]).max() <= 1024
