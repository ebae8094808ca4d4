"""Fields of messages, tools, and control tokens that depend on the text beside them: as transformers reads them."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
from dataset_rows import turn, write_jsonl

from spin_jax import tiny
from spin_jax.data import parquet, sources
from spin_jax.data.chat import ACROSS, READ_OTHERWISE, SPACE_LOST, Chat, end_of_turn, unprompted_header
from spin_jax.data.loading import load_examples
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import check_messages, prompt_turns, with_tools
from spin_jax.errors import BadRow, EmptyAnswer

PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def tokenizer_with(template, *tokens, **flags):
    """The tiny tokenizer with a template; the tokens get the flags of an AddedToken, and new ones are added."""
    from tokenizers import AddedToken

    tokenizer = tiny.tokenizer()
    added = [AddedToken(token, **{"special": True, "normalized": False, **flags}) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


# --- control tokens that take in what stands beside them -------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("said", ["Yes.", " Yes.", "\nYes.", " \n\tYes. \n", "</s> no"])
def test_white_space_beside_control_tokens(flags, said):
    """The sampler's prompt is transformers' generation prompt, and both together are the ids of the whole."""
    tokenizer = tokenizer_with(PHI, "<|user|>", "<|assistant|>", "</s>", **flags)
    chat, counts = Chat(tokenizer, [2]), Counter()
    messages = [turn("user", " hi \n"), turn("assistant", said), turn("user", "\n"), turn("assistant", said)]
    example = chat.example(0, messages, counts)
    typed = "</s>" in said  # transformers would make a control token of it
    asked, whole = ids_of(tokenizer, messages[:-1], add_generation_prompt=True), ids_of(tokenizer, messages)
    ids = [*example.prompt.tolist(), *example.real.tolist()]
    assert typed or example.prompt.tolist() == asked
    assert typed or ids == whole[: len(ids)]
    assert example.prompt.tolist() == chat.encode_prompt(messages[:-1]).tolist()
    assert example.real[-1] == 2
    kept = said.lstrip() if flags.get("rstrip") else said
    assert chat.decode(example.real) == (kept.rstrip() if flags.get("lstrip") else kept)
    assert counts[SPACE_LOST] == (flags.get("rstrip", False) and said != said.lstrip())
    assert not counts[ACROSS]


def test_an_answer_that_takes_in_the_end_of_its_prompt():
    """A control token that begins the answer and takes in white space before it: the sampler's prompt keeps this."""
    thinking = PHI.replace("m.content + eos", "('<think>' if m.role == 'assistant' else '') + m.content + eos")
    tokenizer = tokenizer_with(thinking, "<think>", lstrip=True)
    chat, counts, messages = Chat(tokenizer, [2]), Counter(), [turn("user", "hi"), turn("assistant", "Yes.")]
    example = chat.example(0, messages, counts)
    assert example.prompt.tolist() == ids_of(tokenizer, messages[:-1], add_generation_prompt=True)
    assert tokenizer.convert_ids_to_tokens(example.real.tolist()) == ["<think>", "Y", "e", "s", ".", "</s>"]
    assert +counts == {READ_OTHERWISE: 1}


def test_a_control_token_that_must_be_a_word_of_its_own():
    template = PHI.replace("|>\n'", "|>'")
    tokenizer = tokenizer_with(template, "<|assistant|>", single_word=True)
    chat, counts = Chat(tokenizer, [2]), Counter()
    messages = [turn("user", "hi"), turn("assistant", "Yes.")]
    example = chat.example(0, messages, counts)
    assert example.prompt.tolist() == ids_of(tokenizer, messages[:-1], add_generation_prompt=True)
    assert tokenizer.convert_ids_to_tokens(example.real.tolist()) == ["Y", "e", "s", ".", "</s>"]
    assert +counts == {READ_OTHERWISE: 1}


def test_no_boundary_in_a_control_token():
    chat = Chat(tokenizer_with("{% for m in messages %}{{ m.content + '<' }}{% endfor %}"), [2])
    with pytest.raises(BadRow, match=r"one token '<\|user\|>' of the prompt's end and the answer's beginning"):
        chat.encode([turn("user", "hi"), turn("assistant", "|user|>")])


def test_an_answer_of_a_stop_token_alone():
    """Its text was left out: a model must not learn to say nothing."""
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
    chat = Chat(tokenizer_with(template), [2])
    messages = [turn("user", "hi"), turn("assistant", "4</think>")]
    with pytest.raises(BadRow, match=r"nothing but a stop token is left of the answer.*'4</think>'"):
        chat.example(0, messages, Counter())
    assert chat.encode([messages[0], turn("assistant", "")])[1].tolist() == [2]


# --- the token that ends a turn ----------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(CHATML, "<|im_end|>", id="ChatML"),
        pytest.param(CHATML.replace("'<|im_end|>", "'\n<|im_end|>"), "<|im_end|>", id="after a newline"),
        pytest.param(CHATML.replace("<|im_end|>\n", "<|im_end|></s>"), None, id="before EOS"),
        pytest.param(CHATML.replace("<|im_end|>", ""), None, id="nothing"),
        pytest.param(CHATML.replace("<|im_end|>", "end<|im_end|>"), None, id="after text"),
        pytest.param(CHATML.replace("m.content", "m.content | length | string"), None, id="no answer"),
        pytest.param("{{ raise_exception('no') }}", None, id="refused"),
        pytest.param("{% for %}", None, id="broken"),
        pytest.param(None, None, id="no template"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_token_that_ends_each_answer(template, expected, special):
    tokenizer = tokenizer_with(template, "<|im_start|>", "<|im_end|>", special=special)
    token = end_of_turn(tokenizer, [2])
    assert token == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))
    assert end_of_turn(tokenizer, [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]) is None
    if token is not None:
        chat = Chat(tokenizer, [2, token])
        messages = [turn("user", "hi"), turn("assistant", "no <|im_end|> here")]
        _, response, _ = chat.encode(messages)
        assert response.tolist().count(token) == 1
        assert chat.stopped(response)
        assert chat.decode(response).rstrip("\n") == messages[-1]["content"]


@pytest.mark.parametrize(
    ("template", "header"),
    [
        (CHATML, ""),
        (CHATML.partition("{% if add")[0], "<|im_start|>assistant"),  # the model has to write it
        (CHATML.partition("{% if add")[0] + "{{ '<|im_start|>assistant\n' }}", ""),  # it is always written
        ("{% for m in messages %}{{ ('[' + m.content + '] ') if m.role == 'user' else m.content }}{% endfor %}", ""),
        ("{{ raise_exception('no') }}", ""),
    ],
)
def test_a_header_that_no_prompt_ends_with(template, header):
    assert unprompted_header(tokenizer_with(template, "<|im_start|>", "<|im_end|>")) == header


# --- texts that the template leaves out -----------------------------------------------------------

# As those of DeepSeek's distilled models and of the first Phi-3 do.
ANSWER_ALONE = tiny.CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
NO_SYSTEM = tiny.CHAT_TEMPLATE.replace("in messages", "in messages if message.role != 'system'")


@pytest.mark.parametrize(
    ("template", "messages", "note"),
    [
        (ANSWER_ALONE, [turn("user", "1"), turn("assistant", "<think>so</think> 2 ")], "answers of which"),
        (
            ANSWER_ALONE,
            [turn("user", "1"), turn("assistant", "<think>so</think>2"), turn("user", "3"), turn("assistant", "4")],
            "conversations with assistant turns of which",
        ),
        (
            NO_SYSTEM,
            [turn("system", "</s>"), turn("user", "1"), turn("assistant", "2")],
            "conversations with system turns",
        ),
        (tiny.CHAT_TEMPLATE, [turn("system", "</s>"), turn("user", "1"), turn("assistant", " <s>2")], None),
        (
            tiny.CHAT_TEMPLATE.replace("['content']", "['content'] | trim | replace(' ', '  ')"),
            [turn("user", " 1 \n 2"), turn("assistant", "\n2 3")],
            None,
        ),
    ],
)
def test_text_that_the_template_leaves_out(template, messages, note):
    counts = Counter()
    Chat(tokenizer_with(template), [2]).example(0, check_messages(messages, "messages"), counts)
    assert [what.startswith(note) for what in counts if "leaves out" in what] == [True] * (note is not None)


# --- fields ------------------------------------------------------------------------------------------

AGENT = """{%- if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' }}
{%- if m.name %}{{ m.name + ': ' }}{% endif %}
{%- if m.tool_call_id is defined %}{{ m.tool_call_id + ' gave ' }}{% endif %}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
{{- eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def call(name, **arguments):
    return {"id": "a1", "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": {"default": None, "type": "number"}}}}]
CALLING = [
    turn("user", "1+2?") | {"name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [call("add", x=1, y=[2])]},
    turn("tool", "3") | {"tool_call_id": "a1", "name": "add"},
    {"role": "assistant", "content": "3", "reasoning_content": "It said so."},
]
REASONING = [turn("user", "1+2?"), turn("assistant", "3") | {"reasoning_content": "2 and 1"}]
LAST_CALL = [turn("user", "1+2?"), {"role": "assistant", "tool_calls": [call("add", x="1"), call("other", z={})]}]
ROWS = [
    {"messages": CALLING, "tools": TOOLS},
    {"messages": REASONING, "tools": None},
    {"messages": LAST_CALL, "tools": json.dumps(TOOLS)},
]


@pytest.fixture(scope="module")
def agent():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = AGENT
    return Chat(tokenizer, [2])


@pytest.mark.parametrize("row", ROWS, ids=["tools", "reasoning", "a call as the answer"])
def test_messages_reach_the_template_whole(agent, row, tmp_path):
    """The ids are transformers' own for the same messages and tools; the answer is what follows the prompt."""
    before, tools = copy.deepcopy(row), TOOLS if row["tools"] else None
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    (example,), counts = load_examples(sources.load_rows(path), agent, path=path)
    whole = ids_of(agent.tokenizer, row["messages"], tools=tools)
    asked = ids_of(agent.tokenizer, row["messages"][:-1], tools=tools, add_generation_prompt=True)
    assert example.prompt.tolist() == asked == agent.encode_prompt(example.messages[:-1]).tolist()
    assert [*example.prompt, *example.real] == whole
    assert not counts
    assert row == before


def test_rows_of_arrow_are_rows_of_json(agent, tmp_path):
    """Arrow gives every struct all fields of the others; those that are null are no fields."""
    import datasets

    rows = [{**row, "tools": json.dumps(row["tools"])} for row in ROWS[:2]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    one = load_examples(sources.load_rows(path), agent, path=path)[0]
    other = load_examples(datasets.Dataset.from_list(rows), agent, path="x")[0]
    assert [example.messages for example in other] == [example.messages for example in one]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.real, b.real)


def test_nulls_of_json_columns_stay(agent, tmp_path):
    """`datasets` keeps messages of several forms in a column of JSON, and there a null is an argument's value."""
    datasets = pytest.importorskip("datasets", minversion="5.0")
    calls = [call("add", x=None, y="1"), call("add", y=2)]
    rows = [{"messages": [turn("user", "1"), {"role": "assistant", "tool_calls": [each]}]} for each in calls]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(str(tmp_path / "x.parquet"))
    examples, _ = load_examples(sources.load_rows(str(tmp_path / "x.parquet")), agent, path="x")
    assert [example.messages[-1]["tool_calls"] for example in examples] == [[each] for each in calls]


def test_pairs_keep_the_fields(agent, tmp_path):
    """Through a file of pairs, and through the rows of that file; plain messages have the published columns."""
    examples = [
        agent.example(n, agent.with_fields(check_messages(row["messages"], "messages"), row)[0], Counter())
        for n, row in enumerate(ROWS)
    ]
    pairs = [agent.pair(example, 0, np.array([40, 2], np.int32)) for example in examples]
    content = parquet.pairs_to_parquet(pairs)
    assert [p.real_messages for p in parquet.pairs_from_parquet(content)] == [e.messages for e in examples]
    (tmp_path / "x.parquet").write_bytes(content)
    rows = sources.load_rows(str(tmp_path))
    loaded, _ = load_pairs(rows, agent, path="x", vocab_size=272)
    assert parquet.pairs_to_parquet(loaded) == content
    without_ids = [{name: row[name] for name in ("real", "generated")} for row in rows]
    given, _ = load_pairs(without_ids, agent, path="x", vocab_size=272)
    assert [pair.real.tolist() for pair in given] == [example.real.tolist() for example in examples]
    plain = agent.example(9, [turn("user", "1"), turn("assistant", "2")], Counter())
    assert b"other_fields" not in parquet.pairs_to_parquet([agent.pair(plain, 0, np.array([40, 2], np.int32))])


def test_fields_that_the_template_does_not_name(chat, agent, tmp_path):
    """Dates, weights and ids change neither an example, nor its fingerprint, nor a file of pairs."""
    plain = {"messages": [turn("user", "1+2"), turn("assistant", "3")]}
    row = {"messages": [turn("user", "1+2") | {"date": "today", "name": "Ann"}, turn("assistant", "3") | {"weight": 1}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, plain])
    (one, two), counts = load_examples(sources.load_rows(path), chat, path=path)
    assert counts == {
        "not used: columns date (in messages), name (in messages), weight (in messages); rows with them": 1
    }
    assert one.messages == two.messages == plain["messages"]
    (one, _), _ = load_examples(sources.load_rows(path), agent, path=path)
    assert one.messages == [turn("user", "1+2") | {"name": "Ann"}, turn("assistant", "3")]
    pairs = [{"real": row["messages"], "generated": [turn("user", "1+2"), turn("assistant", "4")]}]
    assert load_pairs(pairs, chat, path="x", vocab_size=272)[0][0].real_messages == plain["messages"]


def test_tool_calls_that_the_template_cannot_render(chat, tmp_path):
    """Without them an assistant turn would be empty, or there would be no answer."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match=r"row 1: a turn calls tools, and the chat template renders no tool_calls"):
        load_examples(sources.load_rows(path), chat, path=path)


@pytest.mark.parametrize("read", ["m.content", "'' if m.content is none else m.content[0:]", "m.content | string"])
def test_null_content_is_what_the_template_can_read(read):
    """transformers leaves it out; some templates only render it as null, and some only as no text."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = AGENT.replace(
        "{%- if m.content %}{{ m.content }}{% endif %}", "{{ '' + " + f"({read})" + " }}"
    )
    text = Chat(tokenizer, [2]).render(check_messages(CALLING, "messages"), prompt=False)
    assert '<|assistant|><call>{"name": "add"' in text


def test_tool_calls_that_the_template_leaves_out():
    """DeepSeek-V3's renders them only where the content is null, and only arguments that are text."""
    template = AGENT.replace("m.tool_calls or []", "(m.tool_calls if m.content is none else [])")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template.replace("{%- if m.content %}", "{%- if 'x' in (m.content or '') or m.content %}")
    messages = check_messages(CALLING, "messages")
    assert '<call>{"name": "add"' in Chat(tokenizer, [2]).render(messages, prompt=False)
    messages[1]["content"] = ""
    with pytest.raises(BadRow, match="refuses the conversation: it leaves out the tool_calls of a turn without"):
        Chat(tokenizer, [2]).render(messages, prompt=False)
    tokenizer.chat_template = tokenizer.chat_template.replace("(call.function | tojson)", "call.function.arguments")
    with pytest.raises(BadRow, match="fails on the conversation: TypeError"):
        Chat(tokenizer, [2]).render(check_messages(CALLING, "messages"), prompt=False)


SHOWN = "(call.function | tojson)"


@pytest.mark.parametrize(
    ("shown", "objects"),
    [
        ("call.function.arguments | tojson", True),  # Qwen 2.5 and Llama 3.1: JSON text would become JSON once more
        ("call.function.arguments.items() | map('join', '=') | join", True),  # Qwen3-Coder: it fails on text
        ("'{' + call.function.arguments + '}' if call.function.arguments is string else 'x'", True),  # Gemma 4
        ("call.function.arguments if call.function.arguments is string else 'x'", False),  # Qwen 3
        ("call.function.name + call.function.arguments", False),  # DeepSeek: it fails on objects
        ("raise_exception('no calls')", False),
    ],
)
def test_arguments_as_json_text(shown, objects):
    """OpenAI's format has them; a template gets the object unless it shows the text as it is."""
    tokenizer = tokenizer_with(AGENT.replace(SHOWN, f"({shown})"))
    chat, values = Chat(tokenizer, [2]), {"a": "</s> é", "b": "1"}
    text = json.dumps(values).replace("<", "\\u003c")
    for arguments in (text, "no object", "[1]"):
        wanted = values if objects and arguments is text else arguments
        given, expected = (
            [turn("user", "1"), {"role": "assistant", "content": "", "tool_calls": [call("f") | {"function": f}]}]
            for f in ({"name": "f", "arguments": arguments}, {"name": "f", "arguments": wanted})
        )
        try:
            theirs = tokenizer.apply_chat_template(expected, tokenize=False)
        except Exception:
            with pytest.raises(BadRow):
                chat.encode(given)
            continue
        prompt, answer, _ = chat.encode(given)
        assert tokenizer.decode([*prompt, *answer]) == theirs
        assert answer.tolist().count(2) == 1  # what an argument spells is no stop token


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_by_any_name(name, read, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = AGENT.replace("reasoning_content", read)
    row = {"messages": [turn("user", "1"), turn("assistant", "2") | {name: "so"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    chat = Chat(tokenizer, [2])
    (example,), _ = load_examples(sources.load_rows(path), chat, path=path)
    assert chat.decode(example.real) == "<think>so</think>2"


def test_prompts_differ_in_any_field():
    def prompt(**fields):
        return prompt_turns(check_messages([turn("user", "1") | fields, turn("assistant", "2")], "messages"))

    assert prompt() == prompt(name=None) != prompt(name="Ann") != prompt(tools=TOOLS)
    with pytest.raises(BadRow, match="do not answer the same prompt"):
        Chat(tiny.tokenizer(), [2]).given_pair(0, 0, CALLING, [CALLING[0], *CALLING[2:]], Counter())


def test_control_tokens_in_any_field_stay_text(agent):
    messages = copy.deepcopy(CALLING)
    messages[1]["tool_calls"] = [call("</s>", **{"<|user|>": ["</s>", {"a": "<s>"}]})]
    messages[-1]["reasoning_content"] = "</s> it says"
    row = {"tools": [{"name": "<|assistant|>"}]}
    prompt, response, _ = agent.encode(with_tools(check_messages(messages, "messages"), row))
    assert [prompt.tolist().count(token) for token in (1, 2, 3, 4, 5)] == [0, 3, 1, 2, 2]
    assert response.tolist().count(2) == 1
    assert agent.decode(response) == "<think></s> it says</think>3"


def test_a_template_of_its_own_for_tools():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": AGENT}
    chat = Chat(tokenizer, [2])
    for tools in (None, TOOLS):
        messages = with_tools(check_messages(CALLING[:1] + REASONING[1:], "messages"), {"tools": tools})
        expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert chat.render(messages, prompt=False) == expected
        assert ("<think>" in expected) == bool(tools)


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "1+", "image": None}, {"type": "text", "text": "2"}]
    (first, _) = check_messages([turn("user", parts), turn("assistant", [])], "messages")
    assert first["content"] == "1+2"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [turn("user", [{"type": "image", "url": "x"}]), turn("assistant", "3")],
            r"messages\[0\].content is list: expected text, or parts of type 'text', and part 0 is of type 'image'",
        ),
        ([turn("user", [{"type": "text"}]), turn("assistant", "3")], "part 0 is of type 'text'"),
        ([turn("user", ["1"]), turn("assistant", "3")], "part 0 is no dict but str"),
        ([turn("tool", "1"), turn("assistant", "3")], r"messages\[0\].role is 'tool'"),
        ([*CALLING[:2], CALLING[3]], "two assistant turns in a row"),
        ([turn("user", "1"), turn("assistant", "2") | {"tool_calls": ["\ud800"]}], r"\[1\].tool_calls has half a char"),
        ([turn("user", "1") | {"other_fields": "{"}, turn("assistant", "3")], "other_fields is no JSON text"),
    ],
)
def test_messages_that_are_refused(messages, message):
    with pytest.raises(BadRow, match=message):
        check_messages(messages, "messages")


@pytest.mark.parametrize("tools", ["{", "3", 3, ["3"], [3], '["\\ud800"]', {"name": "add"}])
def test_tools_that_are_refused(tools):
    with pytest.raises(BadRow, match="tools: expected a list of JSON objects"):
        with_tools([turn("user", "1")], {"tools": tools})


def test_reasoning_alone_is_no_answer(agent):
    messages = [turn("user", "1"), {"role": "assistant", "content": None, "reasoning": "so"}]
    with pytest.raises(EmptyAnswer):
        agent.example(0, check_messages(messages, "messages"), Counter())
