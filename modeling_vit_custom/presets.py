"""Named sizes of the papers, and small ones for small images."""

import copy

from .configuration_vit_custom import ViTCustomConfig


def _vit(width: int, depth: int, heads: int, patch: int, size: int = 224, **fields) -> dict:
    """One stage of global attention (ViT, https://arxiv.org/abs/2010.11929, table 1)."""
    return {
        "image_size": size,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        **(small_decoder(width) if width < 768 else {}),
        **fields,
    }


def small_decoder(width: int) -> dict:
    """Fields of a masked autoencoder's decoder that costs little: half as wide as the encoder, and of two blocks.

    The paper's is half as wide as ViT-L, and fine-tuning does not tell two blocks from its eight
    (https://arxiv.org/abs/2111.06377, table 1). Encoders narrower than those of the paper have it in their presets.
    """
    return {
        "decoder_hidden_size": width // 2,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": width // 64,
        "decoder_intermediate_size": 2 * width,
    }


def _deit_distilled(*args, **fields) -> dict:
    """A ViT with a distillation token (DeiT, https://arxiv.org/abs/2012.12877, table 1)."""
    return _vit(*args, use_distillation_token=True, **fields)


def _deit3(*args, **fields) -> dict:
    """A ViT with layer scale from the value of its authors' code (DeiT III, https://arxiv.org/abs/2204.07118)."""
    return _vit(*args, layer_scale_init_value=1e-4, **fields)


def _pvt(depths: list[int], size: int = 224, **fields) -> dict:
    """Four stages with spatial-reduction attention (PVT v1, https://arxiv.org/abs/2102.12122, table 1)."""
    return {
        "image_size": size,
        "patch_size": [4, 2, 2, 2],
        "patch_norm": True,
        "hidden_sizes": [64, 128, 320, 512],
        "depths": depths,
        "num_attention_heads": [1, 2, 5, 8],
        "intermediate_size": [512, 1024, 1280, 2048],
        "sr_ratios": [8, 4, 2, 1],
        **fields,
    }


def _swin(width: int, depths: list[int], heads: list[int], window: int = 7, size: int = 224, **fields) -> dict:
    """Stages of shifted windows, each twice as wide (Swin, https://arxiv.org/abs/2103.14030, section 3.3)."""
    return {
        "image_size": size,
        "patch_size": [4] + [2] * (len(depths) - 1),
        "patch_norm": True,
        "patch_merging": True,
        "hidden_sizes": [width * 2**stage for stage in range(len(depths))],
        "depths": depths,
        "num_attention_heads": heads,
        "window_size": window,
        "use_class_token": False,
        "pooling": "mean",
        "position_embedding_type": "none",
        "layer_norm_eps": 1e-5,
        **fields,
    }


# Masks of small images are of the size of the last stage's patches.
_PRESETS = {
    "vit_tiny_patch16_224": _vit(192, 12, 3, 16),
    "vit_small_patch16_224": _vit(384, 12, 6, 16),
    "vit_base_patch16_224": _vit(768, 12, 12, 16),
    "vit_large_patch16_224": _vit(1024, 24, 16, 16),
    "vit_base_patch32_224": _vit(768, 12, 12, 32),
    "vit_huge_patch14_224": _vit(1280, 32, 16, 14, mask_patch_size=28),
    "deit_tiny_patch16_224": _vit(192, 12, 3, 16),
    "deit_small_patch16_224": _vit(384, 12, 6, 16),
    "deit_base_patch16_224": _vit(768, 12, 12, 16),
    "deit_tiny_distilled_patch16_224": _deit_distilled(192, 12, 3, 16),
    "deit_small_distilled_patch16_224": _deit_distilled(384, 12, 6, 16),
    "deit_base_distilled_patch16_224": _deit_distilled(768, 12, 12, 16),
    "deit3_small_patch16_224": _deit3(384, 12, 6, 16),
    "deit3_medium_patch16_224": _deit3(512, 12, 8, 16),
    "deit3_base_patch16_224": _deit3(768, 12, 12, 16),
    "deit3_large_patch16_224": _deit3(1024, 24, 16, 16),
    "deit3_huge_patch14_224": _deit3(1280, 32, 16, 14, mask_patch_size=28),
    "pvt_tiny_224": _pvt([2, 2, 2, 2]),
    "pvt_small_224": _pvt([3, 4, 6, 3]),
    "pvt_medium_224": _pvt([3, 4, 18, 3]),
    "pvt_large_224": _pvt([3, 8, 27, 3]),
    "swin_tiny_patch4_window7_224": _swin(96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin_small_patch4_window7_224": _swin(96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin_base_patch4_window7_224": _swin(128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "swin_base_patch4_window12_384": _swin(128, [2, 2, 18, 2], [4, 8, 16, 32], window=12, size=384),
    "swin_large_patch4_window7_224": _swin(192, [2, 2, 18, 2], [6, 12, 24, 48]),
    "vit_nano_patch2_8": _vit(128, 4, 4, 2, size=8, mask_patch_size=2, num_labels=10),
    "deit_nano_distilled_patch2_8": _deit_distilled(128, 4, 4, 2, size=8, mask_patch_size=2, num_labels=10),
    "pvt_nano_8": _pvt(
        [2, 2, 2],
        size=8,
        patch_size=[1, 2, 2],
        hidden_sizes=[32, 64, 128],
        num_attention_heads=[1, 2, 4],
        intermediate_size=[128, 256, 512],
        sr_ratios=[4, 2, 1],
        mask_patch_size=4,
        num_labels=10,
    ),
    "swin_nano_patch1_window4_8": _swin(
        32, [2, 2, 2], [1, 2, 4], window=4, size=8, patch_size=[1, 2, 2], mask_patch_size=4, num_labels=10
    ),
    "vit_nano_patch4_32": _vit(192, 9, 3, 4, size=32, intermediate_size=384, mask_patch_size=4, num_labels=10),
    "deit_nano_distilled_patch4_32": _deit_distilled(
        192, 9, 3, 4, size=32, intermediate_size=384, mask_patch_size=4, num_labels=10
    ),
    "pvt_nano_32": _pvt(
        [2, 2, 2],
        size=32,
        patch_size=[2, 2, 2],
        hidden_sizes=[64, 128, 256],
        num_attention_heads=[1, 2, 4],
        intermediate_size=[256, 512, 1024],
        sr_ratios=[4, 2, 1],
        mask_patch_size=8,
        num_labels=10,
    ),
    "swin_nano_patch2_window4_32": _swin(
        64, [2, 4, 2], [2, 4, 8], window=4, size=32, patch_size=[2, 2, 2], mask_patch_size=8, num_labels=10
    ),
}


def list_presets() -> list[str]:
    """Names that `preset_config` knows; `..._224` expects 224-pixel images and has 1000 labels."""
    return list(_PRESETS)


def preset_config(name: str, **overrides) -> ViTCustomConfig:
    """Configuration of a named size, with any field replaced.

    Example:
        >>> preset_config("vit_base_patch16_224", num_labels=10, drop_path_rate=0.1).hidden_size
        768

    Raises:
        ValueError: if there is no such preset, or the overrides do not fit it.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(_PRESETS)}")
    labels = {} if {"num_labels", "id2label"} & overrides.keys() else {"num_labels": 1000}
    fields = {**labels, **copy.deepcopy(_PRESETS[name]), **overrides}
    if "id2label" in overrides:
        fields.pop("num_labels", None)
    inherited = {"num_labels", "attn_implementation", "out_features", "out_indices", "output_attentions"}
    unknown = fields.keys() - ViTCustomConfig.__dataclass_fields__.keys() - inherited
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r} for preset {name!r}")
    return ViTCustomConfig(**fields)
