"""The one error a user meets: what is wrong, where, and the valid choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaihError(Exception):
    """A mistake in the input or a machine that cannot do what was asked; its text is one clear line."""


def unknown(kind: str, name: object, valid: Iterable[object], where: str = "") -> SaihError:
    """The error for a name that does not exist, with the nearest valid names first."""
    names = [str(choice) for choice in valid]
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    place = f"{where}: " if where else ""
    return SaihError(f"{place}unknown {kind} {str(name)!r}; {hint}valid: {', '.join(names) or 'none'}")
