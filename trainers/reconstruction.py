"""What a masked model makes of images: for figures."""

import torch
from torch import Tensor

from modeling_vit_custom import ViTCustomForMaskedImageModeling, ViTCustomForPreTraining
from modeling_vit_custom.modeling_vit_custom import count_patches, patchify


@torch.no_grad()
def reconstruct(
    model: ViTCustomForPreTraining | ViTCustomForMaskedImageModeling, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalised pixels (B, C, H, W) -> the mask of hidden pixels, and the images with these reconstructed."""
    if isinstance(model, ViTCustomForPreTraining):
        outputs = model(pixels)
        patches = outputs.logits.float()
        if model.config.norm_pix_loss:
            # The loss asks for patches of mean 0 and deviation 1: give each back what it had.
            variance, mean = torch.var_mean(patchify(pixels.float(), model.patch_size), dim=-1, keepdim=True)
            patches = patches * (variance + 1e-6).sqrt() + mean
        mask = outputs.mask[:, :, None].expand_as(patches)
        reconstruction, mask = (_unpatchify(each, pixels, model.patch_size) for each in (patches, mask))
    else:
        mask = model.make_mask(pixels)
        reconstruction = model(pixels, bool_masked_pos=mask).reconstruction.float()
        mask = mask[:, None].repeat_interleave(model.patch_size, 2).repeat_interleave(model.patch_size, 3)
        mask = mask[:, :, : pixels.shape[2], : pixels.shape[3]]
    mask = mask.bool().expand_as(pixels)
    return mask, torch.where(mask, reconstruction, pixels)


def _unpatchify(patches: Tensor, pixels: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`, cut to the size of the images: (B, N, patch * patch * C) -> (B, C, H, W)."""
    height, width = pixels.shape[2:]
    grid = count_patches((height, width), patch_size)
    image = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    return image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
