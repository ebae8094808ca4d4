"""Which rows are held out."""

import copy
import dataclasses
import json
import runpy

import hub_cache
import jax
import pytest
import reward_models
from runs import ROOT

from spin_jax import config, tiny
from spin_jax.data import parquet
from spin_jax.errors import ConfigError
from spin_jax.models import cost, lora
from spin_jax.models.params import params_on
from spin_jax.report.numbers import START
from spin_jax.selfplay import announce, fingerprints
from spin_jax.selfplay.algorithm import check
from spin_jax.selfplay.fitting import Fitting
from spin_jax.selfplay.prepare import locked, prepare


@pytest.fixture
def tiny_config():
    c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")
    c.train.warmup_ratio = c.sft.warmup_ratio = 0.0  # a single step of 30 rows trains something
    return c


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(examples):
    return {example.messages[0]["content"] for example in examples}


def test_held_out_rows_of_their_own(tiny_config, tmp_path):
    """eval.path gives them; their prompts are in no training data, and ids are unique."""
    rows = tiny.problems()
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", rows[:40])
    tiny_config.eval.path = write_rows(tmp_path / "test.jsonl", rows[30:60])
    prepared = prepare(config.resolve(tiny_config), None)
    (train,) = prepared.datasets
    assert prompts(train) == {row["question"] for row in rows[:30]}
    assert prompts(prepared.held_out) == {row["question"] for row in rows[30:60]}
    ids = [example.prompt_id for example in (*train, *prepared.held_out)]
    assert len(set(ids)) == len(ids)
    tiny_config.eval.limit = 7
    assert len(prepare(config.resolve(tiny_config), None).held_out) == 7


def test_nothing_left_to_train_on(tiny_config, tmp_path):
    tiny_config.data.path = tiny_config.eval.path = write_rows(tmp_path / "train.jsonl", tiny.problems()[:20])
    with pytest.raises(ValueError, match="nothing is left to train on"):
        prepare(config.resolve(tiny_config), None)


ENDLESS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + END }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_answers_without_a_stop_token(tiny_config, tmp_path):
    """An error where most are, which says what to set; a note where some are. Answers that were cut do not count."""
    rows = tiny.problems()[:20]
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", rows)
    tiny_config.data.chat_template = ENDLESS.replace(" + END", "")
    message = (
        r"train.jsonl: 20 of 20 human answers end in no stop token \(</s>\).* Set data.chat_template .* data.min_ended"
    )
    with pytest.raises(ValueError, match=message):
        prepare(config.resolve(tiny_config), None)
    tiny_config.data.min_ended = 0.0
    (note,) = prepare(config.resolve(tiny_config), None).notes
    assert "20 of 20 human answers end in no stop token (</s>)" in note
    tiny_config.data.min_ended = 0.5
    some = "(eos_token if m.content != '" + rows[0]["answer"] + "' else '')"
    tiny_config.data.chat_template = ENDLESS.replace("END", some)
    few = sum(row["answer"] == rows[0]["answer"] for row in rows)
    (note,) = prepare(config.resolve(tiny_config), None).notes
    assert f"{few} of 20 human answers end in no stop token" in note
    tiny_config.data.path = write_rows(tmp_path / "long.jsonl", [row | {"answer": "1" * 99} for row in rows])
    (note,) = prepare(config.resolve(tiny_config), None).notes
    assert "cut: answer too long: 20" in note


def test_steps_to_profile_that_no_iteration_has(tiny_config):
    """180 pairs, and then 360 with the ones before, in batches of 64."""
    tiny_config.logging.profile_steps = (3, 5)
    prepare(config.resolve(tiny_config), None)
    tiny_config.logging.profile_steps = (3, 6)
    with pytest.raises(ValueError, match=r"profile_steps=\(3, 6\): iterations have at most 6 steps; choose from"):
        prepare(config.resolve(tiny_config), None)


def test_the_memory_of_adapters_counts_the_weights_under_them(tiny_config):
    """By hand: a layer of D = 1024 has 12.6M weights in its matrices, of 4 bytes, or of 1/2 + 1/16 as nf4.

    The test has 8 devices, which share them; what is said has two decimals."""
    tiny_config.model.architecture.update(hidden_size=1024, intermediate_size=3072, num_hidden_layers=64, head_dim=256)
    tiny_config.train.update(lora_rank=1, remat="full")
    heads = 2 * (4 + 2) * 256  # of queries, keys, values and outputs
    matrices = 64 * 1024 * (heads + 3 * 3072) / len(jax.devices())

    def said():
        prepared = prepare(config.resolve(tiny_config), None)
        (line,) = [line for line in announce.run_overview(prepared, 0).splitlines() if line.startswith("memory")]
        return float(line.split()[1])

    whole = said()
    assert whole == pytest.approx(4 * matrices / 2**30, rel=0.05)
    tiny_config.train.frozen_dtype = "nf4"
    assert whole - said() == pytest.approx((4 - 9 / 16) * matrices / 2**30, abs=0.011)


def test_the_disk_that_iterations_to_come_need(tiny_config):
    """By hand, of P float32 numbers: the start, two iterations, and the control of each have a checkpoint.

    Of the control there is one export. An iteration that is done counts no more.
    """
    tiny_config.model.architecture.update(hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, head_dim=256)
    prepared = prepare(config.resolve(tiny_config), None)
    weights = 4 * cost.all_params(prepared.model.config) / 2**30
    for done, count in ((0, 2 * 3 + 3), (1, 2 + 2), (2, 0)):
        (line,) = [line for line in announce.run_overview(prepared, done).splitlines() if line.startswith("disk")]
        need, unit, _, left = line.split()[1:5]
        assert (unit, left) == ("GiB", str(2 - done))
        assert float(need) == pytest.approx(count * weights, rel=0.02, abs=0.006)


def test_the_token_that_ends_answers_is_said(tiny_config):
    tiny_config.data.chat_template = ENDLESS.replace("END", "'<|system|>'")
    prepared = prepare(config.resolve(tiny_config), None)
    assert prepared.notes == [
        "<|system|> is a stop token: the chat template ends answers with it, and the checkpoint names another"
    ]
    assert all(example.real[-1] == 3 for example in (*prepared.datasets[0], *prepared.held_out))


def test_a_template_without_a_generation_prompt_is_said(tiny_config):
    tiny_config.data.chat_template = ENDLESS.replace("END", "eos_token").partition("{% if")[0]
    prepared = prepare(config.resolve(tiny_config), None)
    (note,) = prepared.notes
    assert "ignores add_generation_prompt: '<|assistant|>' begins each answer" in note
    assert all(example.real[0] == 5 for example in prepared.held_out)


def test_rows_as_the_model_sees_them(tiny_config, tmp_path):
    """Three of them, for --check: where the answer begins, the tokens that are trained on, and how it ends."""
    rows = [{"question": "1+2", "answer": "3"}, *[{"question": "é", "answer": "1" * 99}] * 2, *tiny.problems()[:18]]
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", rows)
    tiny_config.eval.fraction = 0.0
    shown = announce.example_rows(prepare(config.resolve(tiny_config), None)).splitlines()
    assert shown[:4] == [
        "row with prompt_id 0",
        "  prompt   6 tokens: '<|user|>1+2</s><|assistant|>'",
        "  answer   2 tokens, which are trained on: '3' '</s>'",
        "  its end  '</s>' (id 2), a stop token",
    ]
    assert len(shown) == 12
    tiny_config.data.path = write_rows(tmp_path / "long.jsonl", rows[1:3])
    *_, answer, end = announce.example_rows(prepare(config.resolve(tiny_config), None)).splitlines()
    assert answer.endswith("'1' '1'")
    assert end == "  its end  '1' (id 22), NO stop token"


def test_the_check_of_an_official_run(tiny_config, tmp_path, capfd):
    """The table of lengths has no limits, and official wants the limit of prompts below that of all."""
    tiny_config.official = True
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", tiny.problems()[:40])
    check(tiny_config)
    said = capfd.readouterr().out
    assert "answers cut at lengths.max_length=" in said
    assert said.endswith("everything that can be checked is in order\n")


def test_turns_that_sft_trains_on(tiny_config, tmp_path):
    """Shown by --check, in all datasets; a run that trains on other turns is another one, and its data are the same."""
    said = [{"role": role, "content": text} for role, text in (("user", "1+2"), ("assistant", "3"))]
    rows = [{"messages": [*said, {"role": "user", "content": str(n)}, said[1]]} for n in range(9)]
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", rows)
    tiny_config.eval.fraction = 0.1
    last = prepare(config.resolve(tiny_config), None)
    tiny_config.sft.turns = "all"
    both = prepare(config.resolve(tiny_config), None)
    began = {"config": fingerprints.recorded(last.config), **last.identity}
    assert fingerprints.differences(both.config, both.identity, began) == {"sft.turns": ("last", "all")}
    del began["config"]["sft"]["turns"]  # a run that began before there was this key
    assert fingerprints.differences(last.config, last.identity, began) == {}
    assert [example.earlier for example in last.datasets[0]] == [None] * len(last.datasets[0])
    assert all(example.earlier.tolist() == [6, 7] for example in both.datasets[0])
    assert announce.example_rows(last, 1).splitlines() == [
        line for line in announce.example_rows(both, 1).splitlines() if "earlier" not in line
    ]
    assert "  earlier  2 tokens, which SFT trains on too: '3' '</s>'" in announce.example_rows(both)
    for prepared, tokens in ((last, 2), (both, 4)):
        parts = Fitting(prepared, None, None).sft_phase(START, dict).collate(prepared.datasets[0])
        assert sum(part.lengths.sum() for part in parts) == tokens * len(prepared.datasets[0])
    for section, key, value in (("data", "path", None), ("", "official", True)):
        wrong = copy.deepcopy(tiny_config)
        wrong.selfplay.pairs = "pairs.jsonl"
        (wrong[section] if section else wrong)[key] = value
        with pytest.raises(ConfigError, match=r"sft.turns='all' needs the conversations of data.path"):
            config.resolve(wrong)


def test_no_turn_on_the_way_answers_a_held_out_prompt(tiny_config, tmp_path):
    said = [{"role": role, "content": text} for role, text in (("user", "1+2"), ("assistant", "3"))]
    more = [{"role": role, "content": text} for role, text in (("user", "2+2"), ("assistant", "4"))]
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", [{"messages": m} for m in (said + more, more + said)])
    tiny_config.eval.path = write_rows(tmp_path / "test.jsonl", [{"messages": said}])
    tiny_config.lengths.max_prompt = 32
    for turns, expected in (("last", [0, 1]), ("all", [1])):
        tiny_config.sft.turns = turns
        (train,) = prepare(config.resolve(tiny_config), None).datasets
        assert [example.prompt_id for example in train] == expected


def test_other_held_out_rows_are_another_run(tiny_config, tmp_path):
    """Their file may move; their content is part of what the run is."""
    rows = tiny.problems()
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", rows[:40])
    names = []
    for name, chosen in (("a.jsonl", rows[50:60]), ("b.jsonl", rows[50:60]), ("c.jsonl", rows[60:70])):
        tiny_config.eval.path = write_rows(tmp_path / name, chosen)
        names.append(prepare(config.resolve(tiny_config), None).identity["fingerprints"]["held-out data"])
    assert names[0] == names[1] != names[2]


def test_equal_prompts_are_held_out_together(tiny_config, tmp_path):
    """Five prompts with twenty answers each: one prompt is held out, and trained on by no dataset."""
    questions = [f"{n}+1" for n in range(5)]
    rows = [{"question": question, "answer": str(n)} for n in range(20) for question in questions]
    path = write_rows(tmp_path / "a.jsonl", rows)
    tiny_config.data.path = f"{path},{write_rows(tmp_path / 'b.jsonl', rows[:7])}"
    prepared = prepare(config.resolve(tiny_config), None)
    (held_out,) = prompts(prepared.held_out)
    assert len(prepared.held_out) == 20
    for dataset, size in zip(prepared.datasets, (80, 7 - questions[:2].count(held_out) - 1), strict=True):
        assert prompts(dataset) == {*questions} - {held_out}
        assert len(dataset) == size
    assert f"{path}: rows with the prompt of an earlier row: 95" in prepared.notes


def test_a_mixture_by_weight(tiny_config, tmp_path):
    """30 rows of which 20 and 10 are of each file; ids are unique, and held-out prompts are in neither part."""
    rows = tiny.problems()
    a, b = (write_rows(tmp_path / f"{name}.jsonl", rows[i : i + 40]) for name, i in (("a", 0), ("b", 40)))
    tiny_config.data.path, tiny_config.data.limit = f"2*{a}+1.0*{b}", 30
    prepared = prepare(config.resolve(tiny_config), None)
    (train,) = prepared.datasets
    both = [*train, *prepared.held_out]
    assert (len(train), len(prepared.held_out)) == (27, 3)
    assert len({example.prompt_id for example in both}) == len(prompts(both)) == 30
    questions = [row["question"] for row in rows]
    of_a = [example for example in both if example.messages[0]["content"] in questions[:40]]
    assert len(of_a) == 20
    assert all(questions[example.prompt_id] == example.messages[0]["content"] for example in of_a)
    assert prompts(both) <= {*questions[:80]}
    assert prepared.notes == [
        f"{a}: 20 of 40 rows, 66.7% of the mixture's 30",
        f"{b}: 10 of 40 rows, 33.3% of the mixture's 30",
    ]
    again = prepare(config.resolve(tiny_config), None)
    assert [e.prompt_id for e in again.datasets[0]] == [e.prompt_id for e in train]

    # Each iteration can have its own; what a run that goes on compares are the rows, and not the text of data.path.
    tiny_config.data.path = f"4*{a}+2*{b},{b}"
    other = prepare(config.resolve(tiny_config), None)
    assert [e.prompt_id for e in other.datasets[0]] == [e.prompt_id for e in train]
    assert prompts(other.datasets[1]) <= {*questions[40:80]}
    began = {"config": fingerprints.recorded(prepared.config), **prepared.identity}
    assert fingerprints.differences(other.config, other.identity, began).keys() == {"fingerprints.data 1"}
    tiny_config.data.path = f"1*{a}+2*{b}"
    other = prepare(config.resolve(tiny_config), None)
    assert fingerprints.differences(other.config, other.identity, began).keys() == {
        "fingerprints.data",
        "fingerprints.held-out data",
    }


def test_errors_of_a_mixture_name_the_file_and_the_row(tiny_config, tmp_path):
    a, b = (write_rows(tmp_path / f"{name}.jsonl", tiny.problems()[:40]) for name in "ab")
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text() + '{"question": "1+2"}\n')
    tiny_config.data.path, tiny_config.data.limit = f"1*{a}+1.025*{b}", None  # 40 rows and 41: all
    with pytest.raises(ValueError, match=r"b\.jsonl.*41.*no field"):
        prepare(config.resolve(tiny_config), None)
    write_rows(tmp_path / "a.jsonl", [{**row, "prompt_id": 2**40} for row in tiny.problems()[:1]])
    tiny_config.data.path = f"1*{a}+1*{b}"
    with pytest.raises(ValueError, match=r"a\.jsonl: with several datasets, each prompt_id must be below"):
        prepare(config.resolve(tiny_config), None)


def test_a_run_that_cannot_learn(tiny_config, tmp_path):
    """An iteration of one step, whose learning rate the warm-up makes 0, is refused; few steps are noted."""
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", tiny.problems()[:40])
    tiny_config.train.warmup_ratio = 0.1
    with pytest.raises(ValueError, match=r"train: the learning rate is 0 in the only optimizer step, .*batch_size"):
        prepare(config.resolve(tiny_config), None)
    tiny_config.train.batch_size = 10  # 36 pairs are 4 steps, and 8 with those of the iteration before
    tiny_config.sft.warmup_ratio = 0.2
    notes = [note for note in prepare(config.resolve(tiny_config), None).notes if "learning rate" in note]
    assert [note.partition(" optimizer")[0] for note in notes] == [
        "sft: the learning rate is 0 in 1 of 2",
        "train: the learning rate is 0 in 1 of 4",
    ]


def test_given_pairs_of_a_split(tiny_config, tmp_path):
    """selfplay.pairs_split chooses in a local folder too; a run's own folder of pairs is read whole."""
    pairs = [
        {
            "real": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
            "generated": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": "9"}],
        }
        for row in tiny.problems()[:28]
    ]
    for split, chosen in (("train", pairs[:20]), ("test", pairs[20:])):
        write_rows(tmp_path / f"{split}-00000-of-00001.jsonl", chosen)
    tiny_config.data.path = None
    tiny_config.sft.epochs, tiny_config.sft.control, tiny_config.selfplay.iterations = 0, False, 1
    tiny_config.selfplay.pairs = str(tmp_path)
    for split, count in (("train", 20), ("test", 8), ("train+test", 28)):
        tiny_config.selfplay.pairs_split = split
        assert len(prepare(config.resolve(tiny_config), None).given[0]) == count
    prepared = prepare(config.resolve(tiny_config), None)
    folder = tmp_path / "run" / "pairs"
    folder.mkdir(parents=True)
    train, test = prepared.given_pairs(0)
    assert {pair.prompt_id for pair in test} == {example.prompt_id for example in prepared.held_out}
    for split, chosen in (("train", train), ("test", test)):
        (folder / f"{split}-00000-of-00001.parquet").write_bytes(parquet.pairs_to_parquet(chosen))
    tiny_config.selfplay.pairs, tiny_config.selfplay.pairs_split = str(folder), "train"
    assert len(prepare(config.resolve(tiny_config), None).given[0]) == 28


def test_an_official_run_has_no_answers_of_the_start(tiny_config, tmp_path):
    tiny_config.official, tiny_config.loss.name = True, "tspin"
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", tiny.problems()[:40])
    with pytest.raises(ValueError, match="official cuts a prompt by its answer, so the role start"):
        prepare(config.resolve(tiny_config), None)


@pytest.mark.parametrize("number", ["margin", "accuracy", "loss"])
def test_the_best_by_held_out_pairs_that_are_not_given(number, tiny_config, tmp_path):
    """Refused until one of the given pairs has a held-out prompt; nll needs only held-out rows."""
    rows, given = tiny.problems()[:40], tmp_path / "given.jsonl"
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "9"} for row in rows]
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", rows[:30])
    tiny_config.eval.path = write_rows(tmp_path / "test.jsonl", rows[30:])
    tiny_config.selfplay.pairs, tiny_config.checkpoint.best = f"1={write_rows(given, pairs[:30])}", number
    with pytest.raises(ValueError, match=f"best='{number}' needs held-out pairs, .* none for iteration 1: add"):
        prepare(config.resolve(tiny_config), None)
    write_rows(given, pairs[:31])
    assert len(prepare(config.resolve(tiny_config), None).given_pairs(1)[1]) == 1
    write_rows(given, pairs[:30])
    tiny_config.checkpoint.best = "nll"
    prepare(config.resolve(tiny_config), None)


@pytest.mark.parametrize("kind", ["default", "dynamic", "longrope"])
def test_texts_beyond_the_positions(kind, tiny_config, tmp_path, hf_model_dir):
    """They are an error where RoPE would change for the whole text, and a note elsewhere."""
    factors = [1.0, 1.1, 1.3, 1.6]
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": factors, "long_factor": factors} if kind == "longrope" else {}
    sizes = {"max_position_embeddings": 256 if kind == "longrope" else 64, "hidden_size": 32, "head_dim": None}
    sizes |= {"original_max_position_embeddings": 64} if kind == "longrope" else {}
    family = "phi3" if kind == "longrope" else "llama"
    tiny_config.model.path = str(hf_model_dir(family, rope_parameters=rope, **sizes)[0])
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", tiny.problems()[:20])
    tiny_config.lengths.max_length = 65
    exceeds = "lengths.max_length=65 exceeds the model's 64 positions"
    if kind == "default":
        assert exceeds in prepare(config.resolve(tiny_config), None).notes
        return
    with pytest.raises(ValueError, match=rf"{exceeds}, and its RoPE \({kind}\) rotates all tokens"):
        prepare(config.resolve(tiny_config), None)
    tiny_config.lengths.max_length = 64
    assert exceeds not in prepare(config.resolve(tiny_config), None).notes


def test_the_template_of_a_reward_model_sees_the_date_of_the_run(tiny_config, tmp_path):
    """And a note says that it reads fewer tokens than the run may make."""
    reward_models.write(tmp_path / "judge", "llama")
    (tmp_path / "judge" / "chat_template.jinja").write_text("{{ strftime_now('%d.%m.%Y') }}{{ messages[-1].content }}")
    tiny_config.data.path = write_rows(tmp_path / "rows.jsonl", tiny.problems()[:30])
    tiny_config.data.today, tiny_config.selfplay.scorer = "2020-01-02", str(tmp_path / "judge")
    tiny_config.lengths.max_length = 300
    found = prepare(config.resolve(tiny_config), None)
    tokens = found.judge.scorer.tokens([{"role": "user", "content": "q"}, {"role": "assistant", "content": " yes"}])
    assert tiny.tokenizer().decode(tokens) == "02.01.2020 yes"
    assert any("lengths.max_length=300, and selfplay.scorer reads 256 tokens" in note for note in found.notes)
    tiny_config.lengths.max_length = 256
    assert not any("selfplay.scorer reads" in note for note in prepare(config.resolve(tiny_config), None).notes)


def test_a_penalty_and_scores_that_do_not_have_it(tiny_config, tmp_path):
    """The scores of a run of its own have it already, and are read."""
    row = {"prompt": "1+2+3", "chosen": "6", "rejected": "7", "score": 0.5}
    tiny_config.selfplay.update({"scorer": "spin_jax.tiny:wins", "length_penalty": 0.1, "iterations": 1})
    tiny_config.selfplay.pairs = write_rows(tmp_path / "scored.jsonl", [row])
    with pytest.raises(ValueError, match=r"scored.jsonl: selfplay.length_penalty=0.1 changes no score that the pairs"):
        prepare(config.resolve(tiny_config), None)
    tiny_config.selfplay.pairs = write_rows(tmp_path / "plain.jsonl", [{**row, "score": None}])
    found = prepare(config.resolve(tiny_config), None)
    (tmp_path / "pairs").mkdir()
    scored = [dataclasses.replace(pair, score=0.25) for pair in found.given[0]]
    (tmp_path / "pairs" / "train-00000-of-00001.parquet").write_bytes(parquet.pairs_to_parquet(scored))
    tiny_config.selfplay.pairs = str(tmp_path / "pairs")
    assert [pair.score for pair in prepare(config.resolve(tiny_config), None).given[0]] == [0.25]


def write_adapters(directory, model, seed, mesh):
    shapes = lora.adapters_on(params_on(mesh, model.config), 2, ["wq"])
    lora.write_peft(directory, lora.init(shapes, jax.random.key(seed)), model.config, scale=1.0, base="org/base")


def test_a_run_keeps_the_commits_of_adapters_and_reward_model(tiny_config, tiny_model, tiny_dir, tmp_path, monkeypatch):
    """Their branches move on, and a run that continues reads what it began with; a new run reads what is there now."""
    cache, commits = tmp_path / "cache", ["a" * 40, "b" * 40]
    hub_cache.use(cache, monkeypatch)

    def publish(number):
        write_adapters(tmp_path / f"lora_{number}", tiny_model, number, tiny_model.mesh)
        reward_models.write(tmp_path / f"judge_{number}", "llama", initializer_range=0.1 + number / 10)
        for name in ("lora", "judge"):
            hub_cache.publish(cache, f"org/{name}", commits[number], tmp_path / f"{name}_{number}")

    def prepared(scorer="org/judge@main", workdir=tmp_path / "run"):
        tiny_config.model.update({"path": str(tiny_dir), "adapters": "org/lora"})
        tiny_config.data.path = write_rows(tmp_path / "rows.jsonl", tiny.problems()[:30])
        tiny_config.sft.epochs, tiny_config.selfplay.scorer = 0, scorer
        return prepare(config.resolve(tiny_config), workdir and str(workdir))

    publish(0)
    first = prepared()
    assert first.hub_names == {"model.adapters": f"org/lora@{commits[0]}", "selfplay.scorer": f"org/judge@{commits[0]}"}
    with locked(first):
        publish(1)
    again = prepared()
    assert (again.hub_names, again.identity) == (first.hub_names, first.identity)

    new = prepared(workdir=None)
    assert new.hub_names == {key: name.replace(commits[0], commits[1]) for key, name in first.hub_names.items()}
    ours, theirs = (run.identity["fingerprints"] for run in (new, first))
    assert {key for key in ours if ours[key] != theirs[key]} == {"weights", "reward model"}
    # The same model in a directory, and the newer one under another name.
    moved = prepared(scorer=str(tmp_path / "judge_0"))
    assert (moved.hub_names, moved.identity) == ({"model.adapters": f"org/lora@{commits[0]}"}, first.identity)
    with pytest.raises(ValueError, match=r"holds another run: there fingerprints\.reward model is"):
        prepared(scorer="org/judge")
