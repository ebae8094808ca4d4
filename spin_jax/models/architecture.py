"""The architecture of a checkpoint as numbers, and the model that users hold."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from spin_jax.data.chat import end_of_turn

Params = dict[str, Any]


# The largest value of each whole number; the smallest is 1. No model comes near: a larger value is an error
# in the file, and would overflow shapes or loops over layers before any check reports it.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_SIZES += ("moe_intermediate_size",)
_LENGTHS = ("sliding_window", "max_position_embeddings", "original_max_position_embeddings")
_LARGEST = {"num_hidden_layers": 2**12, "num_local_experts": 2**16, "num_experts_per_tok": 2**16}
_LARGEST |= dict.fromkeys(_SIZES, 2**24) | dict.fromkeys(_LENGTHS, 2**31 - 1)
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "rope_theta", "query_pre_attn_scalar")
_POSITIVE += ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "partial_rotary_factor")
_POSITIVE += ("attention_softcap", "logit_softcap", "attn_logit_softcapping", "final_logit_softcapping")
_POSITIVE += ("beta_fast", "beta_slow", "rope_local_theta", "embedding_scale", "residual_scale", "logit_scale")
_POSITIVE += ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_POSITIVE += ("swiglu_alpha", "swiglu_limit")


def check_constants(constants: Mapping[str, Any]) -> None:
    """Raises ValueError for the first constant, by Hugging Face's name, that no model can have; None is ignored."""
    for name, value in constants.items():
        if value is None:
            continue
        if name in _LARGEST and not (type(value) is int and 1 <= value <= _LARGEST[name]):
            raise ValueError(f"{name}={value!r}: a whole number from 1 to {_LARGEST[name]} is wanted")
        if name in _POSITIVE and not (_finite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: a positive number is wanted")
        if name == "initializer_range" and not (_finite(value) and value >= 0):
            raise ValueError(f"{name}={value!r}: a number, at least 0, is wanted")
        if name == "tie_word_embeddings" and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: true or false is wanted")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38  # float32


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches RoPE beyond the length it was first trained at."""

    rope_type: str  # "linear", "llama3", "longrope" or "yarn"
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0
    short_factor: tuple[float, ...] = ()  # longrope: divisors of the frequencies below that length
    attention_factor: float = 1.0  # longrope, yarn: multiplies sines and cosines
    beta_fast: float = 32.0  # yarn keeps waves that turn more often than this within that length,
    beta_slow: float = 1.0  # and stretches those that turn less often than this
    truncate: bool = True  # yarn: the two limits are whole numbers of frequencies

    def __post_init__(self):
        llama3 = self.rope_type == "llama3"
        some = ("factor", "attention_factor", "beta_fast", "beta_slow")
        check_constants(vars(self) if llama3 else {name: getattr(self, name) for name in some})
        for factor in self.short_factor:
            check_constants({"factor": factor})
        low, high = self.low_freq_factor, self.high_freq_factor
        if llama3 and high <= low:
            raise ValueError(f"high_freq_factor={high} must exceed low_freq_factor={low}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a checkpoint. Constants have no default; options default to what Llama does."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    rotary_dim: int  # how many of a head's dimensions RoPE rotates: the first ones
    windows: tuple[int | None, ...]  # the pattern that the layers repeat: a token sees itself and the
    #                                  window − 1 tokens before it; None: all tokens before it
    activation: str  # "silu", or "gelu" by its tanh formula
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    norm: str = "rms"  # "rms+1" multiplies by 1 + scale; "layer" subtracts the mean, and has a bias
    rope_local_theta: float | None = None  # of layers with a window, whose RoPE is then not scaled; None: rope_theta
    rope_layers: tuple[bool, ...] = ()  # which layers of the pattern have RoPE; (): all
    rope_interleaved: bool = False  # RoPE turns the pairs (2i, 2i + 1), and not (i, i + R/2)
    query_growth: tuple[float, int] | None = None  # (β, n): queries at position p times 1 + β ln(1 + ⌊p / n⌋)
    parallel: bool = False  # attention and MLP read the same norm, and both are added to the residual
    pre_norms: bool = True  # the inputs of attention and MLP are normed
    post_norms: bool = False  # outputs of attention and MLP are normed before they are added
    qk_norm: bool = False  # queries and keys are normed, head by head
    qk_norm_whole: bool = False  # with qk_norm: over all heads together
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False  # with experts, also of the router
    head_bias: bool = False
    gated: bool = True  # True: down(act(gate) · up); False: down(act(up))
    clamp: tuple[float, float] | None = None  # (α, n): gate · σ(α gate) · (up + 1), with gate ≤ n and |up| ≤ n
    num_experts: int = 0  # MLPs that the router chooses from; 0: one MLP, no router
    experts_per_token: int = 0
    normed_shares: bool = True  # the weights of the chosen experts sum to 1
    embedding_scale: float | None = None  # multiplies embeddings
    residual_scale: float | None = None  # multiplies the outputs of attention and MLP
    query_scale: float | None = None  # multiplies scores; None: H^−½
    sinks: bool = False  # the softmax of each head has one more score, of no key
    attention_softcap: float | None = None  # tanh keeps scores within ± this number
    logit_scale: float | None = None  # multiplies logits
    logit_softcap: float | None = None

    def __post_init__(self):
        check_constants(vars(self))
        for window in self.windows:
            check_constants({"sliding_window": window})
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(f"RoPE turns pairs of dimensions: not {self.rotary_dim} of head_dim={self.head_dim}")
        factors, frequencies = self.rope_scaling.short_factor if self.rope_scaling else (), self.rotary_dim // 2
        if len(factors) not in (0, frequencies):
            raise ValueError(f"short_factor has {len(factors)} numbers for {frequencies} frequencies")
        chosen, experts = self.experts_per_token, self.num_experts
        if chosen > experts:
            raise ValueError(f"num_experts_per_tok={chosen} exceeds num_local_experts={experts}")
        if heads * self.head_dim > 2**24:
            raise ValueError(f"num_attention_heads={heads} × head_dim={self.head_dim}: too many")

    @property
    def pattern(self) -> tuple[tuple[int | None, bool], ...]:
        """(window, whether it has RoPE) of the layers, which repeat this pattern."""
        return tuple(zip(self.windows, self.rope_layers or (True,) * len(self.windows), strict=True))

    @property
    def longest_window(self) -> int | None:
        """How many tokens back the farthest-seeing layer sees; None where a layer sees all of them."""
        return None if None in self.windows else max(w for w in self.windows if w)


@dataclasses.dataclass
class Model:
    """A model as users hold it: architecture, parameters, tokenizer, and what an export needs."""

    config: ModelConfig
    params: Params
    tokenizer: Any  # a transformers fast tokenizer
    dtype: Any  # the dtype of its computations
    mesh: jax.sharding.Mesh
    hf_config: dict[str, Any]  # config.json with transformers' defaults filled in
    generation_config: dict[str, Any]  # generation_config.json, with the EOS of config.json where it has none
    revision: str | None = None  # the hub's commit; None for a local directory
    notes: list[str] = dataclasses.field(default_factory=list)  # what was assumed when the checkpoint was read

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The EOS ids of the checkpoint, the tokenizer's EOS, and the chat template's `end_of_turn`."""
        return tuple(sorted({*self._eos_tokens, self.end_of_turn} - {None}))

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The token that the chat template writes after every answer, where the checkpoint names no EOS there."""
        return end_of_turn(self.tokenizer, self._eos_tokens)

    @property
    def _eos_tokens(self) -> set[int]:
        ids = self.generation_config.get("eos_token_id")
        return {*([ids] if isinstance(ids, int | None) else ids), self.tokenizer.eos_token_id} - {None}
