"""Sampling: greedy as transformers, draws by their law, answers that know nothing of one another."""

import contextlib
import dataclasses
import itertools
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simple_sampler
from answers import answers_of
from safetensors import numpy as safetensors_numpy
from scipy import stats
from torch_reference import torch_greedy

import spin_jax
from spin_jax.data.chat import Chat
from spin_jax.kernels.layout import Layout
from spin_jax.models import loading
from spin_jax.models.architecture import Model, ModelConfig
from spin_jax.models.decoder import Decoder, forward, output_head, project
from spin_jax.models.params import abstract_params, init_params, sampling_params
from spin_jax.runtime import sharding
from spin_jax.sampling import continuous
from spin_jax.sampling import slots as slots_lib
from spin_jax.sampling.next_token import Sampling, draw, prompt_keys, truncate_logits
from spin_jax.storage import files

# Prompts of 11 to 20 tokens, three more than characters: two of them are read at a time, padded to 16 or 24.
# Tests of the talker answer these in up to 24 tokens, and so share a few compiled programs.
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
BRIEF = QUESTIONS[:6]  # 16 tokens at most: the longer prompts would only have more programs compiled


def asked(questions):
    return [[{"role": "user", "content": question}] for question in questions]


def prompts_of(model, questions):
    chat = Chat(model.tokenizer, model.stop_tokens)
    return [chat.encode_prompt(messages) for messages in asked(questions)]


def greedy(model, prompts, **options):
    return answers_of(model, prompts, Sampling(24, temperature=0.0), **options)


# --- greedy ----------------------------------------------------------------------------------------


def ends(answers, stops):
    """What each answer ends in: one of the stops, or None where it holds none of them."""
    return [next((token for token in answer if token in stops), None) for answer in answers]


@pytest.fixture(scope="module")
def talker_and_answers(hf_model_dir, mesh, tmp_path_factory):
    """A model, and transformers' answers: some end in one EOS, some in another, some in none.

    Which tokens these are is found by asking: the generation config then calls them EOS. The tokenizer's
    </s>, of which a random model may say much or little, never is the likeliest token.
    """
    directory, _ = hf_model_dir("mistral", sliding_window=6)
    copy = shutil.copytree(directory, tmp_path_factory.mktemp("talker") / "model")
    tensors = safetensors_numpy.load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][2] = 0
    safetensors_numpy.save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    files.write_json(copy / "generation_config.json", {})
    prompts = prompts_of(loading.load(str(copy), mesh=mesh), QUESTIONS)
    reference = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        copy, attn_implementation="eager"
    )
    answers = [torch_greedy(reference, prompt, 24, [2]) for prompt in prompts]
    said = sorted({token for answer in answers for token in answer[1:] if token > 5})
    stops = next(pair for pair in itertools.combinations(said, 2) if {*pair, None} == {*ends(answers, pair)})
    files.write_json(copy / "generation_config.json", {"eos_token_id": list(stops)})
    model = loading.load(str(copy), mesh=mesh)
    assert model.stop_tokens == (2, *stops)  # </s> joins the two
    return model, [torch_greedy(reference, prompt, 24, list(model.stop_tokens)) for prompt in prompts]


@pytest.fixture(scope="module")
def talker(talker_and_answers):
    return talker_and_answers[0]


@pytest.fixture(scope="module")
def torch_answers(talker_and_answers):
    return talker_and_answers[1]


@pytest.mark.parametrize("max_new_tokens", [1, 5, 24])
def test_greedy_equals_transformers(max_new_tokens, talker, torch_answers):
    """Token for token; the window is shorter than any prompt."""
    prompts = prompts_of(talker, QUESTIONS)
    assert len({len(prompt) for prompt in prompts}) > 4
    answers = greedy(talker, prompts, limits=[max_new_tokens] * len(prompts))
    assert answers == [answer[:max_new_tokens] for answer in torch_answers]
    if max_new_tokens == 24:
        _, first, second = talker.stop_tokens
        assert {*ends(answers, talker.stop_tokens)} == {first, second, None}


def test_generate_is_the_text_of_the_greedy_answers(talker, torch_answers):
    expected = [talker.tokenizer.decode(answer, skip_special_tokens=True) for answer in torch_answers]
    assert len(set(expected)) > 4
    assert spin_jax.generate(talker, asked(QUESTIONS), max_new_tokens=24) == expected
    assert spin_jax.generate(talker, []) == []


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
    assert greedy(model, prompts_of(model, [LONG] * 8)) == [[token] * length] * 8
    assert spin_jax.generate(model, asked([LONG] * 8), max_new_tokens=24) == [""] * 8


# --- the laws of sampling --------------------------------------------------------------------------

LOGITS = np.array([2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 0.7], np.float32)
DRAWS = 10_000

compiled_draw = jax.jit(draw, static_argnames="sampling")


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
    counts = np.bincount(compiled_draw(logits, keys, Sampling(1, **options)), minlength=len(LOGITS))
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
    np.testing.assert_array_equal(compiled_draw(logits, keys, Sampling(1, 0.0)), logits.argmax(axis=1))


@pytest.mark.parametrize("options", [{"temperature": 1e-6}, {"temperature": 1e-30}, {"top_k": 1}], ids=str)
def test_what_leaves_one_token_draws_the_largest_logit(options):
    """At the temperatures too, the smaller of which takes quotients beyond float32."""
    logits = 100 * np.random.default_rng(0).normal(size=(500, 300)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 500)
    np.testing.assert_array_equal(compiled_draw(logits, keys, Sampling(1, **options)), logits.argmax(axis=1))


@pytest.fixture
def draw_at(monkeypatch):
    """draw_at(logits [V], points): the tokens drawn where the uniform random numbers are these points."""
    monkeypatch.setattr(jax.random, "uniform", lambda point: point)

    def tokens(logits, points):
        rows = jnp.broadcast_to(logits, (len(points), len(logits)))
        # A new function, which no other test has compiled with the true random numbers.
        compiled = jax.jit(lambda *args: draw(*args, Sampling(1)))
        return np.asarray(compiled(rows, jnp.asarray(points, jnp.float32)))

    return tokens


@pytest.mark.parametrize("vocabulary", [5, 256, 272, 1000])
def test_draws_invert_the_distribution_function(vocabulary, draw_at):
    """Less and more than a block of 256 or whole ones. Within 1e-6 of a step, rounding may choose a side."""
    rng = np.random.default_rng(vocabulary)
    logits = 2 * rng.normal(size=vocabulary).astype(np.float32)
    steps = np.cumsum(np.exp(logits.astype(np.float64)))
    steps /= steps[-1]
    points = np.sort(np.concatenate([rng.random(4000), [0, 1 - 2**-24]]).astype(np.float32))
    tokens = draw_at(logits, points)
    for margin in (-1e-6, 1e-6):
        exact = np.searchsorted(steps, points + margin, side="right").clip(0, vocabulary - 1)
        assert ((tokens - exact) * margin <= 0).all()
    assert tokens[0] == 0
    assert tokens[-1] == vocabulary - 1


def test_equal_logits_are_drawn_in_equal_parts(draw_at):
    """Exactly, for all sums are exact: a point on a step belongs to the token after it."""
    np.testing.assert_array_equal(draw_at(np.zeros(512, np.float32), np.arange(512) / 512), np.arange(512))


def test_tokens_without_probability_are_never_drawn(draw_at):
    """Points around every step, where sums in float32 are rounded past it; most tokens have logit −∞.

    So do the first of each block of 256, the first of all and the last, beyond which there is only filler.
    """
    rng = np.random.default_rng(0)
    logits = rng.normal(size=5000).astype(np.float32)
    logits[rng.random(5000) < 0.9] = -np.inf
    logits[::256] = -np.inf
    logits[-1] = -np.inf
    steps = np.cumsum(np.exp(logits.astype(np.float64)))
    steps = np.unique((steps / steps[-1]).astype(np.float32))
    points = np.concatenate([steps + k * np.spacing(steps) for k in range(-4, 5)])
    tokens = draw_at(logits, [*points[points < 1], 0, 1 - 2**-24])
    assert np.isfinite(logits[tokens]).all()  # an id past the end would raise
    assert set(tokens) == set(np.flatnonzero(np.isfinite(logits)))


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


# --- answers and their company ---------------------------------------------------------------------

# Prompts are padded to 16, 24 or 64, and with answers of up to 40 tokens want 48, 64 or 96 columns.
# Tests of the small model answer these in 3 slots where they can, and so share a few compiled programs.
NEW = 40
SAMPLING = Sampling(NEW)
LENGTHS = (3, 50, 7, 17, 8, 2, 24, 5, 56, 4, 20, 6)
STOPS = (2,)


@pytest.fixture(scope="module")
def small(mesh):
    """A model of one layer, without a window or a tokenizer, whose logits depend much on what it read."""
    config = ModelConfig(
        model_type="mistral",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        norm_eps=1e-3,
        rope_theta=500.0,
        rope_scaling=None,
        rotary_dim=8,
        windows=(None,),
        activation="silu",
        tie_word_embeddings=False,
        max_position_embeddings=256,
        initializer_range=1.0,
    )
    params = init_params(config, jax.random.key(0), mesh)
    return Model(config, params, None, jnp.float32, mesh, hf_config={}, generation_config={})


def with_window(model, window):
    return dataclasses.replace(model, config=dataclasses.replace(model.config, windows=(window,)))


def random_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, length).astype(np.int32) for length in lengths]


PROMPTS = random_prompts(LENGTHS)
IDS = np.arange(len(PROMPTS)) * 7 % 31
SHORT = [i for i, length in enumerate(LENGTHS) if length <= 8]
MIDDLE = [i for i, length in enumerate(LENGTHS) if length <= 24]  # and short


def sampled(model, chosen=slice(None), *, sampling=SAMPLING, **options):
    """What `answer_prompts` says to `PROMPTS`, or to those chosen, in their order."""
    chosen = np.arange(len(PROMPTS))[chosen]
    options = {"slots": 3, "stop_tokens": STOPS, **options}
    prompts = [PROMPTS[i] for i in chosen]
    return answers_of(model, prompts, sampling, keys=prompt_keys(1, 1, IDS[chosen]), **options)


def expected_of(model, chosen=slice(None), sampling=SAMPLING):
    """The same from the simple sampler."""
    keys = prompt_keys(1, 1, IDS)
    return [simple_sampler.answer(model, PROMPTS[i], keys[i], sampling, STOPS) for i in np.arange(len(PROMPTS))[chosen]]


@pytest.fixture(scope="module")
def expected(small):
    answers = expected_of(small)
    lengths = {len(answer) for answer in answers}
    assert {1, NEW} <= lengths
    assert len(lengths) > 6
    return answers


class Call(NamedTuple):
    """A run of `prefill` or `decode`."""

    program: str
    prompts: tuple[int, ...]  # shape of the prompts read
    cache: jax.ShapeDtypeStruct  # keys of a layer
    unfinished: int  # answers in progress before it
    in_place: bool  # the old state is gone, and the new cache where the old one was


@pytest.fixture
def calls(monkeypatch):
    """The runs of both programs, as they go."""
    made = []

    def places(slots):
        return [array.unsafe_buffer_pointer() for array in (*slots.cache.keys, *slots.cache.values)]

    def watch(name):
        program = getattr(continuous, name)

        def watched(decoder, params, slots, *arrays, **options):
            keys, old = slots.cache.keys[0], places(slots)
            unfinished = int((~slots.done).sum())
            out = program(decoder, params, slots, *arrays, **options)
            gone = all(x.is_deleted() for x in jax.tree.leaves(slots.cache))
            in_place = gone and places(out[0]) == old
            shape = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
            made.append(Call(name, arrays[0].shape if arrays else (), shape, unfinished, in_place))
            return out

        monkeypatch.setattr(continuous, name, watched)

    watch("prefill")
    watch("decode")
    return made


@pytest.mark.parametrize(("slots", "chosen"), [(1, SHORT), (3, MIDDLE), (8, MIDDLE), (16, SHORT)])
def test_same_keys_same_answers_as_the_simple_sampler(slots, chosen, small, expected):
    """Token for token, whatever the slots, the order and the company; 16 are more than there are prompts."""
    order = np.random.default_rng(slots).permutation(chosen)
    assert sampled(small, order, slots=slots) == [expected[i] for i in order]
    assert sampled(small, order[:5], slots=slots) == [expected[i] for i in order[:5]]


def test_the_cache_widens_under_answers_in_progress(small, expected, calls):
    """Twice in this call, and each time while another slot is in the middle of an answer."""
    assert sampled(small) == expected
    widths = [call.cache.shape[2] for call in calls]
    assert sorted(set(widths)) == [48, 64, 96]
    assert widths == sorted(widths)
    for width in (64, 96):
        assert calls[widths.index(width)].unfinished > 0


@pytest.mark.parametrize(("steps", "chosen"), [(1, SHORT), (3, MIDDLE), (100, SHORT)])
def test_answers_do_not_depend_on_the_chunks_they_are_decoded_in(steps, chosen, small, expected, monkeypatch):
    """Chunks from one token to more than an answer has.

    A prefill draws the first token, and an answer begins with a chunk: in chunks of 3, answers end with
    the first token, at each place of a chunk, and some chunks later.
    """
    monkeypatch.setattr(continuous, "DECODE_STEPS", steps)
    assert sampled(small, chosen) == [expected[i] for i in chosen]
    ended = [len(expected[i]) for i in MIDDLE if expected[i][-1] in STOPS]
    assert 1 in ended
    assert {(length - 1) % 3 for length in ended if length > 1} == {0, 1, 2}
    assert max(ended) > 10


def test_an_answer_keeps_its_stop_token_and_ends_there(small, expected):
    """With more stop tokens, the same keys begin alike."""
    stops = (*STOPS, 5, 11, 17, 23, 29)
    answers = sampled(small, SHORT, stop_tokens=stops)
    assert len({len(answer) for answer in answers}) > 3
    for i, answer in zip(SHORT, answers, strict=True):
        first = next((n for n, token in enumerate(expected[i]) if token in stops), NEW - 1)
        assert answer == expected[i][: first + 1]


@pytest.mark.parametrize(("window", "chosen"), [(6, SHORT), (16, SHORT), (52, MIDDLE)])
def test_the_ring_is_never_wider_than_the_window(window, chosen, small, expected, calls):
    """Windows shorter than prompts or answers; at 52, the ring widens from 48 columns to the window.

    Chunks write the same columns for all rows, one chunk after the other: the ring wraps again and again,
    at 6 within every answer too.
    """
    model = with_window(small, window)
    answers = expected_of(model, chosen)
    assert answers != [expected[i] for i in chosen]
    assert sampled(model, chosen) == answers
    widths = [call.cache.shape[2] for call in calls]
    assert sorted(set(widths)) == ([48, 52] if window == 52 else [window])
    assert widths == sorted(widths)
    chunks = sum(call.program == "decode" for call in calls)
    assert chunks * continuous.DECODE_STEPS > 2 * window


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Calls of `decode` make all their steps, and the next one is enqueued before one's tokens are read."""
    monkeypatch.setattr(continuous, "runs_ahead", lambda mesh: True)
    monkeypatch.setattr(continuous, "fixed_steps", lambda mesh: True)


@pytest.mark.parametrize(("window", "chosen"), [(None, slice(None)), (6, SHORT), (52, MIDDLE)])
def test_running_ahead_changes_no_answer(window, chosen, small, expected, calls, as_on_gpus):
    """The cache widens and slots are filled again while a call is unread; windows as above."""
    model = with_window(small, window)
    told = []
    answers = sampled(model, chosen, on_chunk=lambda *counts: told.append(counts))
    assert answers == (expected if window is None else expected_of(model, chosen))
    chunks = sum(call.program == "decode" for call in calls)
    assert len(told) == chunks - 1  # the last call is for nothing, and unread
    assert np.sum(told, axis=0).tolist() == [len(answers), sum(map(len, answers))]


@pytest.mark.parametrize("ahead", [False, True])
def test_an_answer_that_is_stopped_gives_its_slot_away(ahead, small, expected, monkeypatch):
    """It has what it had when asked, and no other answer changes."""
    monkeypatch.setattr(continuous, "runs_ahead", lambda mesh: ahead)
    stopped_at = {}

    def stopped(i, answer):
        if MIDDLE[i] % 2 and len(answer) > 5:
            assert i not in stopped_at
            stopped_at[i] = len(answer)
        return i in stopped_at

    answers = sampled(small, MIDDLE, stopped=stopped)
    for n, (i, answer) in enumerate(zip(MIDDLE, answers, strict=True)):
        assert answer == expected[i][: stopped_at.get(n)]
    assert any(n < len(expected[MIDDLE[i]]) for i, n in stopped_at.items())


@pytest.mark.parametrize(
    ("window", "sampling", "chosen"),
    [(None, SAMPLING, MIDDLE), (6, Sampling(NEW, temperature=0.0), SHORT)],
    ids=["draws", "greedy, a window"],
)
def test_the_kernels_of_gpus_answer_as_plain(window, sampling, chosen, small, as_on_gpus):
    """Interpreted, in float32: `flash` reads prompts, `flash_decode` the cache."""
    model = with_window(small, window)
    assert sampled(model, chosen, sampling=sampling, kernel="flash") == expected_of(model, chosen, sampling)


def test_limits_cut_answers_one_by_one(small, expected):
    """A limit beyond `max_new_tokens` changes nothing, and no limit changes another answer."""
    limits = [NEW, NEW, 1, NEW, 17, NEW + 5, 2, 16, 5, 7, 1, 39]
    assert sampled(small, limits=limits) == [a[:n] for a, n in zip(expected, limits, strict=True)]
    assert sum(len(a) > n for a, n in zip(expected, limits, strict=True)) > 4


def test_slots_are_filled_again_and_again(small):
    """Sixty prompts in three slots."""
    prompts, keys = random_prompts([1 + i % 8 for i in range(60)], seed=1), prompt_keys(0, 0, range(60))
    answers = answers_of(small, prompts, SAMPLING, keys=keys, slots=3, stop_tokens=STOPS)
    for prompt, key, answer in zip(prompts, keys, answers, strict=True):
        assert answer == simple_sampler.answer(small, prompt, key, SAMPLING, STOPS)


@pytest.mark.parametrize(("tokens", "rows"), [(8, 1), (4096, 2)], ids=["less than a prompt", "many prompts"])
def test_prompts_read_at_a_time(tokens, rows, small, expected, monkeypatch, calls):
    """As many as have so many tokens, but never none, nor more than a quarter of the slots."""
    monkeypatch.setattr(continuous, "_PREFILL_TOKENS", tokens)
    assert sampled(small, MIDDLE, slots=8) == [expected[i] for i in MIDDLE]
    assert {call.prompts[0] for call in calls if call.program == "prefill"} == {rows}


def test_bfloat16_answers_are_likeliest_up_to_its_rounding(small, calls):
    """Held against float32 logits of the rounded weights.

    Logits are up to 15, where a step of bfloat16 is 2⁻⁴, and the likeliest two of a token mostly 1 apart.
    """
    model = dataclasses.replace(small, dtype=jnp.bfloat16)
    answers = sampled(model, SHORT, sampling=Sampling(NEW, temperature=0.0))
    assert {call.cache.dtype for call in calls} == {jnp.dtype("bfloat16")}
    tokens = np.zeros((len(SHORT), 48), np.int32)
    for row, i, answer in zip(tokens, SHORT, answers, strict=True):
        row[: LENGTHS[i] + len(answer)] = [*PROMPTS[i], *answer]

    @jax.jit
    def logits_of(params, tokens):
        decoder = Decoder(model.config)
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params)
        layout = Layout(jnp.broadcast_to(jnp.arange(48), tokens.shape), jnp.ones_like(tokens))
        return project(forward(decoder, params, tokens, layout)[0], output_head(decoder, params))

    with jax.set_mesh(model.mesh):
        logits = np.asarray(logits_of(model.params, tokens))
    assert sum(map(len, answers)) > 100
    for row, i, answer in zip(logits, SHORT, answers, strict=True):
        before = row[LENGTHS[i] - 1 :][: len(answer)]
        assert (before[np.arange(len(answer)), answer] > before.max(axis=1) - 0.1).all()


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


def test_generate_changes_with_the_seed_alone(talker, calls):
    def texts(questions, seed):
        return spin_jax.generate(talker, asked(questions), 24, 1.0, seed, batch_size=3)

    first = texts(BRIEF, 0)
    assert {call.cache.shape[0] for call in calls} == {3}
    assert texts(BRIEF, 0) == first
    assert sum(a != b for a, b in zip(texts(BRIEF, 1), first, strict=True)) > 4
    # One conversation asked again and again gets other answers: a key knows its place in the list.
    assert len(set(texts(["Any duck?"] * 6, 0))) > 4


def test_every_token_has_a_key_of_its_own(talker):
    """The n-th token of an answer is drawn with fold_in(key, n): here from equal logits."""
    flat = saying_only(talker, slice(None))
    keys = prompt_keys(0, 0, range(6))
    answers = answers_of(flat, prompts_of(flat, BRIEF), Sampling(24), keys=keys, slots=3)
    assert sum(map(len, answers)) > 90
    for key, answer in zip(keys, answers, strict=True):
        points = [jax.random.uniform(jax.random.fold_in(key, n)) for n in range(len(answer))]
        assert answer == [int(272 * point) for point in points]


def test_on_chunk_is_told_and_may_stop(small, expected):
    told = []

    def tell(*counts):
        told.append(counts)

    assert sampled(small, on_chunk=tell) == expected
    prompts, tokens = (list(counts) for counts in zip(*told, strict=True))
    assert sum(prompts) == len(PROMPTS)
    assert sum(tokens) == sum(map(len, expected))
    # A slot draws at most a chunk and the first token before it.
    assert all(0 <= count <= 3 for count in prompts)
    assert all(0 < count <= 3 * (continuous.DECODE_STEPS + 1) for count in tokens)

    class Stop(Exception):
        pass

    def stop(*counts):
        tell(*counts)
        if len(told) == 2:
            raise Stop

    told.clear()
    with pytest.raises(Stop):
        sampled(small, on_chunk=stop)
    assert len(told) == 2


def test_no_prompts_no_answers(small):
    assert sampled(small, []) == []


# --- equal prompts ---------------------------------------------------------------------------------

# How many answers each short prompt gets: one alone, and more than there are slots. They come in a random order.
COPIES = (4, 1, 9, 2, 4, 1, 3)
SAMPLES = np.random.default_rng(0).permutation([(i, k) for i, K in zip(SHORT, COPIES, strict=True) for k in range(K)])


def keys_of(samples):
    prompts, sample_ids = np.asarray(samples).T
    return prompt_keys(1, 1, IDS[prompts], sample_ids)


def answered_together(model, samples=SAMPLES, *, sampling=SAMPLING, **options):
    """What `answer_prompts` says to (prompt, sample) pairs, in one call."""
    options = {"keys": keys_of(samples), "slots": 3, "stop_tokens": STOPS, **options}
    return answers_of(model, [PROMPTS[i] for i, _ in samples], sampling, **options)


def answered_alone(model, samples=SAMPLES, sampling=SAMPLING):
    """What the simple sampler says to each of them."""
    keys = keys_of(samples)
    return [
        simple_sampler.answer(model, PROMPTS[i], key, sampling, STOPS)
        for (i, _), key in zip(samples, keys, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(small):
    answers = answered_alone(small)
    assert len(set(map(tuple, answers))) > len(answers) / 2  # the keys of equal prompts say other things
    return answers


@pytest.fixture
def prompts_read(monkeypatch):
    """The prompts that were read, as they go, with those of rows of padding."""
    read = []

    def watch(name, first):
        program = getattr(continuous, name)

        def watched(*args, **options):
            tokens, lengths = map(np.asarray, args[first : first + 2])
            read.extend(tuple(row[len(row) - n :].tolist()) for row, n in zip(tokens, lengths, strict=True))
            return program(*args, **options)

        monkeypatch.setattr(continuous, name, watched)

    watch("prefill", 3)
    watch("read_prompts", 2)
    return read


@pytest.mark.parametrize(("slots", "rows"), [(1, 7), (3, 7), (8, 8), (16, 8)])
def test_equal_prompts_are_read_once(slots, rows, small, alone, prompts_read):
    """Each answer is the one of its prompt and key alone, token for token.

    With 1 and 3 slots, one prompt is read at a time. With 8, two are, and with 16, four: the last row is padding.
    """
    assert answered_together(small, slots=slots) == alone
    assert len(prompts_read) == rows
    assert set(prompts_read) == {tuple(PROMPTS[i].tolist()) for i in SHORT}


def test_four_answers_to_each_prompt_read_a_quarter_of_the_tokens(small, prompts_read, monkeypatch):
    """Counted, with the same answers as where each of them reads its prompt."""
    samples = list(itertools.product(MIDDLE[:8], range(4)))
    shared = answered_together(small, samples, slots=8)
    tokens = sum(map(len, prompts_read))
    assert tokens == sum(LENGTHS[i] for i in MIDDLE[:8])
    prompts_read.clear()
    monkeypatch.setattr(continuous, "_MOST_DISTINCT", 0)
    assert answered_together(small, samples, slots=8) == shared
    assert sum(map(len, prompts_read)) == 4 * tokens


def test_answers_to_equal_prompts_have_limits_of_their_own(small, alone):
    limits = np.random.default_rng(1).integers(1, NEW + 5, len(alone))
    assert answered_together(small, limits=limits) == [a[:n] for a, n in zip(alone, limits, strict=True)]


@pytest.mark.parametrize(("window", "kernel"), [(6, "plain"), (None, "flash")])
def test_equal_prompts_as_on_gpus(window, kernel, small, alone, as_on_gpus):
    """Running ahead, in a ring that is narrower than the prompts, and by the kernels of GPUs."""
    model = with_window(small, window)
    assert answered_together(model, kernel=kernel) == (alone if window is None else answered_alone(model))


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.usefixtures("mesh8")
def test_equal_prompts_on_devices(shape, small, alone, prompts_read):
    """Two or four shards of two slots each, which begin the answers to their own prompts alone."""
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    shards = sharding.batch_shards(mesh)
    assert answered_together(small, mesh=mesh, slots=2 * shards) == alone
    assert len(prompts_read) == sharding.round_up(len(SHORT), shards)


@pytest.mark.usefixtures("mesh8")
def test_one_prompt_is_answered_on_all_devices(small):
    """Eight answers of eight tokens on two devices of two slots: two chunks, where one device would need four."""
    samples, chunks = [(SHORT[0], k) for k in range(8)], []
    options = {"sampling": Sampling(continuous.DECODE_STEPS), "stop_tokens": ()}
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    answers = answered_together(small, samples, mesh=mesh, slots=4, on_chunk=lambda *c: chunks.append(c), **options)
    assert answers == answered_together(small, samples, **options)
    assert [answered for answered, _ in chunks] == [4, 4]


def test_prompts_read_once_share_their_programs(small):
    """Two programs beside `prefill`, with slots that no other test has; then nothing, whatever is equal or not."""
    programs = (continuous.prefill, continuous.read_prompts, continuous.begin_answers, continuous.decode)

    def compiled_for(copies):
        """How many programs of each kind are compiled for so many answers to each short prompt."""
        before = [program._cache_size() for program in programs]
        answered_together(small, [(i, k) for i, K in zip(SHORT, copies, strict=True) for k in range(K)], slots=20)
        return [program._cache_size() - n for program, n in zip(programs, before, strict=True)]

    assert compiled_for((1,) * 7) == [1, 0, 0, 1]
    assert compiled_for((4,) * 7) == [0, 1, 1, 0]
    assert compiled_for(COPIES) == [0, 0, 0, 0]
    assert compiled_for((1, 1, 2, 1, 1, 1, 1)) == [0, 0, 0, 0]  # seven of eight are distinct


# --- programs --------------------------------------------------------------------------------------


def test_decoding_stops_when_every_answer_has(talker, monkeypatch):
    """The model runs once for the prompts, then once a token while an answer is unfinished."""
    runs = []

    def counted(*args):
        jax.debug.callback(lambda: runs.append(1))
        return forward(*args)

    monkeypatch.setattr(slots_lib, "forward", counted)
    # Programs of their own, which no other test finds compiled with the counter in them.
    static = ("decoder", "sampling", "stop_tokens")
    prefill = jax.jit(continuous.prefill.__wrapped__, static_argnames=static)
    decode = jax.jit(continuous.decode.__wrapped__, static_argnames=(*static, "steps", "fixed"))
    monkeypatch.setattr(continuous, "prefill", prefill)
    monkeypatch.setattr(continuous, "decode", decode)

    def lengths_and_runs(token):
        runs.clear()
        model = saying_only(talker, token)
        # A quarter of the slots is read at a time: all three prompts at once.
        answers = greedy(model, prompts_of(model, BRIEF[:3]), slots=12, limits=[10] * 3)
        jax.effects_barrier()
        return [len(answer) for answer in answers], len(runs)

    assert lengths_and_runs(2) == ([1, 1, 1], 1)
    assert lengths_and_runs(4) == ([10, 10, 10], 10)


def program_arguments(model, slots, columns):
    """(arguments of `prefill`, of `decode`): two prompts of 16 and 5 tokens, and where both would begin."""
    decoder = Decoder(model.config)
    params = sampling_params(model.params, model.config, model.dtype, model.mesh)
    prompts = (np.full((2, 16), 9, np.int32), np.array([16, 5], np.int32), np.full(2, NEW, np.int32))
    *arrays, keys = sharding.put_batch(model.mesh, (*prompts, np.zeros((2, 2), np.uint32)))
    with jax.set_mesh(model.mesh):
        state = continuous.new_slots(decoder, slots, columns)
    return (decoder, params, state, *arrays, jax.random.wrap_key_data(keys)), (decoder, params, state)


def test_filler_fills_no_slot(small):
    """Of two rows, one is filler: its slot is past the end, and all but the other's stay empty."""
    of_prefill, _ = program_arguments(small, 8, 48)
    with jax.set_mesh(small.mesh):
        slots, _ = continuous.prefill(*of_prefill, np.array([1, 8], np.int32), sampling=SAMPLING, stop_tokens=STOPS)
    filled = np.arange(8) == 1
    written = [x.any(axis=(1, 2, 3)) for x in (*slots.cache.keys, *slots.cache.values)]
    np.testing.assert_array_equal(written, [filled] * len(written))
    np.testing.assert_array_equal(slots.positions, 16 * filled)
    np.testing.assert_array_equal(slots.counts, filled)
    np.testing.assert_array_equal(slots.done, ~filled)


def test_prompts_go_to_the_emptiest_devices_and_stay_there():
    """Two rows a device: a device's rows take its own free slots, counted there; the emptiest comes first."""
    free = np.array([[0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1]], bool)
    rows, into = continuous._rows_and_free_slots(free.reshape(-1), 8, 4)
    assert rows.tolist() == [6, 2, 4, 7, 3, 5]  # devices 3, 1, 2, and around again
    assert into.tolist() == [0, 0, 1, 1, 1, 2]
    rows, into = continuous._rows_and_free_slots(np.zeros(12, bool), 8, 4)
    assert rows.size == into.size == 0


@contextlib.contextmanager
def compilations():
    """A list that grows with every program compiled."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_prompts_of_one_length_range_share_their_programs(small):
    """One of each, with five slots that no other test has; then nothing, whatever the prompts and keys."""

    def answer(lengths, keys, seed):
        prompts = random_prompts(lengths, seed)
        answers_of(small, prompts, SAMPLING, keys=keys, slots=5, stop_tokens=STOPS)

    programs = (continuous.prefill, continuous.decode)
    before = [program._cache_size() for program in programs]
    answer([1, 5, 8, 3, 7, 2, 8, 4], prompt_keys(0, 0, range(8)), seed=2)
    assert [program._cache_size() for program in programs] == [n + 1 for n in before]
    keys = prompt_keys(5, 1, range(9))
    with compilations() as compiled:
        answer([4, 4, 1, 8, 6, 2, 3, 5, 7], keys, seed=3)
        assert not compiled
        jax.jit(lambda x: 3 * x)(1)
        assert len(compiled) == 1


def test_the_cache_is_updated_in_place(small, calls):
    """A state is donated to the program that makes the next one, whose cache lies where the old one lay."""
    sampled(small)
    assert len(calls) > len(PROMPTS)
    assert all(call.in_place for call in calls)


def test_no_program_copies_the_cache(small):
    """What a program holds beside its arguments is less than the keys of one layer, a large cache's."""
    how = {"sampling": SAMPLING, "stop_tokens": STOPS}
    of_prefill, of_decode = program_arguments(small, 16, 1024)
    cache, two = of_prefill[2].cache, [np.arange(2, dtype=np.int32)]
    with jax.set_mesh(small.mesh):
        read = continuous.read_prompts(*of_prefill[:2], *of_prefill[3:5])
        lowered = (
            continuous.prefill.lower(*of_prefill, np.arange(2, dtype=np.int32), **how),
            continuous.decode.lower(*of_decode, steps=16, **how),
            continuous.begin_answers.lower(*of_decode, read, *two, *of_prefill[5:], two[0], **how),
        )
    for program in lowered:
        memory = program.compile().memory_analysis()
        assert memory.temp_size_in_bytes < cache.keys[0].nbytes
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("stored", "used", "sampling", "chosen"),
    [
        ((2, 2, 2), (2, 2, 2), SAMPLING, MIDDLE),
        ((1, 8, 1), (4, 1, 2), Sampling(NEW, temperature=0.0), SHORT),
    ],
    ids=["draws", "greedy, weights from another mesh"],
)
@pytest.mark.usefixtures("mesh8")
def test_eight_devices_answer_as_one(stored, used, sampling, chosen, small):
    """Meshes that split the slots in four: filler rows, refilled slots and split heads change no token."""
    stored, used = sharding.make_mesh(*stored), sharding.make_mesh(*used)
    layouts = sharding.parameter_shardings(stored, abstract_params(small.config))
    eight = dataclasses.replace(small, params=jax.device_put(small.params, layouts), mesh=stored)
    answers = sampled(eight, chosen, sampling=sampling, mesh=used, slots=8)
    assert answers == expected_of(small, chosen, sampling)


@pytest.mark.usefixtures("mesh8", "as_on_gpus")
def test_eight_devices_answer_as_one_by_the_kernels_of_gpus(small):
    mesh = sharding.make_mesh(2, 2, 2)
    assert sampled(small, SHORT, mesh=mesh, slots=8, kernel="flash") == expected_of(small, SHORT)


def test_generate_keeps_to_the_positions_of_the_model(talker):
    """Answers are cut there, with a warning; a prompt that leaves no room is an error before compilation."""
    positions = talker.config.max_position_embeddings
    (prompt,) = (Chat(talker.tokenizer, [0]).encode_prompt(messages) for messages in asked(QUESTIONS[:1]))
    few = dataclasses.replace(
        talker, config=dataclasses.replace(talker.config, max_position_embeddings=len(prompt) + 3)
    )
    with pytest.warns(UserWarning, match="answers are cut where they reach them, not at 8 tokens"):
        (cut,) = spin_jax.generate(few, asked(QUESTIONS[:1]), max_new_tokens=8)
    assert [cut] == spin_jax.generate(talker, asked(QUESTIONS[:1]), max_new_tokens=3)
    question = [[{"role": "user", "content": "1" * positions}]]
    with pytest.raises(ValueError, match="no answer fits"):
        spin_jax.generate(talker, question, max_new_tokens=1)
