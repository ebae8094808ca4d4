"""Our model in lm-evaluation-harness, against the harness's own `hf` backend on the same checkpoint."""

import copy
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from runs import ROOT

pytest.importorskip("lm_eval")

from spin_jax.evaluate import harness, request_groups
from spin_jax.evaluate.tasks import GenerationOptions, flat_metrics, load_tasks
from spin_jax.models import loading
from spin_jax.sampling.generate import answer
from spin_jax.sampling.next_token import Sampling, prompt_keys
from spin_jax.sampling.slots import decode, prefill
from spin_jax.training.log_probs import score_tokens

TASKS = ("small_gsm8k", "small_choices", "small_last_word", "small_texts")


def results(asked, task_folder, names=TASKS, **options):
    """(numbers, each task's raw responses) of a model that the harness takes."""
    from lm_eval import evaluator

    tasks = load_tasks(names, include_path=str(task_folder))
    found = evaluator.evaluate(
        asked, tasks.loaded, bootstrap_iters=0, log_samples=True, fewshot_as_multiturn=True, **options
    )
    raw = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda s: (s["doc_id"], s["filter"]))]
        for name, samples in found["samples"].items()
    }
    return flat_metrics(found), raw


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
def test_numbers_are_those_of_the_hf_backend(tiny_dir, with_bos, mesh, task_folder, bos):
    """With BOS and without, in the chat format and not; contexts longer than the model takes (256), too."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    directory = str(with_bos if bos else tiny_dir)
    model = loading.load(directory, mesh=mesh)
    assert (model.tokenizer("a")["input_ids"][0] == model.tokenizer.bos_token_id) == bos
    theirs = HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=8)
    expected, raw = results(theirs, task_folder, apply_chat_template=bos)
    before = compilations()
    numbers, own = results(harness.HarnessModel(model), task_folder, apply_chat_template=bos)
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
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
        sampling=Sampling(12, 0.0),
        stop_tokens=(),
        limits=[12],
    )
    other = [*drawn[:-1].tolist(), (int(drawn[-1]) + 1) % 272]
    requests = [((), prompt, continuation) for continuation in (drawn.tolist(), other, drawn.tolist()[:1])]
    scored = harness.HarnessModel(tiny_model)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in scored] == [True, False, True]


def test_eight_devices_are_one(tiny_dir, tiny_model, mesh8, task_folder):
    names = ("small_gsm8k", "small_choices")
    one, raw = results(harness.HarnessModel(tiny_model), task_folder, names)
    eight, own = results(harness.HarnessModel(loading.load(str(tiny_dir), mesh=mesh8)), task_folder, names)
    assert eight == one
    assert own["small_gsm8k"] == raw["small_gsm8k"]
    flat = [
        np.array([[logp for [(logp, _)] in document] for document in found["small_choices"] if len(document) == 4])
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
    assert request_groups.classes_by_size(sizes, 1) == [[5, 4], [3, 2], [1], [0]]
    assert request_groups.classes_by_size(sizes, 50) == [[5, 4], [3, 2, 1, 0]]
    _, members = request_groups.group_by_context([(c, k) for _, c, k in requests], 256)
    assert sorted(itertools.chain(*members)) == list(range(len(requests)))
    assert max(map(len, members)) == request_groups.MAX_SHARED
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
    how = GenerationOptions.from_kwargs({"until": ["<|user|>", "x"]})
    assert set(asked._stop_tokens(how)) == {tiny_model.tokenizer.convert_tokens_to_ids("<|user|>"), 2}


def test_drawn_answers_depend_on_the_seed(tiny_model):
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    requests = [SimpleNamespace(args=("2+2=", how))] * 3
    first = harness.HarnessModel(tiny_model, seed=1).generate_until(requests)
    assert len(set(first)) == 3  # a request that is repeated draws anew
    assert harness.HarnessModel(tiny_model, seed=1).generate_until(requests) == first
    assert harness.HarnessModel(tiny_model, seed=2).generate_until(requests) != first


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


def test_it_stops_when_asked(tiny_model, task_folder):
    class Stop(Exception):
        pass

    def should_stop():
        raise Stop

    asked = harness.HarnessModel(tiny_model, should_stop=should_stop)
    for name in ("small_gsm8k", "small_choices", "small_texts"):
        with pytest.raises(Stop):
            results(asked, task_folder, (name,))


def test_without_torch(tiny_dir, task_folder):
    """Nothing of ours needs it, nor what the harness does for us."""
    program = f"""
import importlib.machinery
finder, find = importlib.machinery.PathFinder, importlib.machinery.PathFinder.find_spec
def without_torch(name, *options):
    return None if name.split(".")[0] == "torch" else find(name, *options)
finder.find_spec = staticmethod(without_torch)
import spin_jax
from spin_jax.evaluate import harness
model = spin_jax.load({str(tiny_dir)!r})
numbers = harness.run_tasks(model, ["small_choices"], include_path={str(task_folder)!r}, limit=2)
print(sorted(numbers))
"""
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stderr
    assert "small_choices/acc_norm" in process.stdout
