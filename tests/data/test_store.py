"""Examples on disk: what is read is what was encoded, it is encoded once, and selections are those of lists."""

import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from dataset_rows import turn, write_jsonl

from spin_jax import tiny
from spin_jax.data import sources, store, tokenizing
from spin_jax.data.chat import Chat
from spin_jax.data.loading import load_examples
from spin_jax.data.records import Lengths
from spin_jax.data.store import Examples
from spin_jax.errors import EncodingKilled

DATED = "{{ strftime_now('%Y') if messages | length > 9 else '' }}"


def chat_of(template=tiny.CHAT_TEMPLATE, length=64, **options: Any):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer, [tokenizer.eos_token_id], lengths=Lengths(length, length), **options)


def load(path, chat, **options):
    return load_examples(sources.load_rows(str(path)), chat, path=str(path), **options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "examples"


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of rows that were encoded, each time they were."""
    seen, encode = [], tokenizing.encode_rows
    spy = lambda rows, numbers, *args, **options: seen.extend(numbers) or encode(rows, numbers, *args, **options)  # noqa: E731
    monkeypatch.setattr(tokenizing, "encode_rows", spy)
    return seen


def fields(example):
    ids = (example.prompt, example.real, example.earlier)
    return example.prompt_id, example.messages, *(None if i is None else (i.dtype, i.tolist()) for i in ids)


ROWS = [
    {"messages": [turn("user", "1+1"), turn("assistant", "2"), turn("user", "é🙂"), turn("assistant", "ok")]},
    {"messages": [turn("system", ""), turn("user", "a\u2028b"), {**turn("assistant", "x"), "weight": 0.1}]},
    {"messages": [turn("user", "1+1"), turn("assistant", "2")], "prompt_id": 2**62},
    {"question": "q", "answer": ""},
    {"question": "q", "answer": "a", "extra": 1},
]


@pytest.mark.parametrize("turns", [False, True])
def test_what_is_read_was_encoded(cache, encoded, tmp_path, turns):
    """All fields, their order in messages, and what was found: the first time, and from the cache."""
    path, chat = write_jsonl(tmp_path / "rows.jsonl", ROWS), chat_of()
    direct, findings = tokenizing.encode_rows(ROWS, range(5), chat, path="x", all_turns=turns)
    encoded.clear()
    for times in (1, 1):
        examples, counts = load(path, chat, all_turns=turns, max_bad=0.5)
        assert list(map(fields, examples)) == [fields(example) for _, example in direct]
        assert list(examples[1].messages[1]) == ["role", "content"]
        assert examples.column("number").tolist() == [0, 1, 2, 4]
        assert counts == findings.final_counts("x", 5, 0.5)
        assert encoded == [0, 1, 2, 3, 4] * times
    texts = (json.dumps([e.prompt_id, e.messages], sort_keys=True).encode() for _, e in direct)
    assert examples.digest == hashlib.sha256(b"".join(texts)).hexdigest()[:16]  # as fingerprints always were
    with pytest.raises(ValueError, match=r"1 of 5 rows are bad .* row 4"):  # max_bad counts each time
        load(path, chat, all_turns=turns, max_bad=0.1)
    assert len(encoded) == 5


def test_what_makes_other_examples(cache, encoded, tmp_path):
    """Another file, length, template, choice of rows or column encodes anew; another day only for a dated template."""
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n}+1", "answer": str(n + 1), "other": "z"} for n in range(8)]
    write_jsonl(path, rows)
    days: list[dict[str, Any]] = [{"today": datetime.date(2026, 1, day)} for day in (1, 2)]
    columns = {"prompt_column": "question", "answer_column": "other"}
    seen, cases = [], list[tuple[dict[str, Any], dict[str, Any]]]()
    cases += [
        ({}, {}),
        ({"length": 7}, {}),
        ({"template": "A" + tiny.CHAT_TEMPLATE}, {}),
        ({"system_message": "s"}, {}),
        ({}, {"limit": 4}),
        ({}, {"limit": 4, "seed": 1}),
        ({}, columns),
        ({"template": tiny.CHAT_TEMPLATE + DATED, **days[0]}, {}),
        ({"template": tiny.CHAT_TEMPLATE + DATED, **days[1]}, {}),
    ]
    for options, choice in cases:
        encoded.clear()
        examples, _ = load(path, chat_of(**options), **choice)
        assert encoded
        again, _ = load(path, chat_of(**options), **choice)
        assert len(encoded) == len(examples) == len(again)
        seen.append(list(map(fields, again)))
    assert len(set(map(str, seen[:7]))) == 7
    encoded.clear()
    for day in days:
        assert len(load(path, chat_of(**day))[0]) == 8
    assert not encoded
    write_jsonl(path, [*rows[:-1], {**rows[-1], "answer": "7"}])  # of the same size
    os.utime(path, ns=(1, 1))
    assert load(path, chat_of())[0][-1].messages[-1]["content"] == "7"
    assert len(encoded) == 8


def test_other_content_of_a_saved_dataset_is_encoded_anew(cache, encoded, tmp_path):
    """`datasets` stores a fingerprint with a saved table, which is the same for other content here."""
    import datasets

    path, chat = tmp_path / "saved", chat_of()
    for answer in "12":
        rows = datasets.Dataset.from_list([{"question": "q", "answer": answer}] * 3)
        rows._fingerprint = "same"
        shutil.rmtree(path, ignore_errors=True)
        rows.save_to_disk(str(path))
        for _ in range(2):
            examples, _ = load(path, chat)
            assert [example.messages[-1]["content"] for example in examples] == [answer] * 3
    assert len(encoded) == 6
    saved = sources.load_rows(str(path))
    for chosen in ([0, 2], [2, 0]):  # of the same file
        load_examples(saved.select(chosen), chat, path=str(path))
    assert len(encoded) == 10


def test_a_function_of_the_same_rows_is_encoded_once(cache, encoded):
    for _ in range(2):
        load("spin_jax.tiny:problems", chat_of(), limit=30)
    assert len(encoded) == 30


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("arrow", lambda content: content[:-9]),
        ("arrow", lambda content: content.replace(b"1+1", b"1+2")),
        ("arrow", lambda content: None),
        ("json", lambda content: content[:-9]),
        ("json", lambda content: b"[]"),
        ("json", lambda content: None),
    ],
)
def test_a_damaged_file_is_made_again(cache, encoded, tmp_path, kind, damage):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:3])
    expected = list(map(fields, load(path, chat_of())[0]))
    file, files = next(cache.glob(f"*.{kind}")), sorted(cache.iterdir())
    content = damage(file.read_bytes())
    assert content != file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    for _ in range(2):
        examples = load(path, chat_of())[0]
        assert list(map(fields, examples)) == expected
        assert examples.digest == Examples.of(list(examples), chat_of()).digest
    assert len(encoded) == 6
    assert sorted(cache.iterdir()) == files


def test_a_whole_file_is_not_replaced(cache, tmp_path, monkeypatch):
    """As another process, which encoded the same rows at the same time, may have mapped it."""
    path, chat = write_jsonl(tmp_path / "rows.jsonl", ROWS[:3]), chat_of()
    expected = list(map(fields, load(path, chat)[0]))
    files, found, find = sorted(cache.iterdir()), [], store.find
    inodes = [file.stat().st_ino for file in files]

    def late(name):
        found.append(name)
        return find(name) if len(found) > 1 else None  # it was not there when load_examples looked

    monkeypatch.setattr(store, "find", late)
    assert list(map(fields, load(path, chat)[0])) == expected
    assert [file.stat().st_ino for file in files] == inodes
    assert sorted(cache.iterdir()) == files


def test_without_a_cache_that_can_be_written(tmp_path, encoded, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIN_JAX_CACHE", str(tmp_path / "file"))
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:3])
    for _ in range(2):
        assert [example.prompt_id for example in load(path, chat_of())[0]] == [0, 1, 2**62]
    assert len(encoded) == 6


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_processes_encode_what_one_does(cache, tmp_path, monkeypatch, kind):
    """In chunks of three rows, of which many wait at a time. A bad row is named as ever, and no JAX is imported."""
    path, chat, rows = tmp_path / f"rows.{kind}", chat_of(), tiny.problems(50)
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(path))
    alone, _ = load(path, chat)
    monkeypatch.setattr(tokenizing, "MANY", 0)
    monkeypatch.setattr(tokenizing, "CHUNK", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setenv("SPIN_JAX_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(tokenizing, "encode_rows", None)  # of this process
    together, _ = load(path, chat)
    assert list(map(fields, together)) == list(map(fields, alone))
    assert together.digest == alone.digest
    if kind == "jsonl":
        write_jsonl(path, [*rows[:40], {"question": "q", "answer": 7}, *rows[41:]])
        with pytest.raises(ValueError, match=r"rows.jsonl, row 41: answer is int: expected text"):
            load(path, chat)
    program = "import sys, spin_jax.data.tokenizing; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_killed_process_has_an_error_with_advice(cache, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", tiny.problems(50))
    start, pools = tokenizing._started, []

    def started(*args):
        pools.append(start(*args))
        os.kill(next(iter(pools[0]._processes)), signal.SIGKILL)
        return pools[0]

    monkeypatch.setattr(tokenizing, "MANY", 0)
    monkeypatch.setattr(tokenizing, "CHUNK", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(tokenizing, "_started", started)
    with pytest.raises(EncodingKilled, match=r"rows.jsonl: one of 2 processes .* more memory, or fewer CPUs"):
        load(path, chat_of())


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Also where it is killed in the middle of its work."""
    program = """
import os, pickle, signal, time
from spin_jax.data import tokenizing
pool = tokenizing._started(2, pickle.dumps([]))
pool.submit(time.sleep, 600)
print(*pool._processes, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program]
    with (tmp_path / "out").open("w+") as out:  # a pipe would stay open as long as the processes do
        assert subprocess.run(command, stdout=out, check=False).returncode == -signal.SIGKILL
    left = [int(one) for one in (tmp_path / "out").read_text().split()]
    assert len(left) == 2
    until = time.monotonic() + 60
    while left and time.monotonic() < until:
        left = [one for one in left if is_running(one)]
        time.sleep(0.1)
    for one in left:
        os.kill(one, signal.SIGKILL)
    assert not left


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_selections_are_those_of_lists(chat, tmp_path):
    """Slices, places, shifted ids and several datasets in one, in any order of these."""
    first, second = (load_examples(tiny.problems(20, seed), chat, path="x")[0] for seed in (0, 1))
    a, b = list(first), list(second)

    def same(examples, expected):
        assert list(map(fields, examples)) == list(map(fields, expected))
        assert examples.column("prompt_id").tolist() == [e.prompt_id for e in expected]
        assert examples.lengths.tolist() == [[len(e.prompt), len(e.real)] for e in expected]
        of = Examples.of(expected, chat)
        assert np.array_equal(examples.keys, of.keys)
        assert examples.digest == of.digest

    moved = [dataclasses.replace(e, prompt_id=e.prompt_id + 2**40) for e in b]
    both = Examples.joined([first, second.shifted(2**40)])
    same(both, a + moved)
    same(both[5:31:3], (a + moved)[5:31:3])
    same(both[5:31][::-2], (a + moved)[5:31][::-2])
    same(both.select(np.array([39, 0, 0])).shifted(1)[1:], [dataclasses.replace(a[0], prompt_id=1)] * 2)
    same(both[10:].select(np.arange(30) % 2 == 0), (a + moved)[10::2])
    same(first[20:], [])
    assert fields(both[-1]) == fields(moved[-1])
    with pytest.raises(IndexError):
        both[40]


def test_the_digest_of_several_files_is_remembered(cache, tmp_path, monkeypatch):
    """A mixture is not read again to know what it is."""
    paths = [write_jsonl(tmp_path / f"{seed}.jsonl", tiny.problems(20, seed)) for seed in (0, 1)]

    def digest():
        one, two = (load(path, chat_of())[0] for path in paths)
        return Examples.joined([one, two.shifted(9)]).digest

    first = digest()
    with monkeypatch.context() as patched:
        patched.setattr(store, "canonical", None)
        assert digest() == first
    one, two = (load(path, chat_of())[0] for path in paths)
    expected = [*one, *(dataclasses.replace(e, prompt_id=e.prompt_id + 9) for e in two)]
    assert Examples.of(expected, chat_of()).digest == first
