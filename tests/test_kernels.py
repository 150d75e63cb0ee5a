"""What is computed in another way is the same: dense layers, attention, rearranged tokens, the last block's outputs."""

import pytest
import torch
from tiny_models import random_images, tiny_model
from torch import nn

from modeling_vit_custom import ViTCustomForImageClassification, kernels
from modeling_vit_custom.kernels import ATTENTION_FUNCTIONS, Linear, is_convolution, map_rows
from modeling_vit_custom.modeling_vit_custom import PatchProjection, WindowLayout, eager_attention_forward, rearrange


@pytest.fixture
def prefers_convolutions(monkeypatch):
    monkeypatch.setattr(kernels, "PREFERS_CONVOLUTIONS", True)
    monkeypatch.setattr(kernels, "LARGE_PRODUCT", 0)


def twins(bias=True):
    """The same layer as a convolution and as a product."""
    layer = Linear(24, 40, bias=bias)
    plain = nn.Linear(24, 40, bias=bias)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (3, 5, 24), (2, 3, 5, 24)], ids=str)
def test_a_convolution_is_a_dense_layer(shape, bias, prefers_convolutions):
    layer, plain = twins(bias)
    inputs = torch.randn(shape, requires_grad=True)
    assert is_convolution(inputs, layer.weight)
    outputs, expected = layer(inputs), plain(inputs)
    assert outputs.shape == expected.shape
    assert outputs.is_contiguous()
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((outputs * weights).sum(), [inputs, *layer.parameters()])
    right = torch.autograd.grad((expected * weights).sum(), [inputs, *plain.parameters()])
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_a_convolution_takes_views(prefers_convolutions):
    layer, plain = twins()
    image = torch.randn(2, 24, 6, 5)
    for inputs in (image.flatten(2).transpose(1, 2), image.permute(0, 2, 3, 1), torch.randn(24, 9).T):
        torch.testing.assert_close(layer(inputs), plain(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch.func calls
def test_derivatives_of_other_kinds_go_through_a_convolution(prefers_convolutions):
    layer, plain = twins()
    inputs, tangents = torch.randn(4, 24), torch.randn(4, 24)

    def penalty(of, inputs):
        [gradient] = torch.autograd.grad(of(inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), of.weight)

    once = inputs.clone().requires_grad_()
    torch.testing.assert_close(penalty(layer, once), penalty(plain, once), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.func.jvp(layer, (inputs,), (tangents,)), torch.func.jvp(plain, (inputs,), (tangents,))
    )
    torch.testing.assert_close(torch.func.vmap(layer)(inputs), plain(inputs))


@pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities"), reason="this PyTorch does not name its processor: none has convolutions"
)
def test_the_compiler_sees_where_the_channels_are(prefers_convolutions):
    layer, seen = Linear(24, 40), []

    def keep_shapes(graph, _):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function" and "conv2d" in str(node.target)]
        seen.append([tuple(node.args[0].meta["example_value"].shape) for node in nodes])
        return graph.forward

    compiled = torch.compile(layer, backend=keep_shapes, dynamic=False)
    for shape, views in {(3, 4, 24): [(2, 24, 2, 3)], (3, 5, 24): []}.items():
        inputs = torch.randn(shape)
        torch.testing.assert_close(compiled(inputs), layer(inputs), rtol=1e-5, atol=1e-6)
        assert seen.pop() == views


@pytest.mark.parametrize("autocast", [False, True])
def test_many_rows_are_a_convolution_in_bfloat16(autocast, prefers_convolutions, monkeypatch):
    monkeypatch.setattr(kernels, "MANY_ROWS", 4)
    layer, plain = twins()
    inputs = torch.randn(4, 24)
    if not autocast:
        layer, plain, inputs = layer.bfloat16(), plain.bfloat16(), inputs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert is_convolution(inputs, layer.weight)
        assert not is_convolution(inputs[:3], layer.weight)
        outputs, expected = layer(inputs), plain(inputs)
    assert outputs.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(outputs.float().sum(), list(layer.parameters()))
    right = torch.autograd.grad(expected.float().sum(), list(plain.parameters()))
    torch.testing.assert_close(found, right, rtol=0.02, atol=0.02)


def test_small_products_stay_products(monkeypatch):
    monkeypatch.setattr(kernels, "PREFERS_CONVOLUTIONS", True)
    weight = torch.randn(192, 192)
    assert [is_convolution(torch.randn(1, rows, 192), weight) for rows in (65, 1024)] == [False, True]


def test_other_weights_and_dtypes_stay_products(prefers_convolutions):
    layer, inputs = Linear(24, 40), torch.randn(4, 24)
    assert is_convolution(inputs, layer.weight)
    assert not is_convolution(inputs.bfloat16(), layer.weight.bfloat16())
    assert not is_convolution(inputs.double(), layer.weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_convolution(inputs, layer.weight)
        assert layer(inputs).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert not is_convolution(inputs, layer.weight)
    assert not is_convolution(inputs.to("meta"), layer.weight.to("meta"))


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (8, 8)], ids=str)
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_a_projection_of_patches_is_a_convolution(is_channels_last, size):
    projection, image = PatchProjection(3, 24, 8), random_images(2, *size)
    if is_channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    image.requires_grad_()
    expected = nn.functional.conv2d(image, projection.weight, projection.bias, stride=8)
    found = projection(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    inputs = [image, *projection.parameters()]
    right = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), right, rtol=1e-3, atol=1e-5)


def test_rows_are_taken_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(kernels, "CACHED_BYTES", 3 * 40 * 4)
    inputs, counts = torch.randn(2, 5, 24), []

    def double(rows):
        counts.append(rows.shape[:-1].numel())
        return 2 * rows

    with torch.no_grad():
        assert torch.equal(map_rows(double, inputs, 40), 2 * inputs)
    assert counts == [3, 3, 3, 1]
    assert torch.equal(map_rows(double, inputs, 40), 2 * inputs)
    assert counts[4:] == [10]


def attention_inputs(dtype, num_queries, num_keys, bias):
    """Queries, keys and values, and a bias of heads, of keys, or none."""
    generator = torch.Generator().manual_seed(0)
    of_bias = (2, 1, 1, num_keys) if bias == "keys" else (1, 3, num_queries, num_keys)
    shapes = [(2, 3, num_queries, 16), (2, 3, num_keys, 16), (2, 3, num_keys, 16), of_bias]
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return tensors if bias else [*tensors[:3], None]


@pytest.mark.parametrize("name", ["auto", "products"])
@pytest.mark.parametrize("bias", ["heads", "keys", None])
@pytest.mark.parametrize("keys", [9, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_that_in_double_precision(dtype, keys, bias, name):
    inputs = attention_inputs(dtype, 9, keys, bias)
    exact = [each if each is None else each.detach().double().requires_grad_() for each in inputs]
    module = nn.Module()
    module.is_causal = False
    attended, weights = ATTENTION_FUNCTIONS[name](module, *inputs, scaling=0.3)
    expected, _ = eager_attention_forward(module, *exact, scaling=0.3)
    assert weights is None
    assert attended.dtype == dtype
    bound = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 2e-3}[dtype]
    scale = expected.abs().max()
    assert (attended - expected).abs().max() < bound * scale
    with torch.no_grad():
        assert (ATTENTION_FUNCTIONS[name](module, *inputs, scaling=0.3)[0] - expected).abs().max() < bound * scale
    present = [each for each in inputs if each is not None]
    found = torch.autograd.grad(attended.double().square().sum(), present)
    right = torch.autograd.grad(expected.square().sum(), [each for each in exact if each is not None])
    for one, other in zip(found, right):
        assert (one - other).abs().max() < 2 * bound * other.abs().max()


@pytest.mark.parametrize("name", ["auto", "products"])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_attention_drops_weights_in_training_only(name, needs_gradient):
    inputs, attend = attention_inputs(torch.bfloat16, 9, 9, bias="heads"), ATTENTION_FUNCTIONS[name]
    module = nn.Module()
    module.is_causal = False
    with torch.set_grad_enabled(needs_gradient):
        whole, _ = attend(module.eval(), *inputs, scaling=0.3, dropout=0.9)
        expected, _ = attend(module.eval(), *inputs, scaling=0.3)
        assert torch.equal(whole, expected)
        assert not torch.allclose(attend(module.train(), *inputs, scaling=0.3, dropout=0.9)[0], expected)


@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 9), (4, 4)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_tokens_go_into_windows_and_back(grid, shifted):
    layout = WindowLayout(grid, 4, shifted)
    order, places, mask = layout(grid)
    padded = [side + -side % 4 for side in grid]
    assert len(order) == padded[0] * padded[1]
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    windows = rearrange(tokens, order, places)
    assert torch.equal(rearrange(windows, places, order), tokens)
    # As an image that is padded, rolled and cut.
    image = nn.functional.pad(tokens.unflatten(1, grid), (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
    image = image.roll([-shift for shift in layout.shifts(grid)], dims=(1, 2))
    image = image.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).transpose(2, 3).flatten(1, 4)
    is_token = image.abs().sum(dim=2) > 0
    assert torch.equal(windows[is_token], image[is_token])
    needs_mask = tuple(padded) != grid or layout.shifts(grid) != (0, 0)
    assert (mask is not None) == needs_mask


def test_a_layout_is_the_same_for_the_native_grid_and_another():
    native, other = WindowLayout((12, 8), 4, True), WindowLayout((4, 4), 4, True)
    for known, computed in zip(native((12, 8)), other((12, 8)), strict=True):
        assert torch.equal(known, computed)


def test_gradients_of_rearranged_tokens():
    order, places, _ = WindowLayout((8, 8), 4, True)((8, 8))
    tokens = torch.randn(2, 64, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: rearrange(each, order, places), tokens)
    assert torch.autograd.gradgradcheck(lambda each: rearrange(each, order, places), tokens)
    batched = torch.func.vmap(lambda each: rearrange(each[None], order, places)[0])(tokens)
    assert torch.equal(batched, rearrange(tokens, order, places))


@pytest.mark.parametrize("name", ["vit", "deit", "pvt"])
def test_a_head_that_reads_the_prefix_alone_gets_what_it_had(name):
    images = random_images(2, 40, 24)
    model = tiny_model(ViTCustomForImageClassification, name)
    assert model.config.pooling == "cls"
    seen = []
    model.model.stages[-1].blocks[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    short = model(images).logits
    whole = model(images, output_hidden_states=True)
    assert seen[0][1] == model.config.num_prefix_tokens < seen[1][1] == whole.hidden_states[-1].shape[1]
    torch.testing.assert_close(short, whole.logits, rtol=1e-4, atol=1e-6)
    by_parts = []
    for logits in (short, whole.logits):
        model.zero_grad()
        logits.square().sum().backward()
        by_parts.append({key: each.grad.clone() for key, each in model.named_parameters()})
    torch.testing.assert_close(*by_parts, rtol=1e-3, atol=1e-5)


def test_a_head_that_reads_patches_gets_them():
    model = tiny_model(ViTCustomForImageClassification, "vit", pooling="mean")
    seen = []
    model.model.stages[-1].blocks[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(random_images(2, 32, 32))
    assert seen[0][1] > model.config.num_prefix_tokens + 1


def test_a_mean_of_patches_needs_them():
    model = tiny_model(ViTCustomForImageClassification, "vit", pooling="mean")
    with pytest.raises(ValueError, match="prefix_only=True leaves no patches for pooling='mean'"):
        model.model(random_images(2), prefix_only=True)


@pytest.mark.parametrize("bias", [None, (1, 3, 5, 6), (1, 1, 1, 6), (4, 1, 1, 6), (4, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("cached", [1, 2 * 30, 3 * 30, 7 * 30, 12 * 30])
def test_parts_of_attention_make_the_whole(cached, bias, monkeypatch):
    query, key, value = torch.randn(4, 3, 5, 8), torch.randn(4, 3, 6, 8), torch.randn(4, 3, 6, 8)
    bias = None if bias is None else torch.randn(bias)
    module = nn.Module().eval()
    expected, _ = eager_attention_forward(module, query, key, value, bias, scaling=0.3)
    monkeypatch.setattr(kernels, "CACHED_SCORES", cached)
    with torch.no_grad():
        found, _ = ATTENTION_FUNCTIONS["products"](module, query, key, value, bias, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_scores_that_would_fill_the_memory_are_not_kept(monkeypatch):
    seen = []
    usual = kernels.products_attention_forward
    monkeypatch.setattr(
        kernels, "products_attention_forward", lambda *args, **more: seen.append(1) or usual(*args, **more)
    )
    query = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    module = nn.Module()
    module.is_causal = False
    attend = ATTENTION_FUNCTIONS["auto"]
    few, _ = attend(module, query, query, query, None, scaling=0.3)
    assert len(seen) == 1
    monkeypatch.setattr(kernels, "MAX_SCORES", 2 * 2 * 3 * 5 * 5 - 1)
    many, _ = attend(module, query, query, query, None, scaling=0.3)
    assert len(seen) == 1
    with torch.no_grad():  # a few heads at a time
        attend(module, query, query, query, None, scaling=0.3)
    assert len(seen) == 2
    torch.testing.assert_close(few, many, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "capabilities, expected",
    [({}, False), ({"cpu_name": "AMD EPYC"}, True), ({"cpu_name": "Intel Xeon"}, False), ({"cpu_name": "QEMU"}, False)],
)
def test_convolutions_are_for_processors_that_were_measured(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert kernels.prefers_convolutions() == expected
