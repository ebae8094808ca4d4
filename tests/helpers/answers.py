"""Answers of a model to prompts, as a run samples them."""

import numpy as np

from spin_jax.models.decoder import Decoder
from spin_jax.models.params import sampling_params
from spin_jax.sampling.continuous import answer_prompts
from spin_jax.sampling.next_token import prompt_keys


def answers_of(
    model, prompts, sampling, *, keys=None, slots=8, stop_tokens=None, mesh=None, kernel="plain", **options
) -> list[list[int]]:
    """`answer_prompts` as lists; on another mesh than the model's where one is given."""
    mesh = mesh or model.mesh
    answers = answer_prompts(
        Decoder(model.config, dtype=model.dtype, kernel=kernel),
        sampling_params(model.params, model.config, model.dtype, mesh),
        [np.asarray(prompt, np.int32) for prompt in prompts],
        prompt_keys(0, 0, range(len(prompts))) if keys is None else keys,
        mesh=mesh,
        sampling=sampling,
        stop_tokens=model.stop_tokens if stop_tokens is None else stop_tokens,
        slots=slots,
        **options,
    )
    assert all(answer.dtype == np.int32 for answer in answers)
    return [answer.tolist() for answer in answers]
