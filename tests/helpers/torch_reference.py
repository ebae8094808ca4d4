"""What transformers and torch compute: logits, log-probs of answers, greedy answers, and the ids of a conversation."""

import numpy as np
import pytest


def torch_logits(model, tokens, mask=None) -> np.ndarray:
    """The float32 logits of rows of ids, with transformers' attention mask."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        mask = None if mask is None else torch.as_tensor(mask)
        return model(torch.as_tensor(tokens), attention_mask=mask).logits.float().numpy()


def torch_score(model, prompt, answer, unattended=None) -> float:
    """log p of an answer's ids, in float64 from float32 logits; no token attends to the id `unattended`."""
    ids = np.array([[*prompt, *answer]])
    mask = None if unattended is None else np.int64(ids != unattended)
    logits = torch_logits(model, ids, mask).astype(np.float64)[0, len(prompt) - 1 : -1]
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logps[np.arange(len(answer)), answer].sum()


def torch_greedy(model, prompt, tokens, stops=None) -> list[int]:
    """The greedy answer to one prompt, so that transformers pads nothing."""
    torch = pytest.importorskip("torch")
    ids = torch.as_tensor(np.array([prompt]))
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def token_ids(tokenizer, messages) -> tuple[list[int], list[int]]:
    """The ids of the prompt and of the answer with its EOS: the template's text, cut by characters."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt))
    last = ids.index(tokenizer.eos_token_id, first)  # it belongs to the answer, what follows it does not
    return ids[:first], ids[first : last + 1]
