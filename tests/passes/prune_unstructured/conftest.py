from __future__ import annotations

import pytest
import torch

from compress.data.batches import Batches


@pytest.fixture(scope="module")
def data() -> Batches:
    """Samples for calibration."""
    return Batches(torch.randint(2, 250, (16, 24), generator=torch.Generator().manual_seed(1)))
