"""Scores and logits against torch, on real conversations and in other batches."""

import jax.numpy as jnp
import numpy as np
import pytest

import spin_jax
from spin_jax import convert

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
    return convert.load(str(directory), mesh=mesh), reference


def torch_score(reference, tokenizer, messages, stop=2):
    """(Σ log p, tokens) of the last turn: the template's text cut by characters, torch's log-softmax."""
    torch = pytest.importorskip("torch")
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt))
    last = ids.index(stop, first)  # the stop token belongs to the answer, what follows it does not
    with torch.no_grad():
        logps = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(logps[i - 1, ids[i]].item() for i in range(first, last + 1)), last + 1 - first


def test_scores_of_real_conversations_equal_torch(real, conversations):
    model, reference = real
    scores = spin_jax.score(model, conversations)
    assert scores.dtype == np.float32
    for score, messages in zip(scores, conversations, strict=True):
        expected, tokens = torch_score(reference, model.tokenizer, messages)
        assert tokens > 20
        assert abs(score - expected) < PER_TOKEN * tokens


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
    expected, tokens = torch_score(reference, tiny_model.tokenizer, SYSTEM)
    assert tokens == len("It is 2.") + 1  # characters are tokens here
    (score,) = spin_jax.score(tiny_model, [SYSTEM])
    assert abs(score - expected) < PER_TOKEN * tokens

    earlier = [*SYSTEM[:2], {"role": "assistant", "content": "7"}, *SYSTEM[3:]]
    without = SYSTEM[1:]
    others = spin_jax.score(tiny_model, [earlier, without])
    assert np.abs(others - score).min() > 1e-2


def test_stop_tokens_of_the_generation_config_end_the_answer(tiny_model):
    """What follows the first stop token in an answer does not count."""
    dot = tiny_model.tokenizer(".", add_special_tokens=False).input_ids[0]
    short, long = (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
        for text in ("Yes.", "Yes. And more")
    )
    whole = spin_jax.score(tiny_model, [short, long])
    assert abs(whole[0] - whole[1]) > 1
    model = convert.dataclasses.replace(tiny_model, generation_config={"eos_token_id": [dot]})
    cut = spin_jax.score(model, [short, long])
    np.testing.assert_allclose(cut[0], cut[1], rtol=0, atol=1e-4)
    assert cut[0] > whole[0]  # one factor less, the </s> after the dot


def test_bfloat16_scores_are_sums_in_float32(tiny_dir, mesh):
    """200 tokens of ~−5 nats: a bfloat16 sum would step by 8; the model's own rounding is ~0.03 a token."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "0123456789" * 20}]
    exact, rounded = (
        spin_jax.score(convert.load(str(tiny_dir), dtype=dtype, mesh=mesh), [messages])[0]
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == np.float32
    assert exact != rounded
    assert abs(rounded - exact) < 4
    assert rounded != jnp.bfloat16(rounded)


def test_eight_devices_score_as_one(tiny_model, tiny_dir, mesh8):
    """Three conversations on a mesh that splits batches in four."""
    conversations = [
        [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * (9 - n)}]
        for n in (1, 4, 7)
    ]
    eight = convert.load(str(tiny_dir), mesh=mesh8)
    np.testing.assert_allclose(
        spin_jax.score(eight, conversations, batch_size=3),
        spin_jax.score(tiny_model, conversations),
        atol=1e-4,
    )


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


def test_logits_equal_torch(tiny_model, hf_model_dir, torch_logits):
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
    logits = spin_jax.logits(convert.load(str(tiny_dir), mesh=mesh8), tokens)
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
