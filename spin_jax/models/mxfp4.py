"""MXFP4, in which gpt-oss is published: 4-bit floats in blocks of 32 with a common power of two (OCP MX 1.0).

A tensor [E, in, out] is stored as NAME_blocks [E, out, in / 32, 16], two numbers in a byte, and NAME_scales
[E, out, in / 32], the exponents plus 127. It is unpacked where a device's part is copied. Axes: E experts.
"""

import dataclasses
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BLOCK = 32


def pair(places: dict[str, str], tensors: dict[str, dict[str, Any]]) -> bool:
    """Puts one `Packed` tensor in place of each pair of blocks and scales; returns whether there are any.

    Args:
        places: the file of each tensor.
        tensors: for each file, the places of its tensors (`weight_files.Stored`).
    """
    found = False
    for name in [name.removesuffix("_blocks") for name in places if name.endswith("_blocks")]:
        names = f"{name}_blocks", f"{name}_scales"
        blocks, scales = (tensors.get(places.get(each, ""), {}).get(each) for each in names)
        if blocks and scales and blocks.dtype == scales.dtype == "U8" and blocks.shape == (*scales.shape, _BLOCK // 2):
            *experts, outputs, groups = scales.shape
            places[name] = file = places[names[0]]
            tensors[file][name] = Packed(blocks, scales, (*experts, groups * _BLOCK, outputs))
            for each in names:
                del tensors[places.pop(each)][each]
            found = True
    return found


class Packed(NamedTuple):
    """The place of a tensor in MXFP4; it counts as bfloat16, which holds its numbers exactly."""

    blocks: Any
    scales: Any
    shape: tuple[int, ...]
    dtype: str = "BF16"

    def map(self) -> "Unpacked":
        return Unpacked(self.blocks.map(), self.scales.map(), range(self.shape[1]))


@dataclasses.dataclass
class Unpacked:
    """An array [E, in, out] whose slices are unpacked when numpy copies them."""

    blocks: np.ndarray
    scales: np.ndarray
    inputs: range
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.blocks), len(self.inputs), self.blocks.shape[1]

    def __getitem__(self, index: Any) -> "Unpacked":
        index = index if isinstance(index, tuple) else (index,)
        if index[0] is ...:
            index = (slice(None), slice(None), index[-1])
        experts, inputs, outputs = (*index, slice(None), slice(None))[:3]
        return Unpacked(self.blocks[experts, outputs], self.scales[experts, outputs], self.inputs[inputs])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, dtype or self.dtype)
        first = self.inputs.start // _BLOCK
        groups = slice(first, -(-self.inputs.stop // _BLOCK))
        for expert, (blocks, scales) in enumerate(zip(self.blocks, self.scales, strict=True)):
            numbers = np.stack([_VALUES[blocks[:, groups] & 15], _VALUES[blocks[:, groups] >> 4]], axis=-1)
            numbers = np.ldexp(numbers, scales[:, groups, None, None].astype(np.int32) - 127)
            rows = numbers.reshape(len(blocks), -1).T
            out[expert] = rows[self.inputs.start - first * _BLOCK :][: len(self.inputs)]
        return out
