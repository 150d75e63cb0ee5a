"""Fits of saturating power laws: known exponents, noise, and where two laws break even."""

import numpy as np
import pytest

from trainers.power_laws import EXPONENTS, Fit, PowerLaw, find_break_even, fit_power_law


IMAGES = np.repeat(np.geomspace(1e3, 1e5, 6), 2)


def measure(law: PowerLaw, x: np.ndarray, noise: float, seed: int) -> np.ndarray:
    return law(x) * (1 + noise * np.random.default_rng(seed).standard_normal(len(x)))


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.5])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_known_exponents_are_found_without_noise(exponent, floor):
    known = PowerLaw(floor, (1000**exponent,), (exponent,))
    found = fit_power_law(IMAGES, known(IMAGES), resamples=20)
    assert found.problem is None
    assert found.law.exponents[0] == pytest.approx(exponent, rel=1e-2)
    assert found.law.floor == pytest.approx(floor, abs=2e-3)
    np.testing.assert_allclose(found.law(IMAGES), known(IMAGES), rtol=1e-3)


def test_two_quantities_have_exponents_of_their_own():
    parameters, images = map(np.ravel, np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e3, 1e6, 6)))
    x = np.stack([parameters, images], axis=1)
    known = PowerLaw(0.02, (20.0, 15.0), (0.4, 0.6))
    found = fit_power_law(x, measure(known, x, 0.01, 0), ("parameters", "images"), resamples=50)
    assert found.problem is None
    assert found.law.exponents == pytest.approx(known.exponents, rel=0.1)
    for interval, exponent in zip(found.exponents, known.exponents):
        assert interval.low < exponent < interval.high


def test_a_product_of_units_changes_no_exponent():
    known = PowerLaw(0.03, (30.0,), (0.5,))
    few, many = (fit_power_law(scale * IMAGES, known(IMAGES), resamples=5) for scale in (1e-3, 1e6))
    assert few.law.exponents == pytest.approx(many.law.exponents, rel=1e-3)
    np.testing.assert_allclose(few.law(1e-3 * IMAGES), many.law(1e6 * IMAGES), rtol=1e-6)


@pytest.mark.parametrize(
    ("runs", "noise", "shared"), [(1, 0.03, 0.0), (2, 0.03, 0.0), (2, 0.01, 0.03)], ids=["one", "two", "alike"]
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(runs, noise, shared):
    known, places = PowerLaw(0.0, (30.0,), (0.5,)), np.array([2500.0, 5000.0, 10000.0, 22500.0, 50000.0])
    x, ends, held = np.repeat(places, runs), places[[0, -1]], 0
    for seed in range(40):
        of_place = 1 + shared * np.random.default_rng([seed, 1]).standard_normal(len(places))
        errors = measure(known, x, noise, seed) * np.repeat(of_place, runs)
        low, high = fit_power_law(x, errors, resamples=100, seed=seed).band(ends)
        held += ((low <= known(ends)) & (known(ends) <= high)).sum()
    # Of 80, 95 % are 76.
    assert held >= 68


@pytest.mark.parametrize("of_last", [1, 2])
def test_runs_without_an_error_do_not_bend_a_law(of_last):
    known, places, ratios = PowerLaw(0.0, (0.006 * 1437**0.8,), (0.8,)), np.array([72, 144, 359, 718, 1437.0]), []
    x = np.repeat(places, [1, 1, 1, 1, of_last])
    for seed in range(40):
        mistakes = np.random.default_rng(seed).binomial(360, known(x))  # two at the last place
        fit = fit_power_law(x, np.maximum(mistakes, 0.5) / 360, num_evaluated=360, resamples=2)
        ratios.append(fit.law(places[-1:])[0] / known(places[-1:])[0])
    # Weighed by what was measured instead of what is expected, they are 0.64 and 0.73.
    assert 0.8 < np.median(ratios) < 1.25


def test_noise_tells_nothing():
    noise = [0.3 * (1 + 0.1 * np.random.default_rng(seed).standard_normal(12)) for seed in range(20)]
    problems = [fit_power_law(IMAGES, errors, resamples=20).problem for errors in noise]
    # A test at 5 % takes noise for a law once in twenty times.
    assert sum(problem is not None for problem in problems) >= 17
    assert any("by chance" in problem for problem in problems if problem)


def test_errors_that_rise_are_no_law():
    assert "by chance" in fit_power_law(IMAGES, 0.1 + IMAGES / 1e6, resamples=5).problem


def test_few_places_tell_nothing():
    fit = fit_power_law(np.repeat([1e3, 1e4, 1e5], 4), np.linspace(0.5, 0.1, 12))
    assert fit.law is None and "needs 5 places, not 3" in fit.problem


def test_a_quantity_without_effect_has_no_exponent():
    parameters, images = map(np.ravel, np.meshgrid(np.geomspace(1e5, 1e7, 4), np.geomspace(1e3, 1e6, 6)))
    errors = measure(PowerLaw(0.02, (15.0,), (0.6,)), images, 0.02, 0)
    fit = fit_power_law(np.stack([parameters, images], axis=1), errors, ("parameters", "images"), resamples=100)
    assert fit.problem == "errors need not fall with parameters"


def test_errors_that_fall_otherwise_have_no_law():
    x = np.array([2500, 5000, 10000, 22500, 50000])
    fit = fit_power_law(np.repeat(x, 2), [0.7, 0.71, 0.71, 0.71, 0.69, 0.7, 0.58, 0.59, 0.44, 0.45], resamples=200)
    assert fit.p_value < 0.05 and fit.problem == "errors fall, but no power law is near them"


@pytest.mark.parametrize("x, errors", [([0, 1, 2, 3], [1, 1, 1, 1]), ([1, 2, 3, 4], [1, 0, 1, 1]), ([1], [np.nan])])
def test_what_no_logarithm_takes_is_refused(x, errors):
    with pytest.raises(ValueError, match="above 0"):
        fit_power_law(np.array(x, dtype=float), np.array(errors, dtype=float))


def fit(law: PowerLaw, noise: float = 0.01, seed: int = 0) -> Fit:
    return fit_power_law(IMAGES, measure(law, IMAGES, noise, seed), resamples=100)


STEEP, FLAT = PowerLaw(0.0, (300.0,), (0.7,)), PowerLaw(0.0, (6.0,), (0.3,))  # equal at 50 ** 2.5 = 17,678


def test_a_crossing_is_found_where_it_is():
    found = find_break_even(fit(STEEP), fit(FLAT, seed=1))
    assert (found.verdict, found.ahead) == ("crossing", "first")
    assert found.place.low < 50**2.5 < found.place.high
    assert found.place.high / found.place.low < 3
    assert find_break_even(fit(FLAT, seed=1), fit(STEEP)).ahead == "second"


def test_one_that_is_ahead_everywhere_is_said_so():
    worse = PowerLaw(0.0, (12.0,), (0.3,))
    found = find_break_even(fit(worse), fit(FLAT, seed=1))
    assert (found.verdict, found.place, found.ahead) == ("second", None, "second")


def test_a_crossing_beyond_is_an_extrapolation():
    later = PowerLaw(0.0, (900.0,), (0.7,))  # equal at 150 ** 2.5 = 275,568
    found = find_break_even(fit(later, 0.003), fit(FLAT, 0.003, 1))
    assert (found.verdict, found.ahead) == ("extrapolated", "first")
    assert found.place.low < 150**2.5 < found.place.high


def drawn(law: PowerLaw, draws: list[PowerLaw]) -> Fit:
    return Fit(law, tuple(draws), 0.0, None, (1e3,), (1e5,))


def test_draws_that_cross_before_an_extrapolated_break_even_are_before_it():
    flat = drawn(FLAT, [FLAT] * 100)
    # 6 x^-0.3 = s x^-0.7 at (s / 6)^2.5: beyond 100,000 in 96 draws, and at 90,000 in 4.
    later, earlier = (PowerLaw(0.0, (6 * place**0.4,), (0.7,)) for place in (130e3, 90e3))
    found = find_break_even(drawn(later, [later] * 96 + [earlier] * 4), flat)
    assert (found.verdict, found.ahead, found.limits[0]) == ("extrapolated", "first", 1e5)
    assert found.place == pytest.approx((130e3, 1e5, 130e3), rel=1e-3)


def test_of_two_break_evens_beyond_the_first_is_told():
    steep = PowerLaw(0.08, (6 * 129e3**-0.3 * 129e3**1.5 - 0.08 * 129e3**1.5,), (1.5,))  # equal at 129,000
    found = find_break_even(drawn(steep, [steep] * 20), drawn(FLAT, [FLAT] * 20))
    x = np.array([128e3, 130e3, 1e6, 1e7])
    assert (np.sign(steep(x) - FLAT(x)) == [1, -1, -1, 1]).all()
    assert (found.verdict, found.ahead) == ("extrapolated", "first")
    assert found.place.value == pytest.approx(129e3, rel=1e-3)


def test_the_same_law_twice_cannot_be_told_apart():
    found = [find_break_even(fit(FLAT, 0.02, seed), fit(FLAT, 0.02, seed + 100)) for seed in range(10)]
    assert sum(each.verdict == "unknown" for each in found) >= 8


def test_nothing_follows_from_noise():
    noise = fit_power_law(IMAGES, 0.3 + 0.01 * np.sin(np.arange(12)), resamples=5)
    found = find_break_even(fit(FLAT), noise)
    assert found.verdict == "unknown" and found.reason.startswith("of the second, ")


def test_exponents_stay_within_their_range():
    fit = fit_power_law(IMAGES, np.where(IMAGES < 2e3, 0.9, 0.1), resamples=20)
    assert all(EXPONENTS[0] <= law.exponents[0] <= EXPONENTS[1] * (1 + 1e-9) for law in (fit.law, *fit.draws))
