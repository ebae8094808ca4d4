"""Self-play fine-tuning (SPIN, arXiv 2401.01335) in JAX.

    model = spin_jax.load("path-or-hub-id", revision=None)   # .config .params .tokenizer
    spin_jax.logits(model, tokens)                           # int [B, T] right-padded → float32 [B, T, V]
    spin_jax.score(model, conversations)                     # → float32 [B]
    spin_jax.generate(model, conversations, max_new_tokens=256, temperature=0.0, seed=0)  # → list of str
    spin_jax.save(model, "dir")                              # transformers, vLLM, lm-eval open it
    spin_jax.run(config, workdir)                            # the whole of self-play
    spin_jax.losses.LOSSES["logistic"](policy, opponent, beta=0.1)

Names are imported at their first use, so that an error in a flag appears without seconds of imports.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin_jax import config, losses
    from spin_jax.models.loading import load
    from spin_jax.models.saving import save
    from spin_jax.sampling.generate import generate
    from spin_jax.selfplay.algorithm import run
    from spin_jax.training.log_probs import logits, score

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # they only say that there is no PyTorch

__version__ = "0.1.0"
__all__ = ["config", "generate", "load", "logits", "losses", "run", "save", "score"]

_MODULES = {
    "generate": "sampling.generate",
    "load": "models.loading",
    "logits": "training.log_probs",
    "run": "selfplay.algorithm",
    "save": "models.saving",
    "score": "training.log_probs",
}


def __getattr__(name: str) -> Any:
    if name in ("config", "losses"):
        return importlib.import_module(f"spin_jax.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'spin_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spin_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
