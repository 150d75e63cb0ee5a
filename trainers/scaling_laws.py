"""What a grid of runs says: laws of data, parameters and compute for each family, and where two of them break even."""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from model_cards.scaling import group, shorten_families
from trainers.bootstrap import COVERAGE
from trainers.power_laws import EXPONENTS, SIGNIFICANCE, Fit, find_break_even, fit_power_law


CURVE_PLACES = 60
SIMILAR = 2.0  # factor between costs


@dataclass(frozen=True)
class Result:
    """What a cell of the grid gave.

    Attributes:
        family: What the model is a size of.
        width: Its share of the family's usual width.
        fraction: Share of the training images.
        seed: Of everything that was drawn.
        images: Training images.
        sights: How often an image was seen in training.
        parameters: Of the model.
        flops: Additions and multiplications of an image's forward pass.
        compute: The same of the whole training.
        seconds: Of training.
        accuracy: On the images that nothing was chosen on.
        loss: The same.
    """

    family: str
    width: float
    fraction: float
    seed: int
    images: int
    sights: int
    parameters: int
    flops: int
    compute: float
    seconds: float
    accuracy: float
    loss: float


def analyse(results: Sequence[Result], num_evaluated: int, resamples: int = 1000) -> dict:
    """Facts for the page: laws and break-even points, all of the error, 1 - accuracy.

    Args:
        results: Finished cells.
        num_evaluated: Images that accuracies were measured on: half of one counts as an error where there was none.
        resamples: Bootstrap draws.
    """

    count = itertools.count()

    def fit(
        cells: Sequence[Result],
        chosen_from: Sequence[Result] | None = None,
        **quantities: Callable[[Result], float],
    ) -> Fit:
        def list_points(cells: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
            x = np.array([[quantity(cell) for quantity in quantities.values()] for cell in cells])
            return x, np.array([max(1 - cell.accuracy, 0.5 / num_evaluated) for cell in cells])

        of_all = None if chosen_from is None else list_points(chosen_from)
        # Draws of two laws are independent of each other.
        return fit_power_law(
            *list_points(cells), list(quantities), num_evaluated, resamples, seed=next(count), chosen_from=of_all
        )

    laws, of_data = [], {}
    families = group(results, lambda cell: cell.family)
    for family, cells in families.items():
        for width, same in group(cells, lambda cell: cell.width).items():
            of_data[family, width] = law = fit(same, images=lambda cell: cell.images)
            laws.append(_describe(law, "images", family, same, width))
        whole = [cell for cell in cells if cell.fraction == 1]
        if whole:
            laws.append(_describe(fit(whole, parameters=lambda cell: cell.parameters), "parameters", family, whole))
        frontier = find_frontier(cells)
        of_compute = fit(frontier, chosen_from=cells, compute=lambda cell: cell.compute)
        laws.append(_describe(of_compute, "compute", family, frontier))
        joint = fit(cells, parameters=lambda cell: cell.parameters, images=lambda cell: cell.images)
        laws.append(_describe(joint, "parameters and images", family, cells))
    known = {key for key, law in of_data.items() if law.problem is None}
    break_evens, short = [], shorten_families(families)
    for names in itertools.combinations(families, 2):
        first, second = match_sizes(results, *names, known)
        found = find_break_even(
            of_data[first.family, first.width],
            of_data[second.family, second.width],
            (f"`{short[first.family]}`", f"`{short[second.family]}`"),
        )
        break_evens.append(
            {
                "first": {"family": first.family, "width": first.width, "flops": first.flops},
                "second": {"family": second.family, "width": second.width, "flops": second.flops},
                **asdict(found),
                "place": found.place and found.place._asdict(),
                "lead": find_lead(results, first, second),
            }
        )
    return {
        "coverage": COVERAGE,
        "exponent_limits": EXPONENTS,
        "similar_cost": SIMILAR,
        "laws": laws,
        "break_evens": break_evens,
    }


def find_frontier(cells: Sequence[Result]) -> list[Result]:
    """The cells, with all of their seeds, whose mean error nothing of less compute reaches."""
    groups = group(cells, lambda cell: (cell.width, cell.fraction)).values()
    places = [(same[0].compute, np.mean([1 - cell.accuracy for cell in same]), same) for same in groups]
    best, kept = np.inf, []
    for _, error, same in sorted(places, key=lambda place: place[:2]):
        if error < best:
            best, kept = error, [*kept, *same]
    return kept


def match_sizes(
    results: Sequence[Result], first: str, second: str, known: Collection[tuple[str, float]]
) -> tuple[Result, Result]:
    """A cell of the size of each family: the largest whose forward passes cost within a factor of `SIMILAR`.

    Or those that cost most nearly the same; where there are any, of those (family, width) whose laws are known.
    """
    sizes = []
    for family in (first, second):
        each = [cells[0] for cells in group(results, lambda cell: (cell.family, cell.width)).values()]
        each = [cell for cell in each if cell.family == family]
        sizes.append([cell for cell in each if (family, cell.width) in known] or each)
    return min(
        itertools.product(*sizes),
        key=lambda pair: (
            max(abs(math.log(pair[0].flops / pair[1].flops)), math.log(SIMILAR)),
            -pair[0].flops * pair[1].flops,
        ),
    )


def find_lead(results: Sequence[Result], first: Result, second: Result) -> dict | None:
    """Which of two sizes is better in every pair of runs of the same images and seed, whatever the form of their laws.

    None unless so many pairs agree that it is no chance, by a sign test.
    """
    accuracies = [
        {
            (cell.fraction, cell.seed): cell.accuracy
            for cell in results
            if (cell.family, cell.width) == (size.family, size.width)
        }
        for size in (first, second)
    ]
    common = accuracies[0].keys() & accuracies[1].keys()
    gaps = np.array([accuracies[0][key] - accuracies[1][key] for key in common])
    if not len(gaps) or 2 * 0.5 ** len(gaps) > SIGNIFICANCE or len(set(np.sign(gaps))) > 1 or not gaps.all():
        return None
    low, high = np.sort(np.abs([gaps.min(), gaps.max()])).tolist()
    return {"ahead": "first" if gaps[0] > 0 else "second", "pairs": len(gaps), "low": low, "high": high}


def _describe(law: Fit, kind: str, family: str, cells: Sequence[Result], width: float | None = None) -> dict:
    facts = {"kind": kind, "family": family, "width": width, "points": len(cells), "p_value": law.p_value}
    facts["seeds"] = len({cell.seed for cell in cells})
    if law.law is None:
        return facts | {"problem": law.problem}
    facts |= {
        "problem": law.problem,
        "floor": law.floor._asdict(),
        "exponents": [each._asdict() for each in law.exponents],
        "low": law.low,
        "high": law.high,
    }
    if len(law.low) == 1:
        x = np.geomspace(law.low[0], law.high[0], CURVE_PLACES)
        low, high = law.band(x)
        curve = {"x": x, "error": law.law(x), "low": low, "high": high}
        facts["curve"] = {name: values.tolist() for name, values in curve.items()}
    return facts
