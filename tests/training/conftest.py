"""What several files of tests of training ask for."""

import pytest

from spin_jax.training import log_probs


@pytest.fixture(scope="module")
def several_chunks():
    """Ten columns of a micro-batch are projected at a time, as it is with a large vocabulary.

    Devices that share rows round the ten up.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_probs, "_CHUNK_LOGITS", 2 * 10 * 272)
        yield
