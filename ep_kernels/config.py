"""Named choices of the public interface."""

from __future__ import annotations

import enum


class Layout(enum.Enum):
    """Order of the rows that dispatch delivers."""

    RANK_MAJOR = "rank_major"
    """One row per (token, destination rank), by source rank, then token."""

    EXPERT_MAJOR = "expert_major"
    """One row per (token, local expert): grouped by local expert, inside a group by source rank,
    then token. Group starts are multiples of `expert_alignment`."""
