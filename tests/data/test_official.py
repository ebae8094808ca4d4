"""`official`: each quirk of the released code, beside what the default does."""

from collections import Counter

import numpy as np
import pytest
from runs import SHARED

from spin_jax.data.chat import Chat
from spin_jax.data.official import OfficialChat
from spin_jax.data.records import Lengths
from spin_jax.training.packing import RowShape, packed, pair_group

TOKENIZER = SHARED / "mistral_tokenizer"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello there"}
EOS = 2


@pytest.fixture(scope="module")
def tokenizer():
    if not TOKENIZER.exists():
        pytest.skip("the real Mistral tokenizer is not here")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture
def official(tokenizer):
    return OfficialChat(tokenizer, [EOS])


def example(chat, messages=(USER, ANSWER)):
    return chat.example(0, list(messages), Counter())


def test_another_template_for_sampling(official, tokenizer):
    """Sampling asks "### Instruction: …"; training renders the chat template."""
    asked = official.sampling_prompt(example(official))
    assert tokenizer.decode(asked, skip_special_tokens=True) == "### Instruction: Hi\n\n### Response: "
    trained = tokenizer.decode(example(official).prompt)
    assert trained == "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    default = Chat(tokenizer, [EOS])
    np.testing.assert_array_equal(default.sampling_prompt(example(default)), example(default).prompt)


def test_tokenized_apart(official, tokenizer):
    """The first response token is "▁Hello" where the sampler would emit "Hello"."""
    first = [tokenizer.convert_ids_to_tokens(int(example(c).real[0])) for c in (official, Chat(tokenizer, [EOS]))]
    assert first == ["▁Hello", "Hello"]


def test_second_eos(official, tokenizer):
    """The template's own EOS, its newline, and one EOS more."""
    pieces = tokenizer.convert_ids_to_tokens(example(official).real.tolist())
    assert pieces[-3:] == ["</s>", "<0x0A>", "</s>"]
    assert list(example(Chat(tokenizer, [EOS])).real).count(EOS) == 1


def test_eos_is_not_attended_to(official):
    """Nor is the last one, which none comes after: only inside of a sequence it makes a difference."""
    pair = official.pair(example(official), 0, np.array([22557, EOS], np.int32))
    (rows,) = packed([pair_group(pair)], RowShape(1, 64, 1), official.unattended)
    tokens, layout = rows.tokens[0], rows.layout
    length = len(pair.prompt) + len(pair.real) + len(pair.generated)
    assert (tokens == EOS).sum() == 6  # system, user, and two after each answer
    np.testing.assert_array_equal(layout.segments[0] < 0, tokens == EOS)
    np.testing.assert_array_equal(np.abs(layout.segments[0]), np.arange(64) < length)
    assert Chat(official.tokenizer, [EOS]).unattended is None


def test_truncated_answer_gets_eos(official, tokenizer):
    """An answer that was cut at the token limit is trained on as if it were finished."""
    cut = np.array([22557, 736], np.int32)
    pair = official.pair(example(official), 0, cut)
    assert pair.truncated
    assert pair.generated[-1] == EOS
    default = Chat(tokenizer, [EOS])
    np.testing.assert_array_equal(default.pair(example(default), 0, cut).generated, cut)


def test_over_long_pairs(tokenizer):
    """The prompt loses its front, then both responses are cut, though the prompt be short."""
    lengths = Lengths(max_prompt=8, max_length=24)
    official = OfficialChat(tokenizer, [EOS], lengths=lengths)
    long = {"role": "assistant", "content": "word " * 40}
    whole = OfficialChat(tokenizer, [EOS]).example(0, [USER, ANSWER], Counter())
    pair = official.given_pair(0, 0, [USER, ANSWER], [USER, long], Counter())
    np.testing.assert_array_equal(pair.prompt, whole.prompt[-8:])
    assert len(pair.generated) == 16
    short = official.given_pair(0, 0, [USER, ANSWER], [USER, ANSWER], Counter())
    assert len(short.prompt) == 8 or len(short.prompt) + len(short.real) <= 24
    default = Chat(tokenizer, [EOS], lengths=lengths)
    assert default.given_pair(0, 0, [USER, ANSWER], [USER, long], Counter()) is None  # prompt of 15 > 8
    roomy = Chat(tokenizer, [EOS], lengths=Lengths(max_prompt=16, max_length=24))
    kept = roomy.given_pair(0, 0, [USER, ANSWER], [USER, long], Counter())
    assert tokenizer.decode(kept.prompt).startswith("<|user|>")
    assert len(kept.prompt) + len(kept.generated) == 24  # cut only what does not fit


def test_first_two_messages(official, tokenizer):
    """A leading system message becomes the prompt, and the user's turn the answer."""
    system = {"role": "system", "content": "Be brief"}
    messages = example(official, [system, USER, ANSWER]).messages
    assert [m["content"] for m in messages] == ["Be brief", "Hi"]
    turns = [USER, ANSWER, {"role": "user", "content": "More"}, {"role": "assistant", "content": "Done"}]
    assert example(official, turns).messages == [USER, ANSWER]
    default = Chat(tokenizer, [EOS])
    assert default.decode(example(default, turns).real) == "Done"
    assert default.decode(example(default, [system, USER, ANSWER]).real) == "Hello there"


def test_what_is_not_reproduced():
    """Duplicate rows on a second run and an unpinned model are accidents; the docstring says so."""
    from spin_jax.data import official

    assert "are not reproduced" in official.__doc__
