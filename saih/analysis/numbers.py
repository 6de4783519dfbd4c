"""Numbers as people read them: three significant digits, SI prefixes, a dash for what is not there."""

from __future__ import annotations

import math

ABSENT = "–"  # noqa: RUF001 (an en dash)
PREFIXES = (
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
)


def three(value: float) -> str:
    """Three significant digits: 0.0123, 1.23, 12.3, 1230."""
    if not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e9:
        return f"{value:.2e}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    decimals = 2 - math.floor(math.log10(abs(rounded)))  # 9.996 has become 10.0
    return f"{rounded:.{max(decimals, 0)}f}"


def si(value: float, unit: str = "") -> str:
    """With a prefix: 68860000000 -> "68.9 G"."""
    if not math.isfinite(value):
        return ABSENT
    scale, prefix = _prefix(value)
    return f"{three(value / scale)} {prefix}{unit}".rstrip()


def large(value: float) -> str:
    """With a prefix only where it is large: nobody counts in millisamples."""
    return three(value) if abs(value) < 1000 else si(value)


def span(low: float, high: float, unit: str = "") -> str:
    """An interval under one prefix: "3.10 to 3.22 ms"."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ABSENT
    scale, prefix = _prefix(high)
    return f"{three(low / scale)} to {three(high / scale)} {prefix}{unit}".rstrip()


def bracketed(low: float, high: float, unit: str) -> str:
    """An interval behind its value: " (1.2 to 1.4 x)"; nothing where there is none."""
    return f" ({three(low)} to {three(high)}{unit})" if math.isfinite(low + high) else ""


def whole(value: float) -> str:
    """A count: 12,345."""
    return f"{value:,.0f}" if math.isfinite(value) else ABSENT


def plural(count: int, noun: str) -> str:
    """Count and noun: "1 cell", "1,200 cells"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _prefix(value: float) -> tuple[float, str]:
    if value == 0:
        return 1.0, ""
    return next(((scale, prefix) for scale, prefix in PREFIXES if abs(value) >= scale * 0.9995), (1e-9, "n"))
