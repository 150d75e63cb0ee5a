"""Optimizers and their parameter groups: who decays, who learns slower, who is a hidden matrix."""

import re
from collections.abc import Sequence

import pytorch_optimizer
import torch
from torch import nn


# Muon's updates have a norm of their own; this makes them as large as AdamW's (https://arxiv.org/abs/2502.16982).
MUON = {"use_adjusted_lr": True, "momentum": 0.95, "nesterov": True}

_NEVER_DECAYED = re.compile(r"token|position|pos_embed|bias")
# A block of a stage (stages.0.blocks.1, layers.0.blocks.1, stages.0.layers.1, block.0.1), or of a model without stages.
_BLOCK_OF_STAGE = re.compile(r"(?:(?:stages|layers)\.\d+\.(?:blocks|layers)|block\.\d+)\.\d+\.")
_BLOCK = re.compile(r"(?:blocks|layers|layer)\.\d+\.")


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls on a parameter: not on biases, norms, layer scales, positions, tokens, bias tables."""
    return parameter.ndim > 1 and _NEVER_DECAYED.search(name) is None


def number_layers(names: Sequence[str]) -> dict[str, int]:
    """Place of each parameter between the input (0) and the head, counted in blocks through all stages.

    https://arxiv.org/abs/2106.08254, appendix; a later stage's embedding goes with the block before it, a decoder with
    the head. Works for the names of this family, of transformers and of timm, in the order of `named_parameters`.
    """
    pattern = _block_pattern(names)
    encoder = [name for name in names if not name.startswith("decoder")]
    blocks: dict[str, int] = {}
    layers = {}
    for name in encoder:
        match = pattern.search(name)
        if match is not None:
            blocks.setdefault(name[: match.end()], len(blocks) + 1)
        layers[name] = len(blocks)
    last = max((index for index, name in enumerate(encoder) if pattern.search(name)), default=-1)
    return {name: len(blocks) + 1 for name in names} | {name: layers[name] for name in encoder[: last + 1]}


def _block_pattern(names: Sequence[str]) -> re.Pattern:
    return _BLOCK_OF_STAGE if any(map(_BLOCK_OF_STAGE.search, names)) else _BLOCK


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Groups of trainable parameters that share a learning rate and a weight decay.

    Raises:
        ValueError: if there are none, or for a layer decay in a model whose blocks are not known here.
    """
    named = dict(model.named_parameters())
    layers, block = number_layers(list(named)), _block_pattern(list(named))
    head = max(layers.values(), default=0)
    if layer_decay != 1 and head < 2:
        raise ValueError(f"layer_decay={layer_decay} needs blocks, which a {type(model).__name__} names otherwise")
    groups: dict[tuple, dict] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        decayed = has_decay(name, parameter)
        scale = layer_decay ** (head - layers[name])
        is_hidden = decayed and block.search(name) is not None
        group = groups.setdefault(
            (scale, decayed, is_hidden),
            {
                "params": [],
                "lr": learning_rate * scale,
                "weight_decay": weight_decay if decayed else 0.0,
                "is_hidden": is_hidden,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no weights to train: all of them are frozen")
    return list(groups.values())


def make_optimizer(name: str, groups: list[dict], betas: tuple[float, float], eps: float, momentum: float):
    """An optimizer over groups of `parameter_groups`.

    AdamW is PyTorch's fused one; LAMB (https://arxiv.org/abs/1904.00962) is timm's; LARS
    (https://arxiv.org/abs/1708.03888) and Muon, with AdamW for all but the blocks' matrices, are pytorch_optimizer's.
    A convolution's kernel is a matrix of all that goes into each of its channels.

    Raises:
        ValueError: if there are no matrices for Muon.
    """
    hidden = [group.pop("is_hidden") for group in groups]
    # Schedules with a floor take the peak from the optimizer's default, not from its groups.
    peak = max(group["lr"] for group in groups)
    if name == "adamw":
        return torch.optim.AdamW(groups, peak, betas=betas, eps=eps, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, peak, momentum=momentum)
    if name == "lamb":
        from timm.optim import Lamb  # here, since it brings all of timm

        # What does not decay has no trust ratio; the Trainer clips gradients.
        return Lamb(groups, peak, betas=betas, eps=eps, max_grad_norm=None)
    if name == "lars":
        return pytorch_optimizer.LARS(groups, peak, momentum=momentum)
    if not any(hidden):
        raise ValueError("optimizer='muon' finds no matrices of blocks to train: use adamw")
    for group, is_hidden in zip(groups, hidden):
        group |= {"use_muon": True, **MUON} if is_hidden else {"use_muon": False, "betas": betas, "eps": eps}
    optimizer = pytorch_optimizer.Muon(groups, peak)
    optimizer.defaults["lr"] = peak
    return optimizer
