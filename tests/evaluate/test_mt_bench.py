"""Answers to MT-Bench questions: what each turn is asked, and at which temperature."""

import json

import pytest

import spin_jax
from spin_jax.evaluate import mt_bench

QUESTIONS = [
    {"question_id": 111, "category": "math", "turns": ["2+2?", "And 3+3?"], "reference": ["4", "6"]},
    {"question_id": 7, "category": "math", "turns": ["x" * 300]},
    {"question_id": "one", "category": "other", "turns": ["Write."]},
]


@pytest.fixture
def question_file(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return str(path)


def test_both_turns_are_asked_in_the_chat_format(tiny_model, question_file, capsys):
    read = mt_bench.read_questions(question_file)
    assert [question.temperature for question in read] == [0.0, 0.0, 0.7]
    first, other = (mt_bench.answer_questions(tiny_model, read, "me", max_new_tokens=9, seed=seed) for seed in (0, 1))
    said, long, drawn = (row["choices"][0]["turns"] for row in first)
    assert other[0]["choices"][0]["turns"] == said  # mathematics is greedy
    assert other[2]["choices"][0]["turns"] != drawn
    asked = [{"role": "user", "content": "2+2?"}]
    again = [*asked, {"role": "assistant", "content": said[0]}, {"role": "user", "content": "And 3+3?"}]
    expected = [spin_jax.generate(tiny_model, [chat], max_new_tokens=9)[0] for chat in (asked, again)]
    assert [text.strip() for text in expected] == said
    assert long == [""]  # the model takes 256 tokens
    assert "question 7, turn 1: no room" in capsys.readouterr().out
