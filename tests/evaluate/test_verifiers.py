"""Verifiers: which answers they accept."""

import re
from types import SimpleNamespace

import pytest

from spin_jax.evaluate import verifiers
from spin_jax.runtime import processes


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("5 + 3 = 8\n#### 1,008", True),
        ("The first gives 7, so it is 1008.", True),
        ("#### 1008 in 3 steps", True),  # the marked number counts, not the last one
        ("#### 1008.0", True),
        ("#### -1008", False),
        ("1008, or rather 1009", False),
        ("I do not know.", False),
    ],
)
def test_gsm8k_compares_final_numbers(answer, correct):
    assert verifiers.gsm8k("7 * 144 = 1008\n#### 1008", answer) == correct


def test_gsm8k_accepts_nothing_where_neither_text_has_a_number():
    assert not verifiers.gsm8k("none", "none")


def test_exact_ignores_white_space_around_the_answer_only():
    assert verifiers.exact("a b", " a b\n")
    assert not verifiers.exact("a b", "a  b")


def test_answers_go_round_the_examples():
    examples = [SimpleNamespace(messages=[{"role": "assistant", "content": text}]) for text in ("x", "y")]
    assert verifiers.verdicts(verifiers.exact, examples, ["x", "y", "y", "y"]).tolist() == [[True, True], [False, True]]
    assert verifiers.verdicts(verifiers.exact, examples, ["y", "x"]).tolist() == [[False, False]]


def test_a_verifier_may_return_any_truth_value():
    examples = [SimpleNamespace(messages=[{"role": "assistant", "content": "x"}])]
    found = verifiers.verdicts(lambda _, answer: re.match("x", answer), examples, ["x", "y"])
    assert found.tolist() == [[True], [False]]


def test_the_verdicts_of_process_0_count_in_all(monkeypatch):
    examples = [SimpleNamespace(messages=[{"role": "assistant", "content": text}]) for text in ("x", "y")]
    monkeypatch.setattr(processes, "first", lambda: False)
    monkeypatch.setattr(processes, "exchanged", lambda own: [[True, False], own])
    assert verifiers.verdicts(lambda *_: 1 / 0, examples, ["x", "y"]).tolist() == [[True, False]]


def test_a_verifier_that_does_not_exist():
    with pytest.raises(ValueError, match=r"eval\.verifier='nobody': choose from exact, gsm8k, or module"):
        verifiers.find_verifier("nobody")
