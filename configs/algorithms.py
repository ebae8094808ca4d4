"""SPIN and its relatives: each algorithm is a few keys that are set on top of another config.

    python -m spin_jax.main --config=configs/algorithms.py:rest_em --workdir=DIR                # on tiny.py
    python -m spin_jax.main --config=configs/algorithms.py:rest_em/small_gsm8k --workdir=DIR …  # on another

`python -m spin_jax.sweep` runs several of them with several seeds and compares the results; the table in
configs/README.md was made that way. For SFT alone take any config with --config.selfplay.iterations=0 and
sft.epochs; `sft.control` trains by SFT beside self-play.
"""

import runpy
from pathlib import Path
from typing import Any

# The keys that make each algorithm, whatever the task.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "spin": {},  # arXiv 2401.01335
    "hinge": {"loss.name": "hinge"},
    "exponential": {"loss.name": "exponential"},
    "correlation": {"loss.name": "correlation"},
    "spin_nll": {"loss.nll_weight": 1.0},
    # The reference is a mixture of the opponent and the start: arXiv 2404.04291.
    "alpha_spin": {"loss.reference_alpha": 0.5},
    # The reference is the geometric mean of all opponents so far, which all weigh alike.
    "fictitious_spin": {"loss.reference_decay": 1.0},
    # The opponent is a moving average of the weights after each iteration.
    "ema_spin": {"selfplay.opponent_decay": 0.5},
    # The same on fixed pairs, which each iteration gets: --config.selfplay.pairs=PATH,PATH,PATH. The paper's α is
    # 1 − opponent_decay: arXiv 2404.09656, with the α of TRL.
    "tr_dpo": {"selfplay.opponent_decay": 0.4, "selfplay.mix_previous": 0},
    # No reference model; the answer of the start is a third answer in each row: arXiv 2601.08198.
    "tspin": {"loss.name": "tspin", "loss.beta": (0.1,)},
    # Fixed pairs and a fixed reference: arXiv 2305.18290. For your own pairs: --config.selfplay.pairs=PATH.
    "dpo": {"selfplay.iterations": 1},
    "ipo": {"selfplay.iterations": 1, "loss.name": "ipo"},  # arXiv 2310.12036
    # Maximizes the likelihood of the model's own answers that eval.verifier accepts, beginning from the start
    # in each iteration: arXiv 2312.06585.
    "rest_em": {
        "loss.name": "likelihood",
        "selfplay.samples": 4,
        "selfplay.rows": "right",
        "selfplay.restart": True,
        "selfplay.mix_previous": 0,
    },
    # A squared loss toward the win probability that selfplay.scorer returns: arXiv 2405.00675.
    "sppo": {"loss.name": "sppo", "selfplay.samples": 5, "selfplay.mix_previous": 0, "loss.beta": (1e-3,)},
    # Tells human answers from generated ones, each alone. With another β its optimum is not p_data: arXiv 2512.07175.
    "space": {"loss.name": "space", "loss.beta": (1.0,)},
    # Losses of preference optimization, on fixed pairs like `dpo`: 2403.00409, 2402.00856, 2402.05369, 2408.06266.
    **{
        name: {"selfplay.iterations": 1, "loss.name": name}
        for name in ("cdpo", "robust_dpo", "exo", "nca", "apo_zero", "apo_down")
    },
    # β scales log-probs per token, and is larger than that of `dpo`: arXiv 2411.15124 and 2405.14734.
    "dpo_per_token": {"selfplay.iterations": 1, "loss.name": "dpo_per_token", "loss.beta": (5.0,)},
    "simpo": {"selfplay.iterations": 1, "loss.name": "simpo", "loss.beta": (2.0,), "loss.options": "gamma=1.0"},
    # The same as the paper's experiments do it: on the best and the worst of five.
    "sppo_best_worst": {
        "loss.name": "sppo",
        "selfplay.samples": 5,
        "selfplay.pairing": "human/best+worst",
        "selfplay.mix_previous": 0,
        "loss.beta": (1e-3,),
    },
    # The best of K answers against the worst, by selfplay.scorer, with the start as the reference: arXiv 2312.11456,
    # with K = 8 as in the authors' code (RLHFlow/Online-RLHF, run_loop.sh).
    "iterative_dpo": {
        "selfplay.samples": 8,
        "selfplay.pairing": "best/worst",
        "selfplay.mix_previous": 0,
        "loss.reference_alpha": 0.0,
    },
    # The scorer ranks five answers together with the human one, and the opponent is the reference: arXiv 2404.03715,
    # Algorithm 2, with the one pair of the largest margin and the worst answer always the model's own.
    "dno": {"selfplay.samples": 5, "selfplay.pairing": "best_with_human/worst", "selfplay.mix_previous": 0},
    # The better of two answers against the other, with the opponent as the reference: recipe/spin of verl, whose
    # run_spin.sh renews the reference in each step (ref_update_freq=1).
    "online_spin": {"selfplay.samples": 2, "selfplay.pairing": "best/worst", "selfplay.mix_previous": 0},
    # (log p(y)/p(y') − τ/η log p_0(y)/p_0(y') − (1 − τ/η) log p_t(y)/p_t(y') − 1/2η)²: arXiv 2407.00617. It is IPO's
    # loss with β = η, against α-SPIN's reference with α = 1 − τ/η.
    "inpo": {
        "loss.name": "ipo",
        "loss.reference_alpha": 0.5,
        "selfplay.samples": 8,
        "selfplay.pairing": "best/worst",
        "selfplay.mix_previous": 0,
    },
    # DPO against the start, which also makes what the start answers less likely: arXiv 2405.21046. There one answer of
    # a pair is the start's; here both are the opponent's.
    "xpo": {
        "loss.name": "xpo",
        "loss.reference_alpha": 0.0,
        "selfplay.samples": 2,
        "selfplay.pairing": "best/worst",
        "selfplay.mix_previous": 0,
    },
}


def get_config(variant: str = "spin") -> Any:
    """The config of `ALGORITHM`, or of `ALGORITHM/FILE[:VARIANT]` with a config file of this folder."""
    name, _, base = variant.partition("/")
    if name not in ALGORITHMS:
        raise ValueError(f"configs/algorithms.py has {', '.join(ALGORITHMS)}, and not {name!r}")
    file, _, base_variant = (base or "tiny").partition(":")
    module = runpy.run_path(str(Path(__file__).with_name(f"{file}.py")))
    c = module["get_config"](base_variant) if base_variant else module["get_config"]()
    # A config file may have `settings_for`: numbers of an algorithm that suit its task.
    of_task = module["settings_for"](name) if "settings_for" in module else {}
    for key, value in {**ALGORITHMS[name], **of_task}.items():
        section, _, last = key.partition(".")
        c[section][last] = value
    return c
