"""The decoder, in Flax Linen used as functions of a plain parameter tree; families differ in its options.

    hidden, _ = forward(Decoder(config), params, tokens, layout)
    logits = project(hidden, output_head(Decoder(config), params))

Axes: B batch, T tokens (queries), S key slots, V vocabulary, D model, N query heads, K key/value heads,
H head dim, R rotary dim, F mlp, L layers, E experts, M fused matrices. The letters of einsums are these.
A `Layout` (attention.py) says where in its sequence each token stands, and which tokens see each other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from spin_jax.kernels import quantized
from spin_jax.kernels.layout import Layout, matmul_precision
from spin_jax.models.architecture import ModelConfig, Params
from spin_jax.models.cache import Cache
from spin_jax.models.layers import REMAT, Block, Norm, copy_for
from spin_jax.runtime import sharding


class Decoder(nn.Module):
    """Tokens → final hidden states. It computes in `dtype`, whatever dtype the parameters have.

    The residual stream, and everything between two matmuls, is float32 in any case. Rounded to bfloat16 as
    well, a token's log-prob would be a third to a half farther from its float32 value.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"  # "none" keeps all activations for the backward pass; else a key of `REMAT`
    kernel: str = "plain"  # of attention without a cache

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        table = nn.with_partitioning(init, ("vocab_rows", "embed_columns"))
        self.embed: Any = self.param("embed", table, (c.vocab_size, c.hidden_size))
        self.layers = nn.scan(  # creates the layers' stacked parameters; `_scan_layers` runs them
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: None},
        )(c, self.dtype, None)
        self.final_norm = Norm(c.norm, c.norm_eps, self.dtype)
        if not c.tie_word_embeddings:
            head = nn.with_partitioning(init, ("embed", "vocab"))
            self.head: Any = self.param("head", head, (c.hidden_size, c.vocab_size))
        if c.head_bias:
            bias = nn.with_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias: Any = self.param("head_bias", bias, (c.vocab_size,))

    def __call__(
        self, tokens: Int[Array, "B T"], layout: Layout, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states, and the cache with the tokens in its next T columns.

        With a cache, params["layers"] is a tuple of layers (`sampling_params`), because a scanned cache would
        be copied at every step.
        """
        out_sharding = sharding.spec("batch", "tokens", None)
        x = sharding.gathered(self.embed).at[tokens].get(out_sharding=out_sharding).astype(self.dtype)
        if self.config.embedding_scale:
            x *= jnp.asarray(self.config.embedding_scale, self.dtype)
        x = x.astype(jnp.float32)
        if self.is_initializing():
            x, _ = self.layers(x, layout)
        elif cache is None:
            x = self._scan_layers(x, layout)
        else:
            x, cache = self._decode(x, layout, cache)
        return self.final_norm(x), cache

    def _scan_layers(self, x, layout: Layout):
        """Runs one layer after the other; one step of the scan runs the whole pattern of layers once."""
        c = self.config

        def layer_with(window: int | None, rotates: bool):
            block = Block(c, self.dtype, window, self.kernel, rotates, parent=None)

            def layer(number, variables, x):
                # The slice is taken inside, because a checkpointed function keeps its arguments.
                if len(c.pattern) > 1:
                    variables = jax.tree.map(lambda w: w[number], variables)
                if copies := variables.pop("copies", None):
                    variables["params"] = jax.tree.map(copy_for, variables["params"], copies)
                return block.apply(quantized.as_floats(variables, sharding.by_parts), x, layout)[0]

            if self.remat == "none":
                return layer
            keep = jax.checkpoint_policies.save_only_these_names(*REMAT[self.remat])
            return jax.checkpoint(layer, prevent_cse=False, policy=keep, static_argnums=0)

        pattern = [layer_with(*kind) for kind in c.pattern]

        def run_pattern(x, layers):
            for number, layer in enumerate(pattern):
                x = layer(number, layers, x)
            return x, None

        layers = {kind: tree["layers"] for kind, tree in self.variables.items()}
        if len(pattern) > 1:  # gradients of reshaped arrays are not summed in place (training/step.py)
            layers = jax.tree.map(lambda w: w.reshape(-1, len(pattern), *w.shape[1:]), layers)
        return lax.scan(run_pattern, x, layers)[0]

    def _decode(self, x, layout: Layout, cache: Cache):
        c = self.config
        blocks = [Block(c, self.dtype, window, self.kernel, rotates, parent=None) for window, rotates in c.pattern]
        layers = self.variables["params"]["layers"]
        written = []
        for number, (layer, k, v) in enumerate(zip(layers, cache.keys, cache.values, strict=True)):
            x, kv = blocks[number % len(blocks)].apply({"params": layer}, x, layout, (k, v, cache.column))
            written.append(kv)
        keys, values = zip(*written, strict=True)
        return x, Cache(keys, values, (cache.column + x.shape[1]) % cache.columns)


# The trees that may stand beside the weights (of lora.py and params.py), and their Linen collections.
_COLLECTIONS = {"adapters": "lora", "copies": "copies"}


def forward(
    decoder: Decoder, params: Params, tokens: Int[Array, "B T"], layout: Layout, cache: Cache | None = None
) -> tuple[Float[Array, "B T D"], Any]:
    """`Decoder.__call__` as a function of the parameters."""
    variables = {"params": {name: tree for name, tree in params.items() if name not in _COLLECTIONS}}
    variables |= {_COLLECTIONS[name]: tree for name, tree in params.items() if name in _COLLECTIONS}
    return decoder.apply(variables, tokens, layout, cache)  # pyright: ignore[reportReturnType]


@struct.dataclass
class Head:
    """The projection of hidden states to logits."""

    weight: Float[Array, "D V"]
    bias: Float[Array, " V"] | None
    scale: float | None = struct.field(pytree_node=False)
    softcap: float | None = struct.field(pytree_node=False)

    def astype(self, dtype: Any) -> "Head":
        return jax.tree.map(lambda w: w.astype(dtype), self)


def output_head(decoder: Decoder, params: Params) -> Head:
    """The output projection, gathered and in the compute dtype."""
    c = decoder.config
    head = params["embed"].T if c.tie_word_embeddings else params["head"]
    # A tied head is split otherwise: the mesh axis `tensor` splits the model's dimension.
    head = sharding.gathered(sharding.reshard(head.astype(decoder.dtype), "embed", "vocab"))
    bias = params["head_bias"].astype(decoder.dtype) if c.head_bias else None
    return Head(head, bias, c.logit_scale, c.logit_softcap)


def project(hidden: Float[Array, "B T D"], head: Head) -> Float[Array, "B T V"]:
    """Next-token logits in float32."""
    precision = matmul_precision(hidden.dtype)
    logits = jnp.einsum("BTD,DV->BTV", hidden, head.weight, precision=precision, preferred_element_type=jnp.float32)
    if head.bias is not None:
        logits += head.bias.astype(jnp.float32)
    if head.scale is not None:
        logits *= head.scale
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)
