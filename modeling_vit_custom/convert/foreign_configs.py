"""What transformers and timm know of a model besides its weights' names and shapes, as fields of `ViTCustomConfig`.

All raise ValueError for what this family does not have: a model that opened anyway would be wrong.
"""

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .checkpoints import Checkpoint
from .layouts import (
    OFFICIAL_SWIN,
    TIMM_SWIN,
    TIMM_VIT,
    TORCHVISION_SWIN,
    TRANSFORMERS_DEIT,
    TRANSFORMERS_PVT,
    TRANSFORMERS_SWIN,
    TRANSFORMERS_VIT,
    Layout,
    recognise,
)


TRANSFORMERS_LAYOUTS = {
    "vit": TRANSFORMERS_VIT,
    "vit_mae": TRANSFORMERS_VIT,
    "deit": TRANSFORMERS_DEIT,
    "pvt": TRANSFORMERS_PVT,
    "swin": TRANSFORMERS_SWIN,
}
TIMM_LAYOUTS = {
    "VisionTransformer": TIMM_VIT,
    "VisionTransformerDistilled": TIMM_VIT,
    "SwinTransformer": TIMM_SWIN,
}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}


# Where there are weights alone: torch's default where it is not the 1e-6 of ours.
KNOWN_OF_FILES = {
    TIMM_VIT.title: {"position_antialias": True},
    TIMM_SWIN.title: {"layer_norm_eps": 1e-5},
    OFFICIAL_SWIN.title: {"layer_norm_eps": 1e-5},
    TORCHVISION_SWIN.title: {"layer_norm_eps": 1e-5},
}


def read_metadata(checkpoint: Checkpoint) -> tuple[Layout, dict]:
    """What the tensors' names mean, and fields that shapes do not tell, from `config.json` if there is one."""
    config = checkpoint.config
    if config.get("model_type") == "vit_custom":
        raise ValueError("it is a model of this family already: open it with from_pretrained")
    if "model_type" in config:
        layout = transformers_layout(config["model_type"])
        return layout, read_transformers(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    if "architecture" in config:
        model = _make_timm_model(config)
        known = read_timm(model)
        names = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
        if names and len(names) == model.num_classes:
            known |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        return timm_layout(model), known
    layout = recognise(checkpoint.tensors)
    return layout, KNOWN_OF_FILES.get(layout.title, {})


def _make_timm_model(config: dict) -> nn.Module:
    """Without weights, which tells what the architecture's name stands for."""
    import timm  # which a Space, where models are opened as well, need not have

    name = str(config["architecture"])
    if not timm.is_model(name):
        raise ValueError(f"timm knows no architecture {name!r}")
    options = dict(config.get("model_args") or {})
    options |= {key: config[key] for key in ("num_classes", "global_pool") if config.get(key) is not None}
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm makes no {name!r} with {options}: {' '.join(str(error).split())}") from error


def transformers_layout(model_type: str) -> Layout:
    """How transformers names the tensors of a kind of model."""
    if model_type not in TRANSFORMERS_LAYOUTS:
        known = ", ".join(TRANSFORMERS_LAYOUTS)
        raise ValueError(f"model_type {model_type!r} has no counterpart: give one of transformers' {known}")
    return TRANSFORMERS_LAYOUTS[model_type]


def timm_layout(model: nn.Module) -> Layout:
    """How timm names the tensors of a model."""
    name = type(model).__name__
    if name not in TIMM_LAYOUTS:
        raise ValueError(f"cannot convert a {name}: give a timm {', '.join(TIMM_LAYOUTS)}")
    return TIMM_LAYOUTS[name]


def read_transformers(config: PreTrainedConfig) -> dict:
    """Of a ViT, DeiT, ViTMAE, PVT or Swin."""
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={config.hidden_act!r} has no counterpart: only {', '.join(ACTIVATIONS)} have")
    is_swin = config.model_type == "swin"
    heads = config.num_heads if is_swin else config.num_attention_heads
    size = config.image_size
    fields = {
        "image_size": list(size) if isinstance(size, (list, tuple)) else size,
        "num_attention_heads": list(heads) if isinstance(heads, (list, tuple)) else heads,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": ACTIVATIONS[config.hidden_act],
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "initializer_range": config.initializer_range,
        "problem_type": config.problem_type,
    }
    # PvtConfig may have no names, and says 1000 of what transformers 4 wrote: there the head tells how many.
    if config.id2label:
        fields |= {"id2label": config.id2label, "label2id": config.label2id}
    if config.model_type in ("pvt", "swin"):
        fields["drop_path_rate"] = config.drop_path_rate
    if config.model_type == "pvt":
        if list(config.patch_sizes) != list(config.strides):
            raise ValueError(
                f"patch_sizes={config.patch_sizes} must equal strides={config.strides}: patches do not overlap"
            )
        fields["patch_norm_eps"] = fields["sr_norm_eps"] = config.layer_norm_eps
    if config.model_type == "vit_mae":
        fields |= {
            "position_embedding_type": "sincos2d",
            "mask_ratio": config.mask_ratio,
            "norm_pix_loss": config.norm_pix_loss,
            "decoder_num_attention_heads": config.decoder_num_attention_heads,
        }
    return fields


def read_timm(model: nn.Module) -> dict:
    """Of a ViT, DeiT (distilled as well), DeiT III or Swin, whose weights need not be there."""
    return _read_timm_swin(model) if timm_layout(model) is TIMM_SWIN else _read_timm_vit(model)


def _read_timm_vit(model: nn.Module) -> dict:
    block, distilled = model.blocks[0], hasattr(model, "dist_token")
    if type(block).__name__ != "Block":
        raise ValueError(f"timm's {type(block).__name__} has no counterpart: only its pre-norm Block has")
    if type(block.mlp).__name__ != "Mlp":
        raise ValueError(f"timm's {type(block.mlp).__name__} has no counterpart: only its Mlp has")
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        raise ValueError("a model without a final norm (final_norm=False) has no counterpart")
    if model.global_pool == "avg" and model.pool_include_prefix:
        raise ValueError("pool_include_prefix=True has no counterpart: prefix tokens stay out of the mean")
    if type(model.norm_pre).__name__ != "Identity":
        raise ValueError("a norm before the first block (norm_pre) has no counterpart")
    if distilled and isinstance(model.norm, nn.Identity):
        raise ValueError("fc_norm=True has no counterpart in a distilled model: both of its heads skip that norm")
    if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
        raise ValueError(f"global_pool={model.global_pool!r} has no counterpart: only 'token' and 'avg' have")
    return {
        "image_size": list(model.patch_embed.img_size),
        "num_attention_heads": block.attn.num_heads,
        "position_antialias": model.pos_embed is not None,
        "pooling": "cls" if model.global_pool == "token" else "mean",
        "hidden_act": _read_timm_activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }


def _read_timm_swin(model: nn.Module) -> dict:
    blocks = [stage.blocks[0] for stage in model.layers]
    if any(block.always_partition for block in blocks):
        raise ValueError("always_partition=True has no counterpart: a window that covers the grid is not shifted")
    if model.head.global_pool.pool_type != "avg":
        raise ValueError(f"global_pool={model.head.global_pool.pool_type!r} has no counterpart: only 'avg' has")
    return {
        "image_size": list(model.patch_embed.img_size),
        "hidden_act": _read_timm_activation(blocks[0].mlp.act),
        "layer_norm_eps": model.norm.eps,
        "patch_norm_eps": model.patch_embed.norm.eps,
    }


def _read_timm_activation(activation: nn.Module) -> str:
    if not isinstance(activation, nn.GELU):
        raise ValueError(f"activation {type(activation).__name__} has no counterpart: only GELU has")
    return "gelu_pytorch_tanh" if activation.approximate == "tanh" else "gelu"
