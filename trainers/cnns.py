"""CNNs to compare with: named configurations of transformers' ResNet, trained from random weights like presets."""

from transformers import ResNetConfig


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


def list_cnns() -> list[str]:
    """Names that `cnn_config` knows; `..._224` expects images of 224 pixels."""
    return list(_CNNS)


def cnn_size(name: str) -> int:
    """Side in pixels of the images that a named CNN expects."""
    return int(name.rpartition("_")[2])


def cnn_config(name: str, **overrides) -> ResNetConfig:
    """Configuration of a named CNN, with any field replaced.

    Raises:
        ValueError: for a field that there is not, widths or depths that are no list, or a width without a depth.
    """
    usual = ResNetConfig()
    unknown = [field for field in overrides if callable(getattr(usual, field, callable))]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} for {name!r}")
    fields = {**_CNNS[name], **overrides}
    for field in ("hidden_sizes", "depths"):
        if not isinstance(fields[field], list):
            raise ValueError(f"{field}={fields[field]!r} must be a list, of a number for each stage")
    if len(fields["hidden_sizes"]) != len(fields["depths"]):
        raise ValueError(f"hidden_sizes={fields['hidden_sizes']} and depths={fields['depths']} must be as many")
    return ResNetConfig(**fields)
