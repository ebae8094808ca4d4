"""A real model, SmolLM2-135M-Instruct, on real conversations (GSM8K), against transformers and against itself.

The one short test is part of CI. The others are `long`: 32 conversations, and a run of the command.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_model
from answers import answers_of
from runs import SHARED, Command
from safetensors.numpy import load_file
from torch_reference import token_ids, torch_greedy, torch_logits, torch_score

import spin_jax
from spin_jax.data.chat import Chat
from spin_jax.kernels.layout import Layout
from spin_jax.models import lora
from spin_jax.models.decoder import Decoder, forward, output_head, project
from spin_jax.models.params import params_on
from spin_jax.runtime import sharding
from spin_jax.sampling import slots
from spin_jax.sampling.next_token import Sampling, draw, prompt_keys
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import Group, RowShape

# Both sides compute in float32 from the same bfloat16 weights, and add up in other orders. Logits are about 20.
LOGITS = 1e-3
PER_TOKEN = 1e-5  # nats: what is left of that in a log-prob, on average over an answer
AS_DRAWN = 1e-4  # nats, of any one token: the sampler reads a cache, `score` a packed row


@pytest.fixture(scope="module")
def directory():
    try:
        return real_model.cached()
    except real_model.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(directory):
    """(transformers' model in float32, its tokenizer)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory, mesh):
    return spin_jax.load(str(directory), dtype="float32", mesh=mesh)


@pytest.fixture(scope="module")
def conversations(gsm8k):
    return [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in gsm8k[:32]
    ]


def assert_scores_are_torchs(model, reference, conversations):
    torch_model, tokenizer = reference
    scores = spin_jax.score(model, conversations)
    for messages, score in zip(conversations, scores, strict=True):
        prompt, answer = token_ids(tokenizer, messages)
        assert abs(score - torch_score(torch_model, prompt, answer)) < PER_TOKEN * len(answer)


def assert_answers_are_torchs(model, reference, conversations, tokens):
    torch_model, tokenizer = reference
    prompts = [token_ids(tokenizer, messages)[0] for messages in conversations]
    for prompt, answer in zip(prompts, answers_of(model, prompts, Sampling(tokens, 0.0)), strict=True):
        assert answer == torch_greedy(torch_model, prompt, tokens, list(model.stop_tokens))


def test_two_conversations(model, reference, conversations):
    assert_scores_are_torchs(model, reference, conversations[:2])
    assert_answers_are_torchs(model, reference, conversations[:2], tokens=12)


@pytest.mark.long
def test_scores(model, reference, conversations):
    assert_scores_are_torchs(model, reference, conversations)


@pytest.mark.long
def test_greedy_answers(model, reference, conversations):
    assert_answers_are_torchs(model, reference, conversations, tokens=64)


@pytest.mark.long
def test_logits(model, reference, conversations):
    torch_model, tokenizer = reference
    rows = [prompt + answer for prompt, answer in (token_ids(tokenizer, messages) for messages in conversations)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    for start in range(0, len(rows), 4):
        ours = np.asarray(spin_jax.logits(model, tokens[start : start + 4]))
        for logits, ids in zip(ours, rows[start : start + 4], strict=True):
            np.testing.assert_allclose(logits[: len(ids)], torch_logits(torch_model, [ids])[0], atol=LOGITS)


@pytest.mark.long
def test_export_and_import(directory, conversations, tmp_path, mesh, reference):
    """There and back: the same bytes of weights, the same text to tokens, and transformers opens it."""
    spin_jax.save(spin_jax.load(str(directory), mesh=mesh), str(tmp_path))
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype
        assert weight.tobytes() == after[name].tobytes(), name
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    prompt, answer = token_ids(tokenizer, conversations[0])
    assert (prompt, answer) == token_ids(reference[1], conversations[0])
    np.testing.assert_array_equal(torch_logits(model, [prompt]), torch_logits(reference[0], [prompt]))


@pytest.mark.long
def test_log_probs_of_sampled_answers_as_they_were_drawn(model, conversations, monkeypatch):
    """Every token of 32 sampled answers: its log-prob where the sampler drew it, and as `score_tokens` computes it."""
    drawn = {}  # {(key of the token, token): log p}

    def recording_draw(logits, keys, sampling):
        token = draw(logits, keys, sampling)
        logits = sharding.reshard(logits, "batch", None)
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]

        def record(keys, tokens, logps):
            drawn.update({(*map(int, key), int(t)): float(p) for key, t, p in zip(keys, tokens, logps, strict=True)})

        jax.debug.callback(record, jax.random.key_data(keys), token, logps)
        return token

    monkeypatch.setattr(slots, "draw", recording_draw)
    jax.clear_caches()  # the sampler may have been compiled with the real function
    chat = Chat(model.tokenizer, model.stop_tokens)
    prompts = [chat.encode_prompt(messages[:-1]) for messages in conversations]
    answers = answers_of(model, prompts, Sampling(48))
    jax.effects_barrier()
    jax.clear_caches()
    for prompt, answer, key in zip(prompts, answers, prompt_keys(0, 0, range(len(prompts))), strict=True):
        tokens = np.concatenate([prompt, answer])[None]
        logits = np.asarray(spin_jax.logits(model, np.pad(tokens, [(0, 0), (0, 256 - tokens.shape[1])])))[0]
        logps = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(prompt) - 1, tokens.shape[1] - 1), answer]
        for number, (token, logp) in enumerate(zip(answer, logps, strict=True)):
            token_key = jax.random.key_data(jax.random.fold_in(key, number))
            assert abs(drawn[(*map(int, token_key), int(token))] - logp) < AS_DRAWN


@pytest.mark.long
def test_packed_pairs_are_unpadded_rows(model, conversations):
    """Pairs that share a row and a prompt score as each answer does alone."""
    chat = Chat(model.tokenizer, model.stop_tokens)
    examples = [chat.encode_checked(messages, number) for number, messages in enumerate(conversations[:12])]
    answers = [answer for _, answer in examples]
    groups = [
        Group(prompt, (answer, other))
        for (prompt, answer), other in zip(examples, answers[1:] + answers[:1], strict=True)
    ]
    decoder = Decoder(model.config, model.dtype)
    shape = RowShape(rows=1, length=1024, groups=4)
    scores = score_groups(decoder, model.params, groups, shape, model.mesh)
    for group, row in zip(groups, scores, strict=True):
        for answer, score in zip(group.answers, row, strict=True):
            alone = Group(group.prompt, (answer,))
            length = len(group.prompt) + len(answer)
            (own,) = score_groups(decoder, model.params, [alone], RowShape(1, length, 1), model.mesh)
            assert abs(score - own[0]) < PER_TOKEN * len(answer)


@pytest.mark.long
def test_adapters(model, conversations, tmp_path, reference):
    """LoRA on real weights: logits with adapters are those of the merged model, by us and by transformers."""
    adapters = lora.init(
        lora.adapters_on(params_on(model.mesh, model.config), 4, tuple(lora.TARGETS)), jax.random.key(1)
    )
    adapters = jax.tree.map(lambda w: w + 0.01, adapters)  # as if trained: B is no longer zero
    ids, _ = token_ids(reference[1], conversations[0])
    decoder = Decoder(model.config, model.dtype)
    tokens = np.array([ids], np.int32)
    layout = Layout(np.arange(len(ids), dtype=np.int32)[None], np.ones_like(tokens))
    with jax.set_mesh(model.mesh):
        weights = jax.tree.map(jnp.copy, model.params)  # `merged` takes over the memory of what it gets
        params = lora.joined(weights, adapters, 0.5)
        hidden, _ = forward(decoder, params, tokens, layout)
        joined = np.asarray(project(hidden, output_head(decoder, params)))[0]
        merged = dataclasses.replace(model, params=lora.merged(weights, adapters, 0.5))
    assert np.abs(joined - spin_jax.logits(model, tokens)[0]).max() > 0.1
    np.testing.assert_allclose(np.asarray(spin_jax.logits(merged, tokens))[0], joined, atol=LOGITS)
    spin_jax.save(merged, str(tmp_path))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    np.testing.assert_allclose(torch_logits(theirs, [ids])[0], joined, atol=LOGITS)


@pytest.mark.long
def test_answers_of_eight_devices(directory, model, conversations):
    """Sampled answers of one device and of eight, each with a copy of the weights as in a run, are equal.

    A product of one row adds up in another order than one of eight rows. So a token may differ where the random number
    hits, within 1e-5, the edge between two tokens: most of 49,152 tokens have less than 1e-7, so edges are close there.
    """
    chat = Chat(model.tokenizer, model.stop_tokens)
    prompts = [chat.encode_prompt(messages[:-1]) for messages in conversations[:8]]
    split = spin_jax.load(str(directory), dtype="float32", mesh=sharding.make_mesh(8, 1, 1))
    answers = (answers_of(each, prompts, Sampling(24)) for each in (model, split))
    differing = 0
    for prompt, key, one, eight in zip(prompts, prompt_keys(0, 0, range(8)), *answers, strict=True):
        if one == eight:
            continue
        differing += 1
        number = next(i for i, (a, b) in enumerate(zip(one, eight, strict=False)) if a != b)
        logits = spin_jax.logits(model, np.concatenate([prompt, one[:number]])[None])[0, -1]
        edges = np.cumsum(np.exp(np.float64(logits) - np.logaddexp.reduce(np.float64(logits))))
        point = float(jax.random.uniform(jax.random.fold_in(key, number)))
        low, high = sorted((one[number], eight[number]))
        np.testing.assert_allclose(edges[low:high], point, atol=1e-5)
    assert differing <= 2


@pytest.mark.long
def test_the_recipe_in_miniature(directory, tmp_path):
    """configs/smollm2_gsm8k.py:smoke runs, and a second start finds it done."""
    rows = SHARED / "gsm8k" / "train.jsonl"
    if not rows.exists():
        pytest.skip("the shared GSM8K rows are not here")
    data = tmp_path / "train.jsonl"
    shutil.copy(rows, data)
    arguments = [f"--config.model.path={directory}", f"--config.data.path={data}"]
    command = Command()
    command(tmp_path / "run", *arguments, config="configs/smollm2_gsm8k.py:smoke")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["iteration"] for row in summary] == [-1, 0]
    assert summary[1]["margin"] > 0
