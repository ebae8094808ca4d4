"""Meshes and shardings: the only file that names mesh axes.

Model code speaks of logical axes (batch, embed, heads, …); `RULES` says which mesh axes split them.
Meshes are in JAX's explicit mode: an array's sharding is part of its type, so a mistake fails while
tracing, and whatever is derived from a parameter (gradient, optimizer state) is split in the same way.

    data     replicas of the model; splits the batch. Slices of TPUs and nodes of GPUs are replicas first
    fsdp     splits the batch and every parameter; parameters are gathered layer by layer when used
    context  splits the tokens of each row, and every parameter as fsdp does; only attention looks beyond its own tokens
    tensor   splits heads, the MLP and the vocabulary
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "context",
    # parameters as they are stored
    "embed": ("fsdp", "context"),
    # parameters and activations
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # the embedding table the other way round: a lookup then needs no gathered table
    "vocab_rows": ("fsdp", "context"),
    "embed_columns": "tensor",
}


def mesh_sizes(data: int | None, fsdp: int, context: int, tensor: int, devices: int, slices: int = 1) -> dict[str, int]:
    """The size of each axis. One may be -1: the devices that are left. `data` None: a replica for each slice.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or do not suit the slices.
    """
    sizes = [slices if data is None else data, fsdp, context, tensor]
    wanted = " × ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh {wanted}: sizes are positive, and at most one is -1 (inferred)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(devices // known, 1)
    if math.prod(sizes) != devices:
        asked = f"mesh {wanted} asks for {math.prod(sizes)} devices and there are {devices}"
        raise ValueError(f"{asked}: set config.mesh.* so that the product is {devices}")
    if (devices // slices) % (sizes[2] * sizes[3]):
        split = "tensor" if sizes[2] == 1 else "context × tensor"
        raise ValueError(f"mesh {wanted}: {split} does not divide the {devices // slices} devices of a slice")
    return dict(zip(AXES, sizes, strict=True))


def slices_of(devices: Sequence[Any]) -> int:
    """How many TPU slices or GPU nodes these are: within one, links are fast."""
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def make_mesh(
    data: int | None = None,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    context: int = 1,
) -> Mesh:
    """Builds the (data, fsdp, context, tensor) mesh of all devices, or of those given, by `mesh_sizes`.

    Neighbours on an axis are neighbours on the machine. If there are several slices, the data axis is split
    over them as far as possible, and the fsdp axis over the rest.
    """
    devices = list(devices if devices is not None else jax.devices())
    slices = slices_of(devices)
    sizes = tuple(mesh_sizes(data, fsdp, context, tensor, len(devices), slices).values())
    if slices > 1:
        replicas = math.gcd(sizes[0], slices)
        across = replicas, slices // replicas, 1, 1
        within = tuple(size // count for size, count in zip(sizes, across, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def batch_shards(mesh: Mesh | None = None) -> int:
    """Into how many parts a mesh splits the batch; by default the mesh in use."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return shape.get("data", 1) * shape.get("fsdp", 1)


def context_shards(mesh: Mesh | None = None) -> int:
    """Into how many parts a mesh splits the tokens of a row; by default the mesh in use."""
    return (mesh or jax.sharding.get_abstract_mesh()).shape.get("context", 1)


def tensor_shards(mesh: Mesh) -> int:
    """Into how many parts the tensor axis splits heads, the MLP and the vocabulary."""
    return mesh.shape["tensor"]


def check_heads(key: str, tensor: int, heads: int, whose: str = "the model's") -> None:
    """Raises ValueError where `tensor` devices cannot share the key/value heads; `key` is what the config says."""
    if heads % tensor:
        raise ValueError(f"{key}={tensor} does not divide {whose} {heads} key/value heads")


def weight_shards(mesh: Mesh) -> int:
    """Into how many parts the stored parameters of one replica are split."""
    return math.prod(mesh.shape[axis] for axis in (*RULES["embed"], "tensor"))


def one_device() -> bool:
    """Whether the program runs on one device, inside or outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def spec(*logical: str | None) -> PartitionSpec | None:
    """The PartitionSpec of logical axes, or None outside of a mesh (a plain one-device program)."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else PartitionSpec(*(_mesh_axes(name, mesh.shape) for name in logical))


def _mesh_axes(name: str | None, sizes: Mapping[str, int]) -> str | tuple[str, ...] | None:
    """The mesh axes of a logical axis. Tokens have none where rows stay whole: keys need not be gathered then."""
    return None if name is None or (name == "tokens" and sizes["context"] == 1) else RULES[name]


def reshard(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x` laid out by logical axes; outside of a mesh, `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.sharding.reshard(x, _divided(x.shape, logical, mesh.shape))


def _divided(shape: Sequence[int], logical: Sequence[str | None], sizes: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of logical axes.

    A dimension that its mesh axes do not divide stays whole: a vocabulary of 32,003 is legal.
    """

    def fitting(size: int, axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return None if size % math.prod(sizes[name] for name in names) else axes

    axes = (_mesh_axes(name, sizes) for name in logical)
    return PartitionSpec(*(fitting(*pair) for pair in zip(shape, axes, strict=True)))


def _local() -> bool:
    """Whether the program is not split here: it runs outside of a mesh, or on the parts of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.are_all_axes_manual


def _heads_axis(kv_heads: int) -> str | None:
    """The mesh axis that splits key/value heads and their queries; None if it does not divide them."""
    return "tensor" if kv_heads % jax.sharding.get_abstract_mesh().shape["tensor"] == 0 else None


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[..., N, H] queries, or their weights → [..., K, N / K, H], split over tensor as keys and values are."""
    shape = (*x.shape[:-2], kv_heads, x.shape[-2] // kv_heads, x.shape[-1])
    if _local():
        return x.reshape(shape)
    first = (*jax.typeof(x).sharding.spec[:-2], _heads_axis(kv_heads))
    x = jax.sharding.reshard(x, PartitionSpec(*first, None))
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(*first, None, None))


def merged_heads(x: jax.Array) -> jax.Array:
    """[B, T, K, G, H] → [B, T, K · G, H]: the inverse of `grouped`."""
    B, T, K, G, H = x.shape
    if _local():
        return x.reshape(B, T, K * G, H)
    batch, tokens, tensor, _, _ = jax.typeof(x).sharding.spec
    return jax.lax.reshape(x, (B, T, K * G, H), out_sharding=PartitionSpec(batch, tokens, tensor, None))


def merged_tokens(x: jax.Array) -> jax.Array:
    """[B, T, ...] → [B · T, ...], split over the batch as the rows are."""
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape)
    batch, _, *rest = jax.typeof(x).sharding.spec
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(batch, *rest))


def split_tokens(x: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """[B · T, ...] → [B, T, ...]: the inverse of `merged_tokens`, with `rows` = (B, T)."""
    shape = (*rows, *x.shape[1:])
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape)
    batch, *rest = jax.typeof(x).sharding.spec
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(batch, None, *rest))


def merged_rows(x: jax.Array) -> jax.Array:
    """[N, G] → [N · G], split over the batch as the rows are."""
    target = spec("batch")
    return x.reshape(-1) if target is None else jax.lax.reshape(x, (x.size,), out_sharding=target)


def put_rows(old: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """`old` with some rows replaced. An index counts its own device's rows; one past the end is ignored."""

    def put(old: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[index].set(new, mode="drop")

    if jax.sharding.get_abstract_mesh().empty:
        return put(old, index, new)
    target = jax.typeof(old).sharding.spec
    specs = target, PartitionSpec(RULES["batch"]), target
    index, new = jax.sharding.reshard(index, specs[1]), jax.sharding.reshard(new, target)
    return jax.shard_map(put, in_specs=specs, out_specs=target, check_vma=False)(old, index, new)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Some rows of `x`. An index counts its own device's rows."""
    if jax.sharding.get_abstract_mesh().empty:
        return x[index]
    specs = jax.typeof(x).sharding.spec, PartitionSpec(RULES["batch"])
    index = jax.sharding.reshard(index, specs[1])
    return jax.shard_map(lambda x, i: x[i], in_specs=specs, out_specs=specs[0], check_vma=False)(x, index)


def take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """[B, T, D] at the tokens [B, C] of each row → [B, C, D], which the devices of a row compute in equal parts."""

    def take(x: jax.Array, index: jax.Array) -> jax.Array:
        return jax.numpy.take_along_axis(x, index[..., None], axis=1)

    if context_shards() == 1:
        return take(x, index)
    x, index = reshard(x, "batch", None, None), reshard(index, "batch", "tokens")
    specs = spec("batch", None, None), spec("batch", "tokens")
    return jax.shard_map(take, in_specs=specs, out_specs=spec("batch", "tokens", None), check_vma=False)(x, index)


def by_rows_and_heads(run: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """run(q, k, v, *others) on each device's own rows and heads, as attention needs it.

    A device has the queries of its own tokens, and keys and values of all tokens of its rows. `others` are numbers of
    all tokens of a row, [B, T], or of the query heads, [N].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(*operands)
    q, k, v, *others = operands
    # It names `context` also where that is one device, or gradients would be summed over it.
    heads = PartitionSpec(RULES["batch"], RULES["tokens"], _heads_axis(k.shape[2]), None)
    q, k, v = (jax.sharding.reshard(x, heads) for x in (q, k, v))
    specs = (PartitionSpec(heads[2]) if x.ndim == 1 else PartitionSpec(RULES["batch"]) for x in others)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *others: jax.Array) -> jax.Array:
        return run(q, all_tokens(k), all_tokens(v), *others)

    specs = (heads, heads, heads, *specs)
    out = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, *others)
    return jax.sharding.reshard(out, PartitionSpec(heads[0], _mesh_axes("tokens", mesh.shape), *heads[2:]))


def all_tokens(x: jax.Array) -> jax.Array:
    """[B, T / C, …] of one device, within `by_rows_and_heads` → [B, T, …], from all devices of the row."""
    return x if context_shards() == 1 else jax.lax.all_gather(x, "context", axis=1, tiled=True)


def own_tokens(x: jax.Array, axis: int = 1) -> jax.Array:
    """The inverse of `all_tokens`: the part of one device."""
    size = x.shape[axis] // context_shards()
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, first_token(size), size, axis)


def first_token(size: int) -> jax.Array | int:
    """Where the device's own tokens begin in the row, if each device has `size` of them."""
    return 0 if context_shards() == 1 else jax.lax.axis_index("context") * size


def by_slots_and_heads(run: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """run(q [B, N, H], k, v [B, K, S, H], column, lengths [B]) on each device's own slots and heads."""
    if jax.sharding.get_abstract_mesh().empty:
        return run(*operands)
    q, k, v, column, lengths = operands
    batch, heads = RULES["batch"], _heads_axis(k.shape[1])
    queries, cache = PartitionSpec(batch, heads, None), PartitionSpec(batch, heads, None, None)
    q, k, v = jax.sharding.reshard(q, queries), *(jax.sharding.reshard(x, cache) for x in (k, v))
    specs = (queries, cache, cache, PartitionSpec(), PartitionSpec(batch))
    return jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, column, lengths)


def by_rows(run: Callable[..., jax.Array], x: jax.Array, y: jax.Array, *weights: jax.Array) -> jax.Array:
    """run(x, y, *weights) on each device's own tokens of x and y, and its part of gathered weights.

    If the weights are split over tensor, the results of the devices are summed.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run(x, y, *weights)
    rows, parts = spec("batch", "tokens"), [jax.typeof(w).sharding.spec for w in weights]
    split = any("tensor" in part.partitions for part in parts)

    def local(*arguments: jax.Array) -> jax.Array:
        return jax.lax.psum(run(*arguments), "tensor") if split else run(*arguments)

    return jax.shard_map(local, in_specs=(rows, rows, *parts), out_specs=rows, check_vma=False)(x, y, *weights)


def by_parts(run: Callable[[Any], Any], x: Any) -> Any:
    """run(x) on each device's own part of an array, or of a tree of arrays that are split alike; so is the result."""
    if jax.sharding.get_abstract_mesh().empty:
        return run(x)
    split = jax.typeof(jax.tree.leaves(x)[0]).sharding.spec
    return jax.shard_map(run, in_specs=(split,), out_specs=split, check_vma=False)(x)


def gathered(x: jax.Array) -> jax.Array:
    """A stored parameter for use in the model: gathered over fsdp and context, and still split over tensor.

    `reduced` says how its gradient is summed: each device keeps its own share until the transpose of this
    function, which then needs one reduce-scatter in place of an all-reduce and a slice. One device has
    nothing to gather, and there `ragged_dot` gives no gradient that is still to be summed.
    """
    if one_device():
        return x
    partition = [None if entry == RULES["embed"] else entry for entry in jax.typeof(x).sharding.spec]
    # The gradient is a sum over the tokens of all devices that have different ones.
    reduced = RULES["batch"] if context_shards() == 1 else (*RULES["batch"], RULES["tokens"])
    return jax.sharding.reshard(x, PartitionSpec(*partition, reduced=frozenset(reduced)))


def summed(x: jax.Array) -> jax.Array:
    """`x`, a product that is summed over tensor, so that its sum is taken in its own dtype.

    XLA moves a later cast to float32 in front of the sum, and twice the bytes would travel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.shape["tensor"] == 1 else jax.lax.optimization_barrier(x)


def parameter_shardings(mesh: Mesh, abstract: Any) -> Any:
    """NamedShardings for a tree of Linen-boxed abstract parameters (`jax.eval_shape` of `init`)."""

    def sharding(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _divided(leaf.value.shape, leaf.names, mesh.shape))

    return jax.tree.map(sharding, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def unboxed(abstract: Any) -> Any:
    """The tree without its logical axes."""
    return nn.unbox(abstract)


def batch_layout(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split over the batch on dimension `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))


def put_batch(mesh: Mesh, batch: Any, *, axis: int = 0) -> Any:
    """Host arrays, the same in every process → device arrays, split over the batch on dimension `axis`."""
    layout = batch_layout(mesh, axis)

    def put(x: np.ndarray) -> jax.Array:
        if layout.is_fully_addressable:
            return jax.device_put(x, layout)
        return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])

    return jax.tree.map(put, batch)


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array, in every process."""
    return np.asarray(everywhere(x))


def everywhere(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """`x` so that every process can read all of it."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    assert isinstance(x.sharding, NamedSharding)
    return _replicated(x.sharding.mesh)(x)


@functools.cache
def _replicated(mesh: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def to_host_memory(tree: Any) -> Any:
    """Moves arrays, with their layout, to the memory of the hosts of their devices."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, tree)


def to_device(tree: Any) -> Any:
    """Moves arrays back from host memory to their devices."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, tree)


def laid_out(mesh: Mesh, abstract: Any) -> Any:
    """Shapes as `jax.eval_shape` gives them under `mesh`, with that mesh's own shardings."""

    def placed(x: Any) -> Any:
        layout = NamedSharding(mesh, x.sharding.spec if x.sharding else PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    return jax.tree.map(placed, abstract)


def in_host_memory(abstract: Any) -> Any:
    """The shapes and shardings that arrays have after `to_host_memory`."""
    kind = "pinned_host"
    return jax.tree.map(lambda x: x.update(sharding=x.sharding.with_memory_kind(kind)) if x.ndim else x, abstract)


def free(tree: Any) -> None:
    """Frees the device memory of arrays at once, even if references to them remain."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def bucket(length: int) -> int:
    """`length` rounded up to 16, 24, 32, 48, 64, 96, …: few shapes, at most half of one wasted."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def row_length(longest: int, mesh: Mesh, granule: int = 1) -> int:
    """The bucket for rows of up to `longest` tokens: each device of a row gets a multiple of `granule` tokens."""
    return round_up(bucket(longest), granule * context_shards(mesh))


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not less than n."""
    return -(-n // multiple) * multiple
