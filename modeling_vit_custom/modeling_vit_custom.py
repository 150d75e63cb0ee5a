"""A staged vision transformer encoder and its heads; ViT, DeiT, PVT and Swin are configurations of it.

Shapes: B images, C channels, (H, W) pixels, (h, w) grid of N = h * w patches, P prefix tokens, T = P + N tokens,
D width, A attention heads of d channels, K keys, M side of a window, L labels.

Read from the inside out: embeddings, attention, blocks, stages, the encoder, then its heads.
"""

import copy
import math
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, MaskedImageModelingOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_vit_custom import AUTO_MAP, StageConfig, ViTCustomConfig
from .kernels import ATTENTION_FUNCTIONS, Linear, dense, map_rows


# ----------------------------------------------------------------------------------------------- grids and positions


def count_patches(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Grid (h, w) of patches over a size (H, W); a side that the patch does not divide is padded."""
    # Not -(-side // patch_size): the division of ONNX rounds towards zero.
    return (size[0] + patch_size - 1) // patch_size, (size[1] + patch_size - 1) // patch_size


def same_size(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are equal; where a graph is exported for all sizes, whether they always are.

    What is skipped for equal sizes, padding by nothing or positions at their own resolution, changes nothing if done.
    """
    if torch.compiler.is_exporting():
        return all(statically_known_true(side == other_side) for side, other_side in zip(size, other))
    return size == other


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad with zeros at the bottom and right: (B, C, H, W) -> (B, C, H', W') with sides that `multiple` divides."""
    height, width = image.shape[-2:]
    rows, columns = count_patches((height, width), multiple)
    padded = rows * multiple, columns * multiple
    return image if same_size(padded, (height, width)) else F.pad(image, (0, padded[1] - width, 0, padded[0] - height))


def to_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) -> (B, D, h, w), a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(image: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, N, D), a view."""
    return image.flatten(2).transpose(1, 2)


def interpolate_table(
    table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool = False
) -> Tensor:
    """Bicubic in fp32, whatever the dtype of the table: (1, h * w, D) -> (1, h' * w', D)."""
    image = to_image(table.float(), grid)
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias)
    return to_tokens(image).to(table.dtype)


def sincos2d_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions (1, h * w, dim): a quarter each for sin and cos of the column, then of the row.

    As the masked autoencoder's code has it (https://arxiv.org/abs/2111.06377), columns first.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    rows = torch.arange(grid[0], dtype=torch.float64, device="cpu").outer(frequencies)
    columns = torch.arange(grid[1], dtype=torch.float64, device="cpu").outer(frequencies)
    rows = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, grid[1], -1)
    columns = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(grid[0], -1, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)[None].float()


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Take tokens by their index, for each image its own: (B, N, D), (B, n) -> (B, n, D)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def gather_patches(image: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """An image of some patches side by side, for each image its own: (B, C, H, W), (B, n) -> (B, C, p, n * p)."""
    rows, columns = count_patches(tuple(image.shape[-2:]), patch_size)
    patches = image.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size)).permute(0, 2, 4, 1, 3, 5)
    # (B, h, w, C, p, p) -> (B, n, C, p, p)
    images = torch.arange(image.shape[0], device=image.device)[:, None]
    return patches[images, ids // columns, ids % columns].permute(0, 2, 3, 1, 4).flatten(3)


class ContiguousGradient(torch.autograd.Function):
    """Nothing; its gradient is laid out as tokens are, where that of patches would slow every block before it down."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor) -> Tensor:
        return tokens.view_as(tokens)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor):
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class Rearrangement(torch.autograd.Function):
    """Tokens in another order, with a gradient that is gathered as well, not added up: (B, N, D) -> (B, N, D)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, order: Tensor, places: Tensor) -> Tensor:
        return tokens.index_select(1, order)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, places = ctx.saved_tensors
        return Rearrangement.apply(gradient, places, order), None, None


def rearrange(tokens: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """Take tokens in an order, each of whose tokens has its place: (B, N, D), (n,), (N,) -> (B, n, D)."""
    if torch.compiler.is_exporting() or order.shape != places.shape:  # with padding
        return tokens.index_select(1, order)
    return Rearrangement.apply(tokens, order, places)


# -------------------------------------------------------------------------------------------------------- embeddings


class PatchEmbedding(nn.Module):
    """One projection for each patch, then an optional norm: (B, C, H, W) -> (B, N, D).

    With `ids_keep` (B, n) of these patches alone: (B, n, D).
    """

    def __init__(self, config: ViTCustomConfig, stage: StageConfig):
        super().__init__()
        self.patch_size = stage.patch_size
        self.projection = PatchProjection(stage.in_channels, stage.hidden_size, stage.patch_size)
        self.norm = nn.LayerNorm(stage.hidden_size, eps=config.patch_norm_eps) if stage.patch_norm else nn.Identity()

    def forward(self, image: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        image = pad_to_multiple(image, self.patch_size)
        if ids_keep is not None:
            image = gather_patches(image, ids_keep, self.patch_size)
        return self.norm(to_tokens(self.projection(image)))


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel: (B, C, H, W) -> (B, D, h, w), sides of whole patches.

    Computed as one product of matrices, with the values of a patch in the order that they have in memory.
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: int):
        super().__init__(in_channels, out_channels, patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        side = self.kernel_size[0]
        grid = count_patches(tuple(image.shape[-2:]), side)
        # (B, C, H, W) -> (B, C, h, rows, w, columns)
        patches = image.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side))
        if image.stride(1) == 1:  # tokens seen as an image
            patches, weight = patches.permute(0, 2, 4, 3, 5, 1), self.weight.permute(0, 2, 3, 1)
        else:
            patches, weight = patches.permute(0, 2, 4, 1, 3, 5), self.weight
        return to_image(dense(patches.flatten(3).flatten(1, 2), weight.flatten(1), self.bias), grid)


class PatchMerging(nn.Module):
    """Concatenate the tokens of a patch, normalise, project: (B, C, H, W) -> (B, N, D).

    Swin, https://arxiv.org/abs/2103.14030, section 3.1. Rows run fastest in the concatenation, as in the authors' code.
    """

    def __init__(self, config: ViTCustomConfig, stage: StageConfig):
        super().__init__()
        self.patch_size = stage.patch_size
        merged_channels = stage.in_channels * stage.patch_size**2
        self.norm = nn.LayerNorm(merged_channels, eps=config.patch_norm_eps)
        self.projection = Linear(merged_channels, stage.hidden_size, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        rows, columns = count_patches(tuple(image.shape[-2:]), self.patch_size)
        patches = pad_to_multiple(image, self.patch_size)
        patches = patches.unflatten(3, (columns, self.patch_size)).unflatten(2, (rows, self.patch_size))
        # (B, C, h, rows, w, columns) -> (B, h, w, columns, rows, C)
        patches = patches.permute(0, 2, 4, 5, 3, 1).flatten(3).flatten(1, 2)
        return self.projection(self.norm(patches))


class PositionEmbedding(nn.Module):
    """Add a position to every patch, interpolated where the grid is not the native one: (B, N, D) -> (B, N, D).

    With `ids_keep` (B, n) to these patches alone: (B, n, D) -> (B, n, D).
    """

    def __init__(self, config: ViTCustomConfig, stage: StageConfig):
        super().__init__()
        self.grid_size = stage.grid_size
        self.is_fixed = stage.position_embedding_type == "sincos2d"
        self.antialias = config.position_antialias
        weight = torch.empty(1, stage.grid_size[0] * stage.grid_size[1], stage.hidden_size)
        if self.is_fixed:  # no parameter without gradients: the library's loader would turn them on
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)

    def forward(self, patches: Tensor, grid: tuple[int, int], ids_keep: Tensor | None = None) -> Tensor:
        positions = self.interpolate(grid)
        if ids_keep is not None:
            positions = gather_tokens(positions.expand(ids_keep.shape[0], -1, -1), ids_keep)
        return patches + positions

    def interpolate(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid: (1, N, D)."""
        if same_size(grid, self.grid_size):
            return self.weight
        return interpolate_table(self.weight, self.grid_size, grid, self.antialias)

    @torch.no_grad()
    def resize(self, grid: tuple[int, int]):
        """Make another grid the native one, once and for all."""
        weight = self.interpolate(grid).clone(memory_format=torch.contiguous_format)
        self.weight = weight if self.is_fixed else nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.grid_size = grid


class NoPositionEmbedding(nn.Module):
    """Leave the patches as they are: (B, N, D) -> (B, N, D)."""

    def forward(self, patches: Tensor, grid: tuple[int, int], ids_keep: Tensor | None = None) -> Tensor:
        return patches

    def resize(self, grid: tuple[int, int]):
        pass


class MaskToken(nn.Module):
    """Replace masked patches by a learned token: (B, N, D), (B, N) -> (B, N, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, patches: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None], self.weight.to(patches.dtype), patches)


class PrefixTokens(nn.Module):
    """Prepend the class, distillation and register tokens: (B, N, D) -> (B, P + N, D).

    A token's own position is part of the token.
    """

    def __init__(self, config: ViTCustomConfig, stage: StageConfig):
        super().__init__()
        counts = {
            "class_token": int(config.use_class_token),
            "distillation_token": int(config.use_distillation_token),
            "register_tokens": config.num_register_tokens,
        }
        self.names = [name for name, count in counts.items() if count]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.empty(1, counts[name], stage.hidden_size)))

    def forward(self, patches: Tensor) -> Tensor:
        tokens = [getattr(self, name).expand(patches.shape[0], -1, -1) for name in self.names]
        return torch.cat([*tokens, patches], dim=1)


class PatchDropout(nn.Module):
    """Choose a random part of each image's patches while training; the others are not computed.

    https://arxiv.org/abs/2212.00794, section 3.1. Prefix tokens join afterwards, so they always stay.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def choose(self, batch_size: int, num_patches: int, device: torch.device) -> Tensor | None:
        """Indices (B, n) of the patches to keep; none stands for all."""
        if not self.training or self.rate == 0:
            return None
        num_kept = max(1, int(num_patches * (1 - self.rate)))
        return torch.rand(batch_size, num_patches, device=device).argsort(dim=1)[:, :num_kept]


class TokenMerging(nn.Module):
    """Merge a number of patches into those most like them: (B, T, D), (B, T), (B, T, d) -> (B, T - r, D), (B, T - r).

    Token merging, https://arxiv.org/abs/2210.09461, section 3. Every second patch looks among the others for the one
    whose key points most nearly the same way; the pairs that agree best become their mean, weighted by how many patches
    each one holds already. Prefix tokens stay.
    """

    def __init__(self, count: int, num_prefix_tokens: int):
        super().__init__()
        self.count = count
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, hidden_states: Tensor, sizes: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and how many patches each holds, by the direction of their keys."""
        prefix = self.num_prefix_tokens
        count = min(self.count, (keys.shape[1] - prefix) // 2)
        if count <= 0:
            return hidden_states, sizes
        keys = F.normalize(keys.detach()[:, prefix:], dim=-1)
        similarity, target = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=-1)
        order = similarity.argsort(dim=-1, descending=True)
        merged, kept = order[:, :count], order[:, count:]
        target = target.gather(1, merged)[..., None]

        weights = sizes[..., None]  # in single precision, as are the sums
        sources, targets = hidden_states[:, prefix::2], hidden_states[:, prefix + 1 :: 2]
        source_weights, target_weights = weights[:, prefix::2], weights[:, prefix + 1 :: 2]
        joining, joining_weights = gather_tokens(sources, merged), gather_tokens(source_weights, merged)
        sums = (targets * target_weights).scatter_add(
            1, target.expand(-1, -1, hidden_states.shape[-1]), joining * joining_weights
        )
        sums_of_weights = target_weights.scatter_add(1, target, joining_weights)
        means = (sums / sums_of_weights).to(hidden_states.dtype)
        tokens = [hidden_states[:, :prefix], gather_tokens(sources, kept), means]
        counts = [weights[:, :prefix], gather_tokens(source_weights, kept), sums_of_weights]
        return torch.cat(tokens, dim=1), torch.cat(counts, dim=1).squeeze(-1)


# --------------------------------------------------------------------------------------------------------- attention


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention with its weights: (B, A, N, d), (B, A, K, d), (B, A, K, d) -> (B, N, A, d), (B, A, N, K)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class Attention(nn.Module):
    """What all attentions share: heads, the library's attention interface and the output projection.

    With `num_queries` only so many of the first tokens attend, and are returned.
    """

    def __init__(self, config: ViTCustomConfig, stage: StageConfig):
        super().__init__()
        self.config = config
        self.num_heads = stage.num_attention_heads
        self.head_dim = stage.hidden_size // stage.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False  # the library's sdpa function masks causally unless told so
        self.query_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.projection = Linear(stage.hidden_size, stage.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, A, N, d), (B, A, K, d), (B, A, K, d) -> (B, N, A, d), and the weights (B, A, N, K) if asked for."""
        # No other implementation returns its weights, so they are computed eagerly when somebody wants to see them.
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attention_function = ATTENTION_FUNCTIONS.get(implementation)
        if attention_function is None:
            attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if bias is not None and implementation not in ATTENTION_FUNCTIONS:
            bias = bias.to(query.dtype)
        biases = {"attention_mask": bias}
        if bias is not None and implementation == "flex_attention":
            # The library's flex function applies the mask of the first head to all heads; a position bias has heads.
            biases = {"attention_mask": None, "position_bias": bias.expand(query.shape[0], -1, -1, -1)}
            if not torch.compiler.is_compiling():
                # A second size would make torch compile for all sizes, which fails on the CPU when there is a bias.
                for tensor in (query, key, value, biases["position_bias"]):
                    torch._dynamo.mark_static(tensor)
        attended, weights = attention_function(
            self,
            query,
            key,
            value,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **biases,
        )
        return attended, weights if output_attentions else None

    def resize(self, stage: StageConfig):
        """Make another image and window size the native ones; global attention has none."""


class GlobalAttention(Attention):
    """Every token attends to every token: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ViTCustomConfig, stage: StageConfig):
        super().__init__(config, stage)
        self.qkv = Linear(stage.hidden_size, 3 * stage.hidden_size, bias=config.qkv_bias)

    def forward(
        self,
        hidden_states: Tensor,
        grid: tuple[int, int],
        output_attentions: bool = False,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights, _ = self.attend_with_keys(hidden_states, None, output_attentions, num_queries)
        return attended, weights

    def attend_with_keys(
        self, hidden_states: Tensor, key_bias: Tensor | None, output_attentions: bool, num_queries: int | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `forward`, with a bias (B, T) of the keys, and the keys (B, A, T, d) besides."""
        qkv = self.qkv(hidden_states).unflatten(2, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.query_norm(query), self.key_norm(key)
        bias = None if key_bias is None else key_bias[:, None, None]
        attended, weights = self.attend(query[:, :, :num_queries], key, value, bias, output_attentions)
        return self.dropout(self.projection(attended.flatten(2))), weights, key


class SpatialReductionAttention(Attention):
    """Every token attends to a coarser grid of keys and values: (B, T, D) -> (B, T, D).

    PVT, https://arxiv.org/abs/2102.12122, equation 2. Prefix tokens are keys as they are.
    """

    def __init__(self, config: ViTCustomConfig, stage: StageConfig):
        super().__init__(config, stage)
        self.sr_ratio = stage.sr_ratio
        self.num_prefix_tokens = stage.num_prefix_tokens
        self.query = Linear(stage.hidden_size, stage.hidden_size, bias=config.qkv_bias)
        self.key_value = Linear(stage.hidden_size, 2 * stage.hidden_size, bias=config.qkv_bias)
        self.reduction = PatchProjection(stage.hidden_size, stage.hidden_size, stage.sr_ratio)
        self.reduction_norm = nn.LayerNorm(stage.hidden_size, eps=config.sr_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        grid: tuple[int, int],
        output_attentions: bool = False,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        prefix, patches = hidden_states[:, : self.num_prefix_tokens], hidden_states[:, self.num_prefix_tokens :]
        reduced = to_tokens(self.reduction(pad_to_multiple(to_image(patches, grid), self.sr_ratio)))
        context = torch.cat([prefix, self.reduction_norm(reduced)], dim=1)
        query = self.query(hidden_states[:, :num_queries])
        query = query.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        key_value = self.key_value(context).unflatten(2, (2, self.num_heads, self.head_dim))
        key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.query_norm(query), self.key_norm(key)
        attended, weights = self.attend(query, key, value, output_attentions=output_attentions)
        return self.dropout(self.projection(attended.flatten(2))), weights


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window: (M * M, M * M)."""
    steps = torch.arange(window_size, device="cpu")
    offsets = steps[:, None] - steps[None] + window_size - 1
    rows, columns = offsets[:, None, :, None], offsets[None, :, None, :]
    return (rows * (2 * window_size - 1) + columns).reshape(window_size**2, window_size**2)


class WindowLayout(nn.Module):
    """How the tokens of a grid are laid out in (shifted) windows: known for the native grid, computed for others.

    A grid that the windows do not fill is padded; a side that a single window covers is not shifted.
    """

    def __init__(self, grid: tuple[int, int], window_size: int, shifted: bool):
        super().__init__()
        self.grid_size, self.window_size = grid, window_size
        self.step = window_size // 2 if shifted else 0
        for name, tensor in zip(("order", "places", "mask"), self.compute(grid)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `compute`."""
        if same_size(grid, self.grid_size):
            return self.order, self.places, self.mask
        return self.compute(grid, self.order.device)

    def compute(
        self, grid: tuple[int, int], device: torch.device | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What leads tokens into windows and back, and what keeps them apart there.

        Returns:
            The token at each place of all windows, (windows * M * M,), where padding takes the first token;
            the place of each token, (N,);
            and an additive mask (windows, M * M, M * M), if one is needed, that keeps wrapped-around and padded tokens
            from their window's others. Padding attends to padding, so that no row is masked out as a whole.
        """
        size, counts, shifts = self.window_size, count_patches(grid, self.window_size), self.shifts(grid)
        tokens, regions, windows, offsets = [], [], [], []
        for side, count, shift in zip(grid, counts, shifts):
            padded = count * size
            shifted = torch.arange(padded, device=device) + shift
            wraps = (shifted >= padded).long()
            token = shifted - wraps * padded
            is_padding = token >= side
            tokens.append(token.masked_fill(is_padding, 0).unflatten(0, (count, size)))
            regions.append(wraps.masked_fill(is_padding, -1).unflatten(0, (count, size)))
            place = torch.arange(side, device=device) - shift
            place = place + (place < 0).long() * padded
            windows.append(place // size)
            offsets.append(place % size)
        # Of rows and of columns: (rows, 1, M, 1) and (1, columns, 1, M).
        order = (tokens[0][:, None, :, None] * grid[1] + tokens[1][None, :, None, :]).flatten()
        window = windows[0][:, None] * counts[1] + windows[1]
        places = ((window * size + offsets[0][:, None]) * size + offsets[1]).flatten()
        if same_size((counts[0] * size, counts[1] * size), grid) and same_size(shifts, (0, 0)):
            return order, places, None
        vertical, horizontal = regions[0][:, None, :, None], regions[1][None, :, None, :]
        region = (2 * vertical + horizontal).masked_fill((vertical < 0) | (horizontal < 0), -1)
        region = region.flatten(2).flatten(0, 1)
        is_apart = region[:, :, None] != region[:, None, :]
        return order, places, torch.zeros_like(is_apart, dtype=torch.float32).masked_fill(is_apart, -math.inf)

    def shifts(self, grid: tuple[int, int]) -> tuple[int, int]:
        """By how many patches the windows of a grid are shifted, down and to the right."""
        size = self.window_size
        # 0 where one window covers the side and 1 elsewhere; as arithmetic, it can be exported for all sizes.
        return tuple(self.step * (1 - (size // side + size - 1) // size) for side in grid)


class WindowAttention(Attention):
    """Attention inside (shifted) windows with a relative position bias: (B, N, D) -> (B, N, D).

    Swin, https://arxiv.org/abs/2103.14030, section 3.2. Padding is masked out.
    Weights, if asked for, are (B * windows, A, M * M, M * M).
    """

    def __init__(self, config: ViTCustomConfig, stage: StageConfig, shifted: bool):
        super().__init__(config, stage)
        self.shifted = shifted
        self.qkv = Linear(stage.hidden_size, 3 * stage.hidden_size, bias=config.qkv_bias)
        self.window_size = stage.window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * stage.window_size - 1) ** 2, stage.num_attention_heads)
        )
        self.register_buffer("relative_position_index", relative_position_index(stage.window_size), persistent=False)
        self.layout = WindowLayout(stage.grid_size, stage.window_size, shifted)

    def forward(
        self,
        hidden_states: Tensor,
        grid: tuple[int, int],
        output_attentions: bool = False,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        order, places, mask = self.layout(grid)
        rows, columns = count_patches(grid, self.window_size)
        area = self.window_size**2
        # Windows become heads of one long list, so that bias and mask are shared by all images without a copy.
        # (B, windows * M * M, 3 * D) -> (3, B, windows * A, M * M, d)
        qkv = self.qkv(rearrange(hidden_states, order, places))
        qkv = qkv.unflatten(1, (rows * columns, area)).unflatten(3, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        query, key = self.query_norm(query), self.key_norm(key)

        # Without a copy of the small table, the sum for all windows would read it with strides.
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous()
        bias = bias.expand(rows * columns, -1, -1, -1) if mask is None else bias + mask.unsqueeze(1)
        bias = bias.flatten(0, 1).unsqueeze(0)

        attended, weights = self.attend(query, key, value, bias, output_attentions)
        # (B, M * M, windows * A, d) -> (B, windows * M * M, D)
        attended = attended.unflatten(2, (rows * columns, self.num_heads)).transpose(1, 2)
        # A copy is needed in any case; said explicitly, a graph for all sizes need not ask whether it is.
        attended = attended.clone(memory_format=torch.contiguous_format).flatten(3).flatten(1, 2)
        attended = rearrange(self.projection(attended), places, order)
        if weights is not None:
            weights = weights.unflatten(1, (rows * columns, self.num_heads)).flatten(0, 1)
        return self.dropout(attended)[:, :num_queries], weights

    @torch.no_grad()
    def resize(self, stage: StageConfig):
        """Make another image and window size the native ones: the bias table is interpolated."""
        device = self.relative_position_bias_table.device
        if stage.window_size != self.window_size:
            old, new = 2 * self.window_size - 1, 2 * stage.window_size - 1
            before = self.relative_position_bias_table
            table = interpolate_table(before[None], (old, old), (new, new))[0]
            table = table.clone(memory_format=torch.contiguous_format)
            self.relative_position_bias_table = nn.Parameter(table, requires_grad=before.requires_grad)
            self.relative_position_index = relative_position_index(stage.window_size).to(device)
            self.window_size = stage.window_size
        self.layout = WindowLayout(stage.grid_size, stage.window_size, self.shifted).to(device)


# ------------------------------------------------------------------------------------------------- blocks and stages


class MLP(nn.Module):
    """Two dense layers: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ViTCustomConfig, stage: StageConfig):
        super().__init__()
        self.intermediate_size = stage.intermediate_size
        self.fc1 = Linear(stage.hidden_size, stage.intermediate_size)
        self.activation = nn.GELU(approximate="tanh" if config.hidden_act == "gelu_pytorch_tanh" else "none")
        self.fc2 = Linear(stage.intermediate_size, stage.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return map_rows(self.transform, hidden_states, self.intermediate_size)

    def transform(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(hidden_states)))))


class LayerScale(nn.Module):
    """Scale each channel by a learned factor (https://arxiv.org/abs/2103.17239): (B, T, D) -> (B, T, D)."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight


class DropPath(nn.Module):
    """Drop a residual branch for whole images while training (https://arxiv.org/abs/1603.09382), keeping the mean.

    As many images of the batch as the share makes whole ones are dropped and not computed
    (https://arxiv.org/abs/2304.07193, section 5), and one more with the probability that is left. Where every image's
    branch is wanted, branches are computed and dropped one by one.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.millionths = round(1e6 * (1 - rate))  # that are kept: of whole numbers a graph knows more

    def choose(self, hidden_states: Tensor, keep_all: bool = False) -> Tensor | None:
        """Rows of the batch whose branch is to be computed; none stands for all."""
        if not self.training or self.rate == 0 or keep_all:
            return None
        batch_size = hidden_states.shape[0]
        num_kept = -(-batch_size * self.millionths // 10**6)
        if num_kept == batch_size:
            return None
        return torch.randperm(batch_size, device=hidden_states.device)[:num_kept]

    def add(self, hidden_states: Tensor, branch: Tensor, rows: Tensor | None) -> Tensor:
        """The residual sum, with a branch of the chosen rows."""
        if not self.training or self.rate == 0:
            return hidden_states + branch
        keep = 1 - self.rate
        if rows is None:
            kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
            return hidden_states + branch * (kept / keep).to(branch.dtype)
        left = hidden_states.shape[0] * self.millionths % 10**6
        if left:
            # The last one stands for the part of an image.
            is_kept = torch.rand(1, 1, 1, device=branch.device) < left / 1e6
            branch = torch.cat([branch[:-1], branch[-1:] * is_kept])
        return hidden_states.index_add(0, rows, branch.to(hidden_states.dtype), alpha=1 / keep)


def select_rows(hidden_states: Tensor, rows: Tensor | None) -> Tensor:
    """(B, T, D), (b,) or none for all -> (b, T, D)."""
    return hidden_states if rows is None else hidden_states[rows]


def first_tokens(hidden_states: Tensor, count: int | None) -> Tensor:
    """(B, T, D) -> (B, count, D), or all; contiguous, because inductor's products in int8 add it as if it were."""
    return hidden_states[:, :count].contiguous()


class EncoderBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each on a residual branch: (B, T, D) -> (B, T, D), and the attention weights."""

    def __init__(self, config: ViTCustomConfig, stage: StageConfig, index: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(stage.hidden_size, eps=config.layer_norm_eps)
        self.attention = make_attention(config, stage, index)
        self.merging = TokenMerging(config.token_merging, stage.num_prefix_tokens) if config.token_merging else None
        self.mlp_norm = nn.LayerNorm(stage.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, stage)
        scales = config.layer_scale_init_value is not None
        self.attention_scale = LayerScale(stage.hidden_size, config.layer_scale_init_value) if scales else nn.Identity()
        self.mlp_scale = LayerScale(stage.hidden_size, config.layer_scale_init_value) if scales else nn.Identity()
        self.drop_path = DropPath(stage.drop_path_rates[index])

    def forward(
        self,
        hidden_states: Tensor,
        grid: tuple[int, int],
        output_attentions: bool = False,
        num_outputs: int | None = None,
        sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """With `num_outputs` the first tokens only, which attend to all: (B, T, D) -> (B, num_outputs, D).

        Given how many patches each token holds, (B, T), a token counts in attention as often
        (https://arxiv.org/abs/2210.09461, equation 1), and patches are merged between the branches, unless there is
        `num_outputs`; how many each token holds then comes last: (B, T, D) -> (B, T - r, D), (B, T - r). Drop path then
        computes every image's attention, whose keys are needed.
        """
        rows = self.drop_path.choose(hidden_states, keep_all=output_attentions or sizes is not None)
        tokens = self.attention_norm(select_rows(hidden_states, rows))
        if sizes is None:
            attended, weights = self.attention(tokens, grid, output_attentions, num_outputs)
        else:
            attended, weights, keys = self.attention.attend_with_keys(
                tokens, sizes.log(), output_attentions, num_outputs
            )
        hidden_states = first_tokens(hidden_states, num_outputs)
        hidden_states = self.drop_path.add(hidden_states, self.attention_scale(attended), rows)
        if sizes is not None and num_outputs is None:
            # Their sum points where their mean does, and a mean over few heads is slow.
            hidden_states, sizes = self.merging(hidden_states, sizes, reduce(torch.add, keys.unbind(1)))
        rows = self.drop_path.choose(hidden_states)
        transformed = self.mlp(self.mlp_norm(select_rows(hidden_states, rows)))
        return self.drop_path.add(hidden_states, self.mlp_scale(transformed), rows), weights, sizes


def make_attention(config: ViTCustomConfig, stage: StageConfig, index: int) -> Attention:
    """The attention of block `index` of a stage; every second block shifts its windows."""
    if stage.window_size:
        return WindowAttention(config, stage, shifted=index % 2 == 1)
    if stage.sr_ratio > 1:
        return SpatialReductionAttention(config, stage)
    return GlobalAttention(config, stage)


class Stage(nn.Module):
    """Embed an image into tokens, then apply the blocks: (B, C, H, W) -> (B, P + N, D)."""

    def __init__(self, config: ViTCustomConfig, stage: StageConfig, use_mask_token: bool = False):
        super().__init__()
        self.patch_size = stage.patch_size
        self.embedding = (PatchMerging if stage.patch_merging else PatchEmbedding)(config, stage)
        self.mask_token = MaskToken(stage.hidden_size) if use_mask_token else None
        has_positions = stage.position_embedding_type != "none"
        self.position_embedding = PositionEmbedding(config, stage) if has_positions else NoPositionEmbedding()
        self.patch_dropout = PatchDropout(config.patch_dropout) if config.patch_dropout > 0 else None
        self.prefix_tokens = PrefixTokens(config, stage) if stage.num_prefix_tokens else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.merges = config.token_merging > 0
        self.blocks = nn.ModuleList([EncoderBlock(config, stage, index) for index in range(stage.depth)])

    def embed(
        self,
        image: Tensor,
        grid: tuple[int, int],
        bool_masked_pos: Tensor | None = None,
        ids_keep: Tensor | None = None,
    ) -> Tensor:
        """Patches with their positions, masked or dropped where asked, behind the prefix: -> (B, P + n, D)."""
        if ids_keep is None and self.patch_dropout is not None:
            ids_keep = self.patch_dropout.choose(image.shape[0], grid[0] * grid[1], image.device)
        patches = self.embedding(image) if ids_keep is None else self.embedding(image, ids_keep)
        if bool_masked_pos is not None:
            is_masked = bool_masked_pos if ids_keep is None else bool_masked_pos.gather(1, ids_keep)
            patches = self.mask_token(patches, is_masked)
        patches = self.position_embedding(patches, grid, ids_keep)
        return self.dropout(self.prefix_tokens(patches))

    def forward(
        self,
        image: Tensor,
        grid: tuple[int, int],
        bool_masked_pos: Tensor | None = None,
        ids_keep: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        num_outputs: int | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
        """Tokens, how many patches each holds where they are merged, and where asked for the embedding's and every
        block's output, and every block's weights.

        With `num_outputs` the last block gives only so many tokens.
        """
        tokens = self.embed(image, grid, bool_masked_pos, ids_keep)
        sizes = torch.ones(tokens.shape[:2], dtype=torch.float32, device=tokens.device) if self.merges else None
        hidden_states, attentions = [tokens] if output_hidden_states else [], []
        for index, block in enumerate(self.blocks, start=1):
            wanted = num_outputs if index == len(self.blocks) else None
            tokens, weights, sizes = block(tokens, grid, output_attentions, wanted, sizes)
            if output_hidden_states:
                hidden_states.append(tokens)
            if output_attentions:
                attentions.append(weights)
        return tokens, sizes, hidden_states, attentions

    def resize(self, stage: StageConfig):
        """Make another image and window size the native ones."""
        self.position_embedding.resize(stage.grid_size)
        for block in self.blocks:
            block.attention.resize(stage)


class MeanPooling(nn.Module):
    """Mean over the patches, without prefix tokens, then a norm: (B, P + N, D) -> (B, D).

    Where patches were merged, every token counts as often as it holds patches, (B, P + N).
    """

    def __init__(self, norm: nn.Module, num_prefix_tokens: int):
        super().__init__()
        self.norm = norm
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, hidden_states: Tensor, sizes: Tensor | None = None) -> Tensor:
        patches = hidden_states[:, self.num_prefix_tokens :]
        if sizes is None:
            return self.norm(patches.mean(dim=1))
        shares = sizes[:, self.num_prefix_tokens :, None]
        means = (patches * shares).sum(dim=1) / shares.sum(dim=1)  # in single precision
        return self.norm(means.to(patches.dtype))


class ClassTokenPooling(nn.Module):
    """The class token, then a norm: (B, P + N, D) -> (B, D)."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: Tensor, sizes: Tensor | None = None) -> Tensor:
        return self.norm(hidden_states[:, 0])


# ----------------------------------------------------------------------------------------------------------- encoder


class ViTCustomPreTrainedModel(PreTrainedModel):
    """What all models of the family share: initialisation, checks on load, another native image size."""

    config: ViTCustomConfig
    config_class = ViTCustomConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: ViTCustomConfig, *args, **kwargs):
        # Fields can be set after the configuration was made and checked, as `from_pretrained` does with its overrides.
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in the base class; weights that are not finite are refused.

        Raises:
            ValueError: naming the first tensor with a NaN or an infinity; tensors left on disk and those of a
                quantisation library, which are of its own kinds, are not looked at.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, tensor in model.state_dict().items():
            is_readable = type(tensor) is Tensor and tensor.is_floating_point() and not tensor.is_meta
            if is_readable and not tensor.isfinite().all():
                count = int((~tensor.isfinite()).sum())
                raise ValueError(
                    f"{pretrained_model_name_or_path or 'state_dict'}: {name} holds {count} values that are not "
                    "finite; load a checkpoint from before the run diverged"
                )
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in the base class; the folder serves every Auto class, whichever head was saved."""
        # The library would name the saved class alone, or the repository that the code was once loaded from.
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.stages[0].embedding

    def resize_image_size(self, image_size: int | tuple[int, int], window_size: int | None = None):
        """Make another image size the native one: positions and relative position biases are interpolated, once.

        Call it before making an optimizer. Windows keep their share of the image unless told otherwise, as Swin's go
        from 7 at 224 pixels to 12 at 384 (https://arxiv.org/abs/2103.14030, section 4.1).

        Args:
            image_size: Height and width, or one side, in pixels.
            window_size: Side of the windows in patches; by default scaled with the side that grows least.

        Raises:
            ValueError: if a size does not fit the model, or a window is given where there are none.
        """
        size = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)
        if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in size):
            raise ValueError(f"image_size={image_size!r} must be a positive number of pixels or (height, width)")
        resized = copy.deepcopy(self.config)
        resized.image_size = list(size) if size[0] != size[1] else size[0]
        resized.validate_architecture()
        windows = [stage.window_size for stage in self.config.stages]
        if window_size is None:
            scale = min(new / old for new, old in zip(size, self.config.native_size))
            windows = [window and max(1, round(window * scale)) for window in windows]
        elif not any(windows):
            raise ValueError(f"window_size={window_size!r} is for a model with windows, which this one is not")
        elif isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f"window_size={window_size!r} must be a positive integer")
        else:
            windows = [window and window_size for window in windows]
        resized.window_size = windows if len(set(windows)) > 1 else windows[0]
        stages = resized.stages
        self.config.image_size, self.config.window_size = resized.image_size, resized.window_size
        for module, stage in zip(self.base_model.stages, stages):
            module.resize(stage)

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """As in the base class; `"auto"`, which is the default, takes what is fastest where the model runs."""
        if requested_attention is None:
            return "auto"
        if requested_attention in ATTENTION_FUNCTIONS:
            return requested_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        windows = [stage.window_size for stage in self.config.stages if stage.window_size]
        if windows and "flash" in (attn_implementation or ""):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} cannot add the relative position bias of "
                f"window_size={windows[0]}; use 'auto', 'products', 'sdpa', 'flex_attention' or 'eager'"
            )
        if self.config.token_merging and any(kind in (attn_implementation or "") for kind in ("flash", "flex")):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} cannot weigh the tokens of "
                f"token_merging={self.config.token_merging}; use 'auto', 'products', 'sdpa' or 'eager'"
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Truncated normal for weights, positions and tokens, zero biases (DeiT, https://arxiv.org/abs/2012.12877,
        section 6). Also for the patch embedding: by its fan-in, small patches would drown their positions."""
        std = self.config.initializer_range
        if isinstance(module, ClassificationHead):
            head_std = std if self.config.head_initializer_range is None else self.config.head_initializer_range
            if head_std > 0:
                init.trunc_normal_(module.weight, std=head_std)
            else:
                init.zeros_(module.weight)
            init.constant_(module.bias, self.config.head_bias_init)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, LayerScale):
            init.constant_(module.weight, module.init_value)
        elif isinstance(module, PositionEmbedding) and module.is_fixed:
            init.copy_(module.weight, sincos2d_positions(module.grid_size, module.weight.shape[-1]))
        elif isinstance(module, (PositionEmbedding, MaskToken, PrefixTokens)):
            for parameter in module.parameters():
                init.trunc_normal_(parameter, std=std)
        elif isinstance(module, WindowAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=std)
            init.copy_(module.relative_position_index, relative_position_index(module.window_size))
        elif isinstance(module, WindowLayout):
            layout = module.compute(module.grid_size, torch.device("cpu"))
            for buffer, tensor in zip((module.order, module.places, module.mask), layout):
                if buffer is not None:
                    init.copy_(buffer, tensor)


class ViTCustomModel(ViTCustomPreTrainedModel):
    """The encoder: a sequence of stages and a pooling, with a final norm before or after it."""

    def __init__(self, config: ViTCustomConfig, use_mask_token: bool = False):
        super().__init__(config)
        self.stages = nn.ModuleList(
            [Stage(config, stage, use_mask_token and index == 0) for index, stage in enumerate(config.stages)]
        )
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm, pooled_norm = (nn.Identity(), norm) if config.norm_after_pooling else (norm, nn.Identity())
        if config.pooling == "cls":
            self.pooling = ClassTokenPooling(pooled_norm)
        else:
            self.pooling = MeanPooling(pooled_norm, config.num_prefix_tokens)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        ids_keep: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        prefix_only: bool = False,
    ) -> BaseModelOutputWithPooling:
        """(B, C, H, W) -> tokens (B, P + N, D) of the last stage after the final norm, and their pooling (B, D).

        With `config.norm_after_pooling` the tokens are those of the last block, and their pooling is normalised. With
        `config.token_merging` they are fewer.

        Args:
            pixel_values: Images (B, C, H, W) of any size.
            bool_masked_pos: First stage's patches, (B, N) or (B, h, w), to replace by the mask token.
            ids_keep: Indices (B, n) of the patches that the encoder sees; for a single stage of global attention.
            output_attentions: Return each block's attention weights, whatever the attention implementation.
            output_hidden_states: Return the first stage's embedding and each block's output, all as tokens.
            prefix_only: Return no patches, (B, P, D): the last block then leaves them out, wherever nothing else is
                asked of it. For a head that reads the prefix alone, as every one does with `config.pooling="cls"`.

        Raises:
            ValueError: if the images or the mask do not fit the configuration.
        """
        check_images(pixel_values, self.config.num_channels, self.stages[0].patch_size)
        if bool_masked_pos is not None:
            bool_masked_pos = self._check_mask(bool_masked_pos, pixel_values)
        if ids_keep is not None and not self.config.is_plain:
            raise ValueError(f"ids_keep needs a single stage of global attention, not {len(self.stages)} stage(s)")
        if ids_keep is not None and (ids_keep.ndim != 2 or ids_keep.shape[0] != pixel_values.shape[0]):
            raise ValueError(
                f"ids_keep of shape {tuple(ids_keep.shape)} must be ({pixel_values.shape[0]}, patches to keep)"
            )
        if prefix_only and self.config.pooling != "cls":
            raise ValueError(f"prefix_only=True leaves no patches for pooling={self.config.pooling!r}")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        num_outputs = self.config.num_prefix_tokens if prefix_only else None
        is_complete = output_attentions or output_hidden_states

        grids = self.feature_grids(tuple(pixel_values.shape[-2:]))
        image = pixel_values.to(self.stages[0].embedding.projection.weight.dtype)
        all_hidden_states, all_attentions = [], []
        for index, (stage, grid) in enumerate(zip(self.stages, grids)):
            tokens, sizes, hidden_states, attentions = stage(
                image,
                grid,
                bool_masked_pos=bool_masked_pos if index == 0 else None,
                ids_keep=ids_keep,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                num_outputs=None if is_complete or index < len(self.stages) - 1 else num_outputs,
            )
            # A later stage's embedding is no block's output.
            all_hidden_states += hidden_states[1:] if index else hidden_states
            all_attentions += attentions
            if index < len(self.stages) - 1:
                image = to_image(ContiguousGradient.apply(tokens), grid)

        last_hidden_state = self.norm(tokens[:, :num_outputs])
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pooling(last_hidden_state, sizes),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def feature_grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Grid (h, w) of each stage for images of a size (H, W)."""
        grids = []
        for stage in self.stages:
            size = count_patches(size, stage.patch_size)
            grids.append(size)
        return grids

    def _check_mask(self, bool_masked_pos: Tensor, pixel_values: Tensor) -> Tensor:
        if self.stages[0].mask_token is None:
            raise ValueError("bool_masked_pos needs a model made with use_mask_token=True")
        height, width = count_patches(tuple(pixel_values.shape[-2:]), self.stages[0].patch_size)
        bool_masked_pos = bool_masked_pos.flatten(1).bool()
        if bool_masked_pos.shape != (pixel_values.shape[0], height * width):
            raise ValueError(
                f"bool_masked_pos of shape {tuple(bool_masked_pos.shape)} must be (batch size, patches) = "
                f"{(pixel_values.shape[0], height * width)} for a grid of {height} x {width}"
            )
        return bool_masked_pos


def check_images(pixel_values: Tensor, num_channels: int, patch_size: int):
    """Refuse what cannot be a batch of images for a first stage of this patch size.

    Raises:
        ValueError: naming the shape and what would be right.
    """
    shape = tuple(pixel_values.shape)
    if len(shape) != 4:
        raise ValueError(f"pixel_values of shape {shape} must have four dimensions: (batch, channels, height, width)")
    batch_size, channels, height, width = shape
    if channels != num_channels:
        raise ValueError(f"pixel_values of shape {shape} have {channels} channels, the model takes {num_channels}")
    if batch_size == 0:
        raise ValueError(f"pixel_values of shape {shape} hold no image: the batch is empty")
    if height < patch_size or width < patch_size:
        raise ValueError(f"pixel_values of {height} x {width} pixels are smaller than one patch of side {patch_size}")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values of dtype {pixel_values.dtype} must be floating point: rescale and normalise first"
        )


# --------------------------------------------------------------------------------------------------------- the heads


@dataclass
class ViTCustomImageClassifierOutput(ModelOutput):
    """Class scores.

    Attributes:
        loss: Present if labels were given.
        logits: (B, L); with a distillation token the mean of both heads.
        cls_logits: (B, L) of the class token's head, if there is a distillation token.
        distillation_logits: (B, L) of the distillation token's head, if there is one.
        hidden_states: See `ViTCustomModel.forward`.
        attentions: See `ViTCustomModel.forward`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ViTCustomForPreTrainingOutput(ModelOutput):
    """What the masked autoencoder predicts.

    Attributes:
        loss: Mean squared error over the masked patches.
        logits: Predicted pixels of every patch, (B, N, patch * patch * C).
        mask: (B, N), 1 where a patch was hidden from the encoder.
        ids_restore: (B, N), where each patch went when they were shuffled.
        hidden_states: The encoder's, see `ViTCustomModel.forward`.
        attentions: The encoder's, see `ViTCustomModel.forward`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None
    ids_restore: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def classification_loss(
    logits: Tensor, labels: Tensor, config: ViTCustomConfig, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Loss in fp32 by problem type: cross-entropy, binary cross-entropy or mean squared error.

    Cross-entropy takes classes (B,) or, if they are floating point, probabilities (B, L) (mixup, distillation).
    The mean is over all labels, or over `num_items_in_batch` label values where gradients are accumulated.

    Raises:
        ValueError: if labels do not fit the logits or lie outside the range.
    """
    problem_type = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    logits = logits.float()
    if problem_type == "regression":
        _check_labels(labels.shape in {logits.shape, logits.squeeze(-1).shape}, labels, logits, "one value an output")
        losses, count = F.mse_loss(logits, labels.float().reshape(logits.shape), reduction="none"), logits.numel()
    elif problem_type == "multi_label_classification":
        _check_labels(labels.shape == logits.shape, labels, logits, "a 0 or 1 for every class")
        losses, count = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none"), logits.numel()
    elif labels.is_floating_point():
        _check_labels(labels.shape == logits.shape, labels, logits, "a probability for every class")
        losses, count = F.cross_entropy(logits, labels.float(), reduction="none"), labels.shape[0]
    else:
        _check_labels(labels.shape == logits.shape[:1], labels, logits, "one class an image")
        _check_label_range(labels, logits.shape[-1])
        losses, count = F.cross_entropy(logits, labels.long(), reduction="none"), (labels != -100).sum()
    if num_items_in_batch is not None:
        # The Trainer counts label values, and a soft target has one for every class.
        values_per_item = labels.shape[-1] if losses.ndim < labels.ndim else 1
        count = torch.as_tensor(num_items_in_batch, device=losses.device) / values_per_item
    return losses.sum() / count


def _check_labels(fits: bool, labels: Tensor, logits: Tensor, expected: str):
    if not fits:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype} do not fit logits of shape "
            f"{tuple(logits.shape)}: {expected} is needed"
        )


def _check_label_range(labels: Tensor, num_labels: int):
    # Looking at values would make an accelerator wait and a compiled graph break; there the kernel checks by itself.
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = labels[((labels < 0) & (labels != -100)) | (labels >= num_labels)]
    if outside.numel():
        raise ValueError(f"label {int(outside[0])} is outside 0..{num_labels - 1} (num_labels={num_labels})")


class ClassificationHead(nn.Linear):
    """Logits of a token or pooled tokens, with an initialisation of its own: (B, D) -> (B, L)."""


class ClassTokenHead(nn.Module):
    """One head on the pooled tokens: -> logits (B, L), None, None."""

    def __init__(self, config: ViTCustomConfig):
        super().__init__()
        self.classifier = ClassificationHead(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor, hidden_states: Tensor) -> tuple[Tensor, None, None]:
        return self.classifier(pooled), None, None


class BatchNormHead(nn.Module):
    """One head on pooled tokens that a batch norm without learnt scale standardises: -> logits (B, L), None, None.

    Linear probing of the masked autoencoder, https://arxiv.org/abs/2111.06377, appendix A.1. The statistics are those
    of the batch that one device sees at once.
    """

    def __init__(self, config: ViTCustomConfig):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(config.hidden_size, eps=1e-6, affine=False)
        self.classifier = ClassificationHead(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor, hidden_states: Tensor) -> tuple[Tensor, None, None]:
        if self.training and len(pooled) == 1:
            # One row has no deviation: an epoch's last batch is standardised as in evaluation.
            norm = self.batch_norm
            standardized = F.batch_norm(pooled, norm.running_mean, norm.running_var, eps=norm.eps)
        else:
            standardized = self.batch_norm(pooled)
        return self.classifier(standardized), None, None


class RepresentationHead(nn.Module):
    """One head behind a hidden layer on the pooled tokens: -> logits (B, L), None, None.

    As ViT is pretrained, https://arxiv.org/abs/2010.11929, section 3.1.
    """

    def __init__(self, config: ViTCustomConfig):
        super().__init__()
        self.representation = nn.Linear(config.hidden_size, config.representation_size)
        self.classifier = ClassificationHead(config.representation_size, config.num_labels)

    def forward(self, pooled: Tensor, hidden_states: Tensor) -> tuple[Tensor, None, None]:
        return self.classifier(self.representation(pooled).tanh()), None, None


class DistilledHead(nn.Module):
    """A second head on the distillation token: -> mean logits, class logits, distillation logits, each (B, L).

    DeiT, https://arxiv.org/abs/2012.12877, section 4.
    """

    def __init__(self, config: ViTCustomConfig):
        super().__init__()
        self.classifier = ClassificationHead(config.hidden_size, config.num_labels)
        self.distillation_classifier = ClassificationHead(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cls_logits, distillation_logits = self.classifier(pooled), self.distillation_classifier(hidden_states[:, 1])
        return (cls_logits + distillation_logits) / 2, cls_logits, distillation_logits


def make_head(config: ViTCustomConfig) -> ClassTokenHead | BatchNormHead | RepresentationHead | DistilledHead:
    """The classification head, or two where there is a distillation token."""
    if config.use_distillation_token:
        return DistilledHead(config)
    if config.head_batch_norm:
        return BatchNormHead(config)
    if config.representation_size is not None:
        return RepresentationHead(config)
    return ClassTokenHead(config)


class ViTCustomForImageClassification(ViTCustomPreTrainedModel):
    """The encoder with a classification head, or two where there is a distillation token."""

    accepts_loss_kwargs = True  # `forward` divides by `num_items_in_batch`, so accumulation is exact

    def __init__(self, config: ViTCustomConfig):
        super().__init__(config)
        self.model = ViTCustomModel(config)
        self.head = make_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ViTCustomImageClassifierOutput:
        """Images (B, C, H, W) of any size -> logits (B, L), and the loss if there are labels.

        Args:
            pixel_values: See `ViTCustomModel.forward`.
            labels: Classes (B,), class probabilities (B, L), or what `config.problem_type` asks for.
            num_items_in_batch: Number of labels that the loss is the mean of, where gradients are accumulated.
            output_attentions: See `ViTCustomModel.forward`.
            output_hidden_states: See `ViTCustomModel.forward`.

        Raises:
            ValueError: if images or labels do not fit the configuration.
        """
        outputs = self.model(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            prefix_only=self.config.pooling == "cls",
            return_dict=True,
        )
        logits, cls_logits, distillation_logits = self.head(outputs.pooler_output, outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels.to(logits.device), self.config, num_items_in_batch)
        return ViTCustomImageClassifierOutput(
            loss=loss,
            logits=logits,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def check_tokens_are_normalised(config: ViTCustomConfig):
    """Refuse an encoder that normalises its pooling only: a reconstruction reads the tokens.

    Raises:
        ValueError: naming the field.
    """
    if config.norm_after_pooling:
        raise ValueError(
            "a reconstruction reads tokens, which norm_after_pooling=True leaves without a norm: "
            "set norm_after_pooling=False"
        )


def check_patches_stay(config: ViTCustomConfig, what: str, may_drop: bool = False):
    """Refuse an encoder that gives fewer patches than it was given.

    Raises:
        ValueError: naming the field and what needs the patches.
    """
    if config.patch_dropout > 0 and not may_drop:
        raise ValueError(f"{what} needs all patches: set patch_dropout=0.0, not {config.patch_dropout}")
    if config.token_merging > 0:
        raise ValueError(f"{what} needs all patches: set token_merging=0, not {config.token_merging}")


class Decoder(nn.Module):
    """Predict all patches' pixels from the visible ones: (B, P + n, D) -> (B, N, patch * patch * C).

    Masked autoencoder, https://arxiv.org/abs/2111.06377, section 3.
    """

    def __init__(self, config: ViTCustomConfig):
        super().__init__()
        stage = config.decoder_stage
        self.num_prefix_tokens = stage.num_prefix_tokens
        self.embedding = Linear(stage.in_channels, stage.hidden_size)
        self.mask_token = MaskToken(stage.hidden_size)
        self.position_embedding = PositionEmbedding(config, stage)
        self.blocks = nn.ModuleList([EncoderBlock(config, stage, index) for index in range(stage.depth)])
        self.norm = nn.LayerNorm(stage.hidden_size, eps=config.layer_norm_eps)
        self.prediction = Linear(stage.hidden_size, stage.patch_size**2 * config.num_channels)

    def forward(self, hidden_states: Tensor, ids_restore: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.embedding(hidden_states)
        prefix, visible = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        num_visible = visible.shape[1]
        patches = gather_tokens(visible, ids_restore.clamp(max=num_visible - 1))
        patches = self.mask_token(patches, ids_restore >= num_visible)
        tokens = torch.cat([prefix, self.position_embedding(patches, grid)], dim=1)
        for block in self.blocks:
            tokens, _, _ = block(tokens, grid)
        return self.prediction(self.norm(tokens))[:, self.num_prefix_tokens :]


class ViTCustomForPreTraining(ViTCustomPreTrainedModel):
    """Masked autoencoder: the encoder sees the visible patches only (https://arxiv.org/abs/2111.06377).

    Raises:
        ValueError: for an encoder that cannot drop patches, i.e. one with several stages, windows or reduced keys, or
            one whose tokens have no norm.
    """

    def __init__(self, config: ViTCustomConfig):
        stages = config.stages
        if not config.is_plain:
            raise ValueError(
                f"a masked autoencoder needs a single stage of global attention, not {len(stages)} stage(s) with "
                f"sr_ratios={config.sr_ratios} and window_size={config.window_size}; "
                "use ViTCustomForMaskedImageModeling, whose encoder sees all patches"
            )
        check_tokens_are_normalised(config)
        check_patches_stay(config, "a reconstruction", may_drop=True)
        for name in (
            "decoder_hidden_size",
            "decoder_num_hidden_layers",
            "decoder_num_attention_heads",
            "decoder_intermediate_size",
        ):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
        if config.decoder_hidden_size % 4 or config.decoder_hidden_size % config.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size={config.decoder_hidden_size} must be a multiple of 4 and of "
                f"decoder_num_attention_heads={config.decoder_num_attention_heads}"
            )
        grid = stages[0].grid_size
        count_visible(grid[0] * grid[1], config.mask_ratio)
        super().__init__(config)
        self.model = ViTCustomModel(config)
        self.decoder = Decoder(config)
        self.patch_size = stages[0].patch_size
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ViTCustomForPreTrainingOutput:
        """Images (B, C, H, W) -> reconstruction of all patches and the loss over the masked ones.

        Args:
            pixel_values: See `ViTCustomModel.forward`.
            noise: (B, N); the patches with the lowest values stay visible. Random by default.
            output_attentions: See `ViTCustomModel.forward`.
            output_hidden_states: See `ViTCustomModel.forward`.
        """
        check_images(pixel_values, self.config.num_channels, self.patch_size)
        grid = count_patches(tuple(pixel_values.shape[-2:]), self.patch_size)
        batch_size, num_patches = pixel_values.shape[0], grid[0] * grid[1]
        if noise is None:
            noise = torch.rand(batch_size, num_patches, device=pixel_values.device)
        elif noise.shape != (batch_size, num_patches):
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} must be (batch, patches) = {(batch_size, num_patches)}"
            )
        num_visible = count_visible(num_patches, self.config.mask_ratio)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)

        outputs = self.model(
            pixel_values,
            ids_keep=ids_shuffle[:, :num_visible],
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.decoder(outputs.last_hidden_state, ids_restore, grid)
        mask = (ids_restore >= num_visible).float()
        losses = (logits.float() - self.make_target(pixel_values)).square().mean(dim=-1)
        return ViTCustomForPreTrainingOutput(
            loss=(losses * mask).sum() / mask.sum(),
            logits=logits,
            mask=mask,
            ids_restore=ids_restore,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def make_target(self, pixel_values: Tensor) -> Tensor:
        """Pixels by patch, normalised if so configured: (B, C, H, W) -> (B, N, patch * patch * C).

        https://arxiv.org/abs/2111.06377, section 3; padding at the bottom and right counts as pixels of value 0.
        """
        patches = patchify(pixel_values.float(), self.patch_size)
        if not self.config.norm_pix_loss:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def resize_image_size(self, image_size: int | tuple[int, int], window_size: int | None = None):
        super().resize_image_size(image_size, window_size)
        self.decoder.position_embedding.resize(self.config.decoder_stage.grid_size)


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """How many patches the encoder of a masked autoencoder sees.

    Raises:
        ValueError: if these are all.
    """
    num_visible = max(1, int(num_patches * (1 - mask_ratio)))
    if num_visible == num_patches:
        raise ValueError(f"mask_ratio={mask_ratio} hides none of {num_patches} patch(es)")
    return num_visible


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Pixels by patch, channels fastest: (B, C, H, W) -> (B, N, patch * patch * C)."""
    image = pad_to_multiple(image, patch_size)
    patches = image.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class ViTCustomForMaskedImageModeling(ViTCustomPreTrainedModel):
    """Masked image modeling with mask tokens and a linear decoder, for every encoder.

    SimMIM, https://arxiv.org/abs/2111.09886: L1 over the masked pixels.

    Raises:
        ValueError: if patches are dropped or merged, nothing is masked, squares are not whole patches, or tokens have
            no norm.
    """

    def __init__(self, config: ViTCustomConfig):
        patch_size = config.stages[0].patch_size
        check_patches_stay(config, "a reconstruction")
        if config.mask_ratio == 0:
            raise ValueError("mask_ratio=0.0 hides nothing: choose a share above 0")
        if config.mask_patch_size % patch_size:
            raise ValueError(
                f"mask_patch_size={config.mask_patch_size} must be a multiple of the first patch_size={patch_size}"
            )
        check_tokens_are_normalised(config)
        super().__init__(config)
        self.model = ViTCustomModel(config, use_mask_token=True)
        self.patch_size = patch_size
        self.stride = math.prod(stage.patch_size for stage in config.stages)
        self.decoder = nn.Conv2d(config.hidden_size, config.num_channels * self.stride**2, kernel_size=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> MaskedImageModelingOutput:
        """Images (B, C, H, W) -> reconstruction (B, C, H, W) and the loss over the masked pixels.

        Args:
            pixel_values: See `ViTCustomModel.forward`.
            bool_masked_pos: See `ViTCustomModel.forward`; by default random squares of `config.mask_patch_size` pixels.
            output_attentions: See `ViTCustomModel.forward`.
            output_hidden_states: See `ViTCustomModel.forward`.
        """
        check_images(pixel_values, self.config.num_channels, self.patch_size)
        size = tuple(pixel_values.shape[-2:])
        if bool_masked_pos is None:
            bool_masked_pos = self.make_mask(pixel_values)
        outputs = self.model(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        patches = outputs.last_hidden_state[:, self.config.num_prefix_tokens :]
        feature_map = to_image(patches, self.model.feature_grids(size)[-1])
        reconstruction = F.pixel_shuffle(self.decoder(feature_map), self.stride)[:, :, : size[0], : size[1]]

        mask = bool_masked_pos.reshape(-1, 1, *count_patches(size, self.patch_size)).to(pixel_values.device)
        mask = mask.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        mask = mask[:, :, : size[0], : size[1]].float()
        losses = (reconstruction.float() - pixel_values.float()).abs().mean(dim=1, keepdim=True)
        return MaskedImageModelingOutput(
            loss=(losses * mask).sum() / (mask.sum() + 1e-5),
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def make_mask(self, pixel_values: Tensor) -> Tensor:
        """Random squares, `mask_ratio` of them for every image: (B, C, H, W) -> (B, h, w) of the first stage."""
        size, side = tuple(pixel_values.shape[-2:]), self.config.mask_patch_size
        grid, squares = count_patches(size, self.patch_size), count_patches(size, side)
        count = squares[0] * squares[1]
        noise = torch.rand(pixel_values.shape[0], count, device=pixel_values.device)
        mask = noise.argsort(dim=1).argsort(dim=1) < math.ceil(count * self.config.mask_ratio)
        scale = side // self.patch_size
        mask = mask.unflatten(1, squares).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return mask[:, : grid[0], : grid[1]]


class ViTCustomBackbone(BackboneMixin, ViTCustomPreTrainedModel):
    """Feature maps of any stage or block, (B, D, h, w) each, for dense prediction.

    Maps of the last stage pass the encoder's final norm, those of earlier stages a norm of their own that training
    has to fit. So do all maps of an encoder with `config.norm_after_pooling`: its norm was fitted to means of patches,
    not to patches. With `config.out_strides` maps are resized to these strides.

    Raises:
        ValueError: if `config.out_strides` has another length than `config.out_features`, or patches are dropped or
            merged.
    """

    def __init__(self, config: ViTCustomConfig):
        check_patches_stay(config, "a feature map")
        if config.out_strides is not None and len(config.out_strides) != len(config.out_features):
            raise ValueError(
                f"out_strides={config.out_strides} must have one entry for each of out_features={config.out_features}"
            )
        super().__init__(config)
        self.model = ViTCustomModel(config)
        ends = [sum(stage.depth for stage in config.stages[: i + 1]) for i in range(len(config.stages))]
        depth = config.num_hidden_layers
        # Which hidden state and which stage a feature map comes from, in the order of `config.stage_names`.
        self.layers = [0, *ends, *range(1, depth + 1)]
        self.stage_of = [next(i for i, end in enumerate(ends) if layer <= end) for layer in self.layers]
        self.num_features = [config.stages[stage].hidden_size for stage in self.stage_of]
        last = len(config.stages) - 1
        self.norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(self.num_features[index], eps=config.layer_norm_eps)
                for name, index in zip(config.out_features, config.out_indices)
                if self.stage_of[index] != last or config.norm_after_pooling
            }
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BackboneOutput:
        """Images (B, C, H, W) -> one feature map (B, D, h, w) for each of `config.out_features`."""
        outputs = self.model(
            pixel_values, output_attentions=output_attentions, output_hidden_states=True, return_dict=True
        )
        size = tuple(pixel_values.shape[-2:])
        grids = self.model.feature_grids(size)
        feature_maps = []
        for position, (name, index) in enumerate(zip(self.config.out_features, self.config.out_indices)):
            stage = self.stage_of[index]
            tokens = outputs.hidden_states[self.layers[index]]
            tokens = self.norms[name](tokens) if name in self.norms else self.model.norm(tokens)
            feature_map = to_image(tokens[:, self.config.stages[stage].num_prefix_tokens :], grids[stage])
            if self.config.out_strides is not None:
                feature_map = resize_map(feature_map, count_patches(size, self.config.out_strides[position]))
            feature_maps.append(feature_map.contiguous())
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


def resize_map(feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear to a finer grid, average pooling to a coarser one: (B, D, h, w) -> (B, D, h', w')."""
    if tuple(feature_map.shape[-2:]) == grid:
        return feature_map
    if feature_map.shape[-2] >= grid[0] and feature_map.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(feature_map, grid)
    return F.interpolate(feature_map, size=grid, mode="bilinear", align_corners=False)


# Saved folders carry this code for each Auto class, also when they are written by a process that has it from a folder.
ViTCustomModel.register_for_auto_class("AutoModel")
ViTCustomForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTCustomForPreTraining.register_for_auto_class("AutoModelForPreTraining")
ViTCustomForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
ViTCustomBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "ViTCustomBackbone",
    "ViTCustomForImageClassification",
    "ViTCustomForMaskedImageModeling",
    "ViTCustomForPreTraining",
    "ViTCustomForPreTrainingOutput",
    "ViTCustomImageClassifierOutput",
    "ViTCustomModel",
    "ViTCustomPreTrainedModel",
]
