"""What bfloat16 does to an answer's log-prob: between two packings of the same pairs, and against float32.

    SPIN_JAX_SMOLLM2=DIR python -m pytest tests/test_bfloat16.py -m long     # SmolLM2-135M-Instruct in DIR

Plain attention rounds differently in two packings: sums over keys of other lengths end in other last bits,
and what is then rounded to bfloat16 the other way is carried through all layers after it. The kernel for GPUs
adds up in an order that a group's company does not change, and so rows of one shape give the same bits.
"""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spin_jax
from spin_jax.data.chat import Chat
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.decoder import Decoder
from spin_jax.models.params import init_params
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import Group, RowShape

REAL_OFF = 0.65  # nats an answer, root mean square


def config_of_its_shape():
    """SmolLM2's depth and kinds of layers, a third as wide."""
    return ModelConfig(
        model_type="llama",
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=30,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        norm_eps=1e-5,
        rope_theta=100_000.0,
        rope_scaling=None,
        rotary_dim=64,
        windows=(None,),
        activation="silu",
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        initializer_range=0.05,
    )


def in_company(config, params, groups, mesh, shape):
    """By the kernel for GPUs, of all groups packed together and of every other one: [2, groups, 2]."""
    decoder = Decoder(config, jnp.bfloat16, kernel="flash")
    halves = np.zeros((len(groups), 2), np.float32)
    for first in (0, 1):
        halves[first::2] = score_groups(decoder, params, groups[first::2], shape, mesh)
    return np.stack([score_groups(decoder, params, groups, shape, mesh), halves])


def assert_company_changes_nothing(scores):
    """To 1e-3 nats: an answer's float32 sum of logs is all that is left to round.

    At the recipe's largest β the first loss is then ln 2 to 1e-3 as well.
    """
    assert np.abs(scores[0] - scores[1]).max() < 1e-3
    np.testing.assert_allclose(first_losses(scores, beta=5.0), np.log(2), rtol=0, atol=1e-3)


def in_packings(config, params, groups, mesh, dtype, shapes):
    """Log-probs by packing, plain attention: float32 [packings, groups, 2]."""
    decoder = Decoder(config, dtype=dtype)
    return np.stack([score_groups(decoder, params, groups, shape, mesh) for shape in shapes])


def first_losses(scores, beta=0.1):  # that of the recipe's first iterations
    """The logistic loss of a policy scored in one packing against itself, as opponent, in another."""
    one, other = scores[:, :, 0] - scores[:, :, 1]
    return np.logaddexp(0, -beta * (one - other)).mean(), np.logaddexp(0, -beta * (other - one)).mean()


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.fixture(scope="module")
def random_model(mesh):
    """(config, parameters that bfloat16 holds, groups of two answers of some 100 tokens)."""
    config, rng = config_of_its_shape(), np.random.default_rng(0)
    params = init_params(config, jax.random.key(0), mesh)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params)

    def text(least, most):
        return rng.integers(0, config.vocab_size, rng.integers(least, most)).tolist()

    return config, params, [Group(text(40, 80), (text(60, 140), text(60, 140))) for _ in range(8)]


def test_company_changes_no_log_prob(random_model, mesh):
    """Rows of one shape, as a run scores and trains with, and several pairs in each."""
    config, params, groups = random_model
    assert_company_changes_nothing(in_company(config, params, groups, mesh, RowShape(2, 768, 8)))


def test_packings_differ_little(random_model, mesh):
    """Plain attention, answers alone in a row and several in one.

    With every sum of layers rounded to bfloat16, the root mean squares were 0.030 nats between packings and
    0.116 off float32, and the largest of the 16 differences 0.097: none would pass.
    """
    config, params, groups = random_model
    alone, together = RowShape(1, 384, 1), RowShape(2, 768, 8)
    (truth,) = in_packings(config, params, groups, mesh, jnp.float32, [alone])
    scores = in_packings(config, params, groups, mesh, jnp.bfloat16, [alone, together])
    apart = scores[0] - scores[1]
    assert rms(scores - truth) < 0.08
    assert rms(apart) < 0.02
    assert np.abs(apart).max() < 0.08
    np.testing.assert_allclose(first_losses(scores), np.log(2), rtol=0, atol=2e-3)


@pytest.mark.long
def test_packings_of_a_real_model_differ_little(mesh, gsm8k):
    """GSM8K questions with their own and another question's answer, of about 100 tokens each.

    The bound between packings is the kernel's, on rows of one shape. By plain attention and between rows of
    two shapes answers differ by more than a nat at worst (it is printed), for what goes into a matmul is
    bfloat16. With every sum of layers rounded to it, these are 0.74 off float32.
    """
    if "SPIN_JAX_SMOLLM2" not in os.environ:
        pytest.skip("SPIN_JAX_SMOLLM2 names no directory with SmolLM2-135M-Instruct")
    model = spin_jax.load(os.environ["SPIN_JAX_SMOLLM2"], dtype="float32", mesh=mesh)
    chat = Chat(model.tokenizer, model.stop_tokens)
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in gsm8k[:40]
    ]
    encoded = [chat.encode_checked(messages, number) for number, messages in enumerate(turns)]
    groups = [Group(prompt, (real, other[1])) for (prompt, real), other in itertools.pairwise(encoded)]
    groups = [group for group in groups if len(group.prompt) + sum(map(len, group.answers)) <= 384][:8]
    alone, together = RowShape(1, 384, 1), RowShape(1, 1024, 64)
    (truth,) = in_packings(model.config, model.params, groups, mesh, jnp.float32, [alone])
    scores = in_packings(model.config, model.params, groups, mesh, jnp.bfloat16, [alone, together])
    print("between", rms(scores[0] - scores[1]), np.abs(scores[0] - scores[1]).max(), "off", rms(scores - truth))
    print("first losses", first_losses(scores))
    assert rms(scores - truth) < REAL_OFF
    assert_company_changes_nothing(in_company(model.config, model.params, groups, mesh, RowShape(2, 768, 8)))
