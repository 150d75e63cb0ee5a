"""The page of a grid of runs: report.md with its figure, rendered from what was measured, and scaling.json."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from model_cards.figures import plot_scaling
from model_cards.pages import describe_settings, show, tabulate, to_json, write_page
from model_cards.rendering import escape_markdown, format_duration


FACTS, REPORT, CURVES = "scaling.json", "report.md", "scaling.png"
FILES = (FACTS, REPORT, CURVES)


def write_study(folder: Path, facts: Mapping) -> None:
    """Writes the facts, the figure and the page into a folder, in place of those of an older call.

    Args:
        folder: Where the runs lie.
        facts: As `trainers.scaling` gathers them: what JSON knows.
    """
    texts = {REPORT: render_study(facts), FACTS: to_json(facts)}
    write_page(folder, texts, {CURVES: draw_curves(facts)}, FILES)


def render_study(facts: Mapping) -> str:
    """The page, in Markdown; its figure lies beside it."""
    names = _name_families(facts)
    parts = [
        f"# {_join([f'`{name}`' for name in names.values()])} on {escape_markdown(facts['dataset'])}",
        _describe(facts),
        *(f"`{name}` is `{family}` here." for family, name in names.items() if name != family),
        show(CURVES, "Error by images, parameters and compute"),
        "## Errors",
        _tabulate_errors(facts),
        "## Who is ahead",
        *_describe_break_evens(facts),
        "## Laws",
        _tabulate_laws(facts),
        "## What these runs can and cannot support",
        _describe_limits(facts),
        "## How it was measured",
        *describe_settings(
            facts["command"], {"Date": facts["date"], "Runs at the same time": str(facts["jobs"]), **facts["origin"]}
        ),
    ]
    return "\n\n".join(parts) + "\n"


def draw_curves(facts: Mapping) -> Figure:
    """Error against images, parameters and compute."""
    families = group(facts["results"], lambda result: result["family"])
    panels = [{"title": title, "lines": []} for title in ("training images", "parameters", "FLOPs of training")]
    for cells in families.values():
        whole = [cell for cell in cells if cell["fraction"] == 1]
        panels[0]["lines"] += _list_lines(facts, "images", "images", cells, by_width=True)
        panels[1]["lines"] += _list_lines(facts, "parameters", "parameters", whole) if whole else []
        panels[2]["lines"] += _list_lines(facts, "compute", "compute", cells)
    return plot_scaling(panels)


def shorten_families(families: Iterable[str]) -> dict[str, str]:
    """The names of families, PRESET[:FIELD=VALUE,...], in short: presets alone where these tell them apart."""
    presets = {family: family.partition(":")[0] for family in families}
    times = Counter(presets.values())
    return {family: preset if times[preset] == 1 else family for family, preset in presets.items()}


def _name_families(facts: Mapping) -> dict[str, str]:
    return shorten_families(dict.fromkeys(result["family"] for result in facts["results"]))


def _list_lines(
    facts: Mapping, kind: str, quantity: str, cells: Sequence[Mapping], by_width: bool = False
) -> list[dict]:
    """What `plot_scaling` draws of a family: a line of each width, the largest first, or one of all."""
    family = cells[0]["family"]
    name = _name_families(facts)[family]
    laws = {law["width"]: law for law in facts["laws"] if (law["kind"], law["family"]) == (kind, family)}
    lines = []
    groups = group(cells, lambda cell: cell["width"] if by_width else None)
    for place, width in enumerate(sorted(groups, reverse=True) if by_width else groups):
        points = sorted(group(groups[width], lambda cell: cell[quantity]).items())
        lines.append(
            {
                "label": name if width is None else f"{name} x {width:g}",
                "group": family,
                "shade": place / max(len(groups) - 1, 1),
                "points": [(value, *_spread(same)) for value, same in points],
                "curve": laws[width].get("curve") if laws[width]["problem"] is None else None,
            }
        )
    return lines


def group(items: Iterable, key: Callable[[object], object]) -> dict[object, list]:
    """Items by a key, in their order."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _spread(results: Sequence[Mapping]) -> tuple[float, float, float]:
    """Mean error of the seeds, the lowest and the highest."""
    errors = [1 - result["accuracy"] for result in results]
    return float(np.mean(errors)), min(errors), max(errors)


def _describe(facts: Mapping) -> str:
    results = facts["results"]
    seeds = len({result["seed"] for result in results})
    images = sorted({result["images"] for result in results})
    perfect = any(result["accuracy"] == 1 for result in results)
    least = f", but {facts['min_steps']:,} steps at least" if facts["min_steps"] else ""
    return (
        f"{len(results)} runs from random weights on {_range(images)} training images, "
        f"{_count(seeds, 'seed')}, for {facts['epochs']:g} epochs{least}: {format_duration(facts['seconds'])} of "
        f"training in all on {facts['origin']['Hardware']}. The error is 1 - accuracy on the "
        f"{facts['num_evaluated']:,} images of the {facts['evaluation_split']} split"
        + ("; where there was none, half an image is taken for one." if perfect else ".")
    )


def _tabulate_errors(facts: Mapping) -> str:
    results, names = facts["results"], _name_families(facts)
    images = sorted({result["images"] for result in results})
    rows = []
    for (family, width), cells in group(results, lambda cell: (cell["family"], cell["width"])).items():
        by_images = group(cells, lambda cell: cell["images"])
        errors = [_format_spread(by_images[count]) if count in by_images else "-" for count in images]
        size = (f"{cells[0]['parameters'] / 1e6:.3g} M", f"{cells[0]['flops'] / 1e9:.3g}")
        rows.append((f"`{names[family]}`", f"{width:g}", *size, *errors))
    titles = ("Model", "Width", "Parameters", "GFLOPs an image", *(f"{count:,} images" for count in images))
    return f"{tabulate(titles, rows)}\n\nMeans of the seeds, with the lowest and the highest."


def _format_spread(cells: Sequence[Mapping]) -> str:
    error, low, high = _spread(cells)
    return f"{error:.2%}" if len(cells) == 1 else f"{error:.2%} ({low:.2%} to {high:.2%})"


def _describe_break_evens(facts: Mapping) -> list[str]:
    if not facts["break_evens"]:
        return ["One family has nobody to be compared with."]
    about = (
        f"Each pair at the largest sizes whose forward passes cost within a factor of {facts['similar_cost']:g}, or "
        "most nearly the same, and whose laws of the training images are known, where any are. By these laws"
        + (", of which more also meant more steps," if _has_longer_runs(facts) else "")
        + f" a verdict is that of {facts['coverage']:.0%} of the draws of a bootstrap. Where there is none, what is "
        "told is who is ahead in all pairs of runs of the same images and seed, if one is."
    )
    return [about, "\n".join(f"- {verdict}" for verdict in list_verdicts(facts))]


def list_verdicts(facts: Mapping) -> list[str]:
    """Who is ahead, and from how many images on: a line of each two families."""
    lines, pairs = [], facts["break_evens"]
    short = shorten_families({pair[side]["family"] for pair in pairs for side in ("first", "second")})
    for pair in pairs:
        names = {side: f"`{short[pair[side]['family']]}` x {pair[side]['width']:g}" for side in ("first", "second")}
        other = {"first": "second", "second": "first"}
        cost = " and ".join(f"{pair[side]['flops'] / 1e9:.3g}" for side in names)
        text = f"{names['first']} and {names['second']} ({cost} GFLOPs an image): "
        if pair["verdict"] == "crossing":
            ahead = pair["ahead"]
            text += (
                f"**break-even at {_format_place(pair)} images**; {names[other[ahead]]} is ahead below, "
                f"{names[ahead]} above."
            )
        elif pair["verdict"] in names:
            text += f"**{names[pair['verdict']]} is ahead** wherever they were measured."
        elif pair["verdict"] == "extrapolated":
            text += (
                f"{names[other[pair['ahead']]]} is ahead wherever they were measured. If their laws held beyond, they "
                f"would break even at {_format_place(pair)} images."
            )
        elif pair["lead"] is not None:
            lead = pair["lead"]
            text += (
                f"**{names[lead['ahead']]} is ahead** in all {lead['pairs']} pairs of runs of the same images and "
                f"seed, by {100 * lead['low']:.1f} to {100 * lead['high']:.1f} points; where they would break even "
                f"cannot be told: {pair['reason']}."
            )
        else:
            text += f"cannot tell: {pair['reason']}."
        lines.append(text)
    return lines


def _has_longer_runs(facts: Mapping) -> bool:
    """Whether a size was trained longer on some shares of the images than on others."""
    sizes = group(facts["results"], lambda cell: (cell["family"], cell["width"])).values()
    return any(len({cell["sights"] for cell in cells}) > 1 for cells in sizes)


def _format_place(pair: Mapping) -> str:
    """Of a crossing."""
    value, low, high = _open_ends(pair["place"], pair["limits"], lambda images: f"{float(f'{images:.2g}'):,.0f}")
    return f"{value} ({low} to {high})"


def _open_ends(interval: Mapping, limits: Sequence[float], show: Callable[[float], str]) -> tuple[str, str, str]:
    """Value, low and high end; an end at the limits of what was looked among is open."""
    value, low, high = (show(interval[name]) for name in ("value", "low", "high"))
    is_below, is_above = _is_open(interval, limits)
    return value, f"below {low}" if is_below else low, f"above {high}" if is_above else high


def _is_open(interval: Mapping, limits: Sequence[float]) -> tuple[bool, bool]:
    """Whether its low and its high end are those of what was looked among."""
    return interval["low"] <= 1.01 * limits[0], interval["high"] >= 0.99 * limits[1]


def _tabulate_laws(facts: Mapping) -> str:
    rows, names = [], _name_families(facts)
    for law in facts["laws"]:
        model = f"`{names[law['family']]}`" + ("" if law["width"] is None else f" x {law['width']:g}")
        row = [model, law["kind"], str(law["points"])]
        if law["problem"] is not None:
            rows.append((*row, "-", "-", f"cannot tell: {law['problem']}"))
            continue
        limits = facts["exponent_limits"]
        exponents = " and ".join(_format_exponent(each, limits) for each in law["exponents"])
        remark = "may have no floor" if law["floor"]["low"] < 1e-3 else "levels off"
        if any(all(_is_open(each, limits)) for each in law["exponents"]):
            remark = "any exponent fits"
        rows.append((*row, exponents, _format_interval(law["floor"], "{:.1%}"), remark))
    titles = ("Model", "By", "Runs", "Exponent", "Floor", "")
    return (
        "error = floor + scale x quantity^-exponent, and for two quantities the sum of both terms over one floor "
        "([Hoffmann et al.](https://arxiv.org/abs/2203.15556), equation 2). By parameters: on all training images. By "
        f"compute: the runs that nothing cheaper reaches. Brackets hold {facts['coverage']:.0%} of the draws of a "
        f"bootstrap over the residuals.\n\n{tabulate(titles, rows)}"
    )


def _format_exponent(interval: Mapping, limits: Sequence[float]) -> str:
    value, low, high = _open_ends(interval, limits, "{:.2f}".format)
    return f"{value} [{low}, {high}]"


def _format_interval(interval: Mapping, form: str) -> str:
    value, low, high = (form.format(interval[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _describe_limits(facts: Mapping) -> str:
    results = facts["results"]
    seeds = len({result["seed"] for result in results})
    passes = [f"{bound(each['sights'] / each['images'] for each in results):.3g}" for bound in (min, max)]
    passes = f"{passes[0]} passes" if passes[0] == passes[1] else f"{passes[0]} to {passes[1]} passes"
    parameters = [result["parameters"] for result in results]
    judged = "all were judged on the same images"
    if facts["held_out"] and seeds > 1:
        judged = "those of one seed were judged on the same held-out images, those of another on others"
    lines = [
        f"They are laws of runs as short as these ({passes} over their images), "
        "not of models that were trained to their end: longer training would move every curve, and those of larger "
        "models more.",
        f"They hold for {min(parameters) / 1e6:.2g} to {max(parameters) / 1e6:.2g} M parameters and up to "
        f"{max(result['images'] for result in results):,} images. Beyond that a curve is a guess.",
        f"{_count(seeds, 'seed')} at most for each point: the scatter that intervals are made of is itself known "
        f"badly, and {judged}.",
        "All families were trained by the same recipe; another one may favour another family.",
        "The runs that nothing cheaper reaches are chosen by the errors that are then fitted: a law by compute looks "
        "somewhat better than it is. Whether errors fall with compute at all is tested on all runs.",
    ]
    prolonged = [each["images"] for each in results if each["sights"] > 1.01 * facts["epochs"] * each["images"]]
    if 0 < len(prolonged) < len(results):
        lines.append(
            f"Up to {max(prolonged):,} images all runs have {facts['min_steps']:,} steps, and differ by the images "
            "alone; above, more images are more steps as well."
        )
    missing = {
        "left out by the budget": facts["grid"] - len(results) - facts["unfinished"],
        "not finished": facts["unfinished"],
    }
    for reason, number in missing.items():
        if number:
            is_or_are = "is" if number == 1 else "are"
            lines.append(f"Of the grid's {facts['grid']} runs {number:,} {is_or_are} missing: {reason}.")
    return "\n".join(f"- {line}" for line in lines)


def _range(numbers: Sequence[int]) -> str:
    low, high = numbers[0], numbers[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
