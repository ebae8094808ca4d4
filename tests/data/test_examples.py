"""Datasets in, conversations and pairs out."""

import json
from collections import Counter

import numpy as np
import pytest
from runs import SHARED

from spin_jax import tiny
from spin_jax.data import examples as examples_lib
from spin_jax.data import parquet, sources
from spin_jax.data.chat import Chat
from spin_jax.data.examples import load_examples, split_held_out
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Example, Lengths, Pair
from spin_jax.errors import BadRow


@pytest.fixture(scope="module")
def chat():
    tokenizer = tiny.tokenizer()
    return Chat(tokenizer, [tokenizer.eos_token_id])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role, content):
    return {"role": role, "content": content}


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


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "directory", "save_to_disk", "dict"])
def test_formats(tmp_path, kind):
    """Every format gives the same rows."""
    from datasets import Dataset, DatasetDict

    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    dataset = Dataset.from_list(rows)
    path = str(tmp_path / f"rows.{kind}")
    if kind == "jsonl":
        write_jsonl(tmp_path / "rows.jsonl", rows)
    elif kind == "json":
        (tmp_path / "rows.json").write_text(json.dumps(rows))
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "directory":
        path = str(tmp_path)
        write_jsonl(tmp_path / "a.jsonl", rows[:3])
        write_jsonl(tmp_path / "b.jsonl", rows[3:])
    elif kind == "save_to_disk":
        dataset.save_to_disk(path)
    else:
        DatasetDict(train=dataset, test=dataset).save_to_disk(path)
    loaded = sources.load_rows(path)
    assert [loaded[i] for i in range(len(loaded))] == rows
    if kind == "jsonl":
        assert len(sources.load_rows(path, "train[:2]")) == 2


def test_splits(tmp_path):
    """A split is a slice of saved datasets too, and never another split's files."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"question": f"q{i}", "answer": "a"} for i in range(20)])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(tmp_path / "two")
    assert len(sources.load_rows(str(tmp_path / "one"), "train[:5]")) == 5
    assert sources.load_rows(str(tmp_path / "two"), "train[10:12]")["question"] == ["q10", "q11"]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        sources.load_rows(str(tmp_path / "two"), "dev")
    folder = tmp_path / "files"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", list(rows))
    write_jsonl(folder / "test.jsonl", list(rows)[:3])
    assert len(sources.load_rows(str(folder))) == 20
    assert len(sources.load_rows(str(folder), "test")) == 3
    assert len(sources.load_rows(str(folder), all_files=True)) == 23
    with pytest.raises(ValueError, match="no file of a split 'dev'"):
        sources.load_rows(str(folder), "dev")
    assert len(sources.load_rows("spin_jax.tiny:problems", "train[:7]")) == 7


def test_broken_files_name_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": "q", "ans')
    rows = sources.load_rows(str(path))
    assert len(rows) == 2
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: Unterminated string .*: column"):
        list(rows)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty: 0 rows"):
        sources.load_rows(str(tmp_path / "empty.jsonl"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        sources.load_rows(str(tmp_path / "absent.jsonl"))


def test_examples_name_path_and_row(chat, tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}]
    )
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


def make_pair(prompt_id, prompt, real, generated):
    ids = [np.array(x, np.int32) for x in (prompt, real, generated)]
    real_messages = [turn("user", "q"), turn("assistant", "a")]
    return Pair(prompt_id, 0, real_messages, real_messages, *ids, truncated=False)


def test_pairs_round_trip():
    pairs = [make_pair(5, [1, 2], [3], [4, 5, 2]), make_pair(2**40, [1], [], [7])]
    back = parquet.pairs_from_parquet(parquet.pairs_to_parquet(pairs))
    for a, b in zip(pairs, back, strict=True):
        assert (a.prompt_id, a.real_messages, a.truncated) == (b.prompt_id, b.real_messages, b.truncated)
        for field in ("prompt", "real", "generated"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    scores = parquet.scores_from_parquet(parquet.scores_to_parquet(3, pairs, np.array([[-1, -2], [-3, -4]])))
    assert scores == {(3, 5, 0): (-1.0, -2.0), (3, 2**40, 0): (-3.0, -4.0)}


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


def test_example_type(chat):
    example = chat.example(1, [turn("user", "1"), turn("assistant", "2")], Counter())
    assert isinstance(example, Example)
    assert example.prompt.dtype == example.real.dtype == np.int32


def test_a_revision_tells_that_a_dataset_is_the_hubs(tmp_path, monkeypatch):
    """When the hub is out of reach as well, as it is in the tests: a report needs to know it later."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "sums").mkdir(parents=True)
    assert sources.pinned("org/sums", None) == "main"
    assert sources.pinned("org/sums", "v1") == "v1"
    assert sources.pinned("local/sums", "v1") is None
    assert sources.pinned("spin_jax.tiny:problems", None) is None
