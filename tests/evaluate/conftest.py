"""Task files for the tests of evaluation."""

import random

import pytest
from dataset_rows import write_jsonl

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


@pytest.fixture(scope="package")
def task_folder(tmp_path_factory, gsm8k):
    """Task files and their data: GSM8K's own rows, and what can be made of them."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    write_jsonl(folder / "train.jsonl", gsm8k[:20])
    write_jsonl(folder / "test.jsonl", gsm8k[20:30])
    sentences = [row["answer"].splitlines()[0] for row in gsm8k[:60]]
    choices = []
    for number, row in enumerate(gsm8k[:24]):
        own = [sentences[number], *rng.sample(sentences[24:], rng.randint(1, 3)), "yes", "no"]
        choices.append({"question": row["question"][: rng.choice([20, 90, 900])], "choices": own, "label": number % 3})
    write_jsonl(folder / "choices.jsonl", choices)
    texts = []
    for row in gsm8k[:12]:
        *start, end = row["question"].split(" ")
        texts.append({"start": " ".join(start), "end": f" {end}", "text": row["question"] + "\n" + row["answer"]})
    write_jsonl(folder / "texts.jsonl", [{"start": "", "end": "Hello", "text": "x"}, *texts])
    for name, text in zip(TASKS, (GSM8K, CHOICES, LAST_WORD, TEXTS), strict=True):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder
