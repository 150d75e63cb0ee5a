"""What is known of a training run: all that its card says, in a file beside the weights."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from model_cards.citations import PAPERS, REBALANCING


RUN = "run.json"
CLASSIFICATION, FEATURES = "image-classification", "image-feature-extraction"
# Also those between 0 and 1 that are no accuracy.
FRACTIONS = ("macro_f1", "expected_calibration_error")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRun:
    """What is known of a training run. Only the name is required; None and empty mean "not known".

    No local path may be in it: the file is published.
    """

    name: str  # of the model, without a namespace
    task: str = CLASSIFICATION  # the pipeline that runs the model: or FEATURES, of an encoder without a head
    license: str | None = None  # of the weights
    model_type: str = "vit_custom"
    architecture: str | None = None  # key of `citations.PAPERS`
    objective: str | None = None  # of pretraining by masked images: key of `citations.PAPERS`
    preset: str | None = None  # the named configuration
    preset_changes: Sequence[str] = ()  # what was set otherwise: "patch_size=4"
    num_parameters: int | None = None
    flops: int | None = None  # of one image's forward pass, additions and multiplications counted apart
    stages: Sequence[Mapping[str, str | int]] = ()  # how it is built: rows of a table, by column
    image_size: int | Sequence[int] | None = None  # (height, width)
    preprocessing: str | None = None  # what becomes of an image before the model sees it, in a sentence
    label_names: Sequence[str] = ()  # in the order of the class indices
    ema_decay: float | None = None  # the weights are averages with this decay

    base_model: str | None = None  # what was fine-tuned: a Hub id
    base_folder: str | None = None  # or the name of a local checkpoint
    teacher: str | None = None  # whose predictions it was trained towards: a Hub id
    teacher_folder: str | None = None  # or the name of a local checkpoint
    from_scratch: bool = False  # False and no base: the card does not say where the weights started

    dataset: str | None = None  # a Hub id
    dataset_title: str | None = None  # what to call it, if not by its id or its folder
    dataset_folder: str | None = None  # the name of a local one
    split_sizes: Mapping[str, int] | None = None
    train_fraction: float | None = None  # share of the training images that was taken, if not all
    train_imbalance: float | None = None  # the share of the first class by that of the last, if not 1
    train_counts: Sequence[int] = ()  # of each class, training images
    rebalancing: Mapping[str, float] | None = None  # how classes were balanced: by keys of `citations.REBALANCING`

    evaluation_split: str | None = None  # the split of all that follows
    evaluation_origin: str | None = None  # its name in the data set, if another: train, of which it was held out
    results: Mapping[str, float] | None = None  # metric names without a prefix: {"accuracy": 0.91, "loss": 0.3}
    confusion_matrix: np.ndarray | None = None  # (C, C) counts, true classes down, predicted classes across
    calibration: Sequence[Sequence[float]] = ()  # bins of confidence: (images, mean confidence, accuracy)
    examples: Mapping[str, str] | None = None  # files of held-out images beside the card -> their classes

    attention_distances: Sequence[Sequence[float]] = ()  # pixels: of each block each head's mean
    even_attention_distances: Sequence[float] = ()  # of each block, what even attention would have
    map_scores: Mapping[str, Sequence[float]] | None = None  # by method: insertion and deletion

    log_history: Sequence[Mapping] = ()  # the Trainer's state.log_history
    step: int | None = None  # where the run is, while it goes on
    max_steps: int | None = None

    command: str | None = None
    commit: str | None = None  # of the code
    seed: int | None = None
    versions: Mapping[str, str] | None = None  # {"torch": "2.8.0"}
    hardware: str | None = None
    wall_time: float | None = None  # seconds
    images_per_second: float | None = None
    peak_memory: int | None = None  # bytes
    energy: float | None = None  # measured, kWh
    carbon: float | None = None  # grams of CO2 equivalent, by the grid's known intensity

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"the name of a run must be text, got {self.name!r}")
        for field in ("results", "split_sizes", "examples", "versions", "map_scores", "rebalancing"):
            if not isinstance(getattr(self, field), Mapping | None):
                raise ValueError(f"{field} must be a mapping, got {getattr(self, field)!r}")
        for field in ("architecture", "objective"):
            if getattr(self, field) not in (None, *PAPERS):
                raise ValueError(f"{field} must be one of {', '.join(PAPERS)}, got {getattr(self, field)!r}")
        for name in self.rebalancing or {}:
            if name not in REBALANCING:
                raise ValueError(f"rebalancing is by {', '.join(REBALANCING)}, got {name!r}")
        if self.from_scratch and (self.base_model or self.base_folder):
            raise ValueError(f"a run from scratch has no base model, got {self.base_model or self.base_folder!r}")
        for name, value in (self.results or {}).items():
            if is_fraction(name) and not 0 <= value <= 1:
                raise ValueError(f"{name} is a fraction between 0 and 1, got {value}")
        num_classes = len(self.label_names)
        if self.train_counts and len(self.train_counts) != num_classes:
            raise ValueError(f"{len(self.train_counts)} counts of classes do not fit {num_classes} label names")
        if self.confusion_matrix is not None and self.confusion_matrix.shape != (num_classes, num_classes):
            shape = self.confusion_matrix.shape
            raise ValueError(f"a confusion matrix of shape {shape} does not fit {num_classes} label names")

    @property
    def sights(self) -> int | None:
        """Images of all steps of training, each as often as it was seen."""
        epochs = [entry["epoch"] for entry in self.log_history if "epoch" in entry]
        size = (self.split_sizes or {}).get("train")
        return round(max(epochs) * size) if epochs and size else None


def list_origins(runs: Iterable[TrainingRun]) -> dict[str, str]:
    """Hardware, code and versions of several runs, each with all that there were."""
    found = {}
    for run in runs:
        known = {"Hardware": run.hardware, "Code": run.commit and f"vit-custom, commit {run.commit}"}
        for name, fact in {**known, **(run.versions or {})}.items():
            if fact is not None:
                found.setdefault(name, {})[fact] = None
    return {name: "; ".join(facts) for name, facts in found.items()}


def is_fraction(metric: str) -> bool:
    return metric.endswith("accuracy") or metric in FRACTIONS


def write_run(folder: str | Path, run: TrainingRun) -> None:
    """Keeps the facts for `read_run`; those that are not known are left out."""
    known = {field.name: getattr(run, field.name) for field in fields(run)}
    known = {name: value for name, value in known.items() if value is not None and not _is_empty(value)}
    text = json.dumps(known, default=_to_plain, indent=1, ensure_ascii=False)
    path, temporary = Path(folder, RUN), Path(folder, f".{RUN}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)  # a folder that has one is taken for finished


def read_run(folder: str | Path) -> TrainingRun:
    """The facts that a run left in its folder.

    Raises:
        ValueError: if there are none, or they make no sense.
    """
    path = Path(folder, RUN)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if "confusion_matrix" in known:
            known["confusion_matrix"] = np.array(known["confusion_matrix"])
        return TrainingRun(**known)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"there is no {RUN} in {str(folder)!r}: give a folder that a training run left") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} holds no facts of a run: {error}") from error


def _is_empty(value: object) -> bool:
    return isinstance(value, (str, list, tuple, dict)) and not value


def _to_plain(value: object) -> object:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is nothing that JSON knows")
