"""The configuration of a foreign checkpoint: what its shapes say, and what is written beside them."""

import math
import re
import warnings
from collections.abc import Mapping

from ..presets import list_presets, preset_config
from .layouts import Piece


Shapes = Mapping[str, tuple[int, ...]]
# What tensors tell and what is written beside them must be the same of.
TOLD_TWICE = (
    "depths",
    "hidden_size",
    "hidden_sizes",
    "intermediate_size",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "num_labels",
    "patch_size",
    "position_embedding_type",
    "qkv_bias",
    "sr_ratios",
    "use_class_token",
)
PREFIX_TOKENS = ("class_token", "distillation_token", "register_tokens")


def shapes_of_ours(pieces: Mapping[str, Piece], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors, unstacked."""
    found = {}
    for ours, piece in pieces.items():
        first, *rest = shapes[piece.name] or (1,)
        found[ours] = (first // piece.count, *rest)
    return found


def read_fields(shapes: Shapes, known: Mapping) -> dict:
    """Fields of `ViTCustomConfig`.

    Args:
        shapes: Of our tensors, unstacked.
        known: Fields that are written beside the weights, or given; they go before what shapes say.

    Raises:
        ValueError: if tensors are missing without which nothing can be said, heads or the image size are not known, or
            the two do not agree.
    """
    depths = _count_blocks(shapes)
    stages = [f"model.stages.{stage}." for stage in range(len(depths))]
    embeddings = [_shape(shapes, f"{stage}embedding.projection.weight", 2, 4) for stage in stages]
    first_blocks = [f"{stage}blocks.0." for stage in stages]
    for each in embeddings:
        if len(each) == 4 and each[2] != each[3]:
            raise ValueError(f"patch_size={each[2:]} must be square")
    widths = [each[0] for each in embeddings]
    merging = len(depths) > 1 and len(embeddings[-1]) == 2
    tables = [_find(shapes, f"{block}attention.relative_position_bias_table", 2) for block in first_blocks]
    positions = [_find(shapes, f"{stage}position_embedding.weight", 3) for stage in stages]
    reductions = [_find(shapes, f"{block}attention.reduction.weight", 4) for block in first_blocks]
    last = f"{stages[-1]}prefix_tokens."
    tokens = {name: _shape(shapes, last + name, 3)[1] for name in PREFIX_TOKENS if last + name in shapes}
    mean = "class_token" not in tokens or "model.pooling.norm.weight" in shapes
    fields = {
        "num_channels": embeddings[0][1],
        "patch_size": [2 if len(each) == 2 else each[-1] for each in embeddings],
        "patch_norm": f"{stages[0]}embedding.norm.weight" in shapes,
        "patch_merging": merging,
        "hidden_sizes": widths,
        "depths": depths,
        "intermediate_size": [_shape(shapes, f"{block}mlp.fc1.weight", 2)[0] for block in first_blocks],
        "sr_ratios": [reduction[-1] if reduction else 1 for reduction in reductions],
        "window_size": [_read_window(table) if table else 0 for table in tables],
        "use_class_token": "class_token" in tokens,
        "use_distillation_token": "distillation_token" in tokens,
        "num_register_tokens": tokens.get("register_tokens", 0),
        "position_embedding_type": ["learned" if table else "none" for table in positions],
        "pooling": "mean" if mean else "cls",
        "norm_after_pooling": "model.pooling.norm.weight" in shapes,
        "qkv_bias": f"{first_blocks[0]}attention.query.bias" in shapes,
        "qk_norm": f"{first_blocks[0]}attention.query_norm.weight" in shapes,
        "layer_scale_init_value": 1e-6 if f"{first_blocks[0]}attention_scale.weight" in shapes else None,
    }
    if "head.classifier.weight" in shapes:
        fields["num_labels"] = _shape(shapes, "head.classifier.weight", 2)[0]
    if "head.representation.weight" in shapes:
        fields["representation_size"] = _shape(shapes, "head.representation.weight", 2)[0]
    if "decoder.embedding.weight" in shapes:
        fields |= _read_decoder(shapes)
    if all(tables):
        fields["num_attention_heads"] = [table[1] for table in tables]
    if len(depths) == 1:
        fields["hidden_size"], fields["num_hidden_layers"] = fields.pop("hidden_sizes"), fields.pop("depths")
        fields = {name: value[0] if isinstance(value, list) else value for name, value in fields.items()}
    else:
        fields |= {name: _one(value) for name, value in fields.items() if name not in ("hidden_sizes", "depths")}
    _compare(fields, known)
    fields |= known
    if "num_attention_heads" not in fields:
        fields["num_attention_heads"] = _guess_heads(widths)
    if "image_size" not in fields:
        fields["image_size"] = _find_image_size(fields, shapes)
    return fields


def _compare(found: Mapping, known: Mapping) -> None:
    """Raises ValueError where tensors tell something else than what is known of them."""
    if "num_labels" in found and known.get("id2label"):
        known = {**known, "num_labels": len(known["id2label"])}
    for name in TOLD_TWICE:
        if name not in found or name not in known:
            continue
        ours, said = _one(found[name]), _one(known[name])
        if name == "position_embedding_type":  # whose tensor may be learnt or not
            ours, said = (["none" if each == "none" else "there" for each in _listed(value)] for value in (ours, said))
            ours, said = _one(ours), _one(said)
        if ours != said:
            raise ValueError(f"{name} is {ours} by its tensors, and {said} by what is written beside them or given")


def _listed(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_shapes(found: Shapes, expected: Shapes, position_rows: set[int]) -> None:
    """Raises ValueError for a tensor of another shape.

    Args:
        found: Shapes of tensors.
        expected: What they must be.
        position_rows: How many rows of prefix tokens a table of positions may begin with.
    """
    for name, wanted in expected.items():
        shape = found[name]
        if name.endswith("mask_token.weight"):
            shape = (math.prod(shape),)
        if name.endswith("position_embedding.weight") and len(shape) == 3 and shape[1] - wanted[1] in position_rows:
            shape = (shape[0], wanted[1], shape[2])
        if shape != wanted:
            raise ValueError(f"{name} has the shape {found[name]}, and the other tensors ask for {wanted}")


def count_position_rows(shape: tuple[int, ...], grid: tuple[int, int]) -> int:
    """Rows of a table of positions (1, rows + h * w, D) before those of the patches."""
    return shape[1] - grid[0] * grid[1]


def _count_blocks(shapes: Shapes) -> list[int]:
    """Blocks of each stage."""
    found: dict[int, set[int]] = {}
    for name in shapes:
        match = re.match(r"model\.stages\.(\d+)\.blocks\.(\d+)\.", name)
        if match:
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    counts = [len(found[stage]) for stage in sorted(found)]
    # Before anything is made of a number in a name, which may be any.
    if not found or max(found) >= len(found) or any(max(found[stage]) >= len(found[stage]) for stage in found):
        raise ValueError(f"blocks are missing: there are {counts} in {len(found)} stages, not numbered one by one")
    return counts


def _find(shapes: Shapes, name: str, *dimensions: int) -> tuple[int, ...] | None:
    """The shape of a tensor with so many dimensions, if it is there."""
    if name in shapes and len(shapes[name]) not in dimensions:
        wanted = " or ".join(map(str, dimensions))
        raise ValueError(f"{name} has the shape {shapes[name]}, and must have {wanted} dimensions")
    return shapes.get(name)


def _shape(shapes: Shapes, name: str, *dimensions: int) -> tuple[int, ...]:
    shape = _find(shapes, name, *dimensions)
    if shape is None:
        raise ValueError(f"a tensor is missing: {name}")
    return shape


def _read_window(table: tuple[int, ...]) -> int:
    """Side M of a window with (2M - 1)^2 relative positions."""
    side = math.isqrt(table[0])
    if side**2 != table[0] or side % 2 == 0:
        raise ValueError(f"window_size must be square, and {table[0]} relative positions are of no square window")
    return (side + 1) // 2


def _read_decoder(shapes: Shapes) -> dict:
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"decoder\.blocks\.(\d+)\.", name))}
    width = _shape(shapes, "decoder.embedding.weight", 2)[0]
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": len(blocks),
        "decoder_intermediate_size": _shape(shapes, "decoder.blocks.0.mlp.fc1.weight", 2)[0],
        # 16 of 32 channels in the paper, whose decoder is 512 wide.
        "decoder_num_attention_heads": max(1, width // 32),
    }


def _guess_heads(widths: list[int]) -> int | list[int]:
    """Of a preset with these widths, with a warning: others of these widths may have other heads.

    Raises:
        ValueError: if there is none: with another number a model would work, and be wrong.
    """
    for name in list_presets():
        stages = preset_config(name).stages
        if [stage.hidden_size for stage in stages] == widths and not any(stage.window_size for stage in stages):
            heads = _one([stage.num_attention_heads for stage in stages])
            warnings.warn(
                f"the weights do not tell the number of attention heads: {heads} are assumed, as {name} has, which is "
                "as wide (num_attention_heads states another)",
                stacklevel=2,
            )
            return heads
    raise ValueError(
        f"weights do not tell the number of attention heads, and no preset has the widths {widths}: give --preset or "
        "--num_attention_heads"
    )


def _find_image_size(fields: Mapping, shapes: Shapes) -> int:
    """Side of the square images whose patches have as many positions, or as many windows as those of Swin's."""
    patch = fields["patch_size"]
    first_patch = patch if isinstance(patch, int) else patch[0]
    table = shapes.get("model.stages.0.position_embedding.weight")
    if table is None:
        windows = fields["window_size"]
        if not windows:
            raise ValueError("weights without positions do not tell the image size, and positions are missing")
        side = (windows if isinstance(windows, int) else windows[0]) * 32
        warnings.warn(
            f"the weights do not tell the image size: {side} x {side} is assumed, as of the published ones with "
            f"windows of {windows}",
            stacklevel=2,
        )
        return side
    registers = fields["num_register_tokens"]
    tokens = fields["use_class_token"] + fields["use_distillation_token"]
    for rows in (tokens, tokens + registers, 0):
        side = math.isqrt(max(table[1] - rows, 0))
        if side and side**2 == table[1] - rows:
            return side * first_patch
    raise ValueError(f"{table[1]} positions are of no square grid: the configuration must tell the image size")


def _one(values):
    """A single value where all stages have the same."""
    if isinstance(values, list) and all(value == values[0] for value in values):
        return values[0]
    return values
