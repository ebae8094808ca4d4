"""Reward models: a decoder with a head that gives a conversation one number.

A checkpoint is what transformers calls a model for sequence classification, with one label: the decoder of a
supported family, and `score.weight` in place of the output head. The number of a conversation is read at its last
token that is not the padding token, as transformers reads it.

Axes: N rows, T tokens of a row, G conversations of a row, D model.
"""

import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spin_jax.data.chat_template import Template
from spin_jax.data.records import Ids, Message
from spin_jax.models import loading, weight_files
from spin_jax.models.architecture import Params
from spin_jax.models.attention import kernel_for
from spin_jax.models.decoder import Decoder, forward
from spin_jax.runtime import sharding
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import Group, Rows, RowShape

_HEAD = "score.weight"
_GROUPS = 16  # conversations of a row at most
_GRANULE = 128  # the length of a row is a multiple of it, as splash wants


class RewardModel:
    """A reward model of a Hugging Face directory or hub id. Its weights are read when they are first used."""

    def __init__(
        self,
        path: str,
        *,
        mesh: jax.sharding.Mesh | None = None,
        dtype: str | None = None,
        tokens_per_device: int = 8192,
        today: datetime.date | None = None,
    ):
        """Reads the config, the tokenizer and the headers of the weights.

        Args:
            path: a directory, a hub id, or OWNER/NAME@REVISION.
            mesh: the devices that share the weights; None: all.
            dtype: of the computation; None: the checkpoint's.
            tokens_per_device: how many tokens a device reads at a time, unless one conversation is longer.
            today: the date that the chat template may print; None: today's.

        Raises:
            ValueError, FileNotFoundError: what is wrong with the checkpoint, naming the file; or the mesh cannot split
                the model.
        """
        self._directory = loading.resolve_name(path, "reward model")
        model, _ = loading.describe(str(self._directory), dtype=dtype, mesh=mesh)
        shards, heads = sharding.tensor_shards(model.mesh), model.config.num_key_value_heads
        sharding.check_heads("mesh.tensor", shards, heads, "the reward model's")
        # Without an output head of its own: it has the head for the score instead.
        decoder_only = dataclasses.replace(model.config, tie_word_embeddings=True, head_bias=False)
        self._model = dataclasses.replace(model, config=decoder_only)
        self._tensor = functools.partial(
            loading.locate_tensor, self._directory, self._model.config, _HEAD, (1, model.config.hidden_size)
        )
        self._tensor()
        self._template = Template(model.tokenizer, today)
        self.positions = model.config.max_position_embeddings  # the most tokens of a conversation
        self._tokens_per_device = tokens_per_device
        self._weights: Params | None = None

    @property
    def digest(self) -> str:
        """A digest of the weights, and of the config, the tokenizer and the chat template beside them."""
        texts = (path for path in sorted(self._directory.iterdir()) if path.suffix in (".json", ".jinja", ".model"))
        beside = hashlib.sha256(b"|".join(part for path in texts for part in (path.name.encode(), path.read_bytes())))
        return f"{weight_files.digest(self._directory)} {beside.hexdigest()[:16]}"

    def free(self) -> None:
        """Frees the memory of the weights; they are read again when they are next used."""
        if self._weights is not None:
            sharding.free(self._weights)
            self._weights = None

    def tokens(self, conversation: list[Message]) -> Ids:
        """The tokens of a conversation, up to the one where its number is read.

        Raises:
            ValueError: the chat template refuses the conversation, or it is longer than the model's texts.
        """
        text = self._template.render(conversation, prompt=False)
        ids = np.array(self._model.tokenizer(text, add_special_tokens=False).input_ids, np.int32)
        # transformers takes the last token that is not padding, even if the text itself ends in that token.
        read = np.flatnonzero(ids != self._model.hf_config.get("pad_token_id"))
        ids = ids[: read[-1] + 1] if len(read) else ids
        if len(ids) > (longest := self.positions):
            raise ValueError(f"the conversation has {len(ids)} tokens, and the reward model reads at most {longest}")
        return ids

    def scores(self, conversations: Sequence[Ids]) -> Float[np.ndarray, " n"]:
        """The number of each conversation, which `tokens` made; all processes of a mesh call this together."""
        if not conversations:
            return np.zeros(0, np.float32)
        model = self._model
        # A group has one more token, which is not read: packing keeps the place from which it would be predicted.
        groups = [Group(ids, (ids[-1:],)) for ids in conversations]
        # A row is as long as this call needs: what was scored before, or in another process, changes no bit.
        length = sharding.row_length(max(map(len, conversations)) + 1, model.mesh, _GRANULE)
        kernel = kernel_for(model.mesh.devices.flat[0].platform, model.dtype, model.config.sinks)
        tokens = self._tokens_per_device * sharding.context_shards(model.mesh)  # of the devices that share a row
        shape = RowShape(
            rows=max(1, tokens // length) * sharding.batch_shards(model.mesh),
            length=length,
            groups=_GROUPS,
            unshared=length if kernel == "splash" else 0,
        )
        if self._weights is None:
            params = loading.load_params(self._directory, model.config, model.mesh, model.dtype)
            self._weights = {"decoder": params, "head": jnp.asarray(self._tensor().map()[0], jnp.float32)}
        decoder = Decoder(model.config, model.dtype, kernel=kernel)
        return score_groups(decoder, self._weights, groups, shape, model.mesh, values_of=_values)[:, 0]


@functools.partial(jax.jit, static_argnames="decoder")
def _values(decoder: Decoder, weights: Params, rows: Rows) -> Float[Array, "N G 1"]:
    """The number of each group, read at the token before its answer."""
    hidden, _ = forward(decoder, weights["decoder"], rows.tokens, rows.layout)
    places = rows.predictors[:, : rows.items.shape[1]]  # each group has one response token, so they stand in its order
    hidden = sharding.reshard(hidden, "batch", None, None)
    read = jnp.take_along_axis(hidden, places[..., None], axis=1).astype(jnp.float32)
    return jnp.sum(read * weights["head"], axis=-1, keepdims=True)
