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
# SPIN turns a model that can answer into one that answers better, with no new labels. In every
# iteration the model of the last one, the *opponent*, answers the training questions; the new model
# learns to tell the human answers from those; and then it is the opponent.
#
# Here a model of 135 million parameters plays on grade-school maths, cut down to what the GPU of a
# free Colab can do in minutes (*Runtime → Change runtime type*). A CPU gets a tenth of it, and takes
# twenty minutes to show that all works. With no network, a tiny model that learns sums takes its
# place.

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

# %% [markdown]
# **What to play with.** Everything that you are likely to change first.

# %% tags=["parameters"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a hub id, or a folder; Mistral, Llama, Qwen, Phi, Gemma …
DATA = "openai/gsm8k"  # questions and human answers
ROWS = None  # how many of them; None: what takes minutes on this machine
WORKDIR = "runs/spin_small_model"  # the run is kept here; running again goes on with it
TINY = ""  # of the tiny model: "smoke" takes half a minute in place of three, and learns next to nothing

# %% [markdown]
# **Is there a network?** One question to the hub, and at most ten seconds of waiting for its answer.

# %% tags=["network"]
import concurrent.futures
import os

from huggingface_hub import HfApi


def reachable(name):
    """Whether the model is a folder here, or the hub has it and answers."""
    if os.path.isdir(name):
        return True
    asked = concurrent.futures.ThreadPoolExecutor().submit(HfApi().model_info, name, timeout=5)
    try:
        asked.result(timeout=10)
    except Exception as error:  # no network, no such model, offline mode …
        print(f"The hub gave no answer about {name} ({type(error).__name__}).")
        return False
    return True


online = reachable(MODEL)
if online:
    print(f"Playing with {MODEL} on {DATA}.")
else:
    print("So this falls back to the tiny model, which is made here and learns sums like 12+19+7.")

# %% [markdown]
# **What can the machine do?** Weights are always kept in float32; `dtype` is what the model computes
# in. bfloat16 is fast where the hardware has it: TPUs, and GPUs since Ampere (A100, L4). The T4 of a
# free Colab has not, and float16 would need its gradients scaled, so there, and on CPUs, it is
# float32.

# %%
import jax

device = jax.devices()[0]
accelerated = device.platform != "cpu"
ampere = device.platform == "gpu" and float(device.compute_capability) >= 8
dtype = "bfloat16" if ampere or device.platform == "tpu" else "float32"
print(f"{device.device_kind}: computing in {dtype}")

# %% [markdown]
# **The recipe** is a config: `spin_jax/config.py` has every key with its meaning, and a mistyped one
# names the nearest. `configs/small_gsm8k.py` is made for one GPU; here it is cut down to minutes.

# %%
from configs import small_gsm8k, tiny

if online:
    config = small_gsm8k.get_config()
    config.model.path = MODEL
    config.model.dtype = dtype
    config.data.path = DATA
    config.data.name = "main" if DATA == "openai/gsm8k" else None  # it has two versions
    config.data.limit = ROWS or (480 if accelerated else 40)
    config.lengths.max_prompt = 192
    config.lengths.max_length = 384
    config.sampling.max_new_tokens = 192
    config.selfplay.iterations = 2 if accelerated else 1
    config.train.batch_size = 16
    config.train.learning_rate = (2e-6,)  # four times the paper's: there are far fewer steps
else:
    config = tiny.get_config(TINY)
    config.selfplay.iterations = 2
    config.sft.control = False

# %% [markdown]
# **The run.** It says what differs from the defaults, what it is about to do, and how far it is.
# Interrupt it whenever you like: run the cell again, and it goes on where it stopped.
#
# The table at its end is about questions that were kept from training. NLL is how surprised a model
# is by the human answers; *right* is the share of its own answers that are. Where a few dozen were
# asked, one more is chance.

# %%
rows = spin_jax.run(config, WORKDIR)

# %% [markdown]
# **The curves of training.** The *margin* is what SPIN maximizes: how much more the human answer has
# gained over the opponent than the generated one has, times β. Each iteration starts at 0, from the
# opponent itself.
#
# Look at the log-probs, too. The loss asks for their difference alone, so that of the human answers
# may fall while the margin grows. That is no bug; `config.loss.nll_weight` holds it up.

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
right.set(title="log-prob (nats an answer)", xlabel="step (dotted: an iteration begins)")
right.legend()
plt.show()

# %% [markdown]
# **Before and after.** The start and the last iteration answer the same held-out questions, greedily.
# Each iteration's model is a Hugging Face folder: transformers and vLLM open it as well.

# %%
last = pathlib.Path(WORKDIR, f"iteration_{rows[-1]['iteration']}")
samples = pd.read_json(last / "samples.jsonl", lines=True, dtype=False)
questions = list(samples.prompt)

answers = {"question": [turns[-1]["content"] for turns in questions], "human": samples.real}
for name, path in {"start": MODEL if online else f"{WORKDIR}/start/model", "last": f"{last}/model"}.items():
    model = spin_jax.load(path, dtype=dtype)
    answers[name] = spin_jax.generate(model, questions, max_new_tokens=config.sampling.max_new_tokens)

look = {"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top", "min-width": "5em"}
pd.DataFrame(answers).style.hide().set_properties(**look)

# %% [markdown]
# **Your own question.**

# %%
mine = "Tom has 12 apples, buys 19 more and eats 7. How many are left?" if online else "12+19+7"
print(spin_jax.generate(model, [[{"role": "user", "content": mine}]], max_new_tokens=128)[0])

# %% [markdown]
# **What to try next.** Take another `WORKDIR` with each: a run refuses to go on as a different one.
#
# * More rows: `ROWS = 2000`. More than anything else, this is what decides whether the gain is more
#   than chance.
# * A model that was never fine-tuned: `config.sft.epochs = 2` teaches it the human answers first.
# * Less memory: `config.train.lora_rank = 16`, and a learning rate ten times as high.
# * Does it beat more of the same? `config.sft.control = True` trains the start on by SFT for as many
#   steps.
# * Your data: `DATA = "mine.jsonl"`, rows of `messages`, or of `question` and `answer`.
# * Your loss: `modify_the_loss.ipynb`. A closer look at this run: `inspect_a_run.ipynb`, with its
#   `WORKDIR`.
