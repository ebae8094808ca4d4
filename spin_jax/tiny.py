"""The built-in example: a tokenizer, a chat template and problems with answers that can be checked.

Nothing is downloaded. A problem is a sum such as "27+4+58", and its answer is a number. Bytes are tokens.
"""

import random
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer() -> Any:
    """A byte-level tokenizer without merges: 6 special tokens and 256 bytes, ids 0 … 261."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*_SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def problems(count: int = 10_000, seed: int = 0, largest: int = 30) -> list[dict[str, str]]:
    """Distinct sums of three numbers, as rows of question and answer."""
    rng = random.Random(seed)
    seen: dict[tuple[int, ...], None] = {}
    while len(seen) < count:
        seen[tuple(rng.randint(0, largest) for _ in range(3))] = None
    return [{"question": "+".join(map(str, terms)), "answer": str(sum(terms))} for terms in seen]


def wins(messages: list[dict[str, str]], answers: list[str]) -> list[float]:
    """A selfplay.scorer: the probability that each answer beats a random one of all. Right answers win."""
    right = [answer.strip() == messages[-1]["content"] for answer in answers]
    return [(1 + own - sum(right) / len(right)) / 2 for own in right]
