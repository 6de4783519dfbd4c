"""How wide the side layers are. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from saih.errors import SaihError
from workloads.llm.config import ModelSpec


def side_spec(spec: ModelSpec, reduction: int) -> ModelSpec:
    """The ladder's layers: the backbone's with every width over `reduction`. Raises SaihError if one is not whole.

    Widths are hidden, MLP, and that of a head; the heads are as many.
    """
    widths = {"hidden": spec.hidden, "head_dim": spec.head_dim, "ffn": spec.ffn}
    for name, width in widths.items():
        in_pairs = name == "head_dim" and spec.rope_theta > 0
        if width % reduction or (in_pairs and width // reduction % 2):
            raise SaihError(f"reduction={reduction} does not divide {name}={width}{' into pairs' if in_pairs else ''}")
    hidden, head_dim, ffn = (width // reduction for width in widths.values())
    return replace(spec, hidden=hidden, head_dim=head_dim, ffn=ffn)
