"""Rows of pairs and of preferences become pairs."""

import re
from collections import Counter

import numpy as np
import pytest
from dataset_rows import turn, write_jsonl

from spin_jax import tiny
from spin_jax.data import parquet, sources
from spin_jax.data.chat import Chat
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Lengths


def test_published_pairs(chat, tmp_path):
    """Rows of the published SPIN format: both answers tokenized with their prompt, prompt_id the row."""
    conversation = [turn("user", "1+2"), turn("assistant", "3")]
    other = [turn("user", "1+2"), turn("assistant", "44")]
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"real": conversation, "generated": other}] * 2)
    pairs, counts = load_pairs(sources.load_rows(path), chat, path=path, vocab_size=272)
    assert [p.prompt_id for p in pairs] == [0, 1]
    assert not counts
    assert chat.decode(pairs[0].real) == "3"
    assert chat.decode(pairs[0].generated) == "44"
    np.testing.assert_array_equal(pairs[0].prompt, chat.encode_prompt(conversation[:1]))
    with pytest.raises(ValueError, match=r"row 1: no fields real and generated"):
        load_pairs([{"messages": []}], chat, path=path, vocab_size=272)


def test_given_pairs_are_checked(chat):
    def row(answer, **more):
        question = turn("user", "1+2")
        return {
            "real": [question, turn("assistant", "3")],
            "generated": [question, turn("assistant", answer)],
            **more,
        }

    pairs, _ = load_pairs([row("4", prompt_id=7), row("5", prompt_id=7)], chat, path="x", vocab_size=272)
    assert [(p.prompt_id, p.sample_id) for p in pairs] == [(7, 0), (7, 1)]
    with pytest.raises(ValueError, match="row 2: prompt_id 7, sample_id 0 came before"):
        load_pairs([row("4", prompt_id=7, sample_id=0)] * 2, chat, path="x", vocab_size=272)
    other = row("4") | {"generated": [turn("user", "ZZZ"), turn("assistant", "4")]}
    with pytest.raises(ValueError, match="do not answer the same prompt"):
        load_pairs([other], chat, path="x", vocab_size=272)
    foreign = row("4", prompt_tokens=[5], real_tokens=[99999], generated_tokens=[6])
    with pytest.raises(ValueError, match="beyond the model's vocabulary of 272: another tokenizer"):
        load_pairs([foreign], chat, path="x", vocab_size=272)
    for prompt, message in (
        ([], "prompt_tokens is empty"),
        ([5, -1], "prompt_tokens: a token id is negative"),
    ):
        bad = row("4", prompt_tokens=prompt, real_tokens=[7], generated_tokens=[6])
        with pytest.raises(ValueError, match=f"row 1: {message}"):
            load_pairs([bad], chat, path="x", vocab_size=272)


def test_own_pairs_keep_their_ids(chat, tmp_path):
    """A token column is the truth, even where its text would tokenize otherwise."""
    example = chat.example(9, [turn("user", "1+2"), turn("assistant", "3")], Counter())
    pair = chat.pair(example, 0, np.array([40, 41, 2], np.int32))
    (tmp_path / "x.parquet").write_bytes(parquet.pairs_to_parquet([pair]))
    (loaded,), _ = load_pairs(sources.load_rows(str(tmp_path)), chat, path="x", vocab_size=272)
    np.testing.assert_array_equal(loaded.generated, pair.generated)
    assert loaded.prompt_id == 9
    chat_short = Chat(chat.tokenizer, chat.stop_tokens, lengths=Lengths(10, len(example.prompt) + 2))
    (cut,), _ = load_pairs(sources.load_rows(str(tmp_path)), chat_short, path="x", vocab_size=272)
    assert len(cut.generated) == 2
    assert cut.truncated


# --- preferences -----------------------------------------------------------------------------------

SYSTEM = turn("system", "Be brief")
ASK, MORE = turn("user", "1+2"), turn("user", "and 3+4?")
THREE, SEVEN, EIGHT = turn("assistant", "3"), turn("assistant", "7"), turn("assistant", "8")


def conversations(row):
    """The two whole conversations of a preference row, as (role, content)."""
    chat = Chat(tiny.tokenizer(), [tiny.tokenizer().eos_token_id])
    (pair,), counts = load_pairs([row], chat, path="x", vocab_size=272)
    assert not counts
    return pair.real_messages, pair.generated_messages


@pytest.mark.parametrize(
    ("row", "before"),
    [
        pytest.param({"prompt": "1+2", "chosen": "7", "rejected": "8"}, [ASK], id="standard, explicit"),
        pytest.param({"prompt": [ASK], "chosen": [SEVEN], "rejected": [EIGHT]}, [ASK], id="explicit"),
        pytest.param({"prompt": [ASK], "chosen": "7", "rejected": "8"}, [ASK], id="explicit, text after turns"),
        pytest.param({"chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]}, [ASK], id="implicit"),
        pytest.param(
            {"prompt": [ASK], "chosen": [THREE, MORE, SEVEN], "rejected": [THREE, MORE, EIGHT]},
            [ASK, THREE, MORE],
            id="explicit, several turns",
        ),
        pytest.param(
            {"prompt": "1+2", "chosen": [THREE, MORE, SEVEN], "rejected": [THREE, MORE, EIGHT]},
            [ASK, THREE, MORE],
            id="a text, then several turns",
        ),
        pytest.param(
            {"prompt": [SYSTEM, ASK, THREE, MORE], "chosen": [SEVEN], "rejected": [EIGHT]},
            [SYSTEM, ASK, THREE, MORE],
            id="a prompt of several turns",
        ),
        pytest.param(
            {"prompt": "1+2 ", "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]},
            [ASK],
            id="whole, with its prompt beside it",
        ),
        pytest.param(
            {"prompt": [ASK], "chosen": [ASK, THREE, MORE, SEVEN], "rejected": [ASK, THREE, MORE, EIGHT]},
            [ASK, THREE, MORE],
            id="whole, with its first turn beside it",
        ),
        pytest.param(
            {"prompt": MORE["content"], "chosen": [ASK, THREE, MORE, SEVEN], "rejected": [EIGHT]}
            | {"rejected": [ASK, THREE, MORE, EIGHT]},
            [ASK, THREE, MORE],
            id="whole, with its last question beside it",
        ),
        pytest.param(
            {"prompt": "1+2", "chosen": [SYSTEM, ASK, SEVEN], "rejected": [SYSTEM, ASK, EIGHT]},
            [SYSTEM, ASK],
            id="whole, with a system message",
        ),
        pytest.param(
            {"prompt": [SYSTEM, ASK], "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]},
            [SYSTEM, ASK],
            id="the system message only in prompt",
        ),
        pytest.param(
            {"prompt": [SYSTEM], "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]},
            [SYSTEM, ASK],
            id="prompt is a system message",
        ),
        pytest.param(
            {"prompt": [ASK, THREE], "chosen": [MORE, SEVEN], "rejected": [MORE, EIGHT]},
            [ASK, THREE, MORE],
            id="prompt ends with an answer",
        ),
        pytest.param({"prompt": "", "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]}, [ASK], id="blank"),
        pytest.param({"prompt": [ASK], "chosen": [SEVEN], "rejected": [ASK, EIGHT]}, [ASK], id="mixed"),
    ],
)
def test_preferences_keep_their_prompt(row, before):
    assert conversations(row) == ([*before, SEVEN], [*before, EIGHT])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "7", "rejected": "8"}, "chosen is text, and there is no field prompt"),
        ({"prompt": 3, "chosen": "7", "rejected": "8"}, "prompt is int: expected text or a list of messages"),
        (
            {"prompt": "2+5", "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]},
            "chosen begins with another user turn than prompt ('1+2')",
        ),
        (
            {"prompt": [ASK], "chosen": [SEVEN], "rejected": [MORE, EIGHT]},
            "rejected begins with another user turn than prompt ('and 3+4?')",
        ),
        (
            {"prompt": [SYSTEM, ASK], "chosen": [turn("system", "Be long"), ASK, SEVEN], "rejected": "8"},
            "chosen begins with another system turn than prompt ('Be long')",
        ),
        (
            {"prompt": [ASK], "chosen": 7, "rejected": "8"},
            "chosen: expected a list of messages, and found int",
        ),
        (
            {"prompt": [ASK], "chosen": [], "rejected": "8"},
            "chosen: expected a list of messages, and found an",
        ),
        ({"prompt": ["1+2"], "chosen": "7", "rejected": "8"}, "prompt + chosen[0] is str"),
        ({"chosen": [ASK, {"role": "bot"}], "rejected": "8"}, "chosen[1].role is 'bot'"),
        ({"prompt": [ASK, THREE], "chosen": "7", "rejected": "8"}, "prompt + chosen: two assistant turns"),
    ],
)
def test_preferences_that_contradict_themselves(row, message):
    with pytest.raises(ValueError, match="row 1: " + re.escape(message)):
        conversations(row)
