"""Numbers that one request may make too large, kept from the others'."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Larger ones are of no use, and could overflow where others' tokens are compared with them.
_LARGEST = 1e15


def finite(states: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """States without NaN and infinity, and so small that two of them have a finite sum.

    The keys and values of all requests are read by one attention, and their memory is used again. Masks hide what a
    request must not see, but not NaN (0 * NaN is NaN): absurd weights of one would spoil the answers of all.
    """
    largest = min(_LARGEST, torch.finfo(states.dtype).max / 4)
    return states.clamp(-largest, largest).nan_to_num(0.0)
