"""Models of this family as models of other libraries, with the same weights, and as files.

All raise ValueError for what the other library does not have.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTImageProcessor

from ..configuration_vit_custom import StageConfig, ViTCustomConfig
from ..modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
    ViTCustomPreTrainedModel,
)
from .foreign_configs import TRANSFORMERS_LAYOUTS
from .graphs import NO_MERGING, check_exportable, to_exported_program, to_onnx
from .layouts import TIMM_SWIN, TIMM_VIT, TRANSFORMERS_SINGLE_DEIT, VIT_JAX, Layout, assemble, own_pieces
from .preprocessing import describe_preprocessing


FORMATS = ("timm", "transformers", "npz", "onnx", "pt2")


def export(model: ViTCustomPreTrainedModel, image_processor: ViTImageProcessor, to: str, folder: Path) -> None:
    """Write a model in one of `FORMATS` into a folder.

    timm opens it as `timm.create_model("local-dir:FOLDER", pretrained=True)`, transformers with its Auto classes,
    vit_jax the file `model.npz` in it, onnxruntime `model.onnx`, and `torch.export.load` `model.pt2`. Beside a graph
    lie the configuration, for the labels, and the image processor.
    """
    if to == "npz":
        np.savez(folder / "model.npz", **to_npz(model))
    elif to == "transformers":
        to_transformers(model, copy=False).save_pretrained(folder)
        image_processor.save_pretrained(folder)
    elif to in ("onnx", "pt2"):
        if to == "onnx":
            to_onnx(model).save(folder / "model.onnx")
        else:
            torch.export.save(to_exported_program(model), folder / "model.pt2")
        model.config.save_pretrained(folder)
        image_processor.save_pretrained(folder)
    else:
        import timm

        name, options = timm_architecture(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which the line above gave already
            theirs = to_timm(model, copy=False)
        theirs.pretrained_cfg = {"architecture": name, "num_classes": theirs.num_classes}
        theirs.pretrained_cfg |= describe_preprocessing(image_processor, model.config)
        names = [model.config.id2label[index] for index in range(theirs.num_classes)]
        timm.models.save_for_hf(theirs, folder, {"label_names": names} if names else None, options, True)


def to_timm(model: ViTCustomPreTrainedModel, copy: bool = True) -> nn.Module:
    """A timm `VisionTransformer`, `VisionTransformerDistilled` or `SwinTransformer`.

    A bare encoder has no classifier there (`num_classes=0`).

    Args:
        model: With any weights.
        copy: Otherwise both share tensors, in half the memory: use only one of them from then on.
    """
    import timm  # here and below: a Space, where models are opened as well, need not have it

    name, options = timm_architecture(model)
    layout = TIMM_SWIN if "swin" in name else TIMM_VIT
    # Swin's buffers follow from its configuration, and are not saved.
    with torch.device("cpu" if layout is TIMM_SWIN else "meta"):
        theirs = timm.create_model(name, pretrained=False, **options)
    expected, tensors = theirs.state_dict(), rename(model, layout)
    if "pos_embed" in tensors and "pos_embed" in expected:
        tensors["pos_embed"] = _with_prefix_rows(tensors["pos_embed"], expected["pos_embed"].shape[1])
    buffers = {name for name, _ in theirs.named_buffers()}
    _fit(tensors, expected, buffers, "timm", copy)
    theirs.load_state_dict(tensors, strict=False, assign=True)
    return theirs.to(model.device).eval()


def timm_architecture(model: ViTCustomPreTrainedModel) -> tuple[str, dict]:
    """A name that `timm.create_model` knows, and what to pass besides."""
    check_exportable(model)
    config = model.config
    stages, first = config.stages, config.stages[0]
    if not isinstance(model, (ViTCustomForImageClassification, ViTCustomModel)):
        raise ValueError(f"timm has no {type(model).__name__}: export its encoder or a classifier")
    if config.token_merging:
        raise ValueError(NO_MERGING.format(config.token_merging, "timm"))
    if any(stage.sr_ratio > 1 for stage in stages) or (len(stages) > 1 and not first.window_size):
        raise ValueError("timm has no PVT of the first version: export to transformers")
    shared = {
        "img_size": list(config.native_size),
        "patch_size": first.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": first.hidden_size,
        "mlp_ratio": _one_ratio(config),
        "qkv_bias": config.qkv_bias,
        "num_classes": config.num_labels if isinstance(model, ViTCustomForImageClassification) else 0,
    }
    # The constructors there take no epsilon by its value.
    _compare_epsilon(config.layer_norm_eps, 1e-5 if first.window_size else 1e-6, "timm")
    if first.window_size:
        windows = {stage.window_size for stage in stages}
        if len(windows) > 1:
            raise ValueError(f"window_size={config.window_size} must be one for all stages in timm")
        if config.hidden_act != "gelu":
            raise ValueError(f"timm has no Swin with hidden_act={config.hidden_act!r}")
        _compare_epsilon(config.patch_norm_eps, 1e-5, "timm")
        _warn_of_padding(config, "timm")
        swin = {
            "depths": [stage.depth for stage in stages],
            "num_heads": [stage.num_attention_heads for stage in stages],
            "window_size": windows.pop(),
        }
        return "swin_tiny_patch4_window7_224", shared | swin
    if config.hidden_act != "gelu":
        shared["act_layer"] = "gelu_tanh"
    vit = {
        "depth": first.depth,
        "num_heads": first.num_attention_heads,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale_init_value,
        "class_token": config.use_class_token,
        "reg_tokens": config.num_register_tokens,
        "global_pool": "token" if config.pooling == "cls" else "avg",
        "fc_norm": config.norm_after_pooling,
        "pos_embed": "none" if first.position_embedding_type == "none" else "learn",
    }
    if config.use_distillation_token:
        others = {"pooling": config.pooling != "cls", "position_embedding_type": vit["pos_embed"] == "none"}
        wrong = next((name for name, is_other in others.items() if is_other), None)
        if wrong:
            raise ValueError(f"timm has no distilled model with {wrong}={getattr(config, wrong)!r}")
        vit = {name: vit[name] for name in ("depth", "num_heads", "qk_norm", "init_values")}
        return "deit_tiny_distilled_patch16_224", shared | vit
    return "vit_tiny_patch16_224", shared | vit


def to_transformers(model: ViTCustomPreTrainedModel, copy: bool = True) -> PreTrainedModel:
    """A transformers ViT, DeiT, PVT, Swin or ViTMAE: bare, classifier or for pretraining.

    Args:
        model: With any weights.
        copy: Otherwise both share tensors, in half the memory: use only one of them from then on.
    """
    kind, fields = transformers_config(model)
    config = model.config
    has_spare_token = _has_spare_token(model)
    layout = TRANSFORMERS_SINGLE_DEIT if has_spare_token else TRANSFORMERS_LAYOUTS[kind]
    their_config = transformers.CONFIG_MAPPING[kind](**fields)
    names = {
        ViTCustomForImageClassification: "ForImageClassification" + "WithTeacher" * config.use_distillation_token,
        ViTCustomForMaskedImageModeling: "ForMaskedImageModeling",
        ViTCustomForPreTraining: "ForPreTraining",
        ViTCustomModel: "Model",
    }
    prefixes = {"vit": "ViT", "vit_mae": "ViTMAE", "deit": "DeiT", "pvt": "Pvt", "swin": "Swin"}
    their_name = prefixes[kind] + names[type(model)]
    their_class = getattr(transformers, their_name, None)
    if their_class is None:
        raise ValueError(f"transformers has no {their_name}")
    with torch.device("meta"):
        expected = their_class(their_config).state_dict()
    tensors = rename(model, layout, {"register_tokens": "distillation_token"} if has_spare_token else {})
    if isinstance(model, ViTCustomModel):
        tensors = {name.removeprefix(layout.prefix): tensor for name, tensor in tensors.items()}
    for name in tensors:
        if "position_embeddings" in name or name.endswith("decoder_pos_embed"):
            tensors[name] = _with_prefix_rows(tensors[name], expected[name].shape[1])
    # The tanh pooler of a bare model follows the token that ours returns, and starts anew.
    pooler = {name for name in expected if name.startswith("pooler.")}
    _fit(tensors, expected, pooler, "transformers", copy)
    theirs = their_class.from_pretrained(None, config=their_config, state_dict=tensors, dtype=model.dtype)
    # A model saves the names that it was given, unless it knows of none: then those that transformers 4 reads as well.
    theirs._weight_conversions = None
    return theirs.to(model.device).eval()


def transformers_config(model: ViTCustomPreTrainedModel) -> tuple[str, dict]:
    """The `model_type` and the fields of its configuration."""
    check_exportable(model)
    config = model.config
    if isinstance(model, ViTCustomBackbone):
        raise ValueError("transformers has no ViTCustomBackbone: export its encoder or a classifier")
    if config.token_merging:
        raise ValueError(NO_MERGING.format(config.token_merging, "transformers"))
    stages, first = config.stages, config.stages[0]
    refused = {
        "num_register_tokens": config.num_register_tokens > 0 and not _has_spare_token(model),
        "qk_norm": config.qk_norm,
        "layer_scale_init_value": config.layer_scale_init_value is not None,
        "norm_after_pooling": config.norm_after_pooling,
        "representation_size": config.representation_size is not None,
        "head_batch_norm": config.head_batch_norm,
    }
    wrong = next((name for name, is_refused in refused.items() if is_refused), None)
    if wrong:
        raise ValueError(f"{wrong}={getattr(config, wrong)} has no counterpart in transformers")
    shared = {
        "image_size": list(config.native_size)
        if config.native_size[0] != config.native_size[1]
        else config.native_size[0],
        "num_channels": config.num_channels,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.hidden_act,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "initializer_range": config.initializer_range,
        "problem_type": config.problem_type,
        "id2label": config.id2label,
        "label2id": config.label2id,
    }
    if first.window_size:
        if {stage.window_size for stage in stages} != {first.window_size}:
            raise ValueError(f"window_size={config.window_size} must be one for all stages in transformers")
        _compare_epsilon(config.patch_norm_eps, 1e-5, "transformers")
        _warn_of_padding(config, "transformers")
        _warn_of_shifts(config)
        return "swin", shared | {
            "patch_size": first.patch_size,
            "embed_dim": first.hidden_size,
            "depths": [stage.depth for stage in stages],
            "num_heads": [stage.num_attention_heads for stage in stages],
            "mlp_ratio": _one_ratio(config),
            "window_size": first.window_size,
            "drop_path_rate": config.drop_path_rate,
            "use_absolute_embeddings": first.position_embedding_type != "none",
            "encoder_stride": first.patch_size * 2 ** (len(stages) - 1),
        }
    if config.pooling != "cls" and isinstance(model, ViTCustomForImageClassification):
        raise ValueError("pooling='mean' has no counterpart in transformers' ViT and PVT, which read their class token")
    if len(stages) > 1 or first.sr_ratio > 1:
        if config.native_size[0] != config.native_size[1]:
            raise ValueError(f"image_size={config.image_size} must be square in transformers' PVT")
        for epsilon in (config.patch_norm_eps, config.sr_norm_eps):
            _compare_epsilon(epsilon, config.layer_norm_eps, "transformers")
        return "pvt", shared | {
            "num_labels": config.num_labels,
            "num_encoder_blocks": len(stages),
            "patch_sizes": [stage.patch_size for stage in stages],
            "strides": [stage.patch_size for stage in stages],
            "hidden_sizes": [stage.hidden_size for stage in stages],
            "depths": [stage.depth for stage in stages],
            "num_attention_heads": [stage.num_attention_heads for stage in stages],
            "mlp_ratios": [_whole_ratio(stage) for stage in stages],
            "sequence_reduction_ratios": [stage.sr_ratio for stage in stages],
            "drop_path_rate": config.drop_path_rate,
        }
    fields = shared | {
        "patch_size": first.patch_size,
        "hidden_size": first.hidden_size,
        "num_hidden_layers": first.depth,
        "num_attention_heads": first.num_attention_heads,
        "intermediate_size": first.intermediate_size,
        "encoder_stride": first.patch_size,
    }
    if isinstance(model, ViTCustomForPreTraining):
        return "vit_mae", fields | {
            "mask_ratio": config.mask_ratio,
            "norm_pix_loss": config.norm_pix_loss,
            "decoder_hidden_size": config.decoder_hidden_size,
            "decoder_num_hidden_layers": config.decoder_num_hidden_layers,
            "decoder_num_attention_heads": config.decoder_num_attention_heads,
            "decoder_intermediate_size": config.decoder_intermediate_size,
        }
    return ("deit" if config.use_distillation_token or _has_spare_token(model) else "vit"), fields


def _warn_of_padding(config: ViTCustomConfig, library: str) -> None:
    grids = [(stage.grid_size, stage.window_size) for stage in config.stages]
    if any(side % window for grid, window in grids for side in grid):
        warnings.warn(
            f"windows do not fill the grid of {config.native_size[0]} x {config.native_size[1]} pixels: {library} "
            "attends to the padding, which is masked out here, and outputs differ",
            stacklevel=4,
        )


def _warn_of_shifts(config: ViTCustomConfig) -> None:
    """transformers shifts no windows where the shorter side of the grid is a single one."""
    shapes = [(sorted(stage.grid_size), stage.window_size) for stage in config.stages if stage.depth > 1]
    if any(shorter <= window < longer for (shorter, longer), window in shapes):
        warnings.warn(
            f"a grid of {config.native_size[0]} x {config.native_size[1]} pixels is one window high or wide: "
            "transformers does not shift its windows, which are shifted along the longer side here, and outputs differ",
            stacklevel=4,
        )


def _has_spare_token(model: ViTCustomPreTrainedModel) -> bool:
    """Whether it is a DeiT whose distillation token has no head: a register to us, and a model of its own there."""
    config = model.config
    has_one = config.use_class_token and config.num_register_tokens == 1 and not config.use_distillation_token
    return config.is_plain and has_one and not isinstance(model, ViTCustomForPreTraining)


def to_npz(model: ViTCustomPreTrainedModel) -> dict[str, np.ndarray]:
    """Arrays by their names in vit_jax, for a plain ViT or its classifier."""
    check_exportable(model)
    config = model.config
    if not config.is_plain or not isinstance(model, (ViTCustomForImageClassification, ViTCustomModel)):
        raise ValueError("Google's format is for a single stage of global attention, bare or a classifier")
    if config.token_merging:
        raise ValueError(NO_MERGING.format(config.token_merging, "Google's format"))
    # What its names and shapes would not tell, so that it would be read as something else.
    refused = {
        "pooling": config.pooling == "mean" and config.use_class_token,
        "image_size": config.native_size[0] != config.native_size[1],
        "qkv_bias": not config.qkv_bias,
        "position_embedding_type": config.stages[0].position_embedding_type == "none",
    }
    wrong = next((name for name, is_refused in refused.items() if is_refused), None)
    if wrong:
        raise ValueError(f"Google's format has no counterpart of {wrong}={getattr(config, wrong)!r}")
    _compare_epsilon(config.layer_norm_eps, 1e-6, "Google's code")
    if config.hidden_act != "gelu_pytorch_tanh":
        warnings.warn("Google's code has GELU by tanh, this model the exact one: outputs differ slightly", stacklevel=2)
    heads, arrays = config.stages[0].num_attention_heads, {}
    for name, tensor in rename(model, VIT_JAX).items():
        if name.endswith("pos_embedding"):
            tensor = _with_prefix_rows(tensor, tensor.shape[1] + config.num_prefix_tokens)
        key, array = _to_flax(name, tensor.cpu().float(), heads)
        arrays[key] = np.ascontiguousarray(array.numpy())
    return arrays


def rename(model: ViTCustomPreTrainedModel, layout: Layout, others: Mapping[str, str] = {}) -> dict[str, Tensor]:
    """All tensors of a model by their names in a layout, stacked as there; none of them is copied without need.

    Args:
        model: Of ours.
        layout: Of the other library.
        others: What the last parts of some names of ours are taken for.
    """
    prefix, tensors = "model." if isinstance(model, ViTCustomModel) else "", {}
    for name, tensor in model.state_dict().items():
        path, dot, last = name.rpartition(".")
        tensors[prefix + path + dot + others.get(last, last)] = tensor.detach()
    pieces = own_pieces(tensors)
    return {
        theirs: assemble([pieces[name] for name in stack], tensors) for theirs, stack in layout.write(pieces).items()
    }


def _to_flax(name: str, tensor: Tensor, heads: int) -> tuple[str, Tensor]:
    """The inverse of what `checkpoints` does."""
    *path, kind = name.split(".")
    module = path[-1] if path else ""
    is_attention = module in ("query", "key", "value", "out")
    if kind == "weight":
        kind = "scale" if "norm" in module.lower() else "kernel"
    if kind == "kernel":
        tensor = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        if is_attention:
            tensor = tensor.unflatten(0, (heads, -1)) if module == "out" else tensor.unflatten(1, (heads, -1))
    elif is_attention and module != "out":
        tensor = tensor.unflatten(0, (heads, -1))
    return "/".join([*path, kind]), tensor


def _with_prefix_rows(table: Tensor, rows: int) -> Tensor:
    """Positions of zero before those of patches: ours are in the tokens."""
    missing = rows - table.shape[1]
    if missing <= 0:
        return table
    return torch.cat([table.new_zeros(1, missing, table.shape[2]), table], dim=1)


def _compare_epsilon(ours: float, theirs: float, library: str) -> None:
    if ours != theirs:
        warnings.warn(
            f"{library} has an epsilon of {theirs:g} in norms where this model has {ours:g}: outputs differ slightly",
            stacklevel=4,
        )


def _one_ratio(config: ViTCustomConfig) -> float:
    ratios = {stage.intermediate_size / stage.hidden_size for stage in config.stages}
    if len(ratios) > 1:
        raise ValueError(f"intermediate_size={config.intermediate_size} must have one ratio to the widths there")
    return ratios.pop()


def _whole_ratio(stage: StageConfig) -> int:
    ratio, rest = divmod(stage.intermediate_size, stage.hidden_size)
    if rest:
        raise ValueError(f"intermediate_size={stage.intermediate_size} must be a multiple of {stage.hidden_size} there")
    return ratio


def _fit(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor], others: set[str], library: str, copy: bool
) -> None:
    """Gives tensors the shapes that the other model has for them, and a memory of their own if they are to be copied.

    Raises:
        ValueError: if it has other tensors, but for those of `others`, or of another size.
    """
    wrong = sorted((expected.keys() ^ tensors.keys()) - others)
    wrong += [name for name in tensors.keys() & expected.keys() if tensors[name].numel() != expected[name].numel()]
    if wrong:
        raise ValueError(f"{library} has no model of this configuration: {wrong[0]} does not fit")
    for name in tensors:
        tensors[name] = tensors[name].reshape(expected[name].shape)
        if copy:
            tensors[name] = tensors[name].clone()
