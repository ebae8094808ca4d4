"""The end of a training phase: its checkpoint, and a phase that learns nothing."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from etils import epath
from training_examples import RMSPROP

from spin_jax import config
from spin_jax.errors import ConfigError, NothingToTrainOn
from spin_jax.selfplay.fitting import Fitting
from spin_jax.storage import checkpoints, files, seals


@pytest.mark.parametrize("seal", ["none", "of other bytes"])
def test_a_bad_checkpoint_takes_no_room_from_its_replacement(seal, tiny_model, tmp_path, monkeypatch):
    """A kill during the save leaves half of one; of a disk with room for one, all is free when room is asked for."""
    path, params = tmp_path / "checkpoint", tiny_model.params
    checkpoints.save(path, params)
    (path / files.SUMS).unlink()
    if seal == "of other bytes":
        seals.seal(path)
        next(path.glob("state/d/*")).write_bytes(b"damaged")
    asked = []
    monkeypatch.setattr(files, "check_room", lambda *what: asked.append(path.exists()))
    fitting = Fitting(types.SimpleNamespace(model=tiny_model), None, None)
    fitting.checkpointed(epath.Path(tmp_path), lambda: params)
    assert asked == [False, False]  # before the training, and before the save
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(path, params), params)


@pytest.mark.parametrize(
    ("name", "t", "error"),
    [
        ("train", 2, NothingToTrainOn),
        ("train", 1, ConfigError),
        ("control", 2, ConfigError),
    ],
)
def test_a_phase_whose_steps_learn_nothing(name, t, error):
    """After the first iteration it ends self-play; else the message says how this workdir goes on."""
    run = types.SimpleNamespace(config=config.Config({"selfplay": {"start": 1}}))
    options = dataclasses.replace(RMSPROP, schedule="linear", warmup_ratio=0.1)
    phase = types.SimpleNamespace(name=name, iteration=t, options=options, steps=1, schedule_steps=1)
    fitting = Fitting(run, None, None)
    with pytest.raises(error, match=r"0 in the only .* Set .*warmup_ratio=0, .*; in this workdir .*resume_anyway=True"):
        fitting.fit(None, phase)
