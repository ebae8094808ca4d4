"""Fixtures that the suite shares: meshes, tokenizers, and checkpoints that transformers wrote."""

import copy
import gc
import os
import pathlib

# They are read when the libraries are imported, hence before anything else. Eight devices are only
# offered: a test that asks for `mesh` uses one.
# A test compiles for longer than it computes: LLVM's optimizations would double the suite's time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
# JAX's plugin for CUDA may be here to compile with, without the libraries that a GPU would need.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, and none shall wait for it

import json

import jax
import pytest
from architectures import SMALL
from runs import SHARED

from spin_jax import tiny
from spin_jax.models import loading
from spin_jax.runtime import sharding

# Files that take minutes come first, so that no worker is left alone with one at the end.
_SLOW = ("algorithm", "kill", "outside_engine", "families", "held_out", "durable", "hosts", "lora", "harness", "config")


def pytest_collection_modifyitems(items):
    order = [f"test_{name}" for name in _SLOW]
    items.sort(key=lambda item: order.index(item.path.stem) if item.path.stem in order else len(order))


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_freed():
    """A process may map 65,530 pieces of memory (vm.max_map_count), and XLA crashes where its programs take more."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _commands_share_caches(tmp_path_factory):
    """What a command has compiled that a test started, no other test's need compile again."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # one for all workers
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(base / "xla")
    os.environ["SPIN_JAX_CACHE"] = str(base / "cache")  # no test leaves examples with the user
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="session")
def mesh():
    """One device."""
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def mesh8():
    """Eight devices, two along each axis."""
    if len(jax.devices()) != 8:
        pytest.skip("needs 8 devices (simulated ones on CPU)")
    return sharding.make_mesh(2, 2, 2)


@pytest.fixture(scope="module")
def one_device():
    """Hides all devices but the first: programs for one compile in less time, and many tests are not about devices."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        yield


@pytest.fixture(scope="session")
def gsm8k():
    """Rows of question and answer."""
    path = SHARED / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("the shared GSM8K rows are not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _mistral_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "mistral_tokenizer")


@pytest.fixture(scope="session")
def mistral_tokenizer():
    """The tokenizer of Mistral 7B with Zephyr's chat template."""
    if not (SHARED / "mistral_tokenizer").exists():
        pytest.skip("the shared Mistral tokenizer is not here")
    return _mistral_tokenizer()


@pytest.fixture(scope="session")
def hf_model_dir(tmp_path_factory):
    """make(family, **config) → (directory, torch model), written by transformers.

    The config starts from `SMALL`; None takes a key out of it. Calls with equal arguments share one
    directory: copy it to change it.
    A vocabulary of 32,000 brings Mistral's own tokenizer where it is here, any other the tiny one.
    `dtype` is the checkpoint's; `max_shard_size` splits it.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made = {}

    def make(family="mistral", dtype="float32", max_shard_size="1GB", **options):
        key = json.dumps([family, dtype, max_shard_size, options], sort_keys=True)
        if key not in made:
            torch.manual_seed(0)
            defaults = {**SMALL, "sliding_window": None} if family == "mistral" else SMALL
            absent = {k for k, v in options.items() if v is None and k in SMALL}
            chosen = {k: v for k, v in {**defaults, **options}.items() if k not in absent}
            # A copy: some families write into the dicts that they are given.
            config = transformers.AutoConfig.for_model(family, **copy.deepcopy(chosen))
            config._attn_implementation = "eager"
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, weight in model.named_parameters():
                if weight.ndim == 1 or "bias" in name:  # of ones or zeros: two exchanged would not show
                    torch.nn.init.uniform_(weight, *((-0.5, 0.5) if "bias" in name else (0.5, 1.5)))
            model = model.to(getattr(torch, dtype)).eval()
            real = config.vocab_size == 32000 and (SHARED / "mistral_tokenizer").exists()
            directory = tmp_path_factory.mktemp(family)
            model.save_pretrained(directory, max_shard_size=max_shard_size)
            (_mistral_tokenizer() if real else tiny.tokenizer()).save_pretrained(directory)
            made[key] = (directory, model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_dir(hf_model_dir):
    """A Mistral checkpoint of two layers with the tiny tokenizer, float32."""
    return hf_model_dir("mistral")[0]


@pytest.fixture(scope="session")
def tiny_model(tiny_dir, mesh):
    """`tiny_dir`, loaded on one device."""
    return loading.load(str(tiny_dir), mesh=mesh)
