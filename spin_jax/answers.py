"""Answers to prompts by a model in memory, on as few devices a copy of its weights as have room for it."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array

from spin_jax import config as config_lib
from spin_jax import programs
from spin_jax.data.records import Ids
from spin_jax.draw import Sampling
from spin_jax.models.architecture import Model
from spin_jax.models.decoder import Decoder
from spin_jax.models.params import sampling_params
from spin_jax.sample import answer_prompts

BATCH_SIZE = 32


def answer(
    model: Model,
    prompts: Sequence[Ids],
    keys: Array,
    sampling: Sampling,
    *,
    stop_tokens: tuple[int, ...],
    limits: Sequence[int],
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> list[Ids]:
    """`answer_prompts` with a copy of the weights made for it.

    Args:
        limits: tokens of each answer, at most.
        batch_size: answers in progress at a time for every copy of the weights.
        options: `stopped` and `on_chunk` of `answer_prompts`.
    """
    c = config_lib.default()
    c.sampling.batch_size = batch_size
    c.sampling.max_new_tokens = max(limits)
    c.lengths.max_prompt = max(map(len, prompts))
    c.lengths.max_length = c.lengths.max_prompt + c.sampling.max_new_tokens
    mesh = programs.sampling_mesh(c, model)
    return answer_prompts(
        Decoder(model.config, dtype=model.dtype, kernel=programs.kernel(c, model)),
        sampling_params(model.params, model.config, model.dtype, mesh),
        prompts,
        keys,
        mesh=mesh,
        sampling=sampling,
        stop_tokens=stop_tokens,
        slots=min(programs.slots(c, model), len(prompts)),
        limits=limits,
        **options,
    )


def counting(
    update: Callable[[int], object], should_stop: Callable[[], object]
) -> Callable[[int, int], None]:
    """An `on_chunk` that tells a progress bar and asks whether to stop."""

    def on_chunk(prompts: int, tokens: int) -> None:
        del tokens
        update(prompts)
        should_stop()

    return on_chunk
