"""Meshes: what a config asks of so many devices, and where neighbours lie."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from spin_jax import config
from spin_jax.runtime import sharding
from spin_jax.selfplay import from_config


@dataclasses.dataclass(frozen=True)
class Chip:
    """What mesh_utils asks of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "cpu"
    platform: str = "cpu"


def sizes(devices, slices=1, heads=8, **mesh):
    c = config.default()
    for key, value in mesh.items():
        c.mesh[key] = value
    return (*from_config.mesh_sizes(c, types.SimpleNamespace(num_key_value_heads=heads), devices, slices).values(),)


@pytest.mark.parametrize(
    ("devices", "slices", "stated", "expected"),
    [
        (1, 1, {}, (1, 1, 1, 1)),
        (32, 1, {}, (1, 32, 1, 1)),  # two pairs of each step for every device
        (64, 1, {}, (1, 32, 1, 2)),  # fewer: a layer is split too
        (512, 1, {}, (1, 64, 1, 8)),
        (512, 1, {"heads": 3}, (1, 512, 1, 1)),  # as far as heads allow
        (512, 1, {"heads": 4}, (1, 128, 1, 4)),
        (96, 1, {}, (1, 24, 1, 4)),
        (128, 2, {}, (2, 16, 1, 4)),  # a replica a slice
        (16, 2, {"data": 1}, (1, 16, 1, 1)),
        (8, 1, {"data": -1, "fsdp": 2}, (4, 2, 1, 1)),
        (8, 1, {"tensor": -1, "fsdp": 2}, (1, 2, 1, 4)),
        (64, 1, {"context": 8}, (1, 8, 8, 1)),  # a row for 8 devices: eight pairs of each step for every row
        (128, 1, {"context": 8, "heads": 4}, (1, 16, 8, 1)),
        (256, 1, {"context": 4}, (1, 32, 4, 2)),
        (128, 1, {"fsdp": 128}, (1, 128, 1, 1)),  # what is stated counts
    ],
)
def test_sizes_that_a_config_leaves_open(devices, slices, stated, expected):
    assert sizes(devices, slices, **stated) == expected


@pytest.mark.parametrize(
    ("devices", "slices", "stated", "message"),
    [
        (8, 1, {"fsdp": 3}, "asks for 3 devices and there are 8"),
        (8, 1, {"data": -1}, "at most one is -1"),
        (8, 1, {"data": 0}, "sizes are positive"),
        (16, 4, {"tensor": 8}, "asks for 32 devices and there are 16"),
        (16, 4, {"data": 1, "fsdp": 2, "tensor": 8}, "does not divide the 4 devices of a slice"),
        (16, 4, {"data": 2, "context": 8}, "context × tensor does not divide the 4 devices of a slice"),
    ],
)
def test_impossible_meshes_are_errors_with_the_numbers(devices, slices, stated, message):
    with pytest.raises(ValueError, match=message):
        sizes(devices, slices, **stated)


def test_a_model_stays_within_a_slice():
    """Data goes across slices; what is exchanged for every layer does not."""
    chips = [Chip(number, number // 4) for number in range(8)]
    mesh = sharding.make_mesh(2, 2, 2, chips)
    assert sharding.slices_of(chips) == 2
    for replica in mesh.devices:
        assert len({chip.slice_index for chip in replica.flat}) == 1
    whole = sharding.make_mesh(1, 8, 1, chips)  # where one replica needs both, its neighbours are kept
    assert [chip.slice_index for chip in whole.devices.flat] == [0] * 4 + [1] * 4


def test_host_memory_and_back(mesh8):
    """The optimizer's state waits there: same numbers, same layout."""
    layout = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec("fsdp"))
    x = jax.device_put(np.arange(8.0), layout)
    away = sharding.to_host_memory({"x": x})["x"]
    assert away.sharding.memory_kind == "pinned_host"
    assert away.sharding.spec == layout.spec
    back = sharding.to_device(away)
    assert back.sharding == layout
    np.testing.assert_array_equal(back, x)
