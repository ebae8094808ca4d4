"""Writes and reads the parquet files of pairs, scores and held-out numbers. Damaged files raise an error."""

import glob
import hashlib
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from spin_jax import errors
from spin_jax.data.records import HUMAN, MORE_FIELDS, PAIR_COLUMNS, Pair, fold, has_more_fields, unfold
from spin_jax.losses import PAIR

_FIELDS = [("role", pa.string()), ("content", pa.string())]
_MESSAGES = pa.list_(pa.struct(_FIELDS))
_WHOLE_MESSAGES = pa.list_(pa.struct([*_FIELDS, (MORE_FIELDS, pa.string())]))
_IDS = pa.list_(pa.int32())
_TYPES = pa.int64(), pa.int32(), _MESSAGES, _MESSAGES, _IDS, _IDS, _IDS, pa.bool_()
PAIR_SCHEMA = pa.schema(list(zip(PAIR_COLUMNS, _TYPES, strict=True)))  # JUDGED follow where there are any
JUDGED = [pa.field("score", pa.float64()), pa.field("real_score", pa.float64()), pa.field("right", pa.bool_())]


def pairs_to_parquet(pairs: Sequence[Pair], more_fields: bool = False) -> bytes:
    """A parquet file of pairs: the published SPIN columns, the token ids and, where there are any, scores.

    `more_fields` says that messages of other files of this folder have more fields than role and content.
    """
    judged = [field for field in JUDGED if any(getattr(pair, field.name) is not None for pair in pairs)]
    rows = [
        dict(zip(PAIR_SCHEMA.names, vars(pair).values(), strict=False))
        | {f.name: getattr(pair, f.name) for f in judged}
        for pair in pairs
    ]
    return _parquet(messages_table(rows, pa.schema([*PAIR_SCHEMA, *judged]), more_fields))


def messages_table(rows: Sequence[dict[str, Any]], schema: pa.Schema, more_fields: bool = False) -> pa.Table:
    """A table of rows with the conversations `real` and `generated`.

    If a message has more fields than role and content, each message keeps these as one text: Arrow would give it
    the fields of all others, and refuses fields of two types.
    """
    columns = ("real", "generated")
    if more_fields or has_more_fields(row[name] for row in rows for name in columns):
        rows = [{**row, **{name: list(map(fold, row[name])) for name in columns}} for row in rows]
        for name in columns:
            schema = schema.set(schema.get_field_index(name), pa.field(name, _WHOLE_MESSAGES))
    return pa.Table.from_pylist(rows, schema=schema)


def pairs_from_parquet(content: bytes, path: epath.PathLike | None = None) -> list[Pair]:
    """The pairs that `pairs_to_parquet` wrote. It raises Damaged, naming `path`, where `content` is not that."""
    rows = _rows_of(content, path or "a file of pairs")
    for row, name in itertools.product(rows, ("prompt_tokens", "real_tokens", "generated_tokens")):
        row[name] = np.asarray(row[name], np.int32)
    for row, name in itertools.product(rows, ("real", "generated")):
        row[name] = list(map(unfold, row[name]))
    return [Pair(*[row.pop(name) for name in PAIR_SCHEMA.names], **row) for row in rows]


def holds_pairs_of_a_run(folder: str) -> bool:
    """Whether a local folder is the `pairs/` of a run, which has training and held-out pairs in files of their own."""
    try:
        schemas = [pq.read_schema(path) for path in glob.glob(os.path.join(glob.escape(folder), "*.parquet"))]
    except (pa.ArrowException, OSError):
        return False  # reading the rows will name the damaged file
    return bool(schemas) and all(_DIGEST in (schema.metadata or {}) for schema in schemas)


def scores_to_parquet(
    source_iteration: int, pairs: Sequence[Pair], logps: np.ndarray, roles: Sequence[str] = PAIR
) -> bytes:
    """A parquet file of the opponent's log-probabilities, float32 [pairs, roles].

    It says which answers of a prompt a pair has (`sample_id`, `chosen_id`) where selfplay.pairing chose others than
    a human and a sampled one.
    """
    chosen = np.array([pair.chosen_id for pair in pairs], np.int32)
    columns = {
        "source_iteration": np.full(len(pairs), source_iteration, np.int32),
        "prompt_id": np.array([pair.prompt_id for pair in pairs], np.int64),
        "sample_id": np.array([pair.sample_id for pair in pairs], np.int32),
        **({"chosen_id": chosen} if (chosen != HUMAN).any() else {}),
        **{f"{role}_logp": np.asarray(logps[:, n], np.float32) for n, role in enumerate(roles)},
    }
    return _parquet(pa.table(columns))


def scores_from_parquet(
    content: bytes, path: epath.PathLike | None = None, roles: Sequence[str] = PAIR
) -> dict[tuple[int, int, int, int], tuple[float, ...]]:
    """The log-probabilities that `scores_to_parquet` wrote, by (source_iteration, prompt_id, sample_id, chosen_id)."""
    return {
        (row["source_iteration"], row["prompt_id"], row["sample_id"], row.get("chosen_id", HUMAN)): tuple(
            row[f"{role}_logp"] for role in roles
        )
        for row in _rows_of(content, path or "a file of scores")
    }


def held_out_to_parquet(pairs: Sequence[Pair], columns: Mapping[str, np.ndarray]) -> bytes:
    """A parquet file of a model's numbers for held-out pairs: each column is float32 [pairs]."""
    ids = {
        "prompt_id": np.array([pair.prompt_id for pair in pairs], np.int64),
        "sample_id": np.array([pair.sample_id for pair in pairs], np.int32),
    }
    return _parquet(pa.table({**ids, **{name: np.asarray(x, np.float32) for name, x in columns.items()}}))


def prompts_to_parquet(prompt_ids: Sequence[int], columns: Mapping[str, np.ndarray]) -> bytes:
    """A parquet file of a model's numbers for held-out prompts: each column is [prompts]."""
    return _parquet(pa.table({"prompt_id": np.array(prompt_ids, np.int64), **columns}))


def prompts_from_parquet(content: bytes, path: epath.PathLike | None = None) -> dict[str, np.ndarray]:
    """The columns that `prompts_to_parquet` wrote, with `prompt_id`, each [prompts]."""
    rows = _rows_of(content, path or "a file of prompts")
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}


# Parquet's own checksums cover pages only; a flipped bit in a header or in the schema changes our digest.
_DIGEST = b"spin_jax.sha256"


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    table = table.replace_schema_metadata({_DIGEST: _digest(table.to_pylist())})
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def _rows_of(content: bytes, path: epath.PathLike) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
        rows = table.to_pylist()
        if (table.schema.metadata or {}).get(_DIGEST) != _digest(rows):
            raise ValueError("its digest does not match its content")
    except Exception as error:  # Arrow raises many kinds of errors for damaged bytes
        raise errors.Damaged(f"{path} is damaged: remove it, and the same command makes it again ({error})") from error
    return rows


def _digest(rows: list[dict[str, Any]]) -> bytes:
    return hashlib.sha256(msgpack.packb(rows)).hexdigest().encode()  # pyright: ignore[reportArgumentType]
