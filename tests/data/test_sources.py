"""Datasets are opened as rows, whatever their format."""

import gzip
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pytest
from dataset_rows import write_jsonl

from spin_jax.data import json_lines, sources


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
    assert (
        len(sources.load_rows(str(folder), all_files=True)) == len(sources.load_rows(str(folder), "train+test")) == 23
    )
    with pytest.raises(ValueError, match=r"no split 'dev'; it has train \(train.jsonl\); test \(test.jsonl\)"):
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


def test_a_revision_tells_that_a_dataset_is_the_hubs(tmp_path, monkeypatch):
    """When the hub is out of reach as well, as it is in the tests: a report needs to know it later."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "sums").mkdir(parents=True)
    assert sources.pinned("org/sums", None) == "main"
    assert sources.pinned("org/sums", "v1") == "v1"
    assert sources.pinned("local/sums", "v1") is None
    assert sources.pinned("spin_jax.tiny:problems", None) is None


DOCUMENTS = {
    "a list in a .jsonl": lambda rows: json.dumps(rows, indent=1),
    "wrapped": lambda rows: json.dumps({"data": rows}),
    "wrapped and indented": lambda rows: "\n" + json.dumps({"a [ key": rows}, indent=2) + "\n",
    "objects over several lines": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "one object over several lines": lambda rows: json.dumps(rows[0], indent=1),
    "one line": lambda rows: json.dumps(rows[0]),
    "lines of one key": lambda rows: "".join(json.dumps({"conversations": row["x"]}) + "\n" for row in rows),
    "one line of one key": lambda rows: json.dumps({"conversations": rows[0]["x"]}),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_documents(tmp_path, kind, suffix):
    """A list, wrapped or not, and objects over several lines are the rows that they hold, as one line of each is."""
    turns = [{"from": "human", "value": "é {[\n"}, {"from": "gpt", "value": "b"}]
    rows = [{"question": f"q{i}]", "answer": "a", "x": turns} for i in range(3)]
    text = DOCUMENTS[kind](rows)
    expected = rows[:1] if kind.startswith("one") else rows
    if "of one key" in kind:
        expected = [{"conversations": row["x"]} for row in expected]
    for bom in ("", "\ufeff"):
        (tmp_path / f"rows.{suffix}").write_text(bom + text, encoding="utf-8")
        assert list(sources.load_rows(str(tmp_path / f"rows.{suffix}"))) == expected


@pytest.mark.parametrize("sent", [False, True])
def test_a_file_is_unpacked_once_for_all_selections(tmp_path, monkeypatch, sent):
    """Also where a process gets the selections from another one; and anew when the file is another."""
    path, opened = tmp_path / "rows.jsonl.gz", []
    spy = lambda file, unpack=json_lines._open: opened.append(file) or unpack(file)  # noqa: E731

    def write(first):
        path.write_bytes(gzip.compress(b"".join(b'{"n": %d}\n' % n for n in range(first, first + 9))))
        os.utime(path, ns=(first, first))

    def read():
        parts = [sources.part(rows, np.arange(start, start + 3)) for start in (0, 3, 6)]
        return [row["n"] for part in parts for row in (pickle.loads(pickle.dumps(part)) if sent else part)]

    write(0)
    rows = sources.load_rows(str(path))
    monkeypatch.setattr(json_lines, "_open", spy)
    assert read() == read() == list(range(9))
    assert len(opened) == 1
    write(1)
    assert read() == list(range(1, 10))
    assert len(opened) == 2


def test_broken_documents(tmp_path):
    for name, content, message in (
        ("wrapped", '{\n"data": [\n{"a": 1},\n{"a" 1}\n]}', "row 1: Expecting ':' delimiter: line 4"),
        ("indented", '{\n"a": 1\n}\n{\n"b": 2', "row 2: Expecting ',' delimiter: line 5"),
        ("cut", '[\n{"a": 1},\n{"a"', "row 2: Expecting ':' delimiter"),
        ("empty", '{"data": []}', "is empty: 0 rows"),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"{name}\.json(, | ){message}"):
            sources.load_rows(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst", "json.zst"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_compressed_files_and_encodings(tmp_path, suffix, encoding):
    """They give the same rows, also in a folder, and errors name the file and the row."""
    rows = [{"question": f"é🙂 {i}", "answer": "x" * i} for i in range(40)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = json.dumps(rows, indent=1) if suffix.startswith("json.") else lines

    def write(content):
        content = gzip.compress(content) if suffix.endswith("gz") else content
        content = pa.Codec("zstd").compress(content, asbytes=True) if suffix.endswith("zst") else content
        path.write_bytes(content)
        return content

    path = tmp_path / f"train.{suffix}"
    content = write(text.encode(encoding))
    assert list(sources.load_rows(str(path))) == list(sources.load_rows(str(tmp_path))) == rows
    assert sources.load_rows(str(path), "train[30:]")[0] == rows[30]
    assert sources.load_rows(str(path)).place(1) == f"{path}, row 2"
    write((lines + "{").encode(encoding))
    if not suffix.startswith("json."):
        with pytest.raises(ValueError, match=rf"train\.{suffix}, row 41: Expecting property name"):
            list(sources.load_rows(str(path)))
    if suffix.endswith(("gz", "zst")):
        path.write_bytes(content[:-9])
        with pytest.raises(ValueError, match=rf"train\.{suffix} cannot be unpacked: "):
            sources.load_rows(str(path))
