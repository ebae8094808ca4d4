"""Reward models that transformers writes."""

import copy

import pytest
from architectures import SMALL

from spin_jax import tiny


def write(directory, family, **options):
    """A reward model that transformers writes, with the tiny tokenizer; returns transformers' model."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy({**SMALL, "num_labels": 1, **options}))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return model
