"""Differences between a model here and in transformers 4, both ways, and in optimum's ONNX runtime, which needs it.

transformers 4 and 5 do not live in one environment: another one is made, once, into which transformers 4 and
optimum-onnx are installed with their own torch (some 6 GB). Prints a markdown table; ends with status 1 if a difference
exceeds the bound.

Example:
    python tests/benchmarks/transformers_4.py --environment path/to/transformers_4 --output transformers_4.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTImageProcessor


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_output
from benchmarks.environment import describe_environment, format_environment
from benchmarks.peers import make_images, max_difference, randomise
from model_cards.pages import tabulate
from modeling_vit_custom import ViTCustomForImageClassification, preset_config
from modeling_vit_custom.convert import convert, export


BOUND = 1e-5
REQUIREMENTS = ("optimum-onnx[onnxruntime]>=0.1", "transformers>=4.57,<5")
PRESETS = (
    "vit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "pvt_tiny_224",
    "swin_tiny_patch4_window7_224",
)
COLUMNS = ("architecture", "ours there", "ours in optimum's ONNX runtime", "written there, here", "largest output")
LEGEND = """\
Largest absolute difference of logits in fp32 over two images, random weights. Ours go there by `--to transformers`, and
are opened by the Auto class and by optimum's `ORTModelForImageClassification`; what transformers 4 then writes with
other weights is converted here."""

# Runs in the other environment: opens what was exported, and writes a model of its own kind with other weights.
THERE = """
import json, sys
import torch, transformers
from optimum.onnxruntime import ORTModelForImageClassification
from transformers import AutoModelForImageClassification

folder = sys.argv[1]
images = torch.load(folder + "/images.pt", weights_only=True)
model = AutoModelForImageClassification.from_pretrained(folder + "/ours").eval()
graph = ORTModelForImageClassification.from_pretrained(folder + "/ours", export=True)
with torch.no_grad():
    answer = {"there": model(images).logits, "graph": graph(images).logits}
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    answer["written"] = model(images).logits
model.save_pretrained(folder + "/theirs")
torch.save(answer, folder + "/answer.pt")
print(json.dumps(transformers.__version__))
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        python = make_environment(arguments.environment or Path(temporary, "environment"))
        rows, versions = [], set()
        for preset in PRESETS:
            folder = Path(temporary, preset)
            folder.mkdir()
            row, version = measure(preset, folder, python)
            rows.append(row)
            versions.add(version)
            print(f"{preset}: {row}", file=sys.stderr)
    environment = describe_environment("transformers_4.py", argv, "cpu")
    environment["versions"] += f"; there transformers {', '.join(sorted(versions))}"
    cells = [(preset, *(f"{value:.1e}" for value in row)) for preset, row in zip(PRESETS, rows)]
    text = "\n\n".join(["# transformers 4", format_environment(environment), LEGEND, tabulate(COLUMNS, cells)])
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return int(not all(difference <= BOUND for row in rows for difference in row[:3]))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, metavar="FOLDER", help="to keep and use again (a temporary one)")
    add_output(parser, "markdown file to write as well")
    return parser.parse_args(argv)


def make_environment(folder: Path) -> Path:
    """Its interpreter; what is there already is not installed again."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python


@torch.no_grad()
def measure(preset: str, folder: Path, python: Path) -> tuple[list[float], str]:
    """Differences in the order of `COLUMNS`, and the version of transformers there."""
    model = randomise(ViTCustomForImageClassification(preset_config(preset, num_labels=10))).eval()
    images = make_images(2, model.config.native_size[0])
    torch.save(images, folder / "images.pt")
    (folder / "ours").mkdir()
    export(model, ViTImageProcessor(), "transformers", folder / "ours")
    expected = model(images).logits  # after the export, which may share tensors
    done = subprocess.run([python, "-I", "-c", THERE, folder], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"transformers_4.py: error: {done.stderr[-2000:]}")
    answer: dict[str, Tensor] = torch.load(folder / "answer.pt", weights_only=True)
    back, _ = convert(folder / "theirs")
    differences = [
        max_difference(answer["there"], expected),
        max_difference(answer["graph"], expected),
        max_difference(back(images).logits, answer["written"]),
        expected.abs().max().item(),
    ]
    return differences, json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
