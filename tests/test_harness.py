"""Our model in lm-evaluation-harness, against the harness's own `hf` backend on the same checkpoint."""

import copy
import dataclasses
import itertools
import json
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from runs import ROOT

pytest.importorskip("lm_eval")

from spin_jax import harness
from spin_jax.models import loading
from spin_jax.sampling.generate import answer
from spin_jax.sampling.next_token import Sampling, prompt_keys
from spin_jax.sampling.slots import decode, prefill
from spin_jax.training.log_probs import score_tokens

GSM8K = """
task: small_gsm8k
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 5
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: ["(?s).*#### "]}}
generation_kwargs: {{until: ["Question:", "</s>", "e"], do_sample: false, temperature: 0.0, max_gen_toks: 24}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter: [{{function: regex, group_select: -1, regex_pattern: "(-?[0-9]+)"}}, {{function: take_first}}]
metadata: {{version: 1.0}}
"""

CHOICES = """
task: small_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}} "
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

LAST_WORD = """
task: small_last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{end}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

TEXTS = """
task: small_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1.0}}
"""

TASKS = ("small_gsm8k", "small_choices", "small_last_word", "small_texts")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, gsm8k):
    """Task files and their data: GSM8K's own rows, and what can be made of them."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    write(folder / "train.jsonl", gsm8k[:20])
    write(folder / "test.jsonl", gsm8k[20:30])
    sentences = [row["answer"].splitlines()[0] for row in gsm8k[:60]]
    choices = []
    for number, row in enumerate(gsm8k[:24]):
        own = [sentences[number], *rng.sample(sentences[24:], rng.randint(1, 3)), "yes", "no"]
        choices.append(
            {"question": row["question"][: rng.choice([20, 90, 900])], "choices": own, "label": number % 3}
        )
    write(folder / "choices.jsonl", choices)
    texts = []
    for row in gsm8k[:12]:
        *start, end = row["question"].split(" ")
        texts.append(
            {"start": " ".join(start), "end": f" {end}", "text": row["question"] + "\n" + row["answer"]}
        )
    write(folder / "texts.jsonl", [{"start": "", "end": "Hello", "text": "x"}, *texts])
    for name, text in zip(TASKS, (GSM8K, CHOICES, LAST_WORD, TEXTS), strict=True):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


def results(asked, folder, names=TASKS, **options):
    """(numbers, each task's raw responses) of a model that the harness takes."""
    from lm_eval import evaluator

    tasks = harness.load_tasks(names, include_path=str(folder))
    found = evaluator.evaluate(
        asked, tasks.loaded, bootstrap_iters=0, log_samples=True, fewshot_as_multiturn=True, **options
    )
    raw = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda s: (s["doc_id"], s["filter"]))]
        for name, samples in found["samples"].items()
    }
    return harness.numbers(found), raw


def compilations():
    return score_tokens._cache_size(), prefill._cache_size(), decode._cache_size()


@pytest.fixture(scope="module")
def with_bos(tiny_dir, tmp_path_factory):
    """`tiny_dir`, its tokenizer one that begins texts with BOS."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(tiny_dir, folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    begins = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    text, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*begins, text],
        "pair": [*begins, text, second],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("bos", [False, True])
def test_numbers_are_those_of_the_hf_backend(tiny_dir, with_bos, mesh, folder, bos):
    """With BOS and without, in the chat format and not; contexts longer than the model takes (256), too."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    directory = str(with_bos if bos else tiny_dir)
    model = loading.load(directory, mesh=mesh)
    assert (model.tokenizer("a")["input_ids"][0] == model.tokenizer.bos_token_id) == bos
    theirs = HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=8)
    expected, raw = results(theirs, folder, apply_chat_template=bos)
    before = compilations()
    numbers, own = results(harness.HarnessModel(model), folder, apply_chat_template=bos)
    assert all(after - b <= 3 for after, b in zip(compilations(), before, strict=True))
    assert numbers.keys() == expected.keys()
    for name, value in expected.items():
        wanted = pytest.approx(value, rel=1e-4) if "perplexity" in name or "bits" in name else value
        assert numbers[name] == wanted, name
    assert own["small_gsm8k"] == raw["small_gsm8k"]  # every answer, to the letter
    for name in ("small_choices", "small_last_word"):
        for mine, others in zip(own[name], raw[name], strict=True):
            for [(logp, greedy)], [(value, likeliest)] in zip(mine, others, strict=True):
                assert logp == pytest.approx(value, rel=1e-4)
                assert greedy == likeliest


def test_exact_match(tiny_model, tmp_path, gsm8k):
    """Half of the references are what the model says: half are matched, and not none."""
    asked = harness.HarnessModel(tiny_model)
    questions = [row["question"][:60] for row in gsm8k[:8]]
    how = {"until": ["zz"], "max_gen_toks": 6}
    said = asked.generate_until([SimpleNamespace(args=(question, how)) for question in questions])
    rows = [
        {"question": question, "answer": text if number % 2 else "~"}
        for number, (question, text) in enumerate(zip(questions, said, strict=True))
    ]
    write(tmp_path / "test.jsonl", rows)
    (tmp_path / "said.yaml").write_text(f"""
task: said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/test.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [zz], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    assert harness.run_tasks(tiny_model, ["said"], include_path=str(tmp_path)) == {"said/exact_match": 0.5}
    limited = harness.run_tasks(tiny_model, ["said"], include_path=str(tmp_path), limit=3)
    assert limited == {"said/exact_match": pytest.approx(1 / 3)}


def test_what_is_sampled_greedily_is_the_likeliest(tiny_model):
    prompt = list(range(20, 40))
    [drawn] = answer(
        tiny_model,
        [np.array(prompt, np.int32)],
        prompt_keys(0, 0, [0]),
        Sampling(12, 0.0),
        stop_tokens=(),
        limits=[12],
    )
    other = [*drawn[:-1].tolist(), (int(drawn[-1]) + 1) % 272]
    requests = [((), prompt, continuation) for continuation in (drawn.tolist(), other, drawn.tolist()[:1])]
    scored = harness.HarnessModel(tiny_model)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in scored] == [True, False, True]


def test_eight_devices_are_one(tiny_dir, tiny_model, mesh8, folder):
    names = ("small_gsm8k", "small_choices")
    one, raw = results(harness.HarnessModel(tiny_model), folder, names)
    eight, own = results(harness.HarnessModel(loading.load(str(tiny_dir), mesh=mesh8)), folder, names)
    assert eight == one
    assert own["small_gsm8k"] == raw["small_gsm8k"]
    flat = [
        np.array(
            [[logp for [(logp, _)] in document] for document in found["small_choices"] if len(document) == 4]
        )
        for found in (own, raw)
    ]
    np.testing.assert_allclose(*flat, rtol=1e-5)


def test_batches_change_nothing_but_shapes(tiny_model, gsm8k):
    """Small batches, packed otherwise, in several classes of length; contexts are shared, or not."""
    requests = [
        ((), list(range(10, 10 + length)), list(range(40, 40 + own)))
        for length in (1, 2, 5, 30, 120, 250)
        for own in (1, 2, 7)
    ]
    requests += [((), list(range(100, 130)), [token]) for token in range(40)]
    large = harness.HarnessModel(tiny_model)._loglikelihood_tokens(requests)
    small = harness.HarnessModel(tiny_model, batch_size=1)._loglikelihood_tokens(requests[::-1])[::-1]
    np.testing.assert_allclose([logp for logp, _ in small], [logp for logp, _ in large], rtol=1e-5)
    assert [greedy for _, greedy in small] == [greedy for _, greedy in large]
    sizes = np.array([3, 5, 17, 60, 70, 200])
    assert harness._classes(sizes, 1) == [[5, 4], [3, 2], [1], [0]]
    assert harness._classes(sizes, 50) == [[5, 4], [3, 2, 1, 0]]
    _, members = harness._sharing([(c, k) for _, c, k in requests], 256)
    assert sorted(itertools.chain(*members)) == list(range(len(requests)))
    assert max(map(len, members)) == harness._TOGETHER
    # After 1 and 2 tokens there is little to share, after 250 little room; of the 40, 16 go together.
    assert [len(own) for own in members] == [1, 1, 1, 2, 1, 3, 3, 3, 2, 1, 16, 16, 8]


def test_a_stop_string_makes_room_for_the_next_answer(tiny_model):
    """Answers end where they may, and are what they were; a stop string that is a special token stops too."""
    asked = harness.HarnessModel(tiny_model, batch_size=2)
    texts = [f"{number} and {number}" for number in range(6)]

    def answered(until):
        how = {"until": until, "max_gen_toks": 120}
        return asked.generate_until([SimpleNamespace(args=(text, how)) for text in texts])

    whole = answered([])
    assert min(map(len, whole)) > 20
    letters = [text[15] for text in whole]
    for letter in set(letters):
        assert answered([letter]) == [text.split(letter)[0] for text in whole]
    how = harness.Generation.of({"until": ["<|user|>", "x"]})
    assert set(asked._stop_tokens(how)) == {tiny_model.tokenizer.convert_tokens_to_ids("<|user|>"), 2}


def test_drawn_answers_depend_on_the_seed(tiny_model):
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    requests = [SimpleNamespace(args=("2+2=", how))] * 3
    first = harness.HarnessModel(tiny_model, seed=1).generate_until(requests)
    assert len(set(first)) == 3  # a request that is repeated draws anew
    assert harness.HarnessModel(tiny_model, seed=1).generate_until(requests) == first
    assert harness.HarnessModel(tiny_model, seed=2).generate_until(requests) != first


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, (256, (), 0, None, None)),
        ({"until": "a", "max_tokens": 7, "temperature": 0.0}, (7, ("a",), 0, None, None)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, (256, (), 0, None, None)),
        ({"temperature": 0.5, "max_new_tokens": 3, "max_tokens": 4}, (3, (), 0.5, 50, None)),
        ({"do_sample": True, "temperature": 2, "top_k": 0, "top_p": 0.5}, (256, (), 2, None, 0.5)),
        ({"num_beams": 1, "until": ["a", "b"]}, (256, ("a", "b"), 0, None, None)),
    ],
)
def test_generation_kwargs(kwargs, expected):
    assert dataclasses.astuple(harness.Generation.of(kwargs)) == expected


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"num_beams": 4}, "num_beams=4 is not to be had"),
        ({"max_length": 100}, "max_length=100"),
        ({"do_sample": True}, "temperature above 0"),
        ({"temperature": 0.5, "top_p": 2}, "top_p=2"),
        ({"max_gen_toks": 0}, "max_new_tokens=0"),
    ],
)
def test_generation_kwargs_that_are_refused(kwargs, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        harness.Generation.of(kwargs)


def test_a_chat_that_goes_on(tiny_model):
    """As transformers renders it: a generation prompt, an answer that is begun, no system message."""
    asked, tokenizer = harness.HarnessModel(tiny_model), tiny_model.tokenizer
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    for messages, prompt in ((history[:1], True), (history, False)):
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, continue_final_message=not prompt
        )
        assert asked.apply_chat_template(messages, add_generation_prompt=prompt) == rendered
    strict = copy.copy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    )
    asked = harness.HarnessModel(dataclasses.replace(tiny_model, tokenizer=strict))
    assert asked.apply_chat_template([{"role": "system", "content": "S"}, *history[:1]]).count("Hi") == 1
    begun = asked.apply_chat_template(history, add_generation_prompt=False)
    assert begun.endswith("<|assistant|>Well,")


def test_tasks_that_cannot_run(tiny_model, folder, tmp_path, monkeypatch):
    """Each is named, with what to do, before anything is computed."""
    index = harness._index
    # The harness's own tasks take long to read.
    monkeypatch.setattr(harness, "_index", lambda path, defaults: index(path, False))
    broken = tmp_path / "broken.yaml"
    text = (folder / "small_gsm8k.yaml").read_text()
    for old, new, said in (
        ("", "", "did you mean small_gsm8k?"),
        ("max_gen_toks: 24", "num_beams: 4", "small_gsm8k: ValueError: generation_kwargs: num_beams=4"),
        ("max_gen_toks: 24", "max_gen_toks: 256", "small_gsm8k: answers of 256 tokens"),
        ("train.jsonl", "nowhere.jsonl", "small_gsm8k: .*nowhere.jsonl"),
    ):
        broken.write_text(text.replace(old, new) if old else text)
        name = "small_gsm8k" if old else "smal_gsm8k"
        with pytest.raises(ValueError, match=said):
            harness.run_tasks(tiny_model, [name], include_path=str(tmp_path))
    with pytest.raises(ValueError, match="no such directory"):
        harness.check_tasks(["small_gsm8k"], str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no task"):
        harness.check_tasks([])
    with pytest.raises(ValueError, match="from 1 to 256"):
        harness.HarnessModel(tiny_model)._loglikelihood_tokens([((), [1], [])])


def test_it_stops_when_asked(tiny_model, folder):
    class Stop(Exception):
        pass

    def should_stop():
        raise Stop

    asked = harness.HarnessModel(tiny_model, should_stop=should_stop)
    for name in ("small_gsm8k", "small_choices", "small_texts"):
        with pytest.raises(Stop):
            results(asked, folder, (name,))


def run(program):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_lm_eval():
    program = """
import sys
sys.modules["lm_eval"] = None
try:
    from spin_jax import harness
except ValueError as error:
    assert isinstance(error, ImportError)
    assert "pip install 'spin_jax[eval]'" in str(error)
    print("explained")
"""
    assert run(program) == "explained\n"


def test_without_torch(tiny_dir, folder):
    """Nothing of ours needs it, nor what the harness does for us."""
    program = f"""
import importlib.machinery
finder, find = importlib.machinery.PathFinder, importlib.machinery.PathFinder.find_spec
def without_torch(name, *options):
    return None if name.split(".")[0] == "torch" else find(name, *options)
finder.find_spec = staticmethod(without_torch)
import spin_jax
from spin_jax import harness
model = spin_jax.load({str(tiny_dir)!r})
numbers = harness.run_tasks(model, ["small_choices"], include_path={str(folder)!r}, limit=2)
print(sorted(numbers))
"""
    assert "small_choices/acc_norm" in run(program)
