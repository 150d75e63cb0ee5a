"""The model card of a training run: a README with metadata that the Hub reads, rendered from known facts only.

`TrainingRun` holds the facts. `write_card` draws the figures and writes README.md into a checkpoint folder. A fact that
is not known is left out of the card; none is guessed.
"""

import html
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from model_cards.figures import collect_curves, plot_confusion_matrix, plot_images, plot_training_curves


TEMPLATE_PATH = Path(__file__).with_name("template.md")
TRAINING_CURVES = "training_curves.png"
CONFUSION_MATRIX = "confusion_matrix.png"
RECONSTRUCTIONS = "reconstructions.png"
FIGURE_DPI = 150
MAX_WORST_CLASSES = 5
CLASSIFICATION, FEATURES = "image-classification", "image-feature-extraction"
# In the order in which a run reports them.
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy (mean recall)",
    "macro_f1": "Macro F1",
    "expected_calibration_error": "Calibration error (ECE, 15 bins)",
    "knn_accuracy": "Accuracy of 20 nearest neighbours",
    "linear_probe_accuracy": "Accuracy of a linear classifier",
    "loss": "Loss",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRun:
    """What is known of a training run. Only the name is required; None and empty mean "not known"."""

    name: str  # a Hub id, which the snippets load, or the name of the checkpoint's folder, in which they run
    task: str = CLASSIFICATION  # the pipeline that runs the model: or FEATURES, of an encoder without a head
    license: str | None = None  # of the weights
    model_type: str = "vit_custom"
    preset: str | None = None  # the named architecture
    num_parameters: int | None = None
    image_size: int | tuple[int, int] | None = None  # (height, width)
    label_names: Sequence[str] = ()  # in the order of the class indices

    base_model: str | None = None  # what was fine-tuned: a Hub id or a local folder
    from_scratch: bool = False  # False and no base_model: the card does not say where the weights started

    dataset: str | None = None  # a Hub id, "imagefolder", or a local folder
    dataset_title: str | None = None  # what to call a data set that is neither on the Hub nor in a folder
    split_sizes: Mapping[str, int] | None = None

    evaluation_split: str | None = None  # the split of `results` and `confusion_matrix`
    results: Mapping[str, float] | None = None  # metric names without a prefix: {"accuracy": 0.91, "loss": 0.3}
    confusion_matrix: np.ndarray | None = None  # (C, C) counts, true classes down, predicted classes across
    reconstructions: Sequence[Sequence[np.ndarray]] = ()  # rows of images (H, W, 3): whole, masked, reconstructed
    log_history: Sequence[Mapping] = ()  # the Trainer's state.log_history

    command: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] | None = None  # {"torch": "2.8.0"}
    hardware: str | None = None
    wall_time: float | None = None  # seconds

    def __post_init__(self):
        if self.from_scratch and self.base_model is not None:
            raise ValueError(f"a run from scratch has no base model, got {self.base_model!r}")
        for name, value in (self.results or {}).items():
            if _is_fraction(name) and not 0 <= value <= 1:
                raise ValueError(f"{name} is a fraction between 0 and 1, got {value}")
        if self.confusion_matrix is not None:
            num_classes = len(self.label_names)
            if self.confusion_matrix.shape != (num_classes, num_classes):
                shape = self.confusion_matrix.shape
                raise ValueError(f"a confusion matrix of shape {shape} does not fit {num_classes} label names")


def write_card(output_dir: str | Path, run: TrainingRun) -> Path:
    """Draws the figures that the run's facts allow and writes README.md, both into the checkpoint's folder.

    An older README.md and older figures are replaced or removed. Returns the README's path.
    """
    output_dir = Path(output_dir)
    figures = {}
    if collect_curves(run.log_history):
        figures[TRAINING_CURVES] = plot_training_curves(run.log_history)
    if run.confusion_matrix is not None:
        figures[CONFUSION_MATRIX] = plot_confusion_matrix(run.confusion_matrix, run.label_names)
    if run.reconstructions:
        figures[RECONSTRUCTIONS] = plot_images(run.reconstructions, ("image", "masked", "reconstructed"))
    for name in (TRAINING_CURVES, CONFUSION_MATRIX, RECONSTRUCTIONS):
        (output_dir / name).unlink(missing_ok=True)
        if name in figures:
            figures[name].savefig(output_dir / name, dpi=FIGURE_DPI)
    path = output_dir / "README.md"
    render_card(run, figures).save(path)
    return path


def render_card(run: TrainingRun, figures: Collection[str] = ()) -> ModelCard:
    """Renders the card of a run. `figures` names the image files that lie beside the card."""
    limits, worst_classes = _describe_limits(run)
    return ModelCard.from_template(
        build_metadata(run),
        template_path=str(TEMPLATE_PATH),
        title=escape_markdown(run.name),
        summary=_describe_model(run),
        measured_on=_describe_evaluation(run),
        results=[_format_metric(name, value) for name, value in (run.results or {}).items()],
        figures=figures,
        hub_id=run.name if is_hub_id(run.name) else None,
        custom_code=run.model_type == "vit_custom",
        classifies=run.task == CLASSIFICATION,
        data_source=_describe_dataset(run),
        split_sizes=[(escape_markdown(name), f"{size:,}") for name, size in (run.split_sizes or {}).items()],
        command=None if run.command is None else _fence(run.command, "bash"),
        training_facts=_list_training_facts(run),
        limits=limits,
        worst_classes=worst_classes,
    )


def build_metadata(run: TrainingRun) -> ModelCardData:
    """Builds the card's YAML block. Only what the Hub can resolve is named there: never a local path or a loader."""
    accuracy = None if run.results is None else run.results.get("accuracy")
    metadata = ModelCardData(
        license=run.license,
        library_name="transformers",
        pipeline_tag=run.task,
        tags=[run.model_type, "vision"],
        datasets=[run.dataset] if run.dataset is not None and is_hub_id(run.dataset) else None,
        metrics=None if accuracy is None else ["accuracy"],
        base_model=run.base_model if run.base_model is not None and is_hub_id(run.base_model) else None,
    )
    # A result in the model index needs a dataset. One that is not on the Hub gets a type that is no Hub id.
    if accuracy is not None and _describe_dataset(run) is not None:
        on_hub = run.dataset is not None and is_hub_id(run.dataset)
        metadata.model_name = run.name.rsplit("/", 1)[-1]
        metadata.eval_results = [
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=run.dataset if on_hub else "local",
                dataset_name=run.dataset if on_hub else _name_dataset(run) or "local folder",
                dataset_split=run.evaluation_split,
                metric_type="accuracy",
                metric_name="Accuracy",
                metric_value=float(accuracy),
            )
        ]
    return metadata


def is_hub_id(name: str) -> bool:
    """Tells a Hub id `namespace/name` from a local path and from a loader's name such as `imagefolder`.

    As everywhere in the ecosystem, a local folder of that name takes precedence.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def escape_markdown(text: str) -> str:
    """Puts any text on one line on which markdown, HTML and table syntax mean nothing."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def find_worst_classes(matrix: np.ndarray, label_names: Sequence[str], count: int) -> list[tuple[str, float, int, str]]:
    """Returns up to `count` classes with errors, lowest recall first: (name, recall, images, most often taken for)."""
    images = matrix.sum(axis=1)
    correct = matrix.diagonal()
    recall = correct / np.maximum(images, 1)
    errors = matrix - np.diag(correct)
    # At equal recall the class with more images comes first: its recall is the better known of the two.
    worst = [index for index in np.lexsort((-images, recall)) if correct[index] < images[index]][:count]
    return [
        (label_names[index], float(recall[index]), int(images[index]), label_names[errors[index].argmax()])
        for index in worst
    ]


def _describe_model(run: TrainingRun) -> str:
    """Says in one sentence what the model is."""
    facts = []
    if run.preset is not None:
        facts.append(f"preset {escape_markdown(run.preset)}")
    if run.num_parameters is not None:
        millions = run.num_parameters / 1e6
        facts.append(f"{millions:.1f} M parameters" if millions >= 1 else f"{millions:.3f} M parameters")
    if run.image_size is not None:
        height, width = (run.image_size, run.image_size) if isinstance(run.image_size, int) else run.image_size
        facts.append(f"images of {height} x {width} pixels")
    if run.label_names:
        facts.append("1 class" if len(run.label_names) == 1 else f"{len(run.label_names):,} classes")
    if run.from_scratch:
        facts.append("trained from scratch")
    elif run.base_model is not None and is_hub_id(run.base_model):
        facts.append(f"fine-tuned from [{escape_markdown(run.base_model)}](https://huggingface.co/{run.base_model})")
    elif run.base_model is not None:
        facts.append(f"fine-tuned from the local checkpoint {escape_markdown(_name_local_folder(run.base_model))}")
    kind = "Vision Transformer" if run.model_type == "vit_custom" else "model"
    purpose = "that classifies images" if run.task == CLASSIFICATION else "pretrained by reconstructing masked images"
    return f"A {kind} (`{run.model_type}`) {purpose}" + "".join(f", {fact}" for fact in facts) + "."


def _describe_evaluation(run: TrainingRun) -> str:
    """Says what the results were measured on: "Measured on the test split (1,000 images) of ..."."""
    words, data_source = "Measured on", _describe_dataset(run)
    if run.evaluation_split is not None:
        words += f" the {escape_markdown(run.evaluation_split)} split"
        if run.split_sizes is not None and run.evaluation_split in run.split_sizes:
            words += f" ({run.split_sizes[run.evaluation_split]:,} images)"
        if data_source is not None:
            words += " of"
    if data_source is not None:
        words += f" {data_source}"
    return "The split is not recorded." if words == "Measured on" else f"{words}."


def _describe_dataset(run: TrainingRun) -> str | None:
    if run.dataset is not None and is_hub_id(run.dataset):
        return f"[{escape_markdown(run.dataset)}](https://huggingface.co/datasets/{run.dataset})"
    name = escape_markdown(_name_dataset(run))
    if run.dataset_title is not None or run.dataset is None:
        return name or None
    return f"the local folder {name}" if name else "a local folder"


def _name_dataset(run: TrainingRun) -> str:
    """Returns the name of a data set that is not on the Hub, or nothing."""
    if run.dataset_title is not None:
        return run.dataset_title
    return "" if run.dataset is None else _name_local_folder(run.dataset)


def _name_local_folder(path: str) -> str:
    """Returns the last part of a local path: the whole of it may say more of its owner than of what lies there."""
    return "" if path == "imagefolder" else Path(path).resolve().name


def _format_metric(name: str, value: float) -> tuple[str, str]:
    title = METRIC_TITLES[name] if name in METRIC_TITLES else escape_markdown(name)
    return title, f"{value:.2%}" if _is_fraction(name) else f"{value:.4f}"


def _is_fraction(metric: str) -> bool:
    return metric.endswith("accuracy") or metric in ("macro_f1", "expected_calibration_error")


def _list_training_facts(run: TrainingRun) -> list[tuple[str, str]]:
    facts = []
    if run.seed is not None:
        facts.append(("Seed", str(run.seed)))
    if run.hardware is not None:
        facts.append(("Hardware", escape_markdown(run.hardware)))
    if run.wall_time is not None:
        facts.append(("Wall time", _format_duration(run.wall_time)))
    for library, version in (run.versions or {}).items():
        facts.append((escape_markdown(library), escape_markdown(version)))
    return facts


def _describe_limits(run: TrainingRun) -> tuple[list[str], list[tuple[str, str, str, str]]]:
    """Reads the model's weak sides from the confusion matrix: (sentences, rows of the table of classes)."""
    if run.confusion_matrix is None:
        return [], []
    split = "evaluation" if run.evaluation_split is None else escape_markdown(run.evaluation_split)
    limits = []
    num_unseen = int((run.confusion_matrix.sum(axis=1) == 0).sum())
    if num_unseen > 0:
        limits.append(
            f"{num_unseen:,} of {len(run.label_names):,} classes have no image in the {split} split:"
            " how well they are recognised is not known."
        )
    worst = find_worst_classes(run.confusion_matrix, run.label_names, MAX_WORST_CLASSES)
    if worst:
        limits.append(f"Of the classes in the {split} split, these are recognised worst:")
    elif num_unseen < len(run.label_names):
        limits.append(f"No image of the {split} split was misclassified, so it does not show where the model fails.")
    rows = [
        (escape_markdown(name), f"{recall:.1%}", f"{images:,}", escape_markdown(taken_for))
        for name, recall, images, taken_for in worst
    ]
    return limits, rows


def _fence(code: str, language: str) -> str:
    """Puts code into a block whose fence is longer than any run of backticks inside."""
    fence = "`" * max([3] + [len(run) + 1 for run in re.findall("`+", code)])
    return f"{fence}{language}\n{code}\n{fence}"


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours > 0:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes > 0 else f"{seconds} s"
