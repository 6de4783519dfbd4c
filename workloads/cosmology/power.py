"""Which universe it is, and what linear theory says about it: parameters, power spectrum, growth.

Drawing a universe and its training targets needs numpy only, so a dataset is read on machines without colossus.
"""

import hashlib
import importlib
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

RANGES = {"omega_m": (0.1, 0.5), "sigma_8": (0.6, 1.0), "n_s": (0.8, 1.2), "h": (0.6, 0.8)}
"""Lower and upper end of each parameter's uniform prior. The ranges are this project's own choice."""

OMEGA_B = 0.049
"""Baryon density of every universe, near the Planck 2018 value; it is not a target."""

_SIGMA_8_RADIUS_MPC_H = 8.0
_NORMALISATION_K_H_MPC = np.geomspace(1e-5, 30.0, 2048)


@dataclass(frozen=True)
class Cosmology:
    """A flat Lambda-CDM universe.

    Attributes:
        omega_m: matter density at z = 0 over the critical density.
        sigma_8: standard deviation of the linear density at z = 0 in spheres of 8 Mpc/h.
        n_s: tilt of the primordial power spectrum.
        h: Hubble constant over 100 km/s/Mpc.
    """

    omega_m: float
    sigma_8: float
    n_s: float
    h: float


def draw(seed: int, index: int) -> Cosmology:
    """Universe number `index` of the family `seed`, uniform in `RANGES`.

    A hash of the two numbers, so it depends neither on the order of drawing nor on a library's random streams.
    """
    digest = hashlib.sha256(f"cosmology {seed} {index}".encode()).digest()
    words = np.frombuffer(digest, dtype="<u8")
    fractions = [int(word) / 2**64 for word in words]
    return Cosmology(*(low + (high - low) * part for (low, high), part in zip(RANGES.values(), fractions, strict=True)))


def targets(cosmology: Cosmology) -> NDArray[np.float32]:
    """The four parameters in the order of `RANGES`, each scaled from its range to [-1, 1]; shape [4]."""
    low, high = np.array(list(RANGES.values())).T
    scaled = 2 * (np.array(astuple(cosmology)) - low) / (high - low) - 1
    return np.asarray(scaled, dtype=np.float32)


def linear_power(cosmology: Cosmology, k_h_mpc: FloatArray) -> FloatArray:
    """Linear matter power spectrum at z = 0 in (Mpc/h)^3, same shape as `k_h_mpc` (> 0, in h/Mpc).

    Shape from Eisenstein & Hu 1998 (ApJ 496, 605) as colossus implements it; the amplitude gives exactly the asked
    sigma_8 on that same shape, so the targets hold even though the fit is off a Boltzmann code by up to 4 %.

    Raises:
        ImportError: colossus is not installed.
    """
    amplitude = (cosmology.sigma_8 / _sigma_8(_shape(cosmology, _NORMALISATION_K_H_MPC))) ** 2
    return amplitude * _shape(cosmology, k_h_mpc)


def growth(cosmology: Cosmology, redshifts: FloatArray) -> tuple[FloatArray, FloatArray]:
    """First- and second-order growth (D1, D2) at each redshift; D1 is 1 at z = 0, D2 is negative.

    D2 = -3/7 D1^2 Omega_m(z)^(-1/143) is the flat-universe fit of Bouchet et al. 1995 (A&A 296, 575).

    Raises:
        ImportError: colossus is not installed.
    """
    background = _background(cosmology)
    first = background.growthFactor(np.asarray(redshifts, dtype=float))
    second = -3 / 7 * first**2 * background.Om(np.asarray(redshifts, dtype=float)) ** (-1 / 143)
    return first, second


def momentum(cosmology: Cosmology, redshifts: FloatArray) -> tuple[FloatArray, FloatArray]:
    """a^3 E dD/da of first and second order at each redshift, E the expansion rate over today's.

    By the closed forms of `growth`: dlnD1/dlna = -3/2 Omega_m(a) + 5/2 Omega_m(a) a / D, D being a early on (Heath
    1977, MNRAS 179, 351), and dlnD2/dlna is twice that, plus 3/143 (1 - Omega_m(a)).

    Raises:
        ImportError: colossus is not installed.
    """
    redshifts = np.asarray(redshifts, dtype=float)
    background, a = _background(cosmology), 1 / (1 + redshifts)
    matter = background.Om(redshifts)
    first_slope = matter * (2.5 * a / background.growthFactorUnnormalized(redshifts) - 1.5)
    slopes = first_slope, 2 * first_slope + 3 / 143 * (1 - matter)
    first, second = (
        a**2 * background.Ez(redshifts) * grown * slope
        for grown, slope in zip(growth(cosmology, redshifts), slopes, strict=True)
    )
    return first, second


def _shape(cosmology: Cosmology, k_h_mpc: FloatArray) -> FloatArray:
    """Power spectrum with an arbitrary amplitude."""
    spectrum: FloatArray = _colossus("power_spectrum").powerSpectrum(k_h_mpc, "eisenstein98", _background(cosmology))
    return spectrum


def _sigma_8(power: FloatArray) -> float:
    """Standard deviation in spheres of 8 Mpc/h of a field with this power on `_NORMALISATION_K_H_MPC`."""
    k = _NORMALISATION_K_H_MPC
    x = k * _SIGMA_8_RADIUS_MPC_H
    window = 3 * (np.sin(x) - x * np.cos(x)) / x**3
    variance_per_log_k = k**3 * power * window**2 / (2 * np.pi**2)
    return float(np.sqrt(np.sum(variance_per_log_k) * np.log(k[1] / k[0])))


def _background(cosmology: Cosmology) -> Any:
    """The colossus cosmology: not made its global one, no files, no interpolation tables."""
    return _colossus("cosmology").Cosmology(
        name="saih",
        flat=True,
        Om0=cosmology.omega_m,
        Ob0=OMEGA_B,
        H0=100 * cosmology.h,
        sigma8=cosmology.sigma_8,
        ns=cosmology.n_s,
        relspecies=False,
        interpolation=False,
        persistence="",
    )


def _colossus(module: str) -> Any:
    """A module of colossus, imported at the first use because only generation needs it."""
    try:
        return importlib.import_module(f"colossus.cosmology.{module}")
    except ImportError as error:
        raise ImportError("generating universes needs colossus: pip install colossus") from error
