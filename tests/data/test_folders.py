"""The files of a split in a local folder are those that `datasets` finds, and never those of two splits."""

import json
import socket

import pytest

from spin_jax.data import folders, sources


def fill(folder, names, card=None):
    """Files of two rows, which say the name of their file."""
    from datasets import Dataset

    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"question": name, "answer": str(number)} for number in range(2)]
        if name.endswith(".parquet"):
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# Data\n")
    return str(folder)


def found(folder, split, **options):
    """The names of the files whose rows `load_rows` gives."""
    rows = sources.load_rows(folder, split, **options)
    return list(dict.fromkeys(rows[number]["question"] for number in range(len(rows))))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A local folder asks no server, although `datasets` might."""
    asked = []

    def refuse(*args):
        asked.append(args)
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


SHARD = "-00000-of-00001"
# The files of a folder, and for each split its files or an error.
FOLDERS = {
    "names with the split inside": (
        ["gsm8k_train.jsonl", "gsm8k_test.jsonl"],
        {"train": ["gsm8k_train.jsonl"], "test": ["gsm8k_test.jsonl"]},
    ),
    "a file of no split": (
        ["data.jsonl", "test.jsonl"],
        {"train": r"no split 'train'; it has test \(test.jsonl\); data.jsonl in no split", "test": ["test.jsonl"]},
    ),
    "no name of a split": (["b.jsonl", "a.jsonl"], {"train": ["a.jsonl", "b.jsonl"], "test": "it has train"}),
    "two formats of one split": (
        ["train.jsonl", "train.parquet"],
        {"train": "'train' mixes formats: train.jsonl, train.parquet"},
    ),
    "two formats without a split": (["a.jsonl", "b.parquet"], {"train": "mixes formats: a.jsonl, b.parquet"}),
    "another format of another split": (["train.jsonl", "test.parquet", "dev.csv"], {"train": ["train.jsonl"]}),
    "a clone of a hub dataset": (
        [f"data/{split}{SHARD}-0a1b2c.parquet" for split in ("train_sft", "test_sft", "train_gen")],
        {
            "train_sft": [f"data/train_sft{SHARD}-0a1b2c.parquet"],
            "train": r"no split 'train'; it has test_sft .*train_gen .*train_sft",
        },
    ),
    "its data folder": (
        [f"{split}{SHARD}.parquet" for split in ("train_sft", "test_sft", "train_gen")],
        {
            "train_sft": [f"train_sft{SHARD}.parquet"],
            "train": "'train' would mix train_gen, train_sft. Choose one as the split",
            "test": [f"test_sft{SHARD}.parquet"],
        },
    ),
    "files that only begin like the split": (
        ["train.jsonl", "train_old_backup.jsonl", "training_log.jsonl"],
        {"train": ["train.jsonl"], "train_old_backup": ["train_old_backup.jsonl"]},
    ),
    "parts": (
        ["train_0.jsonl", "train_1.jsonl", "train-2.jsonl", "test.jsonl"],
        {"train": ["train-2.jsonl", "train_0.jsonl", "train_1.jsonl"]},
    ),
    "folders": (
        ["train/b.jsonl", "train/a.jsonl", "test/a.jsonl", "other.jsonl"],
        {"train": ["train/a.jsonl", "train/b.jsonl"], "test": ["test/a.jsonl"]},
    ),
    "configurations without a card": (
        ["main/train.jsonl", "socratic/train.jsonl"],
        {"train": "'train' would mix main/train, socratic/train"},
    ),
    "compressed": (["train.jsonl.gz", "test.json.zst"], {"train": ["train.jsonl.gz"]}),
    "other words": (["dev.jsonl", "train.jsonl"], {"validation": ["dev.jsonl"], "dev": ["dev.jsonl"]}),
    "hidden files": ([".train.jsonl", "train.jsonl", ".git/train.jsonl"], {"train": ["train.jsonl"]}),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_splits_of_a_folder(tmp_path, kind):
    """Where `datasets` gives the split, its files are ours; but of names that only begin like it, it takes all."""
    import datasets

    names, splits = FOLDERS[kind]
    folder = fill(tmp_path / "rows", names)
    try:
        theirs = datasets.load_dataset_builder(folder, cache_dir=str(tmp_path / "cache")).config.data_files
    except ValueError:  # it wants one format for all splits
        theirs = {}
    for split, expected in splits.items():
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                sources.load_rows(folder, split)
        else:
            assert found(folder, split) == expected
            if split in theirs and "only begin" not in kind:
                assert sorted(theirs[split]) == [f"{folder}/{name}" for name in expected]


def test_odd_names_of_folders(tmp_path):
    """A folder's name is no pattern."""
    folder = fill(tmp_path / "[a]*", ["train/a.jsonl", f"test/a{SHARD}.parquet"])
    assert found(folder, "train") == ["train/a.jsonl"]
    assert found(folder, "test") == [f"test/a{SHARD}.parquet"]


CARD = """configs:
- config_name: main
  data_files:
  - split: train
    path: [main/part_*.jsonl, more.jsonl]
  - split: test_prefs
    path: main/last.jsonl
- config_name: socratic
  data_files: socratic/*.jsonl"""


def test_the_splits_of_a_card(tmp_path, monkeypatch):
    names = [
        "main/part_1.jsonl",
        "main/part_2.jsonl",
        "more.jsonl",
        "main/last.jsonl",
        "socratic/a.jsonl",
        "train.jsonl",
    ]
    folder = fill(tmp_path / "clone", names, CARD)
    monkeypatch.chdir(tmp_path)
    for path in (folder, "clone", "./clone/"):
        assert found(path, "train", name="main") == ["main/part_1.jsonl", "main/part_2.jsonl", "more.jsonl"]
    assert found(folder, "test_prefs", name="main") == ["main/last.jsonl"]
    assert found(folder, "train[:1]", name="socratic") == ["socratic/a.jsonl"]
    with pytest.raises(ValueError, match=r"no split 'test'; it has train \(.*\); test_prefs \(main/last.jsonl\)"):
        sources.load_rows(folder, "test", name="main")
    with pytest.raises(
        ValueError, match=r"(?s)its configs cannot be followed, of which data.name chooses one: .*'main', 'socratic'"
    ):
        sources.load_rows(folder, "train")
    folder = fill(tmp_path / "other", ["train.jsonl"], "license: mit")
    assert found(folder, "train") == ["train.jsonl"]


def test_the_files_of_a_split_are_named(tmp_path):
    folder = fill(tmp_path / "rows", ["train.jsonl", "train_old.jsonl", *(f"test_{n}.jsonl" for n in range(6))])
    notes = []
    sources.load_rows(folder, "train", notes=notes)
    sources.load_rows(folder, "test", notes=notes)
    assert notes == [
        f"{folder}: the split train is train.jsonl",
        f"{folder}: datasets counts train_old.jsonl to train too; it is not read",
        f"{folder}: the split test is test_0.jsonl, test_1.jsonl, test_2.jsonl, test_3.jsonl and 2 more",
    ]


def test_formats():
    assert [folders.file_format(f"a.{end}") for end in ("jsonl.gz", "json.zst", "parquet")] == [
        "jsonl",
        "json",
        "parquet",
    ]
    assert not any(folders.file_format(f"a.{end}") for end in ("parquet.gz", "csv", "jsonl.bak", "gz"))
