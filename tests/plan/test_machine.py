"""The machines of `plan`: what libtpu and the data sheets say of them, and unknown names."""

import pytest
from plan_examples import planned, zephyr

from spin_jax.plan import machine
from spin_jax.runtime import chips


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        ("v9:2x2", {}, "--topology=v9:2x2: a machine such as"),
        ("h100", {}, "--topology=h100: a machine such as"),
        ("cpu:2", {}, "--topology=cpu:2: a machine such as"),
        ("h100:8*0", {}, "--topology=h100:8\\*0: a machine such as"),
        ("h100:8", {"mesh__tensor": 3}, "asks for 6 devices and there are 8"),
        ("h100:8", {"sampling__tensor": 3}, "sampling.tensor=3 does not divide"),
    ],
)
def test_impossible_machines(topology, changes, message):
    with pytest.raises(ValueError, match=message):
        planned(zephyr(**changes), topology)


@pytest.mark.parametrize(
    ("topology", "devices"),
    [("v4:2x2x1", 4), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8), ("v5e:2x2*2", 8)],
)
def test_tpus_are_what_libtpu_says(topology, devices):
    """A v4's and a v5p's two cores are one device, Ironwood's two chiplets are two."""
    pytest.importorskip("libtpu", reason="needs jax[tpu], though no TPU")
    parsed = machine.parse_topology(topology)
    found = machine.topology_devices(parsed)
    assert len(found) == parsed.devices == devices
    assert {device.device_kind for device in found} == {machine.FAMILIES[parsed.family].device_kind}


def test_each_machine_has_a_chip():
    """Whose memory is that of the description which is compiled for, to half a percent."""
    for family in [family for name, family in machine.FAMILIES.items() if name != "cpu"]:
        chip = chips.chip(family.device_kind)
        assert chip
        assert not family.gpu or chip.memory == pytest.approx(family.gpu.memory, rel=5e-3)
