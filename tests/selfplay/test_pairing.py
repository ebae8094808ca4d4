"""Which answers to a prompt make a row: the pairings by name and by function, and what judges the answers."""

import dataclasses
import io
import re
import runpy
import sys
import textwrap
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from runs import ROOT

from spin_jax import config as config_lib
from spin_jax.config_values import PAIRINGS, rows_of_a_prompt
from spin_jax.data import parquet
from spin_jax.data.records import HUMAN, Pair
from spin_jax.errors import ConfigError, JudgeFailed, MissingInput
from spin_jax.pairs import export
from spin_jax.selfplay import fingerprints, from_config, inputs, pairing, variants
from spin_jax.training.packing import pair_group


def ids(*tokens):
    return np.array(tokens, np.int32)


def answers(scores=(None,), right=None, human=None, prompt_id=7):
    """The pairs of one prompt: the human answer is token 100 with the text "human", sampled ones are 0, 1, …"""

    def messages(text):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]

    return [
        Pair(
            prompt_id,
            n,
            messages("human"),
            messages(f"own {n}"),
            ids(50),
            ids(100),
            ids(n),
            truncated=n == 1,
            score=score,
            real_score=human,
            right=None if right is None else right[n],
        )
        for n, score in enumerate(scores)
    ]


def config(**keys):
    values = {"pairing": "human/own", "rows": "all", "scorer": None, "length_penalty": 0.0, **keys}
    return config_lib.Config({"selfplay": values, "eval": {"verifier": "exact"}, "loss": {"name": "logistic"}})


FILE = epath.Path("iteration_0/pairs/train-00000-of-00001.parquet")


def paired(name, pairs):
    """(the rows, the counts of prompts without any)."""
    rows, counts = pairing.Pairing(config(pairing=name), []).pairs_of(pairs, FILE)
    counts = dict(counts)
    assert counts.pop("pairs") == len(rows)
    assert counts.pop("prompts") == len({pair.prompt_id for pair in pairs})
    return rows, counts


def rows_of(name, pairs):
    """([(chosen token, rejected token) of each row in order], counts)."""
    rows, counts = paired(name, pairs)
    return [(int(row.real[0]), int(row.generated[0])) for row in rows], counts


TIE = "the scores are equal"
ONE = "there is only one answer"


@pytest.mark.parametrize(
    ("name", "pairs", "expected"),
    [
        ("best/worst", answers([0.2, 0.9, -1.0]), [(1, 2)]),
        ("best/worst", answers([3, 1, 3, 1]), [(0, 1)]),  # the first ones among equals
        ("best/worst", answers([2, 2, 2]), TIE),
        ("best/worst", answers([2]), ONE),
        ("human/worst", answers([0.2, 0.9, -1.0]), [(100, 2)]),
        ("human/worst", answers([4, 4]), [(100, 0)]),  # nothing is compared with the human answer
        ("human/worst", answers([4]), [(100, 0)]),
        ("human/worst", answers([4, 5], human=-1.0), [(100, 0)]),
        ("human/best+worst", answers([0.2, 0.9, -1.0]), [(100, 1), (100, 2)]),
        ("human/best+worst", answers([1, 1]), TIE),
        ("human/best+worst", answers([1]), ONE),
        ("best/human", answers([0.2, 0.9, -1.0], human=0.5), [(1, 100)]),
        ("best/human", answers([0.2], human=0.1), [(0, 100)]),
        ("best/human", answers([0.2, 0.9], human=0.9), TIE),
        ("best/human", answers([0.2, 0.9], human=1.0), "the human answer has the highest score"),
        ("best_with_human/worst", answers([0.2, 0.9, -1.0], human=0.5), [(1, 2)]),
        ("best_with_human/worst", answers([0.2, 0.9, -1.0], human=0.9), [(100, 2)]),  # the human one among equals
        ("best_with_human/worst", answers([0.2], human=0.9), [(100, 0)]),
        ("best_with_human/worst", answers([1, 1], human=1), TIE),
        ("best_with_human/worst", answers([1], human=0), ONE),
        ("right/wrong", answers([None] * 4, [False, True, True, False]), [(1, 0)]),
        ("right/wrong", answers([0.1, 0.2, 0.3, 0.0], [False, True, True, False]), [(2, 3)]),  # with a scorer
        ("right/wrong", answers([9, 1], [False, True]), [(1, 0)]),  # a verdict counts more than a score
        ("right/wrong", answers([None] * 2, [True, True]), "no answer is wrong"),
        ("right/wrong", answers([None] * 2, [False, False]), "no answer is right"),
        ("right/wrong", answers([None], [True]), "no answer is wrong"),
    ],
)
def test_pairs_by_hand(name, pairs, expected):
    rows, counts = rows_of(name, pairs)
    if isinstance(expected, str):
        assert (rows, counts) == ([], {expected: 1})
    else:
        assert (rows, counts) == (expected, {})


def test_several_prompts_are_counted():
    """The rows come prompt by prompt; the answers to a prompt need not stand side by side."""
    first, second, third = (answers(s, prompt_id=p) for p, s in ((5, [1, 2]), (3, [4, 4]), (9, [0, -1])))
    mixed = [first[0], second[0], third[0], third[1], second[1], first[1]]
    rows, counts = paired("best/worst", mixed)
    assert [(row.prompt_id, row.chosen_id, row.sample_id) for row in rows] == [(5, 1, 0), (9, 0, 1)]
    assert counts == {TIE: 1}


def test_what_is_told_of_several_files():
    """Numbers of each file for metrics.jsonl, a line for all, and an error where nothing was found."""
    best_worst = pairing.Pairing(config(pairing="best/worst"), ["score"])
    second, held_out = FILE.with_name("train-00001-of-00002.parquet"), FILE.with_name("test-00000-of-00001.parquet")
    _, of_first = best_worst.pairs_of([*answers([1, 2], prompt_id=5), *answers([4, 4], prompt_id=3)], FILE)
    _, of_second = best_worst.pairs_of([*answers([3, 3]), *answers([1], prompt_id=8)], second)
    same, nothing = best_worst.pairs_of(answers([1, 2]), held_out)
    assert same == answers([1, 2])
    assert pairing.metrics(of_first) == {"prompts": 2, "ties": 1, "without_pair": 1}
    assert pairing.metrics(of_second) == {"prompts": 2, "ties": 1, "without_pair": 2}
    assert pairing.metrics(nothing) == {}
    assert best_worst.note(of_first + of_second + nothing) == (
        "selfplay.pairing=best/worst makes 1 pairs of the answers to 4 prompts; no pair of 2 where the scores are "
        "equal, 1 where there is only one answer"
    )
    assert best_worst.note(nothing) == ""
    _, of_other = best_worst.pairs_of(answers([4, 4]), FILE)
    assert "makes 0 pairs of the answers to 1 prompts; no pair of 1 where the scores" in best_worst.nothing(of_other)
    assert best_worst.pairs_of(answers([4, 4]), FILE)[1] == of_other  # nothing is kept between calls
    with pytest.raises(MissingInput, match=r"train-00001-of-00002.parquet has no score, for another selfplay.pairing"):
        best_worst.pairs_of(answers([None]), second)


@pytest.mark.parametrize(("rows", "kept"), [("right", [0]), ("wrong", [1]), ("all", [0, 1])])
def test_rows_are_chosen_among_those_to_train_on(rows, kept):
    """Held-out pairs stay what they are in every run, so that their numbers mean the same."""
    pairs, chosen = answers([1.0, 0.0]), pairing.Pairing(config(rows=rows), ["score"])
    assert chosen.pairs_of(pairs, FILE) == ([pairs[n] for n in kept], {})
    assert chosen.pairs_of(pairs, FILE.with_name("test-00000-of-00001.parquet")) == (pairs, {})


def test_spin_needs_no_pairing():
    pairs, own = answers([1, 2]), pairing.Pairing(config(), [])
    assert own.pairs_of(pairs, FILE) == (pairs, {})
    assert not own.chooses


def test_the_chosen_answer_stands_where_the_human_one_did():
    """Tokens, messages, score and ids of a row; a row with the human answer as chosen is the sampled pair itself."""
    pairs = answers([0.2, 0.9], human=0.5)
    (row,), _ = paired("best/worst", pairs)
    assert (row.chosen_id, row.sample_id, row.score, row.truncated) == (1, 0, 0.2, False)
    assert [m[-1]["content"] for m in (row.real_messages, row.generated_messages)] == ["own 1", "own 0"]
    (row,), _ = paired("best/human", pairs)
    assert (row.chosen_id, row.sample_id, row.score, row.truncated) == (1, HUMAN, 0.5, False)
    assert [m[-1]["content"] for m in (row.real_messages, row.generated_messages)] == ["own 1", "human"]
    (row,), _ = paired("human/worst", pairs)
    assert row is pairs[0]


def test_given_pairs_whose_prompts_end_at_different_tokens():
    """Each answer of a row follows the same prompt, and together they are the conversations that were given."""
    long, short = answers([2.0, 1.0], human=0.0)
    long = dataclasses.replace(long, prompt=ids(50, 51), real=ids(9), generated=ids(1))
    short = dataclasses.replace(short, prompt=ids(50), real=ids(51, 9), generated=ids(52, 2))
    (row,), _ = paired("best/worst", [long, short])
    group = pair_group(row)
    assert [[*group.prompt, *answer] for answer in group.answers] == [[50, 51, 1], [50, 52, 2]]
    (row,), _ = paired("best/human", [short, long])
    group = pair_group(row)
    assert [[*group.prompt, *answer] for answer in group.answers] == [[50, 51, 1], [50, 51, 9]]


# --- a function of the user ----------------------------------------------------------------------

ASKED = []


def neighbours(messages, answers, scores):
    """Each answer against the next one in the list, the human one as the last; and the human one against the first."""
    ASKED.append((messages[-1]["content"], answers, scores))
    messages.clear()  # what is done to the arguments has no effect
    pairs = [(n, n + 1) for n in range(len(answers) - 1)]
    answers.clear()
    return [*pairs, (np.int64(-1), 0)]


def test_a_function_gets_all_answers_and_returns_places():
    ASKED.clear()
    rows, counts = rows_of("test_pairing:neighbours", answers([0.5, 0.25], human=0.75))
    assert rows == [(0, 1), (1, 100), (100, 0)]
    assert counts == {}
    assert [len(asked) for asked in ASKED[0][1:]] == [0, 3]
    assert (ASKED[0][0], ASKED[0][2]) == ("human", [0.5, 0.25, 0.75])
    rows, _ = rows_of("test_pairing:neighbours", answers([None]))
    assert rows == [(0, 100), (100, 0)]
    assert ASKED[1][2] is None  # there is no scorer
    keys = paired("test_pairing:neighbours", answers([None]))[0]
    assert len({(row.prompt_id, row.sample_id, row.chosen_id) for row in keys}) == len(keys)


FAULTY = {
    "nothing": (lambda *_: None, "failed: TypeError"),
    "error": (lambda *_: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    "a text": (lambda *_: [(0, "human")], "failed: TypeError"),
    "a float": (lambda *_: [(0, 1.0)], "failed: TypeError"),
    "three": (lambda *_: [(0, 1, 2)], r"\[0, 1, 2\] is not the places of two different answers"),
    "too far": (lambda *_: [(0, 3)], r"\[0, 3\] is not the places of two different answers: the answers are 0 to 2"),
    "below": (lambda *_: [(-2, 0)], r"\[-2, 0\] is not the places of two different answers"),
    "the same": (lambda *_: [(0, 1), (1, 1)], r"where \[1, 1\] is not the places of two different answers"),
    "human twice": (lambda *_: [(-1, 2)], r"\[-1, 2\] is not the places of two different answers"),
    "again": (lambda *_: [(0, 2), (0, -1)], r"\[0, -1\] comes twice"),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_faults_of_a_function_are_named_with_the_prompt(kind, monkeypatch):
    function, message = FAULTY[kind]
    monkeypatch.setattr("test_pairing.neighbours", function)
    with pytest.raises(JudgeFailed, match=f"prompt_id 7: selfplay.pairing=test_pairing:neighbours .*{message}"):
        rows_of("test_pairing:neighbours", answers([0.5, 0.25], human=0.75))


def test_a_function_may_leave_a_prompt_out(monkeypatch):
    monkeypatch.setattr("test_pairing.neighbours", lambda *_: [])
    rows, counts = rows_of("test_pairing:neighbours", answers([0.5]))
    assert (rows, counts) == ([], {"the function returned no pair": 1})


# --- judges --------------------------------------------------------------------------------------


def lengths(messages, texts):
    """A scorer that remembers what it was asked."""
    ASKED.append(list(texts))
    return [len(text) for text in texts]


@pytest.mark.parametrize(
    ("name", "asked_of_human"),
    [
        ("human/own", False),
        ("human/worst", False),
        ("human/best+worst", False),
        ("best/worst", False),
        ("right/wrong", False),
        ("best/human", True),
        ("best_with_human/worst", True),
        ("test_pairing:neighbours", True),
    ],
)
def test_the_human_answer_is_scored_where_it_is_compared(name, asked_of_human):
    ASKED.clear()
    judge = variants.find_judge(config(pairing=name, scorer="test_pairing:lengths"))
    first, second = variants.with_scores(answers([None, 9.0]), judge)
    assert [["own 0", "own 1", "human"][: 2 + asked_of_human]] == ASKED
    assert (first.score, second.score) == (5.0, 5.0)  # scores that are compared come from one source
    assert {first.real_score, second.real_score} == {5.0 if asked_of_human else None}
    right = [pair.right for pair in (first, second)]
    assert right == ([False, False] if name == "right/wrong" else [None, None])
    assert variants.with_scores([first, second], judge) == [first, second]
    assert len(ASKED) == 1  # nobody is asked again


def test_each_token_takes_something_from_a_score():
    judge = variants.find_judge(config(pairing="best/human", scorer="test_pairing:lengths", length_penalty=0.5))
    pairs = answers([None, None])
    judged = variants.with_scores(pairs, judge)
    assert [pair.score for pair in judged] == [5.0 - 0.5 * len(pair.generated) for pair in pairs]
    assert {pair.real_score for pair in judged} == {5.0 - 0.5 * len(pairs[0].real)}


def test_given_scores_stay_where_a_prompt_has_all_of_them():
    judge = variants.find_judge(config(pairing="best/worst", scorer="test_pairing:lengths"))
    pairs = [*answers([8.0, 9.0]), *(dataclasses.replace(pair, prompt_id=8) for pair in answers([None, 9.0]))]
    assert [pair.score for pair in variants.with_scores(pairs, judge)] == [8.0, 9.0, 5.0, 5.0]


def test_added_pairs_are_judged_only_for_a_loss_that_reads_the_score():
    pairs = [*answers([None]), *(dataclasses.replace(pair, prompt_id=-1) for pair in answers([None]))]
    judge = variants.find_judge(config(scorer="test_pairing:lengths"))
    assert [pair.score for pair in variants.with_scores(pairs, judge)] == [5.0, None]
    assert [pair.score for pair in variants.with_scores(pairs, judge._replace(of_added=True))] == [5.0, 5.0]


def test_verdicts_are_those_of_the_verifier():
    judge = variants.find_judge(config(pairing="right/wrong"))
    pairs = answers([None, None])
    human = [*pairs[0].generated_messages[:-1], {"role": "assistant", "content": " human"}]
    pairs[1] = dataclasses.replace(pairs[1], generated_messages=human)
    judged = variants.with_scores(pairs, judge)
    assert [(pair.right, pair.score) for pair in judged] == [(False, None), (True, None)]


def test_an_answer_that_only_calls_a_tool_has_no_text(monkeypatch):
    """As rejected answers of preferences do."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    pairs = [dataclasses.replace(p, generated_messages=[*p.generated_messages[:-1], call]) for p in answers()]
    for keys in ({"scorer": "test_pairing:lengths"}, {"pairing": "right/wrong"}, {"rows": "right"}):
        (judged,) = variants.with_scores(pairs, variants.find_judge(config(**keys)))
        assert (judged.score or 0.0, judged.right or False) == (0.0, False)
    monkeypatch.setattr("test_pairing.neighbours", lambda messages, texts, scores: [(texts.index("human"), 0)])
    assert rows_of("test_pairing:neighbours", pairs)[0] == [(100, 0)]


def tried(given=(), judge=None, **keys):
    """What `lengths` is asked when a judge is tried, for a run of one iteration."""
    ASKED.clear()
    c = config(start=0, iterations=1, **keys)
    copies = [dataclasses.replace(pair, generated_messages=pair.real_messages) for pair in answers([None, None])]
    variants.try_judge(c, judge or variants.find_judge(c), copies, dict(given))
    return ASKED


def test_a_scorer_is_tried_before_the_run(monkeypatch):
    """On as many copies of the human answer as there will be answers; not where nobody will ask it."""
    assert tried(scorer="test_pairing:lengths") == [["human"] * 2]
    assert tried(scorer="test_pairing:lengths", pairing="best/human") == [["human"] * 3]
    assert tried(scorer="test_pairing:lengths", given={0: answers([None])}) == [["human"] * 2]
    assert tried(scorer="test_pairing:lengths", given={0: answers([1.0])}) == []
    assert tried(scorer="test_pairing:lengths", given={1: answers([1.0])}) == [["human"] * 2]
    assert tried() == []
    monkeypatch.setattr("test_pairing.lengths", lambda messages, texts: [float("nan")] * len(texts))
    with pytest.raises(ConfigError, match="copies of a human answer as the answers: prompt_id 7: the scorer gave"):
        tried(scorer="test_pairing:lengths")
    with pytest.raises(ConfigError, match="prompt_id 7: the verifier or scorer failed: ZeroDivisionError"):
        tried(judge=variants.Judge(None, of_human=False, verifier=lambda reference, answer: 1 / 0))


def test_a_scorer_that_forgets_the_human_answer(monkeypatch):
    monkeypatch.setattr("test_pairing.lengths", lambda messages, texts: [0.0, 1.0])
    judge = variants.find_judge(config(pairing="best/human", scorer="test_pairing:lengths"))
    with pytest.raises(JudgeFailed, match=r"prompt_id 7: the scorer gave \[0.0, 1.0\] for 3 answers"):
        variants.with_scores(answers([None, None]), judge)


def test_a_model_of_duels_as_the_readme_has_it(monkeypatch):
    """Win rates by hand, of a model that prefers longer answers and, wrongly, the first place."""
    text = (ROOT / "configs" / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def win_rates" in block]
    duels = types.ModuleType("duels")
    exec(textwrap.dedent(code), vars(duels))
    chances = {(5, 3): 0.9, (3, 5): 0.3, (5, 5): 0.6, (3, 3): 0.6}  # by the lengths of the two answers
    asked = []

    def beats(conversation, first, second):
        asked.append(conversation)
        return chances[len(first), len(second)]

    monkeypatch.setattr(duels, "beats", beats, raising=False)
    monkeypatch.setitem(sys.modules, "duels", duels)
    pairs = answers([None, None, None])
    for pair, length in zip(pairs, (3, 5, 3), strict=True):
        pair.generated_messages[-1]["content"] = "x" * length
    c = config(pairing="best/worst", scorer="duels:win_rates")
    scored = variants.with_scores(pairs, variants.find_judge(c))
    # (0.3 + 1 − 0.9) / 2 = 0.2 of a duel with the long one, and half of one among equals
    assert [pair.score for pair in scored] == pytest.approx([(0.2 + 0.5) / 2, 0.8, (0.2 + 0.5) / 2])
    assert asked == [[{"role": "user", "content": "q"}]] * 6
    rows, _ = pairing.Pairing(c, ["score"]).pairs_of(scored, FILE)
    assert [(row.chosen_id, row.sample_id) for row in rows] == [(1, 0)]


# --- files ---------------------------------------------------------------------------------------


def test_files_say_which_answers_a_pair_has():
    """Columns come only where something is in them, so that files of SPIN are what they were."""
    pairs = answers([0.2, 0.9], [True, False], human=0.5)
    back = parquet.pairs_from_parquet(parquet.pairs_to_parquet(pairs))
    assert [(p.score, p.real_score, p.right) for p in back] == [(0.2, 0.5, True), (0.9, 0.5, False)]
    assert pq.read_schema(io.BytesIO(parquet.pairs_to_parquet(answers()))).names == parquet.PAIR_SCHEMA.names

    rows, _ = paired("best/human", pairs)
    rows += paired("human/worst", pairs)[0]
    content = parquet.scores_to_parquet(3, rows, np.array([[-1, -2], [-3, -4]]))
    assert parquet.scores_from_parquet(content) == {(3, 7, HUMAN, 1): (-1.0, -2.0), (3, 7, 0, HUMAN): (-3.0, -4.0)}
    plain = parquet.scores_to_parquet(3, rows[1:], np.array([[-3, -4]]))
    assert "chosen_id" not in pq.read_schema(io.BytesIO(plain)).names
    assert parquet.scores_from_parquet(plain) == {(3, 7, 0, HUMAN): (-3.0, -4.0)}


@pytest.mark.parametrize("human", [None, 0.5])
def test_an_export_has_all_answers_with_their_scores(human, tmp_path):
    folder = tmp_path / "iteration_0" / "pairs"
    folder.mkdir(parents=True)
    content = parquet.pairs_to_parquet(answers([0.25, 1.0], human=human))
    (folder / "train-00000-of-00001.parquet").write_bytes(content)
    export(str(tmp_path), 0, str(tmp_path / "out"))
    rows = pq.read_table(tmp_path / "out" / "train-00000-of-00001.parquet").to_pylist()
    more = {} if human is None else {"real_score": 0.5}
    for n, (row, score) in enumerate(zip(rows, (0.25, 1.0), strict=True)):
        assert (row.pop("real")[-1]["content"], row.pop("generated")[-1]["content"]) == ("human", f"own {n}")
        assert row == {"prompt_id": 7, "sample_id": n, "score": score, **more}


# --- configs -------------------------------------------------------------------------------------


def tiny(**keys):
    c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")
    c.selfplay.update({"samples": 2, **keys})
    return c


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pairing": "best/own"}, "selfplay.pairing='best/own': one of human/own, .*, or module:function"),
        ({"pairing": "best/worst"}, "'best/worst' needs selfplay.scorer"),
        ({"pairing": "human/worst"}, "'human/worst' needs selfplay.scorer"),
        ({"pairing": "best/worst", "scorer": "a:b", "samples": 1}, "set selfplay.samples to 2 or more"),
        ({"pairing": "right/wrong", "samples": 1}, "set selfplay.samples to 2 or more"),
        ({"pairing": "right/wrong", "rows": "right"}, "'right/wrong' and selfplay.rows='right' both choose"),
    ],
)
def test_what_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.resolve(tiny(**keys))


@pytest.mark.parametrize(("name", "count"), [*zip(PAIRINGS, (3, 1, 2, 1, 1, 1, 1), strict=True), ("a:b", 3)])
def test_most_rows_of_a_prompt(name, count):
    """Of three answers; as many as `paired` makes of them where all differ."""
    assert rows_of_a_prompt(config(pairing=name, samples=3).selfplay) == count
    if name in PAIRINGS[1:]:
        pairs = answers([1, 3, 2], [True, False, True], human=0)
        assert len(paired(name, pairs)[0]) == count


def test_right_and_wrong_need_a_verifier():
    c = tiny(pairing="right/wrong")
    c.eval.verifier = None
    with pytest.raises(ConfigError, match=r"needs eval\.verifier"):
        config_lib.resolve(c)


def test_a_run_that_continues_keeps_pairing_and_verifier():
    """A run that began before there was the key goes on; the verifier is free where it judges no training answers."""
    began = {"config": fingerprints.recorded(config_lib.resolve(tiny()))}
    del began["config"]["selfplay"]["pairing"]
    c = config_lib.resolve(tiny())
    assert fingerprints.differences(c.changed({"eval.verifier": "gsm8k"}), {}, began) == {}
    c = c.changed({"selfplay.pairing": "right/wrong"})
    assert fingerprints.differences(c, {}, began) == {"selfplay.pairing": ("human/own", "right/wrong")}
    began = {"config": fingerprints.recorded(c)}
    found = fingerprints.differences(c.changed({"eval.verifier": "gsm8k"}), {}, began)
    assert found == {"eval.verifier": ("exact", "gsm8k")}


@pytest.mark.parametrize("human", [1, 20, 50])
@pytest.mark.parametrize("name", [*PAIRINGS, "some_module:function"])
def test_every_row_fits_the_shape(name, human):
    """Short and long human answers, at any place of a row; and held-out rows, which are human/own."""
    c = config_lib.resolve(tiny(pairing=name, scorer="a:b"))
    c = c.changed({"lengths.max_length": 64, "sampling.max_new_tokens": 30})
    model, _, _ = inputs.open_model(c)
    chosen, _, rejected = name.partition("/")
    prompt, real, generated = (ids(*[5] * n) for n in (12, human, 45))
    given = {0: [dataclasses.replace(answers()[0], prompt=prompt, real=real, generated=generated)]}
    for own, pairs in ((30, {}), (45, given)):  # the most tokens of a sampled answer
        shape = from_config.pair_shape_of_lengths(c, model, np.array([[12, human]]), pairs)
        kinds, any_one = {"human": [human], "best_with_human": [human, own]}, [human, own] if ":" in name else [own]
        rows = [a + b for a in kinds.get(chosen, any_one) for b in kinds.get(rejected, any_one) if {a, b} != {human}]
        assert shape.length >= 12 + max([*rows, human + own])
