"""Scores and logits against torch: packed rows and each answer alone, real conversations, other batches.

Axes: N rows, G groups of a row, A answers of a group, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import token_ids, torch_logits, torch_score

import spin_jax
from spin_jax.models import loading
from spin_jax.models.decoder import Decoder
from spin_jax.training import log_probs
from spin_jax.training.log_probs import response_logps, score_groups
from spin_jax.training.packing import Group, RowShape, packed

# Both sides in float32; their log-probs differ by ~1e-6 a token, and differences of one sign add up.
PER_TOKEN = 1e-5

SYSTEM = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two, then?"},
    {"role": "assistant", "content": "It is 2."},
]


@pytest.fixture(scope="module")
def conversations(gsm8k):
    return [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in gsm8k[:8]
    ]


@pytest.fixture(scope="module")
def real(hf_model_dir, mistral_tokenizer, mesh):
    """(model, its torch twin) with Mistral's tokenizer and 32,000 rows of embedding."""
    directory, reference = hf_model_dir("mistral", vocab_size=32000, sliding_window=64)
    return loading.load(str(directory), mesh=mesh), reference


# --- packed rows -----------------------------------------------------------------------------------

SHAPE = RowShape(rows=4, length=96, groups=6)


def random_groups(seed, count, answers, vocab_size=272, longest=18):
    """Groups of random lengths; an answer may be a single token, or none."""
    rng = np.random.default_rng(seed)

    def some(least):
        return rng.integers(3, vocab_size, rng.integers(least, longest + 1)).astype(np.int32)

    return [Group(some(1), tuple(some(0) for _ in range(answers))) for _ in range(count)]


def assert_scores_are_torchs(scores, groups, reference, unattended=None):
    """Every answer within 1e-5 a token of torch's log-prob of it alone."""
    assert scores.shape == (len(groups), len(groups[0].answers))
    for group, found in zip(groups, scores, strict=True):
        for answer, score in zip(group.answers, found, strict=True):
            expected = torch_score(reference, group.prompt, answer, unattended)
            assert abs(score - expected) <= PER_TOKEN * len(answer), (len(group.prompt), len(answer))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("answers", [1, 2, 3])
def test_packed_answers_score_as_if_alone(answers, window, hf_model_dir, mesh):
    """Random lengths, packed; grouped queries, with and without a window; PER_TOKEN says what is allowed."""
    directory, reference = hf_model_dir("mistral", sliding_window=window)
    model = loading.load(str(directory), mesh=mesh)
    for seed in range(8):
        groups = random_groups(seed, 12, answers)
        assert np.count_nonzero(packed(groups, SHAPE)[0].items) > SHAPE.rows, "no row holds two groups"
        scores = score_groups(Decoder(model.config), model.params, groups, SHAPE, mesh)
        assert_scores_are_torchs(scores, groups, reference)


def test_packed_answers_on_eight_devices(hf_model_dir, mesh8):
    """The same, with rows, heads and vocabulary split."""
    directory, reference = hf_model_dir("mistral", sliding_window=5)
    model = loading.load(str(directory), mesh=mesh8)
    groups = random_groups(0, 24, 2)
    scores = score_groups(Decoder(model.config, remat="full"), model.params, groups, SHAPE, mesh8)
    assert_scores_are_torchs(scores, groups, reference)


def test_what_none_attends_to(hf_model_dir, mesh):
    """`official`: token 7 is in the sequence and masked, as torch's attention mask has it. PER_TOKEN."""
    directory, reference = hf_model_dir("mistral")
    model = loading.load(str(directory), mesh=mesh)
    decoder = Decoder(model.config)
    rng, groups = np.random.default_rng(0), random_groups(0, 12, 2)
    for group in groups:
        for ids in group.answers:
            ids[rng.random(len(ids)) < 0.3] = 7
        group.prompt[1:][rng.random(len(group.prompt) - 1) < 0.3] = 7  # the first token always sees itself
    hidden = score_groups(decoder, model.params, groups, SHAPE, mesh, unattended=7)
    assert_scores_are_torchs(hidden, groups, reference, unattended=7)
    seen = score_groups(decoder, model.params, groups, SHAPE, mesh)
    assert np.abs(hidden - seen).max() > 0.1


def test_a_packed_pair_by_hand(tiny_model, mesh):
    """Against log-softmax and a gather of `logits`, which knows no packing; 1e-6 relative (float32)."""
    (group,) = random_groups(3, 1, 2)
    (scores,) = score_groups(Decoder(tiny_model.config), tiny_model.params, [group], SHAPE, mesh)
    length = max(len(group.prompt) + len(answer) for answer in group.answers)
    for answer, score in zip(group.answers, scores, strict=True):
        ids = np.concatenate([group.prompt, answer])
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        logps = jax.nn.log_softmax(spin_jax.logits(tiny_model, padded)[0])
        expected = sum(float(logps[i - 1, ids[i]]) for i in range(len(group.prompt), len(ids)))
        assert score == pytest.approx(expected, rel=1e-6)


def test_scores_come_in_the_order_of_the_groups(tiny_model, mesh):
    """Whatever rows they were packed into; sums in another order, so 1e-5 a token (of 18)."""
    decoder, groups = Decoder(tiny_model.config), random_groups(1, 30, 2)
    told = []
    scores = score_groups(decoder, tiny_model.params, groups, SHAPE, mesh, on_batch=told.append)
    assert len(told) > 1
    assert sum(told) == 30
    order = np.random.default_rng(0).permutation(30)
    again = score_groups(decoder, tiny_model.params, [groups[i] for i in order], SHAPE, mesh)
    np.testing.assert_allclose(again, scores[order], rtol=0, atol=18 * PER_TOKEN)
    with pytest.raises(ValueError, match=r"takes \[\d+, \d+, 1\] .* of a row that holds \[20, "):
        score_groups(decoder, tiny_model.params, groups, SHAPE._replace(length=20), mesh)


# --- chunks of the vocabulary's projection ---------------------------------------------------------


def compiled_gradient(decoder, params, rows):
    """(params, rows) → ((_, log-probs [N, G, A]), gradient of a random combination), compiled anew."""
    weights = np.random.default_rng(0).normal(size=rows.lengths.shape).astype(np.float32)

    def combined(params, rows):
        logps = response_logps(decoder, params, rows)
        return jnp.sum(weights * logps), logps

    return jax.jit(jax.value_and_grad(combined, has_aux=True)).lower(params, rows).compile()


def test_chunks_without_answers_cost_and_change_nothing(tiny_model, monkeypatch):
    """Chunks of 7 columns: answers cross their borders, the last ones hold none, one row holds no group.

    Log-probs and gradients are those of one chunk for all; sums in another order, so 1e-5 of the largest.
    Embedding and head are tied here; test_train has an untied head in chunks, against torch.
    """
    config = dataclasses.replace(tiny_model.config, tie_word_embeddings=True)
    params = jax.tree.map(np.asarray, tiny_model.params)  # outside of any mesh
    params = {name: leaf for name, leaf in params.items() if name != "head"}
    (rows,) = packed(random_groups(2, 7, 2, longest=9), RowShape(4, 60, 4))
    responses = (rows.owners > 0).sum(axis=1)
    assert 7 < responses.max() <= 42  # of nine chunks, the last three are empty
    assert responses.min() == 0
    programs = []
    for limit in (2**40, 4 * 7 * 272):
        monkeypatch.setattr(log_probs, "_CHUNK_LOGITS", limit)
        programs.append(compiled_gradient(Decoder(config), params, rows))
    assert log_probs._split_into_chunks(rows, 272)[0].shape == (9, 4, 7)
    assert " conditional(" in programs[1].as_text()
    ((_, expected), wanted), ((_, found), gradients) = (program(params, rows) for program in programs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(found == 0, rows.lengths == 0)
    for want, got in zip(jax.tree.leaves(wanted), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    # A micro-batch that is empty: zeros everywhere.
    (_, none), gradients = programs[1](params, jax.tree.map(np.zeros_like, rows))
    assert not any(np.any(array) for array in jax.tree.leaves((none, gradients)))


def test_a_large_vocabulary_and_few_tokens(real, mesh):
    """32,000 words, and answers in the first two of four chunks only, one across their border. PER_TOKEN."""
    model, reference = real
    rng, shape = np.random.default_rng(0), RowShape(1, 96, 2)
    prompt, *answers = (rng.integers(0, 32000, n) for n in (5, 30, 2))
    groups = [Group(prompt, tuple(answers))]
    (rows,) = packed(groups, shape)
    with jax.set_mesh(mesh):
        _, _, owners = log_probs._split_into_chunks(rows, 32000)
    np.testing.assert_array_equal((owners > 0).any(axis=(1, 2)), [True, True, False, False])
    scores = score_groups(Decoder(model.config), model.params, groups, shape, mesh)
    assert_scores_are_torchs(scores, groups, reference)


# --- conversations ---------------------------------------------------------------------------------


def test_scores_of_real_conversations_equal_torch(real, conversations):
    model, reference = real
    scores = spin_jax.score(model, conversations)
    assert scores.dtype == np.float32
    for score, messages in zip(scores, conversations, strict=True):
        prompt, answer = token_ids(model.tokenizer, messages)
        assert len(answer) > 20
        assert abs(score - torch_score(reference, prompt, answer)) < PER_TOKEN * len(answer)


def test_scores_do_not_depend_on_the_batch(tiny_model):
    """Other companions mean other padding, and sums in another order: 1e-5 a token again (of at most 40)."""
    conversations = [
        [{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "0123456789" * (n % 4 + 1)}]
        for n in range(8)
    ]
    scores = spin_jax.score(tiny_model, conversations)
    assert len(set(scores)) == 8
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    permuted = spin_jax.score(tiny_model, [conversations[i] for i in order], batch_size=3)
    np.testing.assert_allclose(permuted, scores[order], rtol=0, atol=4e-4)
    alone = spin_jax.score(tiny_model, conversations[2:3])
    np.testing.assert_allclose(alone, scores[2:3], rtol=0, atol=4e-4)


def test_only_the_last_turn_counts(tiny_model, hf_model_dir):
    """A system message and an earlier answer condition the score, and are not part of it."""
    _, reference = hf_model_dir("mistral")
    prompt, answer = token_ids(tiny_model.tokenizer, SYSTEM)
    assert len(answer) == len("It is 2.") + 1  # characters are tokens here
    (score,) = spin_jax.score(tiny_model, [SYSTEM])
    assert abs(score - torch_score(reference, prompt, answer)) < PER_TOKEN * len(answer)

    earlier = [*SYSTEM[:2], {"role": "assistant", "content": "7"}, *SYSTEM[3:]]
    without = SYSTEM[1:]
    others = spin_jax.score(tiny_model, [earlier, without])
    assert np.abs(others - score).min() > 1e-2


def test_stop_tokens_of_the_generation_config_end_the_answer(tiny_model):
    """What follows the first stop token in an answer does not count."""
    dot = tiny_model.tokenizer(".", add_special_tokens=False).input_ids[0]
    short, long = (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("Yes.", "Yes. And more")
    )
    whole = spin_jax.score(tiny_model, [short, long])
    assert abs(whole[0] - whole[1]) > 1
    model = dataclasses.replace(tiny_model, generation_config={"eos_token_id": [dot]})
    cut = spin_jax.score(model, [short, long])
    np.testing.assert_allclose(cut[0], cut[1], rtol=0, atol=1e-4)
    assert cut[0] > whole[0]  # one factor less, the </s> after the dot


def test_bfloat16_scores_are_sums_in_float32(tiny_dir, mesh):
    """200 tokens of ~−5 nats: a bfloat16 sum would step by 8; the model's own rounding is ~0.03 a token."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "0123456789" * 20}]
    exact, rounded = (
        spin_jax.score(loading.load(str(tiny_dir), dtype=dtype, mesh=mesh), [messages])[0]
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == np.float32
    assert exact != rounded
    assert abs(rounded - exact) < 4
    assert rounded != jnp.bfloat16(rounded)


def test_eight_devices_score_as_one(tiny_model, tiny_dir, mesh8):
    """Three conversations on a mesh that splits batches in four."""
    conversations = [
        [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * (9 - n)}] for n in (1, 4, 7)
    ]
    eight = loading.load(str(tiny_dir), mesh=mesh8)
    np.testing.assert_allclose(
        spin_jax.score(eight, conversations, batch_size=3),
        spin_jax.score(tiny_model, conversations),
        atol=1e-4,
    )


# --- bad input and logits --------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([USER], id="no answer"),
        pytest.param([USER, ASSISTANT, USER], id="the user has the last word"),
        pytest.param([ASSISTANT], id="no prompt"),
        pytest.param([USER, ASSISTANT, ASSISTANT], id="two answers in a row"),
        pytest.param([{"role": "human", "content": "a"}, ASSISTANT], id="unknown role"),
        pytest.param([{"role": "user"}, ASSISTANT], id="no content"),
        pytest.param([{"role": "user", "content": 3}, ASSISTANT], id="content is no text"),
        pytest.param(["a", "b"], id="no messages"),
        pytest.param([], id="empty"),
    ],
)
def test_malformed_conversations_are_named(messages, tiny_model):
    with pytest.raises(ValueError, match="conversation 1: messages"):
        spin_jax.score(tiny_model, [[USER, ASSISTANT], messages])


def test_no_conversations(tiny_model):
    assert spin_jax.score(tiny_model, []).shape == (0,)


def test_logits_equal_torch(tiny_model, hf_model_dir):
    """Right-padded rows; float32, 1e-4 as in test_model."""
    _, reference = hf_model_dir("mistral")
    tokens = np.random.default_rng(0).integers(0, 272, (3, 14))
    lengths = np.array([14, 9, 3])
    tokens[np.arange(14) >= lengths[:, None]] = 0
    logits = spin_jax.logits(tiny_model, tokens.tolist())
    assert logits.dtype == jnp.float32
    assert logits.shape == (3, 14, 272)
    for row, length, ours in zip(tokens, lengths, logits, strict=True):
        expected = torch_logits(reference, row[None, :length])[0]
        np.testing.assert_allclose(ours[:length], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 5])
def test_logits_on_eight_devices(batch, tiny_model, tiny_dir, mesh8):
    """Batches that the mesh's four parts do not divide; what comes back is whole, on one device."""
    tokens = np.random.default_rng(0).integers(0, 272, (batch, 6))
    logits = spin_jax.logits(loading.load(str(tiny_dir), mesh=mesh8), tokens)
    assert logits.shape == (batch, 6, 272)
    assert len(logits.devices()) == 1
    np.testing.assert_allclose(logits, spin_jax.logits(tiny_model, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"must be \[B, T\], not of shape \(3,\)"),
        ([[1, 272]], r"must lie in \[0, 272\)"),
        ([[-1, 3]], r"must lie in \[0, 272\)"),
    ],
)
def test_bad_tokens(tokens, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        spin_jax.logits(tiny_model, tokens)


def test_public_names_stay_functions():
    """A submodule of the same name, once imported, would take the function's place in the package."""
    for name in ("score", "logits", "generate", "load", "save", "run"):
        assert callable(getattr(spin_jax, name))
        assert callable(getattr(spin_jax, name)), "the second access sees what the first one imported"
