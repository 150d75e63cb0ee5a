"""One tiny configuration for each architecture, and models of it whose weights are far from their initial values."""

import torch
from torch import Tensor

from modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomConfig,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
)


_SHARED = {
    "image_size": 32,
    "num_labels": 5,
    "mask_patch_size": 8,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
_ONE_STAGE = {
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_FIELDS = {
    "vit": _ONE_STAGE,
    "deit": {**_ONE_STAGE, "use_distillation_token": True},
    "pvt": {
        "patch_size": [4, 2],
        "patch_norm": True,
        "hidden_sizes": [16, 32],
        "depths": [1, 2],
        "num_attention_heads": [1, 2],
        "intermediate_size": [32, 64],
        "sr_ratios": [2, 1],
    },
    "swin": {
        "patch_size": [2, 2],
        "patch_norm": True,
        "patch_merging": True,
        "hidden_sizes": [16, 32],
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "intermediate_size": [32, 64],
        "window_size": 4,
        "use_class_token": False,
        "pooling": "mean",
        "position_embedding_type": "none",
        "layer_norm_eps": 1e-5,
    },
}
ARCHITECTURES = list(_FIELDS)
ONE_STAGE_ARCHITECTURES = ["vit", "deit"]
# Each head with the architectures that it serves.
HEADS = {
    ViTCustomModel: ARCHITECTURES,
    ViTCustomForImageClassification: ARCHITECTURES,
    ViTCustomForPreTraining: ONE_STAGE_ARCHITECTURES,
    ViTCustomForMaskedImageModeling: ARCHITECTURES,
    ViTCustomBackbone: ARCHITECTURES,
}
HEADS_AND_ARCHITECTURES = [(head, architecture) for head, names in HEADS.items() for architecture in names]


def tiny_config(architecture: str, **fields) -> ViTCustomConfig:
    """Two stages at most, four blocks at most, images of 32 pixels, five labels."""
    return ViTCustomConfig(**{**_SHARED, **_FIELDS[architecture], **fields})


def tiny_model(head: type, architecture: str, seed: int = 0, **fields):
    """A model in evaluation mode, with weights so large that every part of it shows in the output."""
    model = head(tiny_config(architecture, **fields))
    return scramble(model, seed).eval()


def scramble(model, seed: int = 0):
    """Draw all trainable weights anew: norms and scales around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def random_images(batch_size: int = 2, height: int = 32, width: int = 32, seed: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(batch_size, channels, height, width, generator=torch.Generator().manual_seed(seed))


def main_output(model, images: Tensor) -> Tensor:
    """What a head is for, with the randomness of masks taken out."""
    if isinstance(model, ViTCustomForPreTraining):
        rows, columns = model.model.feature_grids(tuple(images.shape[-2:]))[0]
        noise = torch.rand(images.shape[0], rows * columns, generator=torch.Generator().manual_seed(2))
        return model(images, noise=noise.to(images.device)).logits
    if isinstance(model, ViTCustomForMaskedImageModeling):
        grid = model.model.feature_grids(tuple(images.shape[-2:]))[0]
        mask = torch.arange(grid[0] * grid[1]).expand(images.shape[0], -1) % 3 == 0
        return model(images, bool_masked_pos=mask).reconstruction
    if isinstance(model, ViTCustomBackbone):
        return torch.cat([feature_map.flatten(1) for feature_map in model(images).feature_maps], dim=1)
    if isinstance(model, ViTCustomModel):
        outputs = model(images)
        return torch.cat([outputs.last_hidden_state.flatten(1), outputs.pooler_output], dim=1)
    return model(images).logits


class PixelImages(torch.utils.data.Dataset):
    """Pixels (N, C, H, W) and labels (N,) to train on, by the numbers of their sights."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, numbers: list[int]) -> dict:
        rows = [number % len(self) for number in numbers]
        return {"pixel_values": self.pixels[rows], "labels": self.labels[rows], "numbers": numbers}
