"""Checkpoints as people really have them: read as transformers reads them, or refused in one sentence."""

import re
import shutil
import warnings

import numpy as np
import pytest
from architectures import SMALL
from safetensors.numpy import load_file, save_file
from torch_reference import torch_logits

import spin_jax
from spin_jax import tiny
from spin_jax.models import loading
from spin_jax.storage import files

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TOKENS = np.arange(3, 43)[None]


def same_logits(directory, mesh, notes=None):
    """Compares our logits with transformers' (float32, 1e-4); `notes` is a pattern that the only warning has."""
    if notes:
        with pytest.warns(UserWarning, match=notes) as said:
            model = spin_jax.load(str(directory), mesh=mesh)
        assert len(said) == 1
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = spin_jax.load(str(directory), mesh=mesh)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    theirs = torch_logits(reference, TOKENS)
    np.testing.assert_allclose(np.asarray(spin_jax.logits(model, TOKENS)), theirs, atol=1e-4)
    return model, theirs


@pytest.fixture
def rewritten(hf_model_dir, tmp_path):
    """make(change, **options): a copy of a Llama whose tensors are change(tensors)."""

    def make(change, family="llama", **options):
        directory = shutil.copytree(hf_model_dir(family, **options)[0], tmp_path / "copy")
        save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors", {"format": "pt"})
        return directory

    return make


# --- tied embeddings -------------------------------------------------------------------------------


def test_a_head_that_differs_from_a_tied_embedding_is_read(rewritten, mesh, tmp_path):
    def change(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"][::-1].copy()}

    directory = rewritten(change, tie_word_embeddings=True)
    model, theirs = same_logits(directory, mesh, notes="exports say tie_word_embeddings=false")
    spin_jax.save(model, tmp_path / "out")
    assert files.read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_array_equal(torch_logits(again, TOKENS), theirs)


def test_an_equal_head_stays_tied(rewritten, mesh):
    directory = rewritten(
        lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tie_word_embeddings=True
    )
    model, _ = same_logits(directory, mesh)
    assert "head" not in model.params


def test_a_tied_embedding_may_be_stored_as_the_head(rewritten, mesh):
    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    same_logits(rewritten(change, tie_word_embeddings=True), mesh)


# --- which files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards_gone", [False, True])
def test_a_whole_file_counts_beside_an_index(shards_gone, hf_model_dir, mesh, tmp_path):
    directory = shutil.copytree(hf_model_dir("llama", max_shard_size="30KB")[0], tmp_path / "copy")
    tensors = {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}
    if shards_gone:
        for path in directory.glob("model-*.safetensors"):
            path.unlink()
    tensors["lm_head.weight"] *= 2
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    same_logits(directory, mesh, notes="model.safetensors is read, as transformers does")


def test_an_adapter_beside_a_whole_model_is_refused(rewritten, mesh):
    directory = rewritten(lambda tensors: tensors)
    files.write_json(directory / "adapter_config.json", {"peft_type": "LORA"})
    save_file({"x": np.zeros(1, np.float32)}, directory / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"an adapter \(adapter_model.safetensors\): does the model contain it"):
        spin_jax.load(str(directory), mesh=mesh)


# --- names -----------------------------------------------------------------------------------------


def renamed(prefix, head):
    def change(tensors):
        return {
            head if name == "lm_head.weight" else prefix + name.removeprefix("model."): x for name, x in tensors.items()
        }

    return change


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("", "lm_head.weight"),
        ("base_model.model.model.", "base_model.model.lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("module.model.", "module.lm_head.weight"),
    ],
)
def test_another_prefix_of_all_names_is_read_with_a_note(prefix, head, hf_model_dir, rewritten, mesh):
    directory = rewritten(renamed(prefix, head))
    with pytest.warns(UserWarning, match=f"names begin with '{prefix}' instead of 'model.'"):
        model = spin_jax.load(str(directory), mesh=mesh)
    expected = torch_logits(hf_model_dir("llama")[1], TOKENS)
    np.testing.assert_allclose(np.asarray(spin_jax.logits(model, TOKENS)), expected, atol=1e-4)


def test_two_possible_prefixes_are_none(rewritten, mesh):
    directory = rewritten(lambda t: renamed("a.", "a.lm_head.weight")(t) | renamed("b.", "b.lm_head.weight")(t))
    with pytest.raises(
        ValueError, match=r"config.json asks for model\..* and the files have none of them: they have a"
    ):
        spin_jax.load(str(directory), mesh=mesh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {f"transformer.h.{i}": x for i, x in enumerate(t.values())},
            "the files have none of them: they have",
        ),
        (
            lambda t: {name.replace("q_proj.weight", "q_proj.qweight"): x for name, x in t.items()},
            "q_proj.qweight belongs to quantized weights",
        ),
        (
            lambda t: {name.replace("q_proj.weight", "q_proj.base_layer.weight"): x for name, x in t.items()},
            "belongs to an adapter that is not merged",
        ),
    ],
)
def test_other_names_have_one_reason(change, message, rewritten, mesh):
    with pytest.raises(ValueError, match=message) as error:
        spin_jax.load(str(rewritten(change)), mesh=mesh)
    assert str(error.value).count("\n") == 1


def test_tensors_that_nobody_reads_are_named(rewritten, mesh):
    directory = rewritten(lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)})
    with pytest.warns(UserWarning, match=r"1 tensors are not part of this model.*layers.0.self_attn.q_proj.bias"):
        spin_jax.load(str(directory), mesh=mesh)


def test_the_text_part_of_a_multimodal_checkpoint(mesh, tmp_path):
    """Gemma 3 with a vision tower: other names, sizes in text_config, token ids outside of it."""
    text = SMALL | {
        "sliding_window": 6,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    del text["rope_parameters"], text["eos_token_id"]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, eos_token_id=[2, 5])
    torch.manual_seed(0)
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="tensors are not part of this model.*multi_modal_projector"):
        model = spin_jax.load(str(tmp_path / "model"), mesh=mesh)
    expected = torch_logits(reference, TOKENS)
    np.testing.assert_allclose(np.asarray(spin_jax.logits(model, TOKENS)), expected, atol=1e-4)
    spin_jax.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(again).__name__ == "Gemma3ForCausalLM"
    assert again.config.eos_token_id == [2, 5]
    np.testing.assert_allclose(torch_logits(again, TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite(number, rewritten, mesh):
    """The answers of such a model would be empty, and say nothing."""

    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = number
        return tensors

    with pytest.raises(ValueError, match=r"model.layers.\{layer\}.mlp.down_proj.weight: NaN or infinite numbers"):
        spin_jax.load(str(rewritten(change)), mesh=mesh)


# --- tokenizers ------------------------------------------------------------------------------------

TEXTS = ["Two ducks,  three\n\neggs", " 12345\t", "e\u0301 é 你", "a</s> b", "<s>x\n"]


def llama_like():
    """A tokenizer.json such as Llama 2's: spaces are "▁", and other characters may be bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [chr(code) for code in range(33, 127)]
    pieces += ["▁", *letters, *(f"▁{letter}" for letter in letters), "▁▁"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", letter) for letter in letters] + [("▁", "▁")]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in pieces[:3]])
    return backend


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("qwen2", "LlamaTokenizer"),  # transformers 5.24 loses every space and newline
        ("llama", "LlamaTokenizer"),  # Llama 2: it has another rule for what follows a control token
        ("mistral", "PreTrainedTokenizerFast"),  # it follows the file, as transformers 5.0 does everywhere
    ],
)
def test_tokenizer_json_counts(family, named, hf_model_dir, tmp_path):
    directory = shutil.copytree(hf_model_dir(family, vocab_size=512)[0], tmp_path / "copy")
    truth = llama_like()
    truth.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": named, "legacy": False, "chat_template": "{{ messages }}", **special}
    files.write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    model, _ = loading.describe(str(directory))
    for text in TEXTS:
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        assert ids == truth.encode(text, add_special_tokens=False).ids
        assert model.tokenizer.decode(ids) == truth.decode(ids, skip_special_tokens=False)
    assert {name: getattr(model.tokenizer, name) for name in special} == special
    assert model.tokenizer.chat_template == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    differs = any(
        theirs(text, add_special_tokens=False).input_ids != truth.encode(text, add_special_tokens=False).ids
        for text in TEXTS
    )
    note = f"transformers' {type(theirs).__name__} makes other tokens than tokenizer.json"
    assert [note in said for said in model.notes] == [True] * differs


@pytest.mark.parametrize(
    ("beyond", "pad", "template", "opens"),
    [
        (["[PAD]"], "[PAD]", "{{ messages[0]['content'] }}", True),
        (["<|pad|>"], None, "{{ messages[0]['content'] }}", True),
        (["[PAD]"], "[PAD]", "{{ messages[0]['content'] + '[PAD]' }}", False),
        (["[PAD]"], "[PAD]", "{{ messages[0]['content'] + pad_token }}", False),
        (["[PAD]", "<|im_start|>"], "[PAD]", "{{ messages[0]['content'] }}", False),
    ],
)
def test_a_padding_token_may_lie_beyond_the_embedding(beyond, pad, template, opens, hf_model_dir, mesh, tmp_path):
    directory = shutil.copytree(hf_model_dir("llama", vocab_size=262)[0], tmp_path / "copy")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(beyond, special_tokens=True)
    tokenizer.pad_token = pad
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    if not opens:
        with pytest.raises(ValueError, match="and the embedding has 262 rows"):
            spin_jax.load(str(directory), mesh=mesh)
        return
    with pytest.warns(UserWarning, match=rf"the embedding has no row for {re.escape(beyond[0])}\. Padding"):
        model = spin_jax.load(str(directory), mesh=mesh)
    plain, text = tiny.tokenizer(), f"a {beyond[0]} b</s>"
    assert model.tokenizer(text).input_ids == plain(text).input_ids
    spin_jax.save(model, tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert max(again.get_vocab().values()) == 261
