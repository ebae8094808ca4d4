"""Bad configs, config files and model directories: each is refused by name, before anything is compiled."""

import copy
import functools
import json
import math
import random
import shutil
import string
import struct
import subprocess
import sys
from fractions import Fraction

import pytest
from runs import ROOT

from spin_jax import config as config_lib
from spin_jax import config_values, errors, tiny
from spin_jax.evaluate import verifiers
from spin_jax.models import loading
from spin_jax.runtime import user_code
from spin_jax.selfplay import from_config, inputs
from spin_jax.storage import files
from spin_jax.training import custom_loss

INDEX = "model.safetensors.index.json"


# --- the command line ----------------------------------------------------------------------------

# What a user's own config file can be, by name.
CONFIG_FILES = {
    "syntax.py": "def get_config(:\n  pass\n",
    "raises.py": "x = 1\ndef get_config():\n  return x / 0\n",
    "imports.py": "import no_such_module\n",
    "without.py": "x = 1\n",
    "none.py": "def get_config():\n  pass\n",
    "list.py": "def get_config():\n  return [1]\n",
    "variants.py": "def get_config(variant):\n  raise KeyError(variant)\n",
    "typed.py": "from spin_jax import config\ndef get_config():\n  c = config.default()\n  c.seed = 'x'\n",
    "boom.py": "raise RuntimeError('boom')\n",
}
TINY = "--config=configs/tiny.py:smoke"
# Arguments, and what the error says; DIR is where the files above are.
COMMANDS = [
    (["--config=configs/tiyn.py"], "no config file configs/tiyn.py; did you mean configs/tiny.py?"),
    (["--config", "configs/tiyn.py", "--config.seed=3"], "did you mean configs/tiny.py?"),
    (["--config=nowhere/tiny.py"], "no config file nowhere/tiny.py"),
    (["--config=configs"], "no config file configs"),
    (["--config=configs/tiny.py:smok"], "configs/tiny.py has the variant smoke, not 'smok'"),
    (["--config=configs/small_gsm8k.py:x"], "configs/small_gsm8k.py has no variants: leave out :x"),
    (["--config=DIR/syntax.py"], "DIR/syntax.py:1: SyntaxError: "),
    (["--config=DIR/raises.py"], "DIR/raises.py:3: ZeroDivisionError: division by zero"),
    (["--config=DIR/imports.py"], "DIR/imports.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
    (["--config=DIR/without.py"], "DIR/without.py has no function get_config"),
    (["--config=DIR/none.py"], "DIR/none.py: get_config returns None, and should return a ConfigDict"),
    (["--config=DIR/none.py", "--config.seed=3"], "DIR/none.py: get_config returns None"),
    (["--config=DIR/list.py"], "DIR/list.py: get_config returns [1], and should return a ConfigDict"),
    (["--config=DIR/variants.py"], "DIR/variants.py needs a variant: FILE:VARIANT"),
    (["--config=DIR/variants.py:v"], "DIR/variants.py:2: KeyError: 'v'"),
    (["--config=DIR/typed.py"], "DIR/typed.py:4: TypeError: "),
    (["--config=DIR/boom.py"], "DIR/boom.py:1: RuntimeError: boom"),
    ([TINY, "--config.train.batch_size=1.5"], "config.train.batch_size=1.5: a whole number is wanted"),
    ([TINY, "--config.seed=abc"], "config.seed=abc: a whole number is wanted"),
    ([TINY, "--config.train.remat=3"], "train.remat='3': one of none, attention, attention+mlp, full"),
    ([TINY, "--config.logging.plot=maybe"], "config.logging.plot=maybe: true or false is wanted"),
    ([TINY, "--config.train.eps=small"], "config.train.eps=small: a number is wanted"),
    ([TINY, "--config.logging.profile_steps=13,10"], "logging.profile_steps=(13, 10): the first and the last step"),
    ([TINY, "--config.loss.beta=x"], "loss.beta=('x',): a number is wanted, or several"),
    ([TINY, "--config.loss.beta=(1,'a')"], "loss.beta=(1, 'a'): a number is wanted, or several"),
    ([TINY, "--config.sft=3"], "--config.sft=3: a section is wanted"),
    (
        [TINY, "--config.model.architecture.hidden_sise=3"],
        "did you mean model.architecture.hidden_size?",
    ),
    ([TINY, "--config.model.architecture.hidden_size=abc"], "--config.model.architecture.hidden_size=abc"),
    ([TINY, "--config.train.momentum=1.5"], "train.momentum=1.5: at least 0 and below 1"),
    ([TINY, "--config.train.eps=nan"], "train.eps=nan: at least 1e-37"),
    ([TINY, "--config.train.batch_size", "x"], "config.train.batch_size=x: a whole number is wanted"),
    (["--config"], "no config file --workdir="),
    ([TINY, "--config.loss.betta=1"], "config has no key loss.betta; did you mean loss.beta?"),
    ([TINY, "--config.seed.x=1"], "config has no key seed.x"),
    (["--config.seed=abc", TINY], "config.seed=abc: a whole number is wanted"),
]
# Runs each list of arguments in a process of its own, forked where nothing but the imports has happened.
DRIVER = """
import json, os, sys, tempfile
from spin_jax import main
for argv in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as said:
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), 2)
            sys.argv = argv
            try:
                code = main.main(argv)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        print(json.dumps([code, said.read()]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(exit code, standard error) of each of COMMANDS."""
    folder = tmp_path_factory.mktemp("configs")
    for name, text in CONFIG_FILES.items():
        (folder / name).write_text(text)
    given = [
        ["main", *(argument.replace("DIR", str(folder)) for argument in arguments), f"--workdir={folder}/run"]
        for arguments, _ in COMMANDS
    ]
    result = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not (folder / "run").exists()
    return [(code, said.replace(str(folder), "DIR")) for code, said in map(json.loads, result.stdout.splitlines())]


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[" ".join(given) for given, _ in COMMANDS])
def test_mistaken_commands(number, answers):
    """Exit code 2 and a line or two that name the file or key; no traceback."""
    code, said = answers[number]
    lines = [line for line in said.splitlines() if not line.startswith("WARNING")]
    assert COMMANDS[number][1] in said
    assert code == 2
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2, said


# --- values --------------------------------------------------------------------------------------


def smoke():
    """configs/tiny.py:smoke as nested dicts."""
    namespace = {}
    exec((ROOT / "configs" / "tiny.py").read_text(), namespace)
    return namespace["get_config"]("smoke").to_dict()


SMOKE = smoke()


def numbers(section, prefix=""):
    """(name, value) of every key of numbers."""
    for key, value in section.items():
        name, kind = f"{prefix}{key}", section.get_type(key)
        if hasattr(value, "items"):
            yield from numbers(value, f"{name}.")
        elif kind in (int, float) or (kind is tuple and not isinstance((value or (0,))[0], str)):
            yield name, (value or (0,)) if kind is tuple else value


def changed(name, value):
    """SMOKE with another value for a key."""
    config = copy.deepcopy(SMOKE)
    section = config
    *sections, key = name.split(".")
    for part in sections:
        section = section[part]
    section[key] = value
    return config


@pytest.mark.parametrize("name", [name for name, _ in numbers(config_lib.default())])
def test_every_number_has_a_range(name):
    """NaN, infinities and numbers far below it are refused by name, text and truth values as well."""
    kind = dict(numbers(config_lib.default()))[name]
    low = -(10**9)
    bad = [low, math.nan, math.inf, -math.inf, True, "x", [[1]], {}, {"a": 1}]
    if not isinstance(kind, tuple):
        bad += [(1,), [1, 2]]
    for value in bad:
        with pytest.raises(errors.ConfigError, match=name.replace(".", r"\.")):
            config_lib.resolve(changed(name, value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.momentum", 1.5, "train.momentum=1.5: at least 0 and below 1"),
        ("train.momentum", 1, "train.momentum=1.0: at least 0 and below 1"),
        ("sft.decay", -0.1, "sft.decay=-0.1: at least 0 and below 1"),
        ("sft.learning_rate", 0, "sft.learning_rate=0.0: above 0"),
        ("sft.learning_rate", 1e40, r"sft.learning_rate=1e\+40: above 0 and at most 1e30"),
        ("train.learning_rate", [1e-4, 0.0], r"train.learning_rate=\(0.0001, 0.0\): above 0"),
        ("train.learning_rate", [], "train.learning_rate has 0 values for 2 iterations"),
        ("train.epochs", 1.5, r"train.epochs=\(1.5,\): a whole number is wanted"),
        ("sft.epochs", -1, "sft.epochs=-1: at least 0"),
        ("train.warmup_ratio", 1.01, "train.warmup_ratio=1.01: at least 0 and at most 1"),
        ("loss.beta", [0.1, "x"], r"loss.beta=\(0.1, 'x'\): a number is wanted, or several"),
        ("loss.beta", "0.1", "loss.beta=.*a number is wanted"),
        ("loss.nll_weight", -1.0, "loss.nll_weight=-1.0: at least 0"),
        ("sampling.top_p", 0.0, "sampling.top_p=0.0: above 0 and at most 1"),
        ("sampling.top_k", 0, "sampling.top_k=0: at least 1"),
        ("sampling.temperature", -1, "sampling.temperature=-1.0: at least 0"),
        ("seed", 2**31, "seed=2147483648: at least 0 and at most 2147483647"),
        ("seed", None, "seed=None: a whole number is wanted"),
        ("selfplay.iterations", 10**6, "selfplay.iterations=1000000: at least 0 and at most 10000"),
        ("lengths.max_length", 1, "lengths.max_length=1: at least 2"),
        ("lengths.expected", [1, 2], r"lengths.expected=\(1, 2\): three numbers"),
        ("mesh.data", -1, "mesh.data, mesh.fsdp, mesh.tensor = -1, -1, None: .* at most one of them -1"),
        ("mesh.fsdp", 0, "mesh.fsdp.* = None, 0, None: at least 1"),
        ("mesh.fsdp", -2, "mesh.fsdp=-2: at least -1"),
        ("model.path", 3, "model.path=3: text is wanted"),
        ("model.dtype", "int8", "model.dtype='int8': one of float32, bfloat16, float16"),
        ("model.attention", "triton", "model.attention='triton': one of plain, splash, flash"),
        ("official", 1, "official=1: true or false is wanted"),
        ("logging.profile_steps", (3,), r"profile_steps=\(3,\): the first and the last step of the trace, as in 10,13"),
        ("logging.profile_steps", (3, 2), r"profile_steps=\(3, 2\): the first and the last step"),
        ("logging.profile_steps", (-1, 2), r"profile_steps=\(-1, 2\): at least 0"),
        ("logging.profile_steps", ("a", 2), r"profile_steps=\('a', 2\): a whole number is wanted, or several"),
        ("train.batchsize", 1, "no key train.batchsize; did you mean train.batch_size?"),
        ("train", 3, "config.train is a section, and got 3"),
        ("train", [("batch_size", 3)], "config.train is a section"),
        ("train.epochs.first", 1, None),
    ],
)
def test_values_that_cannot_be(name, value, message):
    if message is None:  # a value in a section's place, in a ConfigDict's dotted form
        name, value, message = "train", {"epochs.first": 1}, r"no key train.epochs.first"
    with pytest.raises(errors.ConfigError, match=message):
        config_lib.resolve(changed(name, value))


@pytest.mark.parametrize("config", [None, [], 3, "x"])
def test_a_config_that_is_none(config):
    with pytest.raises(errors.ConfigError, match="should be a ConfigDict"):
        config_lib.resolve(config)


def test_whole_numbers_are_numbers():
    config = config_lib.resolve(changed("train.clip_norm", 1))
    assert config.train.clip_norm == 1.0
    assert config_lib.resolve(changed("loss.beta", 1)).loss.beta == (1,)
    assert config_lib.resolve(changed("train.clip_norm", None)).train.clip_norm is None


def test_official_prompts_stay_with_their_answers():
    config = changed("official", True)
    config_lib.resolve(config)
    config.setdefault("selfplay", {})["pairing"] = "best/worst"
    with pytest.raises(
        errors.ConfigError, match=r"official goes with selfplay\.pairing=human/own only, and it is 'best/worst'"
    ):
        config_lib.resolve(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "'user_functions:f' cannot be imported: ModuleNotFoundError"),
        ("x = 1", "'user_functions:f' cannot be imported: AttributeError"),
        ("f = 3", "'user_functions:f' is no function, but 3"),
        ("\n1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*user_functions.py:2\)"),
        ("import sys; sys.exit(3)", "'user_functions:f' cannot be imported: SystemExit"),
        ("def f(:", "'user_functions:f' cannot be imported: SyntaxError"),
    ],
)
def test_functions_that_are_none(text, message, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "user_functions.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_functions", raising=False)
    for find in (custom_loss.find, verifiers.find_verifier):
        with pytest.raises(ValueError, match=message):
            find("user_functions:f")


@pytest.mark.parametrize("path", [":f", "..x:f", "a:", ":"])
def test_functions_without_a_name(path):
    with pytest.raises(ValueError, match=f"'{path}' cannot be imported"):
        user_code.import_function(path)


# --- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sise": 64}, "mistral has no 'hidden_sise'; did you mean hidden_size?"),
        ({"attention_bias": True}, "mistral has no 'attention_bias'"),  # Llama's
        ({"model_type": 3}, "model_type 3 is not supported"),
        ({"hidden_size": "64"}, "hidden_size='64': a whole number from 1"),
        ({"hidden_size": 64.0}, "hidden_size=64.0: a whole number from 1"),
        ({"hidden_size": True}, "hidden_size=True: a whole number"),
        ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: a whole number from 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: a whole number from 1 to 4096"),
        ({"head_dim": 15}, "RoPE requires an even rotary dimension, but got `head_dim`=15"),
        ({"sliding_window": 0}, "sliding_window=0: a whole number from 1"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0: a positive number"),
        ({"rope_theta": "x"}, "rope_theta='x': a positive number"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0: a positive number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan: a positive number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0: a positive number"),
        ({"initializer_range": -0.1}, "initializer_range=-0.1: a number, at least 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': true or false"),
        ({"vocab_size": 0}, "vocab_size=0: a whole number from 1"),
        ({"vocab_size": 200}, "largest id is 261 and the embedding has 200 rows"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)
def test_architectures_that_cannot_be(changes, message, mesh):
    options = SMOKE["model"]["architecture"] | changes
    with pytest.raises(ValueError, match=f"^model.(architecture|tokenizer): .*{message}"):
        loading.new_model(options, tiny.tokenizer(), dtype="float32", mesh=mesh)


def test_architectures_that_can_be(mesh):
    """Whole numbers for floats; the keys of other versions in a whole config.json."""
    options = SMOKE["model"]["architecture"] | {"initializer_range": 0, "rope_theta": 500}
    model = loading.new_model(options, tiny.tokenizer(), dtype="float32", mesh=mesh)
    assert model.config.initializer_range == 0
    assert model.config.rope_theta == 500.0
    options |= {"transformers_version": "4.36.0", "_name_or_path": "x"}
    assert loading.new_model(options, None, dtype="float32", mesh=mesh).config == model.config


def test_a_tokenizer_function_that_makes_none(mesh):
    with pytest.raises(ValueError, match=r"model\.tokenizer made a list"):
        loading.new_model(SMOKE["model"]["architecture"], [], dtype="float32", mesh=mesh)


# --- any config ----------------------------------------------------------------------------------

VALUES = [
    -1,
    0,
    10**9,
    1e9,
    1e30,
    math.nan,
    math.inf,
    "",
    "x",
    None,
    True,
    (),
    (1, "x"),
    [],
    [[]],
    {},
    {"x": 1},
]


def sections(tree):
    """The tree and every dict in it."""
    yield tree
    for value in tree.values():
        if isinstance(value, dict):
            yield from sections(value)


def mutated(rng):
    """(a config with one to three mistakes, the names of the keys concerned)."""
    config, names = copy.deepcopy(SMOKE), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        section = rng.choice([s for s in sections(config) if s])
        key = rng.choice(list(section))
        names.append(key)
        action = rng.choice(("replace", "replace", "replace", "rename", "delete", "move"))
        if action == "replace":
            section[key] = copy.deepcopy(rng.choice(VALUES))
            continue
        value = section.pop(key)
        if action == "rename":
            at = rng.randrange(len(str(key)))
            key = str(key)[:at] + rng.choice(string.ascii_lowercase) + str(key)[at + 1 :]
            section[key] = value
        if action == "move":
            rng.choice(list(sections(config)))[key] = value
        names.append(key)
    return config, names


def refusal(check, given):
    """What `check` says of it; None where it takes it. Any other kind of error is the test's."""
    try:
        check(given)
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def open_config(config):
    """What a run checks before it reads its data."""
    c = config_lib.resolve(config)
    custom_loss.check(c.loss)
    if c.eval.verifier:
        verifiers.find_verifier(c.eval.verifier)
    model, _, _ = inputs.open_model(c)
    from_config.check_mesh(c, model)
    inputs.make_chat(c, model)
    from_config.sampling(c)
    from_config.sft_optimization(c)
    for t in range(c.selfplay.start, c.selfplay.iterations):
        from_config.optimization(c, t)


def test_any_mistake_in_a_config_is_named(monkeypatch):
    """1,000 configs: each is taken, or refused by the name of a key that was changed."""
    tokenizer = tiny.tokenizer()
    monkeypatch.setattr(tiny, "tokenizer", lambda: tokenizer)
    open_config(SMOKE)
    rng, refusals = random.Random(0), 0
    for _ in range(1000):
        config, names = mutated(rng)
        said = refusal(open_config, config)
        refusals += said is not None
        assert said is None or any(str(name) in said for name in names), (names, said)
    assert 500 < refusals < 1000


# --- weights -------------------------------------------------------------------------------------


def copied(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def rewrite(path, edit):
    """Changes a safetensors file's header; the data stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header = edit(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def check_directory(directory):
    model, _ = loading.describe(str(directory))
    loading.check_weights(directory, model.config)
    return model


def refused(directory, kind=ValueError):
    """The error of a model directory."""
    with pytest.raises(kind) as error:
        check_directory(directory)
    assert str(directory) in str(error.value)
    return str(error.value)


NORM = "model.norm.weight"  # F32 [32]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [33]}, f"{NORM}: [33] of F32 take 132 bytes, and its data_offsets 128"),
        ({"dtype": "BF16"}, f"{NORM}: [32] of BF16 take 64 bytes, and its data_offsets 128"),
        ({"dtype": "I32"}, f"{NORM}: I32; only F64, F32, F16, BF16 are read"),
        ({"dtype": "F8_E4M3"}, f"{NORM}: F8_E4M3; only F64, F32, F16, BF16 are read"),
        ({"shape": [4, 8]}, f"{NORM}: (4, 8), and config.json asks for (32,)"),
        ({"shape": [-32]}, f"{NORM}: damaged header entry"),
        ({"shape": [32.0]}, f"{NORM}: damaged header entry"),
        ({"shape": None}, f"{NORM}: damaged header entry"),
        ({"shape": [10**30]}, f"{NORM}: [{10**30}] of F32"),
        ({"data_offsets": [-128, 0]}, f"{NORM}: damaged header entry"),
        ({"data_offsets": [128, 0]}, f"{NORM}: damaged header entry"),
        ({"data_offsets": [0.0, 128.0]}, f"{NORM}: damaged header entry"),
        ({"data_offsets": [0, 128, 256]}, f"{NORM}: damaged header entry"),
        ({"data_offsets": "0-128"}, f"{NORM}: damaged header entry"),
        ({"data_offsets": [0, 128]}, f"overlaps {NORM}"),
        ({"data_offsets": [10**9, 10**9 + 128]}, "model.safetensors is truncated"),
        ({"dtype": ["F32"]}, f"{NORM}: damaged header entry"),
        ([], f"{NORM}: damaged header entry []"),
        (None, f"{NORM}: damaged header entry None"),
    ],
)
def test_damaged_header_entries(entry, message, tiny_dir, tmp_path):
    directory = copied(tiny_dir, tmp_path)

    def edit(header):
        header[NORM] = header[NORM] | entry if isinstance(entry, dict) else entry

    rewrite(directory / "model.safetensors", edit)
    said = refused(directory)
    assert message in said
    assert f"{NORM}: missing" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "(0 bytes) is truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "(10 bytes) is truncated or not a safetensors file"),
        (struct.pack("<Q", 10**8) + b" " * 100, "(108 bytes) is truncated or not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "has a damaged header: it is no JSON object"),
        (struct.pack("<Q", 3) + b"[[[", "has a damaged header"),
        (struct.pack("<Q", 10**5) + b"[" * 10**5, "has a damaged header"),
        (struct.pack("<Q", 2) + b"{}" + b"rest", "is damaged: 4 bytes follow its last tensor"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"PK\x03\x04" + b"\x00" * 60, "(64 bytes) is truncated or not a safetensors file"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_files_that_are_no_weights(content, message, tiny_dir, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    path = directory / "model.safetensors"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    said = refused(directory)
    assert f"model.safetensors {message}" in said


def test_everything_wrong_is_one_error(hf_model_dir, tmp_path):
    """A lost file, a cut one, a tensor in the wrong place, a shape, a dtype, an entry; and no more."""
    directory = copied(hf_model_dir("mistral", max_shard_size="15KB")[0], tmp_path)
    index = files.read_json(directory / INDEX)
    places = dict(index["weight_map"])
    lost, cut, *rest = sorted(set(places.values()))
    (directory / lost).unlink()
    (directory / cut).write_bytes((directory / cut).read_bytes()[:-4])
    files_of = list(places.values())
    shared = [name for name, file in places.items() if file in rest and files_of.count(file) > 1]
    moved, misshapen, strange, absent = shared[:4]

    def edit(header):
        for name in {misshapen, strange, absent} & header.keys():
            header[name] |= {misshapen: {"shape": [1]}, strange: {"dtype": "I8"}, absent: {"shape": 3}}[name]

    for file in {places[name] for name in (misshapen, strange, absent)}:
        rewrite(directory / file, edit)
    index["weight_map"][moved] = next(file for file in rest if file != places[moved])
    files.write_json(directory / INDEX, index)
    expected = [
        f"{lost} is not there",
        f"{cut} is truncated",
        f"{moved}: in {places[moved]}; {INDEX} says {index['weight_map'][moved]}",
        f"{misshapen}: [1] of F32",
        f"{strange}: I8; only",
        f"{absent}: damaged header entry",
    ]
    said = refused(directory)
    assert [message for message in expected if message not in said] == []
    assert len(said.splitlines()) == 1 + len(expected)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", f"{INDEX} holds a JSON list"),
        ("{", f"{INDEX} is not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1", f"{INDEX} is a git-lfs pointer"),
        ("{}", f"{INDEX}: weight_map should say"),
        ('{"weight_map": []}', f"{INDEX}: weight_map should say"),
        ('{"weight_map": {"model.norm.weight": 3}}', f"{INDEX}: weight_map should say"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors': files outside"),
        ('{"weight_map": {"a": "..\\\\x.safetensors"}}', "files outside"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "files outside"),
        ('{"weight_map": {"a": ""}}', "'': files outside"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "convert it to safetensors"),
        ('{"weight_map": {}}', "config.json asks for model.embed_tokens.weight and others, and the files have none"),
        (
            '{"weight_map": {"model.norm.weight": "part.safetensors"}}',
            f"lm_head.weight: in part.safetensors, which {INDEX} does not say",
        ),
    ],
)
def test_indices_that_mislead(index, message, tiny_dir, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    (directory / "model.safetensors").rename(directory / "part.safetensors")  # else it counts, and not the index
    (directory / INDEX).write_text(index)
    assert message in refused(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is a pickle, which is not read: convert it to safetensors"),
        ("model.pt", "model.pt is a pickle"),
        ("model.pth", "model.pth is a pickle"),
        ("adapter_config.json", "holds an adapter (adapter_config.json) without its base model: set model.path"),
        ("model-00001-of-00002.safetensors", f"is there, without the {INDEX}"),
    ],
)
def test_directories_without_weights(name, message, tiny_dir, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    (directory / "model.safetensors").rename(directory / name)
    assert message in refused(directory, FileNotFoundError)


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "model.adapters to this directory, or merge them" in refused(tmp_path, FileNotFoundError)


# --- the other files of a model ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size: missing"),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"hidden_size": "32"}, "hidden_size='32': a whole number"),
        ({"hidden_size": -32}, "hidden_size=-32: a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads=True: a whole number"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "RoPE requires an even rotary dimension, but got `head_dim`=15"),
        ({"sliding_window": 0}, "sliding_window=0: a whole number"),
        ({"sliding_window": "x"}, "'sliding_window'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta=0: a positive number"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5.0}}, "factor"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan: a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: true or false"),
        ({"dtype": "float7"}, "dtype='float7': one of"),
        ({"dtype": ["float32"]}, "dtype=['float32']: one of"),
        ({"id2label": [1]}, "AttributeError"),
        ({"model_type": ["mistral"]}, "model_type ['mistral'] is not supported"),
        ({"vocab_size": 200}, "largest id is 261 and the embedding has 200 rows"),
    ],
)
def test_configs_that_cannot_be(changes, message, tiny_dir, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    path = directory / "config.json"
    config = {k: v for k, v in (files.read_json(path) | changes).items() if v is not ...}
    path.write_text(json.dumps(config))
    said = refused(directory)
    assert message in said
    assert "vocab_size=200" in said or str(path) in said or "largest id" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", "config.json holds a JSON list"),
        ("config.json", "version https://git-lfs.github.com", "config.json is a git-lfs pointer"),
        ("config.json", "[" * 10**5, "config.json cannot be read"),
        ("generation_config.json", "[]", "generation_config.json holds a JSON list"),
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            "eos_token_id='</s>': an id, or a list of ids",
        ),
        ("generation_config.json", '{"eos_token_id": [2, 272]}', "eos_token_id=[2, 272]: an id"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id=-1: an id"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id=True: an id"),
        ("generation_config.json", '{"eos_token_id": 2.0}', "eos_token_id=2.0: an id"),
        (
            "generation_config.json",
            '{"eos_token_id": {"a": 1}}',
            "an id, or a list of ids, below vocab_size=272",
        ),
        ("tokenizer.json", None, "no tokenizer.json, and transformers cannot load the tokenizer"),
        ("tokenizer.json", "", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", '{"version": "1.0", "model', "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "{}", "transformers cannot load the tokenizer"),
        ("tokenizer.json", "[]", "tokenizer.json holds a JSON list"),
        ("tokenizer.json", "version https://git-lfs.github.com", "tokenizer.json is a git-lfs pointer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a JSON list"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 5}',
            "cannot load the tokenizer (TypeError: Special token eos_token",
        ),
        ("chat_template.jinja", b"\xff\xfe", "cannot load the tokenizer (UnicodeDecodeError"),
    ],
)
def test_damaged_files_are_named(name, content, message, tiny_dir, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(directory)


def test_code_in_a_directory_is_never_run(tiny_dir, tmp_path):
    """A directory that asks for its own classes loads as the plain family; its code stays unread."""
    directory = copied(tiny_dir, tmp_path)
    marker = tmp_path / "ran"
    (directory / "custom.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["custom.Tokenizer", "custom.Tokenizer"]}),
    ):
        content = files.read_json(directory / name)
        files.write_json(directory / name, {**content, "auto_map": classes, "trust_remote_code": True})
    model = check_directory(directory)
    assert model.config == loading.describe(str(tiny_dir))[0].config
    content = files.read_json(directory / "tokenizer_config.json")
    files.write_json(directory / "tokenizer_config.json", {**content, "tokenizer_class": "Custom"})
    loading.describe(str(directory))
    files.write_json(directory / "config.json", {**files.read_json(directory / "config.json"), "model_type": "custom"})
    assert "model_type 'custom' is not supported" in refused(directory)
    assert not marker.exists()


@pytest.mark.parametrize("template", ["", "no/such.jinja", "."])
def test_a_chat_template_that_is_no_file(template, tiny_dir):
    with pytest.raises(ValueError, match=f"chat_template '{template}' is no Jinja text, nor a file of it"):
        loading.describe(str(tiny_dir), chat_template=template)


@pytest.mark.parametrize(
    "revision",
    ["..", "../main", "a/../b", "/etc", "-x", "", "a b", "a\nb", "a\\b", "a?b", "ä", "refs/pr/1\n"],
)
def test_revisions_that_are_none(revision, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # calling it would be another error
    with pytest.raises(ValueError, match="a branch, tag or commit has letters, digits and"):
        loading.resolve("org/name", revision)


@pytest.mark.parametrize(
    "path",
    ["..", "a/..", "../a", "/etc/a", "a/b/c", "-a/b", ".a/b", "a b", "ä/b", "a\\b", "a/b?c", "a/b\n", ""],
)
def test_hub_ids_that_are_none(path, monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    if path == "..":
        path = "a.."
    with pytest.raises(FileNotFoundError, match="no such directory, and not a hub id"):
        loading.resolve(path)


def damaged(rng, data):
    """Some bytes changed: to what JSON is made of, or to anything; or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        some = b'0123456789",:{}[]-.eE \\antfs' if rng.random() < 0.7 else bytes(range(256))
        data[rng.randrange(len(data))] = rng.choice(some)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def test_any_damage_to_a_directory_is_named(hf_model_dir, tmp_path, monkeypatch):
    """240 damaged files: the directory is taken, or refused by name."""
    monkeypatch.setattr(loading, "abstract_params", functools.cache(loading.abstract_params))
    original = hf_model_dir("mistral", max_shard_size="30KB")[0]
    directory = copied(original, tmp_path)
    shard = min(path.name for path in directory.glob("*.safetensors"))
    rng, refusals = random.Random(0), 0
    names = ["config.json", shard, INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for number in range(240):
        name = names[number % len(names)]
        data = (original / name).read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0] if name == shard else len(data)
        (directory / name).write_bytes(damaged(rng, data[:end]) + data[end:])
        said = refusal(check_directory, directory)
        refusals += said is not None
        assert said is None or str(directory) in said, (name, said)
        (directory / name).write_bytes(data)
    assert 150 < refusals < 240


@pytest.mark.parametrize(
    "path", ["0.7*a", "0.7*a+b", "0.7*a+0.3*a", "0*a+1*b", "-1*a+2*b", "x*a+2*b", "1*+2*b", "1/0*a+2*b"]
)
def test_what_is_no_mixture(path):
    with pytest.raises(
        errors.ConfigError, match=r"data\.path has .*, and there is no such file: a mixture of datasets is 0\.7"
    ):
        config_values.data_mixtures(path)


def test_mixtures_of_iterations():
    """And a file that has such a name is that file."""
    mixtures = config_values.data_mixtures("a, 0.7*a + 0.3*b ,c:d")
    assert mixtures == [{"a": 1}, {"a": Fraction(7, 10), "b": Fraction(3, 10)}, {"c:d": 1}]
    assert config_values.data_paths("a, 0.7*a + 0.3*b ,c:d") == ["a", "b", "c:d"]
    assert config_values.data_mixtures("1*a+2*b,c", known="1*a+2*b".__eq__) == [{"1*a+2*b": 1}, {"c": 1}]
    assert config_values.data_mixtures("1*a+2*b,c", known="1*a+2*b,c".__eq__) == [{"1*a+2*b,c": 1}]
    assert config_values.data_mixtures(None) == []
