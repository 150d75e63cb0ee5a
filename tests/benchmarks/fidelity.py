"""Differences between the outputs of our models and those of transformers and timm, on the same random weights.

Prints a markdown table; ends with status 1 if a difference exceeds the bound.

Example:
    python tests/benchmarks/fidelity.py --models ViT-B Swin-T --output fidelity.md
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_device, add_output
from benchmarks.environment import describe_environment, format_environment
from benchmarks.peers import (
    ARCHITECTURES,
    VERSIONS,
    attention_of,
    build_pairs,
    make_images,
    max_difference,
    set_attention,
)
from model_cards.pages import tabulate
from modeling_vit_custom.command_line import positive


MODELS = ["ViT-B", "DeiT-S distilled", "DeiT III-S", "PVT-T", "Swin-T", "ViTMAE-B"]
IMPLEMENTATIONS = ("eager", "sdpa")
BOUND = 1e-5
COLUMNS = ("architecture", "source", "output", "attention, ours", "attention, theirs", "max difference", "max value")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    lines = [
        "# Fidelity",
        format_environment(describe_environment("fidelity.py", argv, arguments.device)),
        f"Largest absolute difference in fp32 over {arguments.batch_size} images of {arguments.image_size} pixels, all "
        f"parameters random (seed {arguments.seed}); bound {BOUND:g}.",
    ]
    # A convolution in TF32 keeps ten bits: on a GPU that would be the difference measured.
    with torch.backends.cudnn.flags(allow_tf32=False):
        rows = measure(arguments)
    cells = [(*row[:-2], f"{row[-2]:.1e}", f"{row[-1]:.2f}") for row in rows]
    text = "\n\n".join([*lines, tabulate(COLUMNS, cells)]) + "\n"
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)
    return int(not all(row[-2] <= BOUND for row in rows))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(ARCHITECTURES), default=MODELS, metavar="MODEL",
                        help=f"of {', '.join(ARCHITECTURES)} (default: {', '.join(MODELS)})")  # fmt: skip
    parser.add_argument("--image_size", type=positive, default=224, help="side in pixels (default: 224)")
    parser.add_argument("--batch_size", type=positive, default=2, help="images (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
    add_device(parser, "cpu")
    add_output(parser, "markdown file to write as well")
    return parser.parse_args(argv)


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> list[tuple]:
    """One row for each pair, output and attention implementation, in the order of `COLUMNS`."""
    images = make_images(arguments.batch_size, arguments.image_size, arguments.seed).to(arguments.device)
    total = sum(len(ARCHITECTURES[name]) for name in arguments.models)
    rows = []
    for pair in tqdm(build_pairs(arguments.models, arguments.image_size, arguments.seed), total=total, unit="pair"):
        source = f"{pair.library} {VERSIONS[pair.library]}"
        peer, ours = pair.peer.to(arguments.device), pair.ours.to(arguments.device)
        for implementation in IMPLEMENTATIONS:
            set_attention(peer, implementation)
            set_attention(ours, implementation)
            expected, got = outputs_of(peer, images), outputs_of(ours, images)
            for name, value in expected.items():
                attentions = attention_of(ours), attention_of(peer)
                difference = max_difference(got[name], value)
                rows.append((pair.architecture, source, name, *attentions, difference, value.abs().max().item()))
    return rows


def outputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The logits, or of a masked autoencoder the reconstruction and the loss, for a fixed choice of patches."""
    if not type(model).__name__.endswith("ForPreTraining"):
        output = model(images)
        return {"logits": output if isinstance(output, Tensor) else output.logits}
    count = (images.shape[2] // model.config.patch_size) * (images.shape[3] // model.config.patch_size)
    noise = torch.rand(images.shape[0], count, generator=torch.Generator().manual_seed(0)).to(images.device)
    output = model(images, noise=noise)
    return {"reconstruction": output.logits, "loss": output.loss}


if __name__ == "__main__":
    sys.exit(main())
