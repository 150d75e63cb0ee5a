"""Differences between models of full size and their graphs: ONNX by onnxruntime, and `torch.export`, saved and loaded.

Prints a markdown table; ends with status 1 if a difference exceeds the bound.

Example:
    python tests/benchmarks/graphs.py --output graphs.md
"""

import argparse
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor
from tqdm import tqdm


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_output
from benchmarks.environment import describe_environment, format_environment
from benchmarks.peers import make_images, max_difference, randomise
from model_cards.pages import tabulate
from modeling_vit_custom import ViTCustomForImageClassification, list_presets, preset_config
from modeling_vit_custom.convert import to_exported_program, to_onnx


BOUND = 1e-5
PRESETS = (
    "vit_base_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "pvt_tiny_224",
    "swin_tiny_patch4_window7_224",
)
# Native, larger, and with sides that neither patches nor windows divide; (B, H, W).
BATCHES = ((1, 224, 224), (3, 320, 256), (2, 203, 251))
COLUMNS = (
    "preset",
    *(f"ONNX, {batch} x {height} x {width}" for batch, height, width in BATCHES),
    *(f"torch.export, {batch} x {height} x {width}" for batch, height, width in BATCHES),
    "largest output",
    "model.onnx, MB",
)
LEGEND = """\
Largest absolute difference of logits in fp32 between a model with random weights and its graph, which was made once, at
another size, and takes all of these: images x height x width."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    rows = [measure(preset) for preset in tqdm(arguments.presets, unit="preset")]
    environment = describe_environment("graphs.py", argv, "cpu")
    environment["versions"] += f", onnxruntime {onnxruntime.__version__}"
    table = tabulate(COLUMNS, [row for row, _ in rows])
    text = "\n\n".join(["# Graphs", format_environment(environment), LEGEND, table])
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return int(not all(is_good for _, is_good in rows))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list_presets(), default=PRESETS, metavar="NAME")
    add_output(parser, "markdown file to write as well")
    return parser.parse_args(argv)


@torch.no_grad()
def measure(preset: str) -> tuple[list[str], bool]:
    """The cells of a row in the order of `COLUMNS`, and whether all differences are within the bound."""
    model = randomise(ViTCustomForImageClassification(preset_config(preset))).eval()
    batches = [make_images(count, size) for count, *size in BATCHES]
    expected = [model(images).logits for images in batches]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "model.onnx"), Path(folder, "model.pt2")
        to_onnx(model).save(files[0])
        torch.export.save(to_exported_program(model), files[1])
        session, program = onnxruntime.InferenceSession(files[0]), torch.export.load(files[1]).module()
        megabytes = files[0].stat().st_size / 1e6

    def by_onnx(images: Tensor) -> Tensor:
        return torch.tensor(session.run(["logits"], {"pixel_values": images.numpy()})[0])

    differences = [max_difference(by_onnx(images), logits) for images, logits in zip(batches, expected)]
    differences += [max_difference(program(images)[0], logits) for images, logits in zip(batches, expected)]
    largest = max(logits.abs().max().item() for logits in expected)
    cells = [preset, *(f"{each:.1e}" for each in differences), f"{largest:.2f}", f"{megabytes:.0f}"]
    return cells, all(each <= BOUND for each in differences)


if __name__ == "__main__":
    sys.exit(main())
