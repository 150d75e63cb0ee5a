"""What distillation and the treatments of unbalanced classes add, on small parts of CIFAR-10.

Each run is one command of trainers.finetune, which the table names. Runs that an output file already holds are not
repeated, so that an interrupted benchmark goes on.

Example:
    python tests/benchmarks/lift.py --dataset uoft-cs/cifar10 --experiments distillation --output lift.md
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
    default_data_collator,
)


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import modeling_vit_custom  # noqa: F401  (registers the family)
from benchmarks.arguments import add_output
from benchmarks.environment import describe_environment, format_environment
from modeling_vit_custom.command_line import positive
from trainers.arguments import DataArguments
from trainers.data import IMAGE, LABEL, TEST, TRAIN, load_splits, processor_transform, with_transform
from trainers.metrics import accuracy, per_class_recall


EXPERIMENTS = ("distillation", "imbalance")
RARE_CLASSES = 3
SHORT = "--crop_padding 4 --horizontal_flip 0.5 --label_smoothing 0.1 --per_device_train_batch_size 128 "
SHORT += "--per_device_eval_batch_size 500 --weight_decay 0.05 --bf16 true --save_strategy no --validation_fraction 0"
STUDENT = "--model deit_nano_distilled_patch4_32 --config_overrides attn_implementation=eager "
STUDENT += f"--optimizer muon --learning_rate 2e-3 {SHORT}"
CLASSIFIER = "--model vit_nano_patch4_32 --config_overrides attn_implementation=eager pooling=mean "
CLASSIFIER += "use_class_token=false --optimizer muon --learning_rate 2e-3 --initial_image_size 16 "
CLASSIFIER += f"--full_size_epochs 3 {SHORT}"
# AdamW at 64 pixels, since a ResNet's first layers make its images four times smaller.
TEACHER = f"--optimizer adamw --learning_rate 2e-3 {SHORT}"
# Experiment -> name of a run -> its options; the first is what the others are compared with.
RUNS = {
    "distillation": {
        "student alone": STUDENT,
        "with a teacher": f"{STUDENT} --teacher {{teacher}} --distillation hard",
    },
    "imbalance": {
        "plain": CLASSIFIER,
        "logit adjustment": f"{CLASSIFIER} --logit_adjustment 1.0",
        "balanced sampling": f"{CLASSIFIER} --class_balanced_sampling true",
    },
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    records = Records(arguments.output.with_suffix(".jsonl"), describe_environment("lift.py", argv, "cpu"))
    whole = load_splits(DataArguments(dataset=arguments.dataset, validation_fraction=0.0))
    for experiment in arguments.experiments:
        counts = class_counts(experiment, arguments)
        data = arguments.folder / f"{experiment}_data"
        write_part(whole, counts, data)
        teacher = arguments.folder / "teacher"
        if experiment == "distillation":
            options = f"--model {write_teacher(arguments.folder / 'untrained_teacher')} {TEACHER}"
            run("distillation", "teacher", 0, options, data, teacher, arguments.teacher_epochs, records)
        for seed in arguments.seeds:
            for name, options in RUNS[experiment].items():
                output = arguments.folder / f"{experiment}_{name.replace(' ', '_')}_{seed}"
                options = options.format(teacher=teacher)
                run(experiment, name, seed, options, data, output, arguments.epochs, records)
        arguments.output.write_text(format_results(records, arguments))
    print(arguments.output.read_text())


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="a Hub id or a folder with train and test")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=positive, default=20)
    parser.add_argument("--teacher_epochs", type=positive, default=30)
    parser.add_argument("--images", type=positive, default=500, help="of each class, in distillation")
    parser.add_argument("--most", type=positive, default=2500, help="images of the most frequent class, in imbalance")
    parser.add_argument("--ratio", type=positive, default=50, help="of the most frequent to the rarest class")
    parser.add_argument("--folder", type=Path, default=Path("runs/lift"), help="where data and models go")
    add_output(parser, "markdown file of the results, beside which all figures go into a .jsonl")
    parser.set_defaults(output=Path("lift.md"))
    return parser.parse_args(argv)


class Records(list):
    """What is known of each run, in a file that grows with every one."""

    def __init__(self, file: Path, environment: dict[str, str]):
        self.file, self.environment = file, environment
        if file.exists():
            super().__init__(json.loads(line) for line in file.read_text().splitlines())

    def append(self, record: dict) -> None:
        super().append(record)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def of(self, experiment: str, name: str) -> list[dict]:
        return [record for record in self if (record["experiment"], record["name"]) == (experiment, name)]


def class_counts(experiment: str, arguments: argparse.Namespace) -> list[int]:
    """Training images of each of ten classes: the same, or falling by a constant factor from class to class."""
    if experiment == "distillation":
        return [arguments.images] * 10
    return [round(arguments.most * arguments.ratio ** (-index / 9)) for index in range(10)]


def write_part(whole: datasets.DatasetDict, counts: list[int], folder: Path) -> None:
    """The first images of each class of train, and all of test, as parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.array(whole[TRAIN][LABEL])
    rows = np.sort(np.concatenate([np.flatnonzero(labels == index)[:count] for index, count in enumerate(counts)]))
    whole[TRAIN].select(rows).to_parquet(folder / "train.parquet")
    whole[TEST].to_parquet(folder / "test.parquet")


def write_teacher(folder: Path) -> Path:
    """A convolutional network with random weights: they teach transformers best (arxiv.org/abs/2012.12877, table 2)."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256], depths=[2, 2, 2], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def run(
    experiment: str, name: str, seed: int, options: str, data: Path, output: Path, epochs: int, records: Records
) -> None:
    if any(record["seed"] == seed for record in records.of(experiment, name)):
        return
    argv = ["--dataset", str(data), *shlex.split(options), "--num_train_epochs", str(epochs), "--seed", str(seed)]
    command = [sys.executable, "-m", "trainers.finetune", *argv, "--output_dir", str(output), "--overwrite", "true"]
    print(f"{experiment}, {name}, seed {seed}: python -m trainers.finetune {shlex.join(argv)}", flush=True)
    subprocess.run([*command, "--report_to", "none"], check=True)
    logits, labels = predict(output, data)
    record = {"experiment": experiment, "name": name, "seed": seed, "options": options, "epochs": epochs}
    record |= {"accuracy": accuracy(logits, labels), "recall": per_class_recall(logits, labels).tolist()}
    records.append(record | {"environment": records.environment})


def predict(folder: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, L) and classes (N,) of the test split."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    split = datasets.load_dataset(str(data), split=TEST).select_columns([IMAGE, LABEL])
    images = with_transform(split, processor_transform(AutoImageProcessor.from_pretrained(folder)))
    logits, labels = [], []
    for batch in tqdm(DataLoader(images, 500, collate_fn=default_data_collator), desc="Testing", leave=False):
        with torch.inference_mode():
            logits.append(model(batch["pixel_values"]).logits)
        labels.append(batch["labels"])
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def format_results(records: Records, arguments: argparse.Namespace) -> str:
    lines = ["# Distillation and unbalanced classes", format_environment(records.environment)]
    for experiment in [name for name in EXPERIMENTS if any(record["experiment"] == name for record in records)]:
        counts = ", ".join(map(str, class_counts(experiment, arguments)))
        lines.append(f"## {experiment.capitalize()}\n\nTraining images by class: {counts}; tested on all test images.")
        alone, *others = RUNS[experiment]
        teachers = ["teacher"] if experiment == "distillation" else []
        measures = {"accuracy": measure_accuracy}
        if experiment == "imbalance":
            measures[f"recall of the {RARE_CLASSES} rarest classes"] = measure_rare_recall
        *_, (lifted, measure) = measures.items()
        rows = [("run", "seeds", *measures, f"lift of {lifted}"), ("---",) * (3 + len(measures))]
        for name in [*teachers, alone, *others]:
            found = records.of(experiment, name)
            cells = [format_percent(each(found)) for each in measures.values()]
            lift = format_percent(measure(found) - measure(records.of(experiment, alone))) if name in others else "-"
            rows.append((name, ", ".join(str(record["seed"]) for record in found), *cells, lift))
        lines.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        commands = {name: records.of(experiment, name)[0]["options"] for name in [*teachers, alone, *others]}
        lines.append("\n".join(f"- {name}: `python -m trainers.finetune {text}`" for name, text in commands.items()))
    return "\n\n".join(lines) + "\n"


def measure_accuracy(found: list[dict]) -> np.ndarray:
    return np.array([record["accuracy"] for record in found])


def measure_rare_recall(found: list[dict]) -> np.ndarray:
    return np.array([np.mean(record["recall"][-RARE_CLASSES:]) for record in found])


def format_percent(shares: np.ndarray) -> str:
    """Mean, standard deviation and every value, in percent."""
    percent = 100 * shares
    spread = f" ± {percent.std(ddof=1):.2f}" if len(percent) > 1 else ""
    return f"{percent.mean():.2f}{spread} ({', '.join(f'{value:.2f}' for value in percent)})"


if __name__ == "__main__":
    main()
