"""Pushes to a stand-in for the hub's client: who may push, what goes where, what follows from a failure."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from spin_jax.storage import hub, seals

USER = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class Api:
    """Stands in for `huggingface_hub.HfApi`; it refuses the branches in `fails`."""

    def __init__(self):
        self.user, self.raises = USER, None
        self.repos = set()  # that exist and may be written
        self.calls, self.fails, self.content = [], set(), {}

    def auth_check(self, repo_id, *, write):
        assert write
        if self.raises and not isinstance(self.raises, errors.LocalTokenNotFoundError):
            raise self.raises
        if repo_id not in self.repos:
            raise refusal(404, errors.RepositoryNotFoundError)

    def whoami(self):
        if self.raises:
            raise self.raises
        return self.user

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.calls.append(("repo", repo_id, private))

    def create_branch(self, repo_id, *, branch, exist_ok):
        assert exist_ok
        self.calls.append(("branch", branch))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, delete_patterns):
        del repo_id, commit_message
        assert "adapters/*" in delete_patterns  # main may have had those of another iteration
        if revision in self.fails:
            raise ConnectionError("the network is down")
        self.calls.append(("upload", revision))
        self.content[revision] = (folder_path / "model.safetensors").read_text()


@pytest.fixture
def api(monkeypatch):
    stub = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stub)
    return stub


def refusal(status, kind=errors.HfHubHTTPError):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("no", response=response)


@pytest.mark.parametrize(
    ("repo", "raised", "user", "message"),
    [
        ("mine", None, {}, "owner/name is wanted"),
        ("a/b/c", None, {}, "owner/name is wanted"),
        ("../b", None, {}, "owner/name is wanted"),
        ("a--b/c", None, {}, "owner/name is wanted"),
        (
            "me/m",
            errors.LocalTokenNotFoundError("x"),
            {},
            "there is no token: run `hf auth login`, or set HF_",
        ),
        ("me/m", refusal(401), {}, "the hub refuses the token"),
        ("you/m", refusal(403), {}, "the hub refuses the token"),
        ("me/m", errors.OfflineModeIsEnabled("x"), {}, "HF_HUB_OFFLINE is set"),
        ("you/m", None, {}, "the token belongs to me, and may write to me, lab only"),
        ("me/m", None, {"auth": {"accessToken": {"role": "read"}}}, "the token may only read"),
    ],
)
def test_a_token_that_may_not_write_is_refused_at_once(repo, raised, user, message, api):
    api.raises, api.user = raised, {**USER, **user}
    with pytest.raises(ValueError, match=f"export.push_to='{repo}': .*{message}"):
        hub.check(repo)


@pytest.mark.parametrize("raised", [None, ConnectionError("no route"), refusal(503)])
def test_a_hub_out_of_reach_does_not_stop_a_run(raised, api, capfd):
    api.raises = raised
    hub.check("lab/m")
    assert ("WARNING: export.push_to='lab/m'" in capfd.readouterr().out) == bool(raised)


def test_a_repository_that_exists_decides_itself(api):
    """It may belong to neither the user nor an organization of theirs, as with a fine-grained token."""
    api.repos, api.user = {"you/m"}, None
    hub.check("you/m")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("owner/name", True), ("gpt2", True), ("a/b/c", False), ("./x", False), ("a..b", False), ("x y", False)],
)
def test_hub_ids(path, expected):
    assert hub.is_hub_id(path) == expected


@pytest.fixture
def exports(tmp_path):
    """{branch: sealed folder}; main has the newer of two."""
    found = {}
    for branch in ("iteration_0", "iteration_1"):
        found[branch] = tmp_path / branch
        found[branch].mkdir()
        (found[branch] / "model.safetensors").write_text(f"weights of {branch}")
        seals.seal(found[branch])
    return {**found, "main": found["iteration_1"]}


def test_each_export_has_a_branch_and_is_pushed_once(api, exports, tmp_path):
    hub.push(tmp_path, "me/m", exports, private=True)
    assert api.calls[:3] == [("repo", "me/m", True), ("branch", "iteration_0"), ("upload", "iteration_0")]
    assert [call for call in api.calls if call[0] == "branch"] == [
        ("branch", "iteration_0"),
        ("branch", "iteration_1"),
    ]
    assert api.content["main"] == "weights of iteration_1"
    done = len(api.calls)
    hub.push(tmp_path, "me/m", exports, private=True)
    assert len(api.calls) == done
    hub.push(tmp_path, "me/m", {**exports, "main": exports["iteration_0"]}, private=True)
    assert api.calls[done:] == [("repo", "me/m", True), ("upload", "main")]
    hub.push(tmp_path, "lab/m", exports, private=False)
    assert api.calls.count(("repo", "lab/m", False)) == 3
    assert json.loads((tmp_path / hub.RECORD).read_text()).keys() == {"me/m", "lab/m"}


def test_a_push_that_fails_is_repeated(api, exports, tmp_path, capfd):
    api.fails = {"iteration_0"}
    hub.push(tmp_path, "me/m", exports, private=True)
    said = capfd.readouterr().out
    assert "iteration_0 was not pushed to me/m (iteration_0): ConnectionError: the network is down" in said
    assert {"iteration_1", "main"} == api.content.keys()  # the others were pushed
    api.fails = set()
    hub.push(tmp_path, "me/m", exports, private=True)
    assert api.calls[-1] == ("upload", "iteration_0")


def test_a_damaged_export_is_not_pushed(api, exports, tmp_path, capfd):
    (exports["iteration_0"] / "model.safetensors").write_text("other weights")
    hub.push(tmp_path, "me/m", exports, private=True)
    assert "model.safetensors is not what was written" in capfd.readouterr().out
    assert "iteration_0" not in api.content


def test_the_path_of_a_models_readme(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("x")
    assert hub.readme(str(tmp_path), None) == tmp_path / "README.md"
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *what, revision: f"{what[0]}/{what[1]}/{revision}"
    )
    assert hub.readme("owner/base", "c0ffee").as_posix() == "owner/base/README.md/c0ffee"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *what, revision: None)
    assert not hub.readme("owner/base", "c0ffee").exists()
    assert not hub.readme(None, None).exists()
