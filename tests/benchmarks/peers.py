"""Models of transformers and timm, with random weights, as peers of ours: how to build, fill, run and pair them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import timm
import torch
import transformers
from torch import Tensor, nn

from modeling_vit_custom.convert import from_timm, from_transformers, to_timm


VERSIONS = {"transformers": transformers.__version__, "timm": timm.__version__}
CONVERTERS = {"transformers": from_transformers, "timm": from_timm}

Build = Callable[[int], nn.Module]


def _vit(width: int, heads: int, depth: int = 12, patch_size: int = 16, num_labels: int = 1000) -> Build:
    def build(image_size: int) -> nn.Module:
        config = transformers.ViTConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            num_labels=num_labels,
        )
        return transformers.ViTForImageClassification(config)

    return build


def _deit_small_distilled(image_size: int) -> nn.Module:
    config = transformers.DeiTConfig(
        image_size=image_size, hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    return transformers.DeiTForImageClassificationWithTeacher(config)


def _pvt_tiny(image_size: int) -> nn.Module:
    return transformers.PvtForImageClassification(transformers.PvtConfig(image_size=image_size))


def _swin_tiny(image_size: int) -> nn.Module:
    config = transformers.SwinConfig(image_size=image_size, drop_path_rate=0.0, num_labels=1000)
    return transformers.SwinForImageClassification(config)


def _vit_mae_base(image_size: int) -> nn.Module:
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(image_size=image_size))


def _timm(name: str) -> Build:
    return lambda image_size: timm.create_model(name, img_size=image_size, drop_path_rate=0.0)


def _timm_vit_32px(image_size: int) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=image_size, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10
    )


# Every architecture as each library builds it; timm has neither PVT v1 nor a masked autoencoder's decoder, and
# transformers has no layer scale in its ViT. Nothing is random in training, so that all do the same work.
ARCHITECTURES: dict[str, dict[str, Build]] = {
    "ViT-S": {"transformers": _vit(384, 6), "timm": _timm("vit_small_patch16_224")},
    "ViT-B": {"transformers": _vit(768, 12), "timm": _timm("vit_base_patch16_224")},
    "DeiT-S distilled": {"transformers": _deit_small_distilled, "timm": _timm("deit_small_distilled_patch16_224")},
    "DeiT III-S": {"timm": _timm("deit3_small_patch16_224")},
    "PVT-T": {"transformers": _pvt_tiny},
    "Swin-T": {"transformers": _swin_tiny, "timm": _timm("swin_tiny_patch4_window7_224")},
    "ViTMAE-B": {"transformers": _vit_mae_base},
    "ViT-32px": {"transformers": _vit(192, 3, depth=6, patch_size=4, num_labels=10), "timm": _timm_vit_32px},
}
# What timm has instead of an architecture: another model of about its cost, for comparisons of speed alone.
NEAREST_IN_TIMM = {"PVT-T": "pvt_v2_b1"}


@dataclass
class Pair:
    """A peer and our conversion of it."""

    architecture: str
    library: str
    peer: nn.Module
    ours: nn.Module


def build_pairs(architectures: list[str], image_size: int = 224, seed: int = 0) -> Iterator[Pair]:
    """One pair for each library that has the architecture, on random weights, in evaluation mode."""
    for architecture in architectures:
        for library, build in ARCHITECTURES[architecture].items():
            peer = randomise(build(image_size), seed)
            yield Pair(architecture, library, peer, CONVERTERS[library](peer))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values of its own that matter for the output, so that a forgotten or swapped one shows.

    An initialisation has norms of ones, biases, class tokens and position biases of zeros, and hides such mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            is_weight = isinstance(module, (nn.Linear, nn.Conv2d)) and name == "weight"
            if is_weight or name == "in_proj_weight":
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif isinstance(module, nn.LayerNorm) and name == "weight":
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
            if name == "decoder_pos_embed":
                parameter[:, 0] = 0  # the class token's, which is zero in every masked autoencoder
    return model.eval()


def make_images(batch_size: int, size: int | tuple[int, int], seed: int = 0, channels: int = 3) -> Tensor:
    """Normal noise: (B, C, H, W)."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch_size, channels, height, width, generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, images: Tensor, **kwargs) -> Tensor:
    """Class scores (B, L), whatever wraps them."""
    output = model(images, **kwargs)
    return output if isinstance(output, Tensor) else output.logits


def set_attention(model: nn.Module, implementation: str) -> nn.Module:
    """Make a model compute attention by `"eager"` or `"sdpa"`, where it has a choice: transformers' PVT has none."""
    if isinstance(model, transformers.PreTrainedModel):
        if implementation == "eager" or model._supports_sdpa:
            model.set_attn_implementation(implementation)
    else:
        for module in _timm_attentions(model):
            module.fused_attn = implementation == "sdpa"
    return model


def attention_of(model: nn.Module) -> str:
    """The attention implementation that a model uses now."""
    if isinstance(model, transformers.PreTrainedModel):
        return model.config._attn_implementation
    return "sdpa" if all(module.fused_attn for module in _timm_attentions(model)) else "eager"


def _timm_attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "fused_attn")]


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; NaN where either has one."""
    return (ours.detach().double() - theirs.detach().double()).abs().max().item()


@torch.no_grad()
def load_into_timm(model: nn.Module, ours: nn.Module) -> nn.Module:
    """Our weights in a timm ViT, distilled DeiT or Swin of the same size."""
    tensors = to_timm(ours).state_dict()
    if "pos_embed" in tensors:
        # Rows of prefix tokens, which are zero, if it has them.
        tensors["pos_embed"] = tensors["pos_embed"][:, -model.pos_embed.shape[1] :]
    model.load_state_dict(tensors)
    return model
