"""Text to tokens: what the Contracts of a conversation promise."""

import json
import pathlib
from collections import Counter

import numpy as np
import pytest

from spin_jax import tiny
from spin_jax.chat import BadRow, Chat, Lengths

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
USER, ANSWER = {"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}


@pytest.fixture(scope="module")
def mistral():
    if not SHARED.exists():
        pytest.skip("the real Mistral tokenizer is not here")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "mistral_tokenizer")


@pytest.fixture
def chat():
    tokenizer = tiny.tokenizer()
    return Chat(tokenizer, [tokenizer.eos_token_id])


def pieces(chat, ids):
    return chat.tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def test_cut_at_the_response(chat):
    prompt, response, straddled = chat.encode([USER, ANSWER])
    assert pieces(chat, prompt) == ["<|user|>", "1", "+", "2", "</s>", "<|assistant|>"]
    assert pieces(chat, response) == ["3", "</s>"]
    assert not straddled
    np.testing.assert_array_equal(prompt, chat.encode_prompt([USER]))


def test_real_conversations_tokenize_as_transformers_does(mistral):
    """Whole conversations of GSM8K: prompt + response is a prefix of transformers' own ids."""
    chat = Chat(mistral, [2])
    for line in (SHARED / "gsm8k/train.jsonl").read_text().splitlines()[:50]:
        row = json.loads(line)
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        prompt, response, _ = chat.encode(messages)
        ids = np.concatenate([prompt, response])
        whole = mistral(mistral.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
        np.testing.assert_array_equal(ids, whole["input_ids"][: len(ids)])
        assert response[-1] == 2
        assert 2 not in response[:-1]
        assert whole["input_ids"][len(ids) :] == [13]  # the template's newline is no part of the answer
        assert chat.decode(response) == row["answer"]


@pytest.mark.parametrize("text", ["</s>", "a </s> b", "<s></s><unk>", "</s></s>", "<</s>/s>"])
def test_control_tokens_typed_by_a_user_stay_text(mistral, text):
    """The ids are those of the same text without control tokens, and decode to what was typed."""
    chat = Chat(mistral, [2])
    asked, answered = f"say {text} now", f"no {text}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    prompt, response, _ = chat.encode(messages)
    assert list(prompt).count(2) == 1  # the template's own
    assert list(response).count(2) == 1
    assert response[-1] == 2
    assert not {0, 1} & {*map(int, prompt), *map(int, response)}
    assert asked in mistral.decode(prompt, skip_special_tokens=True)
    assert mistral.decode(response, skip_special_tokens=True) == answered


def test_guarded_tokenization_is_the_plain_one(mistral):
    """Where no message holds a control token, the twin tokenizer gives the same ids."""
    chat = Chat(mistral, [2])
    for text in ("Hello there", " leading", "日本語 é 🙂", "line\n\nline"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        plain = chat._tokenize(messages, prompt=False, guard=False)
        guarded = chat._tokenize(messages, prompt=False, guard=True)
        np.testing.assert_array_equal(plain.ids, guarded.ids)


def test_system_message_only_when_configured(mistral):
    assert "system" not in mistral.decode(Chat(mistral, [2]).encode_prompt([USER]))
    empty = Chat(mistral, [2], system_message="")
    assert mistral.decode(empty.encode_prompt([USER])).startswith("<|system|>\n</s>")
    own = [{"role": "system", "content": "Be brief."}, USER]
    assert mistral.decode(empty.encode_prompt(own)).count("<|system|>") == 1


def test_multi_turn(chat):
    """The last assistant turn is the response; earlier ones are prompt."""
    prompt, response, _ = chat.encode([{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER])
    assert pieces(chat, prompt).count("<|assistant|>") == 2
    assert pieces(chat, response) == ["3", "</s>"]


def test_straddling_token_belongs_to_the_response():
    """A merge across the boundary: the prompt ends before it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(["</s>", "q", ":", "a", ":a"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'user' %}:{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = Chat(tokenizer, [0])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    prompt, response, straddled = chat.encode(messages)
    assert pieces(chat, prompt) == ["q"]
    assert pieces(chat, response) == [":a", "</s>"]
    assert straddled
    counts = Counter()
    chat.example(0, messages, counts)
    assert counts["tokens across the boundary"] == 1
    _, _, straddled = chat.encode([messages[0], {"role": "assistant", "content": "q"}])
    assert not straddled


def test_template_that_changes_the_prompt_is_refused(chat):
    chat.tokenizer.chat_template = "{{ messages | length }}" + chat.tokenizer.chat_template
    with pytest.raises(BadRow, match="does not begin"):
        chat.encode([USER, ANSWER])


def test_template_that_refuses_a_row(chat):
    chat.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRow, match="refuses the conversation: roles must alternate"):
        chat.encode([USER, ANSWER])


def test_no_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"config\.data\.chat_template"):
        Chat(tokenizer, [2])


def test_lengths(chat):
    """Long prompts are dropped, long answers cut without an EOS of our own; both are counted."""
    chat.lengths = Lengths(max_prompt=6, max_length=8)
    counts = Counter()
    example = chat.example(7, [USER, {"role": "assistant", "content": "12345"}], counts)
    assert pieces(chat, example.real) == ["1", "2"]
    assert chat.example(8, [{"role": "user", "content": "1+2+3"}, ANSWER], counts) is None
    assert chat.example(9, [USER, {"role": "assistant", "content": " "}], counts) is None
    assert +counts == {
        "cut: answer too long": 1,
        "dropped: prompt too long": 1,
        "dropped: empty answer": 1,
    }


def test_pair_keeps_the_samplers_ids(chat):
    example = chat.example(3, [USER, ANSWER], Counter())
    sampled = np.array([*chat.encode([USER, {"role": "assistant", "content": "44"}]).response], np.int32)
    pair = chat.pair(example, 0, sampled)
    np.testing.assert_array_equal(pair.generated, sampled)
    assert pair.generated_messages == [USER, {"role": "assistant", "content": "44"}]
    assert not pair.truncated
    assert not pair.identical
    assert chat.pair(example, 0, sampled[:-1]).truncated
    assert chat.pair(example, 0, example.real).identical
