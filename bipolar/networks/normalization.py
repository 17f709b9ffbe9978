"""The normalization layers that networks offer for comparison. None of them is in the paper's plain networks."""

from __future__ import annotations

from torch import nn

from bipolar.errors import check_choice

NORMS = ("none", "batch", "group", "layer")
GROUPS = 8


def groups_for(features: int, smallest: int = 1) -> int:
    """Groups of GroupNorm: as many as there can be, up to `GROUPS`, of equal size and with at least `smallest` each."""
    return max(g for g in range(1, GROUPS + 1) if features % g == 0 and (features // g >= smallest or g == 1))


def make_norm(norm: str, features: int, spatial_dims: int) -> nn.Module | None:
    """A normalization of `features` channels for activations with 0 or 2 spatial dimensions; None for `none`.

    `layer` normalises all features (and positions) of one sample together, with a scale and shift per feature: for
    feature maps that is GroupNorm with one group.
    """
    check_choice("norm", norm, NORMS)
    if norm == "none":
        return None
    if norm == "batch":
        return nn.BatchNorm2d(features) if spatial_dims else nn.BatchNorm1d(features)
    # Without positions a group of one feature is normalised to zero, and one of two to plus and minus one.
    groups = 1 if norm == "layer" else groups_for(features, smallest=1 if spatial_dims else 4)
    return nn.GroupNorm(groups, features)
