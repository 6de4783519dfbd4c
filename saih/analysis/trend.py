"""How a quantity grows with the application: range, knee, saturation; a model of it, with honest prediction intervals.

Models are in performance-model normal form (Calotoiu et al., SC13, section 3.1): a constant and one term
c p^i log2(p)^j for each size, multiplied or added. Which exponents are right is not known, so none is chosen for the
interval: all are averaged, weighted by BIC (Raftery, 1995); it is that of the mixture of their Student-t predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from scipy.special import stdtr

EXPONENTS = (0, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 5 / 4, 4 / 3, 3 / 2, 5 / 3, 2, 7 / 3, 5 / 2, 8 / 3, 3, 4)
LOG_EXPONENTS = (0, 1)
WITH_LOG = (0.0, 1.0, 2.0, 3.0)
"""Of two sizes, terms with a logarithm have these exponents only, or there would be thousands of hypotheses."""
Term = tuple[float, int]
CONSTANT: Term = (0.0, 0)
NEGLIGIBLE = 1e-6
"""Models of less than this share of the best one's weight say nothing."""
CONFIDENCE = 0.90
FEWEST_SIZES = 4
"""A constant and a term leave nothing to test a model on with fewer."""
SATURATED = 0.95


@dataclass(frozen=True)
class Shape:
    """A curve in three numbers; `knee` and `saturation` are sizes, None where the curve has no such place."""

    low: float
    high: float
    knee: float | None
    """Where the curve is farthest above the straight line between its ends, over log size (Satopaa et al., 2011)."""
    saturation: float | None
    """The smallest size from which on it stays within 5 % of its highest value, if not only at its end."""


@dataclass(frozen=True)
class Prediction:
    """A value that was not measured, with its 90 % prediction interval for one further value like those fitted."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Model:
    """All hypotheses that measurements leave standing, and how much each weighs."""

    names: tuple[str, ...]
    """Of the sizes."""
    designs: tuple[tuple[tuple[Term, ...], ...], ...]
    """Of each hypothesis its terms, each one (exponent, log exponent) a size."""
    coefficients: tuple[np.ndarray, ...]
    covariances: tuple[np.ndarray, ...]
    """Of the coefficients."""
    noise: np.ndarray
    """Relative standard deviation of one value, under each hypothesis: of cells from the law, not of repeats alone."""
    freedom: np.ndarray
    weights: np.ndarray

    def predict(self, sizes: Sequence[float]) -> Prediction:
        """At one point: the median of all hypotheses, and where 90 % of further values would fall."""
        rows = [_row(design, np.atleast_2d(np.asarray(sizes, dtype=float)))[0] for design in self.designs]
        centre = np.array([row @ c for row, c in zip(rows, self.coefficients, strict=True)])
        spread = np.array([row @ v @ row for row, v in zip(rows, self.covariances, strict=True)])
        scale = np.sqrt(np.maximum(spread, 0.0) + (self.noise * centre) ** 2)
        tail = (1 - CONFIDENCE) / 2
        low, value, high = (self._quantile(level, centre, scale) for level in (tail, 0.5, 1 - tail))
        return Prediction(value, max(0.0, low), high)

    def formula(self) -> str:
        """The hypothesis that weighs most, in words: "0.012 + 3.4e-08 data^3 log2(data)"."""
        best = int(np.argmax(self.weights))
        parts = zip(self.coefficients[best], self.designs[best], strict=True)
        return " + ".join(
            f"{c:.3g}{''.join(_told(name, t) for name, t in zip(self.names, terms, strict=True))}" for c, terms in parts
        )

    def _quantile(self, level: float, centre: np.ndarray, scale: np.ndarray) -> float:
        """By bisection of the mixture's distribution function."""
        low, high = float((centre - 60 * scale).min()), float((centre + 60 * scale).max())
        for _ in range(80):
            middle = (low + high) / 2
            below = float(self.weights @ stdtr(self.freedom, (middle - centre) / np.maximum(scale, 1e-300)))
            low, high = (middle, high) if below < level else (low, middle)
        return (low + high) / 2


def shape(sizes: Sequence[float], values: Sequence[float]) -> Shape:
    """Range, knee and saturation of a curve, in order of size."""
    order = np.argsort(sizes)
    named, y = np.asarray(sizes, dtype=float)[order], np.asarray(values, dtype=float)[order]
    low, high = float(y.min()), float(y.max())
    if len(y) < 3 or high == low or named[0] <= 0:
        return Shape(low, high, None, None)
    x = np.log(named)
    above = (y - y[0] - (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])) / (high - low)
    knee = float(named[int(np.argmax(above))]) if above.max() > 0.1 else None
    near = y >= SATURATED * high
    first = len(y) - int(np.argmin(near[::-1])) if not near.all() else 0
    return Shape(low, high, knee, float(named[first]) if first < len(y) - 1 else None)


def fit(sizes: np.ndarray, values: np.ndarray, names: Sequence[str]) -> Model | None:
    """A model of positive `values` [n], one a cell, over `sizes` [n, dimensions]; None with too few sizes.

    Least squares of relative errors: times scatter in proportion to themselves. A value is the mean of a cell's
    repeats: repeats share what sets their cell apart from the law, such as a kernel that suits its shape, so counting
    each would make that look like many agreeing measurements. Hypotheses whose terms would have to be negative are
    left out.
    """
    if min(len(np.unique(column)) for column in sizes.T) < FEWEST_SIZES and sizes.shape[1] == 1:
        return None
    varying = [len(np.unique(column)) for column in sizes.T]
    if max(varying) < FEWEST_SIZES or min(varying) < 3:
        return None
    fits = []
    for design in _designs(sizes.shape[1]):
        found = _least_squares(_row(design, sizes), values)
        if found is not None:
            fits.append((design, *found))
    if not fits:
        return None
    score = np.array([found[-1] for found in fits])
    weights = np.exp(-(score - score.min()) / 2)
    kept = weights > NEGLIGIBLE
    chosen = [found for found, keep in zip(fits, kept, strict=True) if keep]
    return Model(
        tuple(names),
        tuple(each[0] for each in chosen),
        tuple(each[1] for each in chosen),
        tuple(each[2] for each in chosen),
        np.array([each[3] for each in chosen]),
        np.array([each[4] for each in chosen]),
        weights[kept] / weights[kept].sum(),
    )


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float, float] | None:
    """Coefficients, their covariance, relative noise, degrees of freedom and BIC; None where a term is negative."""
    relative = x / y[:, None]
    scale = np.abs(relative).max(axis=0)
    normal = relative / scale
    gram = normal.T @ normal
    if np.linalg.cond(gram) > 1e12:
        return None
    inverse = np.linalg.inv(gram)
    scaled = inverse @ normal.sum(axis=0)
    coefficients = scaled / scale
    if (coefficients[1:] <= 0).any() or coefficients[0] < 0:
        return None
    count, terms = x.shape
    freedom = count - terms
    if freedom < 1:
        return None
    rss = max(float(((1 - normal @ scaled) ** 2).sum()), 1e-18)
    noise = float(np.sqrt(rss / freedom))
    covariance = noise**2 * inverse / np.outer(scale, scale)
    bic = count * np.log(rss / count) + terms * np.log(count)
    return coefficients, covariance, noise, float(freedom), float(bic)


def _row(design: tuple[tuple[Term, ...], ...], sizes: np.ndarray) -> np.ndarray:
    """[n, terms]: each term at each point."""
    return np.stack(
        [np.prod([_power(s, t) for s, t in zip(sizes.T, terms, strict=True)], axis=0) for terms in design], 1
    )


def _power(size: np.ndarray, term: Term) -> np.ndarray:
    return np.asarray(size ** term[0] * (np.log2(np.maximum(size, 1.0)) ** term[1] if term[1] else 1.0))


@cache
def _designs(dimensions: int) -> tuple[tuple[tuple[Term, ...], ...], ...]:
    """Hypotheses: a constant; a constant and a product of one term a size; a constant and a sum of them.

    And a constant and one size's term, of which a part grows with the other: work for each voxel, and for each channel.
    """
    terms = [(float(i), j) for i in EXPONENTS for j in LOG_EXPONENTS if (i, j) != CONSTANT]
    nothing = (CONSTANT,) * dimensions
    if dimensions == 1:
        return ((nothing,), *((nothing, (term,)) for term in terms))
    coarse = [term for term in terms if term[1] == 0 or term[0] in WITH_LOG]
    products = [(nothing, pair) for pair in product([CONSTANT, *coarse], repeat=2) if pair != nothing]
    sums = [(nothing, (first, CONSTANT), (CONSTANT, second)) for first, second in product(coarse, repeat=2)]
    pairs = list(product(coarse, repeat=2))
    shared = [(nothing, (first, CONSTANT), (first, second)) for first, second in pairs]
    shared += [(nothing, (CONSTANT, second), (first, second)) for first, second in pairs]
    return ((nothing,), *products, *sums, *shared)


def _told(name: str, term: Term) -> str:
    power = f" {name}^{term[0]:.3g}" if term[0] not in (0, 1) else f" {name}" if term[0] == 1 else ""
    return power + (f" log2({name})" if term[1] else "")
