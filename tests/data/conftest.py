"""Fixtures of the tests of data."""

import pytest

from spin_jax import tiny
from spin_jax.data.chat import Chat


@pytest.fixture(scope="module")
def chat():
    tokenizer = tiny.tokenizer()
    return Chat(tokenizer, [tokenizer.eos_token_id])
