"""Answers to questions of several turns (MT-Bench), in the files that FastChat's judges read.

A question file has a JSON object on each line: `question_id`, `turns` (the user's messages, in order) and `category`,
which decides the temperature. An answer has the same question_id and `choices: [{"index": 0, "turns": […]}]`.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.records import check_text
from spin_jax.models.architecture import Model
from spin_jax.runtime import processes
from spin_jax.runtime.console import progress
from spin_jax.sampling.generate import BATCH_SIZE, answer, counting
from spin_jax.sampling.next_token import Sampling, prompt_keys

# FastChat's temperatures by category.
TEMPERATURES = {
    **dict.fromkeys(("extraction", "math", "coding", "reasoning", "arena-hard-200"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
DEFAULT_TEMPERATURE = 0.7  # of writing, roleplay and all other categories
TOP_K = 50  # FastChat samples with this default of transformers


class Question(NamedTuple):
    id: int | str
    turns: tuple[str, ...]
    temperature: float


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a JSONL file, or all of them.

    Raises:
        ValueError, FileNotFoundError: the message names the file, the row and the field.
    """
    rows = sources.load_rows(path, "train")
    questions: dict[int | str, Question] = {}
    for number in range(min(len(rows), limit or len(rows))):
        try:
            question = _parse_question(rows[number])
            if question.id in questions:
                raise ValueError(f"an earlier row has the same question_id {question.id!r}")
        except ValueError as error:
            raise ValueError(f"{sources.place(rows, number, path)}: {error}") from error
        questions[question.id] = question
    return list(questions.values())


def _parse_question(row: dict[str, Any]) -> Question:
    if not isinstance(row.get("question_id"), int | str):
        raise ValueError(f"question_id is {row.get('question_id')!r}, and should be a number or text")
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"turns is {turns!r:.80}, and should be a list of the user's messages")
    for number, turn in enumerate(turns):
        check_text(turn, f"turns[{number}]")
    temperature = TEMPERATURES.get(str(row.get("category")), DEFAULT_TEMPERATURE)
    return Question(row["question_id"], tuple(turns), temperature)


def answer_questions(
    model: Model,
    questions: Sequence[Question],
    model_name: str,
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = 1024,
    seed: int = 0,
    should_stop: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Answers all turns of all questions: the rows of a FastChat answer file, in the order of the questions.

    Args:
        model: with weights; its tokenizer has a chat template.
        model_name: the name by which judges know the model.
        batch_size: answers in progress at a time for each copy of the weights.
        max_new_tokens: the most tokens of an answer; the model's own limit counts as well.
        seed: of the random numbers. An answer depends on it, on the question's place and on the turn.
        should_stop: is called every few tokens, and may raise to stop.
    """
    chat = Chat(model.tokenizer, model.stop_tokens)
    conversations: list[list[dict[str, str]]] = [[] for _ in questions]
    with progress("answers", sum(len(question.turns) for question in questions), unit="turn") as bar:
        on_chunk = counting(bar.update, should_stop)
        for turn in range(max(len(question.turns) for question in questions)):
            for temperature in sorted({question.temperature for question in questions}):
                prompts, limits = {}, {}
                for i, question in enumerate(questions):
                    if question.temperature != temperature or len(question.turns) <= turn:
                        continue
                    conversations[i].append({"role": "user", "content": question.turns[turn]})
                    prompt = chat.encode_prompt(conversations[i])
                    limit = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
                    if limit > 0:
                        prompts[i], limits[i] = prompt, limit
                        continue
                    processes.say(f"question {question.id}, turn {turn + 1}: no room for an answer, so it is empty")
                    conversations[i].append({"role": "assistant", "content": ""})
                    bar.update()
                if not prompts:
                    continue
                answers = answer(
                    model,
                    list(prompts.values()),
                    prompt_keys(seed, turn, list(prompts)),
                    sampling=Sampling(max_new_tokens, temperature, TOP_K if temperature else None),
                    stop_tokens=model.stop_tokens,
                    limits=list(limits.values()),
                    batch_size=batch_size,
                    on_chunk=on_chunk,
                )
                for i, tokens in zip(prompts, answers, strict=True):
                    conversations[i].append({"role": "assistant", "content": chat.decode(tokens).strip()})
    return [
        {
            "question_id": question.id,
            "answer_id": uuid.uuid4().hex,
            "model_id": model_name,
            "choices": [{"index": 0, "turns": [message["content"] for message in messages[1::2]]}],
            "tstamp": time.time(),
        }
        for question, messages in zip(questions, conversations, strict=True)
    ]
