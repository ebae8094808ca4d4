"""`sft.turns=all`: which tokens of a conversation are trained on, against transformers' mask of `{% generation %}`."""

from collections import Counter

import numpy as np
import pytest
from dataset_rows import turn, write_jsonl

from spin_jax import tiny
from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.loading import load_examples
from spin_jax.data.records import Lengths
from spin_jax.errors import BadRow

# An assistant's turn is what {% generation %} marks; MASKED has the places of what stands before, in and after it.
MASKED = (
    "{% for m in messages %}BEFORE{% if m.role == 'assistant' %}{% generation %}SAID{% endgeneration %}"
    "{% else %}SAID{% endif %}AFTER{% endfor %}{% if add_generation_prompt %}ASKING{% endif %}"
)


def masked(before, said, after, asking):
    names = {"BEFORE": before, "SAID": said, "AFTER": after, "ASKING": asking}
    text = MASKED
    for name, value in names.items():
        text = text.replace(name, "{{ " + value + " }}")
    return text


ZEPHYR = masked("'<|' + m.role + '|>'", "m.content + eos_token", "'\n'", "'<|assistant|>'")
CHATML = masked("'<|im_start|>' + m.role + '\n'", "m.content + '<|im_end|>'", "'\n'", "'<|im_start|>assistant\n'")
PHI = masked("'<|' + m.role + '|>\n'", "m.content + '<|im_end|>'", "'\n'", "'<|assistant|>\n'")
# As Mistral's, whose answers begin with a space, and whose prompt ends in the user's turn.
INST = masked(
    "'' if m.role == 'assistant' else '[INST] '",
    "(' ' + m.content + eos_token) if m.role == 'assistant' else (m.content + ' [/INST]')",
    "''",
    "''",
)
# As Qwen3's, which keeps the thoughts of the last answer alone.
THINKS = CHATML.replace(
    "m.content", "(m.content if m.role == 'user' or loop.last else m.content.split('</think>')[-1].lstrip('\n'))"
)
TURNS = [
    turn("user", "1+2?"),
    turn("assistant", "<think>so</think>\n3 é🙂"),
    turn("user", "So?"),
    turn("assistant", "Yes.\n\nIt is."),
    turn("user", " "),
    turn("assistant", "<think>no</think>\n7"),
]
CONVERSATIONS = [TURNS, [turn("system", "Be brief."), *TURNS], TURNS[:4], TURNS[:2]]


def chat_with(template, **flags):
    """The tiny tokenizer with a template and <|im_end|> as a stop token; its control tokens get the flags."""
    from tokenizers import AddedToken

    tokenizer = tiny.tokenizer()
    names = ("<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>", "</s>")
    added = [AddedToken(name, **{"special": True, "normalized": False, **flags}) for name in names]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.chat_template = template
    return Chat(tokenizer, [2, tokenizer.convert_tokens_to_ids("<|im_end|>")])


def example_of(chat, messages):
    return chat.with_earlier_answers(chat.example(0, messages, Counter()))


def pieces(chat, example):
    return chat.tokenizer.convert_ids_to_tokens(example.prompt[example.earlier].tolist())


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}], ids=["plain", "rstrip", "lstrip"])
@pytest.mark.parametrize(
    "template", [ZEPHYR, CHATML, PHI, INST, THINKS], ids=["zephyr", "chatml", "phi", "inst", "thinks"]
)
def test_the_mask_of_the_template(template, flags):
    """The ids and the trained tokens are transformers' own, up to the last stop token."""
    chat = chat_with(template, **flags)
    for messages in CONVERSATIONS:
        theirs = chat.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        example = example_of(chat, messages)
        ids = np.concatenate([example.prompt, example.real])
        mask = np.zeros(len(theirs["input_ids"]), int)
        mask[[*example.earlier, *range(len(example.prompt), len(ids))]] = 1
        assert ids.tolist() == theirs["input_ids"][: len(ids)]
        assert mask.tolist() == theirs["assistant_masks"]
        assert example.earlier.dtype == np.int32
        assert mask.sum() > len(example.real) or len(messages) == 2


def test_each_answer_ends_in_its_stop_token():
    chat = chat_with(THINKS)
    example = example_of(chat, TURNS)
    assert "".join(pieces(chat, example)).count("<|im_end|>") == 2
    assert chat.tokenizer.decode(example.prompt[example.earlier]) == "3 é🙂<|im_end|>Yes.\n\nIt is.<|im_end|>"
    assert chat.decode(example.real) == TURNS[-1]["content"]


@pytest.mark.parametrize("template", [ZEPHYR, INST])
def test_control_tokens_in_messages_stay_text(template):
    """A stop token that somebody typed ends no answer."""
    chat = chat_with(template)
    said = [turn("user", "</s> a"), turn("assistant", "b </s><|user|> c"), turn("user", "</s>"), turn("assistant", "d")]
    example = example_of(chat, said)
    assert chat.decode(example.prompt[example.earlier]).strip() == "b </s><|user|> c"
    assert example.prompt[example.earlier].tolist().count(2) == 1


def test_a_control_token_takes_in_the_beginning_of_an_answer():
    """It is no token of the answer, as in the last turn; transformers' mask has it in."""
    chat = chat_with(PHI, rstrip=True)
    example = example_of(
        chat, [turn("user", "a"), turn("assistant", "\n b"), turn("user", "c"), turn("assistant", "d")]
    )
    assert pieces(chat, example) == ["b", "<|im_end|>"]


def test_turns_that_are_left_out():
    """Empty ones, and one that answers nothing; a system message of the config comes before all turns."""
    chat = chat_with(ZEPHYR)
    said = [turn("assistant", "hello"), turn("user", "a"), turn("assistant", " "), turn("user", "c")]
    assert example_of(chat, [*said, turn("assistant", "d")]).earlier.tolist() == []
    chat.system_message = "s"
    assert pieces(chat, example_of(chat, [*said, turn("assistant", "d")])) == ["h", "e", "l", "l", "o", "</s>"]


# As Mistral's, which puts system message and tools before the last question.
TOOLS_LAST = ZEPHYR.replace(
    "'<|' +", "('[TOOLS]' if m.role == 'user' and not messages[loop.index + 1 :] else '') + '<|' +"
)
ENDS_ONCE = ZEPHYR.replace("m.content + eos_token", "m.content + (eos_token if loop.last or m.role == 'user' else '')")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param(ENDS_ONCE, "no stop token ends it before the text of the turn that follows", id="no stop token"),
        pytest.param(TOOLS_LAST, "renders the prompt otherwise when the answer follows it", id="no beginning"),
        pytest.param(
            CHATML.replace("m.content +", "('' if m.content == 'b' else m.content) +"),
            "nothing but a stop token is left of the answer",
            id="no text",
        ),
    ],
)
def test_a_turn_without_boundaries(template, message, tmp_path):
    """The row is malformed: its file, row and turn are named, or it is dropped. Its last answer alone would do."""
    said = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [said[0], said[3]]}] * 9 + [{"messages": said}])
    chat, rows = chat_with(template), sources.load_rows(path)
    assert load_examples(rows, chat, path=path)[0][-1].earlier is None
    with pytest.raises(
        ValueError, match=rf"row 10: the assistant's turn 'b', which sft.turns=all trains on: .*{message}"
    ):
        load_examples(rows, chat, path=path, all_turns=True)
    examples, _ = load_examples(rows, chat, path=path, all_turns=True, bad_rows="drop")
    assert [example.earlier.tolist() for example in examples] == [[]] * 9


def test_an_answer_that_is_cut_keeps_the_turns_before_it():
    chat = chat_with(ZEPHYR)
    whole = example_of(chat, TURNS)
    chat.lengths = Lengths(max_prompt=len(whole.prompt), max_length=len(whole.prompt) + 2)
    cut = example_of(chat, TURNS)
    assert cut.earlier.tolist() == whole.earlier.tolist()
    assert len(cut.real) == 2


def test_a_turn_that_the_last_prompt_reads_otherwise():
    chat = chat_with(ZEPHYR)
    example = chat.example(0, TURNS, Counter())
    example.prompt[3] += 1
    with pytest.raises(BadRow, match="the tokenizer reads it otherwise in the prompt of the last answer"):
        chat.with_earlier_answers(example)
