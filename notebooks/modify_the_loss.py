# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own loss, and its curve
#
# SPIN's loss is one function of log-probs. In this notebook you write another one in a file of your
# own, look at its shape beside the paper's four, and train with it and with the logistic loss from
# the same start. Nothing in the package changes. It takes three minutes on two CPU cores, and half of
# that is the start.

# %% [markdown]
# **Setup.** Where spin_jax is installed (`pip install -e .` in a clone), this cell only imports it.
# On a bare machine, a Colab say, it fetches the code from `REPO` and installs it; if you are asked to
# restart the session afterwards, do, and run this cell again.

# %%
import importlib.util
import pathlib
import shutil
import subprocess
import sys
import warnings

REPO = "https://github.com/OWNER/spin_jax"  # put here where you have this notebook from

if importlib.util.find_spec("spin_jax") is None:
    code = pathlib.Path("spin_jax_code").resolve()
    if "OWNER" in REPO and not code.exists():
        raise ValueError(
            "spin_jax is not installed: write into REPO where its code is, and run this cell again"
        )
    if not code.exists():
        subprocess.run(["git", "clone", "-q", REPO, str(code)], check=True)
    extra = "[cuda]" if shutil.which("nvidia-smi") else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{code}{extra}"], check=True)
    sys.path.insert(0, str(code))

import spin_jax

sys.path.insert(0, str(pathlib.Path(spin_jax.__file__).parents[1]))  # configs/ is beside the package
warnings.filterwarnings("ignore", message="IProgress not found")  # plain progress bars will do

# %% tags=["parameters"]
TINY = ""  # "smoke" takes a minute, and its model learns next to nothing
RUNS = "runs/modify_the_loss"  # one folder in it for each loss

# %% [markdown]
# ## Write it
#
# A loss gets what two models think of two answers to a prompt, summed log-probs in nats:
# `policy.real`, `policy.generated`, `opponent.real`, `opponent.generated`, each of shape [B], and
# returns one number a pair, [B].
#
# `margin` is the paper's $t = \beta\,[\log\frac{p_\theta(y|x)}{p_{\theta_t}(y|x)} -
# \log\frac{p_\theta(y'|x)}{p_{\theta_t}(y'|x)}]$, with y human and y′ generated. The loss below is
# the logistic one, smoothed: it believes that one pair in ten has its answers the wrong way round, so
# it wants a margin, and not too much of it.

# %%
# %%writefile my_losses.py
import jax

from spin_jax.losses import margin


def smoothed(policy, opponent, *, beta, doubt=0.1):
    t = margin(policy, opponent, beta)
    return (1 - doubt) * jax.nn.softplus(-t) + doubt * jax.nn.softplus(t)


# %% [markdown]
# A run sees when the file has been edited. This notebook's own plots need to be told.

# %%
import importlib

import my_losses

importlib.reload(my_losses)

# %% [markdown]
# ## Look at it
#
# With β = 1 and an opponent to whom all is alike, the margin is the policy's log-prob of the human
# answer: so any loss can be drawn as ℓ(t). Training starts from the opponent, at t = 0 for every
# pair, and moves by −ℓ′(t): a pair whose ℓ′ is near 0 has no more say.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from spin_jax.losses import LOSSES, PairLogps

plt.rc("axes", grid=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", alpha=0.25)
plt.rc("figure", dpi=110)
plt.rc("legend", frameon=False)
STYLES = {
    "logistic": {"color": "#1f5fa8"},
    "hinge": {"color": "#3a8f5c"},
    "exponential": {"color": "#a23b72"},
    "correlation": {"color": "#6b6b6b", "linestyle": "--"},
    "smoothed": {"color": "#d9822b", "linewidth": 2.6},
}


def shape(loss):
    """The loss as a function of t alone."""
    return lambda t: loss(PairLogps(t, 0 * t), PairLogps(0 * t, 0 * t), beta=1.0)


t = jnp.linspace(-4, 6, 401)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for name in STYLES:
    ell = shape(LOSSES.get(name, my_losses.smoothed))
    slope = jax.grad(lambda t, ell=ell: ell(t).sum())
    left.plot(t, ell(t), label=name, **STYLES[name])
    right.plot(t, slope(t), **STYLES[name])
left.set(title="ℓ(t)", xlabel="margin t", ylim=(-2, 6))
right.set(title="its slope, ℓ′(t)", xlabel="margin t", ylim=(-3, 0.5))
right.axhline(0, color="black", linewidth=0.6)
for axis in (left, right):
    axis.axvline(0, color="black", linewidth=0.6, linestyle=":")
left.legend(fontsize=8)
plt.show()

# %% [markdown]
# The paper asks for a convex, decreasing ℓ with ℓ′(0) < 0. Mine is convex, and falls only as far as t
# = log 9 ≈ 2.2: beyond it a pair is pushed back.
#
# ## A start for both
#
# The same model that learns sums as in the README, trained by SFT and stopped while it still errs.
# With no iterations to play, a run makes its start alone.

# %%
import contextlib
import io
import shutil

from configs import tiny


def play(name, loss, start=None):
    """One iteration of self-play with a loss, from the model in a folder; without one, that model is made."""
    config = tiny.get_config(TINY)
    config.sft.control = False
    config.eval.samples = 4
    config.selfplay.iterations = 1 if start else 0
    config.loss.name = loss
    if start:
        config.model.path, config.model.architecture, config.model.tokenizer = start, {}, None
        config.sft.epochs = 0
    workdir = f"{RUNS}/{name}"
    shutil.rmtree(
        workdir, ignore_errors=True
    )  # afresh: a workdir knows the loss it began with, and refuses another
    with contextlib.redirect_stdout(io.StringIO()):  # of what a run says, only the progress
        return spin_jax.run(config, workdir)


play("start", "logistic")
START = f"{RUNS}/start/start/model"

# %% [markdown]
# ## Train with it
#
# `module:function` is all that a run needs to know; on the command line it is
# `--config.loss.name=my_losses:smoothed`. Start, seed and β are the same, so both losses see the very
# same opponent's answers, in the same order.

# %%
results = {
    "logistic": play("logistic", "logistic", START),
    "smoothed": play("smoothed", "my_losses:smoothed", START),
}

# %% [markdown]
# ## See its curve
#
# The values of two losses cannot be compared; what is logged beside them can: the margin, the share
# of pairs where it is above 0, and the log-prob of the human answers.

# %%
import pandas as pd


def curves(name):
    """The training steps of a run."""
    metrics = pd.read_json(f"{RUNS}/{name}/metrics.jsonl", lines=True)
    return metrics[metrics.phase == "train"]


panels = {
    "margin": "margin",
    "accuracy": "share of pairs with a margin above 0",
    "real_logp": "log-prob of the human answers",
}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
for name in results:
    run = curves(name)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        axis.plot(run.step, run[key], label=name, **STYLES.get(name, {}))
        axis.set(title=title, xlabel="step")
axes[0].legend()
plt.show()
print(f"pairs whose answers are identical: {curves('logistic').identical.mean():.0%}")

# %% [markdown]
# What wobbles in step is the batches, which are the same. Where the opponent's answer *is* the human
# one, token for token, the margin is 0 whatever the model does, and no loss can learn from the pair;
# the averages are over those too.
#
# And on sums that were kept from training:

# %%
keys = {
    "nll": "NLL of human answers",
    "greedy_accuracy": "right, greedy",
    "sampled_accuracy": "right, temperature 1",
    "margin": "margin",
    "kl_start": "KL from the start",
}
table = pd.DataFrame({"start": results["logistic"][0], **{name: rows[-1] for name, rows in results.items()}})
table.loc[list(keys)].rename(index=keys).style.format(precision=3, na_rep="–")

# %% [markdown]
# The KL divergence is how far a model has moved from the start. On this seed the smoothed loss gains
# about as much and moves a tenth as far; but one seed is an anecdote. Before you believe a
# difference, run a few (`config.seed`).
#
# ## When a loss is broken
#
# Two mistakes that are easily made: to average over the pairs, where the training step does that
# itself (it knows which rows are padding), and a slope that is no number at t = 0, which is where
# every pair begins. Both are told before anything is computed.

# %%
# %%writefile broken_losses.py
import jax
import jax.numpy as jnp

from spin_jax.losses import margin


def averaged(policy, opponent, *, beta):
    return jax.nn.softplus(-margin(policy, opponent, beta)).mean()


def square_root(policy, opponent, *, beta):
    t = margin(policy, opponent, beta)
    return 1 - jnp.sign(t) * jnp.sqrt(jnp.abs(t))


# %%
for function in ("averaged", "square_root"):
    try:
        play("broken", f"broken_losses:{function}", START)
    except ValueError as error:
        print(f"{error}\n")

# %% [markdown]
# ## Now yours
#
# Change `my_losses.py` above and run on from there. Some to try: a square, `(t − 1)²`; the logistic
# loss with `− 0.1 * policy.real` added, which keeps the human answers likely; a margin without the
# opponent, `beta * (policy.real − policy.generated)`. `configs/algorithms.py` has the relatives of
# SPIN that have a name.
#
# Outside of a notebook, in the folder where your file is:
#
# ```bash
# python -m spin_jax.main --config=configs/tiny.py --workdir=/tmp/mine --config.loss.name=my_losses:smoothed
# ```
