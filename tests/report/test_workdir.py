"""What is read of a workdir, and how damage in it is named."""

import pyarrow.parquet as pq
import pytest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json is missing: is .* a run's?"),
        ("config.json", "{", "config.json is damaged: no valid JSON"),
        ("config.json", "[]", "config.json was not written by spin_jax"),
        ("config.json", '{"config": {"loss": 3}}', "config.json, config is damaged: loss is 3"),
        ("summary.json", "{}", "summary.json is damaged: no list of rows"),
        ("summary.json", "[1]", "summary.json, row 0 is damaged: a JSON int in place of an object"),
        ("summary.json", '[{"nll": 1}]', "summary.json, row 0 is damaged: iteration is None"),
        ("summary.json", '[{"iteration": 0, "nll": "x"}]', "summary.json, row 0 is damaged: nll is 'x'"),
        ("summary.json", '[{"iteration": 0, "control": 3}]', "row 0 is damaged: control is 3"),
        ("metrics.jsonl", '{"phase": "train"}\n', "metrics.jsonl, line 1 is damaged: iteration is None"),
        ("metrics.jsonl", "{}\n{\n", "metrics.jsonl, line 1 is damaged: phase is None"),
        ("metrics.jsonl", "{\n{}\n", "metrics.jsonl, line 1 is damaged: no valid JSON"),
        ("metrics.jsonl", "3\n", "metrics.jsonl, line 1 is damaged: a JSON int in place of an object"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl, line 1 is damaged: no valid JSON"),
        ("iteration_0/samples.jsonl", '{"prompt_id": 1, "prompt": []}\n', "line 1 is damaged: real is None"),
        (
            "start/samples.jsonl",
            '{"prompt_id": 1, "prompt": [{"role": "assistant"}], "real": "", "generated": ""}\n',
            "line 1, prompt is damaged: content is None",
        ),
        ("iteration_1/pairs/train-00000-of-00001.parquet", "PAR1", r"iteration_1/.*1\.parquet is damaged"),
        ("iteration_1/held_out.parquet", "", r"iteration_1/held_out\.parquet is damaged"),
    ],
)  # fmt: skip
def test_damage_is_named(name, content, message, copy):
    folder, page = copy
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        page()


def test_a_flipped_bit_in_pairs_is_found(copy):
    folder, page = copy
    path = folder / "iteration_0" / "pairs" / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0)
    column = next(start.column(n) for n in range(start.num_columns) if "real_tokens" in start.column(n).path_in_schema)
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet is damaged"):
        page()
