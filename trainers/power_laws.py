"""Saturating power laws: how an error falls with data, parameters and compute, and where two families break even.

error = floor + sum of scale_k * x_k ** -exponent_k, for one quantity x (Zhai et al., https://arxiv.org/abs/2106.04560,
section 3.1) or two, parameters and data (Hoffmann et al., https://arxiv.org/abs/2203.15556, equation 2). Intervals are
percentiles of a bootstrap over the residuals of places, means of the runs there, which share what the law does not fit.
They say how a fit to other runs would differ, not another form of law, nor what lies beyond the measured range.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainers.bootstrap import COVERAGE, Interval, middle


EXPONENTS = (0.01, 3.0)  # what a fit looks among
COARSE, FINE = {1: 40, 2: 12}, 7  # places on each axis of exponents, by the number of quantities, and in each zoom
PRECISION = 1e-3  # of an exponent's logarithm
MIN_FREEDOM = 2  # places more than a law has numbers
SIGNIFICANCE = 0.05
PERMUTATIONS = 1000
WEIGHTINGS = 4  # by the errors, and then by what the law before expects
AT_ONCE = 2**22  # numbers in memory
PLACES = 200  # where two laws are compared
FURTHEST = 100.0  # times the measured range that an extrapolated break-even may lie beyond it


@dataclass(frozen=True)
class PowerLaw:
    """floor + sum of scales[k] * x[k] ** -exponents[k]."""

    floor: float
    scales: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N,) of one quantity, or (N, K) -> (N,)."""
        x = np.asarray(x, dtype=np.float64).reshape(-1, len(self.scales))
        return self.floor + (x ** -np.array(self.exponents)) @ np.array(self.scales)


@dataclass(frozen=True)
class Fit:
    """A power law of measured points with what is known of it.

    Attributes:
        law: The best one; None where there are too few points.
        draws: Those of bootstrap draws.
        p_value: How often errors in a random order are described as well: a test that they fall at all.
        problem: Why nothing can be told; None where something can.
        low: Least of each measured quantity.
        high: Greatest of each.
    """

    law: PowerLaw | None
    draws: tuple[PowerLaw, ...]
    p_value: float | None
    problem: str | None
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def floor(self) -> Interval:
        return _to_interval([law.floor for law in (self.law, *self.draws)])

    @property
    def exponents(self) -> list[Interval]:
        return [_to_interval(each) for each in zip(*(law.exponents for law in (self.law, *self.draws)))]

    def band(self, x: np.ndarray) -> np.ndarray:
        """(N,) or (N, K) -> (2, N): between them lie the middle 95 % of the draws."""
        return middle(np.stack([law(x) for law in self.draws]))


def _to_interval(values: Sequence[float]) -> Interval:
    """Of the measured value, which comes first, and those of the draws."""
    low, high = middle(np.array(values[1:]))
    return Interval(float(values[0]), float(low), float(high))


def fit_power_law(
    x: np.ndarray,
    errors: np.ndarray,
    names: Sequence[str] = ("x",),
    num_evaluated: float = math.inf,
    resamples: int = 1000,
    seed: int = 0,
    chosen_from: tuple[np.ndarray, np.ndarray] | None = None,
) -> Fit:
    """The law that is nearest to measured errors, each in relation to what is expected there.

    Args:
        x: What was varied, all above 0: (N,) of one quantity, or (N, K) of K. Several errors at one place are welcome.
        errors: (N,), all above 0.
        names: Of the quantities.
        num_evaluated: Images that each error is a share of: of few errors fewer are known.
        resamples: Bootstrap draws.
        seed: Of these.
        chosen_from: Quantities and errors of all points, if these were chosen by their errors: whether errors fall at
            all is tested on them.

    Raises:
        ValueError: if the points make no sense.
    """
    x, errors = np.asarray(x, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    x = x.reshape(len(errors), -1)
    if not (np.isfinite(x).all() and (x > 0).all() and np.isfinite(errors).all() and (errors > 0).all()):
        raise ValueError("a power law needs quantities and errors above 0")
    low, high = tuple(x.min(axis=0).tolist()), tuple(x.max(axis=0).tolist())
    num_numbers = 1 + 2 * x.shape[1]
    places, place, runs = np.unique(x, axis=0, return_inverse=True, return_counts=True)
    num_places = len(places)
    if num_places < num_numbers + MIN_FREEDOM or any(len(np.unique(column)) < 3 for column in x.T):
        along = ", three along each quantity at least" if x.shape[1] > 1 else ""
        problem = f"a law of {num_numbers} numbers needs {num_numbers + MIN_FREEDOM} places{along}, not {num_places}"
        return Fit(None, (), None, problem, low, high)
    # In units of the middle of what was measured, where a scale is an error.
    middles = np.exp(np.log(places).mean(axis=0))
    units, freedom = places / middles, num_places - num_numbers
    means = np.bincount(place.reshape(-1), errors) / runs
    spreads = means
    for _ in range(WEIGHTINGS):
        [scaled] = _search(units, means[None], spreads)
        expected = np.maximum(scaled(units), means.min() * 1e-3)
        # What the law took into itself of the misfit is given back.
        residuals = (means / expected - 1) * np.sqrt(num_places / freedom)
        spreads = expected * _relative_spread(expected, residuals, num_evaluated * runs)
    generator = np.random.default_rng(seed)
    drawn = generator.choice(residuals * expected / spreads, (resamples, num_places))
    # Of few residuals their size is hardly known: as in Student's t, each draw has one of its own.
    drawn *= np.sqrt(freedom / generator.chisquare(freedom, (resamples, 1)))
    laws = [_rescale(law, middles) for law in (scaled, *_search(units, expected + spreads * drawn, spreads))]
    x, errors = (x, errors) if chosen_from is None else map(np.asarray, chosen_from)
    p_value = _test_order(x.reshape(len(errors), -1) / middles, errors, generator)
    fit = Fit(laws[0], tuple(laws[1:]), p_value, None, low, high)
    return replace(fit, problem=_find_problem(fit, names))


def _relative_spread(expected: np.ndarray, residuals: np.ndarray, num_evaluated: np.ndarray) -> np.ndarray:
    """Standard deviation (N,) of an error in relation to the expected one, 1 where nothing is known: that of a share of
    so many images, and what is left of the residuals (N,), which is the same everywhere."""
    of_images = (1 - np.minimum(expected, 1)) / (expected * num_evaluated)
    rest = max(float(np.mean(residuals**2 - of_images)), 0.0)
    spread = np.sqrt(of_images + rest)
    return spread if spread.min() > 0 else np.ones_like(expected)


def _find_problem(fit: Fit, names: Sequence[str]) -> str | None:
    if fit.p_value > SIGNIFICANCE:
        return f"errors do not fall more than by chance (p = {fit.p_value:.2f})"
    for name, scales in zip(names, zip(*(law.scales for law in fit.draws))):
        if np.mean(np.array(scales) <= 0) > (1 - COVERAGE) / 2:
            if len(names) == 1:  # with which they fall, as was tested
                return "errors fall, but no power law is near them"
            return f"errors need not fall with {name}"
    return None


def _search(x: np.ndarray, errors: np.ndarray, spreads: np.ndarray) -> list[PowerLaw]:
    """The nearest law of each row of errors (R, N), in relation to their spreads (N,): floor and scales are solved for,
    exponents are searched."""
    num_quantities, limits = x.shape[1], np.log(EXPONENTS)
    rows = max(1, AT_ONCE // (COARSE[num_quantities] ** num_quantities * x.size))
    if len(errors) > rows:
        parts = (errors[start : start + rows] for start in range(0, len(errors), rows))
        return [law for part in parts for law in _search(x, part, spreads)]
    axis = np.linspace(*limits, COARSE[num_quantities])
    step, places = axis[1] - axis[0], _spread(axis, num_quantities)[None]  # (1, G, K)
    while True:
        coefficients, distances = _solve(x, errors[:, None], spreads, np.exp(places))
        best = distances.argmin(axis=1)
        row = np.arange(len(errors))
        centres = places[row if len(places) > 1 else 0, best]  # (R, K)
        if step < PRECISION:
            break
        around = _spread(np.linspace(-step, step, FINE), num_quantities)
        places, step = np.clip(centres[:, None] + around, *limits), 2 * step / (FINE - 1)
    exponents, coefficients = np.exp(centres), coefficients[row, best]
    return [
        PowerLaw(float(floor), tuple(map(float, scales)), tuple(map(float, each)))
        for (floor, *scales), each in zip(coefficients, exponents)
    ]


def _spread(axis: np.ndarray, num_quantities: int) -> np.ndarray:
    """Places on all axes: (G,) -> (G ** K, K)."""
    return np.array(list(itertools.product(axis, repeat=num_quantities)))


def _solve(
    x: np.ndarray, errors: np.ndarray, spreads: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Floor and scales (..., 1 + K), none below 0, and the squared distance that is left (...), for errors and their
    spreads (..., N), at places (N, K), and exponents (..., K).

    Of so few numbers every choice of those that are 0 can be tried: the best without a negative one is the solution.
    """
    powers = np.exp(-exponents[..., None, :] * np.log(x))  # (..., N, K)
    columns = np.concatenate([np.ones((*powers.shape[:-1], 1)), powers], axis=-1) / spreads[..., None]
    targets = errors / spreads
    products = columns.swapaxes(-1, -2) @ columns
    sums = (columns * targets[..., None]).sum(axis=-2)
    best = np.zeros(sums.shape)
    of_zeros = (targets**2).sum(axis=-1)
    distance = np.broadcast_to(of_zeros, sums.shape[:-1])
    for size in range(1, sums.shape[-1] + 1):
        for chosen in itertools.combinations(range(sums.shape[-1]), size):
            chosen = list(chosen)
            some = products[..., chosen, :][..., chosen]
            # Exponents near 0 make a column like that of the floor.
            some = some + 1e-12 * np.eye(size) * np.trace(some, axis1=-2, axis2=-1)[..., None, None]
            found = np.linalg.solve(some, sums[..., chosen][..., None])[..., 0]
            left = np.maximum(of_zeros - (found * sums[..., chosen]).sum(axis=-1), 0)
            is_better = (found >= 0).all(axis=-1) & (left < distance)
            distance = np.where(is_better, left, distance)
            full = np.zeros(sums.shape)
            full[..., chosen] = found
            best = np.where(is_better[..., None], full, best)
    return best, distance


def _rescale(law: PowerLaw, units: np.ndarray) -> PowerLaw:
    """A law of quantities in some units as one of the quantities."""
    scales = (scale * unit**exponent for scale, unit, exponent in zip(law.scales, units, law.exponents))
    return PowerLaw(law.floor, tuple(map(float, scales)), law.exponents)


def _test_order(x: np.ndarray, errors: np.ndarray, generator: np.random.Generator) -> float:
    """How often errors in a random order are as near to a law of their own."""
    places = np.exp(_spread(np.linspace(*np.log(EXPONENTS), COARSE[2]), x.shape[1]))
    orders = np.stack([errors, *(generator.permutation(errors) for _ in range(PERMUTATIONS))])
    rows = max(1, AT_ONCE // (len(places) * x.size))
    parts = (orders[start : start + rows] for start in range(0, len(orders), rows))
    distances = np.concatenate([_solve(x, part[:, None], part[:, None], places[None])[1].min(axis=1) for part in parts])
    return float(np.mean(distances <= distances[0] * (1 + 1e-9)))


@dataclass(frozen=True)
class BreakEven:
    """Where one family's error falls below another's.

    Attributes:
        verdict: "crossing", "first" or "second" (which is ahead everywhere), "extrapolated" (that one is ahead
            everywhere, but their laws cross beyond) or "unknown".
        place: The crossing; None where there is none.
        limits: Between which the crossing was looked for: an end of its interval that lies on one is open.
        ahead: Which is ahead above it: "first" or "second"; of one that is ahead everywhere, that one.
        reason: Why nothing is known.
    """

    verdict: str
    place: Interval | None = None
    limits: tuple[float, float] | None = None
    ahead: str | None = None
    reason: str | None = None


def find_break_even(first: Fit, second: Fit, names: tuple[str, str] = ("the first", "the second")) -> BreakEven:
    """Compares two laws of the same single quantity over the range that both were measured in.

    A verdict is that of 95 % of the pairs of bootstrap draws, or it is unknown.
    """
    for name, fit in zip(names, (first, second)):
        if fit.problem is not None:
            return BreakEven("unknown", reason=f"of {name}, {fit.problem}")
    low, high = max(first.low[0], second.low[0]), min(first.high[0], second.high[0])
    if low >= high:
        return BreakEven("unknown", reason="they were not measured over a common range")
    pairs = list(zip((first.law, *first.draws), (second.law, *second.draws)))
    x = np.geomspace(low, high, PLACES)
    # Above 0 the second is ahead.
    gaps = np.stack([one(x) - other(x) for one, other in pairs])
    begins, ends = gaps[:, 0] > 0, gaps[:, -1] > 0
    for is_ahead, name in ((ends, "second"), (~ends, "first")):
        crosses = is_ahead & (begins != ends)
        if crosses[0] and crosses[1:].mean() >= COVERAGE:
            # One that does not cross breaks even below or above.
            edges = np.where(is_ahead, low, high)
            places = [_find_crossings(x, gap)[-1] if each else edge for gap, each, edge in zip(gaps, crosses, edges)]
            return BreakEven("crossing", _to_interval(places), (low, high), name)
    for is_ahead, name, other in (
        ((gaps > 0).all(axis=1), "second", "first"),
        ((gaps < 0).all(axis=1), "first", "second"),
    ):
        if not is_ahead[0] or is_ahead[1:].mean() < COVERAGE:
            continue
        beyond = np.geomspace(high, high * FURTHEST, PLACES)
        # The first one: there may be another, from which on this one is ahead again.
        further = [_find_crossings(beyond, one(beyond) - two(beyond))[:1] for one, two in pairs]
        is_before = np.sign(gaps[:, -1]) != np.sign(gaps[0, -1])  # of a draw that breaks even below already
        crosses = is_before | np.array([len(each) > 0 for each in further])
        if crosses[0] and crosses[1:].mean() >= COVERAGE:
            places = [high if before else (*each, beyond[-1])[0] for before, each in zip(is_before, further)]
            return BreakEven("extrapolated", _to_interval(places), (high, float(beyond[-1])), other)
        return BreakEven(name, ahead=name)
    return BreakEven("unknown", reason="draws of their laws disagree on who is ahead where")


def _find_crossings(x: np.ndarray, gap: np.ndarray) -> list[float]:
    """Where a gap changes its sign, between two places by the logarithm of x."""
    before = np.flatnonzero(np.diff(np.sign(gap)) != 0)
    share = gap[before] / (gap[before] - gap[before + 1])
    return np.exp(np.log(x[before]) + share * np.log(x[before + 1] / x[before])).tolist()
