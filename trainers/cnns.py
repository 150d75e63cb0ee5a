"""CNNs to compare with: named configurations of transformers' ResNet, trained from random weights like presets."""

from transformers import ResNetConfig
from transformers.activations import ACT2FN


# The stem leaves a quarter of the side: small images are enlarged to twice theirs, so that 16 x 16 places are left.
_CNNS = {
    # He et al., https://arxiv.org/abs/1512.03385, table 1
    "resnet18_224": {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "resnet50_224": {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]},
    "resnet_nano_64": {
        "layer_type": "basic",
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256],
        "depths": [2, 2, 2],
    },
}


# What describes a ResNet; all else of a configuration is transformers' own affair.
_FIELDS = (
    "num_channels",
    "embedding_size",
    "hidden_sizes",
    "depths",
    "layer_type",
    "hidden_act",
    "downsample_in_first_stage",
    "downsample_in_bottleneck",
)


def list_cnns() -> list[str]:
    """Names that `cnn_config` knows; `..._224` expects images of 224 pixels."""
    return list(_CNNS)


def cnn_size(name: str) -> int:
    """Side in pixels of the images that a named CNN expects."""
    return int(name.rpartition("_")[2])


def cnn_config(name: str, **overrides) -> ResNetConfig:
    """Configuration of a named CNN, with fields replaced, and the labels that come along.

    Raises:
        ValueError: for a field or an activation that there is not, widths or depths that are no list of whole numbers,
            or a width without a depth.
    """
    for field in overrides:
        if field not in (*_FIELDS, "id2label", "label2id"):
            raise ValueError(f"unknown field {field!r} for {name!r}: choose among {', '.join(_FIELDS)}")
    fields = {**ResNetConfig().to_dict(), **_CNNS[name], **overrides}
    for field in ("hidden_sizes", "depths"):
        numbers = fields[field]
        if not isinstance(numbers, list) or not numbers or not all(map(_is_positive, numbers)):
            raise ValueError(f"{field}={numbers!r} must be a list, of a whole number of at least 1 for each stage")
    if not _is_positive(fields["embedding_size"]):
        raise ValueError(f"embedding_size={fields['embedding_size']!r} must be a whole number of at least 1")
    if not isinstance(fields["hidden_act"], str) or fields["hidden_act"] not in ACT2FN:
        raise ValueError(f"hidden_act={fields['hidden_act']!r} must be one of {', '.join(sorted(ACT2FN))}")
    if len(fields["hidden_sizes"]) != len(fields["depths"]):
        raise ValueError(f"hidden_sizes={fields['hidden_sizes']} and depths={fields['depths']} must be as many")
    return ResNetConfig(**{**_CNNS[name], **overrides})


def _is_positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
