"""Draw what a trained model has learnt, and what it looks at in some images.

Filters, similarity of positions and attention distance come as in figure 7 of the ViT paper. Maps of what a prediction
rests on are scored by insertion and deletion, which tell how far to trust each of them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
)
from transformers.utils import logging

from modeling_vit_custom import ViTCustomForImageClassification
from modeling_vit_custom.command_line import Parser, positive, report_user_errors
from modeling_vit_custom.convert import from_transformers
from modeling_vit_custom.images import ClippedImageError, to_rgb
from modeling_vit_custom.interpretability import (
    attention_distance,
    explain,
    feature_colors,
    has_positions,
    image_features,
    nearest_images,
    position_similarity,
    predict_at_sizes,
    principal_filters,
    score_map,
    to_pixels,
)
from modeling_vit_custom.interpretability.figures import (
    plot_attention_distance,
    plot_filters,
    plot_maps,
    plot_neighbours,
    plot_position_similarity,
    plot_sizes,
)
from modeling_vit_custom.modeling_vit_custom import ViTCustomPreTrainedModel


PROGRAM = "python -m modeling_vit_custom.interpretability"
EXAMPLES = f"""\
examples:
  {PROGRAM} runs/mine photo.jpg other.png
  {PROGRAM} user/name path/to/images --output_dir figures --batch_size 64
  {PROGRAM} runs/mine photo.jpg --neighbours path/to/training/images --image_size 384"""

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}
FIGURE_DPI = 150
MAX_SHOWN = 8
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


class Images:
    """Images of files and folders, prepared in batches (B, C, H, W) as often as they are asked for.

    Raises:
        ValueError: if there are none, or one cannot be read.
    """

    def __init__(self, places: list[Path], processor: BaseImageProcessor, batch_size: int, device: torch.device):
        self.files = [file for place in places for file in find_images(place)]
        self.processor, self.batch_size, self.device = processor, batch_size, device

    def batches(self, title: str) -> Iterator[Tensor]:
        starts = range(0, len(self.files), self.batch_size)
        for start in tqdm(starts, desc=title, unit="batch", disable=len(starts) == 1):
            yield self.prepare(self.files[start : start + self.batch_size])

    def prepare(self, files: list[Path]) -> Tensor:
        """(B, C, H, W)"""
        images = [read_image(file) for file in files]
        return self.processor(images, return_tensors="pt")["pixel_values"].to(self.device)

    def show(self, pixel_values: Tensor) -> list[np.ndarray]:
        """Prepared images as arrays (H, W, C) of 8 bits."""
        mean, std = (torch.tensor(getattr(self.processor, f"image_{name}")) for name in ("mean", "std"))
        pixels = pixel_values.cpu().permute(0, 2, 3, 1) * std + mean
        return list((255 * pixels).round().clamp(0, 255).byte().numpy())


def main(argv: list[str] | None = None) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with report_user_errors("interpretability"):
        arguments = parse_arguments(argv)
        model, processor = load(arguments.checkpoint, arguments.image_size)
        images = Images(arguments.images, processor, arguments.batch_size, model.device)
        others = [arguments.neighbours] if arguments.neighbours else []
        neighbours = Images(others, processor, arguments.batch_size, model.device)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        figures, report = analyse(model, images, neighbours)
    for name, figure in figures.items():
        figure.savefig(arguments.output_dir / f"{name}.png", dpi=FIGURE_DPI)
    (arguments.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_report(report)
    print(f"\n{', '.join(f'{name}.png' for name in figures)} and report.json are in {arguments.output_dir}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__, EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or user/name of a ViT, DeiT, PVT or Swin")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="files, or folders of them")
    parser.add_argument("--output_dir", type=Path, default=Path("interpretability"), help="(interpretability)")
    parser.add_argument("--image_size", type=positive, metavar="N", help="side in pixels; by default the model's own")
    parser.add_argument("--batch_size", type=positive, default=16, metavar="N", help="images at once (16)")
    parser.add_argument("--neighbours", type=Path, metavar="DIR", help="find the most similar images in this folder")
    return parser.parse_args(argv)


def find_images(place: Path) -> list[Path]:
    """Raises ValueError if there are none."""
    if not place.exists():
        raise ValueError(f"there is no {str(place)!r}")
    if place.is_file():
        return [place]
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{str(place)!r} holds no images ({', '.join(sorted(SUFFIXES))})")
    return files


def read_image(file: Path) -> Image.Image:
    """Raises ValueError if it cannot be read."""
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except ClippedImageError as error:
        raise ValueError(f"{str(file)!r} {error}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as an image: {error}") from error


def load(checkpoint: str, image_size: int | None) -> tuple[ViTCustomPreTrainedModel, BaseImageProcessor]:
    """A model of the family, or one of transformers' in its form, and its processor for images of a size.

    Raises:
        ValueError: if there is none, or it is of another family.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint!r} is no checkpoint that opens: {error}") from error
    classifies = "ForImageClassification" in (config.architectures or [""])[0]  # DeiT's ends ...WithTeacher
    model = (AutoModelForImageClassification if classifies else AutoModel).from_pretrained(checkpoint)
    if not isinstance(model, ViTCustomPreTrainedModel):
        model = from_transformers(model)
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    if image_size is not None:
        processor.size = processor.crop_size = {"height": image_size, "width": image_size}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), processor


def analyse(
    model: ViTCustomPreTrainedModel, images: Images, neighbours: Images
) -> tuple[dict[str, Figure], dict[str, object]]:
    """Figures by their names, and the numbers behind them."""
    shown = images.prepare(images.files[:MAX_SHOWN])
    pictures, titles = images.show(shown), [file.stem[:24] for file in images.files[:MAX_SHOWN]]
    components, shares = principal_filters(model)
    distance = attention_distance(model, images.batches("attention distance"))
    figures = {
        "filters": plot_filters(components, shares),
        "attention_distance": plot_attention_distance(distance.heads, distance.uniform),
        "features": plot_maps(pictures, titles, {"features": show_colors(model, shown)}),
    }
    report = {
        "images": len(images.files),
        "image_size": list(shown.shape[2:]),
        "filters_variance": shares.tolist(),
        "attention_distance": distance.heads,
        "even_attention_distance": distance.uniform,
    }
    if has_positions(model):
        figures["positions"] = plot_position_similarity(position_similarity(model))
    if isinstance(model, ViTCustomForImageClassification):
        maps, size = explain(model, shown), tuple(shown.shape[2:])
        figures["maps"] = plot_maps(
            pictures, titles, {name: list(to_pixels(model, each, size)) for name, each in maps.items()}
        )
        scores = {name: score_map(model, shown, each) for name, each in maps.items()}
        report["insertion"] = {name: score.insertion.mean().item() for name, score in scores.items()}
        report["deletion"] = {name: score.deletion.mean().item() for name, score in scores.items()}
        side, patch = min(size), model.config.stages[0].patch_size
        sides = [round(side * scale) for scale in SCALES if round(side * scale) >= patch]
        sizes = predict_at_sizes(model, shown, sides)
        figures["sizes"] = plot_sizes(sizes, side, titles)
    if neighbours.files:
        features = image_features(model, neighbours.batches("features"))
        indices, similarities = nearest_images(image_features(model, [shown]), features)
        found = [images.show(neighbours.prepare([neighbours.files[index] for index in row])) for row in indices]
        figures["neighbours"] = plot_neighbours(pictures, titles, found, similarities)
    return figures, report


def show_colors(model: ViTCustomPreTrainedModel, pixel_values: Tensor) -> list[Tensor]:
    """The patches' features as colours at the size of the images, each (H, W, 3)."""
    channels = feature_colors(model, pixel_values).permute(0, 3, 1, 2)
    spread = to_pixels(model, channels.flatten(0, 1), tuple(pixel_values.shape[2:]), is_smooth=False)
    return list(spread.unflatten(0, channels.shape[:2]).permute(0, 2, 3, 1))


def print_report(report: dict) -> None:
    """The numbers that a reader would look for first."""
    first, last = (np.mean(report["attention_distance"][block]) for block in (0, -1))
    print(f"\nMean attention distance over {report['images']} images: {first:.1f} pixels in the first block,")
    print(f"{last:.1f} in the last; even attention would have {report['even_attention_distance'][-1]:.1f} there.")
    if "insertion" in report:
        print("\nWhat the predictions rest on, by        insertion (high is good)   deletion (low is good)")
        for name, value in report["insertion"].items():
            print(f"  {name:<35}   {value:>8.3f}   {report['deletion'][name]:>22.3f}")


if __name__ == "__main__":
    main()
