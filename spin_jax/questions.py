"""Answers to files of questions with several turns, as FastChat's judges read them: MT-Bench.

A question is a JSON object a line: `question_id`, `turns` (what the user says, one after another) and
`category`, which says how boldly to answer. An answer has the same question_id, and
`choices: [{"index": 0, "turns": […]}]`.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.records import checked_text
from spin_jax.models.architecture import Model
from spin_jax.runtime import processes
from spin_jax.runtime.console import progress
from spin_jax.sampling.generate import BATCH_SIZE, answer, counting
from spin_jax.sampling.next_token import Sampling, prompt_keys

# FastChat's, by category.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
OTHER = 0.7
TOP_K = 50  # transformers' default, which FastChat draws with
MAX_NEW_TOKENS = 1024


class Question(NamedTuple):
    id: int | str
    turns: tuple[str, ...]
    temperature: float


def read(path: str, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file, at most `limit` from its beginning.

    Raises:
        ValueError, FileNotFoundError: naming the file, and the row and field that are wrong.
    """
    rows = sources.load_rows(path, "train")
    questions: list[Question] = []
    for number in range(min(len(rows), limit or len(rows))):
        row = rows[number]
        try:
            question = _question(row)
            if any(question.id == other.id for other in questions):
                raise ValueError(f"question_id {question.id!r} was there before")
        except ValueError as error:
            raise ValueError(f"{sources.place(rows, number, path)}: {error}") from error
        questions.append(question)
    return questions


def _question(row: dict[str, Any]) -> Question:
    if not isinstance(row.get("question_id"), int | str):
        raise ValueError(f"question_id is {row.get('question_id')!r}: a number or text is wanted")
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"turns is {turns!r:.80}: a list of what the user says is wanted")
    for number, turn in enumerate(turns):
        checked_text(turn, f"turns[{number}]")
    return Question(row["question_id"], tuple(turns), TEMPERATURES.get(str(row.get("category")), OTHER))


def answers(
    model: Model,
    questions: Sequence[Question],
    name: str,
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    should_stop: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows of a FastChat answer file, in the order of the questions.

    Args:
        name: what judges know the model by.
        batch_size: answers in progress at a time for every copy of the weights.
        max_new_tokens: where an answer is cut, or at the end of what the model can take.
        seed: of the draws; an answer depends on it, the question's place and the turn.
        should_stop: asked every few tokens; may raise.
    """
    chat = Chat(model.tokenizer, model.stop_tokens)
    said: list[list[str]] = [[] for _ in questions]
    with progress("answers", sum(len(question.turns) for question in questions), unit="turn") as bar:
        on_chunk = counting(bar.update, should_stop)
        for turn in range(max(len(question.turns) for question in questions)):
            for temperature in sorted({question.temperature for question in questions}):
                prompts = {
                    number: chat.encode_prompt(_messages(question.turns[: turn + 1], said[number]))
                    for number, question in enumerate(questions)
                    if question.temperature == temperature and len(question.turns) > turn
                }
                most = model.config.max_position_embeddings
                limits = {i: min(max_new_tokens, most - len(prompt)) for i, prompt in prompts.items()}
                chosen = [i for i in prompts if limits[i] > 0]
                for i in prompts.keys() - set(chosen):
                    processes.say(
                        f"question {questions[i].id}, turn {turn + 1}: no room for an answer: it is empty"
                    )
                    said[i].append("")
                    bar.update()
                if not chosen:
                    continue
                made = answer(
                    model,
                    [prompts[i] for i in chosen],
                    prompt_keys(seed, turn, chosen),
                    Sampling(max_new_tokens, temperature, TOP_K if temperature else None),
                    stop_tokens=model.stop_tokens,
                    limits=[limits[i] for i in chosen],
                    batch_size=batch_size,
                    on_chunk=on_chunk,
                )
                for i, tokens in zip(chosen, made, strict=True):
                    said[i].append(chat.decode(tokens).strip())
    return [
        {
            "question_id": question.id,
            "answer_id": uuid.uuid4().hex,
            "model_id": name,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }
        for question, turns in zip(questions, said, strict=True)
    ]


def _messages(asked: Sequence[str], answered: Sequence[str]) -> list[dict[str, str]]:
    turns = [[{"role": "user", "content": text}] for text in asked]
    for number, text in enumerate(answered):
        turns[number].append({"role": "assistant", "content": text})
    return [message for turn in turns for message in turn]
