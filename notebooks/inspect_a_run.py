# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside a run
#
# A workdir holds everything that a run has made: its metrics, the opponents' answers and their log-probs,
# and the model of every iteration. This notebook reads a workdir with at least one finished iteration, whose
# loss compares two answers. A shorter view, of any run, is one HTML page, which you can send to somebody:
#
# ```bash
# python -m spin_jax.report --workdir=DIR
# ```

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
WORKDIR = "/tmp/spin_tiny"  # the workdir of a run, finished or not; this is the first run of the README
TINY = ""  # if there is no run yet, the tiny run is made (three minutes); "smoke" takes half a minute

# %%
import contextlib
import io

if not pathlib.Path(WORKDIR, "summary.json").exists():
    from configs import tiny

    print(f"There is no run in {WORKDIR}, so the tiny run is made in runs/tiny.")
    WORKDIR, recipe = "runs/tiny", tiny.get_config(TINY)
    recipe.selfplay.iterations = 2
    recipe.sft.control = False
    with contextlib.redirect_stdout(io.StringIO()):  # shows only the progress bars
        spin_jax.run(recipe, WORKDIR)
RUN = pathlib.Path(WORKDIR)

# %% [markdown]
# ## The table
#
# `summary.json` has a row for the start and one for each iteration. `configs/README.md` says what each
# number means.

# %%
import json

import pandas as pd

rows = json.loads((RUN / "summary.json").read_text())
ITERATIONS = [row["iteration"] for row in rows if row["iteration"] >= 0]
config = json.loads((RUN / "config.json").read_text())["config"]
metrics = pd.read_json(RUN / "metrics.jsonl", lines=True)
if not ITERATIONS:
    raise ValueError(f"No iteration of {RUN} is finished yet: run this notebook later.")
if "real_logp" not in metrics:
    raise ValueError(
        f"A row of the loss {config['loss']['name']} has one answer, and this notebook compares two: make the page of "
        f"the run, python -m spin_jax.report --workdir={RUN}"
    )

summary = pd.DataFrame(rows).set_index("iteration").rename(index={-1: "start"})
numbers = summary.drop(columns=["control", "final", "stopped"], errors="ignore").T
numbers.style.format(lambda x: f"{x:g}" if x == round(x) else f"{x:.3f}", na_rep="–")

# %% [markdown]
# ## The curves
#
# `metrics.jsonl` has a row for each step of each phase. The *reward* of an answer is β times the
# difference between its log-prob under the model and under the opponent. The margin is the reward of the
# human answer minus the reward of the generated answer. With a `selfplay.pairing` that does not begin with
# `human/`, read "chosen" for "human" and "rejected" for "generated" in all of this notebook.
#
# Look at where the margin comes from. The log-probs of human answers may rise, or those of generated
# answers may fall, or both may fall, the generated ones faster. The last case is common with large models
# and is not a bug.

# %%
import matplotlib.pyplot as plt
import numpy as np

plt.rc("axes", grid=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", alpha=0.25)
plt.rc("figure", dpi=110)
plt.rc("legend", frameon=False)
HUMAN, OPPONENT, BLACK = "#1f5fa8", "#d9822b", "#333333"
OUTLINE = {"histtype": "step", "linewidth": 2}  # of histograms that lie over others

steps = metrics[metrics.phase == "train"].reset_index()
panels = {
    "rewards": {"real_reward": HUMAN, "generated_reward": OPPONENT},
    "margin": {"margin": BLACK},
    "log-probs (nats per answer)": {"real_logp": HUMAN, "generated_logp": OPPONENT},
}
if config["selfplay"].get("pairing", "human/own").startswith("human/"):
    FIRST, SECOND = "human", "answer"
    labels = {"real": "human answers", "generated": "the opponent's"}
else:
    FIRST, SECOND = "chosen", "rejected"
    labels = {"real": "chosen answers", "generated": "rejected answers"}

figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for axis, (title, curves) in zip(axes, panels.items(), strict=True):
    for key, color in curves.items():
        for t, part in steps.groupby("iteration"):
            label = labels.get(key.split("_")[0]) if t == ITERATIONS[0] else None
            axis.plot(part.index, part[key], color=color, label=label)
    for t, part in steps.groupby("iteration"):
        axis.axvline(part.index[0], color="grey", linewidth=0.8, linestyle=":")
        axis.text(part.index[0], 1, f" {t}", transform=axis.get_xaxis_transform(), fontsize=8, va="top")
    axis.set(title=title, xlabel="step (dotted: an iteration begins)")
axes[0].legend()
plt.show()

# %% [markdown]
# ## The pairs
#
# `iteration_t/pairs/` holds the opponent's answers beside the human answers, as conversations and as token
# ids. `iteration_t/scores/` holds the log-probs of both answers of each pair that iteration t trains on, under
# its opponent: `chosen_id` and `sample_id` are the numbers of the two among the answers to the prompt, and −1 is
# the human answer. From the second iteration on there are also scores of the previous iteration's pairs, because
# these are trained on again.


# %%
def read(t, kind, prefix="train"):
    """The rows of an iteration's parquet files."""
    files = sorted((RUN / f"iteration_{t}" / kind).glob(f"{prefix}-*.parquet"))
    return pd.concat(map(pd.read_parquet, files), ignore_index=True)


HUMAN_ANSWER = -1
IDS = ["prompt_id", "chosen_id", "sample_id"]  # which pair it is


def scored(t, source):
    """The pairs of iteration `source`'s answers, with the log-probs that iteration t's opponent gives them."""
    answers = {(row.prompt_id, row.sample_id): row for row in read(source, "pairs").itertuples()}
    pairs = read(t, "scores", f"iteration_{source}-train")
    pairs = pairs.assign(chosen_id=pairs.get("chosen_id", HUMAN_ANSWER)).fillna({"chosen_id": HUMAN_ANSWER})
    for name, number, beside in ((FIRST, "chosen_id", "sample_id"), (SECOND, "sample_id", "chosen_id")):
        found = []
        for prompt, own, other in pairs[["prompt_id", number, beside]].itertuples(index=False, name=None):
            row = answers[prompt, other if own == HUMAN_ANSWER else own]  # each has the human answer, too
            human = row.real, row.real_tokens, False
            found.append(human if own == HUMAN_ANSWER else (row.generated, row.generated_tokens, row.truncated))
        pairs[name] = [turns[-1]["content"] for turns, _, _ in found]
        pairs[f"{name}_tokens"] = [len(tokens) for _, tokens, _ in found]
        pairs["truncated"] = [truncated for _, _, truncated in found]  # of the second
    pairs["question"] = [turns[-2]["content"] for turns, _, _ in found]
    return pairs


def show(table):
    """Shows text aligned to the left, with its line breaks."""
    look = {"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top"}
    return table.style.hide().format(precision=1).set_properties(**look)


pairs = {t: scored(t, t) for t in ITERATIONS}
WORDS = ["question", FIRST, SECOND]
for t in ITERATIONS:
    same, cut = (pairs[t][FIRST] == pairs[t][SECOND]).mean(), pairs[t].truncated.mean()
    print(f"iteration {t}: {len(pairs[t])} pairs, {same:.0%} the same answer twice, {cut:.0%} cut off")

# %% [markdown]
# These are the longest answers of the last opponent. If a model repeats itself, you see it here first.

# %%
last = pairs[ITERATIONS[-1]]
show(last.nlargest(4, f"{SECOND}_tokens")[[*WORDS, f"{SECOND}_tokens"]])

# %% [markdown]
# How long are the answers? Look closer if they grow from iteration to iteration, or if many of them are at
# the right edge: those were cut off.

# %%
first_tokens, second_tokens = f"{FIRST}_tokens", f"{SECOND}_tokens"
longest = max(table[[first_tokens, second_tokens]].max().max() for table in pairs.values())
bins = np.arange(longest + 2) - 0.5 if longest < 40 else np.linspace(0, longest, 41)
figure, axes = plt.subplots(1, len(pairs), figsize=(4 * len(pairs), 3.2), layout="constrained", squeeze=False)
for axis, (t, table) in zip(axes.flat, pairs.items(), strict=True):
    axis.hist(table[first_tokens], bins, color=HUMAN, alpha=0.35, label=labels["real"])
    axis.hist(table[second_tokens], bins, color=OPPONENT, label=labels["generated"], **OUTLINE)
    axis.set(title=f"iteration {t}", xlabel="tokens")
axes[0, 0].legend()
axes[0, 0].set_ylabel("pairs")
plt.show()

# %% [markdown]
# ## The opponents' log-probs
#
# Each point is a pair whose answers differ. Below the diagonal, the opponent itself gave the human answer
# the higher probability and sampled the other one by chance. Above the diagonal, the opponent preferred its
# own answer. Training works against both. (With short answers many points lie on a curve: there the two
# answers have nearly all the probability together.)

# %%
differ = {t: table[table[FIRST] != table[SECOND]] for t, table in pairs.items()}
low = min(table[["real_logp", "generated_logp"]].quantile(0.01).min() for table in differ.values())
figure, axes = plt.subplots(1, len(pairs), figsize=(4 * len(pairs), 4), layout="constrained", squeeze=False)
for axis, (t, table) in zip(axes.flat, differ.items(), strict=True):
    axis.plot([low, 0], [low, 0], color="grey", linewidth=0.8)
    axis.scatter(table.real_logp, table.generated_logp, s=8, alpha=0.25, color=OPPONENT, linewidths=0)
    axis.set(xlim=(low, -low / 50), ylim=(low, -low / 50), aspect="equal")
    axis.set(title=f"iteration {t}: {len(table)} pairs", xlabel=f"log p, {labels['real']}")
axes[0, 0].set_ylabel(f"log p, {labels['generated']}")
plt.show()

# %% [markdown]
# ## What an iteration changed
#
# These are pairs of the first iteration. They were scored by its opponent, and again by the model that the
# iteration trained. `margin` is the change between the two, in nats and without β. The table begins with the
# pairs that gained most and ends with those that gained least.

# %%
gained = None
if len(ITERATIONS) > 1 and config["selfplay"]["mix_previous"]:
    first, second = ITERATIONS[:2]
    after = scored(second, first)[[*IDS, "real_logp", "generated_logp"]]
    gained = pairs[first].merge(after, on=IDS, suffixes=("", "_after"))
    gained["first_gained"] = gained.real_logp_after - gained.real_logp
    gained["second_gained"] = gained.generated_logp_after - gained.generated_logp
    gained["margin"] = gained.first_gained - gained.second_gained
    gained = gained[gained[FIRST] != gained[SECOND]].sort_values("margin", ascending=False)
    shown = pd.concat([gained[:4], gained[-4:]])[[*WORDS, "first_gained", "second_gained", "margin"]]
    shown = show(shown.rename(columns={"first_gained": f"{FIRST} gained", "second_gained": f"{SECOND} gained"}))
else:
    shown = "This needs two iterations and selfplay.mix_previous."
shown

# %%
if gained is not None:
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    ends = np.quantile(gained[["first_gained", "second_gained"]], [0.005, 0.995])
    bins = np.linspace(*ends, 50)
    axis.hist(gained.first_gained, bins, color=HUMAN, alpha=0.35, label=labels["real"])
    axis.hist(gained.second_gained, bins, color=OPPONENT, label=labels["generated"], **OUTLINE)
    axis.set(title=f"what iteration {first} changed in its pairs", xlabel="change of the log-prob (nats)")
    axis.set_ylabel("pairs")
    axis.legend()
    plt.show()

# %% [markdown]
# ## Answers side by side
#
# `samples.jsonl` has greedy answers to the same held-out questions for each iteration.

# %%
answers = {}
for t in ITERATIONS:
    samples = pd.read_json(RUN / f"iteration_{t}" / "samples.jsonl", lines=True, dtype=False)
    answers |= {"question": samples.prompt.map(lambda turns: turns[-1]["content"]), "human": samples.real}
    answers[f"iteration {t}"] = samples.generated
show(pd.DataFrame(answers))

# %% [markdown]
# ## Your own sentence
#
# You can load the model of every iteration. How likely is each of these answers under the start and under
# the last model?

# %%
PROMPT = "12+9+7"
ANSWERS = ["28", "27", "38", "I do not know"]

start = RUN / "start" / "model"
models = {
    "start": spin_jax.load(str(start) if start.exists() else config["model"]["path"]),
    "last": spin_jax.load(str(RUN / f"iteration_{ITERATIONS[-1]}" / "model")),
}
asked = [[{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}] for answer in ANSWERS]
mine = pd.DataFrame({name: spin_jax.score(model, asked) for name, model in models.items()}, index=ANSWERS)
mine.rename_axis(PROMPT).style.format(precision=2).set_caption("log p of the answer, in nats")
