"""Answers of a model in memory: `spin_jax.generate` for users, and `answer` for evaluation."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from spin_jax.data.chat import Chat
from spin_jax.data.records import Ids, Message, check_turns
from spin_jax.models.architecture import Model
from spin_jax.models.attention import kernel_for
from spin_jax.models.decoder import Decoder
from spin_jax.models.params import sampling_params
from spin_jax.runtime import sharding
from spin_jax.sampling import placement
from spin_jax.sampling.continuous import answer_prompts
from spin_jax.sampling.next_token import Sampling, prompt_keys


def generate(
    model: Model,
    conversations: Sequence[list[Message]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Answers conversations whose next turn is the assistant's; returns texts without special tokens.

    Args:
        model: from `spin_jax.load`.
        conversations: lists of {"role", "content"}; other fields of a message that the chat template renders are
            allowed, and `tools` in the first message.
        max_new_tokens: the most tokens of an answer. Where a prompt leaves fewer positions of the model
            (max_position_embeddings), answers are cut there, and a warning says so.
        temperature: 0 is greedy.
        seed: the random seed; the answer to conversation i depends on the seed and on i.
        top_k: draw only from the k likeliest tokens.
        top_p: draw only from the fewest tokens that have this probability mass together.
        batch_size: prompts answered at a time.

    Raises:
        ValueError: a conversation is malformed, or a prompt takes all of the model's positions.
    """
    chat = Chat(model.tokenizer, model.stop_tokens)
    turns = [check_turns(messages, f"conversation {n}") for n, messages in enumerate(conversations)]
    prompts = list(map(chat.encode_prompt, turns))
    if not prompts:
        return []
    longest, positions = max(map(len, prompts)), model.config.max_position_embeddings
    if longest >= positions:
        raise ValueError(
            f"the longest prompt has {longest} tokens, and the model has {positions} positions "
            "(max_position_embeddings): no answer fits"
        )
    if longest + max_new_tokens > positions:
        warnings.warn(
            f"the longest prompt has {longest} tokens and the model {positions} positions (max_position_embeddings): "
            f"answers are cut where they reach them, not at {max_new_tokens} tokens",
            stacklevel=2,
        )
    mesh, tensor = model.mesh, sharding.tensor_shards(model.mesh)
    answers = _answer_on(
        mesh if sharding.context_shards(mesh) == 1 else placement.sampling_mesh(model, tensor),
        model,
        prompts,
        prompt_keys(seed, 0, range(len(prompts))),
        sampling=Sampling(max_new_tokens, temperature, top_k, top_p),
        stop_tokens=model.stop_tokens,
        slots=min(batch_size, len(prompts)),
        limits=[min(max_new_tokens, positions - len(prompt)) for prompt in prompts],
    )
    return [chat.decode(answer) for answer in answers]


BATCH_SIZE = 32


def answer(
    model: Model,
    prompts: Sequence[Ids],
    keys: Array,
    *,
    limits: Sequence[int],
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> list[Ids]:
    """Makes copies of the weights for sampling, and calls `answer_prompts` with them.

    Args:
        limits: the most tokens of each answer.
        batch_size: answers in progress at a time for each copy of the weights.
        options: `sampling`, `stop_tokens`, `stopped` and `on_chunk` of `answer_prompts`.
    """
    longest = max(map(len, prompts)) + max(limits)
    devices_each = placement.devices_per_copy(model, batch_size, longest)
    mesh = placement.sampling_mesh(model, devices_each)
    slots = min(batch_size * (mesh.size // devices_each), len(prompts))
    return _answer_on(mesh, model, prompts, keys, slots=slots, limits=limits, **options)


def _answer_on(mesh: jax.sharding.Mesh, model: Model, prompts: Sequence[Ids], keys: Array, **options: Any) -> list[Ids]:
    """`answer_prompts` with a copy of the model's weights that is laid out on this mesh."""
    kernel = kernel_for(mesh.devices.flat[0].platform, model.dtype, model.config.sinks)
    decoder = Decoder(model.config, dtype=model.dtype, kernel=kernel)
    params = sampling_params(model.params, model.config, model.dtype, mesh)
    return answer_prompts(decoder, params, prompts, keys, mesh=mesh, **options)


def counting(update: Callable[[int], object], should_stop: Callable[[], object]) -> Callable[[int, int], None]:
    """An `on_chunk` for `answer_prompts` that updates a progress bar and then calls `should_stop`."""

    def on_chunk(prompts: int, tokens: int) -> None:
        update(prompts)
        should_stop()

    return on_chunk
