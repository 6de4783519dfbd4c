"""The cost model of batches fitted to measurements."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from saih.errors import SaihError
from workloads.llm.costs import CostModel as CostModel
from workloads.llm.scheduler import Load


@dataclass(frozen=True)
class Fit:
    """A fitted model and how far off it is on the samples it was fitted to: |predicted / measured - 1|."""

    model: CostModel
    median_error: float
    worst_error: float


TERMS = tuple(term.name for term in fields(CostModel))


def fit(loads: Sequence[Load], step_s: Sequence[float], terms: Sequence[str] = TERMS) -> Fit:
    """The non-negative coefficients of these terms with the least sum of squared relative errors.

    Raises SaihError for fewer samples than terms or a time that is not positive.
    """
    measured_s = np.asarray(step_s, dtype=np.float64)
    if len(loads) != len(measured_s) or len(loads) < len(terms):
        raise SaihError(f"{len(terms)} terms need as many samples: got {len(loads)} loads, {len(measured_s)} times")
    if not (measured_s > 0).all():
        raise SaihError("every measured time has to be positive")
    design = np.column_stack([np.ones(len(loads)), np.asarray(loads, dtype=np.float64)])
    relative = design[:, [TERMS.index(term) for term in terms]] / measured_s[:, None]
    model = CostModel(**dict(zip(terms, map(float, _non_negative(relative, np.ones(len(loads)))), strict=True)))
    error = np.abs(design @ np.array(astuple(model)) / measured_s - 1)
    return Fit(model, float(np.median(error)), float(error.max()))


def _non_negative(design: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative least squares by trying every set of coefficients above zero: exact, and 2^5 small problems."""
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0
    count = design.shape[1]
    best, least = np.zeros(count), float(np.sum(wanted**2))
    for chosen in (list(each) for size in range(1, count + 1) for each in combinations(range(count), size)):
        part = np.linalg.lstsq(design[:, chosen] / scale[chosen], wanted)[0]
        residual = float(np.sum((design[:, chosen] / scale[chosen] @ part - wanted) ** 2))
        if (part >= 0).all() and residual < least:
            best, least = np.zeros(count), residual
            best[chosen] = part / scale[chosen]
    return best
