"""The YAML block of a card: what the Hub reads, and what it would object to.

https://huggingface.co/docs/hub/model-cards and https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

import math
import posixpath
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from model_cards.citations import PAPERS
from model_cards.facts import CLASSIFICATION, TrainingRun


# Of https://huggingface.co/docs/hub/repositories-licenses
_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
RELATIONS = ("finetune", "adapter", "merge", "quantized")
# Loaders of files, not data sets; the Hub would link to a page of that name.
LOADERS = ("imagefolder", "webdataset", "parquet", "csv", "json", "arrow", "text")
METRIC_TYPES = {
    "accuracy": ("accuracy", "Accuracy"),
    "top5_accuracy": ("top_5_accuracy", "Top-5 accuracy"),
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy"),
    "macro_f1": ("f1", "Macro F1"),
    "expected_calibration_error": ("expected_calibration_error", "Expected calibration error"),
}


def build_metadata(run: TrainingRun) -> ModelCardData:
    """What is known, as the Hub wants it. Only what the Hub can resolve is named: never a local path or a loader."""
    measured = {name: value for name, value in (run.results or {}).items() if name in METRIC_TYPES}
    papers = [PAPERS[key] for key in (run.architecture, run.objective) if key is not None]
    metadata = ModelCardData(
        license=run.license,
        library_name="transformers",
        pipeline_tag=run.task,
        tags=[run.model_type, "vision", *(f"arxiv:{paper.arxiv}" for paper in papers)],
        datasets=[run.dataset] if run.dataset else None,
        metrics=[METRIC_TYPES[name][0] for name in measured] or None,
        base_model=run.base_model,
        base_model_relation="finetune" if run.base_model else None,
        widget=[{"src": file, "example_title": label} for file, label in (run.examples or {}).items()] or None,
    )
    if run.carbon is not None:
        metadata.co2_eq_emissions = {
            "emissions": run.carbon,
            "source": "measured energy times the intensity of the grid",
            "training_type": "pre-training" if run.from_scratch else "fine-tuning",
            "hardware_used": run.hardware,
        }
    # A result in the model index needs a data set. One that is not on the Hub gets a type that is no Hub id.
    title = run.dataset_title or run.dataset or run.dataset_folder
    if measured and title and run.task == CLASSIFICATION:
        metadata.model_name = run.name
        metadata.eval_results = [
            EvalResult(
                task_type=CLASSIFICATION,
                task_name="Image Classification",
                dataset_type=run.dataset or "local",
                dataset_name=title if run.evaluation_origin != "train" else f"{title} (held out of train)",
                dataset_split=run.evaluation_origin or run.evaluation_split,
                metric_type=METRIC_TYPES[name][0],
                metric_name=METRIC_TYPES[name][1],
                metric_value=round(float(value), 6),
            )
            for name, value in measured.items()
        ]
    return metadata


def split_card(text: str) -> tuple[dict, str]:
    """A card's metadata and its body.

    Raises:
        ValueError: if the metadata are not a mapping in YAML.
    """
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if match is None:
        return {}, text
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata are not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise ValueError("the metadata are not a mapping")
    return metadata, text[match.end() :]


def find_card_errors(text: str, folder: Path | None = None) -> list[str]:
    """What the Hub would refuse or misread in a card, one line each; without a network.

    Args:
        text: All of README.md.
        folder: Where the files lie that the card refers to; without it they are not looked for.
    """
    try:
        metadata, _ = split_card(text)
    except ValueError as error:
        return [str(error)]
    errors = [f"{name} is missing" for name in ("library_name", "pipeline_tag", "tags") if not metadata.get(name)]
    errors += _find_type_errors(metadata)
    if errors:
        return errors
    licence = metadata.get("license")
    if licence is not None and licence not in LICENSES:
        errors.append(f"license {licence!r} is none that the Hub knows: see hf.co/docs/hub/repositories-licenses")
    if licence == "other" and not (metadata.get("license_name") and metadata.get("license_link")):
        errors.append("license 'other' needs license_name and license_link")
    for dataset in metadata.get("datasets") or []:
        if dataset in LOADERS or not is_repo_id(dataset):
            errors.append(f"dataset {dataset!r} is none on the Hub")
    bases = metadata.get("base_model") or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not is_repo_id(base):
            errors.append(f"base_model {base!r} is none on the Hub")
    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        errors.append(f"base_model_relation {relation!r} is none of {', '.join(RELATIONS)}")
    errors += _find_index_errors(metadata.get("model-index") or [])
    sources = [widget.get("src") for widget in metadata.get("widget") or []]
    if not all(isinstance(source, str) for source in sources):
        errors.append("a widget example has no src")
    elif folder is not None:
        for name in find_files_of_card(text):
            if not is_beside(name):
                errors.append(f"{name} is not beside the card")
            elif not (folder / name).is_file():
                errors.append(f"{name} is not there")
    return errors


def find_files_of_card(text: str) -> list[str]:
    """The local files that a card shows, as it names them: pictures and widget examples.

    Raises:
        ValueError: if the metadata are not a mapping in YAML.
    """
    metadata, body = split_card(text)
    widgets = metadata.get("widget") or []
    names = [widget.get("src") for widget in widgets if isinstance(widget, dict)] + find_pictures(body)
    names = [posixpath.normpath(name) for name in names if isinstance(name, str) and "://" not in name]
    return list(dict.fromkeys(names))


def is_beside(name: str) -> bool:
    """Whether the name of a file, normalised, leads no further up than the card's folder."""
    return not name.startswith(("/", "..", "~"))


def find_pictures(body: str) -> list[str]:
    """Where the pictures in a card's body are: names of files beside it, and addresses."""
    return re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", body)


def _find_type_errors(metadata: dict) -> list[str]:
    errors = []
    for name in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        if not isinstance(metadata.get(name), str | None):
            errors.append(f"{name} is no text")
    for name in ("tags", "datasets", "metrics"):
        value = metadata.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            errors.append(f"{name} is no list of texts")
    for name in ("widget", "model-index"):
        value = metadata.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
            errors.append(f"{name} is no list of mappings")
    return errors


def _find_index_errors(index: list[dict]) -> list[str]:
    errors = []
    for entry in index:
        if not entry.get("name"):
            errors.append("model-index has an entry without a name")
        results = entry.get("results") or []
        for result in results if isinstance(results, list) else [results]:
            kinds = {"task": dict | None, "dataset": dict | None, "metrics": list | None}
            if not isinstance(result, dict) or not all(isinstance(result.get(name), kinds[name]) for name in kinds):
                errors.append(f"model-index has a result that is no mapping of task, dataset and metrics: {result}")
                continue
            dataset = result.get("dataset") or {}
            if not (result.get("task") or {}).get("type"):
                errors.append("model-index has a result without a task type")
            if not (dataset.get("type") and dataset.get("name")):
                errors.append("model-index has a result without the type and name of its data set")
            elif dataset["type"] in LOADERS:
                errors.append(f"model-index names {dataset['type']!r}, which is no data set")
            for metric in result.get("metrics") or [{}]:
                value = metric.get("value") if isinstance(metric, dict) else None
                if not isinstance(value, int | float) or not math.isfinite(value) or not metric.get("type"):
                    errors.append(f"model-index has a metric without a type or a finite value: {metric}")
    return errors


def is_repo_id(name: str) -> bool:
    """Whether a name may be that of a model or a data set on the Hub: `user/name`, or one of the oldest, `name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "/"))
