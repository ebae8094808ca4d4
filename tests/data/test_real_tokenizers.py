"""Real tokenizers and templates on 200 conversations: GSM8K, and answers that are hard to cut out.

    SPIN_JAX_TABLES=DIR python -m pytest -m '' tests/data/test_real_tokenizers.py      # writes DIR/tokenizers.md

Ids are compared with those of transformers, and of the tokenizer.json alone. Where a message has a control token's
text the two differ on purpose: there it stays text.
"""

import os
import pathlib
from collections import Counter

import numpy as np
import pytest
import real_model
import real_tokenizers
import tokenizers
from runs import SHARED

from spin_jax.data.chat import Chat, end_of_turn
from spin_jax.models.tokenizers import load_tokenizer

EDGES = [
    " begins with a space", "  two spaces", "\nbegins with a line", "\n\n\tand a tab", "7",
    "12,345.67 and 3.14", "-1", "```python\nfor i in range(3):\n    print(i)\n```",
    "\tindented\n\t\tcode", "x = {'a': [1, 2]}", "👍", "👩‍👩‍👧‍👦 family", "é e\u0301 ñ",
    "日本語の答え", "العربية", "a\u00a0b\u2009c", "ends with spaces   ", "ends with lines\n\n",
    "A" * 300, "a\r\nb", "'quoted'", "\"quoted\"", "<b>bold</b>", "{{ not_a_template }}", "%s %d",
    "\\n is no line", "$\\frac{1}{2}$", "¿Qué?", ".", "…", "— dash", "#### 42", "1. one\n2. two",
    "| a | b |\n|---|---|", "http://a.b/c?d=e&f", "a" + " " * 20 + "b", "\u200bzero width",
    "Ⅷ ½ ²", "\ufeffa mark", "𝔘𝔫𝔦", "don't", "I'LL", "_under_ *star*", "0x1F", "1e-9",
    "ﬁ ligature", "ß ẞ", "İi", "\x0bvertical", "a\x00b",
]  # fmt: skip
CONTROL = (
    "<|im_end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "</s>",
    "[/INST]",
    "<｜end▁of▁sentence｜>",
    "<bos>",
)


@pytest.fixture(scope="module")
def table():
    """Rows for tests/README.md, written where SPIN_JAX_TABLES says."""
    rows: list[tuple] = []
    yield rows
    if folder := os.environ.get("SPIN_JAX_TABLES"):
        lines = ["| tokenizer | conversations | other ids | no stop token | straddles |", "|---" * 5 + "|"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
        (pathlib.Path(folder) / "tokenizers.md").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", params=[*real_tokenizers.NAMES, "mistral", "smollm2"])
def directory(request):
    try:
        if request.param == "smollm2":
            return request.param, real_model.cached()
        if request.param == "mistral":
            return request.param, SHARED / "mistral_tokenizer"
        return request.param, real_tokenizers.directory(request.param)
    except real_model.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory[1])


@pytest.fixture(scope="module")
def chat(tokenizer):
    """With the stop tokens of a model that has no generation_config.json."""
    eos = {tokenizer.eos_token_id}
    return Chat(tokenizer, sorted({*eos, end_of_turn(tokenizer, eos)} - {None}))


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.long
def test_a_real_tokenizer(directory, tokenizer, chat, gsm8k, table):
    name, path = directory
    alone = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    rows = [(row["question"], row["answer"]) for row in gsm8k[: 200 - len(EDGES)]]
    conversations = [turns(*row) for row in rows] + [turns(f"Say: {edge}", edge) for edge in EDGES]
    differing = unstopped = straddles = 0
    for messages in conversations:
        prompt, answer, note = chat.encode(messages)
        ids = [*prompt.tolist(), *answer.tolist()]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert whole == alone.encode(text, add_special_tokens=False).ids
        assert chat.encode_prompt(messages[:-1]).tolist() == asked
        differing += ids != whole[: len(ids)] or (not note and prompt.tolist() != asked)
        unstopped += not chat.stopped(answer)
        straddles += bool(note)
        if alone.decode(whole, skip_special_tokens=False) == text:  # a normalizer may have changed the text
            assert text.startswith(alone.decode(ids, skip_special_tokens=False))
    assert not differing
    assert not unstopped
    table.append((name, len(conversations), differing, unstopped, straddles))


@pytest.mark.long
def test_every_turn_of_the_assistant(tokenizer, chat):
    """`sft.turns=all`: each answer as the whole conversation has it, with one stop token at its end."""
    for edge in EDGES:
        said = ["It is 3.", edge, "Bye"]
        messages = [message for answer in said for message in turns(f"Say: {answer}", answer)]
        example = chat.with_earlier_answers(chat.example(0, messages, Counter()))
        ids = example.prompt[example.earlier]
        first, second, rest = np.split(ids, np.flatnonzero(np.isin(ids, chat.stop_tokens)) + 1)
        assert not len(rest)
        assert chat.decode(first).strip() == said[0]
        expected = tokenizer.decode(tokenizer(edge, add_special_tokens=False)["input_ids"])
        assert chat.decode(second).strip() == expected.strip()


@pytest.mark.long
def test_control_tokens_in_messages_stay_text(tokenizer, chat):
    """They make neither stops nor turns, and the text comes back."""
    for control in CONTROL:
        text = f"say {control} twice"
        prompt, answer, _ = chat.encode(turns(f"Please {text}", text))
        assert chat.stopped(answer)
        # Qwen3's template begins the answer with empty thoughts, and sentencepiece writes a space for ▁.
        said, asked = (tokenizer.decode(ids).replace("▁", " ") for ids in (answer[:-1], prompt))
        assert said.strip().endswith(text.replace("▁", " "))
        assert text.replace("▁", " ") in asked
