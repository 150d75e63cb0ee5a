"""Measure an image classifier of any kind on labelled images, with confidence intervals.

Writes a page (report.md) with its figures, and all numbers (evaluation.json): accuracy, top-5 and balanced accuracy,
macro F1, calibration, loss, recall and confusions by class, the surest mistakes; where asked for, at other image sizes,
with mirror images, and under the corruptions of ImageNet-C.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model_cards.environment import code_commit, describe_hardware, library_versions
from model_cards.evaluation import CORRUPTIONS as CORRUPTIONS_FIGURE
from model_cards.evaluation import FACTS, FILES, MISTAKES, REPORT, show_figure, write_evaluation
from model_cards.rendering import METRIC_TITLES
from modeling_vit_custom.command_line import Parser, not_negative, positive, report_user_errors
from trainers import inference
from trainers.arguments import DataArguments, add_fields, check_writable, suggest
from trainers.bootstrap import COVERAGE
from trainers.corruptions import CORRUPTIONS, SEVERITIES
from trainers.data import BUILT_IN_TITLES, LABEL, EvaluatedSplit, load_evaluated
from trainers.evaluation import (
    Settings,
    draw_corruptions,
    draw_mistakes,
    evaluate_variants,
    measure_robustness,
)
from trainers.inference import (
    Classifier,
    ReadersKilledError,
    match_classes,
    noticing_killed_readers,
    open_classifier,
    quiet,
)
from trainers.models import read_processor
from trainers.run_facts import format_command, name_origin


PROGRAM = "python -m trainers.evaluate"
MIN_RESAMPLES = 100


def list_kinds() -> str:
    """The corruptions of each kind, a line each."""
    kinds = dict.fromkeys(each.group for each in CORRUPTIONS.values())
    named = {kind: [name for name, each in CORRUPTIONS.items() if each.group == kind] for kind in kinds}
    return "\n".join(f"  {kind:<8} {' '.join(names)}" for kind, names in named.items())


EXAMPLES = f"""\
examples:
  # a model of your own on the images that training held out
  {PROGRAM} runs/mine path/to/images

  # any classifier of the Hub, with mirror images, at three sizes
  {PROGRAM} user/name user/data --flips --image_sizes 192 224 288

  # how it bears noise, blur, weather and compression: 1,000 images under 15 corruptions of 5 severities
  {PROGRAM} runs/mine path/to/images --corruptions all --max_images 1000

  # class folders that are all for testing
  {PROGRAM} runs/mine path/to/images --split all

Classes are matched by their names, in whatever order.

corruptions, one by one, by their kind or all:
{list_kinds()}"""


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    start = time.perf_counter()
    try:
        with quiet(), report_user_errors("evaluate"):
            arguments = parse_arguments(argv)
            check(arguments)
            code_commit()  # what runs is what lies there now
            classifiers = open_sizes(arguments)
            split = load_evaluated(
                collect_data_arguments(arguments), arguments.split, arguments.max_images, arguments.seed
            )
            labels = number_labels(split, classifiers[0], arguments)
            share = f", a share of train by --split_seed {arguments.split_seed}; --split all takes all of them"
            print(f"{arguments.model} on {len(labels):,} images ({split.name}{share * split.is_held_out})")
            with noticing_killed_readers():
                facts, logits = evaluate_variants(classifiers, split.images, labels, collect_settings(arguments))
                facts, pictures = finish(arguments, argv, classifiers[0], split, labels, facts, logits, start)
            write_evaluation(arguments.output_dir, facts, pictures)
    except ReadersKilledError as error:
        raise SystemExit(f"evaluate: error: {error}; nothing was written") from error
    except KeyboardInterrupt:
        print("\nevaluate: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    print_results(facts, arguments.output_dir)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__, EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="folder or user/name of anything AutoModelForImageClassification opens"
    )
    parser.add_argument(
        "data", metavar="DATA", help="as --dataset of trainers.finetune: digits, a folder, a Hub data set"
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="train, validation, test, or all of them; by default test if there is one, else validation",
    )
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, default=Path("runs/evaluate"), metavar="DIR", help="(runs/evaluate)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an evaluation that the output folder holds")
    parser.add_argument(
        "--image_sizes",
        "--image-sizes",
        type=positive,
        nargs="+",
        default=[],
        metavar="N",
        help="also at these sides in pixels",
    )
    parser.add_argument("--flips", action="store_true", help="also with the mirror image of each image")
    parser.add_argument("--corruptions", nargs="+", default=[], metavar="NAME", help="also under these; see below")
    parser.add_argument(
        "--severities", type=int, nargs="+", metavar="N", help="of the corruptions, from 1 to 5 (all five)"
    )
    parser.add_argument(
        "--max_images", "--max-images", type=positive, metavar="N", help="take as many, drawn at random"
    )
    parser.add_argument("--bootstrap", type=positive, default=1000, metavar="N", help="draws for the intervals (1000)")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of draws and corruptions (0)")
    parser.add_argument(
        "--labels_by_index",
        "--labels-by-index",
        action="store_true",
        help="take the model's classes in their order as the data set's, whatever their names",
    )
    inference.add_arguments(parser)
    add_fields(
        parser,
        DataArguments,
        dataset_config=None,
        image_column=None,
        label_column=None,
        class_names=None,
        validation_fraction="Share of train that training held out where there is no validation split.",
        split_seed=None,
        on_corrupt=None,
        streaming="Read parquet files, shards or a Hub data set only as far as --max_images.",
    )
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Expands names of corruptions; raises ValueError for what cannot be measured, or written."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: an evaluation uses one device, start it without torchrun"
        )
    if arguments.bootstrap < MIN_RESAMPLES:
        raise ValueError(f"--bootstrap {arguments.bootstrap} tells no intervals: give at least {MIN_RESAMPLES}")
    arguments.corruptions = list_corruptions(arguments.corruptions)
    if arguments.severities and not arguments.corruptions:
        raise ValueError(f"--severities {arguments.severities[0]} is of --corruptions: name them, or all")
    arguments.severities = sorted(set(arguments.severities or SEVERITIES))
    outside = [severity for severity in arguments.severities if severity not in SEVERITIES]
    if outside:
        raise ValueError(f"--severities {outside[0]} must lie between {SEVERITIES[0]} and {SEVERITIES[-1]}")
    check_output_dir(arguments.output_dir, arguments.overwrite)


def list_corruptions(given: Sequence[str]) -> list[str]:
    """Names in their usual order, of names, kinds or all.

    Raises:
        ValueError: for what is none of these.
    """
    kinds = {corruption.group for corruption in CORRUPTIONS.values()}
    for name in given:
        if name not in {"all", *kinds, *CORRUPTIONS}:
            near = suggest(name, CORRUPTIONS) or f": give all, or some of {', '.join(CORRUPTIONS)}"
            raise ValueError(f"there is no corruption {name!r}{near}")
    return [name for name, each in CORRUPTIONS.items() if {"all", each.group, name} & set(given)]


def check_output_dir(folder: Path, overwrite: bool) -> None:
    """Raises ValueError for a folder whose files an evaluation must not replace."""
    check_writable(folder, "--output_dir")
    if (folder / "config.json").exists():
        raise ValueError(
            f"--output_dir {str(folder)!r} holds a model, some of whose figures are named alike: give another"
        )
    if (folder / FACTS).exists() and not overwrite:
        raise ValueError(f"--output_dir {str(folder)!r} already holds an evaluation: pass --overwrite or another one")
    others = [name for name in FILES if (folder / name).exists() and not (folder / FACTS).exists()]
    if others:
        raise ValueError(f"--output_dir {str(folder)!r} holds a {others[0]!r} of something else: give another")


def open_sizes(arguments: argparse.Namespace) -> list[Classifier]:
    """The model at its own size, or --image_size, and at the others."""
    classifier = open_classifier(arguments)
    classifier.check_size()
    classifier.check_numbers()
    own = read_processor(classifier.processor)[0]
    sides = sorted(set(arguments.image_sizes) - ({own[0]} if own[0] == own[1] else set()))
    return [classifier, *map(classifier.at_size, sides)]


def collect_data_arguments(arguments: argparse.Namespace) -> DataArguments:
    names = DataArguments.__dataclass_fields__.keys() & vars(arguments).keys()
    return DataArguments(dataset=arguments.data, **{name: getattr(arguments, name) for name in names})


def collect_settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
        arguments.flips,
        arguments.corruptions,
        arguments.severities,
        arguments.bootstrap,
        arguments.seed,
        arguments.batch_size,
        arguments.num_workers,
    )


def number_labels(split: EvaluatedSplit, classifier: Classifier, arguments: argparse.Namespace) -> np.ndarray:
    """Classes of the images as the model counts them (N,).

    Raises:
        ValueError: if it does not know them all.
    """
    names, model = split.images.features[LABEL].names, f"model {arguments.model!r}"
    order = match_classes(classifier.label_names, names, arguments.labels_by_index, model, "--labels_by_index")
    return np.array(order)[split.images[LABEL][:]]


def finish(
    arguments: argparse.Namespace,
    argv: Sequence[str],
    classifier: Classifier,
    split: EvaluatedSplit,
    labels: np.ndarray,
    facts: dict,
    logits: np.ndarray,
    start: float,
) -> tuple[dict, dict]:
    """All facts of the page, and its figures that show images."""
    settings, pictures = collect_settings(arguments), {}
    mistakes = draw_mistakes(classifier, split.images, labels, logits)
    if mistakes is not None:
        pictures[MISTAKES] = mistakes
    if settings.corruptions:
        is_right = logits.argmax(axis=-1) == labels
        facts["robustness"] = measure_robustness(classifier, split.images, labels, is_right, settings)
        pictures[CORRUPTIONS_FIGURE] = draw_corruptions(classifier, split.images, settings)
    origin = name_origin("model", "folder", arguments.model)
    source = {} if arguments.data in BUILT_IN_TITLES else name_origin("dataset", "folder", arguments.data)
    known = set(split.images.features[LABEL].names) if not arguments.labels_by_index else set(classifier.label_names)
    about = {
        "model": next(iter(origin.values())),
        "model_url": f"https://huggingface.co/{origin['model']}" if "model" in origin else None,
        "model_type": classifier.model.config.model_type,
        "num_parameters": classifier.model.num_parameters(),
        "precision": str(classifier.dtype).removeprefix("torch."),
        "image_size": list(read_processor(classifier.processor)[0]),
        "dataset": next(iter(source.values()), BUILT_IN_TITLES.get(arguments.data)),
        "dataset_url": f"https://huggingface.co/datasets/{source['dataset']}" if "dataset" in source else None,
        "split": split.name,
        "is_held_out": split.is_held_out,
        "num_images": len(labels),
        "drawn_from": split.total,
        "label_names": classifier.label_names,
        "absent_classes": [name for name in classifier.label_names if name not in known],
    }
    how = {
        "bootstrap": {"resamples": settings.resamples, "seed": settings.seed, "coverage": COVERAGE},
        "command": format_command("evaluate", argv),
        "commit": code_commit(),
        "versions": library_versions(),
        "hardware": describe_hardware(classifier.device),
        "seconds": time.perf_counter() - start,
    }
    return about | facts | how, pictures


def print_results(facts: dict, folder: Path) -> None:
    """The numbers that a reader would look for first."""
    rows = {title: (name, facts["results"][name]) for name, title in METRIC_TITLES.items() if name in facts["results"]}
    for row in facts["variants"]:
        size = "{} x {}".format(*row["image_size"]) + ", mirrored too" * row["flips"]
        if row["flips"] or row["image_size"] != facts["image_size"]:
            rows[f"Accuracy at {size}"] = ("accuracy", row["results"]["accuracy"])
    if "robustness" in facts:
        rows["Mean corruption error"] = ("accuracy", facts["robustness"]["mean_corruption_error"])
    width = max(map(len, rows))
    for title, (name, figure) in rows.items():
        print(f"  {title:<{width}}  {show_figure(name, figure)}")
    print(f"\n{folder / REPORT} is the page, {folder / FACTS} has all numbers")


if __name__ == "__main__":
    main()
