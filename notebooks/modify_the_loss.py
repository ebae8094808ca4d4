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
# SPIN's loss is one function of log-probs. In this notebook you write another loss in a file of your own,
# plot it beside the paper's four losses, and train with it and with the logistic loss from the same start.
# You do not change the package. It takes three minutes on two CPU cores; half of that is SFT of the start.

# %% [markdown]
# **Setup.** In a clone where `pip install -e . jupyter` was run, run this cell as it is. On Colab, or any
# other machine without spin_jax, activate its second line first.

# %%
# On Colab, delete the first "# " of the next line and fill in OWNER ("./spin_jax_code[cuda]" for a GPU).
# # !git clone -q https://github.com/OWNER/spin_jax spin_jax_code && pip install -q -e "./spin_jax_code"
import pathlib
import sys
import warnings

sys.path.insert(0, "spin_jax_code")  # the clone that the line above makes
import spin_jax

sys.path.insert(0, str(pathlib.Path(spin_jax.__file__).parents[1]))  # configs/ is beside the package
warnings.filterwarnings("ignore", message="IProgress not found")  # plain progress bars are fine

# %% tags=["parameters"]
TINY = ""  # "smoke" takes one minute, but its model hardly learns anything
RUNS = "runs/modify_the_loss"  # holds one workdir for each loss

# %% [markdown]
# ## Write it
#
# A loss gets the log-probs of two answers under two models, summed over tokens, in nats: `policy.real`,
# `policy.generated`, `opponent.real` and `opponent.generated`, each of shape [B]. It returns one number for
# each pair, again [B].
#
# `margin` is the paper's
# $t = \beta\,[\log\frac{p_\theta(y|x)}{p_{\theta_t}(y|x)} - \log\frac{p_\theta(y'|x)}{p_{\theta_t}(y'|x)}]$,
# where y is the human answer and y′ the generated one. The loss below is the logistic loss with label
# smoothing: it assumes that in one pair of ten the generated answer is the better one. It therefore asks for
# a margin, but not for a large one.

# %%
# %%writefile my_losses.py
import jax

from spin_jax.losses import margin


def smoothed(policy, opponent, *, beta, doubt=0.1):
    t = margin(policy, opponent, beta)
    return (1 - doubt) * jax.nn.softplus(-t) + doubt * jax.nn.softplus(t)


# %% [markdown]
# A run notices by itself when the file was edited. For the plots of this notebook, reload the module.

# %%
import importlib

import my_losses

importlib.reload(my_losses)

# %% [markdown]
# ## Look at it
#
# A loss of the margin alone can be plotted as ℓ(t). Training starts from the opponent, so every pair starts
# at t = 0. The gradient of a pair is proportional to −ℓ′(t): where ℓ′ is near 0, the pair no longer counts.

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
# The paper asks for a convex, decreasing ℓ with ℓ′(0) < 0. The smoothed loss is convex, but it decreases only
# until t = log 9 ≈ 2.2. Beyond that it pulls the margin back.
#
# ## One start for both losses
#
# This is the model of the README's first run: it learns sums by SFT, and SFT stops while the model still
# makes errors. A run with `selfplay.iterations = 0` makes the start and nothing else.

# %%
import contextlib
import io
import shutil

from configs import tiny


def play(name, loss, start=None):
    """One iteration of self-play with a loss, from the model in the folder `start`; None makes that model."""
    config = tiny.get_config(TINY)
    config.sft.control = False
    config.eval.samples = 4
    config.selfplay.iterations = 1 if start else 0
    config.loss.name = loss
    if start:
        config.model.path, config.model.architecture, config.model.tokenizer = start, {}, None
        config.sft.epochs = 0
    workdir = f"{RUNS}/{name}"
    shutil.rmtree(workdir, ignore_errors=True)  # a workdir that began with another loss is refused
    with contextlib.redirect_stdout(io.StringIO()):  # shows only the progress bars
        return spin_jax.run(config, workdir)


play("start", "logistic")
START = f"{RUNS}/start/start/model"

# %% [markdown]
# ## Train with it
#
# A run needs only the name `module:function`; on the command line it is
# `--config.loss.name=my_losses:smoothed`. Start, seed and β are the same, so both losses see the same answers
# of the opponent, in the same order.

# %%
results = {
    "logistic": play("logistic", "logistic", START),
    "smoothed": play("smoothed", "my_losses:smoothed", START),
}

# %% [markdown]
# ## See its curve
#
# The values of two losses cannot be compared. These can: the margin, the share of pairs with a positive
# margin, and the log-prob of the human answers.

# %%
import pandas as pd


def curves(name):
    """The training steps of a run."""
    metrics = pd.read_json(f"{RUNS}/{name}/metrics.jsonl", lines=True)
    return metrics[metrics.phase == "train"]


panels = {
    "margin": "margin",
    "accuracy": "share of pairs with a positive margin",
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
# Both curves wobble in the same places because both runs see the same batches. Where the opponent's answer
# equals the human answer, token for token, the margin is always 0 and no loss can learn from the pair. The
# averages include these pairs.
#
# The next table is about held-out sums:

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
# The KL divergence says how far a model has moved from the start. On this seed the smoothed loss gains about
# as much and moves a tenth as far. One seed proves little: before you believe a difference, run several
# seeds (`config.seed`).
#
# ## When a loss is broken
#
# Two mistakes are easy to make. One is to average over the pairs: the training step does that itself,
# because it knows which rows are padding. The other is a slope that is not finite at t = 0, where every pair
# begins. Both are reported before anything is computed.

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
# Change `my_losses.py` above and run the cells from there on. Ideas: a square, `(t − 1)²`; the logistic loss
# plus `− 0.1 * policy.real`, which keeps the human answers likely; a margin without the opponent,
# `beta * (policy.real − policy.generated)`. Published relatives of SPIN are in `configs/algorithms.py`.
#
# Outside of a notebook, run this in the folder of your file:
#
# ```bash
# python -m spin_jax.main --config=configs/tiny.py --workdir=/tmp/mine --config.loss.name=my_losses:smoothed
# ```
