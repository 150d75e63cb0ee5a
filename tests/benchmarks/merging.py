"""What merging tokens saves in inference, and what it costs in accuracy, for a classifier that was trained without.

All numbers of merged patches take turns on the same batches of a data set's images, so that ratios of time are of
neighbours; differences of accuracy are of the same images, with 95 % bootstrap intervals.

Example:
    python tests/benchmarks/merging.py --data path/to/cifar10/test.parquet --counts 2 4 6 8 --output merging.md
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_device, add_output
from benchmarks.environment import describe_environment, format_environment
from benchmarks.labelled import format_change, open_rows
from benchmarks.steps import format_quartiles, rotated, time_step
from model_cards.pages import tabulate
from modeling_vit_custom import ViTCustomForImageClassification
from modeling_vit_custom.command_line import positive, report_user_errors
from trainers.bootstrap import mean_intervals
from trainers.memory import keep_freed_memory
from trainers.pace import count_flops


ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "spaces" / "cifar10_vit"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    with report_user_errors("merging.py"):
        models = open_models(arguments)
        batches = load_batches(arguments)
    environment = describe_environment("merging.py", argv, arguments.device)
    keep_freed_memory()
    seconds, right = measure(models, batches, arguments.device)
    report = format_report(models, seconds, right, environment, arguments)
    print(report)
    if arguments.output is not None:
        arguments.output.write_text(report + "\n")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, help="folder of a plain ViT (default: the demo's classifier of CIFAR-10)")
    add("--data", type=Path, required=True, help="parquet file with columns image and label, in the model's order")
    add("--counts", nargs="+", type=positive, default=[2, 4, 6, 8], metavar="N", help="patches merged in each block "
        "(default: 2 4 6 8)")  # fmt: skip
    add("--batch_size", type=positive, default=250, help="images at once (default: 250)")
    add("--max_images", type=positive, help="take the first ones only")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add_device(parser, "cuda" if torch.cuda.is_available() else "cpu")
    add_output(parser, "markdown file to write")
    return parser.parse_args(argv)


def open_models(arguments: argparse.Namespace) -> dict[int, ViTCustomForImageClassification]:
    """The classifier by the number of patches that each block merges, 0 first.

    Raises:
        ValueError: if it cannot merge.
    """
    dtype, counts = DTYPES[arguments.dtype], sorted({0, *arguments.counts})
    return {
        count: AutoModelForImageClassification.from_pretrained(arguments.model, token_merging=count, dtype=dtype)
        .to(arguments.device)
        .eval()
        for count in counts
    }


def load_batches(arguments: argparse.Namespace) -> DataLoader:
    """Pixels (B, C, H, W) and labels (B,), as the model's own processor makes them.

    Raises:
        ValueError: if there is no such file.
    """
    rows = open_rows(arguments.data, arguments.max_images)
    processor = AutoImageProcessor.from_pretrained(arguments.model)

    def prepare(batch: dict) -> dict:
        return {"pixels": processor(batch["image"], return_tensors="pt")["pixel_values"], "label": batch["label"]}

    return DataLoader(rows.with_transform(prepare), arguments.batch_size)


@torch.inference_mode()
def measure(
    models: dict[int, ViTCustomForImageClassification], batches: DataLoader, device: str
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """By the number of merged patches: seconds of each batch, and whether each image is recognised."""
    seconds, right = {count: [] for count in models}, {count: [] for count in models}
    for number, batch in enumerate(tqdm(batches, unit="batch")):
        pixels = batch["pixels"].to(device, next(iter(models.values())).dtype)
        if not number:  # caches and threads are warm from then on
            for model in models.values():
                model(pixels)
        for count in rotated(list(models), number):
            logits = []
            seconds[count].append(time_step(lambda: logits.append(models[count](pixels).logits), device))  # noqa: B023
            right[count].append(logits[0].argmax(dim=-1).cpu() == batch["label"])
    return {count: np.array(seconds[count]) for count in models}, {
        count: torch.cat(right[count]).double().numpy() for count in models
    }


def format_report(
    models: dict[int, ViTCustomForImageClassification],
    seconds: dict[int, np.ndarray],
    right: dict[int, np.ndarray],
    environment: dict[str, str],
    arguments: argparse.Namespace,
) -> str:
    config = models[0].config
    rows, columns = config.stages[0].grid_size
    flops = {count: count_flops(model, config.native_size) for count, model in models.items()}
    differences = np.stack([right[count] - right[0] for count in models], axis=1)
    rows = []
    for count, interval in zip(models, mean_intervals(differences, 1000, 0)):
        speed = format_quartiles((seconds[0] / seconds[count]).tolist(), "{:.2f}".format)
        change = format_change(interval) if count else "-"
        rows.append((str(count), speed, f"{flops[count] / flops[0]:.2f}", f"{right[count].mean():.2%}", change))
    titles = ("merged in each block", "speed / without", "FLOPs / without", "accuracy", "change")
    return "\n".join(
        [
            "# Token merging",
            "",
            format_environment(environment),
            f"- model: {arguments.model.name}, {config.num_hidden_layers} blocks, {rows} x {columns} patches, "
            f"{arguments.dtype}, {arguments.batch_size} images at once on {arguments.device}",
            f"- data: {arguments.data.name}, {len(right[0]):,} images",
            "",
            "Speed is a median with [quartiles] over the batches; the change of accuracy, in percentage points, has a",
            "95 % interval over the images.",
            "",
            tabulate(titles, rows),
        ]
    )


if __name__ == "__main__":
    main()
