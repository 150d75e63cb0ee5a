"""Dense layers and attention, computed in the way that is fastest for the device and the dtype.

Shapes: B images, A attention heads of d channels, N queries, K keys.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def prefers_convolutions() -> bool:
    """Whether this processor multiplies matrices in fp32 faster by oneDNN than by MKL, which is made for Intel's."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # which older PyTorch does not tell
    return capabilities.get("cpu_name", "").startswith("AMD") and torch.backends.mkldnn.is_available()


PREFERS_CONVOLUTIONS = prefers_convolutions()


# From this number of multiplications on, a convolution is faster in single precision.
LARGE_PRODUCT = 10**7
# How high, and how many, its images are when it is compiled.
COMPILED_HEIGHT = 2
# From this number of rows on, it is in bfloat16.
MANY_ROWS = 4096
# What rows of an intermediate result may take, in bytes, so that they stay in the caches of a CPU.
CACHED_BYTES = 2**23
# What the scores of a layer's products may take in training, in bytes: those of all layers are there at once.
MAX_SCORES = 2**29
# How many scores without gradients there are at a time.
CACHED_SCORES = 2**21


def dense(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., in_features), (out_features, in_features), (out_features,) -> (..., out_features).

    PyTorch gives products in fp32 to MKL on every x86 processor, but convolutions to oneDNN, and a dense layer is a
    convolution of single pixels.
    """
    if not is_convolution(input, weight):
        return F.linear(input, weight, bias)
    # (..., D) -> (1, D, 1, rows), a view with the channels last, or (2, D, 2, rows / 4) for the compiler, which forgets
    # the strides of sides of 1, would take the channels for the first, and copy.
    height = COMPILED_HEIGHT if torch.compiler.is_compiling() else 1
    pixels = input.reshape(height, height, -1, input.shape[-1]).permute(0, 3, 1, 2)
    output = F.conv2d(pixels, weight[:, :, None, None], bias)
    return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], weight.shape[0])


def is_convolution(input: Tensor, weight: Tensor) -> bool:
    """Whether a dense layer is to be computed as a convolution; weights of a kind of their own have products, too."""
    if not PREFERS_CONVOLUTIONS or input.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter):
        return False
    if torch.compiler.is_exporting():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
    if dtype == torch.bfloat16:  # products are oneDNN's as well, but add the bias on their own
        return not torch.compiler.is_compiling() and input.numel() >= MANY_ROWS * input.shape[-1]
    if torch.compiler.is_compiling() and input.shape[:-1].numel() % COMPILED_HEIGHT**2:
        return False
    return dtype == input.dtype == weight.dtype == torch.float32 and input.numel() * weight.shape[0] >= LARGE_PRODUCT


class Linear(nn.Linear):
    """A dense layer, as `dense` computes it."""

    def forward(self, input: Tensor) -> Tensor:
        return dense(input, self.weight, self.bias)


def map_rows(function: Callable[[Tensor], Tensor], input: Tensor, width: int) -> Tensor:
    """Apply a function of single rows: (B, T, D) -> (B, T, D), on a CPU without gradients a few rows at a time.

    Results between its layers, which are `width` wide, then stay in the caches.
    """
    num_rows = max(1, CACHED_BYTES // (width * input.element_size()))
    is_split = input.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not is_split or input.shape[0] * input.shape[1] <= num_rows:
        return function(input)
    rows = input.flatten(0, 1)
    return torch.cat([function(part) for part in rows.split(num_rows)]).unflatten(0, input.shape[:2])


def auto_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention: (B, A, N, d), (B, A, K, d), (B, A, K, d) -> (B, N, A, d).

    PyTorch's own, except on a CPU in another precision than single, or with a bias while gradients are wanted: there it
    is several times slower than products of matrices, forward and backward, which need memory for all scores, though.
    """
    learns = torch.is_grad_enabled()
    is_too_large = learns and query.shape[:3].numel() * key.shape[2] * query.element_size() > MAX_SCORES
    is_fused = query.dtype == torch.float32 or is_too_large
    is_fused &= attention_mask is None or not learns
    is_fused |= query.device.type != "cpu"
    if not is_fused:
        return products_attention_forward(module, query, key, value, attention_mask, scaling, dropout)
    bias = None if attention_mask is None else attention_mask.to(query.dtype)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, bias, scaling=scaling, dropout=dropout, **kwargs)


def products_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention by two products of matrices and a softmax: (B, A, N, d), (B, A, K, d), (B, A, K, d) -> (B, N, A, d).

    On a CPU without gradients a few images or heads at a time, whose scores then stay in the caches.
    """
    attend = partial(multiply, scaling=scaling, dropout=dropout if module.training else 0.0)
    is_split = query.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    batch_size, num_heads = query.shape[:2]
    num_rows = max(1, CACHED_SCORES // (query.shape[2] * key.shape[2]))
    if not is_split or num_rows >= batch_size * num_heads:
        return attend(query, key, value, attention_mask).transpose(1, 2), None
    output = query.new_empty(*query.shape[:3], value.shape[3])
    bias = attention_mask
    for images in parts(batch_size, max(1, num_rows // num_heads)):
        for heads in parts(num_heads, num_rows):
            if attention_mask is not None:
                shared = attention_mask if attention_mask.shape[0] == 1 else attention_mask[images]
                bias = shared.expand(-1, num_heads, -1, -1)[:, heads]
            place = (images, heads)
            output[place] = attend(query[place], key[place], value[place], bias)
    return output.transpose(1, 2), None


def parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def multiply(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """Attention: (B, A, N, d), (B, A, K, d), (B, A, K, d), (1 or B, 1 or A, 1 or N, K) -> (B, A, N, d)."""
    batch_size, num_heads, num_keys = *query.shape[:2], key.shape[2]
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    is_added_later = bias is not None and not torch.is_grad_enabled()
    if bias is None or is_added_later:
        start, share = query.new_zeros(1, 1, 1), 0
    else:
        start, share = bias.to(query.dtype).expand(batch_size, num_heads, -1, num_keys).flatten(0, 1), 1
    scores = torch.baddbmm(start, query, key.transpose(1, 2), beta=share, alpha=scaling)
    if is_added_later:
        # To all images at once, and in single precision at least.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).unflatten(0, (batch_size, num_heads))
        scores = scores.add_(bias).flatten(0, 1)
    weights = scores.softmax(dim=-1).to(value.dtype)
    weights = F.dropout(weights, p=dropout)
    return torch.bmm(weights, value).unflatten(0, (batch_size, num_heads))


# Beside those of the library, by name.
ATTENTION_FUNCTIONS = {"auto": auto_attention_forward, "products": products_attention_forward}
