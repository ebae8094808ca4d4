"""Nothing lost, nothing silently wrong: damage, full disks, numbers that are not finite, other runs."""

import contextlib
import errno
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time
import unittest.mock

import jax
import numpy as np
import pytest
from runs import ROOT, read_pairs

import spin_jax
from spin_jax import cli, config, errors
from spin_jax import tiny as tiny_world
from spin_jax.models import loading
from spin_jax.runtime import interrupts, processes, secrets
from spin_jax.selfplay import engine, fingerprints
from spin_jax.storage import checkpoints, files, metrics, seals


def tiny(**sections):
    """`configs/tiny.py:smoke` with one iteration, as a nested dict; what is given is laid over it."""
    namespace: dict = {}
    exec(compile((ROOT / "configs" / "tiny.py").read_text(), "tiny.py", "exec"), namespace)
    c = namespace["get_config"]("smoke")
    c.sft.control, c.selfplay.iterations = False, 1
    c.logging.plot = c.logging.tensorboard = False
    c.checkpoint.every_steps, c.train.batch_size = 2, 32
    for name, values in sections.items():
        if isinstance(values, dict):
            c[name].update(values)
        else:
            c[name] = values
    return c


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of one iteration, in this process."""
    workdir = tmp_path_factory.mktemp("durable") / "run"
    spin_jax.run(tiny(), str(workdir))
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


def weights(workdir, t=0):
    return (workdir / f"iteration_{t}" / "model" / "model.safetensors").read_bytes()


def rows(workdir):
    kept = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "minutes")} for row in kept]


def forget(workdir, *what):
    """As if the run had not come so far: summary rows of iterations ≥ 0 go, and paths."""
    summary = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").write_text(json.dumps([row for row in summary if row["iteration"] < 0]))
    for path in what:
        shutil.rmtree(workdir / path)


def flip(path, seed):
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    place = np.random.default_rng(seed).integers(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["iteration_0/checkpoint", "iteration_0/model"])
def test_one_flipped_bit_in_any_file_is_found_and_named(finished, tmp_path, folder):
    """In each file in turn, the seal's own too: never another model, and the report names the file."""
    paths = [p for p in (finished / folder).rglob("*") if p.is_file() and p.stat().st_size]
    names = [p.relative_to(finished / folder) for p in paths]
    assert len(names) >= 7
    load, restore = (lambda path: loading.load(str(path))), (lambda path: checkpoints.restore(path, {}))
    read = load if folder.endswith("model") else restore
    subprocess.run(["sha256sum", "--check", "--quiet", files.SUMS], cwd=finished / folder, check=True)
    for seed, name in enumerate(names):
        damaged = tmp_path / str(seed)
        shutil.copytree(finished / folder, damaged)
        flip(damaged / name, seed)
        with pytest.raises(ValueError, match=r"damaged|not valid") as caught:
            read(damaged)
        assert str(damaged) in str(caught.value)
        assert str(name) in str(caught.value)


def test_a_missing_file_is_damage_too(copy):
    folder = copy / "iteration_0" / "checkpoint"
    next(folder.glob("state/d/*")).unlink()
    with pytest.raises(errors.Damaged, match=r"state/d/.* is missing"):
        seals.check_seal(folder)


def test_a_damaged_checkpoint_is_made_again_to_the_bit(copy, finished, capfd):
    """The model of iteration 0 is needed for iteration 1: it is trained again from its pairs, loudly."""
    flip(next((copy / "iteration_0" / "checkpoint").glob("state/d/*")), 1)
    shutil.rmtree(copy / "iteration_0" / "model")
    forget(copy)
    spin_jax.run(tiny(), str(copy))
    assert "WARNING" in (said := capfd.readouterr().out)
    assert "iteration_0/checkpoint is damaged: state/d/" in said
    assert "made again" in said
    assert weights(copy) == weights(finished)
    key = lambda row: (row["phase"], row["iteration"], row["step"])  # noqa: E731
    assert sorted(rows(copy), key=key) == sorted(rows(finished), key=key)
    seals.check_seal(copy / "iteration_0" / "checkpoint")


def test_the_last_good_step_is_used(copy, finished, capfd):
    """Steps 2 and 4 are kept; 4 is damaged: training goes on from 2, and ends as if nothing had been."""
    forget(copy, "iteration_0/checkpoint", "iteration_0/model")
    calls = iter(range(1000))
    with pytest.raises(errors.Interrupted):
        spin_jax.run(tiny(), str(copy), should_stop=lambda: 2 * (next(calls) >= 4))
    steps = copy / "iteration_0" / "train"
    assert sorted(int(p.name) for p in steps.iterdir()) == [4, 5]
    flip(next((steps / "5").glob("state/d/*")), 2)
    spin_jax.run(tiny(), str(copy))
    assert "train/5 is damaged: state/d/" in capfd.readouterr().out
    assert weights(copy) == weights(finished)
    assert not steps.exists()


def test_a_checkpoint_without_its_seal_does_not_count(copy, finished):
    """What a kill leaves behind while orbax writes, or before the seal."""
    (copy / "iteration_0" / "checkpoint" / files.SUMS).unlink()
    (copy / "iteration_0" / "model" / files.SUMS).unlink()
    forget(copy)
    assert not seals.sealed(copy / "iteration_0" / "checkpoint")
    spin_jax.run(tiny(), str(copy))
    assert weights(copy) == weights(finished)
    assert seals.sealed(copy / "iteration_0" / "checkpoint")


def test_orbax_reasons_come_to_the_surface(finished):
    folder = finished / "iteration_0" / "checkpoint"
    with pytest.raises(ValueError, match=r"does not fit this run: embed is .* there and None here"):
        checkpoints.restore(folder, {})


def test_a_file_is_added_to_a_sealed_folder_whatever_is_killed(tmp_path, monkeypatch):
    """At each write in turn: the folder passes its seal all the time, and the next call ends alike."""
    for kill in range(5):
        folder = tmp_path / str(kill)
        folder.mkdir()
        (folder / "weights").write_bytes(b"1")
        (folder / "README.md").write_bytes(b"old")
        seals.seal(folder)
        writes, write_here = iter(range(9)), files.write_here

        def write(path, content, writes=writes, kill=kill, folder=folder, write_here=write_here):
            if next(writes) == kill:
                raise KeyboardInterrupt
            write_here(path, content)
            seals.check_seal(folder)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(files, "write_here", write)
            seals.add(folder, "README.md", b"new")
        seals.check_seal(folder)
        seals.add(folder, "README.md", b"new")
        seals.add(folder, "a", b"2")
        seals.check_seal(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != files.SUMS} == {
            "weights": b"1",
            "README.md": b"new",
            "a": b"2",
        }
    before = (folder / files.SUMS).read_bytes()
    assert before.decode().split()[3::2] == ["README.md", "a", "weights"]
    seals.seal(folder)
    assert (folder / files.SUMS).read_bytes() == before
    (folder / files.SUMS).write_text("no seal of ours")
    with pytest.raises(errors.Damaged, match="SHA256SUMS is damaged"):
        seals.add(folder, "b", b"3")


def test_every_export_has_a_card_whatever_is_killed(copy, finished):
    """Killed before it was written or sealed, it is written again, and the same."""
    for folder in ("start/model", "iteration_0/model"):
        assert "README.md" in (finished / folder / files.SUMS).read_text()
    text = (finished / "iteration_0" / "model" / "README.md").read_text()
    assert "# mistral, SPIN iteration 0" in text
    row = json.loads((finished / "summary.json").read_text())[1]
    assert f"| nll | {json.loads((finished / 'summary.json').read_text())[0]['nll']:.4g} | {row['nll']:.4g} |" in text
    model = copy / "iteration_0" / "model"
    (model / "README.md").unlink()
    sums = [line for line in (model / files.SUMS).read_text().splitlines() if "README" not in line]
    digest = hashlib.sha256("".join(f"{line}\n" for line in sums[1:]).encode()).hexdigest()
    (model / files.SUMS).write_text("\n".join([f"# {digest}", *sums[1:], ""]))
    forget(copy)
    spin_jax.run(tiny(), str(copy))
    for name in ("README.md", files.SUMS):
        assert (model / name).read_bytes() == (finished / "iteration_0" / "model" / name).read_bytes()


def test_a_push_that_fails_loses_nothing(copy, monkeypatch, capfd):
    """The run ends as it would, and says so; started again, it pushes."""
    import huggingface_hub

    api = unittest.mock.MagicMock()
    api.whoami.return_value = {"name": "me"}
    no_such_repository = huggingface_hub.errors.RepositoryNotFoundError("no", response=unittest.mock.MagicMock())
    api.auth_check.side_effect = no_such_repository
    api.upload_folder.side_effect = ConnectionError("the network is down")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    c = tiny(export={"push_to": "me/mine"})
    assert len(spin_jax.run(c, str(copy))) == 2
    said = capfd.readouterr().out
    for branch in ("start", "iteration_0", "main"):
        assert f"was not pushed to me/mine ({branch}): ConnectionError: the network is down" in said
    api.upload_folder.reset_mock(side_effect=True)
    spin_jax.run(c, str(copy))
    pushed = {call.kwargs["revision"]: call.kwargs["folder_path"] for call in api.upload_folder.mock_calls}
    assert pushed == {
        "iteration_0": copy / "iteration_0" / "model",
        "main": copy / "iteration_0" / "model",
        "start": copy / "start" / "model",
    }
    api.whoami.return_value = {"name": "another"}
    with pytest.raises(ValueError, match="may write to another only"):
        spin_jax.run(c, str(copy))


@pytest.mark.parametrize("lost", ["pairs", "scores"])
def test_lost_answers_and_scores_are_made_again(copy, finished, lost, capfd):
    """A damaged file is named; removed, it is made again, though its iteration was trained already."""
    path = next((copy / "iteration_0" / lost).glob("*train-00000*"))
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(byte ^ 255 for byte in content[100:110]) + content[110:])
    forget(copy)
    with pytest.raises(errors.Damaged, match=rf"{path.name} is damaged: remove it"):
        spin_jax.run(tiny(), str(copy))
    path.unlink()
    spin_jax.run(tiny(), str(copy))
    assert path.read_bytes() == content
    key = lambda row: (row["phase"], row["iteration"], row["step"])  # noqa: E731
    assert sorted(rows(copy), key=key) == sorted(rows(finished), key=key)


def test_answers_that_are_made_again_are_scored_again(copy, monkeypatch):
    """On other devices they may be others: here they are read backwards. All log-probs are those of the new answers."""
    path = next((copy / "iteration_0" / "pairs").glob("*train-00000*"))
    path.unlink()
    forget(copy)
    answer = engine.Engine.answer
    monkeypatch.setattr(engine.Engine, "answer", lambda *a, **k: [ids[::-1] for ids in answer(*a, **k)])
    before = read_pairs(copy / "iteration_0" / "scores")
    for phase in ("sample", "score"):
        spin_jax.run(tiny(), str(copy), only=phase)
    found = read_pairs(copy / "iteration_0" / "scores")
    assert [row["real_logp"] for row in found] == [row["real_logp"] for row in before]
    assert found != before
    shutil.rmtree(copy / "iteration_0" / "scores")
    spin_jax.run(tiny(), str(copy), only="score")
    assert read_pairs(copy / "iteration_0" / "scores") == found


def test_what_is_not_ours_is_left_alone(tmp_path, finished):
    """Another SHA256SUMS, a workdir that is no run, a file that cannot be read when it is to be sealed."""
    model = shutil.copytree(finished / "iteration_0" / "model", tmp_path / "model")
    (model / files.SUMS).write_text("0000  config.json\n")
    loading.load(str(model))
    with pytest.raises(ValueError, match=r"config.json was not written by spin_jax"):
        spin_jax.run(tiny(), str(model))
    (tmp_path / "unread").mkdir()
    (tmp_path / "unread" / "file").symlink_to("nowhere")
    with pytest.raises(OSError, match="cannot be read"):
        seals.seal(tmp_path / "unread")
    assert not seals.sealed(tmp_path / "unread")


# --- room ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_before_work_is_lost(small_disk, finished):
    """The room is taken while the run trains: it stops where it has just saved, and goes on from there."""
    workdir, filler = small_disk / "run", small_disk / "filler"
    shutil.copytree(finished, workdir)
    forget(workdir, "iteration_0/checkpoint", "iteration_0/model")
    calls = iter(range(1000))

    def fill() -> int:
        if next(calls) == 2:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 3 * 2**20))
        return 0

    with pytest.raises(errors.NoRoom, match=r"the next checkpoint in .* takes .* GiB.*: make room") as caught:
        spin_jax.run(tiny(), str(workdir), should_stop=fill)
    assert caught.value.errno == errno.ENOSPC
    steps = [row["step"] for row in rows(workdir) if row["phase"] == "train"]
    saved = max(int(path.parent.name) for path in workdir.glob(f"iteration_0/train/*/{files.SUMS}"))
    assert saved == steps[-1] + 1  # not one step is lost
    filler.unlink()
    spin_jax.run(tiny(), str(workdir))
    assert weights(workdir) == weights(finished)


def test_a_disk_that_fills_up_while_saving(small_disk, finished):
    """Nothing false is left: the checkpoint before stays the newest."""
    steps = checkpoints.StepCheckpoints(small_disk / "train", 2)
    state = {"w": jax.device_put(np.random.default_rng(0).random(2**20, np.float32))}  # 4 MiB, no less packed
    steps.save(1, state)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "check_room", lambda *what: None)  # it was there when it was asked
        with pytest.raises(errors.NoRoom, match="disk is full"):
            steps.save(2, state)
    assert steps.steps_done() == 1
    (small_disk / "filler").unlink()
    steps.save(2, state)
    assert steps.steps_done() == 2


def test_a_failed_write_leaves_the_old_file(small_disk):
    path = small_disk / "summary.json"
    files.write(path, b"old")
    with pytest.raises(OSError, match="No space left"):
        files.write(path, bytes(2**24))
    assert path.read_bytes() == b"old"
    assert [p.name for p in small_disk.iterdir()] == ["summary.json"]


# --- not finite ----------------------------------------------------------------------------------


def test_losses_that_are_not_finite_end_the_run_with_the_batch(copy, tmp_path, monkeypatch, capfd):
    """And with another learning rate it goes on from where it was good, which config.json tells."""
    (tmp_path / "unlucky.py").write_text(
        "import jax.numpy as jnp\n"
        "from spin_jax.losses import logistic\n"
        "def loss(policy, opponent, *, beta):\n"
        "    lost = (beta > 1) & (policy.real.size > 8)  # only in training: a trial run has fewer rows\n"
        "    return logistic(policy, opponent, beta=beta) + jnp.where(lost, jnp.nan, 0.0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    workdir = tmp_path / "new"
    unlucky = tiny(loss={"name": "unlucky:loss", "beta": (10.0,)}, train={"most_skipped": 3})
    with pytest.raises(errors.NotFinite, match="train, iteration 0: loss or gradient was not") as caught:
        spin_jax.run(unlucky, str(workdir))
    path = workdir / "iteration_0" / "not_finite_train_step_2.npz"
    assert str(path) in str(caught.value)
    batch = np.load(path)
    assert batch["rows.tokens"].shape[:-1] == batch["text"].shape
    assert "<|user|>" in batch["text"][0, 0]
    assert [row["skipped"] for row in rows(workdir) if row["phase"] == "train"] == [1, 2, 3]
    assert all(row["loss"] is None for row in rows(workdir) if row["phase"] == "train")

    unlucky.loss.beta = (0.5,)
    with pytest.raises(ValueError, match=r"there loss.beta is \[10.0\], and now \[0.5\].*resume_anyway"):
        spin_jax.run(unlucky, str(workdir))
    unlucky.resume_anyway = True
    (_, row) = spin_jax.run(unlucky, str(workdir))
    assert row["skipped"] == 2  # of those that its last checkpoint had behind it
    assert "continues although loss.beta was [10.0] and is [0.5] now" in capfd.readouterr().out
    (override,) = json.loads((workdir / "config.json").read_text())["overrides"]
    assert override["differences"] == {"loss.beta": [[10.0], [0.5]]}
    spin_jax.run(unlucky, str(workdir))  # once is enough
    assert len(json.loads((workdir / "config.json").read_text())["overrides"]) == 1


# --- whose workdir -------------------------------------------------------------------------------


OTHER_TEMPLATE = "{{ bos_token }}" + tiny_world.CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"path": "others:problems"}}, "fingerprints.data is '200 examples"),
        ({"model": {"tokenizer": "others:tokenizer"}}, "model.tokenizer is 'spin_jax.tiny:tokenizer'"),
        ({"data": {"chat_template": OTHER_TEMPLATE}}, "there data.chat_template is None, and now "),
        ({"seed": 7}, "there seed is 0, and now 7. "),
        ({"train": {"learning_rate": (1e-3,)}}, "there train.learning_rate is"),
    ],
)
def test_what_makes_another_run_is_refused(finished, tmp_path, monkeypatch, change, message):
    (tmp_path / "others.py").write_text(
        "from spin_jax import tiny\n"
        "def problems(): return [{**r, 'answer': '7'} for r in tiny.problems(300)]\n"
        "tokenizer = tiny.tokenizer\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = (finished / "config.json").read_text()
    with pytest.raises(ValueError, match="holds another run") as caught:
        spin_jax.run(tiny(**change), str(finished))
    assert message in str(caught.value)
    assert (finished / "config.json").read_text() == before


def test_code_and_versions_count_and_places_do_not(copy, tmp_path, monkeypatch, capfd):
    """Another source file is another run, another JAX a note; the same rows from elsewhere are the same."""
    (tmp_path / "elsewhere.py").write_text("from spin_jax.tiny import problems\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spin_jax.run(tiny(data={"path": "elsewhere:problems"}), str(copy))
    kept = json.loads((copy / "config.json").read_text())
    assert {"data", "held-out data", "tokenizer", "chat template", "model", "weights", "code"} == set(
        kept["fingerprints"]
    )
    changed = {**kept, "fingerprints": {**kept["fingerprints"], "code": "older"}}
    (copy / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"there fingerprints.code is 'older', and now "):
        spin_jax.run(tiny(), str(copy))
    changed = {**kept, "versions": {**kept["versions"], "jax": "0.1"}}
    (copy / "config.json").write_text(json.dumps(changed))
    spin_jax.run(tiny(), str(copy))
    assert f"continues although versions.jax was '0.1' and is {jax.__version__!r} now" in capfd.readouterr().out
    (override,) = json.loads((copy / "config.json").read_text())["overrides"]
    assert override["differences"] == {"versions.jax": ["0.1", jax.__version__]}


def test_a_loss_is_known_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "changing.py"
    module.write_text("from spin_jax.losses import logistic as loss\n")
    before = fingerprints._source_digest("changing")
    module.write_text("from spin_jax.losses import hinge as loss\n")
    assert fingerprints._source_digest("changing") != before


def test_the_commit_of_the_code(monkeypatch):
    """Git's, of the package's own files; without git whatever the installation knows."""
    known = subprocess.run(
        ["git", "log", "-1", "--format=%H", "--", "spin_jax"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if known.stdout.strip():
        assert fingerprints.commit() in (known.stdout.strip(), f"{known.stdout.strip()}, changed")
    installed = unittest.mock.Mock()
    installed.read_text.return_value = '{"vcs_info": {"commit_id": "c0ffee"}}'
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fingerprints.importlib.metadata, "distribution", lambda name: installed)
    assert fingerprints.commit() == "c0ffee"
    installed.read_text.return_value = None
    assert fingerprints.commit() is None


def test_one_run_at_a_time(finished):
    """A second one is refused while the first lives, and no longer."""
    program = f"""
import sys, time
from spin_jax.storage import files
with files.held({str(finished)!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another run .process {other.pid} on "):
            spin_jax.run(tiny(), str(finished))
    finally:
        other.kill()
        other.wait()
    (finished / "iteration_0" / ".samples.jsonl.1234.tmp").write_text("half a fi")
    spin_jax.run(tiny(), str(finished))
    assert not list(finished.rglob(".*.tmp"))


def test_secrets_stay_out_of_what_is_written(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = "hf_abcdefghijklmnop https://me:geheim@host/x 0123456789abcdef sk-aaaabbbbccccddddeeee hf_x"
    assert secrets.redacted(text) == "[secret] https://[secret]@host/x [WANDB_API_KEY] [secret] hf_x"
    c = config.resolve(tiny(data={"revision": "hf_abcdefghijklmnop"}))
    assert fingerprints.recorded(c)["data"]["revision"] == "[secret]"
    processes.say("token 0123456789abcdef")
    cli.fail("bad token 0123456789abcdef")
    assert "0123456789abcdef" not in "".join(capfd.readouterr())


# --- curves --------------------------------------------------------------------------------------


def written(workdir, metric, upto, start=0):
    for step in range(start, upto):
        metric.write("train", 0, step, {"loss": 10.0 * step, "nothing": float("nan")})


def test_tensorboard_goes_on_without_doubles(tmp_path):
    """Steps 3 and 4 were written before a kill and come again: as TensorBoard reads it, each step once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = metrics.Metrics(tmp_path, tensorboard=True)
    written(tmp_path, first, 5)
    first.flush()
    again = metrics.Metrics(tmp_path, tensorboard=True)  # after a kill: the first was never closed
    again.rewind("train", 0, lambda step: step >= 3)
    written(tmp_path, again, 7, start=3)
    again.write("eval", 0, 0, {"nll": 1.0})
    again.close()
    curve = EventAccumulator(str(tmp_path / "tensorboard" / "train"))
    curve.Reload()
    assert [(e.step, e.value) for e in curve.Scalars("train/loss")] == [(n, 10.0 * n) for n in range(7)]


def test_wandb_hears_every_row_once(tmp_path, monkeypatch):
    """What it already has is left out, and what a kill kept from it is told when the run goes on."""
    logged = {}

    class Run:
        step = 0

        def log(self, values, step):
            assert step >= self.step
            logged.setdefault(step, values)
            Run.step = step + 1

        def finish(self):
            pass

    started = []
    stub = type(sys)("wandb")
    stub.init = lambda **options: started.append(options) or Run()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    first = metrics.Metrics(tmp_path, wandb_project="p", config={"seed": 1})
    written(tmp_path, first, 5)
    Run.step = 2  # the rest did not reach it
    for step in (2, 3, 4):
        del logged[step]
    again = metrics.Metrics(tmp_path, wandb_project="p")
    again.rewind("train", 0, lambda step: step >= 4)
    written(tmp_path, again, 6, start=4)
    again.close()
    assert [logged[n]["train/loss"] for n in sorted(logged)] == [0, 10, 20, 30, 40, 50]
    assert [logged[n]["train/step"] for n in sorted(logged)] == list(range(6))
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["config"] == {"seed": 1}


# --- the best of them ----------------------------------------------------------------------------


def test_the_best_iteration_is_copied(copy):
    c = tiny(checkpoint={"best": "nll"}, selfplay={"iterations": 2})
    summary = spin_jax.run(c, str(copy))
    best = min(summary[1:], key=lambda row: row["nll"])["iteration"]
    seals.check_seal(copy / "best")
    assert (copy / "best" / "model.safetensors").read_bytes() == weights(copy, best)
    other = 1 - best
    summary[1 + other]["nll"] = 0.0
    (copy / "summary.json").write_text(json.dumps(summary))
    spin_jax.run(c, str(copy))
    assert (copy / "best" / "model.safetensors").read_bytes() == weights(copy, other)
    with pytest.raises(ValueError, match=r"checkpoint\.best='bleu': choose from nll, loss"):
        spin_jax.run(tiny(checkpoint={"best": "bleu"}), str(copy))


# --- signals -------------------------------------------------------------------------------------

SIGNALLED = """
import os, signal, sys, time
from spin_jax.runtime.interrupts import Interrupts
stop = Interrupts(lambda number: (print("quit", number, flush=True), os._exit(128 + number)))
if "asks" in sys.argv:
    stop()
for number in map(int, sys.argv[1].split(",")):
    os.kill(os.getpid(), number)
    time.sleep(0.2)
print("noticed", stop(), flush=True)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        (["15"], 143, "quit 15"),  # nobody has asked: nothing is under way
        (["2"], 130, "quit 2"),
        (["15", "asks"], 0, "noticed 15"),
        (["2", "asks"], 0, "noticed 2"),
        (["2,2", "asks"], 130, "quit 2"),
        (["15,2", "asks"], 130, "quit 2"),
        (["15,15", "asks"], 0, "noticed 15"),  # what preempts a machine may say so twice
    ],
)
def test_signals(arguments, code, output):
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (code, output), ended.stderr


@pytest.mark.parametrize("number", [2, 15])
def test_a_screen_that_is_gone_does_not_matter(number):
    """Ctrl-C ends `tee` as well: the run notices all the same."""
    program = SIGNALLED.replace("stop = Inter", "os.close(1); stop = Inter").replace(
        'print("noticed", stop(), flush=True)', "os._exit(stop())"
    )
    arguments = [sys.executable, "-c", program, str(number), "asks"]
    assert subprocess.run(arguments, cwd=ROOT, check=False).returncode == number


def test_a_forked_child_has_its_own_signals():
    """What ends a worker is no signal to the run, and ends the worker."""
    program = """
import multiprocessing, time
from spin_jax.runtime.interrupts import Interrupts
stop = Interrupts()
stop()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
time.sleep(0.3)
child.terminate()
child.join(10)
print(child.exitcode, stop())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "-15 0", run.stderr


def test_a_notebook_gets_its_signals_back():
    import signal

    before = signal.getsignal(signal.SIGINT)
    with interrupts.listening() as stop:
        assert stop() == 0
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it comes from the other thread
            signal.raise_signal(signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is before
