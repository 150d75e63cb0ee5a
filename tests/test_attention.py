"""Attention: all implementations agree, weights are true, and windows are what a slow reference says."""

import math

import pytest
import torch
from tiny_models import ARCHITECTURES, HEADS_AND_ARCHITECTURES, main_output, random_images, tiny_config, tiny_model

from modeling_vit_custom import ViTCustomBackbone, ViTCustomForImageClassification, ViTCustomModel
from modeling_vit_custom.modeling_vit_custom import WindowAttention


def plain_softmax(scores: torch.Tensor) -> torch.Tensor:
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def plain_window_attention(attention: WindowAttention, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Windows pixel by pixel, without a roll, a pad or a mask: (B, N, D) -> (B, N, D).

    Shifted by s, pixel r lies in window (r - s) // M: the floor puts what a roll would wrap around into window -1.
    """
    side, heads = attention.window_size, attention.num_heads
    shift = [side // 2 if attention.shifted and extent > side else 0 for extent in grid]
    pixels = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    windows = [tuple((at - by) // side for at, by in zip(pixel, shift)) for pixel in pixels]
    table = attention.relative_position_bias_table
    query, key, value = attention.qkv(tokens).chunk(3, dim=-1)
    width = query.shape[-1] // heads
    rows = []
    for i, (row, column) in enumerate(pixels):
        members = [j for j in range(len(pixels)) if windows[j] == windows[i]]
        outputs = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack(
                [
                    (query[:, i, part] * key[:, j, part]).sum(-1) / math.sqrt(width)
                    + table[(row - pixels[j][0] + side - 1) * (2 * side - 1) + column - pixels[j][1] + side - 1, head]
                    for j in members
                ],
                dim=-1,
            )
            outputs.append((plain_softmax(scores)[..., None] * value[:, members, part]).sum(1))
        rows.append(attention.projection(torch.cat(outputs, dim=-1)))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("grid", [(8, 8), (8, 4), (4, 4), (3, 2), (1, 9), (6, 7), (5, 12), (4, 9)], ids=str)
def test_windows_against_a_slow_reference(grid, shifted, implementation):
    model = tiny_model(ViTCustomModel, "swin", attn_implementation=implementation)
    attention = model.stages[0].blocks[int(shifted)].attention
    assert attention.shifted == shifted
    tokens = torch.randn(2, grid[0] * grid[1], 16)
    expected = plain_window_attention(attention, tokens, grid)
    torch.testing.assert_close(attention(tokens, grid)[0], expected, rtol=1e-4, atol=1e-5)


def test_windows_of_an_odd_side():
    model = tiny_model(ViTCustomModel, "swin", window_size=3)
    for block in model.stages[0].blocks:
        tokens = torch.randn(1, 35, 16)
        expected = plain_window_attention(block.attention, tokens, (5, 7))
        torch.testing.assert_close(block.attention(tokens, (5, 7))[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pvt", "vit"])
@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 1)], ids=str)
def test_reduced_keys_against_a_slow_reference(name, grid):
    """Queries of all tokens; keys of the prefix and of a strided convolution, padded with zeros at bottom and right."""
    fields = {"num_hidden_layers": 1} if name == "vit" else {"sr_ratios": [2, 2]}
    model = tiny_model(ViTCustomModel, name, **{"sr_ratios": 2, **fields})
    attention = model.stages[-1].blocks[0].attention
    tokens = torch.randn(2, 1 + grid[0] * grid[1], 32)
    image = torch.zeros(2, grid[0] + 1, grid[1] + 1, 32)
    image[:, : grid[0], : grid[1]] = tokens[:, 1:].reshape(2, *grid, 32)
    kernel, context = attention.reduction.weight, [tokens[:, 0]]
    for row in range(0, grid[0], 2):
        for column in range(0, grid[1], 2):
            patch = image[:, row : row + 2, column : column + 2]
            reduced = torch.einsum("brcd,odrc->bo", patch, kernel) + attention.reduction.bias
            context.append(attention.reduction_norm(reduced))
    query = attention.query(tokens).unflatten(-1, (attention.num_heads, -1))
    key, value = attention.key_value(torch.stack(context, dim=1)).chunk(2, dim=-1)
    key, value = (part.unflatten(-1, (attention.num_heads, -1)) for part in (key, value))
    weights = plain_softmax(torch.einsum("bnad,bkad->bank", query, key) / math.sqrt(query.shape[-1]))
    expected = attention.projection(torch.einsum("bank,bkad->bnad", weights, value).flatten(2))
    torch.testing.assert_close(attention(tokens, grid)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head", "name"), HEADS_AND_ARCHITECTURES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("size", [(32, 32), (24, 44)], ids=str)
def test_implementations_agree(head, name, size):
    model, images = tiny_model(head, name, attn_implementation="eager"), random_images(2, *size)
    assert model.config._attn_implementation == "eager"
    expected = main_output(model, images)
    for implementation in (None, "auto", "sdpa"):
        other = tiny_model(head, name, attn_implementation=implementation)
        assert other.config._attn_implementation == (implementation or "auto")
        torch.testing.assert_close(main_output(other, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "sdpa"])
def test_implementations_have_the_same_gradients(implementation, architecture):
    images, labels = random_images(2, 24, 40), torch.tensor([0, 3])
    models = [
        tiny_model(ViTCustomForImageClassification, architecture, attn_implementation=each)
        for each in ("eager", implementation)
    ]
    for model in models:
        model(images, labels=labels).loss.backward()
    for (name, one), (_, two) in zip(*(model.named_parameters() for model in models)):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text)


# Flex attention compiles a kernel with the C++ compiler of the machine.
@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (24, 44)], ids=str)
def test_flex_agrees(architecture, size):
    # On a CPU a kernel wants heads of 16 channels or more.
    heads = [1, 2] if architecture in ("pvt", "swin") else 2
    fields = {"num_attention_heads": heads}
    model = tiny_model(ViTCustomForImageClassification, architecture, attn_implementation="flex_attention", **fields)
    assert model.config._attn_implementation == "flex_attention"
    expected = tiny_model(ViTCustomForImageClassification, architecture, attn_implementation="eager", **fields)
    images = random_images(2, *size)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, expected(images).logits, rtol=1e-4, atol=1e-5)


def test_implementation_can_be_changed_later(architecture):
    model, images = tiny_model(ViTCustomForImageClassification, architecture), random_images()
    expected = model(images).logits
    model.set_attn_implementation("eager")
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [ViTCustomModel, ViTCustomForImageClassification, ViTCustomBackbone])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_is_refused_for_windows(head, implementation, tmp_path):
    message = f"attn_implementation='{implementation}' cannot add the relative position bias of window_size=4"
    model = tiny_model(head, "swin")
    model.save_pretrained(tmp_path)
    calls = [
        lambda: head(tiny_config("swin", attn_implementation=implementation)),
        lambda: head.from_pretrained(tmp_path, attn_implementation=implementation),
        lambda: model.set_attn_implementation(implementation),
    ]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert model.config._attn_implementation == "auto"


@pytest.mark.parametrize("name", ["vit", "deit", "pvt"])
def test_flash_is_not_refused_where_there_is_no_bias(name):
    """The library may still miss the package that it needs, and says so itself."""
    try:
        tiny_model(ViTCustomModel, name, attn_implementation="flash_attention_2")
    except ImportError as error:
        assert "lash" in str(error)


# ------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [(32, 32), (24, 44)], ids=str)
def test_weights_are_true(architecture, implementation, size):
    """Rows sum to 1, and the weights times the values are what the block used, whatever the implementation."""
    model = tiny_model(ViTCustomModel, architecture, attn_implementation=implementation)
    images, captured = random_images(2, *size), []
    for attention in (block.attention for stage in model.stages for block in stage.blocks):
        attention.register_forward_hook(lambda module, args, output: captured.append((module, args)))
    expected = model(images).last_hidden_state
    captured.clear()
    outputs = model(images, output_attentions=True)
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert len(outputs.attentions) == model.config.num_hidden_layers == len(captured)
    for weights, (attention, args) in zip(outputs.attentions, captured):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights >= 0).all()
        tokens, grid = args[0], args[1]
        attended = attended_by(weights, attention, tokens, grid)
        implemented = attention(tokens, grid)[0]
        torch.testing.assert_close(attention.projection(attended), implemented, rtol=1e-4, atol=1e-5)


def attended_by(weights: torch.Tensor, attention, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Weights times values, tokens in their order: -> (B, T, D)."""
    if hasattr(attention, "key_value"):
        prefix, patches = tokens[:, : attention.num_prefix_tokens], tokens[:, attention.num_prefix_tokens :]
        image = patches.transpose(1, 2).unflatten(2, grid)
        ratio = attention.sr_ratio
        image = torch.nn.functional.pad(image, (0, -grid[1] % ratio, 0, -grid[0] % ratio))
        reduced = attention.reduction(image).flatten(2).transpose(1, 2)
        value = attention.key_value(torch.cat([prefix, attention.reduction_norm(reduced)], 1)).chunk(2, -1)[1]
        assert weights.shape == (tokens.shape[0], attention.num_heads, tokens.shape[1], value.shape[1])
    else:
        value = attention.qkv(tokens).chunk(3, -1)[2]
    value = value.unflatten(2, (attention.num_heads, -1))
    if not isinstance(attention, WindowAttention):
        return torch.einsum("bank,bkad->bnad", weights, value).flatten(2)
    side = attention.window_size
    counts = [-(-extent // side) for extent in grid]
    shift = [side // 2 if attention.shifted and extent > side else 0 for extent in grid]
    assert weights.shape == (tokens.shape[0] * counts[0] * counts[1], attention.num_heads, side**2, side**2)
    weights = weights.unflatten(0, (tokens.shape[0], *counts))
    attended = torch.zeros_like(value)
    for row in range(grid[0]):
        for column in range(grid[1]):
            # Where the pixel is after the shift, and which pixels of the grid its window holds.
            places = [(at - by) % (count * side) for at, by, count in zip((row, column), shift, counts)]
            window, inside = [place // side for place in places], [place % side for place in places]
            own = weights[:, window[0], window[1], :, inside[0] * side + inside[1]]
            for index in range(side**2):
                other = [
                    (first * side + step + by) % (count * side)
                    for first, step, by, count in zip(window, (index // side, index % side), shift, counts)
                ]
                if other[0] < grid[0] and other[1] < grid[1]:
                    token = other[0] * grid[1] + other[1]
                    attended[:, row * grid[1] + column] += own[:, :, index, None] * value[:, token]
                else:
                    assert (own[:, :, index] == 0).all(), "a real token looks at padding"
    return attended.flatten(2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_by_configuration(architecture, implementation, tmp_path):
    images = random_images()
    model = tiny_model(ViTCustomForImageClassification, architecture, attn_implementation=implementation)
    expected = model(images, output_attentions=True).attentions
    assert model(images).attentions is None
    model.config.output_attentions = True
    assert model.config._attn_implementation == implementation
    model.save_pretrained(tmp_path)
    loaded = ViTCustomForImageClassification.from_pretrained(tmp_path, attn_implementation=implementation)
    asked = ViTCustomForImageClassification.from_pretrained(
        tmp_path, output_attentions=True, attn_implementation=implementation
    )
    made = tiny_model(
        ViTCustomForImageClassification, architecture, output_attentions=True, attn_implementation=implementation
    )
    for other in (model, loaded, asked, made):
        found = other(images).attentions
        assert len(found) == len(expected) > 0
        assert all(torch.equal(one, two) for one, two in zip(found, expected))
        assert other(images, output_attentions=False).attentions is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_under_flex(name):
    heads = [1, 2] if name in ("pvt", "swin") else 2
    images = random_images()
    flex = tiny_model(ViTCustomModel, name, attn_implementation="flex_attention", num_attention_heads=heads)
    eager = tiny_model(ViTCustomModel, name, attn_implementation="eager", num_attention_heads=heads)
    found, expected = (model(images, output_attentions=True).attentions for model in (flex, eager))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_weights_of_training_carry_gradients(architecture):
    model = tiny_model(ViTCustomModel, architecture).train()
    model(random_images(), output_attentions=True).attentions[0].square().sum().backward()
    attention = model.stages[0].blocks[0].attention
    weight = attention.query.weight if hasattr(attention, "query") else attention.qkv.weight
    assert weight.grad.abs().sum() > 0
