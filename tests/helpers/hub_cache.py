"""A cache of the hub on disk, which huggingface_hub reads without a network."""

import shutil

import huggingface_hub


def use(cache, monkeypatch):
    """Lets huggingface_hub see this cache and nothing else."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def publish(cache, name, commit, directory):
    """Makes a copy of the directory the newest commit of OWNER/NAME's branch main."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
