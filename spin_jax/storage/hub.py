"""Pushes exported models to the Hugging Face hub: one branch for each, and main for the newest or the best.

A push that fails does not end the run: it prints a warning, and the next push, after an iteration, at the
end or when the run starts again, repeats it. `hub.json` in the workdir records what the hub has.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from spin_jax.runtime import processes
from spin_jax.storage import files, seals

RECORD = "hub.json"


def is_hub_id(path: str) -> bool:
    """Whether `path` can be the name of a repository on the hub: owner/name, or a name alone."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def check(repo: str) -> None:
    """Asks the hub in process 0, before anything is computed, whether the user's token may write to `repo`.

    ValueError says why it may not. A hub that cannot be reached leads to a warning only.
    """
    processes.by_first(lambda: _check(repo))


def _check(repo: str) -> None:
    from huggingface_hub import HfApi, errors

    key = f"export.push_to={repo!r}"
    if "/" not in repo or not is_hub_id(repo):
        raise ValueError(f"{key}: owner/name is wanted")
    try:
        try:
            HfApi().auth_check(repo, write=True)
            return
        except errors.RepositoryNotFoundError:
            # `push` will create it. The hub also says this where there is no token.
            user = HfApi().whoami()
    except errors.LocalTokenNotFoundError as error:
        raise ValueError(f"{key}: there is no token: run `hf auth login`, or set HF_TOKEN") from error
    except errors.OfflineModeIsEnabled as error:
        raise ValueError(f"{key}: HF_HUB_OFFLINE is set, and nothing can be pushed") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(f"{key}: the hub refuses the token: {error}") from error
        processes.say(f"WARNING: {key}: the hub does not say who may write there; the run goes on: {error}")
        return
    except Exception as error:  # from any library on the way to the hub
        processes.say(f"WARNING: {key}: the hub cannot be reached; the run goes on: {error}")
        return
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if repo.partition("/")[0] not in owners:
        raise ValueError(f"{key}: the token belongs to {user['name']}, and may write to {', '.join(owners)} only")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{key}: the token may only read, and a token that may write is wanted")


def readme(path: str | None, revision: str | None) -> Path:
    """The path of a model's README.md in its directory or among downloaded files; it may not exist."""
    from huggingface_hub import try_to_load_from_cache

    if path and not Path(path).is_dir():
        found = try_to_load_from_cache(path, "README.md", revision=revision)
        return Path(found) if isinstance(found, str) else Path("nowhere")
    return Path(path or "nowhere") / "README.md"


def push(workdir: epath.Path, repo: str, exports: Mapping[str, epath.Path], *, private: bool) -> None:
    """Pushes the exports {branch: sealed folder} that the hub does not have yet.

    Process 0 pushes, and prints what failed. It creates `repo`, private or not, where it does not exist.
    """
    processes.by_first(lambda: _push(workdir / RECORD, repo, exports, private))


def _push(record: epath.Path, repo: str, exports: Mapping[str, epath.Path], private: bool) -> None:
    pushed = files.read_json(record) if record.exists() else {}
    seals_there = pushed.setdefault(repo, {})  # {branch: the seal of the folder that was pushed to it}
    for branch, folder in exports.items():
        seal = (folder / files.SUMS).read_text().partition("\n")[0]
        if seals_there.get(branch) == seal:
            continue
        try:
            seals.check_seal_here(folder)
            _upload(repo, branch, folder, private)
        except Exception as error:  # from the hub, the network or a disk: the run matters more than its copy
            said = f"WARNING: {folder} was not pushed to {repo} ({branch}): {type(error).__name__}: {error}"
            later = "after the next iteration, at its end, and when it is started again"
            processes.say(f"\n{said}\nThe run goes on, and tries again {later}.\n")
            continue
        seals_there[branch] = seal
        files.write_here(record, files.as_json(pushed))
        processes.say(f"pushed {folder} to https://huggingface.co/{repo}/tree/{branch}")


def _upload(repo: str, branch: str, folder: epath.Path, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    if branch != "main":
        api.create_branch(repo, branch=branch, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(folder)
        if "://" in str(folder):  # an object store
            local = Path(scratch) / "model"
            seals.copy_here(folder, local)
        api.upload_folder(
            repo_id=repo,
            folder_path=local,
            revision=branch,
            commit_message=f"{branch}, by spin_jax",
            delete_patterns=["model*.safetensors*", "adapters/*"],  # deletes those that this export does not have
        )
