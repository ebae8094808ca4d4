"""Rows become conversations, and these become examples."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from dataset_rows import turn, write_jsonl
from runs import SHARED

from spin_jax import config_values, tiny
from spin_jax.data import examples as examples_lib
from spin_jax.data import sources
from spin_jax.data.examples import group_by_prompt, mixed_rows, split_held_out
from spin_jax.data.loading import load_examples
from spin_jax.data.records import Example
from spin_jax.data.store import Examples
from spin_jax.errors import BadRow


def said(speaker, text):
    """A turn in ShareGPT's form."""
    return {"from": speaker, "value": text}


ROWS = [
    ({"question": "q", "answer": "a"}, ["q", "a"]),
    ({"system_prompt": "s", "question": "q", "response": "a"}, ["s", "q", "a"]),
    ({"system_prompt": "", "question": "q", "response": "a"}, ["q", "a"]),
    ({"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["1", "2"]]}, list("s12qa")),
    ({"conversations": [said("human", "q"), said("gpt", "a")], "system": "s"}, ["s", "q", "a"]),
    ({"conversations": [turn("system", "s"), turn("user", "q"), turn("assistant", "a")], "system": "t"}, list("sqa")),
    ({"prompt": "q", "completion": "a", "label": True, "system": "a name"}, ["q", "a"]),
    ({"instruction": "q", "output": "a"}, ["q", "a"]),
    ({"instruction": "q", "input": "x", "output": "a"}, ["q\n\nx", "a"]),
    ({"messages": [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]}, ["s", "q", "a"]),
    ({"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "more")]}, ["q", "a"]),
    ({"real": [turn("user", "q"), turn("assistant", "a")], "generated": []}, ["q", "a"]),
    ({"prompt": "ignored", "messages": [turn("user", "q"), turn("assistant", "a")]}, ["q", "a"]),
    ({"instruction": "q", "input": "", "output": "a"}, ["q", "a"]),
    ({"instruction": "q", "input": "x", "context": "", "response": "a"}, ["q\n\nx", "a"]),
    ({"instruction": "q", "context": "x", "response": "a", "category": "c"}, ["q\n\nx", "a"]),
    ({"conversations": [said("human", "q"), said("gpt", "a")]}, ["q", "a"]),
    (
        {"conversation": [said("system", "s"), said("user", "q"), said("assistant", "a"), said("human", "x")]},
        list("sqa"),
    ),
    ({"messages": [said("human", "q"), said("chatgpt", None)]}, ["q", ""]),
    ({"dialog": [turn("user", "q"), turn("assistant", "a")]}, ["q", "a"]),
    ({"conversation": "some text", "prompt": "q", "response": "a"}, ["q", "a"]),
    ({"prompt": [turn("system", "s"), turn("user", "q")], "completion": [turn("assistant", "a")]}, ["s", "q", "a"]),
    ({"prompt": [turn("user", "q")], "completion": "a"}, ["q", "a"]),
    ({"prompt": "q", "completion": [turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]}, list("qarb")),
    # Arrow's tables have every field in every turn.
    ({"conversations": [{**turn(None, None), **said("human", "q")}, said("gpt", "a")]}, ["q", "a"]),
    ({"messages": [{**said(None, None), **turn("user", "q")}, turn("assistant", "a")]}, ["q", "a"]),
]


@pytest.mark.parametrize(("row", "contents"), ROWS)
def test_conversations(row, contents):
    assert [m["content"] for m in examples_lib.conversation(row, None, None)] == contents


def test_named_columns():
    row = {"title": "q", "body": "a", "messages": []}
    assert [m["content"] for m in examples_lib.conversation(row, "title", "body")] == ["q", "a"]
    row |= {"prompt": "q", "completion": "a", "label": False}
    assert [m["content"] for m in examples_lib.conversation(row, "prompt", "completion")] == ["q", "a"]
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
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, r"preferences .*: give it as config\.selfplay\.pairs"),
        ({"conversations": [said("human", "q"), said("function_call", "{}")]}, r"\[1\]\.from is 'function_call'"),
        ({"conversations": [said("human", 3), said("gpt", "a")]}, r"conversations\[0\]\.value is int"),
        ({"conversations": [said("human", None), said("gpt", "a")]}, r"conversations\[0\]\.value is NoneType"),
        (
            {"conversations": [said("human", "q"), turn("assistant", "a")]},
            r"conversations\[1\]: expected from and value",
        ),
        ({"conversations": [said("gpt", "a")]}, "conversations: no assistant turn with a prompt before it"),
        ({"conversations": "[]"}, "conversations: .*if the text is JSON, parse it first"),
        (
            {"prompt": [turn("user", "q"), turn("assistant", "a")], "completion": [turn("user", "r")]},
            "completion: no assi",
        ),
        ({"prompt": [turn("user", "q"), turn("assistant", "a")], "completion": "b"}, "two assistant turns in a row"),
        ({"instruction": [turn("user", "q")], "input": "x", "output": "a"}, "input would follow instruction"),
        ({"instruction": "q", "context": 3, "response": "a"}, "context is int: expected text"),
        ({"instruction": "q", "output": "a", "history": ["1", "2"]}, "history: expected a list of pairs"),
        ({"instruction": "q", "output": "a", "history": [["1", 2]]}, "history is int: expected text"),
        ({"instruction": "q", "output": "a", "system": ["s"]}, "system is list: expected text"),
        ({"prompt": "q", "completion": "a", "label": False}, "label is false, so the completion is a bad example"),
    ],
)
def test_bad_rows_name_the_field(row, message):
    with pytest.raises(BadRow, match=message):
        examples_lib.conversation(row, None, None)


def test_roles_of_sharegpt():
    """What a tool says is no answer, whatever its name."""
    names = ["system", "Human", "gpt", "observation", "bing", "tool", "function_response", "model"]
    turns = examples_lib._sharegpt_as_messages([{**said(name, name), "id": None} for name in names], "conversations")
    assert [turn["role"] for turn in turns] == [
        *("system", "user", "assistant", "tool", "assistant", "tool", "tool", "assistant")
    ]
    assert turns[0] == {"role": "system", "content": "system"}


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
    # Without repeated prompts they are the first ones of this order, as they always were.
    assert chosen == set(100 + np.random.default_rng([0, 1]).permutation(200)[:20])


@pytest.mark.parametrize(
    ("copies", "prompts", "limit", "expected"),
    [
        (4, 50, 500, [4] * 5),  # a tenth of 200 rows are 5 prompts
        (3, 50, 10, [3, 3, 3]),  # a fourth prompt would be more than 10 rows
        (20, 5, 500, [20]),  # no prompt is within a tenth of the rows
        (20, 5, 19, []),  # or within the limit
        (1, 9, 500, []),  # a tenth of 9 rows is none
        (50, 1, 500, []),  # nothing would be left
    ],
)
def test_held_out_prompts(copies, prompts, limit, expected):
    numbers = [number for number in range(prompts) for _ in range(copies)]
    chosen = split_held_out(numbers, fraction=0.1, limit=limit, seed=0)
    assert [numbers.count(number) for number in chosen] == expected


def test_equal_prompts_have_one_number(chat):
    """Equal turns or equal token ids, also through a third example."""
    ids = {"a": [1], "a ": [1], "b": [2], "c": [3]}

    def example(text, tokens=None):
        prompt = np.array(tokens or ids[text], np.int32)
        return Example(0, [turn("user", text), turn("assistant", "x")], prompt, prompt)

    def grouped(*examples):
        return group_by_prompt(Examples.of(examples, chat).keys).tolist()

    assert grouped(*map(example, ["a", "b", "a ", "c", "b"])) == [0, 1, 0, 3, 1]
    assert grouped(example("b"), example("c"), example("a"), example("b", [3])) == [0, 0, 2, 0]


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


@pytest.mark.parametrize(
    ("weights", "limit", "counts"),
    [
        ("0.7*a+0.3*b", None, [700, 300]),  # b, which has 300 rows, is used up
        ("0.7*a+0.3*b", 100, [70, 30]),
        ("7*a+3*b", 100, [70, 30]),
        ("0.7*a+0.3*b", 5000, [700, 300]),  # a limit is no wish
        ("0.1*a+0.9*b", None, [33, 300]),  # 333.3 rows
        ("1*a+1*b+1*c", 10, [3, 3, 4]),  # no row is lost by rounding
        ("0.1*a+0.2*b+0.7*c", None, [1, 2, 7]),  # exact, although 0.1 + 0.2 is not 0.3
        ("1000*a+300*b", None, [1000, 300]),
    ],
)
def test_rows_of_a_mixture_by_hand(weights, limit, counts):
    (shares,) = config_values.data_mixtures(weights)
    sizes = {"a": 1000, "b": 300, "c": 7}
    assert list(mixed_rows({path: sizes[path] for path in shares}, shares, limit).values()) == counts


def test_counts_of_mixtures_are_the_shares_rounded():
    """None is above the rows of its dataset, and their sum is the most that is possible."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = {name: int(n) for name, n in zip("abcd", rng.integers(1, 60, 4), strict=True)}
        shares = {
            name: Fraction(int(n), 100) for name, n in zip("abcd", rng.multinomial(96, [0.25] * 4) + 1, strict=True)
        }
        most = min(sizes[name] / share for name, share in shares.items())
        if min(shares.values()) * int(most) >= 1:
            counts = mixed_rows(sizes, shares, None)
            assert sum(counts.values()) == int(most)
            assert all(abs(count - shares[name] * int(most)) < 1 for name, count in counts.items())
            assert all(count <= sizes[name] for name, count in counts.items())


def test_a_dataset_without_a_row_in_its_mixture():
    with pytest.raises(ValueError, match=r"of the 10 rows that .*, none is of a"):
        mixed_rows({"a": 10, "b": 10}, {"a": Fraction(1, 100), "b": Fraction(99, 100)}, None)
