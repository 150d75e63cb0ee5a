"""What transformers and timm know of a model besides its weights' names and shapes, as fields of `ViTCustomConfig`.

All raise ValueError for what this family does not have: a model that opened anyway would be wrong.
"""

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .checkpoints import Checkpoint
from .layouts import (
    BIG_VISION,
    OFFICIAL_SWIN,
    TIMM_SWIN,
    TIMM_VIT,
    TORCHVISION_SWIN,
    TRANSFORMERS_DEIT,
    TRANSFORMERS_PVT,
    TRANSFORMERS_SWIN,
    TRANSFORMERS_VIT,
    VIT_JAX,
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
# Of `model_args` in timm's config.json: what is passed on; others, such as paths of files to load, are not.
TIMM_OPTIONS = {
    "act_layer",
    "always_partition",
    "attn_drop_rate",
    "class_token",
    "depth",
    "depths",
    "drop_path_rate",
    "drop_rate",
    "dynamic_img_pad",
    "dynamic_img_size",
    "embed_dim",
    "fc_norm",
    "final_norm",
    "global_pool",
    "img_size",
    "in_chans",
    "init_values",
    "mlp_ratio",
    "no_embed_class",
    "num_classes",
    "num_heads",
    "patch_size",
    "pool_include_prefix",
    "pos_drop_rate",
    "pos_embed",
    "pre_norm",
    "proj_bias",
    "proj_drop_rate",
    "qk_norm",
    "qkv_bias",
    "reg_tokens",
    "strict_img_size",
    "weight_init",
    "window_size",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}


# Where there are weights alone. An epsilon is torch's default where it is not the 1e-6 of ours; GELU of flax, which
# Google's codes call without options, is the one by tanh.
KNOWN_OF_FILES = {
    VIT_JAX.title: {"hidden_act": "gelu_pytorch_tanh", "position_embedding_type": "learned"},
    BIG_VISION.title: {"hidden_act": "gelu_pytorch_tanh", "position_embedding_type": "learned"},
    TIMM_VIT.title: {"position_antialias": True},
    TIMM_SWIN.title: {"layer_norm_eps": 1e-5},
    OFFICIAL_SWIN.title: {"layer_norm_eps": 1e-5},
    TORCHVISION_SWIN.title: {"layer_norm_eps": 1e-5},
    TRANSFORMERS_SWIN.title: {"layer_norm_eps": 1e-5},
    TRANSFORMERS_VIT.title: {"layer_norm_eps": 1e-12},
    TRANSFORMERS_DEIT.title: {"layer_norm_eps": 1e-12},
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
        names = config.get("label_names") or timm_preprocessing(config).get("label_names")
        if names and len(names) == model.num_classes:
            known |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        return timm_layout(model), known
    layout = recognise(checkpoint.tensors)
    heads = checkpoint.tensors.num_attention_heads
    return layout, KNOWN_OF_FILES.get(layout.title, {}) | ({} if heads is None else {"num_attention_heads": heads})


def timm_preprocessing(config: dict) -> dict:
    """What timm writes of how images are prepared, in a part of its own or, years ago, among the rest."""
    if "architecture" not in config:
        return {}
    return config.get("pretrained_cfg") or config


def _make_timm_model(config: dict) -> nn.Module:
    """Without weights, which tells what the architecture's name stands for."""
    import timm  # which a Space, where models are opened as well, need not have

    name = str(config["architecture"])
    if not timm.is_model(name):
        raise ValueError(f"timm knows no architecture {name!r}")
    options = dict(config.get("model_args") or {})
    options |= {key: config[key] for key in ("num_classes", "global_pool") if config.get(key) is not None}
    strange = sorted(options.keys() - TIMM_OPTIONS)
    if strange:
        raise ValueError(f"model_args of its config.json hold {strange[0]!r}, which has no counterpart")
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)
    except (ArithmeticError, AssertionError, AttributeError, RuntimeError, TypeError) as error:
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
    if name not in TIMM_LAYOUTS or not type(model).__module__.startswith("timm."):
        raise ValueError(f"it must be a timm {', '.join(TIMM_LAYOUTS)}")
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
    fields["num_channels"], fields["qkv_bias"] = config.num_channels, config.qkv_bias
    # PvtConfig may have no names, and says 1000 of what transformers 4 wrote: there the head tells how many.
    if config.id2label:
        if sorted(config.id2label) != list(range(len(config.id2label))):
            raise ValueError("id2label must number the classes from 0")
        fields |= {"id2label": config.id2label, "label2id": config.label2id}
    if config.model_type in ("pvt", "swin"):
        fields |= {"drop_path_rate": config.drop_path_rate, "depths": list(config.depths)}
    else:
        fields |= {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "intermediate_size": config.intermediate_size,
            "patch_size": config.patch_size,
            "position_embedding_type": "learned",
            "use_class_token": True,
        }
    if is_swin:
        widths = [config.embed_dim * 2**stage for stage in range(len(config.depths))]
        fields |= {
            "hidden_sizes": widths,
            "intermediate_size": [int(config.mlp_ratio * width) for width in widths],
            "patch_size": [config.patch_size, *[2] * (len(widths) - 1)],
            "position_embedding_type": ["learned" if config.use_absolute_embeddings else "none"]
            + ["none"] * (len(widths) - 1),
        }
    if config.model_type == "pvt":
        fields |= {
            "hidden_sizes": list(config.hidden_sizes),
            "intermediate_size": [ratio * width for ratio, width in zip(config.mlp_ratios, config.hidden_sizes)],
            "patch_size": list(config.patch_sizes),
            "position_embedding_type": "learned",
            "sr_ratios": list(config.sequence_reduction_ratios),
        }
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
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "intermediate_size": block.mlp.fc1.out_features,
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "use_class_token": model.cls_token is not None,
        "position_embedding_type": "none" if model.pos_embed is None else "learned",
        **({"num_labels": model.num_classes} if model.num_classes else {}),
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
        "hidden_sizes": [block.attn.qkv.in_features for block in blocks],
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": blocks[0].attn.qkv.bias is not None,
        **({"num_labels": model.num_classes} if model.num_classes else {}),
        "image_size": list(model.patch_embed.img_size),
        "hidden_act": _read_timm_activation(blocks[0].mlp.act),
        "layer_norm_eps": model.norm.eps,
        "patch_norm_eps": model.patch_embed.norm.eps,
    }


def _read_timm_activation(activation: nn.Module) -> str:
    if type(activation).__name__ == "GELUTanh":
        return "gelu_pytorch_tanh"
    if not isinstance(activation, nn.GELU):
        raise ValueError(f"activation {type(activation).__name__} has no counterpart: only GELU has")
    return "gelu_pytorch_tanh" if getattr(activation, "approximate", "none") == "tanh" else "gelu"
