"""What methods share that mix A and B themselves."""

from __future__ import annotations

from loraflow.errors import MethodError
from loraflow.methods.base import Site


def check_mixable(site: Site, who: str, remedy: str) -> None:
    """Check that adapters are no more than A and B.

    Raises:
        MethodError: if one is a DoRA.
    """
    for updates in site.updates.values():
        for name, update in zip(site.adapters, updates, strict=True):
            if update is not None and update.magnitude is not None:
                raise MethodError(
                    f"{who} mixes A and B, and adapter {name!r} is a DoRA, which is more than A and B. {remedy}, or "
                    "leave it out."
                )


def check_equal_ranks(site: Site, who: str, remedy: str) -> None:
    """Check that all adapters have the same linears and, in each, the same rank: that of each row of A has a partner.

    Raises:
        MethodError: if they do not.
    """
    for linear, updates in site.updates.items():
        ranks = {
            name: 0 if update is None else update.rank for name, update in zip(site.adapters, updates, strict=True)
        }
        first = next(iter(ranks))
        for name, rank in ranks.items():
            if rank != ranks[first]:
                raise MethodError(
                    f"{who} takes the mean of all A and of all B, so every adapter must have the same rank in each "
                    f"linear: at '{linear}', {first!r} has {ranks[first]} and {name!r} has {rank}. {remedy}, or leave "
                    "the odd adapter out."
                )
