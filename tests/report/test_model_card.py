"""Model cards: what the hub reads of them, what people do, and what stays out."""

import re

import pytest
from huggingface_hub import RepoCard

from spin_jax import config
from spin_jax.report import model_card
from spin_jax.selfplay import fingerprints as identity

FINGERPRINTS = {"data": "90 examples, 0123", "weights": "4567", "code": "89ab"}
VERSIONS = {"spin_jax": "0.1.0", "jax": "0.10.2"}
ROWS = [
    {"iteration": -1, "nll": 1.25, "tasks": {"gsm8k": {"exact_match": 0.5}}},
    {"iteration": 0, "nll": 1.0, "pairs": 90, "steps": 3, "minutes": 7.5, "margin": 0.1},
    {
        "iteration": 1,
        "nll": 0.5,
        "pairs": 180,
        "steps": 6,
        "minutes": 7.25,
        "control": {"nll": 0.75},
        "final": True,
    },
]


def facts(
    kind="iteration",
    rows=ROWS,
    license=None,
    fingerprints=FINGERPRINTS,
    revisions=("c0ffee", "f00d"),
    **sections,
):
    c = {"model": {"path": "owner/base-sft"}, "data": {"path": "owner/sums", "name": "plain"}, **sections}
    return model_card.Facts(
        kind=kind,
        iteration=rows[-1]["iteration"],
        config=identity.recorded(config.resolve(c)),
        rows=rows,
        model_revision=revisions[0],
        data_revision=revisions[1],
        fingerprints=fingerprints,
        versions=VERSIONS,
        commit="abc123",
        license=license or {},
    )


def table(text):
    """{first cell: the others} of every table's lines."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first: [cell.strip() for cell in rest] for first, *rest in lines}


def test_the_hub_reads_its_head():
    text = model_card.model_card(facts(license={"license": "other", "license_name": "x", "license_link": "LICENSE"}))
    assert RepoCard(text).data.to_dict() == {
        "base_model": "owner/base-sft",
        "datasets": ["owner/sums"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["spin", "self-play", "fine-tuning", "spin_jax"],
        "license": "other",
        "license_name": "x",
        "license_link": "LICENSE",
    }
    head = RepoCard(model_card.model_card(facts(kind="control"))).data.to_dict()
    assert "license" not in head
    assert head["tags"] == ["sft", "fine-tuning", "spin_jax"]


def test_an_iteration_tells_its_recipe_and_numbers():
    c = {"loss": {"beta": (0.1, 5.0), "nll_weight": 0.2}, "selfplay": {"iterations": 2}}
    text = model_card.model_card(
        facts(**c, train={"learning_rate": (5e-7, 1e-7), "clip_norm": 1.0, "epochs": 2, "lora_rank": 8})
    )
    found = table(text)
    assert "final" not in found
    assert found["LoRA"] == ["rank 8, α 16, on wq, wk, wv, wo, gate, up, down; merged here"]
    assert text.count("# base-sft, SPIN iteration 1") == 1
    assert found["base"] == ["[owner/base-sft](https://huggingface.co/owner/base-sft) at `c0ffee` (4567)"]
    assert "datasets/owner/sums) at `f00d` (90 examples, 0123); plain, split train" in found["data"][0]
    assert found["loss"] == ["logistic, β 5, 0.2 × NLL of the human answer"]
    assert found["pairs"] == ["180, those of iteration 0 among them"]
    assert found["answers"] == ["temperature 1, max_new_tokens 256"]
    later = facts(selfplay={"start": 1}, fingerprints=FINGERPRINTS | {"given pairs 0": "90 pairs, 01"})
    assert table(model_card.model_card(later))["pairs"] == ["180, those of iteration 0 among them"]
    assert table(model_card.model_card(later._replace(fingerprints=FINGERPRINTS)))["pairs"] == ["180"]
    assert found["learning rate"] == ["1e-07 at its peak, linear schedule after 10% of warm-up"]
    assert found["optimizer"] == ["rmsprop, weight decay 0, gradients clipped at 1"]
    assert found["length"] == ["2 × the pairs, 6 steps"]
    assert found["nll"] == ["1.25", "1", "0.5"]
    assert found["tasks/gsm8k/exact_match"][0] == "0.5"
    assert found["control/nll"][-1] == "0.75"
    assert "spin_jax 0.1.0, commit abc123 (sources `89ab`); jax 0.10.2." in text
    assert 'from_pretrained("DIRECTORY OF THIS FILE")' in text
    assert "chen2024self" in text


@pytest.mark.parametrize("loss", ["logistic", "apo_down", "likelihood"])
def test_what_a_model_learned_is_said_by_its_loss(loss):
    """apo_down makes both answers less likely, and likelihood reads no human answer: neither prefers human ones."""
    text = model_card.model_card(facts(loss={"name": loss}))
    assert (
        f"began with the weights of the iteration before, and was trained on those answers by the loss `{loss}`" in text
    )
    assert "The model of the iteration before answered the prompts." in text
    average = model_card.model_card(facts(selfplay={"opponent_decay": 0.25}))
    assert "A moving average of the models before answered the prompts." in average
    assert "the opponent is 0.25 × the one before and 0.75 × the trained weights" in table(average)["loss"][0]


def test_adapters():
    """Those of the export, with the end of their base's path; and those that were merged into the base."""
    text = model_card.model_card(facts(model={"path": "owner/base-sft", "adapters": "/home/me/lora"}))
    assert table(text)["base"][0].endswith("(4567), with the adapters `lora` merged")
    assert "PeftModel" not in text
    of_hub = facts(model={"path": "owner/base-sft", "adapters": "me/lora"})
    text_of_hub = model_card.model_card(of_hub._replace(hub_names={"model.adapters": "me/lora@c0de"}))
    assert table(text_of_hub)["base"][0].endswith("with the adapters `me/lora@c0de` merged")
    here = model_card.model_card(facts()._replace(adapters_base="/home/me/run/iteration_0/model"))
    assert "the model that it began from (`iteration_0/model`)" in here
    assert 'peft.PeftModel.from_pretrained(BASE, "DIRECTORY OF THIS FILE", subfolder="adapters")' in here
    assert "/home" not in text + here


def test_start_and_control():
    sft = {"epochs": 2, "control": True, "control_learning_rate": 3e-4}
    start = model_card.model_card(facts("start", ROWS[:1], sft=sft))
    assert "after supervised fine-tuning on the human answers" in start
    assert table(start)["length"] == ["2 × the data"]
    assert table(start)["learning rate"][0].startswith("2e-05")
    control = table(model_card.model_card(facts("control", sft=sft)))
    assert control["length"] == ["9 steps, as self-play took"]
    assert control["learning rate"][0].startswith("0.0003")
    new = {"path": None, "architecture": {"model_type": "mistral"}}
    fresh = model_card.model_card(facts("start", ROWS[:1], revisions=(None, "f00d"), model=new))
    assert "nothing has been learned" in fresh
    assert "optimizer" not in table(fresh)
    assert "base_model" not in RepoCard(fresh).data.to_dict()


def test_a_card_is_pushed_with_its_branch():
    assert 'from_pretrained("me/mine", revision="iteration_1")' in model_card.model_card(
        facts(export={"push_to": "me/mine"})
    )
    start = model_card.model_card(facts("start", ROWS[:1], export={"push_to": "me/mine"}))
    assert 'spin_jax.load("me/mine", revision="start")' in start


def test_times_places_and_secrets_stay_out(tmp_path, monkeypatch):
    """Equal runs have equal cards, and what is pushed says nothing of a home directory."""
    monkeypatch.setenv("SOME_TOKEN", "geheimgeheim")
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    model, data = {"path": str(tmp_path / "model")}, {"path": str(tmp_path / "rows.jsonl")}
    given = {**FINGERPRINTS, "given pairs 1": "180 pairs, geheimgeheim"}
    text = model_card.model_card(facts(model=model, data=data, fingerprints=given, revisions=(None, None)))
    assert table(text)["base"] == ["`model` (4567)"]
    assert table(text)["data"][0].startswith("`rows.jsonl` (90 examples, 0123)")
    assert table(text)["given pairs of iteration 1"] == ["180 pairs, [SOME_TOKEN]"]
    assert "answers" not in table(text)  # they were given
    head = RepoCard(text).data.to_dict()
    assert not {"base_model", "datasets"} & head.keys()
    assert str(tmp_path) not in text
    assert "minutes" not in text
    assert "7.5" not in text
    assert not re.search(r"\d\d:\d\d|20\d\d-", text)


def test_the_bases_license_is_taken_over(tmp_path):
    readme = tmp_path / "README.md"
    assert model_card.stated_license(readme) == {}
    for content, found in (
        ("no head", {}),
        ("---\nlicense: mit\nlanguage: en\n---\n# x", {"license": "mit"}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense_name: x\n---\n", {}),
        ("---\n- 1\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
    ):
        readme.write_text(content)
        assert model_card.stated_license(readme) == found


def test_what_is_of_the_hub_is_told_by_the_record_alone(tmp_path, monkeypatch):
    """The current directory says nothing: a folder may have a hub's name, and a local one may be gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "base-sft").mkdir(parents=True)
    c = {"data": {"path": "owner/sums,local/sums"}, "selfplay": {"iterations": 2}}
    several = {**FINGERPRINTS, "data 1": "80 examples, 4567"}
    revisions = "c0ffee", {"owner/sums": "f00d", "local/sums": None}
    text = model_card.model_card(facts(**c, fingerprints=several, revisions=revisions))
    head = RepoCard(text).data.to_dict()
    assert (head["base_model"], head["datasets"]) == ("owner/base-sft", ["owner/sums"])
    found = table(text)
    assert "datasets/owner/sums) at `f00d` (90 examples, 0123)" in found["data"][0]
    assert found["data of iteration 1"][0].startswith("`sums` (80 examples, 4567)")
    c["data"]["path"] = "1*owner/sums+3*local/sums"  # one iteration's
    text = model_card.model_card(facts(**c, revisions=revisions))
    assert "owner/sums) at `f00d`, 25% of the mixture (90 examples, 0123); " in text
    assert "| data | `sums`, 75% of the mixture (90 examples, 0123); " in text


@pytest.mark.parametrize(
    ("path", "revisions", "fingerprints", "found"),
    [
        (None, None, {}, []),
        ("org/a", "1f", {"data": "x"}, [("org/a", "1f")]),
        ("local/a,b", None, {"data": "x"}, [("local/a,b", None)]),  # a comma in a name
        ("org/a, org/a", "1f", {"data": "x", "data 1": "x"}, [("org/a", "1f")] * 2),
        ("a, b", {"a": None, "b": None}, {"data": "x", "data 1": "y"}, [("a", None), ("b", None)]),
        ("1*org/a+3*b", {"org/a": "1f", "b": None}, {"data": "x"}, [("org/a", "1f"), ("b", None)]),
        ("1*a+3*b", None, {"data": "x"}, [("1*a+3*b", None)]),  # a file with this name
    ],
)
def test_datasets_and_their_commits(path, revisions, fingerprints, found):
    assert model_card.dataset_revisions(path, revisions, fingerprints) == found


def test_a_number_that_is_not_finite_is_one_in_both_forms():
    """JSON has null where a number is NaN: a run that reads its summary again writes the same card."""
    cards = [
        model_card.model_card(facts("start", [{"iteration": -1, "nll": value, "margin": 0.5}]))
        for value in (float("nan"), None)
    ]
    assert cards[0] == cards[1]
    assert table(cards[0])["nll"] == ["NaN"]


@pytest.mark.parametrize(
    ("path", "revision", "shown"),
    [
        ("owner/name", "f00d", "owner/name"),
        ("/home/me/llama", None, "llama"),
        ("/home/me/sft/start/model", None, "start/model"),  # an export of a run: "model" alone would say nothing
        ("model", None, "model"),
    ],
)
def test_the_name_of_a_source(path, revision, shown):
    assert model_card.source_name(path, revision) == shown
