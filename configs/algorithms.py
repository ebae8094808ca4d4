"""SPIN and its relatives as a few keys each, over another config.

    python -m spin_jax.main --config=configs/algorithms.py:rest_em --workdir=DIR                # over tiny.py
    python -m spin_jax.main --config=configs/algorithms.py:rest_em/small_gsm8k --workdir=DIR …  # over another

`python -m spin_jax.sweep` runs several, with several seeds, and compares them: the README's table. SFT alone
is any config with --config.selfplay.iterations=0 and sft.epochs; beside self-play it is sft.control.
"""

import runpy
from pathlib import Path
from typing import Any

# What makes the algorithm, whatever it learns.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "spin": {},  # arXiv 2401.01335
    "hinge": {"loss.name": "hinge"},
    "exponential": {"loss.name": "exponential"},
    "correlation": {"loss.name": "correlation"},
    "spin_nll": {"loss.nll_weight": 1.0},
    # The reference stays partly the start: arXiv 2404.04291.
    "alpha_spin": {"loss.reference_alpha": 0.5},
    # No reference, and what the start answered as a third answer: arXiv 2601.08198.
    "tspin": {"loss.name": "tspin", "loss.beta": (0.1,)},
    # Pairs and reference stay: arXiv 2305.18290. Pairs of your own: --config.selfplay.pairs=PATH.
    "dpo": {"selfplay.iterations": 1},
    "ipo": {"selfplay.iterations": 1, "loss.name": "ipo"},  # arXiv 2310.12036
    # Likelihood of the own answers that eval.verifier takes, each time from the start: arXiv 2312.06585.
    "rest_em": {
        "loss.name": "likelihood",
        "selfplay.samples": 4,
        "selfplay.rows": "right",
        "selfplay.restart": True,
        "selfplay.mix_previous": 0,
    },
    # A squared loss toward the win probability that selfplay.scorer gives: arXiv 2405.00675.
    "sppo": {"loss.name": "sppo", "selfplay.samples": 5, "selfplay.mix_previous": 0, "loss.beta": (1e-3,)},
}

# Numbers that suit answers of two digits, and some 188 steps of 256 rows for all.
TINY: dict[str, dict[str, Any]] = {
    "exponential": {"loss.beta": (3.0,), "train.learning_rate": (1e-4, 7e-5, *[3e-5] * 8)},
    "correlation": {"train.learning_rate": (1e-5, 7e-6, *[3e-6] * 8)},
    "spin_nll": {"loss.nll_weight": 10.0},
    "dpo": {"train.epochs": (5,)},
    "ipo": {"train.epochs": (5,), "loss.beta": (0.5,)},
    "rest_em": {"selfplay.samples": 2},
    "sppo": {"selfplay.samples": 2, "selfplay.scorer": "spin_jax.tiny:wins", "loss.beta": (0.25,)},
}


def get_config(variant: str = "spin") -> Any:
    name, _, base = variant.partition("/")
    if name not in ALGORITHMS:
        raise ValueError(f"configs/algorithms.py has {', '.join(ALGORITHMS)}, and not {name!r}")
    file, _, base_variant = (base or "tiny").partition(":")
    get_base = runpy.run_path(str(Path(__file__).with_name(f"{file}.py")))["get_config"]
    c = get_base(base_variant) if base_variant else get_base()
    keys = ALGORITHMS[name]
    if file == "tiny":
        keys = {"sft.control": name == "spin", **keys, **TINY.get(name, {})}
    for key, value in keys.items():
        section, _, last = key.partition(".")
        c[section][last] = value
    return c
