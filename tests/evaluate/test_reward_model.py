"""Reward models: transformers' numbers for whole conversations, and what is refused."""

import shutil

import jax
import numpy as np
import pytest
from reward_models import write

from spin_jax import config, tiny
from spin_jax.evaluate import reward_model
from spin_jax.evaluate.reward_model import RewardModel
from spin_jax.runtime import sharding
from spin_jax.selfplay import variants
from spin_jax.training.log_probs import score_groups

CONVERSATIONS = [
    [{"role": "user", "content": "1+2+3"}, {"role": "assistant", "content": "6"}],
    [{"role": "system", "content": "Add."}, {"role": "user", "content": "10+2"}, {"role": "assistant", "content": ""}],
    [
        {"role": "user", "content": "a long question " * 6},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "more"},
    ],
]


def theirs(model, conversations):
    """The numbers of transformers, one conversation at a time, so that it pads nothing."""
    import torch

    tokenizer = tiny.tokenizer()
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    with torch.no_grad():
        rows = [torch.as_tensor([tokenizer(text, add_special_tokens=False).input_ids]) for text in texts]
        return np.array([model(row).logits[0, 0].item() for row in rows])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("pad", [0, 2, None])
def test_the_numbers_are_those_of_transformers(family, pad, tmp_path, mesh):
    """1e-4 of numbers around 1: float32 sums in another order. With pad 2, the EOS at the end is not read."""
    if pad != 0 and family != "llama":
        pytest.skip("where a number is read does not depend on the family")
    reference = write(tmp_path / "model", family, pad_token_id=pad)
    expected = theirs(reference, CONVERSATIONS)
    assert np.ptp(expected) > 0.01
    model = RewardModel(str(tmp_path / "model"), mesh=mesh)
    ids = [model.tokens(messages) for messages in CONVERSATIONS]
    np.testing.assert_allclose(model.scores(ids), expected, atol=1e-4)
    model.free()
    np.testing.assert_allclose(model.scores(ids[::-1] * 20), np.tile(expected[::-1], 20), atol=1e-4)  # several rows


def test_what_was_scored_before_changes_no_bit(tmp_path, mesh, monkeypatch):
    """In bfloat16 the length of the rows can show: a process that scored long texts has the rows of a new one."""
    write(tmp_path / "model", "llama")
    used, new = (RewardModel(str(tmp_path / "model"), mesh=mesh, dtype="bfloat16") for _ in range(2))
    short, shapes = [new.tokens(messages) for messages in CONVERSATIONS[:2]] * 4, []

    def recorded(decoder, weights, groups, shape, *arguments, **options):
        shapes.append(shape)
        return score_groups(decoder, weights, groups, shape, *arguments, **options)

    monkeypatch.setattr(reward_model, "score_groups", recorded)
    used.scores([np.full(250, 5, np.int32)])
    np.testing.assert_array_equal(used.scores(short), new.scores(short))
    assert [shape.length for shape in shapes] == [256, 128, 128]
    assert shapes[1] == shapes[2]


def test_eight_devices_are_one(tmp_path, mesh, mesh8):
    write(tmp_path / "model", "llama")
    one, eight = (RewardModel(str(tmp_path / "model"), mesh=m) for m in (mesh, mesh8))
    ids = [one.tokens(messages) for messages in CONVERSATIONS * 5]
    np.testing.assert_allclose(eight.scores(ids), one.scores(ids), atol=1e-5)


def test_another_model_in_the_same_directory_is_noticed(tmp_path, mesh):
    """Other weights, another chat template, another padding token; not another place."""
    write(tmp_path / "model", "llama")
    digests = [RewardModel(str(tmp_path / "model"), mesh=mesh).digest]
    assert RewardModel(str(shutil.copytree(tmp_path / "model", tmp_path / "copy")), mesh=mesh).digest == digests[0]
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    digests.append(RewardModel(str(tmp_path / "model"), mesh=mesh).digest)
    for options in ({"pad_token_id": 2}, {"initializer_range": 0.1}):
        write(tmp_path / "model", "llama", **options)
        digests.append(RewardModel(str(tmp_path / "model"), mesh=mesh).digest)
    assert len(set(digests)) == 4


def test_a_mesh_that_does_not_fit_is_refused_before_the_weights_are_read(tmp_path):
    write(tmp_path / "model", "llama")
    (tmp_path / "model" / "model.safetensors").unlink()
    mesh = sharding.make_mesh(1, 1, 4, jax.devices()[:4])
    message = "mesh.tensor=4 does not divide the reward model's 2 key/value heads"
    with pytest.raises(ValueError, match=message):
        RewardModel(str(tmp_path / "model"), mesh=mesh)
    c = config.resolve({"model": {"path": "-"}, "data": {"path": "-"}, "selfplay": {"scorer": str(tmp_path / "model")}})
    with pytest.raises(ValueError, match=f"selfplay.scorer='.*model', as a reward model: {message}"):
        variants.find_judge(c, mesh)


def test_what_is_refused(tmp_path, tiny_dir, mesh):
    with pytest.raises(ValueError, match=r"score\.weight: missing"):
        RewardModel(str(tiny_dir), mesh=mesh)
    write(tmp_path / "two", "llama", num_labels=2)
    with pytest.raises(ValueError, match=r"score\.weight: \(2, 32\), and .* \(1, 32\)"):
        RewardModel(str(tmp_path / "two"), mesh=mesh)
    write(tmp_path / "one", "llama")
    model = RewardModel(str(tmp_path / "one"), mesh=mesh)
    with pytest.raises(ValueError, match=r"has 3\d\d tokens, and the reward model reads at most 256"):
        model.tokens([{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}])
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(FileNotFoundError):
        model.scores([np.arange(4, dtype=np.int32)])
