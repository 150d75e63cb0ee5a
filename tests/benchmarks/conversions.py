"""Differences between a model as its own library opens it and as it is converted, for every format of a checkpoint.

The files are made here, with random weights, exactly as the library or the paper's code writes them. Prints a markdown
table; ends with status 1 if a difference exceeds the bound.

Example:
    python tests/benchmarks/conversions.py --output conversions.md
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_output
from benchmarks.environment import describe_environment, format_environment
from benchmarks.foreign_files import PUBLISHED, SOURCES, TINY, Sizes, has_counterpart, outputs_of
from benchmarks.peers import make_images, max_difference, randomise
from model_cards.pages import tabulate
from modeling_vit_custom.convert import convert, from_timm, from_transformers, to_npz, to_timm, to_transformers


BOUND = 1e-5
COLUMNS = (
    "source",
    "architecture",
    "parameters",
    "largest difference",
    "largest output",
    *(f"to {library}: difference, back" for library in ("timm", "transformers", "npz")),
)
WAYS = {
    "timm": (to_timm, from_timm),
    "transformers": (to_transformers, from_transformers),
    "npz": (to_npz, None),
}
LEGEND = """\
Largest absolute difference in fp32 over {images} images. A way back is judged by what it gives, and by whether every
tensor of our model is the same, bit for bit, once it is there and back again; '-' where the library has no such model,
which is refused; '*' where its norms have another epsilon.

Not tried, and why: the published files themselves (no network); PVT's, Swin's, MAE's and SimMIM's own code (not on a
package registry: files are made of transformers' and timm's models, by the names in the papers' repositories, and
their own code has not opened them); Google's code (the same, judged by a timm model with GELU by tanh, as flax has it).
Files that transformers 4 wrote are in transformers_4.md. Not opened: big_vision's models with attention pooling or with
positions that their files do not hold, which this family does not have; what timm and transformers have besides ViT,
DeiT, PVT v1 and Swin."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    sizes = TINY if arguments.tiny else PUBLISHED
    rows = [measure(source, sizes, arguments.images) for source in tqdm(SOURCES, unit="source")]
    environment = describe_environment("conversions.py", argv, "cpu")
    environment["versions"] += f", torchvision {torchvision.__version__}"
    text = "\n\n".join(
        [
            "# Conversions",
            format_environment(environment),
            LEGEND.format(images=arguments.images),
            tabulate(COLUMNS, [row for row, _ in rows]),
        ]
    )
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return int(not all(is_good for _, is_good in rows))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, in seconds")
    parser.add_argument("--images", type=int, default=2, help="images (2)")
    add_output(parser, "markdown file to write as well")
    return parser.parse_args(argv)


@torch.inference_mode()
def measure(source: tuple[str, str], sizes: Sizes, count: int) -> tuple[tuple[str, ...], bool]:
    """The cells of a row in the order of `COLUMNS`, and whether all of it is within the bound."""
    with tempfile.TemporaryDirectory() as folder:
        made = SOURCES[source](Path(folder), sizes)
        ours, _ = convert(made.path)
    images = make_images(count, made.image_size)
    expected, got = outputs_of(made.peer, images), outputs_of(ours, images)
    difference = max_difference(got, expected)
    ways = [
        measure_way(ours, got, images, library) if has_counterpart(source, library) else refuse(ours, library)
        for library in WAYS
    ]
    parameters = f"{ours.num_parameters() / 1e6:.1f} M"
    cells = (*source, parameters, f"{difference:.1e}", f"{expected.abs().max():.2f}", *(cell for cell, _ in ways))
    return cells, difference <= BOUND and all(is_good for _, is_good in ways)


def refuse(ours, library: str) -> tuple[str, bool]:
    """A dash where the other library has no such model, and whether that is said."""
    try:
        WAYS[library][0](ours)
    except ValueError:
        return "-", True
    return "not refused", False


def measure_way(ours, got: Tensor, images: Tensor, library: str) -> tuple[str, bool]:
    """What another library's model gives, and whether what comes back is the same."""
    there, back = WAYS[library]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        theirs = there(ours)
        if library == "npz":
            return measure_npz(ours, got, images, theirs)
    difference, is_same = max_difference(outputs_of(theirs, images), got), is_same_model(back(theirs), ours)
    has_other_epsilon = any("epsilon" in str(each.message) for each in warned)
    cell = f"{difference:.1e}{'*' * has_other_epsilon}, {'same' if is_same else 'other bits'}"
    return cell, is_same and (has_other_epsilon or difference <= BOUND)


def measure_npz(ours, got: Tensor, images: Tensor, arrays: dict[str, np.ndarray]) -> tuple[str, bool]:
    """As `measure_way`; the file is read by timm, whose reader is its own, where timm has such a model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.npz")
        np.savez(file, **arrays)
        again, _ = convert(file, **known_of(ours))
        is_same = is_same_model(again, ours)
        if ours.config.representation_size is not None or not hasattr(ours, "head"):
            return f"-, {'same' if is_same else 'other bits'}", is_same
        theirs = randomise(to_timm(ours), seed=1)
        theirs.load_pretrained(str(file))
    difference, has_other_epsilon = (
        max_difference(outputs_of(theirs.eval(), images), got),
        ours.config.layer_norm_eps != 1e-6,
    )
    cell = f"{difference:.1e}{'*' * has_other_epsilon}, {'same' if is_same else 'other bits'}"
    return cell, is_same and (has_other_epsilon or difference <= BOUND)


def known_of(model) -> dict:
    """Fields that a file without metadata does not tell."""
    names = ("image_size", "layer_norm_eps", "hidden_act", "pooling")
    return {name: getattr(model.config, name) for name in names}


def is_same_model(one, other) -> bool:
    """Whether all tensors are the same, bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


if __name__ == "__main__":
    sys.exit(main())
