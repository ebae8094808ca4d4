"""Makes the loss that a config names, calls it, and checks a user's own loss before training starts."""

import contextlib
import functools
import inspect
import math
import traceback
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from spin_jax import losses
from spin_jax.config import Config
from spin_jax.config_values import loss_parts
from spin_jax.runtime import sharding
from spin_jax.runtime.user_code import import_function

# The roles that the answers of a row can have; each is also a field of `data.records.Pair`.
KNOWN_ROLES = ("real", "generated", "start")
# What a loss gets if it has a parameter of that name; losses.py explains each. Other parameters are options.
INPUTS = ("beta", "lengths", "score")


def find(name: str) -> losses.Loss:
    """The loss of that name, or of `module:function`; ValueError where there is none."""
    if name in losses.LOSSES:
        return losses.LOSSES[name]
    if ":" not in name:
        raise ValueError(f"loss.name has {name!r}: choose from {', '.join(losses.LOSSES)}, or give module:function")
    return import_function(name)


def roles(c: Config) -> tuple[str, ...]:
    """The roles of the answers that a row has: those in loss.answers, or all that the losses of loss.name need."""
    if c.answers:
        named = {part.strip() for part in c.answers.split(",")}
        if not named <= set(KNOWN_ROLES) or "generated" not in named:
            raise ValueError(f"loss.answers={c.answers!r}: generated, and with it real or start, as real,generated")
    else:
        named = {role for _, name in loss_parts(c.name) for role in losses.ROLES.get(name, losses.PAIR)}
    return tuple(role for role in KNOWN_ROLES if role in named)


@functools.cache
def logps_type(names: tuple[str, ...]) -> Any:
    """The NamedTuple of these roles that a loss gets. Equal roles give the same class, which jit requires."""
    return losses.PairLogps if names == losses.PAIR else namedtuple("Logps", names)


def options(c: Config) -> dict[str, float]:
    """loss.options, which is name=number,name=number, as {name: number}."""
    entries = [part.partition("=") for part in (c.options or "").split(",") if part.strip()]
    with contextlib.suppress(ValueError):
        numbers = {name.strip(): float(number) for name, _, number in entries}
        if all(map(math.isfinite, numbers.values())):
            return numbers
    raise ValueError(f"loss.options={c.options!r}: numbers by name are wanted, as alpha=0.5")


def make(c: Config) -> losses.Loss:
    """The config's loss, with its options and NLL term.

    Equal configs give the same object, so that they share the programs compiled with it.
    """
    weighted = tuple((weight, find(name)) for weight, name in loss_parts(c.name))
    return _made(weighted, tuple(options(c).items()), c.nll_weight)


@functools.cache
def _made(
    weighted: tuple[tuple[float, losses.Loss], ...], chosen: tuple[tuple[str, float], ...], nll_weight: float
) -> losses.Loss:
    terms = [(weight, _with_options(loss, dict(chosen))) for weight, loss in weighted]
    terms += [(nll_weight, losses.nll)] if nll_weight else []
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]

    def weighted_sum(policy: Any, opponent: Any, *, beta: Any, lengths: Any = None, score: Any = None) -> Array:
        inputs = {"beta": beta, "lengths": lengths, "score": score}
        values = [weight * call(loss, policy, opponent, inputs) for weight, loss in terms]
        return sum(values[1:], values[0])

    return weighted_sum


def call(loss: losses.Loss, policy: Any, opponent: Any, inputs: Mapping[str, Any]) -> Array:
    """Calls a loss with those of `inputs`, which are named as in INPUTS, that it has a parameter for."""
    names = {*_parameters(loss), *(["beta"] if _takes_any(loss) else [])}
    return loss(policy, opponent, **{name: value for name, value in inputs.items() if name in names})


def _with_options(loss: losses.Loss, chosen: Mapping[str, float]) -> losses.Loss:
    own = {name: number for name, number in chosen.items() if _takes_any(loss) or name in _options(loss)}
    return functools.partial(loss, **own) if own else loss


def _parameters(loss: losses.Loss) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(loss).parameters)
    except (TypeError, ValueError):  # some callables have no signature
        return {}


def _takes_any(loss: losses.Loss) -> bool:
    """Whether the loss takes any keyword, as far as its signature tells."""
    found = _parameters(loss).values()
    return not found or any(p.kind is p.VAR_KEYWORD for p in found)


def _options(loss: losses.Loss) -> dict[str, inspect.Parameter]:
    """The parameters of a loss that loss.options sets."""
    own = list(_parameters(loss).items())[2:]
    return {name: p for name, p in own if name not in INPUTS and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def takes_score(c: Config) -> bool:
    """Whether a loss has the parameter `score`, which selfplay.scorer provides."""
    return any("score" in _parameters(find(name)) for _, name in loss_parts(c.name))


# --- checks: each `…_problem` returns what is wrong, or "" ---------------------------------------

_ROWS = 8


def check(c: Config, mesh: jax.sharding.Mesh | None = None) -> None:
    """Checks the config of the loss, and calls a user's own loss as training will, on random log-probs.

    With a mesh, that loss is only traced for it, and not run. ValueError says what is wrong: the loss does not exist,
    raises an error, returns another shape than [B], is not finite where an iteration begins, or depends on more than
    the log-probs of a row. Of several losses it names the one that is wrong.
    """
    parts, names, chosen = [name for _, name in loss_parts(c.name)], roles(c), options(c)
    problem = _unknown_option_problem([find(part) for part in parts], chosen)
    if c.nll_weight and "real" not in names:
        problem = problem or f"loss.nll_weight={c.nll_weight:g} is for rows with a human answer: these have none"
    for part in parts:
        if not problem and (problem := _part_problem(part, c, names, chosen, mesh)) and len(parts) > 1:
            problem = f"{part}: {problem}"
    if problem:
        raise ValueError(f"loss.name={c.name!r}: {problem}")


def _part_problem(
    name: str, c: Config, names: tuple[str, ...], chosen: Mapping[str, float], mesh: jax.sharding.Mesh | None
) -> str:
    """What is wrong with one of the losses."""
    loss = _with_options(find(name), chosen)
    missing = [n for n, p in _options(loss).items() if p.default is inspect.Parameter.empty and not _takes_any(loss)]
    if missing:
        return f"it wants {missing[0]}: --config.loss.options={missing[0]}=NUMBER, or a default"
    wanted = losses.ROLES.get(name, losses.PAIR) if name in losses.LOSSES else ()
    if lacking := [role for role in wanted if role not in names]:
        return f"it wants {', '.join(wanted)}, and loss.answers={c.answers!r} leaves out {lacking[0]}"
    if ":" not in name and not chosen:
        return ""
    try:
        if mesh is not None:
            _trace_on_mesh(loss, names, mesh)
            return ""
        return next(filter(None, [_values_problem(loss, names, beta) for beta in dict.fromkeys(c.beta)]), "")
    except Exception as error:  # a user's own loss can raise anything, and ours if an option is out of range
        return _error_problem(error, names)


def _unknown_option_problem(found: Sequence[losses.Loss], chosen: Mapping[str, float]) -> str:
    own = [name for loss in found for name in _options(loss)]
    unknown = [name for name in chosen if name not in own]
    if not unknown or any(map(_takes_any, found)):
        return ""
    has = f"there are {', '.join(dict.fromkeys(own))}" if own else "it has none"
    return f"it has no option {unknown[0]} (loss.options); {has}"


def _values_problem(loss: losses.Loss, names: tuple[str, ...], beta: float) -> str:
    """Whether values and gradients of a few rows can be trained on."""
    kind = logps_type(names)
    rng = np.random.default_rng(0)
    opponent = rng.uniform(-60, -5, (len(names), _ROWS)).astype(np.float32)
    moved = rng.normal(size=opponent.shape) * min(1 / beta, 5.0)  # margins of a realistic size
    lengths = rng.integers(1, 60, opponent.shape, np.int32)
    inputs = {"lengths": kind(*lengths), "score": np.linspace(0, 1, _ROWS, dtype=np.float32)}

    def value(policy: Any, beta: Any, rows: int = _ROWS) -> Any:
        own, other = (kind(*jnp.asarray(x)[:, :rows]) for x in (policy, opponent))
        first = jax.tree.map(lambda x: jnp.asarray(x)[:rows], inputs)
        return call(loss, own, other, {"beta": beta, **first})

    @jax.jit
    def evaluated(policy: Any, beta: Any) -> tuple[Array, Array]:
        """The values and their gradient; β is an argument, as in training."""
        return value(policy, beta), jax.grad(lambda policy: value(policy, beta).sum())(policy)

    away = (opponent + moved).astype(np.float32)
    first = jax.jit(value)(away, np.float32(beta))
    if problem := _shape_problem(first):
        return problem
    values, gradient = map(np.asarray, evaluated(away, np.float32(beta)))
    at_start = tuple(map(np.asarray, evaluated(opponent, np.float32(beta))))
    start = ", where policy equals opponent, as it does when an iteration begins"
    for where, numbers in ((start, at_start), ("", (values, gradient))):
        for what, array in zip(("value", "gradient"), numbers, strict=True):
            if not np.isfinite(array).all():
                return f"its {what} is {array[~np.isfinite(array)][0]}{where}"
    # Values are about β × 60 nats.
    same = functools.partial(np.allclose, rtol=1e-4, atol=1e-3 * max(1.0, beta))
    if not same(values, first):  # the loss was traced twice
        return "the same log-probs give another loss each time: it may depend on neither random numbers nor state"
    fewer = jax.jit(functools.partial(value, rows=_ROWS // 2))(away, np.float32(beta))
    if not same(first[: _ROWS // 2], fewer):
        return (
            "a row's loss depends on the other rows (a mean, a rank?), and those are whatever was packed "
            "with it: it has to be a function of that row's log-probs"
        )
    if not gradient.any() and not at_start[1].any():
        return "it does not depend on policy: there is nothing to learn from it"
    return ""


def _shape_problem(values: Any) -> str:
    shape = getattr(values, "shape", None)
    if shape is None:
        return f"it returns {type(values).__name__}: an array [B] is wanted, a number a row"
    if shape != (_ROWS,):
        mean = "; the step takes the mean" if shape == () else ""
        return f"of {_ROWS} rows it returns an array {list(shape)}: [{_ROWS}] is wanted, a number a row{mean}"
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return f"it returns {values.dtype}: floating-point numbers are wanted"
    return ""


def _trace_on_mesh(loss: losses.Loss, names: tuple[str, ...], mesh: jax.sharding.Mesh) -> None:
    """Traces the loss as the training step does, with arguments sharded over the mesh."""
    layout, kind = sharding.batch_layout(mesh), logps_type(names)
    row, tokens = (jax.ShapeDtypeStruct((2 * mesh.size,), dtype, sharding=layout) for dtype in (jnp.float32, jnp.int32))
    logps, lengths = (kind(*[values] * len(names)) for values in (row, tokens))

    def total(policy: Any, opponent: Any, inputs: Mapping[str, Any]) -> Array:
        return call(loss, policy, opponent, inputs).sum()

    with jax.set_mesh(mesh):
        beta = jax.ShapeDtypeStruct((), jnp.float32)
        jax.eval_shape(jax.grad(total), logps, logps, {"beta": beta, "lengths": lengths, "score": row})


def _error_problem(error: Exception, names: Sequence[str]) -> str:
    """The error that the loss raised, where it was raised, and a hint."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and f.filename != __file__]
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    message, hint = str(error).strip().split("\n")[0], ""
    if isinstance(error, jax.errors.JAXTypeError):
        hint = ". JAX traces it: jnp.where in place of if, jnp in place of np and float()"
    elif isinstance(error, AttributeError) and "Logps" in message:
        more = ",".join(dict.fromkeys((*names, *KNOWN_ROLES)))
        hint = f". Rows have the answers {', '.join(names)}; --config.loss.answers={more} adds others"
    return f"called as loss(policy, opponent, beta=β) it fails: {type(error).__name__}: {message}{place}{hint}"
