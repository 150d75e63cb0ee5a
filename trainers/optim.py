"""Optimizers and their parameter groups: who decays, who learns slower, who is a hidden matrix."""

import re

import pytorch_optimizer
import torch
from torch import nn
from transformers import PreTrainedModel


# Muon's updates have a norm of their own; this makes them as large as AdamW's (https://arxiv.org/abs/2502.16982).
MUON = {"use_adjusted_lr": True, "momentum": 0.95, "nesterov": True}

_NEVER_DECAYED = re.compile(r"token|position|pos_embed|bias")
_BLOCK = re.compile(r"stages\.(\d+)\.(?:blocks\.(\d+)\.)?")


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls on a parameter: not on biases, norms, layer scales, positions, tokens, bias tables."""
    return parameter.ndim > 1 and _NEVER_DECAYED.search(name) is None


def layer_of(name: str, depths: list[int]) -> int:
    """Place of a parameter between the input (0) and the head (blocks + 1), counted in blocks through all stages.

    https://arxiv.org/abs/2106.08254, appendix; a later stage's embedding goes with the block before it.
    """
    match = _BLOCK.search(name)
    if match is None or name.startswith("decoder"):
        return sum(depths) + 1
    stage, block = match.groups()
    return sum(depths[: int(stage)]) + (0 if block is None else int(block) + 1)


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Groups of trainable parameters that share a learning rate and a weight decay.

    Raises:
        ValueError: for a layer decay in a model whose layers are not known here.
    """
    depths = [stage.depth for stage in model.config.stages] if hasattr(model.config, "stages") else None
    if layer_decay != 1 and depths is None:
        raise ValueError(f"layer_decay={layer_decay} needs a vit_custom model, not {model.config.model_type}")
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = has_decay(name, parameter)
        scale = 1.0 if layer_decay == 1 else layer_decay ** (sum(depths) + 1 - layer_of(name, depths))
        is_hidden = decayed and ".blocks." in name
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
    return list(groups.values())


def make_optimizer(name: str, groups: list[dict], betas: tuple[float, float], eps: float, momentum: float):
    """An optimizer over groups of `parameter_groups`.

    AdamW is PyTorch's fused one; LAMB (https://arxiv.org/abs/1904.00962), LARS (https://arxiv.org/abs/1708.03888) and
    Muon, with AdamW for all but the blocks' matrices, are pytorch_optimizer's.
    """
    hidden = [group.pop("is_hidden") for group in groups]
    # Schedules with a floor take the peak from the optimizer's default, not from its groups.
    peak = max(group["lr"] for group in groups)
    if name == "adamw":
        return torch.optim.AdamW(groups, peak, betas=betas, eps=eps, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, peak, momentum=momentum)
    if name == "lamb":
        return pytorch_optimizer.Lamb(groups, peak, betas=betas, eps=eps)
    if name == "lars":
        return pytorch_optimizer.LARS(groups, peak, momentum=momentum)
    for group, is_hidden in zip(groups, hidden):
        group |= {"use_muon": True, **MUON} if is_hidden else {"use_muon": False, "betas": betas, "eps": eps}
    optimizer = pytorch_optimizer.Muon(groups, peak)
    optimizer.defaults["lr"] = peak
    return optimizer
