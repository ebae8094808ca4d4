"""What a compiled program sends between devices: by hand for TPUs and GPUs, and compiled for a CPU."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spin_jax.forecast.times import BETWEEN_SLICES, received_bytes
from spin_jax.plan.collectives import Collective, bytes_by_kind, find_collectives

HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[1024,64]) -> bf16[128,64] {
  %all-reduce.9 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, to_apply=%add
  ROOT %slice = bf16[128,64]{1,0} dynamic-slice(%all-reduce.9, %x)
}

%started (p: bf16[128,64]) -> bf16[1024,64] {
  ROOT %all-gather.1 = bf16[1024,64]{1,0} all-gather(%p), channel_id=4, dimensions={0}
}

%ended (p: bf16[128,64]) -> bf16[1024,64] {
  ROOT %all-gather.2 = bf16[1024,64]{1,0} all-gather(%p), channel_id=4, dimensions={0}
}

%body (state: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %s = bf16[1024,64]{1,0} fusion(%w), kind=kCustom, calls=%started
  %e = bf16[1024,64]{1,0} fusion(%w), kind=kCustom, calls=%ended
  %g = bf16[128,64]{1,0} fusion(%e), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (state: (s32[], bf16[128,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[128,64]) -> f32[] {
  %loop = (s32[], bf16[128,64]{1,0}) while(%start), condition=%condition, body=%body
  %norms = (f32[]{:T(128)}, f32[256]{0}) all-reduce(%x, %y), channel_id=7, to_apply=%add
}
"""


def test_collectives_of_a_tpu_program_by_hand():
    """Loops count, asynchronous halves are one, and a fusion called all-reduce-scatter is what it says."""
    found = find_collectives(HLO)
    assert sorted(found) == [
        Collective("all-gather", 1024 * 64 * 2, 32),
        Collective("all-reduce", 4 + 256 * 4, 1),
        Collective("reduce-scatter", 1024 * 64 * 2, 32),
    ]
    sums = bytes_by_kind(found)
    assert sums["all-gather"] == 32 * 1024 * 64 * 2
    assert received_bytes(sums) == 2 * sums["all-gather"] + 2 * sums["all-reduce"]


# What XLA writes for GPUs: ((operands), (results)) of what ends elsewhere, and groups in three ways.
GPU_HLO = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (w: bf16[128,64]) -> bf16[128,64] {
  %g = (bf16[128,64]{1,0}, bf16[1024,64]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'fsdp'}, dimensions={0}
  %gd = bf16[1024,64]{1,0} all-gather-done(%g)
  %s = ((bf16[1024,64]{1,0}, bf16[512,64]{1,0}), (bf16[128,64]{1,0}, bf16[64,64]{1,0})) reduce-scatter-start(%a, %b), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  %sd = (bf16[128,64]{1,0}, bf16[64,64]{1,0}) reduce-scatter-done(%s)
  %n = ((bf16[128,64]{1,0}), bf16[128,64]{1,0}) all-reduce-start(%x), channel_id=3, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  %nd = bf16[128,64]{1,0} all-reduce-done(%n)
  %all = bf16[1024,64]{1,0} all-reduce(%y), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_of_a_gpu_program_by_hand():
    """Two nodes of eight. A sum over both crosses the network once each way, divided among a node's GPUs."""
    found = find_collectives(GPU_HLO, node=8)
    part = 128 * 64 * 2
    assert sorted(found) == [
        Collective("all-gather", 8 * part, 1),
        Collective("all-reduce", 8 * part, 1),  # within the nodes; the other one's groups have one GPU in each
        Collective(BETWEEN_SLICES, 2 * 8 * part // 16, 1),  # of all 16
        Collective(BETWEEN_SLICES, 2 * part // 2, 1),  # of pairs of GPUs, one in each node
        Collective("reduce-scatter", 8 * (128 + 64) * 64 * 2, 1),
    ]
    # One node: nothing crosses.
    assert BETWEEN_SLICES not in bytes_by_kind(find_collectives(GPU_HLO))


def test_collectives_of_a_compiled_program(mesh8):
    """XLA's CPU compiler gathers and sums in the shapes asked for, once for every turn of a loop."""

    def on_each(x):
        def turn(_, mine):
            whole = jax.lax.all_gather(mine, "data", tiled=True)
            return mine + jax.lax.psum(jnp.sin(whole), "fsdp").sum(0)

        return jax.lax.fori_loop(0, 5, turn, x)

    split = PartitionSpec("data")
    x = jax.ShapeDtypeStruct((16, 128), jnp.float32, sharding=jax.sharding.NamedSharding(mesh8, split))
    run = jax.shard_map(on_each, mesh=mesh8, in_specs=split, out_specs=split, check_vma=False)
    program = jax.jit(run).lower(x).compile()
    sums = bytes_by_kind(find_collectives(program.as_text()))
    assert sums == {"all-gather": 5 * 16 * 128 * 4, "all-reduce": 5 * 16 * 128 * 4}
