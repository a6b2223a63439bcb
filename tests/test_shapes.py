from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from loraflow.core.reference import reference_linear


def test_shapes_are_checked_and_bad_input_still_reaches_the_library():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    assert reference_linear(x, weight, None, (), torch.ones(2, 1)).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="fusion_weights"):
        reference_linear(x, weight, None, (), torch.ones(7, 1))
    with pytest.raises(TypeCheckError, match="weight"):
        reference_linear(x, weight.long(), None, (), torch.ones(2, 1))
