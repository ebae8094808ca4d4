"""MXFP4 against transformers' own numbers."""

import numpy as np
import pytest

from spin_jax.models.mxfp4 import Unpacked

torch = pytest.importorskip("torch")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")


def test_unpacked_numbers_are_those_of_transformers():
    """Every byte under many scales, bit for bit; whole, and in slices as devices and alternating parts take them."""
    rng = np.random.default_rng(0)
    blocks = np.concatenate([rng.permutation(256) for _ in range(3 * 6 * 3 * 16 // 256 + 1)])[: 3 * 6 * 3 * 16]
    blocks = blocks.reshape(3, 6, 3, 16).astype(np.uint8)
    scales = rng.integers(10, 240, (3, 6, 3), np.uint8)
    array = Unpacked(blocks, scales, range(96))
    expected = mxfp4.convert_moe_packed_tensors(torch.as_tensor(blocks), torch.as_tensor(scales)).float().numpy()
    assert array.shape == expected.shape == (3, 96, 6)
    np.testing.assert_array_equal(np.asarray(array).astype(np.float32), expected)
    for index in np.index_exp[1:3], np.index_exp[..., 1::2], np.index_exp[0:2, 40:90, 2:5]:
        np.testing.assert_array_equal(np.asarray(array[index], np.float32), expected[index])
        assert array[index].shape == expected[index].shape
    inner = array[..., ::2][1:2, 33:64]
    np.testing.assert_array_equal(np.asarray(inner, np.float32), expected[..., ::2][1:2, 33:64])
