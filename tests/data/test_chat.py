"""Text to tokens: what the Contracts of a conversation promise."""

import datetime
import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from runs import SHARED

from spin_jax import tiny
from spin_jax.data.chat import Chat, _private_name
from spin_jax.data.chat_template import _Watchdog
from spin_jax.data.records import Lengths, check_messages
from spin_jax.errors import BadRow, BadTemplate, EmptyAnswer

USER, ANSWER = {"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}


@pytest.fixture(scope="module")
def mistral():
    if not SHARED.exists():
        pytest.skip("the real Mistral tokenizer is not here")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "mistral_tokenizer")


@pytest.fixture
def chat():
    tokenizer = tiny.tokenizer()
    return Chat(tokenizer, [tokenizer.eos_token_id])


def pieces(chat, ids):
    return chat.tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def test_cut_at_the_response(chat):
    prompt, response, straddled = chat.encode([USER, ANSWER])
    assert pieces(chat, prompt) == ["<|user|>", "1", "+", "2", "</s>", "<|assistant|>"]
    assert pieces(chat, response) == ["3", "</s>"]
    assert not straddled
    np.testing.assert_array_equal(prompt, chat.encode_prompt([USER]))


def test_real_conversations_tokenize_as_transformers_does(mistral):
    """Whole conversations of GSM8K: prompt + response is a prefix of transformers' own ids."""
    chat = Chat(mistral, [2])
    for line in (SHARED / "gsm8k/train.jsonl").read_text().splitlines()[:50]:
        row = json.loads(line)
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        prompt, response, _ = chat.encode(messages)
        ids = np.concatenate([prompt, response])
        whole = mistral(mistral.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
        np.testing.assert_array_equal(ids, whole["input_ids"][: len(ids)])
        assert response[-1] == 2
        assert 2 not in response[:-1]
        assert whole["input_ids"][len(ids) :] == [13]  # the template's newline is no part of the answer
        assert chat.decode(response) == row["answer"]


@pytest.mark.parametrize("text", ["</s>", "a </s> b", "<s></s><unk>", "</s></s>", "<</s>/s>"])
def test_control_tokens_typed_by_a_user_stay_text(mistral, text):
    """The ids are those of the same text without control tokens, and decode to what was typed."""
    chat = Chat(mistral, [2])
    asked, answered = f"say {text} now", f"no {text}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    prompt, response, _ = chat.encode(messages)
    assert list(prompt).count(2) == 1  # the template's own
    assert list(response).count(2) == 1
    assert response[-1] == 2
    assert not {0, 1} & {*map(int, prompt), *map(int, response)}
    assert asked in mistral.decode(prompt, skip_special_tokens=True)
    assert mistral.decode(response, skip_special_tokens=True) == answered


def test_guarded_tokenization_is_the_plain_one(mistral):
    """Where no message holds a control token, the twin tokenizer gives the same ids."""
    chat = Chat(mistral, [2])
    for text in ("Hello there", " leading", "日本語 é 🙂", "line\n\nline"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        texts = [(chat._text(messages, guard, prompt=False), guard) for guard in (False, True)]
        np.testing.assert_array_equal(*(chat._tokenize(text, guard)[0] for text, guard in texts))


def test_system_message_only_when_configured(mistral):
    assert "system" not in mistral.decode(Chat(mistral, [2]).encode_prompt([USER]))
    empty = Chat(mistral, [2], system_message="")
    assert mistral.decode(empty.encode_prompt([USER])).startswith("<|system|>\n</s>")
    own = [{"role": "system", "content": "Be brief."}, USER]
    assert mistral.decode(empty.encode_prompt(own)).count("<|system|>") == 1


def test_multi_turn(chat):
    """The last assistant turn is the response; earlier ones are prompt."""
    prompt, response, _ = chat.encode([{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER])
    assert pieces(chat, prompt).count("<|assistant|>") == 2
    assert pieces(chat, response) == ["3", "</s>"]


def test_straddling_token_belongs_to_the_response():
    """A merge across the boundary: the prompt ends before it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(["</s>", "q", ":", "a", ":a"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'user' %}:{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = Chat(tokenizer, [0])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    prompt, response, straddled = chat.encode(messages)
    assert pieces(chat, prompt) == ["q"]
    assert pieces(chat, response) == [":a", "</s>"]
    assert straddled
    counts = Counter()
    chat.example(0, messages, counts)
    assert counts["tokens across the boundary"] == 1
    _, _, straddled = chat.encode([messages[0], {"role": "assistant", "content": "q"}])
    assert not straddled


def with_template(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer, [tokenizer.eos_token_id])


def test_template_that_changes_the_prompt_is_refused():
    chat = with_template("{{ messages | length }}" + tiny.CHAT_TEMPLATE)
    with pytest.raises(BadRow, match="does not begin"):
        chat.encode([USER, ANSWER])


def test_template_that_refuses_a_row():
    chat = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRow, match="refuses the conversation: roles must alternate"):
        chat.encode([USER, ANSWER])


LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content =
'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
GENERATION = """{% for message in messages %}{% if message.role == 'assistant' %}
<|assistant|>{% generation %}{% set said = message.content | trim %}{{ said }}{{ eos_token }}
{% endgeneration %}{{ said }}{% else %}
<|{{ message.role }}|>{{ message.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
LOOP_CONTROLS = """{% set seen = namespace(users=0, role=none) %}{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if seen.users > 2 %}{% break %}{% endif %}
{% set seen.users = seen.users + (message.role == 'user') * 1 %}
{{ '%-6s' % message.role }}{{ "{:>8}".format(message.content) }}{{ ' ' * loop.index }}
{{ [message, dict(a=1)] | tojson(indent=2) | indent(4) }}{{ ['a', 'b'] | map('upper') | join('-') }}
{{ message.content.replace('e', 'ee').center(20) }}{{ messages[1:] | length }}{{ 7 // 2 * 3 ** 2 % 5 }}
{% endfor %}{% if tools is none and documents is not defined %}x{% endif %}"""
CONVERSATIONS = [
    [USER, ANSWER],
    [
        {"role": "system", "content": " s "},
        USER,
        ANSWER,
        USER,
        {"role": "assistant", "content": "é\n🙂 {{ 1 }}"},
    ],
    [USER, {"role": "assistant", "content": ""}] * 3,
]


# What the templates of Qwen2.5 and SmolLM2, Qwen3, DeepSeek-R1's kind and Llama 3.1 do beside: each in small.
INVENTS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
THINKS = """{%- for m in messages %}
    {%- set said = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content %}
    {{- '<|im_start|>' ~ m.role ~ '\n' }}
    {%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
    {{- said ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
BEGINS_TO_THINK = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def test_a_system_prompt_that_the_template_invents_is_its_own():
    """Rendered alike for prompt and whole, and replaced by one that the config or the row gives."""
    chat = with_template(INVENTS_SYSTEM)
    prompt, response, _ = chat.encode([USER, ANSWER])
    assert "Be helpful." in chat.render([USER], prompt=True)
    assert chat.tokenizer.decode(prompt) == chat.tokenizer.decode(chat.encode_prompt([USER]))
    assert chat.decode(response).startswith("3")
    own = [{"role": "system", "content": "Be brief."}, USER]
    assert "Be helpful." not in chat.render(own, prompt=True)


def test_an_empty_thought_belongs_to_the_answer():
    """The template writes it after the generation prompt: what follows that is the response."""
    chat = with_template(THINKS)
    earlier = {"role": "assistant", "content": "<think>\nlong\n</think>\n\n4"}
    messages = [USER, earlier, USER, ANSWER]
    prompt, response, _ = chat.encode(messages)
    text = chat.render(messages, prompt=False)
    before = chat.render(messages[:-1], prompt=True)
    assert "long" not in before
    assert text.removeprefix(before).startswith("<think>\n\n</think>\n\n3")
    np.testing.assert_array_equal(prompt, chat.encode_prompt(messages[:-1]))
    assert chat.tokenizer.decode(response) == chat.tokenizer.decode(
        chat.tokenizer(text.removeprefix(before), add_special_tokens=False)["input_ids"]
    )


def test_a_thought_that_the_prompt_begins_and_the_answer_has_not_is_an_error():
    with pytest.raises(BadRow, match="renders the prompt otherwise when the answer follows"):
        with_template(BEGINS_TO_THINK).encode([USER, ANSWER])


def test_the_date_is_the_one_that_is_given():
    """Today's, as in transformers; a run that goes on the next day is told the first one's."""
    tokenizer = with_template(DATED).tokenizer
    then = Chat(tokenizer, [tokenizer.eos_token_id], today=datetime.date(2024, 7, 26))
    assert then.render([USER], prompt=True).startswith("26 Jul 2024")
    today = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert with_template(DATED).render([USER], prompt=True) == today


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, LLAMA_3, CHATML, GENERATION, LOOP_CONTROLS])
def test_templates_render_as_in_transformers(template):
    chat = with_template(template)
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            expected = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert chat.render(messages, prompt=prompt) == expected
            assert expected


def test_zephyrs_template_renders_as_in_transformers(mistral):
    chat = Chat(mistral, [2])
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            expected = mistral.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert chat.render(messages, prompt=prompt) == expected


def test_rendering_takes_no_longer_than_in_transformers(chat):
    """It is done twice for every row. Measured: half as long."""

    def fastest(render):
        took = []
        for _ in range(200):
            began = time.perf_counter()
            render()
            took.append(time.perf_counter() - began)
        return min(took)

    messages = [USER, ANSWER] * 3
    ours = fastest(lambda: chat.render(messages, prompt=False))
    theirs = fastest(lambda: chat.tokenizer.apply_chat_template(messages, tokenize=False))
    assert ours < theirs


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='twice') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
BROKEN = [
    ("{% for %}", "the chat template, line 1: "),
    ("a\n{{ 1 | nothing }}", "the chat template, line 2: No filter named 'nothing'"),
    ("{{ messages[0].nothing.content }}", "the chat template fails: UndefinedError"),
    ("{{ mesages[0].content }}", "the chat template fails: UndefinedError: 'mesages' is undefined"),
    ("{{ ''.__class__.__mro__ }}", "the chat template fails: SecurityError: access to attribute '__class__'"),
    ("{{ ''['__class__'].x }}", "the chat template fails: SecurityError"),
    ("{{ ('%s' | attr('__class__')).x }}", "the chat template fails: SecurityError"),
    ("{{ messages.append(1) }}", "the chat template fails: SecurityError"),
    ("{{ dict.update(messages[0], {'content': 'x'}) }}", "the chat template fails: UndefinedError"),
    ("{% set n = namespace(__class__=1) %}", "the chat template fails: SecurityError"),
    ("{% include 'a' %}", "the chat template fails: TypeError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails: RecursionError"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "the chat template does not compile: RecursionError"),
    ("{{ 10**(10**9) }}", "the chat template fails: SecurityError: a number of"),
    (
        "{% set n = namespace(n=99) %}{% for i in range(99) %}{% set n.n = n.n * n.n %}{% endfor %}",
        "a number of",
    ),
    ("{{ 'x' * 10**12 }}", "the chat template fails: SecurityError: an operation that could"),
    ("{{ 1000000000000 * 'x' }}", "an operation that could"),
    ("{{ [1] * 10**12 }}", "an operation that could"),
    ("{{ '%1000000000000d' % 1 }}", "an operation that could"),
    ("{{ '%*d' % (1000000000000, 1) }}", "an operation that could"),
    ("{{ '%1000000000000d' | format(1) }}", "an operation that could"),
    ("{{ '{:>1000000000000}'.format(1) }}", "an operation that could"),
    ("{{ '{:>{}}'.format(1, 1000000000000) }}", "an operation that could"),
    ("{{ 'x'.center(1000000000000) }}", "an operation that could"),
    ("{{ 'x' | center(1000000000000) }}", "an operation that could"),
    ("{{ 'x'.encode().ljust(1000000000000) }}", "an operation that could"),
    ("{{ ('x' * 100000).replace('x', 'y' * 100000) }}", "an operation that could"),
    ("{{ ('x' * 100000) | replace('x', 'y' * 100000) }}", "an operation that could"),
    ("{{ ('x' * 100000).join(['a'] * 100000) }}", "an operation that could"),
    ("{{ range(20000) | map('string') | join('x' * 10000) }}", "an operation that could"),
    ("{{ messages | tojson(indent=1000000000000) }}", "an operation that could"),
    ("{{ 1.5 | round(1000000000) }}", "an operation that could"),
    ("{{ range(10**9) }}", "the chat template fails: OverflowError: Range too big"),
]


@pytest.mark.parametrize(("template", "message"), BROKEN)
def test_a_broken_template_fails_at_once(template, message):
    """Before any row is seen, in a moment, and naming the template; and where rows come later, so do they."""
    began = time.perf_counter()
    with pytest.raises(BadTemplate, match=re.escape(message)):
        with_template(template)
    assert time.perf_counter() - began < 5
    if not message.startswith(("the chat template, line", "the chat template does not")):
        later = with_template("{% if messages | length == 5 %}" + template + "{% endif %}x")
        with pytest.raises(BadRow, match="the chat template"):
            later.render([USER] * 5, prompt=False)


def test_a_template_may_refuse_what_it_likes():
    """Gemma's refuses system messages; another may want one, or refuse what it is tried with."""
    refusal = "{{ raise_exception('no') }}"
    for refused in ("messages[0].role == 'system'", "messages[0].role != 'system'", "messages | length < 5"):
        with_template("{% if " + refused + " %}" + refusal + "{% endif %}" + tiny.CHAT_TEMPLATE)
    with_template("{{ messages[0].content + messages[messages | length > 2].content }}")
    wants_system = with_template("{% if messages[0].role == 'user' %}{{ none.x.y }}{% endif %}x")
    with pytest.raises(BadRow, match="the chat template refuses the conversation: 'None' has no attribute"):
        wants_system.encode([USER, ANSWER])


@pytest.mark.parametrize("template", [LOOP, DOUBLING])
def test_a_template_that_goes_on_and_on_is_stopped(monkeypatch, template):
    """In every thread, at whatever it is; and what runs there afterwards is left alone."""
    monkeypatch.setattr("spin_jax.data.chat_template.RENDER_SECONDS", 0.5 if template is LOOP else 30)
    monkeypatch.setattr("spin_jax.data.chat_template.RENDER_BYTES", 2**28)
    with pytest.raises(BadTemplate, match="the chat template was stopped: it took more than"):
        with_template(template)
    chat = with_template("{% if messages | length == 5 %}" + template + "{% endif %}x")

    def render(number):
        if number % 2:
            return chat.render([USER], prompt=False)
        with pytest.raises(BadTemplate, match="was stopped") as stopped:
            chat.render([USER] * 5, prompt=False)
        time.sleep(0.2)  # an exception that came late would come here
        return type(stopped.value).__name__

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, range(4))) == ["BadTemplate", "x"] * 2
    assert render(0) == "BadTemplate"
    assert render(1) == "x"


def test_the_watchdog_never_hits_what_comes_after(monkeypatch):
    """Actions that end just as their time does: each returns or is stopped, and nothing is raised later."""
    monkeypatch.setattr("spin_jax.data.chat_template.RENDER_SECONDS", 0.02)
    watchdog, ends = _Watchdog(), Counter()

    def action(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
        return "returned"

    for number in range(100):
        try:
            ends[watchdog.run(lambda n=number: action(0.015 + n * 1e-4))] += 1
        except BadTemplate:
            ends["stopped"] += 1
    action(0.1)
    assert ends.total() == 100
    assert ends["returned"]
    assert ends["stopped"]
    assert not watchdog._running


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00\ud800"])
def test_half_characters_are_refused(text):
    for messages in (
        [{"role": "user", "content": text}, ANSWER],
        [USER, {"role": "assistant", "content": text}],
    ):
        with pytest.raises(BadRow, match=r"messages\[.\].content has half a character"):
            check_messages(messages, "messages")


def test_private_characters_make_no_control_token(chat):
    """The names under which the guard keeps the template's control tokens cannot be typed."""
    forged = [{"role": "user", "content": "</s> " + _private_name("</s>")}, ANSWER]
    with pytest.raises(BadRow, match="characters for private use"):
        chat.encode(forged)
    alone, _, _ = chat.encode([{"role": "user", "content": _private_name("</s>")}, ANSWER])
    assert list(alone).count(2) == 1  # the template's own


def test_a_prompt_of_no_token():
    chat = with_template("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}")
    with pytest.raises(BadRow, match="makes no token of the prompt"):
        chat.example(0, [USER, ANSWER], Counter())
    with pytest.raises(EmptyAnswer, match="the answer has no token"):
        with_template("a{{ messages[0].content }}").example(0, [USER, ANSWER], Counter())


@pytest.mark.parametrize("text", ["word ", "x", "<s></s>"])
def test_megabytes_are_dropped_without_tokenizing_them(chat, text):
    chat.lengths = Lengths(512, 1024)
    counts, began = Counter(), time.perf_counter()
    huge = {"role": "user", "content": text * (5_000_000 // len(text))}
    assert chat.example(0, [huge, ANSWER], counts) is None
    assert counts == {"dropped: prompt too long": 1}
    assert time.perf_counter() - began < 2
    fits = {"role": "user", "content": text * (500 // len(text))}
    assert chat.example(0, [fits, ANSWER], Counter()) is not None


def test_no_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"config\.data\.chat_template"):
        Chat(tokenizer, [2])
    tokenizer.chat_template = {"tool_use": "x"}
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        Chat(tokenizer, [2])


def test_lengths(chat):
    """Long prompts are dropped, long answers cut without an EOS of our own; both are counted."""
    chat.lengths = Lengths(max_prompt=6, max_length=8)
    counts = Counter()
    example = chat.example(7, [USER, {"role": "assistant", "content": "12345"}], counts)
    assert pieces(chat, example.real) == ["1", "2"]
    assert chat.example(8, [{"role": "user", "content": "1+2+3"}, ANSWER], counts) is None
    with pytest.raises(EmptyAnswer):
        chat.example(9, [USER, {"role": "assistant", "content": " "}], counts)
    assert +counts == {"cut: answer too long": 1, "dropped: prompt too long": 1}


def test_pair_keeps_the_samplers_ids(chat):
    example = chat.example(3, [USER, ANSWER], Counter())
    _, sampled, _ = chat.encode([USER, {"role": "assistant", "content": "44"}])
    pair = chat.pair(example, 0, sampled)
    np.testing.assert_array_equal(pair.generated, sampled)
    assert pair.generated_messages == [USER, {"role": "assistant", "content": "44"}]
    assert not pair.truncated
    assert not pair.identical
    assert chat.pair(example, 0, sampled[:-1]).truncated
    assert chat.pair(example, 0, example.real).identical
