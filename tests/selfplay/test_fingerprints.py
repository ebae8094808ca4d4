"""What a run records of the code that computes it."""

import dataclasses
import importlib.metadata
import shutil
from types import SimpleNamespace

import jax
import pytest
from runs import ROOT

import spin_jax
from spin_jax import config, tiny
from spin_jax.data.store import EXAMPLES, Examples
from spin_jax.runtime import platforms
from spin_jax.selfplay import fingerprints


def test_a_clone_that_is_not_installed_has_versions(monkeypatch, tmp_path):
    installed = importlib.metadata.distribution

    def distribution(name):
        if name == "spin_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert platforms.versions("jax") == {"spin_jax": spin_jax.__version__, "jax": jax.__version__}
    monkeypatch.setenv("PATH", str(tmp_path))  # which has no git
    assert fingerprints.commit() is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, which the fingerprint is then taken of."""
    copy = tmp_path / "spin_jax"
    shutil.copytree(ROOT / "spin_jax", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(spin_jax, "__file__", str(copy / "__init__.py"))
    return copy


def test_a_changed_line_in_any_file_is_noticed(package):
    """In every file of every package, and the same code has the same fingerprint wherever it stands."""
    code = fingerprints._source_of_package
    original = code()
    files = sorted(package.rglob("*.py"))
    assert {path.parent.name for path in files} >= {"spin_jax", "models", "training", "selfplay", "report"}
    for path in files:
        text = path.read_bytes()
        path.write_bytes(text + b"# changed\n")
        assert code() != original, f"a changed {path.relative_to(package)} is not noticed"
        path.write_bytes(text)
    assert code() == original


def test_a_file_that_comes_goes_or_moves_is_noticed(package):
    code = fingerprints._source_of_package
    seen = [code()]
    (package / "models/another.py").write_text("")
    seen.append(code())
    (package / "models/another.py").rename(package / "training/another.py")
    seen.append(code())
    (package / "training/another.py").unlink()
    assert len(set(seen)) == 3
    assert code() == seen[0]


def test_compiled_files_do_not_count(package):
    """What Python leaves beside the sources, and differs from machine to machine."""
    original = fingerprints._source_of_package()
    cache = package / "models/__pycache__"
    cache.mkdir()
    (cache / "lora.cpython-311.pyc").write_bytes(b"1")
    assert fingerprints._source_of_package() == original


def test_each_own_loss_of_a_sum_is_fingerprinted():
    c = config.default()
    c.loss.name = "0.5*spin_jax.losses:hinge+logistic+2*spin_jax.losses:ipo"
    architecture = dataclasses.make_dataclass("Architecture", [])()
    model = SimpleNamespace(tokenizer=tiny.tokenizer(), config=architecture, stop_tokens=())
    none = Examples(EXAMPLES.empty_table())
    found = fingerprints.digests(c, model, [none], none, {}, {"weights": ""})["fingerprints"]
    assert [name for name in found if name.startswith("loss")] == ["loss", "loss 2"]


@pytest.mark.parametrize(
    ("before", "now", "differs"),
    [
        ("some/judge", "a/copy/of/it", False),  # its digest is compared
        ("some/judge", "module:function", True),
        ("module:function", "some/judge", True),
        (None, "some/judge", True),
        ("some/judge", None, True),
    ],
)
def test_the_place_of_a_reward_model_is_free(before, now, differs):
    then, after = (config.resolve({**BASE, "selfplay": {"scorer": scorer}}) for scorer in (before, now))
    found = fingerprints.differences(after, {}, {"config": fingerprints.recorded(then)})
    assert found == ({"selfplay.scorer": (before, now)} if differs else {})


BASE = {"model": {"path": "none"}, "data": {"path": "none"}}
