"""Sampling: greedy as transformers, draws by their law, answers that do not know their batch."""

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from scipy import stats

import spin_jax
from spin_jax import convert, files, sample, sharding
from spin_jax.chat import Chat
from spin_jax.model import Decoder
from spin_jax.sample import Sampling, answer_prompts, draw, prompt_keys, sampling_params, truncate_logits

# Prompts of 11 to 20 tokens, three more than characters: padded to 16 or, beside the long ones, to 24.
# Most tests below decode up to 24 tokens for batches of these, and so share a few compiled programs.
QUESTIONS = [
    "2+2, then +3?",
    "A dozen ducks",
    "Any duck?",
    "Three primes?",
    "01234567",
    "?!?!?!?!?!?",
    "Two or three ducks",
    "é ☃ 27+4",
]
LONG = "Two or three ducks"


def asked(questions):
    return [[{"role": "user", "content": question}] for question in questions]


def prompts_of(model, questions):
    chat = Chat(model.tokenizer, model.stop_tokens)
    return [chat.encode_prompt(messages) for messages in asked(questions)]


def answers_of(model, prompts, keys, sampling, *, batch_size=8, stop_tokens=None, **options):
    with jax.set_mesh(model.mesh):
        params = sampling_params(model.params, model.dtype)
    return answer_prompts(
        Decoder(model.config, dtype=model.dtype),
        params,
        prompts,
        keys,
        mesh=model.mesh,
        sampling=sampling,
        stop_tokens=model.stop_tokens if stop_tokens is None else stop_tokens,
        batch_size=batch_size,
        **options,
    )


def greedy(model, prompts, max_new_tokens, **options):
    keys = prompt_keys(0, 0, range(len(prompts)))
    return answers_of(model, prompts, keys, Sampling(max_new_tokens, temperature=0.0), **options)


# --- greedy ----------------------------------------------------------------------------------------


def ends(answers, stops):
    """What each answer ends in: one of the stops, or None where it holds none of them."""
    return [next((token for token in answer if token in stops), None) for answer in answers]


@pytest.fixture(scope="module")
def talker_dir(hf_model_dir, mesh, tmp_path_factory):
    """A checkpoint that ends some greedy answers of 24 tokens in one EOS, some in another, some not at all.

    Which tokens these are is found by asking: its generation config then calls them EOS. The tokenizer's
    </s>, of which a random model may say much or little, never is the likeliest token.
    """
    directory, _ = hf_model_dir("mistral", sliding_window=6)
    copy = shutil.copytree(directory, tmp_path_factory.mktemp("talker") / "model")
    tensors = safetensors_numpy.load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][2] = 0
    safetensors_numpy.save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    model = convert.load(str(copy), mesh=mesh)
    answers = [answer.tolist() for answer in greedy(model, prompts_of(model, QUESTIONS), 24)]
    said = sorted({token for answer in answers for token in answer[1:] if token > 5})
    stops = next(pair for pair in itertools.combinations(said, 2) if {*pair, None} == {*ends(answers, pair)})
    files.write_json(copy / "generation_config.json", {"eos_token_id": list(stops)})
    return copy


@pytest.fixture(scope="module")
def talker(talker_dir, mesh):
    model = convert.load(str(talker_dir), mesh=mesh)
    assert len(model.stop_tokens) == 3  # </s> joins the two
    return model


@pytest.fixture(scope="module")
def torch_answers(talker, talker_dir):
    """transformers' greedy answers, prompt by prompt: its padding does not come into it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(talker_dir, attn_implementation="eager")

    def answer(prompt):
        ids = torch.tensor(prompt[None])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=list(talker.stop_tokens),
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    return [answer(prompt) for prompt in prompts_of(talker, QUESTIONS)]


@pytest.mark.parametrize("max_new_tokens", [1, 5, 24])
def test_greedy_equals_transformers(max_new_tokens, talker, torch_answers):
    """Token for token; the window is shorter than any prompt with its answer."""
    prompts = prompts_of(talker, QUESTIONS)
    assert len({len(prompt) for prompt in prompts}) > 4
    answers = [answer.tolist() for answer in greedy(talker, prompts, max_new_tokens)]
    assert answers == [answer[:max_new_tokens] for answer in torch_answers]
    if max_new_tokens == 24:
        _, first, second = talker.stop_tokens
        assert {*ends(answers, talker.stop_tokens)} == {first, second, None}


def test_generate_is_the_text_of_the_greedy_answers(talker, torch_answers):
    expected = [talker.tokenizer.decode(answer, skip_special_tokens=True) for answer in torch_answers]
    assert len(set(expected)) > 4
    assert spin_jax.generate(talker, asked(QUESTIONS), max_new_tokens=24) == expected
    assert spin_jax.generate(talker, []) == []


def test_an_answer_keeps_its_stop_token_and_ends_there(talker):
    """At temperature 1 with one token in twelve a stop token, so that they stand in many places."""
    stops = (*talker.stop_tokens, *range(6, 262, 12))
    prompts, keys = prompts_of(talker, QUESTIONS), prompt_keys(0, 0, range(8))
    answers = answers_of(talker, prompts, keys, Sampling(24), stop_tokens=stops)
    assert len({len(answer) for answer in answers}) > 3
    for answer in answers:
        assert answer.dtype == np.int32
        assert (answer >= 0).all()
        assert not np.isin(answer[:-1], stops).any()
        assert np.isin(answer[-1], stops) or len(answer) == 24
    # With fewer stop tokens, the same keys begin alike and go on.
    longer = answers_of(talker, prompts, keys, Sampling(24))
    assert sum(map(len, longer)) > sum(map(len, answers))
    for answer, further in zip(answers, longer, strict=True):
        np.testing.assert_array_equal(answer, further[: len(answer)])


def saying_only(model, token):
    """The model with weights by which every next token is `token`: its logit is above zero, others are 0."""
    head = np.zeros(model.params["head"].shape, np.float32)
    head[:, token] = 1
    params = {
        **jax.tree.map(np.zeros_like, jax.device_get(model.params)),
        "embed": np.ones(model.params["embed"].shape, np.float32),
        "final_norm": jax.device_get(model.params["final_norm"]),
        "head": head,
    }
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, model.params)
    return dataclasses.replace(model, params=placed)


@pytest.mark.parametrize(("token", "length"), [(4, 24), (2, 1)], ids=["<|user|>", "</s>"])
def test_generate_strips_special_tokens(token, length, talker):
    """One is no stop token and fills the answer, the other ends it at once; neither is text."""
    model = saying_only(talker, token)
    for answer in greedy(model, prompts_of(model, [LONG] * 8), 24):
        assert answer.tolist() == [token] * length
    assert spin_jax.generate(model, asked([LONG] * 8), max_new_tokens=24) == [""] * 8


# --- the laws of sampling --------------------------------------------------------------------------

LOGITS = np.array([2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 0.7], np.float32)
DRAWS = 20_000


def law(temperature=1.0, top_k=None, top_p=None):
    """The probabilities by definition: token after token, the likeliest first."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-LOGITS)[:top_k]
    p[np.setdiff1d(np.arange(len(p)), order)] = 0
    p /= p.sum()
    if top_p is not None:
        mass, kept = 0.0, []
        for token in order:
            if mass < top_p:
                kept.append(token)
            mass += p[token]
        p[np.setdiff1d(np.arange(len(p)), kept)] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.7},
        {"top_p": 0.2},  # less than the likeliest token has: it alone is kept
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8},
        {"temperature": 2.0, "top_p": 0.8},  # top-p sees the tempered probabilities
    ],
    ids=str,
)
def test_draws_follow_their_law(options):
    """A chi-square test at fixed keys, p > 1e-3; what is left out is never drawn."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    logits = jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    counts = np.bincount(draw(logits, keys, Sampling(1, **options)), minlength=len(LOGITS))
    expected = law(**options)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert stats.chisquare(counts[possible], DRAWS * expected[possible]).pvalue > 1e-3
        other = law(**{**options, "temperature": options.get("temperature", 1.0) * 1.25})
        if ((other > 0) == possible).all():  # the test sees a temperature that is a quarter off
            assert stats.chisquare(counts[possible], DRAWS * other[possible]).pvalue < 1e-3


def test_temperature_zero_is_the_largest_logit():
    logits = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    np.testing.assert_array_equal(draw(logits, keys, Sampling(1, 0.0)), logits.argmax(axis=1))


@pytest.mark.parametrize("top_k", [None, 1, 7, 64, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.95, 1.0])
def test_truncation_equals_transformers(top_k, top_p):
    """Rows from flat to peaked. What is kept is bit-equal; the rest is −∞ on both sides."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(32, 64)).astype(np.float32) * np.geomspace(0.1, 8, 32)[:, None].astype("f4")
    expected = torch.tensor(logits)
    if top_k:
        expected = process.TopKLogitsWarper(top_k)(None, expected)
    if top_p:
        expected = process.TopPLogitsWarper(top_p)(None, expected)
    truncated = truncate_logits(jnp.asarray(logits), Sampling(1, top_k=top_k, top_p=top_p))
    np.testing.assert_array_equal(truncated, expected.numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, r"temperature=-0\.1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
    ],
)
def test_bad_sampling_raises(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 1, **options})


# --- answers and batches ---------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_its_batch(talker):
    """Batches of 1, 3 and 8, and prompts in another order: every answer the same to the token."""
    prompts, sampling = prompts_of(talker, QUESTIONS), Sampling(24, temperature=1.0)
    ids = np.array([11, 3, 500, 7, 0, 2, 90, 4])
    expected = answers_of(talker, prompts, prompt_keys(1, 2, ids), sampling, batch_size=8)
    assert len({tuple(answer) for answer in expected}) > 4
    assert sum(map(len, expected)) > 50, "answers too short to differ"
    for batch_size in (1, 3):
        answers = answers_of(talker, prompts, prompt_keys(1, 2, ids), sampling, batch_size=batch_size)
        assert [a.tolist() for a in answers] == [a.tolist() for a in expected]
    order = np.random.default_rng(0).permutation(len(prompts))
    answers = answers_of(
        talker, [prompts[i] for i in order], prompt_keys(1, 2, ids[order]), sampling, batch_size=3
    )
    assert [a.tolist() for a in answers] == [expected[i].tolist() for i in order]


def test_seed_iteration_prompt_and_sample_each_change_the_key():
    base = {"seed": 1, "iteration": 2, "prompt_ids": [3], "sample_id": 0}
    # The neighbours of each, and what an exchange of two of the numbers would give.
    others = [
        {"seed": 2},
        {"iteration": 3},
        {"prompt_ids": [4]},
        {"prompt_ids": [3 + 2**32]},
        {"sample_id": 1},
        {"seed": 2, "iteration": 1},
        {"iteration": 3, "prompt_ids": [2]},
        {"prompt_ids": [0], "sample_id": 3},
    ]
    keys = [jax.random.key_data(prompt_keys(**{**base, **other})) for other in [{}, *others, {}]]
    rows = [tuple(np.asarray(key)[0].tolist()) for key in keys]
    assert len(set(rows)) == len(others) + 1
    assert rows[0] == rows[-1]
    together = jax.random.key_data(prompt_keys(1, 2, [9, 3, 4]))
    assert tuple(np.asarray(together)[1].tolist()) == rows[0]


def test_generate_changes_with_the_seed_alone(talker):
    def texts(questions, seed, **options):
        return spin_jax.generate(talker, asked(questions), 24, 1.0, seed, **options)

    first = texts(QUESTIONS, 0)
    assert texts(QUESTIONS, 0, batch_size=3) == first
    assert sum(a != b for a, b in zip(texts(QUESTIONS, 1), first, strict=True)) > 4
    # One conversation asked again and again gets other answers: a key knows its place in the list.
    assert len(set(texts([LONG] * 8, 0))) > 4


def test_every_token_has_a_key_of_its_own(talker):
    """The n-th token of an answer is drawn with fold_in(key, n): here from equal logits."""
    flat = saying_only(talker, slice(None))
    keys = prompt_keys(0, 0, range(8))
    answers = answers_of(flat, prompts_of(flat, QUESTIONS), keys, Sampling(24))
    assert sum(map(len, answers)) > 100
    for key, answer in zip(keys, answers, strict=True):
        expected = [jax.random.categorical(jax.random.fold_in(key, n), jnp.zeros(272)) for n in range(24)]
        assert answer.tolist() == [int(token) for token in expected[: len(answer)]]


def test_on_batch_is_told_and_may_stop(talker):
    prompts, keys, told = prompts_of(talker, QUESTIONS), prompt_keys(0, 0, range(8)), []

    def tell(*counts):
        told.append(counts)

    answers = answers_of(talker, prompts, keys, Sampling(24), batch_size=3, on_batch=tell)
    assert [count for count, _ in told] == [3, 3, 2]  # filler rows are not counted
    assert sum(tokens for _, tokens in told) == sum(map(len, answers))

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        answers_of(talker, prompts, keys, Sampling(24), batch_size=3, on_batch=stop)


# --- programs --------------------------------------------------------------------------------------


def test_decoding_stops_when_every_answer_has(talker, monkeypatch):
    """The model runs once for the prompts, then once a token while an answer is unfinished."""
    runs = []

    def counted(*args):
        jax.debug.callback(lambda: runs.append(1))
        return forward(*args)

    forward = sample.forward
    monkeypatch.setattr(sample, "forward", counted)
    # A program of its own, which no other test finds compiled with the counter in it.
    monkeypatch.setattr(
        sample,
        "decode",
        jax.jit(sample.decode.__wrapped__, static_argnames=("decoder", "sampling", "stop_tokens")),
    )

    def lengths_and_runs(token):
        runs.clear()
        model = saying_only(talker, token)
        answers = greedy(model, prompts_of(model, QUESTIONS[:3]), 10, batch_size=4)
        jax.effects_barrier()
        return [len(answer) for answer in answers], len(runs)

    assert lengths_and_runs(2) == ([1, 1, 1], 1)
    assert lengths_and_runs(4) == ([10, 10, 10], 10)


def test_filler_rows_say_nothing(talker):
    """A row that starts where the prompts end: done from the start, it never keeps the others waiting."""
    model = saying_only(talker, 4)
    tokens, starts = np.full((2, 16), 7, np.int32), np.array([3, 16], np.int32)
    with jax.set_mesh(model.mesh):
        out = sample.decode(
            Decoder(model.config),
            sampling_params(model.params, model.dtype),
            *sharding.put_batch(model.mesh, (tokens, starts)),
            prompt_keys(0, 0, range(2)),
            sampling=Sampling(5, temperature=0.0),
            stop_tokens=(2,),
        )
    np.testing.assert_array_equal(out, [[4] * 5, [-1] * 5])


def test_batches_of_one_shape_share_a_program(talker):
    """Prompts of 17 to 24 tokens are padded to 24, whatever the batch and the draws."""
    prompts = [np.arange(length, dtype=np.int32) + 6 for length in (17, 20, 22, 23, 24, 18, 22)]
    before = sample.decode._cache_size()
    answers_of(talker, prompts, prompt_keys(0, 0, range(7)), Sampling(3), batch_size=2)
    answers_of(talker, prompts[::-1], prompt_keys(5, 1, range(7)), Sampling(3), batch_size=2)
    assert sample.decode._cache_size() == before + 1


@pytest.mark.parametrize("sampling", [Sampling(24, temperature=0.0), Sampling(24, top_p=0.9)], ids=str)
def test_eight_devices_answer_as_one(sampling, talker, talker_dir, mesh8):
    """Five prompts on a mesh that splits batches in four: filler rows and split heads change no token."""
    eight = convert.load(str(talker_dir), mesh=mesh8)
    prompts, keys = prompts_of(talker, QUESTIONS)[3:], prompt_keys(0, 0, range(5))
    expected, answers = (answers_of(model, prompts, keys, sampling) for model in (talker, eight))
    assert len({tuple(answer) for answer in expected}) > 3
    assert [a.tolist() for a in answers] == [a.tolist() for a in expected]
