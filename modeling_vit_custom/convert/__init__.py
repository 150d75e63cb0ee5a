"""Checkpoints of other libraries as models of this family, and back, with the same weights.

`convert` opens what lies in a file, a folder or on the Hub; `from_transformers` and `from_timm` take models that are
open already, `to_transformers`, `to_timm` and `to_npz` go back, `to_onnx` and `to_exported_program` make graphs for
other runtimes, and `export` writes what they make.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTImageProcessor

from ..configuration_vit_custom import ViTCustomConfig
from ..modeling_vit_custom import (
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
    ViTCustomPreTrainedModel,
)
from ..presets import preset_config
from .checkpoints import open_checkpoint
from .export import export, to_npz, to_timm, to_transformers
from .fields import PREFIX_TOKENS, check_shapes, count_position_rows, read_fields, shapes_of_ours
from .foreign_configs import (
    read_metadata,
    read_timm,
    read_transformers,
    timm_layout,
    timm_preprocessing,
    transformers_layout,
)
from .graphs import to_exported_program, to_onnx
from .int8 import to_int8
from .layouts import TRANSFORMERS_DEIT, Layout, Piece, assemble, own_pieces
from .preprocessing import make_image_processor


__all__ = [
    "convert",
    "export",
    "from_timm",
    "from_transformers",
    "to_exported_program",
    "to_int8",
    "to_npz",
    "to_onnx",
    "to_timm",
    "to_transformers",
]


def convert(
    source: str | os.PathLike, revision: str = "main", preset: str | None = None, **fields
) -> tuple[ViTCustomPreTrainedModel, ViTImageProcessor]:
    """A checkpoint of another library, and the image processor that goes with it.

    Google's `.npz`; timm's folders and files; the files of DeiT, DeiT III, PVT, Swin, MAE and SimMIM; transformers'
    folders of ViT, DeiT, PVT, Swin, ViTMAE and SimMIM, of 4.x and of 5.x; torchvision's `vit_*` and `swin_*`. Which of
    them it is, tensors' names say. Nothing that a file holds is run.

    Args:
        source: A file, a folder, or `user/name` on the Hub.
        revision: Branch, tag or commit on the Hub.
        preset: A size of `list_presets()`, whose heads and epsilon count where nothing is written beside the weights.
        fields: Of `ViTCustomConfig`, where weights do not tell them, such as `num_attention_heads`, or `image_size`,
            which is that of the weights (`resize_image_size` of the model makes it another one).

    Returns:
        The model in evaluation mode, in the precision of the weights: with a head if they have one. And its processor.

    Raises:
        ValueError: in one line, if the source does not open, is cut off, is of another architecture, or uses what this
            family does not have.
    """
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(ViTCustomConfig)})
    if unknown:
        raise ValueError(f"ViTCustomConfig has no field {unknown[0]!r}")
    checkpoint = open_checkpoint(source, revision)
    config = checkpoint.config
    try:
        layout, known = read_metadata(checkpoint)
        if preset is not None:
            known = {**known, **_read_preset(preset, config)}
        model = build(layout, checkpoint.tensors, checkpoint.tensors.shapes, {**known, **fields})
        if "ForImageClassification" in str(config.get("architectures")) and isinstance(model, ViTCustomModel):
            raise ValueError(f"its weights are those of {config['architectures'][0]}, and have no classifier")
        processor = make_image_processor(layout, model.config, checkpoint.preprocessor, timm_preprocessing(config))
    except ValueError as error:
        raise ValueError(f"cannot convert {str(source)!r}: {error}") from error
    except Exception as error:
        # Files of strangers hold values of every type and tensors of every kind, which fail in as many ways.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"cannot convert {str(source)!r}: it holds something unexpected ({reason})") from error
    return model, processor


def _read_preset(name: str, written: Mapping) -> dict:
    """Widths are compared with those of the weights."""
    if written:
        raise ValueError("its config.json tells what a preset would: leave the preset out")
    config = preset_config(name)
    names = ("num_attention_heads", "layer_norm_eps", "patch_norm_eps", "sr_norm_eps", "hidden_act")
    widths = "hidden_size" if len(config.stages) == 1 else "hidden_sizes"
    return {each: getattr(config, each) for each in (*names, widths)}


def from_transformers(model: PreTrainedModel) -> ViTCustomPreTrainedModel:
    """A transformers ViT, DeiT, PVT, Swin or ViTMAE (bare, classifier or for pretraining) with the same weights.

    The tanh pooler of a bare `ViTModel` has no counterpart and is left out: our pooling is the class token itself.
    A bare `ViTMAEModel` hides patches at random, a bare model of ours sees all of them unless given `ids_keep`.
    Where windows do not fill a Swin's grid, outputs differ: there the padding is attended to, here it is masked out.
    So they do where a grid is one window high and several wide: there neither side is shifted, here the longer one is.

    Raises:
        ValueError: if the model is of another kind, or uses what this family does not have.
    """

    def read() -> tuple[Layout, dict]:
        if not isinstance(model, PreTrainedModel):
            raise ValueError("it must be a model of transformers")
        return transformers_layout(model.config.model_type), read_transformers(model.config)

    return _from_module(model, read)


def from_timm(model: nn.Module) -> ViTCustomPreTrainedModel:
    """A timm ViT, DeiT (distilled as well), DeiT III or Swin with the same weights.

    Without a classifier (`num_classes=0`) it becomes a bare `ViTCustomModel`. Dropouts and drop path are not carried
    over. Where windows do not fill a Swin's grid, outputs differ: there the padding is attended to, here masked out.

    Raises:
        ValueError: if the model is of another kind, or uses what this family does not have.
    """
    return _from_module(model, lambda: (timm_layout(model), read_timm(model)))


def _from_module(model: nn.Module, read: Callable[[], tuple[Layout, dict]]) -> ViTCustomPreTrainedModel:
    try:
        layout, known = read()
        tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return build(layout, tensors, shapes, known).to(next(iter(tensors.values())).device)
    except ValueError as error:
        raise ValueError(f"cannot convert a {type(model).__name__}: {error}") from error


def build(
    layout: Layout, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], known: Mapping
) -> ViTCustomPreTrainedModel:
    """A model of ours with foreign tensors, in evaluation mode, in their precision.

    Args:
        layout: What the tensors' names mean.
        tensors: By their names there, read one by one.
        shapes: Of all of them.
        known: Fields of the configuration that shapes do not tell.

    Raises:
        ValueError: if tensors are missing, left over or of another shape.
    """
    pieces, strange = layout.read(shapes)
    has_one_head = "head.classifier.weight" in pieces and "head.distillation_classifier.weight" not in pieces
    if layout is TRANSFORMERS_DEIT and has_one_head:
        pieces = _as_registers(pieces)
    own_shapes = shapes_of_ours(pieces, shapes)
    fields = read_fields(own_shapes, known)
    config, target = ViTCustomConfig(**fields), _choose_class(pieces)
    prefix = "model." if target is ViTCustomModel else ""
    with torch.device("meta"):
        expected = {prefix + each: tuple(tensor.shape) for each, tensor in target(config).state_dict().items()}
    own = own_pieces(expected)
    missing = _names_there(layout, sorted(own.keys() - pieces.keys()))
    unexpected = sorted({*strange, *(pieces[each].name for each in pieces.keys() - own.keys())})
    if missing or unexpected:
        raise ValueError(
            f"its weights, taken as {layout.title}, do not fit: {_list('missing', missing)}"
            f"{', ' * bool(missing and unexpected)}{_list('unexpected', unexpected)}"
        )
    tokens = config.use_class_token + config.use_distillation_token
    check_shapes(own_shapes, shapes_of_ours(own, expected), {0, tokens, config.num_prefix_tokens})
    stacks: dict[str, list[Piece]] = {}
    for each, piece in own.items():
        stacks.setdefault(piece.name, []).append(pieces[each])
    state = {each: assemble(stack, tensors) for each, stack in stacks.items()}
    _fold_prefix_positions(state, config)
    for each, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{each} is of {tensor.dtype}: weights must be floating-point numbers")
        state[each] = tensor.reshape(expected[each])
    dtypes = {tensor.dtype for tensor in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    state = {each.removeprefix(prefix): state.pop(each) for each in list(state)}
    return target.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def _names_there(layout: Layout, names: list[str]) -> list[str]:
    """What tensors of ours are called there, or here if there are none of their kind."""
    places = ((name, layout.locate(name)) for name in names)
    return sorted({place[0] if place else name for name, place in places})


def _list(what: str, names: list[str], shown: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return f"{what} {', '.join(names[:shown])}{more}"


def _choose_class(names: Mapping) -> type[ViTCustomPreTrainedModel]:
    if "decoder.embedding.weight" in names:
        return ViTCustomForPreTraining
    if "decoder.weight" in names:
        return ViTCustomForMaskedImageModeling
    return ViTCustomForImageClassification if "head.classifier.weight" in names else ViTCustomModel


def _as_registers(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """A distillation token without a head of its own is but one more token."""
    return {
        name.replace("prefix_tokens.distillation_token", "prefix_tokens.register_tokens"): piece
        for name, piece in pieces.items()
    }


def _fold_prefix_positions(state: dict[str, Tensor], config: ViTCustomConfig) -> None:
    """Positions of prefix tokens become a part of the tokens.

    Raises:
        ValueError: if a decoder has some.
    """
    for name in [name for name in state if name.endswith("position_embedding.weight")]:
        is_decoder = name.startswith("decoder.")
        stage = config.decoder_stage if is_decoder else config.stages[int(name.split(".")[2])]
        rows = count_position_rows(state[name].shape, stage.grid_size)
        positions, state[name] = state[name][:, :rows], state[name][:, rows:].clone()
        if is_decoder:
            if positions.any():
                raise ValueError("the decoder gives its class token a position, which has no counterpart")
            continue
        row = 0
        for token in PREFIX_TOKENS:
            token = name.replace("position_embedding.weight", f"prefix_tokens.{token}")
            if token in state and row < rows:
                count = state[token].shape[1]
                state[token] = state[token] + positions[:, row : row + count]
                row += count
