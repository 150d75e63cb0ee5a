"""A classifier as the page shows it: its answers, what they rest on, and what it learnt."""

import io
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)

from modeling_vit_custom import ViTCustomForImageClassification
from modeling_vit_custom.convert import from_transformers
from modeling_vit_custom.interpretability import (
    attention_distance,
    attention_map,
    attention_rollout,
    grad_cam,
    gradient_attention,
    gradient_rollout,
    has_positions,
    leaves_map,
    position_similarity,
    principal_filters,
    to_pixels,
    to_probabilities,
)
from modeling_vit_custom.interpretability.figures import (
    overlay,
    plot_attention_distance,
    plot_filters,
    plot_position_similarity,
)


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GRAD_CAM, ROLLOUT, GRADIENT_ROLLOUT = "Grad-CAM", "Attention rollout", "Gradient-weighted rollout"
GRADIENT_ATTENTION, ATTENTION = "Gradient-weighted attention", "Attention"
# Of one layer; the others are of the whole model.
BY_LAYER = (GRADIENT_ATTENTION, ATTENTION)
MAX_SHOWN_SIDE, MIN_SHOWN_SIDE = 640, 320
FIGURE_DPI = 110


class UnusableModelError(ValueError):
    """The model that was asked for cannot be shown; the message is one line for the person who asked."""


@dataclass(frozen=True)
class Classifier:
    """A model with its image processor.

    Attributes:
        name: What visitors see.
        model: Any image classifier.
        image_processor: Its own.
        labels: One for each class, no two alike.
        transparent: The model in the family's form, which can be looked into; none for one of another kind.
        card: Where its card and the figures in it lie, if anywhere.
        address: Its page on the Hub, if it is from there.
    """

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    labels: tuple[str, ...]
    transparent: ViTCustomForImageClassification | None = None
    card: Path | None = None
    address: str | None = None
    learnt: dict[str, Image.Image] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------------------- answers

    @torch.inference_mode()
    def classify(self, image: Image.Image, top_k: int) -> dict[str, float]:
        """The `top_k` most likely labels with their probabilities, the most likely first."""
        logits = self.model(self.prepare(image)).logits[0].float()
        return self.name_likeliest(logits, top_k)

    @torch.inference_mode()
    def classify_at(self, image: Image.Image, size: tuple[int, int], top_k: int) -> dict[str, float]:
        """The same for the image at another size (H, W)."""
        return self.name_likeliest(self.transparent(self.prepare(image, size)).logits[0].float(), top_k)

    def name_likeliest(self, logits: Tensor, top_k: int) -> dict[str, float]:
        probabilities = to_probabilities(logits, self.model.config)
        values, indices = probabilities.topk(min(top_k, len(self.labels)))
        return {self.labels[index]: value for index, value in zip(indices.tolist(), values.tolist(), strict=True)}

    def prepare(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """An image as the model takes it, (1, C, H, W); a size (H, W) is for another one than its own."""
        options = {}
        if size is not None:
            image = image.crop(self.find_frame(image))
            options = {"size": {"height": size[0], "width": size[1]}, "do_center_crop": False}
        pixels = self.image_processor(images=image, return_tensors="pt", **options)["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def find_frame(self, image: Image.Image) -> tuple[int, int, int, int]:
        """The box of an image that the model sees: all of it, or the middle that its processor cuts out."""
        if not getattr(self.image_processor, "do_center_crop", False):
            return (0, 0, image.width, image.height)
        size, crop = dict(self.image_processor.size), dict(self.image_processor.crop_size)
        shorter = min(image.size)
        edges = []
        for side, name in zip(image.size, ("width", "height")):
            scale = shorter / size["shortest_edge"] if "shortest_edge" in size else side / size[name]
            seen = min(side, crop[name] * scale)
            edges.append(((side - seen) / 2, (side + seen) / 2))
        (left, right), (top, bottom) = edges
        return tuple(round(edge) for edge in (left, top, right, bottom))

    # ---------------------------------------------------------------------------------------------------------- maps

    def size_at(self, scale: float) -> tuple[int, int]:
        """The model's own size (H, W) in pixels, times a number."""
        height, width = self.transparent.config.native_size
        return round(height * scale), round(width * scale)

    @property
    def has_positions(self) -> bool:
        return has_positions(self.transparent)

    @property
    def methods(self) -> list[str]:
        """The ways to see what a prediction rests on that have a meaning for this model."""
        if self.transparent is None:
            return []
        rollouts = [ROLLOUT, GRADIENT_ROLLOUT] if self.transparent.config.is_plain else []
        return [*([GRAD_CAM] if leaves_map(self.transparent) else []), *rollouts, GRADIENT_ATTENTION, ATTENTION]

    @property
    def heads(self) -> list[int]:
        """The heads of each layer."""
        return [stage.num_attention_heads for stage in self.transparent.config.stages for _ in range(stage.depth)]

    def explain(
        self,
        image: Image.Image,
        method: str,
        layer: int,
        head: int,
        label: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> Image.Image:
        """The image in grey, and over it from black to yellow how much each part counts.

        Args:
            image: In RGB.
            method: One of `methods`.
            layer: From 1, for the methods in `BY_LAYER`.
            head: From 1, for attention; 0 is the mean over all heads.
            label: What is to be explained: by default the likeliest class.
            size: (H, W) in pixels, if not the model's own.
        """
        pixels, model = self.prepare(image, size), self.transparent
        classes = None if label is None else torch.tensor([self.labels.index(label)], device=pixels.device)
        if method == GRAD_CAM:
            weights = grad_cam(model, pixels, classes)[0][0]
        elif method == ROLLOUT:
            weights = attention_rollout(model, pixels)[0]
        elif method == GRADIENT_ROLLOUT:
            weights = gradient_rollout(model, pixels, classes)[0]
        elif method == GRADIENT_ATTENTION:
            weights = gradient_attention(model, pixels, layer - 1, classes)[0]
        else:
            heads = attention_map(model, pixels, layer - 1)[0]
            weights = heads[head - 1] if head else heads.mean(dim=0)
        weights = to_pixels(model, weights[None], tuple(pixels.shape[2:]))[0]
        return Image.fromarray(overlay(frame_to_show(image.crop(self.find_frame(image))), weights))

    # -------------------------------------------------------------------------------------------------------- learnt

    def draw_learnt(self, photographs: list[Image.Image]) -> dict[str, Image.Image]:
        """Figures 7 left, centre and right of the ViT paper, as far as they have a meaning; drawn once."""
        if not self.learnt:
            model = self.transparent
            drawn = {"filters": to_image(plot_filters(*principal_filters(model)))}
            if has_positions(model):
                drawn["positions"] = to_image(plot_position_similarity(position_similarity(model)))
            if photographs:
                distance = attention_distance(model, (self.prepare(photograph) for photograph in photographs))
                drawn["distance"] = to_image(plot_attention_distance(distance.heads, distance.uniform))
            self.learnt.update(drawn)
        return self.learnt


def frame_to_show(image: Image.Image) -> np.ndarray:
    """An image as an array, neither too large nor too small to look at."""
    scale = min(1.0, MAX_SHOWN_SIDE / max(image.size))
    if max(image.size) < MIN_SHOWN_SIDE:
        scale = MIN_SHOWN_SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return np.asarray(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS))


def to_image(figure: Figure) -> Image.Image:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=FIGURE_DPI)
    return Image.open(drawn).convert("RGB")


# -------------------------------------------------------------------------------------------------------------- loading


def load_classifier(model: str, trust_remote_code: bool = False, revision: str | None = None) -> Classifier:
    """Load a folder written by `save_pretrained`, or a model of the Hub, or raise UnusableModelError."""
    is_folder = Path(model).is_dir()
    # A folder of runs also looks like a Hub id. It must never become one: anybody could own that name there.
    if not is_folder and model.startswith("runs/"):
        raise UnusableModelError(f"there is no model in {model!r}: run `make quickstart` first or pass --model")
    expected = "pass --model a folder written by save_pretrained or a Hub id such as user/name"
    if not is_folder and not HUB_ID.fullmatch(model):
        raise UnusableModelError(f"there is no folder {model!r}: {expected}")
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        image_processor = AutoImageProcessor.from_pretrained(model, **options)
        network, loading = AutoModelForImageClassification.from_pretrained(model, **options, output_loading_info=True)
        labels = distinct_labels(network.config.id2label)
    except Exception as error:
        # Broken files and foreign code fail in too many ways to list; each of them means that this model is unusable.
        reason = next(iter(str(error).strip().splitlines()), "no reason given").rstrip(" .")
        if "trust_remote_code" in str(error) and not trust_remote_code:
            expected = "read that code and pass --trust_remote_code if you trust it"
        raise UnusableModelError(f"cannot load {model!r} ({type(error).__name__}: {reason}): {expected}") from error
    # transformers fills what the checkpoint lacks with random numbers, and a random head gives random answers.
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UnusableModelError(f"{model!r} is no trained classifier, it lacks {missing}: {expected}")
    network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    transparent = make_transparent(network)
    # One copy of the weights is enough, but a converted Swin differs where its windows do not fill the grid.
    is_same = transparent is not None and network.config.model_type != "swin"
    return Classifier(
        name=Path(model).resolve().name if is_folder else model,
        model=transparent if is_same else network,
        image_processor=image_processor,
        labels=labels,
        transparent=transparent,
        card=find_card(model, revision),
        address=None if is_folder else f"https://huggingface.co/{model}",
    )


def make_transparent(model: PreTrainedModel) -> ViTCustomForImageClassification | None:
    """A model that can be looked into, if it is a ViT, a DeiT, a PVT or a Swin."""
    if not isinstance(model, ViTCustomForImageClassification):
        try:
            model = from_transformers(model).to(model.device)
        except ValueError:
            return None
    return model.requires_grad_(False)


def find_card(model: str, revision: str | None) -> Path | None:
    """The folder of a model's card; on the Hub it is fetched, if it can be."""
    folder = Path(model)
    if not folder.is_dir():
        with suppress(Exception):  # the demo works without it
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=["README.md", "*.png"]))
    return folder if (folder / "README.md").is_file() else None


def distinct_labels(id2label: dict[int, str]) -> tuple[str, ...]:
    """The label of every class in order; a label of two classes gets the class number (ImageNet has two cranes)."""
    labels = [str(id2label[index]) for index in range(len(id2label))]
    shared = {label for label, count in Counter(labels).items() if count > 1}
    return tuple(f"{label} ({index})" if label in shared else label for index, label in enumerate(labels))
