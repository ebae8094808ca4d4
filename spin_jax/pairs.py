"""Exports the pairs of a run, or its prompts for a sampler of your own.

    python -m spin_jax.pairs --workdir=DIR --iteration=T --output=DIR_OR_FILE
    python -m spin_jax.pairs --workdir=DIR --prompts=FILE

  --workdir=DIR       the workdir of a run
  --iteration=T       the iteration of the pairs or of the prompts; unset, with --prompts: the next one
  --output=DIR        writes the pairs in the published SPIN format, parquet with the columns real and
                      generated: the training pairs to train-00000-of-00001.parquet, the held-out pairs to
                      test-00000-of-00001.parquet. A name that ends in .parquet or .jsonl is one file, which
                      gets the training pairs alone.
  --prompts=FILE      writes what launch/vllm_answers.py reads: how to sample, the prompts as token ids, and
                      how many answers each of them gets

datasets.load_dataset opens a folder of pairs. --config.selfplay.pairs takes a file, or a folder
and of it the split selfplay.pairs_split.

Examples. The last four answer the prompts of iteration 0 with vLLM, which has an environment of its own.
The first of these writes config.json, which --prompts reads, and trains the start if the config says so:

  python -m spin_jax.pairs --workdir=DIR --iteration=0 --output=PAIRS
  python -m spin_jax.main --config=FILE --workdir=DIR --config.selfplay.iterations=0
  python -m spin_jax.pairs --workdir=DIR --prompts=prompts.jsonl
  python launch/vllm_answers.py --prompts=prompts.jsonl --output=pairs_0.jsonl
  python -m spin_jax.main --config=FILE --workdir=DIR --config.selfplay.iterations=1 \\
      --config.selfplay.pairs=0=pairs_0.jsonl

Exit codes: 0 done, 1 failed (a full disk), 2 bad input.
"""

import io
import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from spin_jax import config as config_lib
from spin_jax import config_values
from spin_jax.cli import fail, parse


def export(workdir: str, iteration: int, output: str) -> list[str]:
    """Writes the pairs of an iteration in the published SPIN format, and returns a line of text about each file.

    `output` is a folder, which gets a file for each split; or a .parquet or .jsonl file, for the training pairs.
    ValueError or FileNotFoundError says that the iteration has no pairs, or not all of them yet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from etils import epath

    from spin_jax.data import parquet, records
    from spin_jax.storage import files

    one_file = re.search(r"\.(parquet|jsonl)$", output)
    lines, rows_of = [], {}
    schema = pa.schema([parquet.PAIR_SCHEMA.field(name) for name in ("real", "generated")])
    for split, paths in _shards(epath.Path(workdir), iteration).items():
        if one_file and split != "train":
            continue
        pairs = [pair for path in paths for pair in parquet.pairs_from_parquet(path.read_bytes(), path)]
        rows_of[split] = [{"real": pair.real_messages, "generated": pair.generated_messages} for pair in pairs]
        if any(pair.sample_id or pair.score is not None for pair in pairs):  # several answers to a prompt, or scores
            names = ["prompt_id", "sample_id", "score"]
            names += ["real_score"] if any(pair.real_score is not None for pair in pairs) else []
            for row, pair in zip(rows_of[split], pairs, strict=True):
                row |= {name: getattr(pair, name) for name in names}
    more_fields = records.has_more_fields(row[n] for rows in rows_of.values() for row in rows for n in schema.names)
    for split, rows in rows_of.items():
        target = epath.Path(output) if one_file else epath.Path(output) / f"{split}-00000-of-00001.parquet"
        if target.suffix == ".jsonl":
            files.write_jsonl(target, rows)
        else:
            buffer = io.BytesIO()
            more = [
                (name, pa.float64() if "score" in name else pa.int64()) for name in rows[0] if name not in schema.names
            ]
            columns = pa.schema([*schema, *more])
            pq.write_table(parquet.messages_table(rows, columns, more_fields), buffer)
            files.write(target, buffer.getvalue())
        lines.append(f"{target}: {len(rows)} pairs")
    return lines


def _shards(workdir: Any, iteration: int) -> dict[str, list[Any]]:
    """{split: the files of its pairs, in order}, for an iteration: train, then test."""
    folder = workdir / f"iteration_{iteration}" / "pairs"
    found = sorted(folder.glob("*.parquet")) if folder.exists() else []
    if not found:
        raise FileNotFoundError(f"{folder} holds no pairs: has iteration {iteration} been sampled?")
    by_split = itertools.groupby(found, lambda path: path.name.partition("-")[0])
    splits = {split: list(paths) for split, paths in by_split}
    for paths in splits.values():
        count = int(paths[0].stem.rpartition("-")[2])
        if len(paths) != count:
            raise ValueError(f"{folder} has {len(paths)} of {count} files: sampling has not ended")
    return dict(sorted(splits.items(), reverse=True))


def write_prompts(workdir: str, output: str, iteration: int | None = None) -> str:
    """Writes the prompts of an iteration, by default of the next one; returns a line of text about them.

    ValueError or FileNotFoundError says that the model that will answer is not there yet, or that the answers are.
    """
    from spin_jax.selfplay.exports import model_of_opponent
    from spin_jax.selfplay.prepare import prepare
    from spin_jax.storage import files

    prepared = prepare(_read_config(workdir), workdir)
    done = files.read_agreed(prepared.workdir / "summary.json") or []
    first = prepared.config.selfplay.start
    t = max([first, *(row["iteration"] + 1 for row in done)]) if iteration is None else iteration
    answers = prepared.folder(t) / "pairs"
    if files.exists(answers):
        raise ValueError(f"iteration {t} has answers already, in {answers}")
    model = model_of_opponent(prepared, t)
    lines = list(_lines(prepared, t, model))
    files.write_jsonl(output, lines)
    return f"{output}: {len(lines) - 1} prompts of iteration {t}, to be answered by {model}"


def _read_config(workdir: str) -> Any:
    """The config of a run, without how it spreads over devices: this machine may have others."""
    from etils import epath

    from spin_jax.storage import files

    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: is {workdir} a run's?")
    recorded = files.read_object(path).get("config")
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} was not written by a run of spin_jax")
    sampling = {**recorded.get("sampling", {}), "tensor": None}
    return config_lib.resolve({**recorded, "mesh": {}, "export": {}, "sampling": sampling})


def _lines(prepared: Any, t: int, model: str) -> Iterator[dict[str, Any]]:
    """The lines of the file: how to sample, then each prompt, the held-out ones last."""
    c = prepared.config
    yield {
        "prompts_of_iteration": t,
        "model": model,
        "revision": prepared.model.revision if model == c.model.path else None,
        "seed": c.seed + t,
        "temperature": c.sampling.temperature,
        "top_k": c.sampling.top_k,
        "top_p": c.sampling.top_p,
        "stop_token_ids": list(prepared.model.stop_tokens),
    }
    train, test = prepared.examples(t), prepared.held_out
    for number, example in enumerate([*train, *test]):
        prompt = prepared.chat.sampling_prompt(example)
        yield {
            "prompt_id": example.prompt_id,
            "samples": config_values.answers_wanted(c.selfplay, held_out=number >= len(train)),
            "real": example.messages,
            "prompt_tokens": prompt.tolist(),
            "real_tokens": example.real.tolist(),
            "max_tokens": min(c.sampling.max_new_tokens, max(c.lengths.max_length - len(prompt), 1)),
        }


def read_flags() -> tuple[str, int | None, str | None, str | None]:
    """(workdir, iteration, output, prompts), from the flags."""
    values = flags.FLAGS
    if not values.workdir or bool(values.output) == bool(values.prompts):
        raise ValueError("--workdir is needed, and --output or --prompts; see --help")
    if values.output and values.iteration is None:
        raise ValueError("--output needs --iteration: whose pairs?")
    return values.workdir, values.iteration, values.output, values.prompts


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code, which the docstring of this file explains."""
    # The flags are defined here, because another command that imports this file has its own.
    flags.DEFINE_string("workdir", None, "The workdir of a run.")
    flags.DEFINE_integer("iteration", None, "The iteration of the pairs or prompts.", lower_bound=0)
    flags.DEFINE_string("output", None, "Folder or file to write the pairs to.")
    flags.DEFINE_string("prompts", None, "File to write the prompts to.")
    try:
        workdir, iteration, output, prompts = parse(sys.argv if argv is None else argv, read_flags)
        import jax

        jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerator
        if output and iteration is not None:
            print(*export(workdir, iteration, output), sep="\n")
        elif prompts:
            print(write_prompts(workdir, prompts, iteration))
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
