"""Datasets are opened as rows, whatever their format."""

import json

import pytest
from dataset_rows import write_jsonl

from spin_jax.data import sources


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


def test_a_revision_tells_that_a_dataset_is_the_hubs(tmp_path, monkeypatch):
    """When the hub is out of reach as well, as it is in the tests: a report needs to know it later."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "sums").mkdir(parents=True)
    assert sources.pinned("org/sums", None) == "main"
    assert sources.pinned("org/sums", "v1") == "v1"
    assert sources.pinned("local/sums", "v1") is None
    assert sources.pinned("spin_jax.tiny:problems", None) is None
