"""Models of other libraries as models of this family, with the same weights.

A conversion reads the configuration off the foreign model, renames its tensors by a table, and folds what this family
stores otherwise: queries, keys and values into one product, and the position of a prefix token into the token.
"""

import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_vit_custom import ViTCustomConfig
from .modeling_vit_custom import (
    ViTCustomForImageClassification,
    ViTCustomForPreTraining,
    ViTCustomModel,
    ViTCustomPreTrainedModel,
)


# The first pattern that a whole name matches renames it; a third entry holds the rules for its group `rest`.
# In a new name, `2+1` stands for 3, `!q`, `!k` and `!v` mark the parts of a fused product, and `!position` marks a
# table of positions that may begin with rows of prefix tokens.
Rules = list[tuple]

_TRANSFORMERS_BLOCK: Rules = [
    (r"attention\.([qkv])_proj\.(\w+)", r"attention.qkv.\2!\1"),
    (r"attention\.o_proj\.(\w+)", r"attention.projection.\1"),
    (r"attention\.relative_position_bias\.(relative_position_bias_table)", r"attention.\1"),
    (r"layernorm_before\.(\w+)", r"attention_norm.\1"),
    (r"layernorm_after\.(\w+)", r"mlp_norm.\1"),
    (r"mlp\.(fc[12]\.\w+)", r"mlp.\1"),
]

_TIMM_BLOCK: Rules = [
    (r"norm1\.(\w+)", r"attention_norm.\1"),
    (r"attn\.qkv\.(\w+)", r"attention.qkv.\1"),
    (r"attn\.proj\.(\w+)", r"attention.projection.\1"),
    (r"attn\.q_norm\.(\w+)", r"attention.query_norm.\1"),
    (r"attn\.k_norm\.(\w+)", r"attention.key_norm.\1"),
    (r"attn\.(relative_position_bias_table)", r"attention.\1"),
    (r"ls1\.gamma", r"attention_scale.weight"),
    (r"norm2\.(\w+)", r"mlp_norm.\1"),
    (r"mlp\.(fc[12]\.\w+)", r"mlp.\1"),
    (r"ls2\.gamma", r"mlp_scale.weight"),
]


_TRANSFORMERS_HEADS: Rules = [
    (r"(?:cls_)?classifier\.(\w+)", r"head.classifier.\1"),
    (r"distillation_classifier\.(\w+)", r"head.distillation_classifier.\1"),
]

_TRANSFORMERS_VIT: Rules = [
    (r"embeddings\.cls_token", "model.stages.0.prefix_tokens.class_token"),
    (r"embeddings\.distillation_token", "model.stages.0.prefix_tokens.distillation_token"),
    (r"embeddings\.position_embeddings", "model.stages.0.position_embedding.weight!position"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"model.stages.0.embedding.projection.\1"),
    (r"layers\.(\d+)\.(?P<rest>.+)", r"model.stages.0.blocks.\1.", _TRANSFORMERS_BLOCK),
    (r"layernorm\.(\w+)", r"model.norm.\1"),
    (r"decoder\.decoder_embed\.(\w+)", r"decoder.embedding.\1"),
    (r"decoder\.mask_token", "decoder.mask_token.weight"),
    (r"decoder\.decoder_pos_embed", "decoder.position_embedding.weight!position"),
    (r"decoder\.decoder_layers\.(\d+)\.(?P<rest>.+)", r"decoder.blocks.\1.", _TRANSFORMERS_BLOCK),
    (r"decoder\.decoder_norm\.(\w+)", r"decoder.norm.\1"),
    (r"decoder\.decoder_pred\.(\w+)", r"decoder.prediction.\1"),
    *_TRANSFORMERS_HEADS,
]

_TRANSFORMERS_SWIN: Rules = [
    (r"embeddings\.position_embeddings", "model.stages.0.position_embedding.weight!position"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"model.stages.0.embedding.projection.\1"),
    (r"embeddings\.norm\.(\w+)", r"model.stages.0.embedding.norm.\1"),
    (
        r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.(?P<rest>.+)",
        r"model.stages.\1.blocks.\2.",
        _TRANSFORMERS_BLOCK,
    ),
    (r"encoder\.layers\.(\d+)\.downsample\.norm\.(\w+)", r"model.stages.\1+1.embedding.norm.\2"),
    (r"encoder\.layers\.(\d+)\.downsample\.reduction\.(\w+)", r"model.stages.\1+1.embedding.projection.\2"),
    (r"layernorm\.(\w+)", r"model.norm.\1"),
    *_TRANSFORMERS_HEADS,
]

_TRANSFORMERS_PVT: Rules = [
    (r"encoder\.patch_embeddings\.(\d+)\.cls_token", r"model.stages.\1.prefix_tokens.class_token"),
    (
        r"encoder\.patch_embeddings\.(\d+)\.position_embeddings",
        r"model.stages.\1.position_embedding.weight!position",
    ),
    (r"encoder\.patch_embeddings\.(\d+)\.projection\.(\w+)", r"model.stages.\1.embedding.projection.\2"),
    (r"encoder\.patch_embeddings\.(\d+)\.layer_norm\.(\w+)", r"model.stages.\1.embedding.norm.\2"),
    (
        r"encoder\.block\.(\d+)\.(\d+)\.(?P<rest>.+)",
        r"model.stages.\1.blocks.\2.",
        [
            (r"layer_norm_1\.(\w+)", r"attention_norm.\1"),
            (r"layer_norm_2\.(\w+)", r"mlp_norm.\1"),
            (r"attention\.self\.query\.(\w+)", r"attention.qkv.\1!q"),
            (r"attention\.self\.key\.(\w+)", r"attention.qkv.\1!k"),
            (r"attention\.self\.value\.(\w+)", r"attention.qkv.\1!v"),
            (r"attention\.self\.sequence_reduction\.(\w+)", r"attention.reduction.\1"),
            (r"attention\.self\.layer_norm\.(\w+)", r"attention.reduction_norm.\1"),
            (r"attention\.output\.dense\.(\w+)", r"attention.projection.\1"),
            (r"mlp\.dense([12])\.(\w+)", r"mlp.fc\1.\2"),
        ],
    ),
    (r"encoder\.layer_norm\.(\w+)", r"model.norm.\1"),
    *_TRANSFORMERS_HEADS,
]

_TIMM_VIT: Rules = [
    (r"cls_token", "model.stages.0.prefix_tokens.class_token"),
    (r"dist_token", "model.stages.0.prefix_tokens.distillation_token"),
    (r"reg_token", "model.stages.0.prefix_tokens.register_tokens"),
    (r"pos_embed", "model.stages.0.position_embedding.weight!position"),
    (r"patch_embed\.proj\.(\w+)", r"model.stages.0.embedding.projection.\1"),
    (r"blocks\.(\d+)\.(?P<rest>.+)", r"model.stages.0.blocks.\1.", _TIMM_BLOCK),
    (r"norm\.(\w+)", r"model.norm.\1"),
    (r"fc_norm\.(\w+)", r"model.pooling.norm.\1"),
    (r"head\.(\w+)", r"head.classifier.\1"),
    (r"head_dist\.(\w+)", r"head.distillation_classifier.\1"),
]

_TIMM_SWIN: Rules = [
    (r"patch_embed\.proj\.(\w+)", r"model.stages.0.embedding.projection.\1"),
    (r"patch_embed\.norm\.(\w+)", r"model.stages.0.embedding.norm.\1"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.(?P<rest>.+)", r"model.stages.\1.blocks.\2.", _TIMM_BLOCK),
    (r"layers\.(\d+)\.downsample\.norm\.(\w+)", r"model.stages.\1.embedding.norm.\2"),
    (r"layers\.(\d+)\.downsample\.reduction\.(\w+)", r"model.stages.\1.embedding.projection.\2"),
    (r"norm\.(\w+)", r"model.norm.\1"),
    (r"head\.fc\.(\w+)", r"head.classifier.\1"),
]

# Rebuilt from the configuration, or without a place in this family: the tanh pooler of a bare transformers model.
_DROPPED = r"pooler\..+|.*relative_position_index|.*attn_mask"


def from_transformers(model: PreTrainedModel) -> ViTCustomPreTrainedModel:
    """A transformers ViT, DeiT, PVT, Swin or ViTMAE (bare, classifier or masked autoencoder) with the same weights.

    The tanh pooler of a bare `ViTModel` has no counterpart and is left out: our pooling is the class token itself.
    A bare `ViTMAEModel` hides patches at random, a bare model of ours sees all of them unless given `ids_keep`.
    Where windows do not fill a Swin's grid, outputs differ: there the padding is attended to, here it is masked out.
    So they do where a grid is one window high and several wide: there neither side is shifted, here the longer one is.

    Raises:
        ValueError: if the model is of another kind, or uses what this family does not have.
    """
    kind, name = model.config.model_type, type(model).__name__
    readers = {
        "vit": _read_transformers_vit,
        "deit": _read_transformers_vit,
        "vit_mae": _read_transformers_vit,
        "pvt": _read_transformers_pvt,
        "swin": _read_transformers_swin,
    }
    classes = {
        "ForImageClassification": ViTCustomForImageClassification,
        "ForImageClassificationWithTeacher": ViTCustomForImageClassification,
        "ForPreTraining": ViTCustomForPreTraining,
        "Model": ViTCustomModel,
    }
    suffix = next((suffix for suffix in classes if name.endswith(suffix)), None)
    if kind not in readers or suffix is None:
        raise ValueError(
            f"cannot convert a {name} (model_type {kind!r}): give a bare model, a classifier or a masked autoencoder "
            f"of {', '.join(readers)}"
        )
    fields, rules = readers[kind](model)
    # PvtConfig keeps its number of labels apart from its label names, and may have none of these.
    if model.config.id2label and len(model.config.id2label) == model.config.num_labels:
        fields |= {"id2label": model.config.id2label, "label2id": model.config.label2id}
    else:
        fields["num_labels"] = model.config.num_labels
    fields["problem_type"] = model.config.problem_type
    prefix = f"{model.base_model_prefix}."
    state_dict = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    return _build(classes[suffix], fields, rules, state_dict)


def from_timm(model: nn.Module) -> ViTCustomPreTrainedModel:
    """A timm ViT, DeiT (distilled as well), DeiT III or Swin with the same weights.

    Without a classifier (`num_classes=0`) it becomes a bare `ViTCustomModel`. Dropouts and drop path are not carried
    over. Where windows do not fill a Swin's grid, outputs differ: there the padding is attended to, here masked out.

    Raises:
        ValueError: if the model is of another kind, or uses what this family does not have.
    """
    readers = {
        "VisionTransformer": (_read_timm_vit, _TIMM_VIT),
        "VisionTransformerDistilled": (_read_timm_vit, _TIMM_VIT),
        "SwinTransformer": (_read_timm_swin, _TIMM_SWIN),
    }
    name = type(model).__name__
    if name not in readers:
        raise ValueError(f"cannot convert a {name}: give a timm {', '.join(readers)}")
    reader, rules = readers[name]
    fields = reader(model)
    if model.num_classes:
        fields["num_labels"] = model.num_classes
    target = ViTCustomForImageClassification if model.num_classes else ViTCustomModel
    return _build(target, fields, rules, model.state_dict())


def _read_transformers_vit(model: PreTrainedModel) -> tuple[dict, Rules]:
    config, rules = model.config, _TRANSFORMERS_VIT
    fields = {
        "image_size": config.image_size,
        "patch_size": _one_side("patch_size", config.patch_size),
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        **_read_shared(config),
    }
    if config.model_type == "deit":
        # Without a head of its own the distillation token is but one more token: a register.
        if type(model).__name__.endswith("WithTeacher"):
            fields["use_distillation_token"] = True
        else:
            fields["num_register_tokens"] = 1
            rules = [(r"embeddings\.distillation_token", "model.stages.0.prefix_tokens.register_tokens"), *rules]
    if config.model_type == "vit_mae":
        fields |= {
            "position_embedding_type": "sincos2d",
            "mask_ratio": config.mask_ratio,
            "norm_pix_loss": config.norm_pix_loss,
            "decoder_hidden_size": config.decoder_hidden_size,
            "decoder_num_hidden_layers": config.decoder_num_hidden_layers,
            "decoder_num_attention_heads": config.decoder_num_attention_heads,
            "decoder_intermediate_size": config.decoder_intermediate_size,
        }
    return fields, rules


def _read_transformers_pvt(model: PreTrainedModel) -> tuple[dict, Rules]:
    config = model.config
    if list(config.patch_sizes) != list(config.strides):
        raise ValueError(
            f"patch_sizes={config.patch_sizes} must equal strides={config.strides}: patches do not overlap"
        )
    fields = {
        "image_size": config.image_size,
        "patch_size": list(config.patch_sizes),
        "patch_norm": True,
        "num_channels": config.num_channels,
        "hidden_sizes": list(config.hidden_sizes),
        "depths": list(config.depths),
        "num_attention_heads": list(config.num_attention_heads),
        "intermediate_size": [int(w * r) for w, r in zip(config.hidden_sizes, config.mlp_ratios)],
        "sr_ratios": list(config.sequence_reduction_ratios),
        "layer_norm_eps": config.layer_norm_eps,
        "patch_norm_eps": config.layer_norm_eps,
        "sr_norm_eps": config.layer_norm_eps,
        "drop_path_rate": config.drop_path_rate,
        **_read_shared(config),
    }
    # A reduced stage keeps queries apart from keys and values.
    reduced = "|".join(str(stage) for stage, ratio in enumerate(config.sequence_reduction_ratios) if ratio > 1)
    if not reduced:
        return fields, _TRANSFORMERS_PVT
    projections = (
        rf"encoder\.block\.({reduced})\.(\d+)\.attention\.self\.(?P<rest>(?:query|key|value)\..+)",
        r"model.stages.\1.blocks.\2.attention.",
        [
            (r"query\.(\w+)", r"query.\1"),
            (r"key\.(\w+)", r"key_value.\1!k"),
            (r"value\.(\w+)", r"key_value.\1!v"),
        ],
    )
    return fields, [projections, *_TRANSFORMERS_PVT]


def _read_transformers_swin(model: PreTrainedModel) -> tuple[dict, Rules]:
    config = model.config
    stages = len(config.depths)
    widths = [config.embed_dim * 2**stage for stage in range(stages)]
    fields = {
        "image_size": config.image_size,
        "patch_size": [_one_side("patch_size", config.patch_size)] + [2] * (stages - 1),
        "patch_norm": True,
        "patch_merging": True,
        "num_channels": config.num_channels,
        "hidden_sizes": widths,
        "depths": list(config.depths),
        "num_attention_heads": list(config.num_heads),
        "intermediate_size": [int(width * config.mlp_ratio) for width in widths],
        "window_size": config.window_size,
        "use_class_token": False,
        "pooling": "mean",
        "position_embedding_type": "none",
        "layer_norm_eps": config.layer_norm_eps,
        "drop_path_rate": config.drop_path_rate,
        **_read_shared(config),
    }
    if config.use_absolute_embeddings:
        fields["position_embedding_type"] = ["learned"] + ["none"] * (stages - 1)
    return fields, _TRANSFORMERS_SWIN


def _read_shared(config) -> dict:
    """What transformers' configurations of these families name alike."""
    activations = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}
    if config.hidden_act not in activations:
        raise ValueError(f"hidden_act={config.hidden_act!r} has no counterpart: only {', '.join(activations)} have")
    return {
        "hidden_act": activations[config.hidden_act],
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "initializer_range": config.initializer_range,
    }


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
    registers = getattr(model, "num_reg_tokens", 0)
    return {
        "image_size": list(model.patch_embed.img_size),
        "patch_size": _one_side("patch_size", model.patch_embed.patch_size),
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "use_class_token": model.cls_token is not None,
        "use_distillation_token": distilled,
        "num_register_tokens": registers,
        "position_embedding_type": "none" if model.pos_embed is None else "learned",
        "position_antialias": model.pos_embed is not None,
        "pooling": "cls" if model.global_pool == "token" else "mean",
        "norm_after_pooling": isinstance(model.norm, nn.Identity),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": type(block.attn.q_norm).__name__ != "Identity",
        "layer_scale_init_value": 1e-6 if hasattr(block.ls1, "gamma") else None,
        "hidden_act": _read_timm_activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }


def _read_timm_swin(model: nn.Module) -> dict:
    blocks = [stage.blocks[0] for stage in model.layers]
    windows = [_one_side("window_size", block.attn.window_size) for block in blocks]
    widths = [block.attn.qkv.in_features for block in blocks]
    if any(block.always_partition for block in blocks):
        raise ValueError("always_partition=True has no counterpart: a window that covers the grid is not shifted")
    if model.head.global_pool.pool_type != "avg":
        raise ValueError(f"global_pool={model.head.global_pool.pool_type!r} has no counterpart: only 'avg' has")
    return {
        "image_size": list(model.patch_embed.img_size),
        "patch_size": [_one_side("patch_size", model.patch_embed.patch_size)] + [2] * (len(widths) - 1),
        "patch_norm": True,
        "patch_merging": True,
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_sizes": widths,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_attention_heads": [block.attn.num_heads for block in blocks],
        "intermediate_size": [block.mlp.fc1.out_features for block in blocks],
        "window_size": windows[0] if len(set(windows)) == 1 else windows,
        "use_class_token": False,
        "pooling": "mean",
        "position_embedding_type": "none",
        "qkv_bias": blocks[0].attn.qkv.bias is not None,
        "hidden_act": _read_timm_activation(blocks[0].mlp.act),
        "layer_norm_eps": model.norm.eps,
        "patch_norm_eps": model.patch_embed.norm.eps,
    }


def _read_timm_activation(activation: nn.Module) -> str:
    if not isinstance(activation, nn.GELU):
        raise ValueError(f"activation {type(activation).__name__} has no counterpart: only GELU has")
    return "gelu_pytorch_tanh" if activation.approximate == "tanh" else "gelu"


def _one_side(name: str, value: int | tuple[int, int]) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise ValueError(f"{name}={value} must be square")
    return sides.pop()


def _build(
    target: type[ViTCustomPreTrainedModel], fields: dict, rules: Rules, state_dict: dict[str, Tensor]
) -> ViTCustomPreTrainedModel:
    """A model of `target` with the tensors of `state_dict`, renamed by `rules`.

    Raises:
        ValueError: if tensors are missing, left over or of another shape.
    """
    model = target(ViTCustomConfig(**fields))
    renamed = {_rename(name, rules): t for name, t in state_dict.items() if not re.fullmatch(_DROPPED, name)}
    merged = _merge(renamed, model.config)
    if target is ViTCustomModel:
        merged = {name.removeprefix("model."): tensor for name, tensor in merged.items()}
    expected = model.state_dict()
    missing, unexpected = expected.keys() - merged.keys(), merged.keys() - expected.keys()
    wrong = [name for name in expected.keys() & merged.keys() if expected[name].shape != merged[name].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"the weights do not fit the configuration: missing {sorted(missing)}, unexpected {sorted(unexpected)}, "
            f"of another shape {sorted(wrong)}"
        )
    model.load_state_dict(merged)
    source = next(tensor for tensor in state_dict.values() if tensor.is_floating_point())
    return model.to(source.device, source.dtype).eval()


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement, *rules_of_rest in rules:
        match = re.fullmatch(pattern, name)
        if match:
            renamed = re.sub(r"(\d+)\+1", lambda number: str(int(number[1]) + 1), match.expand(replacement))
            return renamed + (_rename(match["rest"], *rules_of_rest) if rules_of_rest else "")
    raise ValueError(f"the weights hold a tensor without counterpart: {name}")


def _merge(renamed: dict[str, Tensor], config: ViTCustomConfig) -> dict[str, Tensor]:
    """Fuse projections marked `!q`, `!k`, `!v`, and fold marked positions of prefix tokens into the tokens."""
    merged: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        name, _, mark = name.partition("!")
        if mark in ("q", "k", "v"):
            merged[name] = torch.cat([renamed[f"{name}!{part}"] for part in "qkv" if f"{name}!{part}" in renamed])
        elif mark == "position":
            stage = config.decoder_stage if name.startswith("decoder.") else config.stages[int(name.split(".")[2])]
            rows = tensor.shape[1] - stage.grid_size[0] * stage.grid_size[1]
            merged[name] = tensor[:, rows:].clone()
            _fold_prefix_positions(name, tensor[:, :rows], renamed, merged)
        elif name not in merged:
            merged[name] = tensor.reshape(-1) if name == "decoder.mask_token.weight" else tensor
    return merged


def _fold_prefix_positions(name: str, positions: Tensor, renamed: dict[str, Tensor], merged: dict[str, Tensor]) -> None:
    if name.startswith("decoder."):
        if positions.any():
            raise ValueError("the decoder gives its class token a position, which has no counterpart")
        return
    row = 0
    for token in ("class_token", "distillation_token", "register_tokens"):
        token = name.replace("position_embedding.weight", f"prefix_tokens.{token}")
        if token in renamed and row < positions.shape[1]:
            count = renamed[token].shape[1]
            merged[token] = renamed[token] + positions[:, row : row + count]
            row += count
