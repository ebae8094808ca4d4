"""Exported models on the Hugging Face hub: a branch for each, and main for the newest or the best.

A push that fails ends nothing: it is told, and tried again when the run starts again, has done another
iteration, or ends. `hub.json` in the workdir says what the hub has.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from etils import epath

from spin_jax.runtime import processes
from spin_jax.storage import files, seals

RECORD = "hub.json"


def check(repo: str) -> None:
    """Asks the hub, before anything is computed, whether its token may write there; process 0 does.

    Raises:
        ValueError: it may not, or `repo` is no name. A hub that is out of reach is only told.
    """
    processes.by_first(lambda: _check(repo))


def _check(repo: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    key = f"export.push_to={repo!r}"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII) or ".." in repo:
        raise ValueError(f"{key}: owner/name is wanted")
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{key}: there is no token: run `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{key}: HF_HUB_OFFLINE is set, and nothing can be pushed") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(f"{key}: the hub refuses the token: {error}") from error
        processes.say(f"WARNING: {key}: the hub does not say whose token it is; the run goes on: {error}")
        return
    except Exception as error:  # of whichever library stands between
        processes.say(f"WARNING: {key}: the hub is out of reach; the run goes on: {error}")
        return
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if repo.partition("/")[0] not in owners:
        raise ValueError(f"{key}: the token is {user['name']}'s, and may write to {', '.join(owners)} only")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{key}: the token may only read: one that may write is wanted")


def readme(path: str | None, revision: str | None) -> Path:
    """Where the README.md of a model is, a directory's or one that was downloaded; if there is one."""
    from huggingface_hub import try_to_load_from_cache

    if path and not Path(path).is_dir():
        found = try_to_load_from_cache(path, "README.md", revision=revision)
        return Path(found) if isinstance(found, str) else Path("nowhere")
    return Path(path or "nowhere") / "README.md"


def push(workdir: epath.Path, repo: str, exports: Mapping[str, epath.Path], *, private: bool) -> None:
    """Pushes the exports that the hub has not got yet; process 0 does, and says what failed.

    Args:
        workdir: where `hub.json` is kept.
        repo: owner/name; made where it is absent.
        exports: {branch: sealed folder}.
        private: of a repository that is made.
    """
    processes.by_first(lambda: _push(workdir / RECORD, repo, exports, private))


def _push(record: epath.Path, repo: str, exports: Mapping[str, epath.Path], private: bool) -> None:
    pushed = files.read_json(record) if record.exists() else {}
    there = pushed.setdefault(repo, {})
    for branch, folder in exports.items():
        seal = (folder / files.SUMS).read_text().partition("\n")[0]
        if there.get(branch) == seal:
            continue
        try:
            seals.check_seal_here(folder)
            _upload(repo, branch, folder, private)
        except Exception as error:  # the hub's, the network's, a disk's: the run is worth more than its copy
            processes.say(
                f"\nWARNING: {folder} was not pushed to {repo} ({branch}): {type(error).__name__}: {error}\n"
                "The run goes on, and tries again after the next iteration, at its end, and when it is "
                "started again.\n"
            )
            continue
        there[branch] = seal
        files.write_here(record, files.as_json(pushed))
        processes.say(f"pushed {folder} to https://huggingface.co/{repo}/tree/{branch}")


def _upload(repo: str, branch: str, folder: epath.Path, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    if branch != "main":
        api.create_branch(repo, branch=branch, exist_ok=True)
    with _on_disk(folder) as local:
        api.upload_folder(
            repo_id=repo,
            folder_path=local,
            revision=branch,
            commit_message=f"{branch}, by spin_jax",
            delete_patterns="model*.safetensors*",  # of those, what this export has not
        )


@contextlib.contextmanager
def _on_disk(folder: epath.Path) -> Iterator[Path]:
    """The folder, or a copy of one in an object store."""
    if "://" not in str(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        seals.copy_here(folder, Path(scratch) / "model")
        yield Path(scratch) / "model"
