"""Sampling by its definition, the reference for the sampler: one prompt, no cache, no padding between.

For each token the whole sequence is read again. It shares with the sampler the model without its cache,
and `draw`, whose law has tests of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax.kernels.layout import Layout
from spin_jax.models.decoder import Decoder, forward, output_head, project
from spin_jax.sampling.next_token import draw

_LENGTH = 96  # sequences are filled up on the right to a multiple: few programs; nothing sees the filler


@functools.partial(jax.jit, static_argnames=("decoder", "sampling"))
def _next_token(decoder, params, tokens, length, key, sampling):
    """The token after the first `length` ones of tokens [1, T]."""
    hidden, _ = forward(decoder, params, tokens, Layout(jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)))
    logits = project(hidden, output_head(decoder, params))[:, length - 1]
    return draw(logits, key[None], sampling)[0]


def answer(model, prompt, key, sampling, stop_tokens=()):
    """The answer to one prompt as a list; its n-th token is drawn with fold_in(key, n)."""
    decoder = Decoder(model.config, dtype=model.dtype)
    length, drawn = len(prompt), []
    tokens = np.zeros((1, -(-(length + sampling.max_new_tokens) // _LENGTH) * _LENGTH), np.int32)
    tokens[0, :length] = prompt
    with jax.set_mesh(model.mesh):
        while len(drawn) < sampling.max_new_tokens and not (drawn and drawn[-1] in stop_tokens):
            token_key = jax.random.fold_in(key, len(drawn))
            drawn.append(int(_next_token(decoder, model.params, tokens, length, token_key, sampling)))
            tokens[0, length] = drawn[-1]
            length += 1
    return drawn
