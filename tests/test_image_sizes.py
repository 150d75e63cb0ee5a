"""Any height and width: padding, interpolated positions, no state, and a new native size."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_attention import plain_window_attention
from tiny_models import (
    ARCHITECTURES,
    HEADS_AND_ARCHITECTURES,
    main_output,
    random_images,
    tiny_config,
    tiny_model,
)

from modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
    preset_config,
)


SIZES = [(32, 32), (8, 8), (64, 64), (24, 40), (33, 47), (9, 100), (32, 8)]
with_positions = pytest.mark.parametrize("name", ["vit", "deit", "pvt"])


def resized(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """(1, N, D) -> (1, N', D) by torch."""
    image = table.reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    return image.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("head", "name"), HEADS_AND_ARCHITECTURES, ids=lambda value: getattr(value, "__name__", value))
def test_every_size_runs_forward_and_backward(head, name, size):
    model, images = tiny_model(head, name), random_images(2, *size)
    if head is ViTCustomForPreTraining and size == (8, 8):
        pytest.skip("a single patch leaves nothing to hide")
    if head is ViTCustomForPreTraining:
        outputs = model(images)
        loss, patches = outputs.loss, math.ceil(size[0] / 8) * math.ceil(size[1] / 8)
        assert outputs.logits.shape == (2, patches, 8 * 8 * 3)
    elif head is ViTCustomForMaskedImageModeling:
        outputs = model(images)
        loss = outputs.loss
        assert outputs.reconstruction.shape == images.shape
    else:
        outputs = main_output(model, images)
        loss = outputs.square().mean()
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", [(33, 47), (9, 100), (30, 30)], ids=str)
def test_padding_is_zeros_at_bottom_and_right(architecture, size):
    model, images = tiny_model(ViTCustomModel, architecture), random_images(2, *size)
    side = model.config.stages[0].patch_size
    padded = torch.zeros(2, 3, -(-size[0] // side) * side, -(-size[1] // side) * side)
    padded[:, :, : size[0], : size[1]] = images
    torch.testing.assert_close(model(images)[0], model(padded)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pvt", "swin"])
def test_a_grid_that_the_next_patch_does_not_divide(name):
    model = tiny_model(ViTCustomModel, name)
    hidden_states = model(random_images(2, 20, 36), output_hidden_states=True).hidden_states
    first, last = model.feature_grids((20, 36))
    side = model.config.stages[0].patch_size
    assert first == (20 // side, 36 // side)
    assert last == (math.ceil(first[0] / 2), math.ceil(first[1] / 2))
    assert hidden_states[0].shape[1] == first[0] * first[1]
    assert hidden_states[-1].shape[1] == last[0] * last[1] + model.config.num_prefix_tokens


@pytest.mark.parametrize("size", [(8, 8), (24, 40), (30, 44), (12, 50), (4, 32)], ids=str)
def test_padded_windows_against_a_slow_reference(size):
    """The whole first stage on a grid that windows of 4 do not fill, or do not even reach."""
    model = tiny_model(ViTCustomModel, "swin")
    stage, grid = model.stages[0], model.feature_grids(size)[0]
    images = random_images(1, *size)
    found = stage(images, grid)[0]
    tokens = stage.embed(images, grid)
    for block in stage.blocks:
        tokens = tokens + plain_window_attention(block.attention, block.attention_norm(tokens), grid)
        tokens = tokens + block.mlp(block.mlp_norm(tokens))
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)


def test_no_state_is_kept(architecture):
    fields = {"image_size": 224, "patch_size": 16}
    if architecture in ("pvt", "swin"):
        fields = {"image_size": 224, "patch_size": [4, 2]} | ({"window_size": 7} if architecture == "swin" else {})
    model = tiny_model(ViTCustomForImageClassification, architecture, **fields)
    large = random_images(1, 224, 224)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        alone = model(large).logits
        fresh = tiny_model(ViTCustomForImageClassification, architecture, **fields)
        for size in ((32, 32), (16, 100), (57, 33)):
            fresh(random_images(1, *size))
        assert torch.equal(fresh(large).logits, alone)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert fresh.config.image_size == 224
    assert {name: vars(module).keys() for name, module in fresh.named_modules()} == {
        name: vars(module).keys() for name, module in model.named_modules()
    }


@pytest.mark.parametrize("native", [[32, 64], [64, 32], [24, 40], [30, 50]], ids=str)
def test_native_sizes_that_are_not_square(architecture, native):
    model = tiny_model(ViTCustomForImageClassification, architecture, image_size=native)
    for size in (tuple(native), (32, 32), tuple(reversed(native)), (33, 47)):
        assert model(random_images(2, *size)).logits.isfinite().all()
    if architecture != "swin":
        stage, resolved = model.model.stages[0], model.config.stages[0]
        assert resolved.grid_size == tuple(-(-side // resolved.patch_size) for side in native)
        assert stage.position_embedding.weight.shape[1] == resolved.grid_size[0] * resolved.grid_size[1]
        # At the native size each patch has its own row of the table, row by row.
        images = random_images(2, *native)
        tokens = stage.embedding(images) + stage.position_embedding.weight
        torch.testing.assert_close(stage.embed(images, resolved.grid_size)[:, -tokens.shape[1] :], tokens)


@with_positions
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("position_type", ["learned", "sincos2d"])
@pytest.mark.parametrize("size", [(16, 16), (64, 96), (40, 24)], ids=str)
def test_positions_are_interpolated(name, antialias, position_type, size):
    model = tiny_model(
        ViTCustomModel, name, position_antialias=antialias, image_size=[32, 48], position_embedding_type=position_type
    )
    images = random_images(2, *size)
    outputs = model(images, output_hidden_states=True)
    stage, resolved = model.stages[0], model.config.stages[0]
    grid = model.feature_grids(size)[0]
    positions = resized(stage.position_embedding.weight, resolved.grid_size, grid, antialias)
    patches = stage.embedding(images) + positions
    tokens = outputs.hidden_states[0]
    prefix = tokens.shape[1] - patches.shape[1]
    torch.testing.assert_close(tokens[:, prefix:], patches, rtol=1e-5, atol=1e-5)
    if prefix:
        tokens_alone = [parameter[0] for _, parameter in stage.prefix_tokens.named_parameters()]
        assert torch.equal(tokens[0, :prefix], torch.cat(tokens_alone))


@with_positions
def test_positions_are_interpolated_in_full_precision(name):
    model = tiny_model(ViTCustomModel, name)
    embedding, grid = model.stages[0].position_embedding, (11, 13)
    table = embedding.weight.detach().bfloat16()
    expected = resized(table.float(), model.config.stages[0].grid_size, grid).bfloat16()
    assert torch.equal(model.bfloat16().stages[0].position_embedding.interpolate(grid), expected)


# -------------------------------------------------------------------------------------------------- a new native size


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 16), 40], ids=str)
@pytest.mark.parametrize(("head", "name"), HEADS_AND_ARCHITECTURES, ids=lambda value: getattr(value, "__name__", value))
def test_resizing_changes_no_output_at_the_new_size(head, name, size, tmp_path):
    """Where windows stay the same; positions are resampled once instead of on every call."""
    model = tiny_model(head, name)
    height, width = (size, size) if isinstance(size, int) else size
    images = random_images(2, height, width)

    def run(model):
        torch.manual_seed(0)
        if head is ViTCustomForPreTraining:
            return model(images).logits
        return main_output(model, images)

    expected = run(model)
    model.resize_image_size(size, **({"window_size": 4} if name == "swin" else {}))
    assert model.config.native_size == (height, width)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    for stage, resolved in zip(model.base_model.stages, model.config.stages):
        if name != "swin":
            assert stage.position_embedding.weight.shape[1] == resolved.grid_size[0] * resolved.grid_size[1]
            assert stage.position_embedding.weight.requires_grad
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert loaded.config.native_size == (height, width)
    assert torch.equal(run(loaded), run(model))


@with_positions
def test_resizing_rewrites_the_positions(name):
    model = tiny_model(ViTCustomForImageClassification, name)
    old = [stage.position_embedding.weight.detach().clone() for stage in model.model.stages]
    old_grids = [stage.grid_size for stage in model.config.stages]
    model.resize_image_size((48, 80))
    for stage, resolved, table, grid in zip(model.model.stages, model.config.stages, old, old_grids):
        assert resolved.grid_size != grid
        torch.testing.assert_close(stage.position_embedding.weight, resized(table, grid, resolved.grid_size))
    # And they train from there.
    model(random_images(2, 48, 80), labels=torch.tensor([0, 1])).loss.backward()
    assert all(stage.position_embedding.weight.grad.abs().sum() > 0 for stage in model.model.stages)


@with_positions
@pytest.mark.parametrize("resize", [False, True])
def test_fixed_positions_stay_fixed(name, resize, tmp_path):
    """Neither a new size nor saving and loading makes them weights that an optimizer trains."""
    model = tiny_model(ViTCustomModel, name, position_embedding_type="sincos2d")
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("position_embedding" in key for key in trainable)
    if resize:
        model.resize_image_size(64)
    model.save_pretrained(tmp_path)
    loaded = ViTCustomModel.from_pretrained(tmp_path)
    for other in (model, loaded):
        assert {key for key, parameter in other.named_parameters() if parameter.requires_grad} == trainable
    assert torch.equal(loaded(random_images(1, 64, 64))[0], model(random_images(1, 64, 64))[0])


def test_the_decoder_s_fixed_positions_stay_fixed(tmp_path):
    """The masked autoencoder's decoder has fixed positions always."""
    model = tiny_model(ViTCustomForPreTraining, "vit")
    model.save_pretrained(tmp_path)
    loaded = ViTCustomForPreTraining.from_pretrained(tmp_path)
    for other in (model, loaded):
        other.train()(random_images()).loss.backward()
        parameters = dict(other.decoder.position_embedding.named_parameters())
        assert all(parameter.grad is None for parameter in parameters.values())


def test_what_is_frozen_stays_frozen(architecture):
    model = tiny_model(ViTCustomModel, architecture).requires_grad_(False)
    model.resize_image_size(64)  # and with it the windows
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_resized_weights_are_contiguous(architecture):
    model = tiny_model(ViTCustomModel, architecture)
    model.resize_image_size(48)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_the_decoder_is_resized_with_the_encoder():
    model = tiny_model(ViTCustomForPreTraining, "deit")
    old = model.decoder.position_embedding.weight.clone()
    model.resize_image_size((48, 64))
    torch.testing.assert_close(model.decoder.position_embedding.weight, resized(old, (4, 4), (6, 8)))


def test_windows_keep_their_share_of_the_image(tmp_path):
    """7 at 224 pixels becomes 12 at 384, as in the paper's fine-tuning."""
    config = preset_config(
        "swin_tiny_patch4_window7_224",
        depths=[2, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        intermediate_size=16,
        num_labels=5,
    )
    model = ViTCustomForImageClassification(config).eval()
    old = model.model.stages[0].blocks[1].attention.relative_position_bias_table.detach().clone()
    model.resize_image_size(384)
    assert model.config.window_size == 12
    assert model.config.image_size == 384
    for stage in model.model.stages:
        for block in stage.blocks:
            attention = block.attention
            assert attention.window_size == 12
            assert attention.relative_position_bias_table.shape == (23**2, attention.num_heads)
            assert attention.relative_position_index.shape == (144, 144)
    new = model.model.stages[0].blocks[1].attention.relative_position_bias_table
    torch.testing.assert_close(new, resized(old[None], (13, 13), (23, 23))[0])
    model.save_pretrained(tmp_path)
    loaded = ViTCustomForImageClassification.from_pretrained(tmp_path)
    images = random_images(1, 96, 130)
    torch.testing.assert_close(loaded(images).logits, model(images).logits)
    attention, tokens = loaded.model.stages[0].blocks[1].attention, torch.randn(1, 14 * 13, 8)
    torch.testing.assert_close(
        attention(tokens, (14, 13))[0], plain_window_attention(attention, tokens, (14, 13)), rtol=1e-4, atol=1e-5
    )


def test_windows_follow_the_shorter_side_or_the_caller():
    model = tiny_model(ViTCustomModel, "swin")
    model.resize_image_size((64, 48))
    assert model.config.window_size == 6
    model.resize_image_size((64, 48), window_size=3)
    assert [block.attention.window_size for stage in model.stages for block in stage.blocks] == [3] * 4
    model.resize_image_size(2)
    assert model.config.window_size == 1
    assert model(random_images(2, 32, 32))[0].isfinite().all()
    different = tiny_model(ViTCustomModel, "swin", window_size=[4, 2])
    different.resize_image_size(64)
    assert different.config.window_size == [8, 4]


def test_resizing_to_the_native_size_changes_nothing(architecture):
    model = tiny_model(ViTCustomForImageClassification, architecture)
    before, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    model.resize_image_size(32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [0, -32, (32, 0), (32,), (32, 32, 3), 32.0, "32", (32.0, 32.0), True, None], ids=repr)
def test_impossible_sizes_are_refused_and_change_nothing(name, size):
    model = tiny_model(ViTCustomModel, name)
    before = model.config.to_dict()
    with pytest.raises(ValueError) as error:
        model.resize_image_size(size)
    assert str(size) in str(error.value)
    assert "\n" not in str(error.value)
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "window", "message"),
    [
        ("swin", 0, "window_size=0 must be a positive integer"),
        ("swin", -3, "window_size=-3 must be a positive integer"),
        ("vit", 4, "window_size=4 is for a model with windows"),
        ("pvt", 4, "window_size=4 is for a model with windows"),
    ],
)
def test_impossible_windows_are_refused_and_change_nothing(name, window, message):
    model = tiny_model(ViTCustomModel, name)
    with pytest.raises(ValueError, match=message):
        model.resize_image_size(64, window_size=window)
    assert model.config.image_size == 32
    assert model.config.to_dict() == tiny_config(name).to_dict()


def test_feature_maps_at_odd_sizes(architecture):
    backbone = tiny_model(ViTCustomBackbone, architecture, out_features=["stem", "stage1"])
    feature_map = backbone(random_images(2, 33, 50)).feature_maps[0]
    side = backbone.config.stages[0].patch_size
    assert feature_map.shape[2:] == (math.ceil(33 / side), math.ceil(50 / side))
