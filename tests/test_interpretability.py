"""What a model has learnt: against definitions written out in loops, closed forms and scikit-learn."""

import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from tiny_models import ONE_STAGE_ARCHITECTURES, random_images, tiny_config, tiny_model

from modeling_vit_custom import ViTCustomForImageClassification, ViTCustomModel
from modeling_vit_custom.interpretability import (
    attention_distance,
    attention_map,
    attention_rollout,
    feature_colors,
    grad_cam,
    gradient_attention,
    gradient_rollout,
    image_features,
    nearest_images,
    patch_filters,
    position_similarity,
    predict_at_sizes,
    principal_filters,
    score_map,
    to_pixels,
    to_probabilities,
)
from modeling_vit_custom.interpretability.attention import (
    iterate_attention,
    iterate_gradients,
    merge_windows,
    split_windows,
    spread,
)
from modeling_vit_custom.modeling_vit_custom import Attention, WindowAttention


def classifier(architecture, **fields):
    return tiny_model(ViTCustomForImageClassification, architecture, **fields)


# -------------------------------------------------------------------------------------------------------------- weights


def test_principal_filters_are_scikit_learns(architecture):
    model = classifier(architecture)
    components, shares = principal_filters(model, 5)
    flat = patch_filters(model).flatten(1).numpy()
    expected = PCA(5, svd_solver="full").fit(flat)
    assert components.shape == (5, *patch_filters(model).shape[1:])
    overlap = np.abs((components.flatten(1).numpy() * expected.components_).sum(axis=1))
    np.testing.assert_allclose(overlap, 1, atol=1e-4)
    np.testing.assert_allclose(shares, expected.explained_variance_ratio_, atol=1e-5)


def test_similarity_of_positions_is_their_cosine():
    model = classifier("vit")
    similarity = position_similarity(model)
    positions = model.model.stages[0].position_embedding.weight[0]
    one, two = positions[1 * 4 + 2], positions[3 * 4 + 0]
    expected = torch.dot(one, two) / one.norm() / two.norm()
    torch.testing.assert_close(similarity[1, 2, 3, 0], expected)
    torch.testing.assert_close(similarity[2, 1, 2, 1], torch.tensor(1.0))


def test_a_stage_without_positions_is_refused():
    with pytest.raises(ValueError, match="stage 0 has no absolute positions to compare"):
        position_similarity(classifier("swin"))


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_comes_block_by_block_as_the_model_has_it(architecture, implementation):
    model, images = classifier(architecture, attn_implementation=implementation), random_images(2, 40, 36)
    with torch.no_grad():
        blocks = list(iterate_attention(model, images))
        expected = model(images, output_attentions=True).attentions
    assert [block.layer for block, _ in blocks] == list(range(len(expected)))
    for (_, found), weights in zip(blocks, expected):
        torch.testing.assert_close(found, weights)


def full_attention(model, images):
    """For each block the weights (B, A, N, K) with the places of queries (N, 2) and keys (K, 2) in pixels, by loops."""
    with torch.no_grad():
        blocks = list(iterate_attention(model, images))
    result = []
    stages = [stage for stage in model.config.stages for _ in range(stage.depth)]
    for (block, found), config in zip(blocks, stages):
        height, width = block.grid
        queries = [(row, column) for row in range(height) for column in range(width)]
        places = np.array(queries) * block.stride + block.stride / 2
        heads = found.shape[1]
        if config.window_size:
            size, shift = config.window_size, block.module.attention.layout.shifts(block.grid)
            padded = [side + -side % size for side in block.grid]
            full = torch.zeros(len(images), heads, height * width, height * width)
            windows = found.unflatten(0, (len(images), -1))
            for one, (row, column) in enumerate(queries):
                # Where the roll puts this patch, and in which window.
                at = [(place - by) % side for place, by, side in zip((row, column), shift, padded)]
                window = (at[0] // size) * (padded[1] // size) + at[1] // size
                inside = (at[0] % size) * size + at[1] % size
                for two, (other_row, other_column) in enumerate(queries):
                    to = [(place - by) % side for place, by, side in zip((other_row, other_column), shift, padded)]
                    if (to[0] // size, to[1] // size) == (at[0] // size, at[1] // size):
                        other = (to[0] % size) * size + to[1] % size
                        full[:, :, one, two] = windows[:, window, :, inside, other]
            result.append((full, places, places))
            continue
        ratio = config.sr_ratio
        keys = []
        for top in range(0, height, ratio):
            for left in range(0, width, ratio):
                bottom, right = min(top + ratio, height), min(left + ratio, width)
                keys.append(((top + bottom) / 2 * block.stride, (left + right) / 2 * block.stride))
        prefix = found.shape[3] - len(keys)
        weights = found[:, :, prefix:, prefix:]
        result.append((weights / weights.sum(dim=-1, keepdim=True), places, np.array(keys)))
    return result


@pytest.mark.parametrize("size", [(32, 32), (40, 36)])
def test_attention_distances_are_what_they_are_said_to_be(architecture, size):
    model, images = classifier(architecture), random_images(4, *size)
    found = attention_distance(model, images.split(2))
    for (weights, queries, keys), heads, uniform in zip(full_attention(model, images), found.heads, found.uniform):
        distances = np.linalg.norm(queries[:, None] - keys[None], axis=-1)
        expected = (weights.numpy() * distances).sum(axis=-1).mean(axis=(0, 2))
        np.testing.assert_allclose(heads, expected, rtol=1e-4)
        reachable = (weights > 0).any(dim=0).any(dim=0).numpy()
        even = (reachable * distances).sum(axis=-1) / reachable.sum(axis=-1)
        assert math.isclose(uniform, even.mean(), rel_tol=1e-4)


def test_even_attention_has_the_distance_of_even_attention(architecture):
    model = classifier(architecture)
    with torch.no_grad():
        for block in (block for stage in model.model.stages for block in stage.blocks):
            for name, parameter in block.attention.named_parameters():
                if name.startswith(("qkv", "query", "key_value", "relative")):
                    parameter.zero_()
    found = attention_distance(model, [random_images(2, 40, 36)])
    for heads, uniform in zip(found.heads, found.uniform):
        np.testing.assert_allclose(heads, uniform, rtol=1e-4)


def test_distances_need_images_of_one_size():
    with pytest.raises(ValueError, match=r"images of \(32, 48\) pixels after such of \(32, 32\)"):
        attention_distance(classifier("vit"), [random_images(1, 32, 32), random_images(1, 32, 48)])
    with pytest.raises(ValueError, match="at least one batch of images"):
        attention_distance(classifier("vit"), [])


@pytest.mark.parametrize("size", [(32, 32), (40, 36)])
def test_maps_are_rows_of_the_attention(architecture, size):
    model, images = classifier(architecture), random_images(2, *size)
    for layer, (weights, _, keys) in enumerate(full_attention(model, images)):
        maps = attention_map(model, images, layer, query=(1, 0))
        columns = maps.shape[3]
        if len(keys) == math.prod(maps.shape[2:]):
            total = maps.sum(dim=(2, 3), keepdim=True)  # what goes to prefix tokens is not on the map
            torch.testing.assert_close((maps / total).flatten(2), weights[:, :, columns], rtol=1e-4, atol=1e-6)
        else:
            assert torch.unique(maps[0, 0]).numel() == len(keys)


def test_maps_of_windows_are_put_together():
    model, images = classifier("swin"), random_images(2, 40, 36)
    for layer, (weights, _, _) in enumerate(full_attention(model, images)):
        maps = attention_map(model, images, layer)
        torch.testing.assert_close(maps.flatten(2), weights.mean(dim=2), rtol=1e-4, atol=1e-7)


def test_the_class_tokens_map_is_its_row():
    model, images = classifier("deit"), random_images()
    weights = model(images, output_attentions=True).attentions[-1]
    maps = attention_map(model, images, -1)
    torch.testing.assert_close(maps.flatten(2), weights[:, :, 0, 2:])


@pytest.mark.parametrize(("layer", "query", "message"), [(2, None, "outside of the 2 blocks"), (0, (4, 0), "4 x 4")])
def test_maps_that_are_not_there(layer, query, message):
    with pytest.raises(ValueError, match=message):
        attention_map(classifier("vit"), random_images(), layer, query)


@pytest.mark.parametrize("architecture", ONE_STAGE_ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_rollout_is_the_product_of_the_blocks(architecture, pooling):
    model, images = classifier(architecture, pooling=pooling), random_images()
    first, second = (each.mean(dim=1) for each in model(images, output_attentions=True).attentions)
    identity, prefix = torch.eye(first.shape[-1]), model.config.num_prefix_tokens
    joint = (second + identity) / 2 @ ((first + identity) / 2)
    rows = joint[:, 0] if pooling == "cls" else joint[:, prefix:].mean(dim=1)
    if architecture == "deit":  # whose distillation token has a head as well
        rows = (rows + joint[:, 1]) / 2
    expected = rows[:, prefix:] / rows[:, prefix:].sum(dim=1, keepdim=True)
    torch.testing.assert_close(attention_rollout(model, images).flatten(1), expected)


@pytest.mark.parametrize("architecture", ONE_STAGE_ARCHITECTURES)
def test_gradient_rollout_adds_up_what_speaks_for_the_class(architecture):
    model, images = classifier(architecture), random_images()
    outputs = model(images, output_attentions=True)
    gradients = torch.autograd.grad(outputs.logits[:, 3].sum(), outputs.attentions)
    first, second = ((w * g).relu().mean(dim=1) for w, g in zip(outputs.attentions, gradients))
    identity = torch.eye(first.shape[-1])
    joint = (identity + second) @ (identity + first)
    prefix = model.config.num_prefix_tokens
    rows = joint[:, :prefix, prefix:].mean(dim=1)
    expected = rows / rows.sum(dim=1, keepdim=True)
    found = gradient_rollout(model, images, torch.tensor([3, 3]))
    torch.testing.assert_close(found.flatten(1), expected)
    assert not torch.allclose(found, gradient_rollout(model, images, torch.tensor([1, 1])))


@pytest.mark.parametrize("size", [(32, 32), (40, 36)])
def test_gradient_attention_is_what_autograd_says(architecture, size):
    model, images = classifier(architecture), random_images(2, *size)
    model.requires_grad_(False)
    outputs = model(images.requires_grad_(), output_attentions=True)
    chosen = outputs.logits.argmax(dim=-1, keepdim=True)
    sources = [each if each._base is None else each._base for each in outputs.attentions]
    gradients = torch.autograd.grad(outputs.logits.gather(1, chosen).sum(), sources)
    blocks = [block for block, _ in iterate_attention(model, images)]
    for block, weights, gradient in zip(blocks, outputs.attentions, gradients):
        received = block.keys_to_map((weights * gradient.reshape(weights.shape)).relu().sum(dim=2)).mean(dim=1)
        expected = received / received.sum(dim=(1, 2), keepdim=True)
        found = gradient_attention(model, images, block.layer)
        assert found.shape[1:] == block.grid
        torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("passes", [iterate_attention, partial(iterate_gradients, classes=None), attention_map])
def test_the_weights_of_one_block_at_a_time_are_there(architecture, passes):
    model, kept, most = classifier(architecture), [], []
    attend = Attention.attend

    def watch(self, *args, **kwargs):
        most.append(sum(reference() is not None for reference in kept))
        attended, weights = attend(self, *args, **kwargs)
        if weights is not None:
            kept.append(weakref.ref(weights))
        return attended, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "attend", watch)
        if passes is attention_map:
            attention_map(model, random_images(), -1)
        else:
            for _, weights, *rest in passes(model, random_images()):
                del weights, rest
    assert len(kept) == model.config.num_hidden_layers
    assert max(most) == 0


def test_without_a_class_token_to_read_attention_is_that_of_the_patches():
    model, images = classifier("vit", pooling="mean", num_register_tokens=2), random_images()
    weights = model(images, output_attentions=True).attentions[-1]
    found = attention_map(model, images, -1)
    torch.testing.assert_close(found.flatten(2), weights[:, :, 3:, 3:].mean(dim=2))


@pytest.mark.parametrize(("ratio", "grid"), [(8, (42, 28)), (4, (10, 9)), (2, (3, 4))])
def test_reduced_keys_belong_to_the_patches_that_made_them(ratio, grid):
    keys = torch.rand(2, 3, -(-grid[0] // ratio), -(-grid[1] // ratio))
    spread_out = spread(keys, ratio, grid)
    assert spread_out.shape[2:] == grid
    for row in range(grid[0]):
        for column in range(grid[1]):
            torch.testing.assert_close(spread_out[:, :, row, column], keys[:, :, row // ratio, column // ratio])


def test_a_patch_that_reaches_beyond_the_image_keeps_its_place(architecture):
    model, size = classifier(architecture), (40, 36)
    for grid in model.model.feature_grids(size):
        stride = 32 // model.model.feature_grids((32, 32))[model.model.feature_grids(size).index(grid)][0]
        maps = torch.rand(2, *grid)
        pixels = to_pixels(model, maps, size, is_smooth=False)
        assert pixels.shape == (2, *size)
        for row, column in ((0, 0), (39, 35), (stride - 1, stride), (17, 33)):
            torch.testing.assert_close(pixels[:, row, column], maps[:, row // stride, column // stride])
        assert to_pixels(model, maps, size).shape == (2, *size)


@pytest.mark.parametrize("architecture", ["pvt", "swin"])
@pytest.mark.parametrize("rollout", [attention_rollout, gradient_rollout])
def test_rollout_of_a_pyramid_points_to_what_serves_it(architecture, rollout):
    with pytest.raises(ValueError, match=r"needs a single stage of global attention, not 2 .*: use grad_cam or "):
        rollout(classifier(architecture), random_images())


# --------------------------------------------------------------------------------------------------------- predictions


def planted_model():
    """A classifier whose only evidence for class 0 is how bright the red of a patch is, each patch for itself."""
    config = tiny_config("vit", pooling="mean", use_class_token=False, norm_after_pooling=True, num_labels=2)
    model = ViTCustomForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.stages[0].embedding.projection.weight[0, 0] = 1 / 64
        model.model.stages[0].embedding.projection.bias[1] = 1.0  # so that the norm has something to compare with
        model.model.pooling.norm.weight.fill_(1.0)
        model.head.classifier.weight[0, 0] = 4.0
    return model


def planted_images():
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0, 8:16, 24:32] = 3.0
    images[1, 0, 24:32, 0:8] = 3.0
    images[1, 0, 0:8, 0:8] = 1.5
    return images


def test_grad_cam_finds_what_was_planted():
    maps, logits = grad_cam(planted_model(), planted_images())
    expected = torch.zeros(2, 4, 4)
    expected[0, 1, 3], expected[1, 3, 0], expected[1, 0, 0] = 1, 1, 0.5
    # A little is in every patch: the norm's other feature.
    assert (maps - expected).abs().max() < 0.35
    assert maps.flatten(1).argmax(dim=1).tolist() == [7, 12]
    assert logits.shape == (2, 2)


def test_grad_cam_is_its_definition(architecture):
    model, images = classifier(architecture), random_images()
    classes = torch.tensor([1, 4])
    maps, _ = grad_cam(model, images, classes)
    outputs = model(images, output_hidden_states=True)
    tokens = outputs.hidden_states[-1 if architecture == "swin" else -2]
    (gradients,) = torch.autograd.grad(outputs.logits[[0, 1], classes].sum(), tokens)
    prefix = model.config.num_prefix_tokens
    expected = torch.einsum("bnd,bd->bn", tokens[:, prefix:], gradients[:, prefix:].mean(dim=1)).relu()
    expected = expected / expected.amax(dim=1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(maps.flatten(1), expected.detach())
    assert maps.shape[1:] == model.model.feature_grids((32, 32))[-1]


def test_grad_cam_needs_a_block_that_reads_the_patches():
    with pytest.raises(ValueError, match="the last stage needs two blocks"):
        grad_cam(classifier("vit", num_hidden_layers=1), random_images())


def test_a_better_map_has_a_better_score():
    model, images = planted_model(), planted_images()
    maps, _ = grad_cam(model, images)
    right, wrong = score_map(model, images, maps), score_map(model, images, -maps)
    assert (right.insertion > wrong.insertion).all()
    assert (right.deletion < wrong.deletion).all()


def test_scores_of_a_prediction_that_nothing_changes():
    model, images = planted_model(), torch.zeros(2, 3, 32, 32)
    scores = score_map(model, images, torch.rand(2, 4, 4))
    expected = model(images).logits.softmax(dim=-1).amax(dim=1)
    torch.testing.assert_close(scores.insertion, expected.detach())
    torch.testing.assert_close(scores.deletion, expected.detach())


# ------------------------------------------------------------------------------------------------------------- features


def test_colours_are_principal_components(architecture):
    model, images = classifier(architecture), random_images(3)
    colors = feature_colors(model, images)
    grid = model.model.feature_grids((32, 32))[-1]
    assert colors.shape == (3, *grid, 3)
    assert colors.min() >= 0 and colors.max() <= 1
    features = model.model(images).last_hidden_state[:, model.config.num_prefix_tokens :].flatten(0, 1)
    expected = PCA(3, svd_solver="full").fit_transform(features.detach().numpy())
    for channel in range(3):
        inside = (colors[..., channel] > 0) & (colors[..., channel] < 1)
        found = colors[..., channel][inside].numpy()
        correlation = np.corrcoef(found, expected[:, channel][inside.flatten().numpy()])[0, 1]
        assert abs(correlation) > 0.999
    torch.testing.assert_close(feature_colors(model, images), colors)


def test_features_of_images_are_pooled(architecture):
    model, images = classifier(architecture), random_images(3)
    expected = model.model(images).pooler_output
    torch.testing.assert_close(image_features(model, images.split(2)), expected.detach())


def test_the_nearest_images_are_those_of_the_smallest_angle():
    features = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 3.0], [-1.0, 0.0]])
    indices, similarities = nearest_images(torch.tensor([[2.0, 0.1]]), features, 2)
    assert indices.tolist() == [[0, 2]]
    torch.testing.assert_close(similarities[0, 0], torch.tensor(2 / math.hypot(2, 0.1)))
    assert nearest_images(features, features, 9)[0].shape == (4, 4)


def test_probabilities_of_several_labels_are_each_its_own():
    model, images = classifier("vit"), random_images()
    logits = model(images).logits
    several = classifier("vit", problem_type="multi_label_classification")
    torch.testing.assert_close(predict_at_sizes(several, images, [32])[32], logits.sigmoid())
    torch.testing.assert_close(to_probabilities(logits, model.config), logits.softmax(dim=-1))
    torch.testing.assert_close(to_probabilities(logits, classifier("vit", num_labels=1).config), logits.sigmoid())
    measured = classifier("vit", num_labels=1, problem_type="regression").config
    assert torch.equal(to_probabilities(logits[:, :1], measured), logits[:, :1])
    # With every patch there, an insertion ends at the probability itself.
    scores = score_map(several, images, torch.rand(2, *several.model.feature_grids((32, 32))[0]), steps=1)
    blurred = F.interpolate(F.adaptive_avg_pool2d(images, 4), (32, 32), mode="bilinear")
    ends = torch.stack([several(each).logits.sigmoid() for each in (blurred, images)], dim=1)
    chosen = logits.argmax(dim=-1)
    expected = ends[torch.arange(2), :, chosen].mean(dim=1)
    torch.testing.assert_close(scores.insertion, expected)


def test_predictions_at_the_native_size_are_the_models():
    model, images = classifier("vit"), random_images()
    found = predict_at_sizes(model, images, [24, 32, 48])
    assert list(found) == [24, 32, 48]
    torch.testing.assert_close(found[32], model(images).logits.softmax(dim=-1), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found[48], found[32])


def test_windows_are_split_and_merged_again():
    modules = tiny_model(ViTCustomModel, "swin").modules()
    windows = [module for module in modules if isinstance(module, WindowAttention)]
    assert {module.shifted for module in windows} == {False, True}
    for attention in windows:
        for grid in ((16, 16), (10, 9), (3, 4)):
            image = torch.randn(2, 3, *grid)
            split = split_windows(image, attention)
            assert split.shape[2] == attention.window_size**2
            torch.testing.assert_close(merge_windows(split, attention, grid), image)
