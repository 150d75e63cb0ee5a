"""How images were prepared for a foreign checkpoint, as an image processor that does the same."""

from collections.abc import Mapping

from transformers import ViTImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)

from ..configuration_vit_custom import ViTCustomConfig
from .layouts import BIG_VISION, VIT_JAX, Layout


INTERPOLATIONS = {
    "bilinear": PILImageResampling.BILINEAR,
    "bicubic": PILImageResampling.BICUBIC,
    "lanczos": PILImageResampling.LANCZOS,
    "nearest": PILImageResampling.NEAREST,
    "box": PILImageResampling.BOX,
    "hamming": PILImageResampling.HAMMING,
}
# Of `preprocessor_config.json`; the rest is about classes of transformers.
KEPT = (
    "do_center_crop",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "crop_size",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)


def make_image_processor(
    layout: Layout, config: ViTCustomConfig, preprocessor: Mapping, timm_config: Mapping
) -> ViTImageProcessor:
    """At the native size of the model, with what is written beside the weights.

    Where nothing is, images of Google's files go from -1 to 1, all others are normalised by ImageNet's mean and
    deviation.

    Args:
        layout: Of the weights.
        config: Of the model.
        preprocessor: What transformers writes.
        timm_config: What timm writes.
    """
    height, width = config.native_size
    size = {"height": height, "width": width}
    if preprocessor:
        known = {name: preprocessor[name] for name in KEPT if name in preprocessor}
        if known.get("do_center_crop"):
            return ViTImageProcessor(**known)
        return ViTImageProcessor(**{**known, "size": size})
    is_google = layout in (VIT_JAX, BIG_VISION)
    mean, std = (
        (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD) if is_google else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    fields = {
        "size": size,
        "image_mean": list(timm_config.get("mean", mean)),
        "image_std": list(timm_config.get("std", std)),
        "resample": INTERPOLATIONS.get(timm_config.get("interpolation", "bicubic"), PILImageResampling.BICUBIC),
    }
    if timm_config:
        fields |= _read_crop(timm_config, height, width)
    return ViTImageProcessor(**fields)


def _read_crop(timm_config: Mapping, height: int, width: int) -> dict:
    """What timm does in evaluation: the middle of an image whose shorter side is resized, or which is distorted."""
    share, size = timm_config.get("crop_pct") or 1.0, {"height": height, "width": width}
    if timm_config.get("crop_mode", "center") != "squash" and height == width:
        return {"size": {"shortest_edge": int(height / share)}, "do_center_crop": True, "crop_size": size}
    if share == 1:
        return {"size": size}
    larger = {"height": int(height / share), "width": int(width / share)}
    return {"size": larger, "do_center_crop": True, "crop_size": size}


def describe_preprocessing(processor: ViTImageProcessor, config: ViTCustomConfig) -> dict:
    """What timm writes of how images are prepared."""
    height, width = config.native_size
    described = {
        "input_size": [config.num_channels, height, width],
        "mean": list(processor.image_mean) if processor.do_normalize else [0.0] * config.num_channels,
        "std": list(processor.image_std) if processor.do_normalize else [1.0] * config.num_channels,
        "interpolation": next((name for name, code in INTERPOLATIONS.items() if code == processor.resample), "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    if processor.do_center_crop:
        shorter = processor.size["shortest_edge"]
        described |= {
            "crop_pct": processor.crop_size["height"] / (shorter or processor.size["height"]),
            "crop_mode": "center" if shorter else "squash",
        }
    return described


def resize_processor(processor: ViTImageProcessor, height: int, width: int) -> None:
    """Prepare images of another size, with the same margin around what is cropped."""
    size = {"height": height, "width": width}
    if processor.do_center_crop:
        share = height / processor.crop_size["height"]
        processor.size = {name: round(side * share) for name, side in dict(processor.size).items() if side}
        processor.crop_size = size
    else:
        processor.size = size
