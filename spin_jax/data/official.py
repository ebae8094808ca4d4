"""The quirks of the authors' released code, for `config.official = True`. The default has none of them.

| quirk | reproduced in |
|---|---|
| sampling asks "### Instruction: …", training renders the chat template | `sampling_prompt` |
| prompt and response are tokenized separately | `_tokenize_separately` |
| a second EOS follows the template's own | `_response` |
| EOS inside the sequence is not attended to | `unattended` |
| an answer cut at the token limit still gets EOS, because its text is tokenized anew | `pair` |
| an over-long pair loses the front of its prompt, then both responses are cut | `_fit` |
| the first two messages are taken for user and assistant, whatever their roles are | `_first_turn` |

Two more quirks come from how the code was run, and are not reproduced: rows are repeated when a part of the
sampling is run again, and the model's revision was not pinned for sampling.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from spin_jax.data.chat import Chat
from spin_jax.data.records import Example, Ids, Message, Pair


class OfficialChat(Chat):
    """Tokenizes, cuts and pairs as the released code does."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.unattended = self.tokenizer.eos_token_id  # wherever it is in a sequence

    def example(self, prompt_id: int, messages: list[Message], counts: Counter) -> Example:
        """Encodes one conversation. Nothing is dropped; cuts depend on the pair and are not counted."""
        del counts
        messages = _first_turn(messages)
        prompt, (real,) = self._fit(self._prompt(messages), [self._response(messages[-1])])
        return Example(prompt_id, messages, prompt, real)

    def sampling_prompt(self, example: Example) -> Ids:
        text = f"### Instruction: {example.messages[0]['content']}\n\n### Response: "
        return np.asarray(self.tokenizer(text)["input_ids"], np.int32)

    def pair(self, example: Example, sample_id: int, generated: Ids) -> Pair:
        messages = [*example.messages[:-1], {"role": "assistant", "content": self.decode(generated)}]
        pair = self.given_pair(example.prompt_id, sample_id, example.messages, messages, Counter())
        return dataclasses.replace(pair, truncated=not self.stopped(generated))

    def given_pair(
        self, prompt_id: int, sample_id: int, real: list[Message], generated: list[Message], counts: Counter
    ) -> Pair:
        del counts
        real, generated = _first_turn(real), _first_turn(generated)
        answers = [self._response(real[-1]), self._response(generated[-1])]
        prompt, (real_ids, generated_ids) = self._fit(self._prompt(real), answers)
        truncated = not self.stopped(generated_ids)
        return Pair(prompt_id, sample_id, real, generated, prompt, real_ids, generated_ids, truncated)

    def _prompt(self, messages: list[Message]) -> Ids:
        system = {"role": "system", "content": self.system_message or ""}
        return self._tokenize_separately(self.render([system, messages[0]], prompt=True))

    def _response(self, answer: Message) -> Ids:
        text = self.render([answer], prompt=False).removeprefix("<|assistant|>\n")
        return np.append(self._tokenize_separately(text), np.int32(self.tokenizer.eos_token_id))

    def _tokenize_separately(self, text: str) -> Ids:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _fit(self, prompt: Ids, responses: list[Ids]) -> tuple[Ids, list[Ids]]:
        """Cuts an over-long pair: the prompt to its last tokens, then both responses."""
        max_prompt, max_length = self.lengths.max_prompt, self.lengths.max_length
        longest = max(map(len, responses))
        if len(prompt) + longest > max_length:
            prompt = prompt[-max_prompt:]
        if len(prompt) + longest > max_length:
            responses = [ids[: max_length - max_prompt] for ids in responses]
        return prompt, responses


def _first_turn(messages: list[Message]) -> list[Message]:
    """The first two messages as prompt and answer; the quirk is that the first may be a system message."""
    first, second = (message.get("content", "") for message in messages[:2])
    return [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
