"""What a trained model looks at: pure functions of a model and normalised images.

They work with any attention implementation. Shapes: B images, C channels, (H, W) pixels, (h, w) grid, L labels.
"""

import torch
from torch import Tensor

from .modeling_vit_custom import ViTCustomForImageClassification, to_image


def leaves_map(model: ViTCustomForImageClassification) -> bool:
    """Whether `grad_cam` can say something: a class token must not be all that the last stage's patches feed."""
    return model.config.pooling != "cls" or model.config.stages[-1].depth > 1


def grad_cam(
    model: ViTCustomForImageClassification, pixel_values: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where the evidence for a class lies: (B, C, H, W) -> maps (B, h, w) from 0 to 1, and logits (B, L).

    Grad-CAM, https://arxiv.org/abs/1610.02391, equations 1 and 2, on the patches of the last stage: before its last
    block where a class token is pooled, since what comes after does not read the patches, and after it otherwise.

    Args:
        model: A classifier of at least two blocks in its last stage, if it pools a class token.
        pixel_values: Normalised images.
        classes: (B,); the likeliest ones by default.

    Raises:
        ValueError: if no block mixes the patches into the class token.
    """
    config = model.config
    if not leaves_map(model):
        raise ValueError("a class token that one block reads into leaves no map: the last stage needs two blocks")
    with torch.enable_grad():
        # Through the pixels, since an encoder may be frozen.
        outputs = model(pixel_values.detach().requires_grad_(), output_hidden_states=True)
        tokens = outputs.hidden_states[-2 if config.pooling == "cls" else -1]
        chosen = outputs.logits.argmax(dim=-1) if classes is None else classes
        (gradients,) = torch.autograd.grad(outputs.logits.gather(1, chosen[:, None]).sum(), tokens)
    patches, gradients = (each.detach().float()[:, config.num_prefix_tokens :] for each in (tokens, gradients))
    weights = gradients.mean(dim=1, keepdim=True)
    grid = model.model.feature_grids(tuple(pixel_values.shape[-2:]))[-1]
    maps = to_image((patches * weights).sum(dim=-1, keepdim=True), grid)[:, 0].relu()
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12), outputs.logits.detach()
