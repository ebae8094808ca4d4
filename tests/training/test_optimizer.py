"""Optimizers and schedules are those of PyTorch and transformers."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from training_examples import RMSPROP

from spin_jax.errors import ConfigError
from spin_jax.training.optimizer import make_optimizer


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rmsprop_is_torchs(weight_decay):
    """Three steps of torch.optim.RMSprop on the same gradients; float32 rounding apart."""
    torch = pytest.importorskip("torch")
    options = dataclasses.replace(RMSPROP, weight_decay=weight_decay)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.RMSprop([theirs], lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=weight_decay)
    optimizer, ours = make_optimizer(options), jnp.asarray(start)
    state = optimizer.init(ours)
    for _ in range(3):
        gradient = (rng.normal(size=(5, 3)) * 1e-3).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        reference.step()
        direction, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = ours - 1e-2 * direction
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch")
    options = dataclasses.replace(RMSPROP, optimizer="adamw", decay=0.999, weight_decay=0.1)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    optimizer, ours = make_optimizer(options), jnp.asarray(start)
    state = optimizer.init(ours)
    for _ in range(3):
        gradient = rng.normal(size=(5, 3)).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        reference.step()
        direction, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = ours - 1e-2 * direction
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_schedules_are_transformers(schedule, warmup):
    """Every step's learning rate equals transformers' scheduler's; float32 rounding apart."""
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    options = dataclasses.replace(RMSPROP, learning_rate=5e-7, schedule=schedule, warmup_ratio=warmup)
    total = 57
    ours = options.learning_rates(total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-7)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, math.ceil(total * warmup), total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_impossible_options():
    with pytest.raises(ValueError, match="rmsprop, adamw, adafactor"):
        dataclasses.replace(RMSPROP, optimizer="sgd")
    with pytest.raises(ValueError, match="linear, cosine, constant"):
        dataclasses.replace(RMSPROP, schedule="step")
    with pytest.raises(ValueError, match=r"schedule_epochs=1 is shorter than epochs=2: .* Set it to epochs or more"):
        dataclasses.replace(RMSPROP, epochs=2, schedule_epochs=1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_steps_that_learn_nothing(schedule):
    """The warm-up makes the rate of the first step 0: a run of one step is refused, one of few gets a note."""
    options = dataclasses.replace(RMSPROP, warmup_ratio=0.1, schedule=schedule)
    with pytest.raises(ConfigError, match=r"train: .* 0 in the only optimizer step, .* Set train\.warmup_ratio=0"):
        options.check_schedule("train", 1)
    (note,) = options.check_schedule("sft", 4)
    assert "sft: the learning rate is 0 in 1 of 4 optimizer steps" in note
    assert not options.check_schedule("sft", 11)
    assert not options.check_schedule("sft", 0)
    assert not dataclasses.replace(options, warmup_ratio=0.0).check_schedule("train", 1)
    with pytest.raises(ConfigError, match="0 in the only optimizer step,"):
        options.check_schedule("train", 1, 5)  # the first step of a longer schedule
    with pytest.raises(ConfigError, match="0 in all 20 optimizer steps"):  # it is 0 in float32
        dataclasses.replace(options, learning_rate=1e-50).check_schedule("train", 20)
