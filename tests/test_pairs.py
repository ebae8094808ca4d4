"""Pairs that leave a run, and pairs that come from another sampler: formats, ids, and what is refused."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from runs import ROOT

from spin_jax import config, pairs, tiny
from spin_jax.data import parquet, sources
from spin_jax.data.chat import Chat
from spin_jax.data.official import OfficialChat
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Lengths
from spin_jax.selfplay import fingerprints

QUESTION = {"role": "user", "content": "1+2"}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def chat():
    return Chat(tiny.tokenizer(), [2], lengths=Lengths(12, 16))


@pytest.fixture
def workdir(chat, tmp_path):
    """Three training pairs in two files, and a held-out one."""
    folder = tmp_path / "run" / "iteration_1" / "pairs"
    folder.mkdir(parents=True)
    examples = [
        chat.example(n, [{"role": "user", "content": f"{n}+1"}, answer(str(n + 1))], Counter()) for n in range(4)
    ]
    made = [chat.pair(example, 0, np.array([40 + example.prompt_id, 2], np.int32)) for example in examples]
    for name, chosen in (
        ("train-00000-of-00002", made[:2]),
        ("train-00001-of-00002", made[2:3]),
        ("test-00000-of-00001", made[3:]),
    ):
        (folder / f"{name}.parquet").write_bytes(parquet.pairs_to_parquet(chosen))
    return tmp_path / "run"


# --- out -----------------------------------------------------------------------------------------


def test_the_published_format(workdir, tmp_path, chat):
    """What load_dataset makes of it has the splits and columns of UCLA-AGI/SPIN_iter0; we read it too."""
    out = tmp_path / "published"
    assert [line.rpartition("/")[2] for line in pairs.export(str(workdir), 1, str(out))] == [
        "train-00000-of-00001.parquet: 3 pairs",
        "test-00000-of-00001.parquet: 1 pairs",
    ]
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 1}
    assert loaded["train"].column_names == ["real", "generated"]
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    assert loaded["train"].features["real"] == datasets.List(message)
    assert loaded["train"][0] == {
        "real": [{"role": "user", "content": "0+1"}, answer("1")],
        "generated": [{"role": "user", "content": "0+1"}, answer(chat.decode([40]))],
    }
    again, counts = load_pairs(sources.load_rows(str(out), all_files=True), chat, path="x", vocab_size=272)
    assert (len(again), counts) == (4, {})


def test_fields_of_messages_are_exported(workdir, tmp_path, chat):
    """Both splits have the same columns, though only training messages have more fields than role and content."""
    folder, call = workdir / "iteration_1" / "pairs", {"function": {"name": "f", "arguments": {"x": None}}}
    asked = [QUESTION | {"tools": [{"name": "f"}]}, answer("") | {"tool_calls": [call]}]
    messages = [*asked, {"role": "tool", "content": "3", "name": "f"}, answer("3")]
    tokenizer = tiny.tokenizer()
    said = "message['content'] + (message.tool_calls | default('') | string)"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", said) + "{# tools, name #}"
    longer = Chat(tokenizer, [2])
    pair = longer.pair(longer.example(9, messages, Counter()), 0, np.array([40, 2], np.int32))
    (folder / "train-00001-of-00002.parquet").write_bytes(parquet.pairs_to_parquet([pair]))
    out = tmp_path / "published"
    pairs.export(str(workdir), 1, str(out))
    assert len({str(pq.read_schema(path)) for path in out.iterdir()}) == 1
    (last,) = list(sources.load_rows(str(out / "train-00000-of-00001.parquet")))[2:]
    (again,), _ = load_pairs([last], longer, path="x", vocab_size=272)
    assert again.real_messages == messages
    pairs.export(str(workdir), 1, str(tmp_path / "x.jsonl"))
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[2])["real"] == messages


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_file_of_the_training_pairs(suffix, workdir, tmp_path, chat):
    path = tmp_path / f"pairs.{suffix}"
    assert pairs.export(str(workdir), 1, str(path)) == [f"{path}: 3 pairs"]
    rows = sources.load_rows(str(path))
    assert [row["real"][0]["content"] for row in rows] == ["0+1", "1+1", "2+1"]
    assert len(load_pairs(rows, chat, path=str(path), vocab_size=272)[0]) == 3


def test_the_command(workdir, tmp_path):
    """Its line on each file, and exit code 2 where the pairs are not there, or not all of them."""

    def command(*arguments):
        arguments = [sys.executable, "-m", "spin_jax.pairs", f"--workdir={workdir}", *arguments]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    out = f"--output={tmp_path}/x.jsonl"
    assert command("--iteration=1", out) == (0, f"{tmp_path}/x.jsonl: 3 pairs\n", "")
    code, _, said = command("--iteration=0", out)
    assert code == 2
    assert "iteration_0/pairs holds no pairs: has iteration 0 been sampled?" in said


def test_pairs_that_are_not_there(workdir, tmp_path):
    (workdir / "iteration_1" / "pairs" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="has 1 of 2 files: sampling has not ended"):
        pairs.export(str(workdir), 1, str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError, match=r"config.json is missing: is .*run a run's\?"):
        pairs.write_prompts(str(workdir), str(tmp_path / "x"))
    (workdir / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json was not written by a run of spin_jax"):
        pairs.write_prompts(str(workdir), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_prompts_of_a_run_on_many_devices(workdir):
    """How the run spread over devices plays no role here: what is missing is only the start, which will answer."""
    c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")
    c.mesh.fsdp, c.sampling.tensor = 64, 16
    record = {"config": fingerprints.recorded(config.resolve(c))}
    (workdir / "config.json").write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match=r"start/model, which will answer in iteration 0, is not"):
        pairs.write_prompts(str(workdir), str(workdir / "x"))


# --- in ------------------------------------------------------------------------------------------


def by_ids(chat, **changes):
    """A row as another sampler writes it: ids, and no text of the answer."""
    example = chat.example(7, [QUESTION, answer("3")], Counter())
    row = {
        "prompt_id": 7,
        "real": example.messages,
        "prompt_tokens": example.prompt.tolist(),
        "real_tokens": example.real.tolist(),
        "generated_tokens": [40, 41, 2],
    }
    return {**row, **changes}


def load(chat, path, *rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_pairs(sources.load_rows(str(path)), chat, path=str(path), vocab_size=272, **options)


def test_answers_by_ids_make_the_pair_that_our_sampler_makes(chat, tmp_path):
    (pair,), counts = load(chat, tmp_path / "x.jsonl", by_ids(chat))
    ours = chat.pair(chat.example(7, [QUESTION, answer("3")], Counter()), 0, np.array([40, 41, 2], np.int32))
    assert parquet.pairs_to_parquet([pair]) == parquet.pairs_to_parquet([ours])
    assert not counts
    (cut,), _ = load(chat, tmp_path / "x.jsonl", by_ids(chat, generated_tokens=[40] * 20, real_tokens=[]))
    assert len(cut.prompt) + len(cut.generated) == 16
    assert cut.truncated
    np.testing.assert_array_equal(cut.real, ours.real)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": [4, 5]}, "prompt_tokens: not the ids of the prompt in real"),
        ({"real": [{**QUESTION, "content": "1+3"}, answer("4")]}, "prompt_tokens: not the ids of the prompt"),
        ({"real": [QUESTION, answer("4")]}, "real_tokens: not the ids of the answer in real"),
        ({"generated_tokens": []}, "generated_tokens is empty"),
        ({"generated_tokens": [272]}, "generated_tokens: a token id lies beyond"),
        ({"generated": [QUESTION]}, "generated: no assistant turn"),
        (
            {"generated": [{**QUESTION, "content": "?"}, answer("4")]},
            "real and generated do not answer the same prompt",
        ),
        ({"generated_tokens": None}, "no fields real and generated among prompt_id, real"),
    ],
)
def test_ids_of_another_prompt_or_tokenizer_are_refused(changes, message, chat, tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match=rf"x\.jsonl, row 2: {message}"):
        load(chat, path, by_ids(chat, prompt_id=1), by_ids(chat, **changes))
    _, counts = load(chat, path, by_ids(chat, prompt_id=1), by_ids(chat, **changes), bad_rows="drop", max_bad=0.5)
    assert counts == {"dropped: bad row": 1}


def test_prompts_too_long_are_dropped_with_their_ids(chat, tmp_path):
    longer = Chat(tiny.tokenizer(), [2])
    example = longer.example(0, [{"role": "user", "content": "1+2+3+4+5+6+7"}, answer("28")], Counter())
    row = by_ids(chat, real=example.messages, prompt_tokens=example.prompt.tolist())
    _, counts = load(chat, tmp_path / "x.jsonl", row | {"real_tokens": [30, 36, 2]}, by_ids(chat, prompt_id=1))
    assert counts == {"dropped: prompt too long": 1}


def test_pairs_whose_prompt_is_not_sampled_from_come_again_with_their_ids(tmp_path):
    """The released code trains on another prompt than it samples from: known by its text, and checked."""
    chat = OfficialChat(tiny.tokenizer(), [2], lengths=Lengths(40, 60))
    example = chat.example(3, [QUESTION, answer("3")], Counter())
    own = chat.pair(example, 0, np.array([40, 41, 2], np.int32))
    assert own.prompt.tolist() != chat.sampling_prompt(example).tolist()
    (tmp_path / "x.parquet").write_bytes(parquet.pairs_to_parquet([own]))
    rows = list(sources.load_rows(str(tmp_path)))
    (again,), _ = load_pairs(rows, chat, path="x", vocab_size=272)
    assert parquet.pairs_to_parquet([again]) == parquet.pairs_to_parquet([own])
    for bad in ({"prompt_tokens": rows[0]["prompt_tokens"][1:]}, {"generated": None}):
        with pytest.raises(ValueError, match="row 1: prompt_tokens: not the ids of the prompt in real"):
            load_pairs([rows[0] | bad], chat, path="x", vocab_size=272)


# --- vLLM ----------------------------------------------------------------------------------------


@pytest.fixture
def vllm(tmp_path):
    """vllm(*arguments, answers, **environment) → the finished script, in an environment without ours."""
    (tmp_path / "site").mkdir()
    shutil.copy(ROOT / "tests" / "helpers" / "vllm_stub.py", tmp_path / "site" / "vllm.py")
    script = ROOT / "launch" / "vllm_answers.py"
    assert "spin_jax import" not in script.read_text()
    assert "import spin_jax" not in script.read_text()

    def start(*arguments, answers=(), **environment):
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        return subprocess.run(
            [sys.executable, "-S", str(script), *arguments],  # no site-packages: the standard library alone
            env={
                **os.environ,
                "PYTHONPATH": str(tmp_path / "site"),
                "VLLM_STUB": str(tmp_path / "answers.json"),
                **environment,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return start


def prompts_file(path, chat, model, samples=1):
    row = by_ids(chat)
    del row["generated_tokens"]
    how = {
        "prompts_of_iteration": 1,
        "model": str(model),
        "revision": None,
        "seed": 43,
        "temperature": 0.7,
        "top_k": None,
        "top_p": 0.9,
        "stop_token_ids": [2],
    }
    path.write_text("".join(json.dumps(line) + "\n" for line in (how, {**row, "samples": samples, "max_tokens": 3})))
    return row


def test_the_script_writes_pairs_that_load(vllm, chat, tmp_path):
    (tmp_path / "SHA256SUMS").write_text("")
    row = prompts_file(tmp_path / "prompts.jsonl", chat, tmp_path)
    for answered, kept in (([40, 41, 2], [40, 41, 2]), ([40, 41, 42, 43], [40, 41, 42])):
        done = vllm(
            "--prompts=prompts.jsonl",
            "--output=pairs.jsonl",
            '--engine={"tensor_parallel_size": 2}',
            answers=[[row["prompt_tokens"], answered]],
        )
        assert done.returncode == 0, done.stderr
        assert "pairs.jsonl: 1 pairs for iteration 1" in done.stdout
        longest = len(row["prompt_tokens"]) + 3
        engine = {"tensor_parallel_size": 2, "seed": 43, "max_model_len": longest}
        assert f"LLM {json.dumps(engine)}" in done.stdout
        rows = sources.load_rows(str(tmp_path / "pairs.jsonl"))
        (pair,), _ = load_pairs(rows, chat, path="x", vocab_size=272)
        assert (pair.prompt_id, pair.generated.tolist()) == (7, kept)
        assert pair.truncated == (kept[-1] != 2)


def test_the_script_writes_each_of_several_answers(vllm, chat, tmp_path):
    (tmp_path / "SHA256SUMS").write_text("")
    row = prompts_file(tmp_path / "prompts.jsonl", chat, tmp_path, samples=3)
    both, generated = ["--prompts=prompts.jsonl", "--output=pairs.jsonl"], [[40, 2], [41, 42, 2], [40, 2]]
    done = vllm(*both, answers=[[row["prompt_tokens"], ids] for ids in generated])
    assert "pairs.jsonl: 3 pairs for iteration 1" in done.stdout, done.stderr
    loaded, _ = load_pairs(sources.load_rows(str(tmp_path / "pairs.jsonl")), chat, path="x", vocab_size=272)
    assert [(pair.prompt_id, pair.sample_id) for pair in loaded] == [(7, 0), (7, 1), (7, 2)]
    assert [pair.generated.tolist() for pair in loaded] == generated
    done = vllm(*both, answers=[[row["prompt_tokens"], [40, 2]]])
    assert "prompt_id 7: vLLM gave 1 answers, and 3 are wanted" in done.stderr


def test_what_the_script_refuses(vllm, chat, tmp_path):
    (tmp_path / "SHA256SUMS").write_text("")
    row = prompts_file(tmp_path / "prompts.jsonl", chat, tmp_path)
    both = ["--prompts=prompts.jsonl", "--output=pairs.jsonl"]
    answers = [[row["prompt_tokens"], [40, 41]]]
    (tmp_path / "other.jsonl").write_text('{"real": []}\n{}\n')
    for arguments, reason, message in (
        (both, "abort", "prompt_id 7: vLLM did not finish the answer (abort)"),
        (both, "stop", "prompt_id 7: the answer ends without its stop token"),
        (["--prompts=other.jsonl", both[1]], "", "other.jsonl is no file of prompts"),
        ([both[0], "--output=pairs.parquet"], "", "a name that ends in .jsonl is wanted"),
    ):
        done = vllm(*arguments, answers=answers, VLLM_STUB_REASON=reason)
        assert done.returncode in (1, 2)
        assert message in done.stderr
        assert not (tmp_path / "pairs.jsonl").exists()
