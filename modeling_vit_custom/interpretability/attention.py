"""What the blocks attend to: maps of their weights, how far they reach, and what comes of all of them together."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from ..modeling_vit_custom import (
    EncoderBlock,
    SpatialReductionAttention,
    Stage,
    ViTCustomForImageClassification,
    ViTCustomModel,
    ViTCustomPreTrainedModel,
    WindowAttention,
    check_images,
    count_patches,
    to_image,
)


# --------------------------------------------------------------------------------------------------- block after block


@dataclass(frozen=True)
class Block:
    """One block of an encoder for images of one size.

    Attributes:
        layer: Its number.
        module: It.
        start: The stage that it is the first block of, which embeds what comes in.
        incoming: The grid of the stage before that.
        grid: (h, w) of its patches.
        stride: Pixels from one patch to the next.
    """

    layer: int
    module: EncoderBlock
    start: Stage | None
    incoming: tuple[int, int] | None
    grid: tuple[int, int]
    stride: int

    def run(self, hidden: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """What the block before gave, or the images (B, C, H, W) -> tokens, and weights (B, A, queries, keys).

        The weights of windows are (B * windows, A, M * M, M * M).
        """
        if self.start is not None:
            image = hidden if self.incoming is None else to_image(hidden, self.incoming)
            hidden = self.start.embed(image, self.grid)
        return self.module(hidden, self.grid, output_attentions)[:2]

    @property
    def key_ratio(self) -> int:
        """How many patches beside each other, and below, make one key."""
        attention = self.module.attention
        return attention.sr_ratio if isinstance(attention, SpatialReductionAttention) else 1

    @property
    def key_grid(self) -> tuple[int, int]:
        return count_patches(self.grid, self.key_ratio)

    def keys_to_map(self, keys: Tensor) -> Tensor:
        """What each key has, (B, A, P + keys) or (B * windows, A, M * M), as a map (B, A, h, w)."""
        if isinstance(self.module.attention, WindowAttention):
            return merge_windows(keys, self.module.attention, self.grid)
        maps = keys[..., -math.prod(self.key_grid) :].unflatten(-1, self.key_grid)
        return spread(maps, self.key_ratio, self.grid)


def spread(maps: Tensor, times: int, size: tuple[int, int]) -> Tensor:
    """Each cell of maps (..., h, w) `times` as high and wide, without what goes beyond a size."""
    return maps.repeat_interleave(times, -2).repeat_interleave(times, -1)[..., : size[0], : size[1]]


def to_pixels(model: ViTCustomPreTrainedModel, maps: Tensor, size: tuple[int, int], is_smooth: bool = True) -> Tensor:
    """Maps (B, h, w) of the patches of any stage at the size (H, W) of the images: (B, H, W).

    The last patches may reach beyond the images.
    """
    stride = 1
    for stage, grid in zip(model.base_model.stages, model.base_model.feature_grids(size)):
        stride *= stage.patch_size
        if grid == tuple(maps.shape[1:]):
            break
    if not is_smooth:
        return spread(maps, stride, size)
    return F.interpolate(maps[:, None], scale_factor=stride, mode="bilinear")[:, 0, : size[0], : size[1]]


def split_windows(image: Tensor, attention: WindowAttention) -> Tensor:
    """What each patch has, as each window has it: (B, A, h, w) -> (B * windows, A, M * M), padded with zeros."""
    order, places, _ = attention.layout(tuple(image.shape[2:]))
    windows = image.new_zeros(*image.shape[:2], len(order)).index_copy(2, places, image.flatten(2))
    return windows.unflatten(2, (-1, attention.window_size**2)).transpose(1, 2).flatten(0, 1)


def merge_windows(windows: Tensor, attention: WindowAttention, grid: tuple[int, int]) -> Tensor:
    """The inverse of `split_windows`: (B * windows, A, M * M) -> (B, A, h, w)."""
    order, places, _ = attention.layout(grid)
    windows = windows.unflatten(0, (-1, len(order) // windows.shape[2])).transpose(1, 2).flatten(2)
    return windows[:, :, places].unflatten(2, grid)


def list_blocks(encoder: ViTCustomModel, size: tuple[int, int]) -> list[Block]:
    """The blocks of an encoder for images of a size (H, W)."""
    blocks, stride, incoming = [], 1, None
    for stage, grid in zip(encoder.stages, encoder.feature_grids(size)):
        stride *= stage.patch_size
        for index, module in enumerate(stage.blocks):
            start = None if index else stage
            blocks.append(Block(len(blocks), module, start, incoming, grid, stride))
        incoming = grid
    return blocks


def prepare_images(encoder: ViTCustomModel, pixel_values: Tensor) -> tuple[Tensor, list[Block]]:
    """Images as the first block takes them, and the blocks for them.

    Raises:
        ValueError: if the encoder cannot take them.
    """
    check_images(pixel_values, encoder.config.num_channels, encoder.stages[0].patch_size)
    return place(encoder, pixel_values), list_blocks(encoder, tuple(pixel_values.shape[-2:]))


def place(model: ViTCustomPreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Images where a model is, and in the precision of its weights."""
    weight = model.base_model.stages[0].embedding.projection.weight
    return pixel_values.to(weight.device, weight.dtype)


def to_probabilities(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """(..., L) -> (..., L): of each class by itself where an image may have several, as the library's pipeline does.

    Of a regression, logits as they are, as there.
    """
    if config.problem_type == "regression":
        return logits.float()
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.float().sigmoid()
    return logits.float().softmax(dim=-1)


def classify(model: ViTCustomForImageClassification, hidden: Tensor) -> Tensor:
    """What the last block gives -> logits (B, L)."""
    tokens = model.base_model.norm(hidden)
    return model.head(model.base_model.pooling(tokens), tokens)[0]


def iterate_attention(model: ViTCustomPreTrainedModel, pixel_values: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Each block in turn with its weights, see `Block.run`: those of one can go before the next ones come."""
    hidden, blocks = prepare_images(model.base_model, pixel_values)
    for block in blocks:
        with torch.no_grad():
            hidden, weights = block.run(hidden, output_attentions=True)
        yield block, weights
        del weights  # or they would be there while the next block makes its own


def iterate_gradients(
    model: ViTCustomForImageClassification, pixel_values: Tensor, classes: Tensor | None
) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Each block, last first, with its weights and the gradients of the logits of `classes` by them.

    Only what goes into each block is kept, so that the weights of one block at a time are there.
    """
    incoming = []
    hidden, blocks = prepare_images(model.base_model, pixel_values)
    with torch.no_grad():
        for block in blocks:
            incoming.append(hidden)
            hidden, _ = block.run(hidden)
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logits = classify(model, hidden)
        chosen = logits.argmax(dim=-1) if classes is None else classes
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), hidden)
    for block in reversed(blocks):
        with torch.enable_grad():
            hidden = incoming.pop().detach().requires_grad_()
            output, weights = block.run(hidden, output_attentions=True)
            # Windows' weights are another view of the tensor that the output was computed from.
            source = weights if weights._base is None else weights._base
            gradient, gradient_of_weights = torch.autograd.grad(output, (hidden, source), gradient)
            gradient_of_weights, weights = gradient_of_weights.reshape(weights.shape).float(), weights.detach().float()
            del hidden, output, source
        yield block, weights, gradient_of_weights
        del weights, gradient_of_weights  # or they would be there while the next block makes its own


# ------------------------------------------------------------------------------------------------------------ distance


class AttentionDistance(NamedTuple):
    """Mean attention distances in pixels.

    Attributes:
        heads: For each block each head's, over all images and patches.
        uniform: For each block what even attention to all that it may attend to would give.
    """

    heads: list[list[float]]
    uniform: list[float]


def attention_distance(model: ViTCustomPreTrainedModel, batches: Iterable[Tensor]) -> AttentionDistance:
    """How far from a patch the patches lie that it attends to, in pixels, weighted by attention.

    ViT, https://arxiv.org/abs/2010.11929, figure 7 right. Between patches only: what goes to prefix tokens is left out
    and the rest made to sum to 1. A key of a reduced grid lies in the middle of what it was made of.

    Args:
        model: Any model of the family, in evaluation mode.
        batches: Normalised images (B, C, H, W), all of one size.

    Raises:
        ValueError: if there is no batch, or one of another size.
    """
    sums, uniform, count, size = [], [], 0, None
    for pixel_values in batches:
        if size not in (None, pixel_values.shape[-2:]):
            raise ValueError(f"images of {tuple(pixel_values.shape[-2:])} pixels after such of {tuple(size)}")
        size = pixel_values.shape[-2:]
        for block, weights in iterate_attention(model, pixel_values):
            distances, even = _measure_distances(block, weights.float())
            if block.layer == len(sums):
                sums.append(torch.zeros_like(distances))
                uniform.append(even)
            sums[block.layer] += distances
            del weights
        count += pixel_values.shape[0]
    if not count:
        raise ValueError("attention distances need at least one batch of images")
    return AttentionDistance([(each / count).tolist() for each in sums], uniform)


def _measure_distances(block: Block, weights: Tensor) -> tuple[Tensor, float]:
    """Sum over the images of the mean distance of each head (A,), and the distance of even attention."""
    if isinstance(block.module.attention, WindowAttention):
        return _measure_window_distances(block, weights)
    queries, keys = _find_centres(block.grid, 1, weights), _find_centres(block.grid, block.key_ratio, weights)
    num_prefix_tokens = weights.shape[3] - keys.shape[0]
    distances = torch.cdist(queries, keys) * block.stride
    weights = weights[:, :, num_prefix_tokens:, num_prefix_tokens:]
    means = torch.einsum("baqk,qk->baq", weights, distances) / weights.sum(dim=-1).clamp(min=1e-12)
    return means.mean(dim=2).sum(dim=0), distances.mean().item()


def _measure_window_distances(block: Block, weights: Tensor) -> tuple[Tensor, float]:
    attention, grid = block.module.attention, block.grid
    places = _find_centres((attention.window_size, attention.window_size), 1, weights)
    distances = torch.cdist(places, places) * block.stride
    means = torch.einsum("baqk,qk->baq", weights, distances)
    means = merge_windows(means, attention, grid)  # without padding
    order, _, mask = attention.layout(grid)
    num_windows = len(order) // attention.window_size**2
    is_open = torch.ones_like(distances).expand(num_windows, -1, -1) if mask is None else mask == 0
    even = (is_open * distances).sum(dim=-1) / is_open.sum(dim=-1)
    return means.mean(dim=(2, 3)).sum(dim=0), merge_windows(even[:, None], attention, grid).mean().item()


def _find_centres(grid: tuple[int, int], ratio: int, like: Tensor) -> Tensor:
    """Middles of the cells of a grid coarser by a ratio, (cells, 2), in patches; padding is no part of a cell."""
    sides = []
    for side in grid:
        starts = torch.arange(0, side, ratio, device=like.device, dtype=torch.float32)
        sides.append((starts + (starts + ratio).clamp(max=side)) / 2)
    return torch.cartesian_prod(*sides)


# ---------------------------------------------------------------------------------------------------------------- maps


def attention_map(
    model: ViTCustomPreTrainedModel, pixel_values: Tensor, layer: int, query: tuple[int, int] | None = None
) -> Tensor:
    """What a block attends to, on its grid: (B, C, H, W) -> (B, A, h, w) for each head.

    Args:
        model: Any model of the family, in evaluation mode.
        pixel_values: Normalised images.
        layer: Number of the block; negative ones count from the end.
        query: Row and column of the patch that attends. By default the class token, where that is what is pooled and
            the stage has it; else the mean over all patches, which is how much attention each patch gets. Windows are
            put together.

    Raises:
        ValueError: for a block or a patch that is not there.
    """
    layer = _find_layer(model, pixel_values, layer)
    block, weights = next(islice(iterate_attention(model, pixel_values), layer, None))
    if query is not None and not all(0 <= place < side for place, side in zip(query, block.grid)):
        raise ValueError(f"query={query} is outside of the grid of {block.grid[0]} x {block.grid[1]} patches")
    weights, attention = weights.float(), block.module.attention
    num_prefix_tokens = weights.shape[3] - math.prod(block.key_grid)
    if isinstance(attention, WindowAttention):
        if query is None:
            return block.keys_to_map(weights.sum(dim=2)) / math.prod(block.grid)
        # Attention of the query's window alone: all other windows and patches count for nothing.
        asks = torch.zeros(pixel_values.shape[0], 1, *block.grid, device=weights.device)
        asks[:, :, query[0], query[1]] = 1
        asks = split_windows(asks, attention).expand(-1, weights.shape[1], -1)
        return block.keys_to_map(torch.einsum("baqk,baq->bak", weights, asks))
    if query is not None:
        return block.keys_to_map(weights[:, :, num_prefix_tokens + query[0] * block.grid[1] + query[1]])
    if num_prefix_tokens and model.config.pooling == "cls":
        return block.keys_to_map(weights[:, :, 0])
    return block.keys_to_map(weights[:, :, num_prefix_tokens:].mean(dim=2))


def gradient_attention(
    model: ViTCustomForImageClassification, pixel_values: Tensor, layer: int = -1, classes: Tensor | None = None
) -> Tensor:
    """How much a block's attention to each patch speaks for a class: (B, C, H, W) -> (B, h, w), each of sum 1.

    Attention times its gradient, only what speaks for the class, as a mean over the heads (Chefer et al.,
    https://arxiv.org/abs/2103.15679, equation 5) and a sum over all queries. It serves every architecture.

    Args:
        model: A classifier, in evaluation mode.
        pixel_values: Normalised images.
        layer: Number of the block; negative ones count from the end.
        classes: (B,); the likeliest ones by default.

    Raises:
        ValueError: for a block that is not there.
    """
    layer = _find_layer(model, pixel_values, layer)
    for block, weights, gradient in iterate_gradients(model, pixel_values, classes):
        if block.layer == layer:
            return _to_shares(block.keys_to_map((weights * gradient).relu().sum(dim=2)).mean(dim=1))
        del weights, gradient


def attention_rollout(model: ViTCustomPreTrainedModel, pixel_values: Tensor) -> Tensor:
    """How much of each patch reaches the output through all blocks: (B, C, H, W) -> (B, h, w), each of sum 1.

    Abnar & Zuidema, https://arxiv.org/abs/2005.00928, section 3: the product of the blocks' mean attention over heads,
    with half of each token kept by its residual branch. Read where the output is: at the class token, and the one for
    distillation if there is one, or at the mean of the patches.

    Raises:
        ValueError: for an encoder whose tokens do not all attend to each other.
    """
    _check_plain(model, "attention rollout")
    joint = None
    for _, weights in iterate_attention(model, pixel_values):
        mean = weights.float().mean(dim=1)
        step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        joint = step if joint is None else step @ joint
        del weights
    return _to_patch_shares(model, _output_rows(model, joint), pixel_values)


def gradient_rollout(
    model: ViTCustomForImageClassification, pixel_values: Tensor, classes: Tensor | None = None
) -> Tensor:
    """How much each patch speaks for a class through all blocks: (B, C, H, W) -> (B, h, w), each of sum 1.

    Chefer et al., https://arxiv.org/abs/2103.15679, equations 5 and 6 for self-attention: attention weighted by its
    gradient, only what speaks for the class, added up from block to block, and read as in `attention_rollout`.

    Raises:
        ValueError: as for `attention_rollout`.
    """
    _check_plain(model, "gradient-weighted rollout")
    rows = None
    for _, weights, gradient in iterate_gradients(model, pixel_values, classes):
        step = (weights * gradient).relu().mean(dim=1)
        if rows is None:
            rows = _output_rows(model, torch.eye(step.shape[-1], device=step.device).expand_as(step))
        # From the output backwards, one row is all of the product that is needed.
        rows = rows + torch.einsum("bq,bqk->bk", rows, step)
        del weights, gradient
    return _to_patch_shares(model, rows, pixel_values)


def _find_layer(model: ViTCustomPreTrainedModel, pixel_values: Tensor, layer: int) -> int:
    count = model.config.num_hidden_layers
    if not -count <= layer < count:
        raise ValueError(f"layer={layer} is outside of the {count} blocks")
    return layer % count


def _output_rows(model: ViTCustomPreTrainedModel, joint: Tensor) -> Tensor:
    """Of (B, T, T) the rows that the output is read from, as their mean (B, T)."""
    is_mean = model.config.pooling == "mean"
    rows = joint[:, model.config.num_prefix_tokens :].mean(dim=1) if is_mean else joint[:, 0]
    return (rows + joint[:, 1]) / 2 if model.config.use_distillation_token else rows


def _to_patch_shares(model: ViTCustomPreTrainedModel, rows: Tensor, pixel_values: Tensor) -> Tensor:
    """What each token of a plain encoder has, (B, P + N), as shares of the patches (B, h, w)."""
    grid = model.base_model.feature_grids(tuple(pixel_values.shape[-2:]))[0]
    return _to_shares(rows[:, model.config.num_prefix_tokens :].unflatten(1, grid))


def _to_shares(maps: Tensor) -> Tensor:
    return maps / maps.sum(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def _check_plain(model: ViTCustomPreTrainedModel, what: str):
    if not model.config.is_plain:
        raise ValueError(
            f"{what} needs a single stage of global attention, not {len(model.config.stages)} stage(s) with windows or "
            "reduced keys: use grad_cam or gradient_attention, which serve every architecture"
        )
