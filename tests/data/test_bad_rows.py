"""Bad data: each kind is an error that names file, row and field, or is dropped and counted."""

import builtins
import json
import pickle
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_rows import turn

from spin_jax import config, errors, tiny
from spin_jax.data import parquet, sources, tokenizing
from spin_jax.data.chat import Chat
from spin_jax.data.loading import load_examples
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Lengths, Pair
from spin_jax.runtime import processes

GOOD = {"question": "1+2", "answer": "3"}


@pytest.fixture(scope="module")
def chat():
    tokenizer = tiny.tokenizer()
    return Chat(tokenizer, [tokenizer.eos_token_id], lengths=Lengths(64, 128))


def said(*messages):
    return {"messages": [turn(*message) for message in messages]}


def read(chat, path, **options):
    return load_examples(sources.load_rows(str(path)), chat, path=str(path), **options)


def line(row):
    return json.dumps(row).encode() + b"\n"


QUESTION = ("user", "1+2")

# What the second row is (its line the third), and what the error says after file and row.
UNREADABLE = [
    (b'{"question": "1+2", "ans\n', "Unterminated string starting at: column 21"),
    (b'{"question": "1+2", "answer": "3"\n', "Expecting ',' delimiter"),
    (b'{"question": "\xff\xfe", "answer": "3"}\n', "'utf-8' codec can't decode byte 0xff"),
    (b'["1+2", "3"]\n', "not a JSON object but list"),
    (b"3\n", "not a JSON object but int"),
    (b"null\n", "not a JSON object but NoneType"),
    (b"\0\0\0\n", "Expecting value"),
    (b'{"question": "1+2", "answer": "3"} {}\n', "Extra data"),
    (b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b', "answer": "3"}\n', "nested more than 100"),
    (b'{"question": ' + b"[" * 200 + b"]" * 200 + b', "answer": "3"}\n', "nested more than 100"),
    (b'{"question": ' + b"9" * 5000 + b', "answer": "3"}\n', "Exceeds the limit"),
]
MALFORMED = [
    ({"question": 3, "answer": "3"}, "question is int: expected text"),
    ({"question": "1+2", "answer": 3}, "answer is int: expected text"),
    ({"question": ["1+2"], "answer": "3"}, "question is list: expected text"),
    ({"question": None, "answer": "3"}, "question is NoneType: expected text"),
    ({"question": "1+2"}, "no field real, messages, or a prompt and an answer among question"),
    ({"question": "half \ud83d", "answer": "3"}, "question has half a character ('\\ud83d' at 5)"),
    ({"question": "1+2", "answer": "\udc00"}, "answer has half a character"),
    ({"\ud800": 1}, "prompt and an answer among '\\ud800': set config.data.prompt_column"),
    ({}, "no field real"),
    ({"instruction": None, "input": "x", "output": "y"}, "instruction is NoneType"),
    ({"instruction": "x", "input": {"a": 1}, "output": "y"}, "input is dict: expected text"),
    ({"messages": []}, "messages: expected a list of messages, and found an empty list"),
    ({"messages": {}}, "messages: expected a list of messages, and found dict"),
    ({"messages": '[{"role": "user"}]'}, "found str; if the text is JSON, parse it first"),
    ({"messages": ["hello", "there"]}, "messages[0] is str: expected a role and content"),
    (said(QUESTION), "messages: no assistant turn with a prompt before it"),
    (said(("assistant", "3")), "messages: no assistant turn with a prompt before it"),
    (said(QUESTION, ("assistant", "3"), ("assistant", "4")), "messages: two assistant turns in a row"),
    (said(("human", "1+2"), ("gpt", "3")), "messages[0].role is 'human': expected system, user, assistant or tool"),
    (said((None, "1+2"), ("assistant", "3")), "messages[0].role is None"),
    (said(({"a": "b"}, "1+2"), ("assistant", "3")), "messages[0].role is {'a': 'b'}"),
    (said(("user", None), ("assistant", "3")), "messages[0].content is NoneType: expected text"),
    (said(QUESTION, ("assistant", ["3"])), "messages[1].content is list: expected text"),
    (said(QUESTION, ("assistant", "\ud800")), "messages[1].content has half a character"),
    (GOOD | {"prompt_id": -1}, "prompt_id is -1: expected 0 to 9223372036854775807"),
    (GOOD | {"prompt_id": 2**63}, "prompt_id is 9223372036854775808"),
]


@pytest.mark.parametrize(("bad", "message"), UNREADABLE, ids=[message for _, message in UNREADABLE])
def test_unreadable_rows(chat, tmp_path, bad, message):
    """Always an error: who knows what else is wrong with the file."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(GOOD) + b"\n" + bad + line(GOOD) * 20)
    for option in ("error", "drop"):
        with pytest.raises(ValueError, match=re.escape(f"{path}, row 3: ") + ".*" + re.escape(message)):
            read(chat, path, bad_rows=option)


@pytest.mark.parametrize(("bad", "message"), MALFORMED, ids=[ascii(message) for _, message in MALFORMED])
def test_malformed_rows(chat, tmp_path, bad, message):
    """An error, or dropped and counted, up to a share."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(GOOD) + b"\n" + line(bad) + line(GOOD) * 20)
    where = re.escape(f"{path}, row 3: ") + ".*" + re.escape(message)
    with pytest.raises(ValueError, match=where):
        read(chat, path)
    examples, counts = read(chat, path, bad_rows="drop")
    assert len(examples) == 21
    assert counts == {"dropped: bad row": 1}
    with pytest.raises(ValueError, match=r"1 of 22 rows are bad .* data.max_bad=0.04 .* the first is " + where):
        read(chat, path, bad_rows="drop", max_bad=0.04)


@pytest.mark.parametrize(
    "empty",
    [
        {"question": "1+2", "answer": ""},
        {"question": "1+2", "answer": None},
        {"question": "1+2", "answer": " \n\t"},
        said(QUESTION, ("assistant", "")),
        said(QUESTION, ("assistant", None)),
        {"messages": [turn(*QUESTION), {"role": "assistant"}]},
        said(QUESTION, ("assistant", "3"), QUESTION, ("assistant", " ")),
    ],
)
def test_empty_answers_are_dropped_and_counted(chat, tmp_path, empty):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((line(GOOD) * 9 + line(empty)) * 3)
    examples, counts = read(chat, path)
    assert len(examples) == 27
    assert counts == {"dropped: empty answer": 3}
    with pytest.raises(ValueError, match=re.escape(f"the first is {path}, row 10: the answer is empty")):
        read(chat, path, max_bad=0.1 - 1e-9)


def test_bad_rows_of_several_files_are_counted_in_their_own(chat, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line(GOOD) * 3)
    (tmp_path / "b.jsonl").write_bytes(line(GOOD) + b" \r\n\n" + line({"text": 1}))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'b.jsonl'}, row 4: no field")):
        read(chat, tmp_path)
    rows = sources.load_rows(str(tmp_path), "train[-2:]")
    assert [rows.place(i).rpartition("/")[2] for i in range(len(rows))] == [
        "b.jsonl, row 1",
        "b.jsonl, row 4",
    ]
    assert [dict(row) for row in rows] == [GOOD, {"text": 1}]


def test_lists_of_objects(chat, tmp_path):
    path = tmp_path / "rows.json"
    rows = [GOOD, {"question": "é\n🙂]", "answer": "[3, {"}, GOOD]
    for content in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), " [ ] "):
        for bom in ("", "\ufeff"):
            path.write_text(bom + content, encoding="utf-8")
            if "question" in content:
                assert list(sources.load_rows(str(path))) == rows
            else:
                with pytest.raises(ValueError, match=r"rows\.json is empty: 0 rows"):
                    sources.load_rows(str(path))
    for content, message in (
        ('[{"question": "1", "answer": "2"}, {"quest', "row 2: Unterminated string"),
        ('[{"question": "1", "answer": "2"}', "row 1: neither a comma nor the list's end follows it"),
        ('[{"question": "1", "answer": "2"},]', "row 2: Expecting value"),
        ('[{"question": "1", "answer": "2"}, 3]', "row 2: not a JSON object but int"),
        ('[{"question": "1", "answer": "2"}] 3', "something follows the list's end"),
        ("[" * 100_000, "row 1: maximum recursion depth"),
        ('{\n"question": "1",\n"answer": 2}', "row 1: answer is int: expected text"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"rows\.json(, |: )" + re.escape(message)):
            read(chat, path)


def test_of_two_processes_the_first_bad_row_is_named(chat, tmp_path, monkeypatch):
    """Each reads every second chunk of three rows; both come to what one process would."""
    path = tmp_path / "rows.jsonl"
    own, barrier, sent = threading.local(), threading.Barrier(2, timeout=60), [b"", b""]

    def exchanged(value):
        sent[own.process] = pickle.dumps(value)
        barrier.wait()
        values = list(map(pickle.loads, sent))
        barrier.wait()
        return values

    monkeypatch.setattr(tokenizing, "CHUNK", 3)
    monkeypatch.setattr(processes, "turn", lambda number: number % 2 == own.process)
    monkeypatch.setattr(processes, "exchanged", exchanged)

    def both(**options):
        def one(process):
            own.process = process
            try:
                examples, counts = read(chat, path, **options)
                return [example.prompt_id for example in examples], counts, examples.digest
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(one, (0, 1))
        assert first == second
        return first

    path.write_bytes(line(GOOD | {"x": 1}) * 9 + line({"text": 1}) + line({"answer": 1}) + line(GOOD) * 20)
    assert "rows.jsonl, row 10: no field" in both()
    found = both(bad_rows="drop", max_bad=1.9 / 31)
    assert re.search(r"2 of 31 rows are bad .* the first is .*rows\.jsonl, row 10: no field", found)
    assert both(bad_rows="drop", max_bad=1.9 / 31) == found  # now from the cache
    ids, counts, digest = both(bad_rows="drop")
    assert ids == [*range(9), *range(11, 31)]
    assert counts == {"dropped: bad row": 2, "not used: columns x; rows with them": 9}
    monkeypatch.undo()
    assert read(chat, path, bad_rows="drop")[0].digest == digest


def test_types_may_differ_in_what_is_not_read(chat, tmp_path):
    """Extra columns are named once, however strange they are."""
    path = tmp_path / "rows.jsonl"
    extras = [{}, {"source": 3}, {"source": ["x"], "\ud800": 1}, {"prompt_id": "a-b", "source": None}]
    path.write_bytes(b"".join(line(GOOD | extra) for extra in extras))
    examples, counts = read(chat, path)
    assert [example.prompt_id for example in examples] == [0, 1, 2, 3]
    assert counts == {"not used: columns source, '\\ud800'; rows with them": 2}
    path.write_bytes(b"".join(line(GOOD | {f"c{i}": 1}) for i in range(50)))
    (note,) = read(chat, path)[1]
    assert "c0, c1, c10" in note
    assert "and 38 more" in note
    pairs = {"real": said(QUESTION, ("assistant", "3"))["messages"], "generated": [], "sample_id": 0}
    path.write_bytes(line(pairs | {"prompt_id": 4, "score": 1.5}))
    (example,), counts = read(chat, path)
    assert example.prompt_id == 4
    assert counts == {"not used: columns score; rows with them": 1}


def test_prompt_ids_differ(chat, tmp_path):
    """Scores are found by them: two rows of one id would share theirs."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line(GOOD | {"prompt_id": i}) for i in (5, 7, 5)))
    message = f"{path}, row 3: prompt_id 5 came before, in {path}, row 1; give each row its own"
    with pytest.raises(ValueError, match=re.escape(message)):
        read(chat, path)


def test_given_pairs(chat, tmp_path):
    """The rules for rows are those for pairs."""
    path = tmp_path / "pairs.jsonl"
    real, generated = [turn(*QUESTION), turn("assistant", "3")], [turn(*QUESTION), turn("assistant", "4")]
    good = {"real": real, "generated": generated}
    empty = {"real": real, "generated": [turn(*QUESTION), turn("assistant", None)]}
    tokens = {"prompt_tokens": [9], "real_tokens": [9], "generated_tokens": [9]}

    def read_pairs(bad, **options):
        path.write_bytes(line(good) * 10 + line(bad) + line(good) * 10)
        rows = sources.load_rows(str(path))
        return load_pairs(rows, chat, path=str(path), vocab_size=272, **options)

    pairs, counts = read_pairs(empty)
    assert len(pairs) == 20
    assert counts == {"dropped: empty answer": 1}
    with pytest.raises(ValueError, match=r"the first is .*pairs\.jsonl, row 11: generated: the answer is empty"):
        read_pairs(empty, max_bad=0)
    for bad, message in (
        ({"real": real}, "no fields real and generated among real"),
        ({"real": real, "generated": "4"}, "generated: expected a list of messages, and found str"),
        (good | {"sample_id": -1}, "sample_id is -1: expected 0 to 2147483647"),
        (good | {"prompt_id": 2**70}, "prompt_id is"),
        (good | {"generated_tokens": [1]}, "prompt_tokens: expected a list of token ids"),
        (good | tokens | {"real_tokens": None}, "real_tokens: expected a list of token ids"),
        (good | tokens | {"real_tokens": [1.5]}, "real_tokens: expected a list of token ids"),
        (good | tokens | {"real_tokens": [[1]]}, "real_tokens: expected a list of token ids"),
        (good | tokens | {"generated_tokens": [2**40]}, "generated_tokens: a token id lies beyond"),
        (good | tokens | {"generated_tokens": [-(2**40)]}, "generated_tokens: a token id is negative"),
    ):
        with pytest.raises(ValueError, match=r"pairs\.jsonl, row 11: " + re.escape(message)):
            read_pairs(bad)
        pairs, counts = read_pairs(bad, bad_rows="drop")
        assert len(pairs) == 20
        assert counts == {"dropped: bad row": 1}
    assert read_pairs(good | {"extra": 1})[1] == {"not used: columns extra; rows with them": 1}


def test_files_that_are_none(tmp_path, monkeypatch):
    for name, content in (("zero.jsonl", b""), ("blank.jsonl", b"\n \n"), ("bom.json", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is empty: 0 rows"):
            sources.load_rows(str(tmp_path / name))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"folder\.jsonl holds no file that ends in \.jsonl"):
        sources.load_rows(str(tmp_path / "folder.jsonl"))
    for name in ("inside", "dangling"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(line(GOOD))
    (tmp_path / "inside" / "b.jsonl").mkdir()
    (tmp_path / "dangling" / "b.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("inside", "dangling"):
        with pytest.raises(ValueError, match=r"b\.jsonl is not a regular file"):
            sources.load_rows(str(tmp_path / name))
    (tmp_path / "dangling" / "b.jsonl").rename(tmp_path / "dangling" / "test.jsonl")
    (tmp_path / "dangling" / "a.jsonl").rename(tmp_path / "dangling" / "train.jsonl")
    assert len(sources.load_rows(str(tmp_path / "dangling"))) == 1
    path = str(tmp_path / "inside" / "a.jsonl")

    def refuse(file, *args, **kwargs):
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read: .*Permission denied"):
        sources.load_rows(path)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(GOOD) * 3)
    rows = sources.load_rows(str(path))
    path.write_bytes(line(GOOD) * 2)
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 3: the file has become shorter"):
        rows[2]
    later = sources.load_rows(str(path))
    path.unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 1: .*No such file"):
        later[0]


def test_splits_that_are_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(GOOD) * 10)
    assert len(sources.load_rows(str(path), "train[20%:50%]")) == 3
    with pytest.raises(ValueError, match=r"rows\.jsonl: 0 rows"):
        sources.load_rows(str(path), "train[:0]")
    for split in ("train[nonsense]", "train[", "train[5:]+test"):
        with pytest.raises(ValueError, match=re.escape(f"{path}: the split {split!r} of 10 rows: ")):
            sources.load_rows(str(path), split)


def write_parquet(path, rows=10, **columns):
    table = pa.table({"question": ["1+2"] * rows, "answer": ["3"] * rows, **columns})
    pq.write_table(table, path, compression="none", write_page_checksum=True)
    return path.read_bytes()


def test_parquet_files(chat, tmp_path):
    whole = write_parquet(tmp_path / "a.parquet")
    bad = tmp_path / "b.parquet"
    for content, message in (
        (b"", "b.parquet is empty: 0 rows"),
        (whole[: len(whole) // 2], "b.parquet is no whole parquet file: "),
        (whole[:-1], "b.parquet is no whole parquet file: "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "b.parquet is no whole"),
        (whole[:4] + bytes(len(whole) // 3) + whole[4 + len(whole) // 3 :], "b.parquet is no whole parquet"),
    ):
        bad.write_bytes(content)
        for path in (bad, tmp_path):
            with pytest.raises(ValueError, match=re.escape(message)):
                sources.load_rows(str(path))
    write_parquet(bad, 0)
    with pytest.raises(ValueError, match=r"b\.parquet: 0 rows"):
        sources.load_rows(str(tmp_path))
    write_parquet(bad, 1, other=[3])
    with pytest.raises(ValueError, match=r"cannot be read, or not together with others"):
        sources.load_rows(str(tmp_path))
    bad.unlink()
    write_parquet(tmp_path / "a.parquet", source=["x"] * 9 + [None])
    examples, counts = read(chat, tmp_path)
    assert len(examples) == 10
    assert counts == {"not used: columns source; rows with them": 9}
    table = pa.table({"question": ["1+2"] * 3, "answer": ["3", "3", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=re.escape(f"the first is {tmp_path}, row 3: the answer is empty")):
        read(chat, tmp_path)


def not_dicts():
    return [GOOD, "text"]


def mixed_types():
    return [GOOD, {"question": 3, "answer": "3"}]


def later_columns():
    return [
        {"instruction": "Say hi", "output": "hi"},
        {"instruction": "Translate", "input": "Guten Tag", "output": "Good day", "system": "Be brief.", "other": 1},
    ]


def test_a_functions_rows_may_differ_in_their_columns():
    """What only a later row has is read, too, and what no form reads is noted."""
    chat = Chat(tiny.tokenizer(), [2])
    rows = sources.load_rows(f"{__name__}:later_columns")
    examples, counts = load_examples(rows, chat, path="x")
    assert [[turn["content"] for turn in example.messages] for example in examples] == [
        ["Say hi", "hi"],
        ["Be brief.", "Translate\n\nGuten Tag", "Good day"],
    ]
    assert any("other" in note for note in counts)


def test_functions_and_saved_datasets(tmp_path):
    from datasets import Dataset

    here = __name__
    with pytest.raises(ValueError, match=r":not_dicts, row 2: not a dict but str"):
        sources.load_rows(f"{here}:not_dicts")
    with pytest.raises(ValueError, match=r":mixed_types: its rows make no table: "):
        sources.load_rows(f"{here}:mixed_types")
    Dataset.from_list([GOOD] * 5).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"saved cannot be read: "):
        sources.load_rows(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"saved cannot be read: "):
        sources.load_rows(str(tmp_path / "saved"))


def test_config_keys():
    given = {"model": {"path": "m"}, "data": {"path": "d"}}
    assert config.resolve(given).data.bad_rows == "error"
    assert config.resolve(given).data.max_bad == 0.1
    for key, value, message in (
        ("bad_rows", "ignore", "data.bad_rows='ignore': one of error, drop"),
        ("max_bad", 1.5, "data.max_bad=1.5: at least 0 and at most 1"),
        ("max_bad", float("nan"), "data.max_bad=nan"),
    ):
        with pytest.raises(errors.ConfigError, match=re.escape(message)):
            config.resolve(given | {"data": {"path": "d", key: value}})


@pytest.mark.parametrize("kind", ["pairs", "scores"])
def test_damaged_pair_and_score_files(kind):
    """A flipped bit anywhere is an error or changes nothing; so is what an interruption could leave."""
    messages = [turn(*QUESTION), turn("assistant", "3")]
    ids = np.arange(5, dtype=np.int32)
    pairs = [Pair(number, 0, messages, messages, ids, ids, ids + number, False) for number in range(4)]
    if kind == "pairs":
        content = parquet.pairs_to_parquet(pairs)

        def load(content):
            return repr(parquet.pairs_from_parquet(content, "x.parquet"))
    else:
        content = parquet.scores_to_parquet(1, pairs, np.arange(8).reshape(4, 2) / 3)

        def load(content):
            return repr(parquet.scores_from_parquet(content, "x.parquet"))

    whole, rng = load(content), random.Random(0)
    harmless = 0
    for _ in range(600):
        at = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            result = load(bytes(damaged))
        except ValueError as error:
            result = str(error)
        harmless += result == whole
        damage = "x.parquet is damaged: remove it, and the same command makes it again"
        assert result == whole or damage in result
    assert harmless < 400
    plain = pa.Table.from_pylist([{"prompt_id": 1}])
    buffer = pa.BufferOutputStream()
    pq.write_table(plain, buffer)
    for other in (
        b"",
        content[:-1],
        content[: len(content) // 2],
        content + b"x",
        buffer.getvalue().to_pybytes(),
    ):
        with pytest.raises(ValueError, match=r"x\.parquet is damaged: remove it"):
            load(other)


# --- random damage -----------------------------------------------------------------------------------

ODD = [
    '"\\ud800"',
    "1e999",
    "NaN",
    "-0",
    '"\\u0000"',
    '"🙂é\\u202e"',
    "[" * 2000,
    '{"a":' * 50 + "1" + "}" * 50,
]


def mutated(lines, rng):
    """A valid file with one to four things wrong."""
    lines = list(lines)
    for _ in range(rng.randint(1, 4)):
        if not lines:
            break
        at = rng.randrange(len(lines))
        content = bytearray(lines[at])
        place = rng.randrange(max(len(content), 1))
        match rng.randrange(8):
            case 0 if content:
                content[place] ^= 1 << rng.randrange(8)
            case 1:
                del content[place:]
            case 2:
                lines.insert(at, lines[at])
            case 3:
                del lines[at]
                continue
            case 4:
                content[place:place] = rng.choice(ODD).encode()
            case 5:
                content[place:place] = rng.randbytes(3)
            case _:
                content = bytearray(line(changed(json.loads(lines[at]), rng)) if valid(lines[at]) else content)
        lines[at] = bytes(content)
    content = b"".join(lines)
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content


def valid(text):
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def changed(row, rng):
    """A row with a key gone, or a value of another type, at some depth."""
    inside = row
    while rng.random() < 0.6:
        children = list(inside.values()) if isinstance(inside, dict) else inside
        nested = [child for child in children if isinstance(child, dict | list) and child]
        if not nested:
            break
        inside = rng.choice(nested)
    keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
    if keys:
        key = rng.choice(keys)
        if rng.random() < 0.4:
            del inside[key]
        else:
            inside[key] = rng.choice([None, 3, -1.5, True, "", " ", "\ud800", [], {}, [[1]], {"a": None}, "x" * 999])
    return row


def test_a_thousand_mutations(chat, tmp_path):
    """Examples come of it, or an error that names the file: never another error, never a hang."""
    rng = random.Random(0)
    rows = [GOOD | {"prompt_id": 1000 + i} for i in range(4)]
    rows += [said(QUESTION, ("assistant", "3"), ("user", "é🙂"), ("assistant", "</s>"))] * 2
    rows += [{"instruction": "a", "input": "b", "output": "c"}]
    path, ends, began = tmp_path / "rows.jsonl", {"examples": 0, "errors": 0}, time.perf_counter()
    for number in range(1000):
        path.write_bytes(mutated(map(line, rows), rng))
        try:
            options = {"bad_rows": ("error", "drop")[number % 2], "max_bad": (0.1, 1.0)[number // 2 % 2]}
            examples, counts = read(chat, path, **options)
            text = "".join(counts)
        except (ValueError, FileNotFoundError) as error:
            examples, text = [], str(error)
            assert text.count(str(path)) >= 1, text
        text.encode()  # can be printed
        ends["examples" if examples else "errors"] += 1
    assert min(ends.values()) > 100
    assert time.perf_counter() - began < 20
