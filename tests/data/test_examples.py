"""Rows become conversations, and these become examples."""

from collections import Counter

import numpy as np
import pytest
from dataset_rows import turn, write_jsonl
from runs import SHARED

from spin_jax import tiny
from spin_jax.data import examples as examples_lib
from spin_jax.data import sources
from spin_jax.data.examples import load_examples, split_held_out
from spin_jax.data.records import Example
from spin_jax.errors import BadRow

ROWS = [
    ({"question": "q", "answer": "a"}, ["q", "a"]),
    ({"instruction": "q", "output": "a"}, ["q", "a"]),
    ({"instruction": "q", "input": "x", "output": "a"}, ["q\n\nx", "a"]),
    ({"messages": [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]}, ["s", "q", "a"]),
    ({"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "more")]}, ["q", "a"]),
    ({"real": [turn("user", "q"), turn("assistant", "a")], "generated": []}, ["q", "a"]),
    ({"prompt": "ignored", "messages": [turn("user", "q"), turn("assistant", "a")]}, ["q", "a"]),
]


@pytest.mark.parametrize(("row", "contents"), ROWS)
def test_conversations(row, contents):
    assert [m["content"] for m in examples_lib.conversation(row, None, None)] == contents


def test_named_columns():
    row = {"title": "q", "body": "a", "messages": []}
    assert [m["content"] for m in examples_lib.conversation(row, "title", "body")] == ["q", "a"]
    with pytest.raises(BadRow, match="no field title and text"):
        examples_lib.conversation(row, "title", "text")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "prompt_column"),
        ({"messages": []}, "messages: expected a list"),
        ({"messages": [turn("user", "q")]}, "no assistant turn"),
        ({"messages": [turn("tool", "q"), turn("assistant", "a")]}, r"messages\[0\].role is 'tool'"),
        ({"messages": [turn("user", 3), turn("assistant", "a")]}, r"messages\[0\].content is int"),
        ({"messages": [turn("user", "q")] + [turn("assistant", "a")] * 2}, "two assistant turns"),
        ({"question": None, "answer": "a"}, "question is NoneType"),
    ],
)
def test_bad_rows_name_the_field(row, message):
    with pytest.raises(BadRow, match=message):
        examples_lib.conversation(row, None, None)


def test_examples_name_path_and_row(chat, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}])
    rows = [{"question": "q", "answer": "a"}, {"question": None, "answer": "a"}]
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: question is NoneType: expected text"):
        load_examples(rows, chat, path=path)


def test_limit_and_order_follow_the_seed(chat):
    rows = tiny.problems(50)

    def ids(**options):
        return [e.prompt_id for e in load_examples(rows, chat, path="x", limit=20, **options)[0]]

    assert ids(seed=0) == ids(seed=0) == sorted(ids(seed=0))
    assert ids(seed=0) != ids(seed=1)
    assert len(set(ids(seed=0))) == 20


def test_held_out():
    ids = list(range(100, 300))
    chosen = split_held_out(ids, fraction=0.1, limit=500, seed=0)
    assert len(chosen) == 20
    assert chosen < set(ids)
    assert chosen != split_held_out(ids, fraction=0.1, limit=500, seed=1)
    assert len(split_held_out(list(range(100_000)), fraction=0.1, limit=500, seed=0)) == 500


def test_gsm8k(chat):
    if not SHARED.exists():
        pytest.skip("GSM8K is not here")
    rows = sources.load_rows(str(SHARED / "gsm8k" / "test.jsonl"))
    examples, counts = load_examples(rows, chat, path="gsm8k", limit=100)
    assert len(examples) == 100
    assert not counts
    assert all(e.real[-1] == chat.stop_tokens[0] for e in examples)


def test_example_type(chat):
    example = chat.example(1, [turn("user", "1"), turn("assistant", "2")], Counter())
    assert isinstance(example, Example)
    assert example.prompt.dtype == example.real.dtype == np.int32
