"""What images become in the encoder: features of patches and of whole images, and what the size changes."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_vit_custom import ViTCustomForImageClassification, ViTCustomPreTrainedModel
from .attention import place, prepare_images, to_probabilities


@torch.no_grad()
def feature_colors(model: ViTCustomPreTrainedModel, pixel_values: Tensor) -> Tensor:
    """The first three principal components of the patches' features as colours: (B, C, H, W) -> (B, h, w, 3) in 0..1.

    The components are those of all the images together, so that equal colours mean alike features. Each channel runs
    from the first to the last percent of its values.
    """
    encoder = model.base_model
    hidden, blocks = prepare_images(encoder, pixel_values)
    for block in blocks:
        hidden, _ = block.run(hidden)
    features = encoder.norm(hidden).float()[:, encoder.config.num_prefix_tokens :]
    flat = features.flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    directions = directions[:3]
    # The sign of a component means nothing: fix it, or colours would differ from machine to machine.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    colors = flat @ (directions * largest.sign()).T
    colors = F.pad(colors, (0, 3 - colors.shape[1]))  # of less than three patches or channels
    low, high = colors.quantile(0.01, dim=0), colors.quantile(0.99, dim=0)
    colors = ((colors - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    grid = encoder.feature_grids(tuple(pixel_values.shape[-2:]))[-1]
    return colors.unflatten(0, (pixel_values.shape[0], *grid))


@torch.no_grad()
def image_features(model: ViTCustomPreTrainedModel, batches: Iterable[Tensor]) -> Tensor:
    """The encoder's pooled features of batches of images (B, C, H, W), one row an image, on the CPU."""
    return torch.cat(
        [model.base_model(place(model, pixel_values)).pooler_output.float().cpu() for pixel_values in batches]
    )


def nearest_images(queries: Tensor, features: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """Rows of `features` (M, D) most like each of `queries` (B, D): indices (B, count), cosine similarities."""
    similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(features.float(), dim=-1).T
    similarities, indices = similarity.topk(min(count, features.shape[0]), dim=1)
    return indices, similarities


@torch.no_grad()
def predict_at_sizes(
    model: ViTCustomForImageClassification, pixel_values: Tensor, sizes: Iterable[int]
) -> dict[int, Tensor]:
    """Probabilities (B, L) of the same images resized so that their shorter side has each of these sizes."""
    height, width = pixel_values.shape[-2:]
    probabilities = {}
    for size in sizes:
        scale = size / min(height, width)
        resized = (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixel_values.float(), resized, mode="bicubic", antialias=scale < 1)
        probabilities[size] = to_probabilities(model(place(model, pixels)).logits, model.config)
    return probabilities
