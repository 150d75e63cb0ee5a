"""The models: parts against closed forms, options, initialisation, heads, and what the library does with them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    ARCHITECTURES,
    HEADS_AND_ARCHITECTURES,
    ONE_STAGE_ARCHITECTURES,
    main_output,
    random_images,
    scramble,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers import AutoModelForImageClassification, UperNetConfig, UperNetForSemanticSegmentation

from modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
    preset_config,
)
from modeling_vit_custom.modeling_vit_custom import (
    DropPath,
    PatchDropout,
    PatchMerging,
    gather_tokens,
    patchify,
    sincos2d_positions,
)


each_head = pytest.mark.parametrize(
    ("head", "name"), HEADS_AND_ARCHITECTURES, ids=lambda value: getattr(value, "__name__", value)
)


# ------------------------------------------------------------------------------------------------ a second encoder


def layer_norm(state: dict, name: str, tokens: torch.Tensor, eps: float) -> torch.Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[name + ".weight"] + state[name + ".bias"]


def dense(state: dict, name: str, tokens: torch.Tensor) -> torch.Tensor:
    return tokens @ state[name + ".weight"].T + state.get(name + ".bias", torch.zeros(()))


def plain_vit_logits(model, image: torch.Tensor) -> torch.Tensor:
    """Logits of one image by the equations of the papers, head by head, for a single stage of global attention."""
    config, state = model.config, model.state_dict()
    side, heads, eps = config.patch_size, config.num_attention_heads, config.layer_norm_eps
    stage, width = "model.stages.0.", config.hidden_size // config.num_attention_heads
    kernel = state[stage + "embedding.projection.weight"]
    patches = [
        (kernel * image[None, :, row : row + side, column : column + side]).sum(dim=(1, 2, 3))
        for row in range(0, image.shape[1], side)
        for column in range(0, image.shape[2], side)
    ]
    tokens = torch.stack(patches) + state[stage + "embedding.projection.bias"]
    tokens = tokens + state[stage + "position_embedding.weight"][0]
    prefix = [f"{stage}prefix_tokens.{name}" for name in ("class_token", "distillation_token", "register_tokens")]
    tokens = torch.cat([*(state[name][0] for name in prefix if name in state), tokens])
    for index in range(config.num_hidden_layers):
        block = f"{stage}blocks.{index}."
        normed = layer_norm(state, block + "attention_norm", tokens, eps)
        qkv = dense(state, block + "attention.qkv", normed)
        outputs = []
        for head in range(heads):
            query, key, value = (qkv[:, part * config.hidden_size + head * width :][:, :width] for part in range(3))
            if config.qk_norm:
                query = layer_norm(state, block + "attention.query_norm", query, eps)
                key = layer_norm(state, block + "attention.key_norm", key, eps)
            scores = (query @ key.T) / math.sqrt(width)
            outputs.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ value)
        attended = dense(state, block + "attention.projection", torch.cat(outputs, dim=-1))
        tokens = tokens + attended * state.get(block + "attention_scale.weight", torch.ones(()))
        hidden = dense(state, block + "mlp.fc1", layer_norm(state, block + "mlp_norm", tokens, eps))
        if config.hidden_act == "gelu":
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        else:
            hidden = hidden * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        tokens = tokens + dense(state, block + "mlp.fc2", hidden) * state.get(
            block + "mlp_scale.weight", torch.ones(())
        )
    if not config.norm_after_pooling:
        tokens = layer_norm(state, "model.norm", tokens, eps)
    pooled = tokens[0] if config.pooling == "cls" else tokens[config.num_prefix_tokens :].mean(0)
    if config.norm_after_pooling:
        pooled = layer_norm(state, "model.pooling.norm", pooled, eps)
    if config.head_batch_norm:
        variance = state["head.batch_norm.running_var"]
        pooled = (pooled - state["head.batch_norm.running_mean"]) / (variance + 1e-6).sqrt()
    logits = dense(state, "head.classifier", pooled)
    if config.use_distillation_token:
        logits = (logits + dense(state, "head.distillation_classifier", tokens[1])) / 2
    return logits


@pytest.mark.parametrize("name", ONE_STAGE_ARCHITECTURES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pooling": "mean", "num_register_tokens": 3},
        {"qk_norm": True, "layer_scale_init_value": 0.1, "layer_norm_eps": 0.01},
        {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False, "position_embedding_type": "sincos2d"},
    ],
    ids=["plain", "mean-registers", "qk-norm-scale-eps", "tanh-sincos"],
)
def test_global_encoder_follows_the_equations(name, fields):
    model = tiny_model(ViTCustomForImageClassification, name, **fields).double()
    image = random_images(1).double()
    expected = plain_vit_logits(model, image[0])
    torch.testing.assert_close(model(image).logits[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_norms_around_the_pooling_follow_the_equations(pooling):
    fields = {"pooling": pooling, "norm_after_pooling": True, "head_batch_norm": True, "layer_norm_eps": 0.01}
    model = tiny_model(ViTCustomForImageClassification, "vit", num_register_tokens=3, **fields).double()
    model.train()(random_images(8).double())
    image = random_images(1, seed=3).double()
    expected = plain_vit_logits(model.eval(), image[0])
    torch.testing.assert_close(model(image).logits[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eps", ["layer_norm_eps", "patch_norm_eps", "sr_norm_eps"])
def test_each_part_has_its_own_eps(eps):
    images = random_images()
    default = tiny_model(ViTCustomModel, "pvt")(images).last_hidden_state
    changed = tiny_model(ViTCustomModel, "pvt", **{eps: 0.5})
    assert not torch.allclose(changed(images).last_hidden_state, default, atol=1e-4)
    norms = {name: module.eps for name, module in changed.named_modules() if isinstance(module, nn.LayerNorm)}
    parts = {"patch_norm_eps": "embedding.norm", "sr_norm_eps": "reduction_norm"}
    for name, value in norms.items():
        owner = next((field for field, part in parts.items() if name.endswith(part)), "layer_norm_eps")
        assert (value == 0.5) == (owner == eps)


def test_sincos_positions_by_hand():
    table = sincos2d_positions((2, 3), 8)[0]
    for row in range(2):
        for column in range(3):
            expected = [
                *(math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)),
                *(math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)),
            ]
            torch.testing.assert_close(table[3 * row + column], torch.tensor(expected))


def test_fixed_positions_are_no_weights_to_train(architecture):
    model = ViTCustomModel(tiny_config(architecture, position_embedding_type="sincos2d"))
    for stage, resolved in zip(model.stages, model.config.stages):
        assert not stage.position_embedding.weight.requires_grad
        expected = sincos2d_positions(resolved.grid_size, resolved.hidden_size)
        torch.testing.assert_close(stage.position_embedding.weight, expected)


def test_without_positions_patches_have_no_order():
    model = tiny_model(ViTCustomForImageClassification, "vit", position_embedding_type="none")
    image = random_images(1)
    swapped = image.clone()
    swapped[..., :8, :8], swapped[..., 24:, 24:] = image[..., 24:, 24:], image[..., :8, :8]
    torch.testing.assert_close(model(swapped).logits, model(image).logits, rtol=0, atol=1e-5)
    ordered = tiny_model(ViTCustomForImageClassification, "vit")
    assert not torch.allclose(ordered(swapped).logits, ordered(image).logits, atol=1e-3)


def test_patch_merging_by_hand():
    model = tiny_model(ViTCustomModel, "swin")
    merging = model.stages[1].embedding
    assert isinstance(merging, PatchMerging)
    image = random_images(1, 4, 6, channels=16)
    merged = merging(image)
    for row in range(2):
        for column in range(3):
            # The order of the authors' code: top left, bottom left, top right, bottom right.
            corners = [image[0, :, 2 * row + down, 2 * column + right] for right in (0, 1) for down in (0, 1)]
            expected = merging.projection(merging.norm(torch.cat(corners)))
            torch.testing.assert_close(merged[0, 3 * row + column], expected)


# --------------------------------------------------------------------------------------------------------- options


def test_distilled_model_returns_both_heads_and_their_mean():
    model = tiny_model(ViTCustomForImageClassification, "deit")
    outputs = model(random_images(), output_hidden_states=True)
    tokens = model.model.norm(outputs.hidden_states[-1])
    torch.testing.assert_close(outputs.cls_logits, model.head.classifier(tokens[:, 0]))
    torch.testing.assert_close(outputs.distillation_logits, model.head.distillation_classifier(tokens[:, 1]))
    torch.testing.assert_close(outputs.logits, (outputs.cls_logits + outputs.distillation_logits) / 2)
    assert not torch.allclose(outputs.cls_logits, outputs.distillation_logits, atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "pvt", "swin"])
def test_models_without_distillation_return_one_head(name):
    outputs = tiny_model(ViTCustomForImageClassification, name)(random_images())
    assert list(outputs.keys()) == ["logits"]


@pytest.mark.parametrize("name", ["vit", "deit", "pvt"])
def test_mean_pooling_leaves_prefix_tokens_out(name):
    model = tiny_model(ViTCustomModel, name, pooling="mean", num_register_tokens=2)
    outputs = model(random_images())
    num_patches = math.prod(model.config.stages[-1].grid_size)
    assert outputs.last_hidden_state.shape[1] == num_patches + model.config.num_prefix_tokens
    expected = outputs.last_hidden_state[:, -num_patches:].sum(dim=1) / num_patches
    torch.testing.assert_close(outputs.pooler_output, expected)


@pytest.mark.parametrize(
    ("name", "pooling"), [("vit", "cls"), ("vit", "mean"), ("pvt", "cls"), ("pvt", "mean"), ("swin", "mean")]
)
def test_the_norm_is_before_or_after_the_pooling(name, pooling):
    before = tiny_model(ViTCustomModel, name, pooling=pooling)
    after = tiny_model(ViTCustomModel, name, pooling=pooling, norm_after_pooling=True)
    after.pooling.norm.load_state_dict(before.norm.state_dict())
    missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
    assert set(missing) == {"pooling.norm.weight", "pooling.norm.bias"}
    assert set(unexpected) == {"norm.weight", "norm.bias"}
    images = random_images()
    expected, outputs = before(images), after(images, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    torch.testing.assert_close(before.norm(outputs.last_hidden_state), expected.last_hidden_state)
    if pooling == "cls":  # a norm of each token by itself
        torch.testing.assert_close(outputs.pooler_output, expected.pooler_output)
    else:
        patches = outputs.last_hidden_state[:, after.config.num_prefix_tokens :]
        torch.testing.assert_close(outputs.pooler_output, before.norm(patches.mean(dim=1)))
        assert not torch.allclose(outputs.pooler_output, expected.pooler_output, atol=1e-2)


@pytest.mark.parametrize("name", ["vit", "pvt", "swin"])
def test_batch_norm_of_a_head_by_hand(name):
    model = tiny_model(ViTCustomForImageClassification, name, head_batch_norm=True)
    classifier, images = model.head.classifier, random_images(6)
    assert not list(model.head.batch_norm.parameters())
    with torch.no_grad():
        pooled = model.model(images).pooler_output
        centred = pooled - pooled.mean(dim=0)
        variance = centred.square().mean(dim=0)
        torch.testing.assert_close(model.train()(images).logits, classifier(centred / (variance + 1e-6).sqrt()))
        # The running variance is that of a sample, and starts from one as the mean does from zero.
        running_mean, running_variance = 0.1 * pooled.mean(dim=0), 0.9 + 0.1 * variance * 6 / 5
        expected = classifier((pooled - running_mean) / (running_variance + 1e-6).sqrt())
        torch.testing.assert_close(model.eval()(images).logits, expected)
        torch.testing.assert_close(model(images[:1]).logits, expected[:1])
        # The last batch of an epoch may hold a single image, which has no deviation.
        torch.testing.assert_close(model.train()(images[:1]).logits, expected[:1])
        assert model.head.batch_norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["vit", "deit", "pvt"])
def test_class_token_comes_first_and_registers_matter(name):
    model = tiny_model(ViTCustomModel, name, num_register_tokens=2)
    images = random_images()
    outputs = model(images)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 0])
    with torch.no_grad():
        model.stages[-1].prefix_tokens.register_tokens *= -5
    assert not torch.allclose(model(images).pooler_output, outputs.pooler_output, atol=1e-3)


def test_registers_alone_go_with_mean_pooling():
    model = tiny_model(ViTCustomModel, "vit", use_class_token=False, pooling="mean", num_register_tokens=4)
    assert model(random_images()).last_hidden_state.shape == (2, 4 + 16, 32)


def test_layer_scale_of_zero_leaves_the_embedding(architecture):
    model = tiny_model(ViTCustomModel, architecture, layer_scale_init_value=1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_scale.weight" in name:
                parameter.zero_()
    hidden_states = model(random_images(), output_hidden_states=True).hidden_states
    depth = model.config.stages[0].depth
    assert all(torch.equal(states, hidden_states[0]) for states in hidden_states[: depth + 1])


def test_layer_scale_starts_from_its_value(architecture):
    model = ViTCustomModel(tiny_config(architecture, layer_scale_init_value=1e-3))
    scales = [parameter for name, parameter in model.named_parameters() if "_scale.weight" in name]
    assert len(scales) == 2 * model.config.num_hidden_layers
    assert all((scale == 1e-3).all() for scale in scales)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries(architecture):
    model = tiny_model(ViTCustomForImageClassification, architecture, qk_norm=True, qkv_bias=False)
    images = random_images()
    before = model(images).logits
    with torch.no_grad():
        for block in (block for stage in model.model.stages for block in stage.blocks):
            attention = block.attention
            if hasattr(attention, "query"):
                attention.query.weight *= 100
            else:
                attention.qkv.weight[: attention.qkv.in_features] *= 100
    torch.testing.assert_close(model(images).logits, before, rtol=1e-3, atol=1e-3)


def apply_drop_path(drop_path: DropPath, branch: torch.Tensor) -> torch.Tensor:
    zeros = torch.zeros_like(branch)
    rows = drop_path.choose(zeros)
    return drop_path.add(zeros, branch if rows is None else branch[rows], rows)


def test_drop_path_drops_a_fixed_share_and_keeps_the_mean():
    drop_path, ones = DropPath(0.25).train(), torch.ones(32, 3, 2)
    results = torch.stack([apply_drop_path(drop_path, ones) for _ in range(2000)])
    kept = results[:, :, 0, 0] > 0
    assert torch.equal(results, (kept * 32 / 24)[..., None, None].expand_as(results))
    assert (kept.sum(dim=1) == 24).all()
    torch.testing.assert_close(kept.float().mean(dim=0), torch.full((32,), 0.75), rtol=0, atol=0.05)
    assert torch.equal(apply_drop_path(drop_path.eval(), ones), ones)
    assert torch.equal(apply_drop_path(DropPath(0.0).train(), ones), ones)


@pytest.mark.parametrize("rate", [0.4, 0.9])
def test_drop_path_is_right_on_average_where_the_share_is_no_whole_images(rate):
    drop_path, ones = DropPath(rate).train(), torch.ones(4, 3, 2)
    results = torch.stack([apply_drop_path(drop_path, ones) for _ in range(5000)])
    kept = results[:, :, 0, 0] > 0
    torch.testing.assert_close(results, (kept / (1 - rate))[..., None, None].expand_as(results))
    torch.testing.assert_close(kept.float().mean(dim=0), torch.full((4,), 1 - rate), rtol=0, atol=0.03)
    # 2.4 and 0.4 images of four are kept.
    assert set(kept.sum(dim=1).tolist()) == {0.4: {2, 3}, 0.9: {0, 1}}[rate]


def test_drop_path_of_less_than_an_image_drops_one_by_one():
    drop_path, ones = DropPath(0.1).train(), torch.ones(4, 3, 2)
    results = torch.stack([apply_drop_path(drop_path, ones) for _ in range(5000)])
    kept = results[:, :, 0, 0] > 0
    torch.testing.assert_close(results, (kept / 0.9)[..., None, None].expand_as(results))
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.01)
    assert kept.sum(dim=1).unique().numel() > 2


def test_dropped_branches_are_not_computed(architecture):
    model = tiny_model(ViTCustomModel, architecture, drop_path_rate=0.5, drop_path_schedule="constant").train()
    sizes = []
    for module in model.modules():
        if type(module).__name__ in ("MLP", "GlobalAttention", "SpatialReductionAttention", "WindowAttention"):
            module.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    model(random_images(8))
    assert sizes == [4] * 2 * model.config.num_hidden_layers
    sizes.clear()
    attentions = model(random_images(8), output_attentions=True).attentions
    assert sizes == [8, 4] * model.config.num_hidden_layers
    assert all(weights.shape[0] % 8 == 0 for weights in attentions)


def test_drop_path_acts_on_both_branches(architecture):
    model = tiny_model(ViTCustomModel, architecture, drop_path_rate=0.5, drop_path_schedule="constant")
    block, images = model.stages[0].blocks[0], random_images(64)
    tokens, grid = model.stages[0].embed(images, model.feature_grids((32, 32))[0]), model.feature_grids((32, 32))[0]
    block.train()
    out = block(tokens, grid)[0]
    attended = 2 * block.attention(block.attention_norm(tokens), grid)[0]
    by_choice = []
    for attention_kept in (0, 1):
        middle = tokens + attention_kept * attended
        by_choice += [middle, middle + 2 * block.mlp(block.mlp_norm(middle))]
    distances = torch.stack([(out - choice).abs().amax(dim=(1, 2)) for choice in by_choice])
    assert (distances.amin(0) < 1e-3).all()
    counts = distances.argmin(0).bincount(minlength=4)
    assert (counts > 4).all()  # 16 expected of each


@pytest.mark.parametrize("name", ONE_STAGE_ARCHITECTURES)
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_patch_dropout_keeps_the_prefix_and_the_right_number(name, rate):
    model = tiny_model(ViTCustomModel, name, patch_dropout=rate, num_register_tokens=1)
    images, prefix = random_images(4), model.config.num_prefix_tokens
    whole = model(images, output_hidden_states=True).hidden_states[0]
    assert whole.shape[1] == prefix + 16
    kept = model.train()(images, output_hidden_states=True).hidden_states[0]
    assert kept.shape[1] == prefix + max(1, int(16 * (1 - rate)))
    assert torch.equal(kept[:, :prefix], whole[:, :prefix])
    # What is left are patches with their own positions, each image's own choice, none twice.
    matches = torch.cdist(kept[:, prefix:], whole[:, prefix:], compute_mode="donot_use_mm_for_euclid_dist") < 1e-5
    assert (matches.sum(dim=2) == 1).all()
    assert matches.sum(dim=1).max() == 1
    assert not (matches.any(dim=1) == matches.any(dim=1)[0]).all()


@pytest.mark.parametrize("size", [(32, 32), (29, 43)])
@pytest.mark.parametrize("position_embedding_type", ["learned", "sincos2d", "none"])
def test_patches_that_are_kept_are_as_if_all_were(size, position_embedding_type):
    model = tiny_model(ViTCustomModel, "vit", position_embedding_type=position_embedding_type)
    images, (rows, columns) = random_images(3, *size), model.feature_grids(size)[0]
    noise = torch.rand(3, rows * columns, generator=torch.Generator().manual_seed(0))
    ids_keep = noise.argsort(dim=1)[:, :5]
    whole = model(images, output_hidden_states=True).hidden_states[0]
    kept = model(images, ids_keep=ids_keep, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(kept[:, :1], whole[:, :1], rtol=0, atol=0)
    torch.testing.assert_close(kept[:, 1:], gather_tokens(whole[:, 1:], ids_keep), rtol=1e-5, atol=1e-5)


def test_kept_patches_can_be_masked():
    model = ViTCustomModel(tiny_config("vit"), use_mask_token=True)
    images, ids_keep = random_images(), torch.tensor([[3, 9, 0], [15, 2, 7]])
    mask = torch.arange(16).expand(2, -1) % 3 == 0
    with torch.no_grad():
        whole = model(images, bool_masked_pos=mask, output_hidden_states=True).hidden_states[0]
        kept = model(images, bool_masked_pos=mask, ids_keep=ids_keep, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(kept[:, 1:], gather_tokens(whole[:, 1:], ids_keep), rtol=1e-5, atol=1e-6)


def test_patch_dropout_is_even():
    kept = PatchDropout(0.5).train().choose(4000, 8, torch.device("cpu"))
    assert kept.shape == (4000, 4)
    share = kept.flatten().bincount(minlength=8) / 4000
    assert share.tolist() == pytest.approx([0.5] * 8, abs=0.05)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropouts_act_in_training_only(architecture, field, implementation):
    images = random_images()
    model = tiny_model(ViTCustomModel, architecture, attn_implementation=implementation, **{field: 0.5})
    torch.testing.assert_close(model(images)[0], model(images)[0], rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(images)[0], model(images)[0], atol=1e-3)


# -------------------------------------------------------------------------------------------------- initialisation


def test_initialisation_is_a_truncated_normal(architecture):
    model = ViTCustomForImageClassification(tiny_config(architecture, hidden_size=None, initializer_range=0.02))
    pools = {"dense": [], "convolution": [], "other": []}
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Linear):
            pools["dense"].append(module.weight.flatten())
            assert module.bias is None or (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d):
            pools["convolution"].append(module.weight.flatten())
            assert (module.bias == 0).all()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("position_embedding", "prefix_tokens", "bias_table")):
            pools["other"].append(parameter.flatten())
            assert (parameter != 0).all()
    for values in pools.values():
        assert torch.cat(values).std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(torch.cat(values).mean().item()) < 0.002


@pytest.mark.parametrize(("name", "preset"), [("vit", "vit_nano_patch4_32"), ("deit", "deit_nano_distilled_patch4_32")])
def test_tokens_start_from_small_random_values(name, preset):
    prefix_tokens = ViTCustomModel(preset_config(preset)).stages[0].prefix_tokens
    for _, token in prefix_tokens.named_parameters():
        assert token.std().item() == pytest.approx(0.02, rel=0.2)


def test_mask_tokens_start_from_small_random_values():
    encoder = ViTCustomForMaskedImageModeling(preset_config("swin_nano_patch2_window4_32"))
    decoder = ViTCustomForPreTraining(preset_config("vit_nano_patch4_32"))
    for token in (encoder.model.stages[0].mask_token, decoder.decoder.mask_token):
        assert token.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_heads_start_as_configured(architecture):
    config = tiny_config(architecture, head_initializer_range=0.0, head_bias_init=-1.5)
    assert (ViTCustomForImageClassification(config)(random_images()).logits == -1.5).all()
    wide = ViTCustomForImageClassification(tiny_config(architecture, head_initializer_range=0.3, num_labels=100))
    assert wide.head.classifier.weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert (wide.head.classifier.bias == 0).all()


def test_initializer_range_is_followed():
    model = ViTCustomForImageClassification(tiny_config("vit", initializer_range=0.1))
    assert model.model.stages[0].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.1, rel=0.1)


# ---------------------------------------------------------------------------------------------- saving and loading


def same_state(model, other) -> bool:
    state, other_state = model.state_dict(), other.state_dict()
    buffers, other_buffers = dict(model.named_buffers()), dict(other.named_buffers())
    return (
        state.keys() == other_state.keys()
        and buffers.keys() == other_buffers.keys()
        and all(torch.equal(value, other_state[name]) for name, value in state.items())
        and all(torch.equal(value, other_buffers[name]) for name, value in buffers.items())
    )


@each_head
def test_save_and_load_is_bit_exact(head, name, tmp_path):
    model, images = tiny_model(head, name), random_images()
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same_state(model, loaded)
    assert not loaded.training
    torch.manual_seed(0)
    expected = main_output(model, images)
    torch.manual_seed(0)
    assert torch.equal(main_output(loaded, images), expected)


@each_head
def test_missing_weights_start_as_from_scratch(head, name):
    config = tiny_config(name, layer_scale_init_value=0.1, num_register_tokens=0 if name == "swin" else 2)
    torch.manual_seed(3)
    scratch = head(config)
    torch.manual_seed(3)
    loaded = head.from_pretrained(None, config=config, state_dict={})
    assert loaded.state_dict().keys() == scratch.state_dict().keys()
    for key, value in scratch.state_dict().items():
        other = loaded.state_dict()[key]
        assert other.device.type == "cpu"
        # The same distribution: constants are the same, and so is the spread of what is random.
        torch.testing.assert_close(
            other.mean(), value.mean(), rtol=0, atol=6 * value.std().item() / value.numel() ** 0.5
        )
        if value.numel() > 1:
            assert other.std().item() == pytest.approx(value.std().item(), rel=4 / value.numel() ** 0.5)
    for key, value in scratch.named_buffers():
        assert torch.equal(dict(loaded.named_buffers())[key], value)


def test_another_number_of_labels_starts_a_new_head(architecture, tmp_path):
    model = tiny_model(ViTCustomForImageClassification, architecture)
    model.save_pretrained(tmp_path)
    loaded = ViTCustomForImageClassification.from_pretrained(tmp_path, num_labels=50, ignore_mismatched_sizes=True)
    assert loaded(random_images()).logits.shape == (2, 50)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert loaded.head.classifier.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert (loaded.head.classifier.bias == 0).all()
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        ViTCustomForImageClassification.from_pretrained(tmp_path, num_labels=50)


def test_a_head_takes_the_encoder_of_another(architecture, tmp_path):
    pretrained = tiny_model(ViTCustomForMaskedImageModeling, architecture)
    pretrained.save_pretrained(tmp_path)
    model, info = ViTCustomForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"head"}
    assert {key.split(".")[0] for key in info["unexpected_keys"]} - {"model"} == {"decoder"}
    images = random_images()
    encoder = ViTCustomModel.from_pretrained(tmp_path)
    torch.testing.assert_close(model.model(images)[0], pretrained.model(images)[0], rtol=0, atol=0)
    torch.testing.assert_close(encoder(images)[0], pretrained.model(images)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit", "pvt", "swin"])
def test_a_norm_after_pooling_starts_anew(name, tmp_path):
    pretrained = tiny_model(ViTCustomForMaskedImageModeling, name)
    pretrained.save_pretrained(tmp_path / "pretrained")
    model, info = ViTCustomForImageClassification.from_pretrained(
        tmp_path / "pretrained", pooling="mean", norm_after_pooling=True, output_loading_info=True
    )
    norm, head = {"model.pooling.norm.weight", "model.pooling.norm.bias"}, {"head.classifier.weight"}
    assert set(info["missing_keys"]) == norm | head | {"head.classifier.bias"}
    assert {"model.norm.weight", "model.norm.bias"} < set(info["unexpected_keys"])
    assert (model.model.pooling.norm.weight == 1).all()
    assert (model.model.pooling.norm.bias == 0).all()
    images = random_images()
    expected = pretrained.model(images, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model.model(images).last_hidden_state, expected)

    scramble(model).save_pretrained(tmp_path / "tuned")
    loaded, info = ViTCustomForImageClassification.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.norm_after_pooling
    assert same_state(loaded, model)
    assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize("head", [ViTCustomForImageClassification, ViTCustomForMaskedImageModeling])
def test_a_batch_norm_starts_anew_and_comes_back(head, tmp_path):
    tiny_model(head, "vit").save_pretrained(tmp_path / "pretrained")
    model, info = ViTCustomForImageClassification.from_pretrained(
        tmp_path / "pretrained", head_batch_norm=True, output_loading_info=True
    )
    buffers = {f"head.batch_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert buffers <= set(info["missing_keys"])
    fresh = nn.BatchNorm1d(32, eps=1e-6, affine=False)
    for name, buffer in fresh.named_buffers():
        found = getattr(model.head.batch_norm, name)
        assert found.device.type == "cpu" and found.dtype == buffer.dtype
        assert torch.equal(found, buffer)

    model.train()(random_images(4))
    assert not torch.allclose(model.head.batch_norm.running_var, fresh.running_var)
    model.eval().save_pretrained(tmp_path / "probed")
    loaded, info = ViTCustomForImageClassification.from_pretrained(tmp_path / "probed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same_state(loaded, model)
    assert torch.equal(loaded(random_images()).logits, model(random_images()).logits)


def test_blocks_are_what_must_not_be_split(architecture):
    model = ViTCustomForImageClassification(tiny_config(architecture))
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(blocks) == model.config.num_hidden_layers


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    model = tiny_model(ViTCustomForImageClassification, "vit")
    with torch.no_grad():
        model.model.stages[0].blocks[1].mlp.fc1.weight[3, :2] = value
    model.save_pretrained(tmp_path)
    for load in (ViTCustomForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=r"model\.stages\.0\.blocks\.1\.mlp\.fc1\.weight holds 2 values") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


def test_positions_that_are_not_finite_are_refused(tmp_path):
    model = tiny_model(ViTCustomModel, "vit", position_embedding_type="sincos2d")
    model.stages[0].position_embedding.weight[0, 0, 0] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"stages\.0\.position_embedding\.weight holds 1 values"):
        ViTCustomModel.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------- the library


@each_head
def test_a_batch_is_the_same_as_its_images_alone(head, name):
    model, images = tiny_model(head, name), random_images(3)
    if head is ViTCustomForPreTraining:
        noise = torch.rand(3, 16)
        batch = model(images, noise=noise).logits
        singles = [model(images[i : i + 1], noise=noise[i : i + 1]).logits for i in range(3)]
    else:
        batch, singles = main_output(model, images), [main_output(model, images[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(batch, torch.cat(singles), rtol=1e-4, atol=1e-5)


@each_head
def test_tuples_hold_what_the_named_outputs_do(head, name):
    model, images = tiny_model(head, name), random_images()
    torch.manual_seed(0)
    outputs = model(images, output_hidden_states=True, output_attentions=True)
    torch.manual_seed(0)
    flat = model(images, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert isinstance(flat, tuple)
    for value, other in zip(outputs.to_tuple(), flat, strict=True):
        pairs = zip(value, other, strict=True) if isinstance(value, tuple) else [(value, other)]
        assert all(torch.equal(one, two) for one, two in pairs)
    keys = list(outputs.keys())
    assert keys[-2:] == ["hidden_states", "attentions"]


def test_hidden_states_are_the_outputs_of_the_blocks(architecture):
    model, captured = tiny_model(ViTCustomForImageClassification, architecture), []
    for block in (block for stage in model.model.stages for block in stage.blocks):
        block.register_forward_hook(lambda module, args, output: captured.append(output[0]))
    hidden_states = model(random_images(), output_hidden_states=True).hidden_states
    assert len(hidden_states) == len(captured) + 1
    assert all(torch.equal(one, two) for one, two in zip(hidden_states[1:], captured))
    assert model(random_images()).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(random_images()).hidden_states) == len(hidden_states)


@each_head
@pytest.mark.parametrize("use_reentrant", [True, False])
# Its new name is not there yet in the oldest version of the library that is supported.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(head, name, use_reentrant):
    def gradients(model):
        torch.manual_seed(5)
        images = random_images()
        if head is ViTCustomModel:
            loss = model(images).pooler_output.square().sum()
        elif head is ViTCustomBackbone:
            loss = model(images).feature_maps[0].square().sum()
        elif head is ViTCustomForImageClassification:
            loss = model(images, labels=torch.tensor([0, 3])).loss
        else:
            loss = model(images).loss
        loss.backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}

    model = tiny_model(head, name, hidden_dropout_prob=0.1, drop_path_rate=0.1).train()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    block = other.base_model.stages[-1].blocks[-1]
    block.mlp.register_forward_hook(lambda *args: calls.append(1))
    expected, found = gradients(model), gradients(other)
    assert len(calls) == 2  # once forward, once again for the gradients
    # A model as such ends at its pooling, so only what lies behind a pooled class token has a gradient there.
    for key, gradient in expected.items():
        assert gradient is not None and gradient.abs().sum() > 0, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_head
def test_half_precision(head, name, dtype):
    model, images = tiny_model(head, name), random_images()
    torch.manual_seed(0)
    expected = main_output(model, images)
    model.to(dtype)
    for pixels in (images, images.to(dtype)):
        torch.manual_seed(0)
        found = main_output(model, pixels)
        assert found.dtype == dtype
        error = (found.float() - expected).norm() / expected.norm()
        assert error < 0.05


@each_head
def test_autocast(head, name):
    model, images = tiny_model(head, name).train(), random_images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if head is ViTCustomForImageClassification:
            loss = model(images, labels=torch.tensor([0, 3])).loss
        elif head in (ViTCustomForPreTraining, ViTCustomForMaskedImageModeling):
            loss = model(images).loss
        else:
            loss = main_output(model, images).float().mean()
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@each_head
def test_compiles_in_one_graph(head, name):
    torch._dynamo.reset()
    model, images = tiny_model(head, name), random_images()
    torch.manual_seed(0)
    expected = main_output(model, images)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    torch.testing.assert_close(main_output(model, images), expected, rtol=1e-4, atol=1e-5)
    model.train()
    if head is ViTCustomForImageClassification:
        model(images, labels=torch.tensor([0, 3])).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_a_hidden_layer_before_the_classifier():
    """ViT as it is pretrained: tanh of a dense layer on the class token, then the logits."""
    model = tiny_model(ViTCustomForImageClassification, "vit", representation_size=16)
    pooled = model.model(random_images()).pooler_output
    weight, bias = model.head.representation.weight, model.head.representation.bias
    assert weight.shape == (16, 32)
    expected = (pooled @ weight.T + bias).tanh() @ model.head.classifier.weight.T + model.head.classifier.bias
    torch.testing.assert_close(model(random_images()).logits, expected)


def test_classifier_compiles_in_one_graph(architecture):
    torch._dynamo.reset()
    model, images = tiny_model(ViTCustomForImageClassification, architecture), random_images(height=24, width=40)
    labels = torch.tensor([0, 3])
    expected = model(images, labels=labels)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = compiled(images, labels=labels)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-4, atol=1e-5)


def test_norms_around_the_pooling_compile_and_export():
    torch._dynamo.reset()
    fields = {"pooling": "mean", "norm_after_pooling": True, "head_batch_norm": True}
    model, images = tiny_model(ViTCustomForImageClassification, "vit", **fields), random_images(4)
    model.train()(images)
    expected = model.eval()(images).logits
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images)[0], expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).logits, expected, rtol=1e-4, atol=1e-5)
    other, labels = copy.deepcopy(model), torch.tensor([0, 1, 2, 3])
    loss = compiled.train()(images, labels=labels).loss
    torch.testing.assert_close(other.train()(images, labels=labels).loss, loss)
    torch.testing.assert_close(other.head.batch_norm.running_var, model.head.batch_norm.running_var)


@pytest.mark.slow
def test_inductor_gives_the_same_logits(architecture):
    torch._dynamo.reset()
    model, images = tiny_model(ViTCustomForImageClassification, architecture), random_images()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [ViTCustomModel, ViTCustomForImageClassification])
def test_exports(head, architecture):
    model, images = tiny_model(head, architecture), random_images(height=24, width=40)
    program = torch.export.export(model, (images,))
    exported = program.module()(images)
    torch.testing.assert_close(exported[0], model(images)[0], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------- masked autoencoder


def numbered_patches(images: torch.Tensor, side: int) -> torch.Tensor:
    """(B, N, side * side * C) by two loops."""
    rows, columns = images.shape[2] // side, images.shape[3] // side
    patches = [
        images[:, :, r * side : (r + 1) * side, c * side : (c + 1) * side].permute(0, 2, 3, 1).flatten(1)
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(patches, dim=1)


def test_patchify_pads_at_the_bottom_and_right():
    images = random_images(2, 24, 40)
    assert torch.equal(patchify(images, 8), numbered_patches(images, 8))
    odd = random_images(2, 21, 34)
    padded = F.pad(odd, (0, 6, 0, 3))
    assert torch.equal(patchify(odd, 8), numbered_patches(padded, 8))


@pytest.mark.parametrize("name", ONE_STAGE_ARCHITECTURES)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_masked_autoencoder_loss(name, norm_pix_loss):
    model, images = tiny_model(ViTCustomForPreTraining, name, norm_pix_loss=norm_pix_loss), random_images(3)
    outputs = model(images)
    assert outputs.mask.shape == (3, 16)
    assert (outputs.mask.sum(dim=1) == 12).all()
    targets, total = numbered_patches(images, 8), 0.0
    for image in range(3):
        for patch in range(16):
            target = targets[image, patch]
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            if outputs.mask[image, patch]:
                total += (outputs.logits[image, patch] - target).square().mean() / 36
    torch.testing.assert_close(outputs.loss, total)


@pytest.mark.parametrize("name", ONE_STAGE_ARCHITECTURES)
def test_masked_autoencoder_sees_visible_patches_only(name):
    model, images, noise = tiny_model(ViTCustomForPreTraining, name), random_images(), torch.rand(2, 16)
    outputs = model(images, noise=noise, output_hidden_states=True)
    assert outputs.hidden_states[-1].shape[1] == 4 + model.config.num_prefix_tokens
    # The four patches with the lowest noise are the visible ones.
    expected = torch.ones(2, 16).scatter(1, noise.argsort(dim=1)[:, :4], 0.0)
    assert torch.equal(outputs.mask, expected)
    pixels = outputs.mask.reshape(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = model(torch.where(pixels.bool(), 100.0, images), noise=noise, output_hidden_states=True)
    assert all(torch.equal(one, two) for one, two in zip(outputs.hidden_states, other.hidden_states))
    assert torch.equal(outputs.logits, other.logits)
    seen = model(torch.where(pixels.bool(), images, 100.0), noise=noise)
    assert not torch.allclose(outputs.logits, seen.logits, atol=1e-2)


def test_masked_autoencoder_restores_the_order():
    """The same patches are shuffled in other ways; their place in the prediction does not change."""
    model, images = tiny_model(ViTCustomForPreTraining, "vit", mask_ratio=0.5), random_images()
    hidden = torch.rand(2, 16).argsort(dim=1) < 8
    one, two = (model(images, noise=torch.rand(2, 16) + hidden).logits for _ in range(2))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_masked_autoencoder_masks_at_random():
    model = tiny_model(ViTCustomForPreTraining, "vit", mask_ratio=0.5)
    with torch.no_grad():
        masks = torch.cat([model(random_images(100)).mask for _ in range(6)])
    assert (masks.sum(1) == 8).all()
    assert masks.mean(0).tolist() == pytest.approx([0.5] * 16, abs=0.1)


def test_masked_autoencoder_learns():
    """Constant images of two colours are predicted from a quarter of their patches."""
    model = ViTCustomForPreTraining(tiny_config("vit", initializer_range=0.1)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    colours = torch.tensor([-1.0, 1.0]).repeat(8)[:, None, None, None]
    images = colours.expand(-1, 3, 32, 32)
    losses = []
    for _ in range(40):
        loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---------------------------------------------------------------------------------------------- masked image modeling


def test_masked_image_modeling_loss(architecture):
    model, images = tiny_model(ViTCustomForMaskedImageModeling, architecture), random_images(3)
    side = model.config.stages[0].patch_size
    mask = torch.rand(3, 32 // side, 32 // side) < 0.5
    outputs = model(images, bool_masked_pos=mask)
    assert outputs.reconstruction.shape == images.shape
    total, count = 0.0, 0
    for image, row, column in mask.nonzero().tolist():
        here = (image, slice(None), slice(row * side, row * side + side), slice(column * side, column * side + side))
        total += (outputs.reconstruction[here] - images[here]).abs().sum()
        count += 3 * side * side
    torch.testing.assert_close(outputs.loss, total / count, rtol=1e-4, atol=1e-5)
    flat = model(images, bool_masked_pos=mask.flatten(1))
    assert torch.equal(flat.loss, outputs.loss)


def test_masked_pixels_are_hidden(architecture):
    model, images = tiny_model(ViTCustomForMaskedImageModeling, architecture), random_images()
    side = model.config.stages[0].patch_size
    mask = torch.rand(2, 32 // side, 32 // side) < 0.5
    pixels = mask[:, None].repeat_interleave(side, 2).repeat_interleave(side, 3)
    expected = model(images, bool_masked_pos=mask).reconstruction
    hidden = model(torch.where(pixels, 9.0, images), bool_masked_pos=mask).reconstruction
    assert torch.equal(hidden, expected)
    seen = model(torch.where(pixels, images, 9.0), bool_masked_pos=mask).reconstruction
    assert not torch.allclose(seen, expected, atol=1e-2)


@pytest.mark.parametrize(("ratio", "squares"), [(0.5, 8), (0.6, 10), (0.75, 12)])
def test_masked_image_modeling_hides_squares(architecture, ratio, squares):
    model = tiny_model(ViTCustomForMaskedImageModeling, architecture, mask_ratio=ratio)
    mask, side = model.make_mask(random_images(16)), model.config.stages[0].patch_size
    assert mask.shape == (16, 32 // side, 32 // side)
    scale = 8 // side
    by_square = mask.reshape(16, 4, scale, 4, scale).transpose(2, 3).flatten(3)
    assert (by_square.all(-1) == by_square.any(-1)).all()
    assert (by_square.all(-1).flatten(1).sum(1) == squares).all()
    assert not (mask == mask[0]).all()


def test_masked_image_modeling_needs_a_mask_that_fits(architecture):
    model = tiny_model(ViTCustomForMaskedImageModeling, architecture)
    with pytest.raises(ValueError, match=r"bool_masked_pos of shape \(2, 7\) must be"):
        model(random_images(), bool_masked_pos=torch.ones(2, 7))
    with pytest.raises(ValueError, match="use_mask_token=True"):
        tiny_model(ViTCustomModel, architecture)(random_images(), bool_masked_pos=torch.ones(2, 16))


def test_what_chooses_patches_must_fit_the_images():
    with pytest.raises(ValueError, match=r"noise of shape \(2, 12\) must be \(batch, patches\) = \(2, 16\)"):
        tiny_model(ViTCustomForPreTraining, "vit")(random_images(), noise=torch.rand(2, 12))
    with pytest.raises(ValueError, match=r"ids_keep of shape \(3, 4\) must be \(2, patches to keep\)"):
        tiny_model(ViTCustomModel, "vit")(random_images(), ids_keep=torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize("architecture", ["pvt", "swin"])
def test_patches_can_only_be_dropped_where_no_block_needs_a_grid(architecture):
    with pytest.raises(ValueError, match="ids_keep needs a single stage of global attention, not 2"):
        tiny_model(ViTCustomModel, architecture)(random_images(), ids_keep=torch.zeros(2, 3, dtype=torch.long))


def test_reconstruction_is_where_the_image_is(architecture):
    """Every pixel of the output depends on the patch of the last stage that it belongs to: the shuffle is right."""
    model = tiny_model(ViTCustomForMaskedImageModeling, architecture)
    stride = math.prod(stage.patch_size for stage in model.config.stages)
    captured = []
    model.decoder.register_forward_hook(lambda module, args, output: captured.append(args[0]))
    reconstruction = model(
        random_images(1), bool_masked_pos=torch.zeros(1, (32 // model.patch_size) ** 2)
    ).reconstruction
    feature_map = captured[0]
    weight, bias = model.decoder.weight[..., 0, 0], model.decoder.bias
    for channel, row, column in [(0, 0, 0), (1, 5, 30), (2, 31, 17)]:
        token = feature_map[0, :, row // stride, column // stride]
        index = channel * stride**2 + row % stride * stride + column % stride
        torch.testing.assert_close(reconstruction[0, channel, row, column], weight[index] @ token + bias[index])


# ---------------------------------------------------------------------------------------------------------- backbones

SHAPES = {
    "vit": {"stem": (32, 4), "stage1": (32, 4), "block1": (32, 4), "block2": (32, 4)},
    "deit": {"stem": (32, 4), "stage1": (32, 4), "block1": (32, 4), "block2": (32, 4)},
    "pvt": {
        "stem": (16, 8),
        "stage1": (16, 8),
        "stage2": (32, 4),
        "block1": (16, 8),
        "block2": (32, 4),
        "block3": (32, 4),
    },
    "swin": {
        "stem": (16, 16),
        "stage1": (16, 16),
        "stage2": (32, 8),
        "block1": (16, 16),
        "block2": (16, 16),
        "block3": (32, 8),
        "block4": (32, 8),
    },
}


def test_backbone_returns_any_stage_or_block(architecture):
    shapes = SHAPES[architecture]
    backbone = tiny_model(ViTCustomBackbone, architecture, out_features=list(shapes))
    outputs = backbone(random_images(2, 32, 64))
    assert backbone.channels == [width for width, _ in shapes.values()]
    for feature_map, (width, side) in zip(outputs.feature_maps, shapes.values(), strict=True):
        assert feature_map.shape == (2, width, side, 2 * side)
    assert outputs.hidden_states is None
    assert (
        len(backbone(random_images(), output_hidden_states=True).hidden_states) == backbone.config.num_hidden_layers + 1
    )


def test_backbone_maps_are_the_normed_hidden_states(architecture):
    names = list(SHAPES[architecture])
    backbone = tiny_model(ViTCustomBackbone, architecture, out_features=names)
    outputs = backbone(random_images(), output_hidden_states=True)
    ends = [sum(stage.depth for stage in backbone.config.stages[: i + 1]) for i in range(len(backbone.config.stages))]
    for name, feature_map in zip(names, outputs.feature_maps):
        number = 0 if name == "stem" else int(name[5:])
        layer = ends[number - 1] if name.startswith("stage") else number
        state = outputs.hidden_states[layer]
        norm = backbone.norms[name] if name in backbone.norms else backbone.model.norm
        tokens = norm(state)[:, state.shape[1] - feature_map[0, 0].numel() :]
        torch.testing.assert_close(feature_map.permute(0, 2, 3, 1).reshape(tokens.shape), tokens)
    assert set(backbone.norms) == {name for name in names if SHAPES[architecture][name][0] != 32}


@pytest.mark.parametrize("name", ["vit", "pvt", "swin"])
def test_every_map_has_a_norm_of_its_own_where_the_encoder_normalises_its_pooling(name):
    names = list(SHAPES[name])
    backbone = tiny_model(ViTCustomBackbone, name, out_features=names, norm_after_pooling=True)
    assert set(backbone.norms) == set(names)
    outputs = backbone(random_images(), output_hidden_states=True)
    tokens = outputs.hidden_states[-1][:, backbone.config.num_prefix_tokens :]
    last = f"stage{len(backbone.config.stages)}"
    found = outputs.feature_maps[names.index(last)].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, backbone.norms[last](tokens))


def test_last_map_is_the_last_hidden_state(architecture):
    backbone = tiny_model(ViTCustomBackbone, architecture)
    tokens = backbone.model(random_images()).last_hidden_state[:, backbone.config.num_prefix_tokens :]
    assert torch.equal(backbone(random_images()).feature_maps[0].flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("size", [(32, 32), (40, 72)])
def test_strides_make_a_pyramid(size):
    names = ["stem", "stage1", "block1", "block2"]
    backbone = tiny_model(ViTCustomBackbone, "vit", out_features=names, out_strides=[4, 8, 16, 32])
    maps = backbone(random_images(2, *size)).feature_maps
    for feature_map, stride in zip(maps, (4, 8, 16, 32), strict=True):
        assert feature_map.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
    plain = tiny_model(ViTCustomBackbone, "vit", out_features=names)
    plain_maps = plain(random_images(2, *size)).feature_maps
    assert torch.equal(maps[1], plain_maps[1])
    torch.testing.assert_close(
        maps[0], F.interpolate(plain_maps[0], size=maps[0].shape[2:], mode="bilinear", align_corners=False)
    )
    if size == (32, 32):
        torch.testing.assert_close(maps[2], F.avg_pool2d(plain_maps[2], 2))


def test_feature_maps_can_be_chosen_while_loading(architecture, tmp_path):
    backbone = tiny_model(ViTCustomBackbone, architecture)
    backbone.save_pretrained(tmp_path)
    loaded = ViTCustomBackbone.from_pretrained(tmp_path, out_features=["stem", "stage1"])
    assert [feature_map.shape[1] for feature_map in loaded(random_images()).feature_maps] == loaded.channels
    loaded = ViTCustomBackbone.from_pretrained(tmp_path, out_indices=[-1])
    assert loaded.out_features == [f"block{loaded.config.num_hidden_layers}"]
    torch.testing.assert_close(loaded(random_images()).feature_maps[0], backbone(random_images()).feature_maps[0])


PYRAMIDS = {
    "vit": {"out_features": ["block1", "block2", "block3", "block4"], "out_strides": [4, 8, 16, 32]},
    "deit": {"out_features": ["block1", "block2", "block3", "block4"], "out_strides": [4, 8, 16, 32]},
    "pvt": {"out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "swin": {"out_features": ["stage1", "stage2", "stage3", "stage4"]},
}
PYRAMID_FIELDS = {
    "patch_size": [4, 2, 2, 2],
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 2],
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def test_semantic_segmentation_on_a_backbone(architecture, tmp_path):
    fields = {"num_hidden_layers": 4} if architecture in ONE_STAGE_ARCHITECTURES else PYRAMID_FIELDS
    if architecture == "pvt":
        fields = {**fields, "sr_ratios": [4, 2, 2, 1]}
    config = UperNetConfig(
        backbone_config=tiny_config(architecture, **fields, **PYRAMIDS[architecture]),
        hidden_size=16,
        auxiliary_in_channels=16 if architecture in ("pvt", "swin") else 32,
        auxiliary_channels=8,
        pool_scales=[1, 2],
        num_labels=3,
    )
    model = UperNetForSemanticSegmentation(config)
    assert isinstance(model.backbone, ViTCustomBackbone)
    images, labels = random_images(2, 64, 96), torch.randint(0, 3, (2, 64, 96))
    outputs = model(images, labels=labels)
    assert outputs.logits.shape == (2, 3, 64, 96)
    outputs.loss.backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    scramble(model.backbone)
    model.eval().save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 32, 32), r"pixel_values of shape (2, 1, 32, 32) have 1 channels, the model takes 3"),
        (torch.zeros(2, 32, 32, 3), r"have 32 channels, the model takes 3"),
        (torch.zeros(0, 3, 32, 32), "hold no image: the batch is empty"),
        (torch.zeros(3, 32, 32), "must have four dimensions"),
        (torch.zeros(2, 3, 1, 32), "pixel_values of 1 x 32 pixels are smaller than one patch of side"),
        (torch.zeros(2, 3, 32, 0), "pixel_values of 32 x 0 pixels are smaller than one patch of side"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "dtype torch.uint8 must be floating point"),
    ],
)
@pytest.mark.parametrize("head", sorted({head for head, _ in HEADS_AND_ARCHITECTURES}, key=lambda head: head.__name__))
def test_what_is_no_batch_of_images_is_refused(head, images, message):
    for name in ARCHITECTURES:
        if (head, name) in HEADS_AND_ARCHITECTURES:
            with pytest.raises(ValueError) as error:
                tiny_model(head, name)(images)
            assert message in str(error.value)
            assert "\n" not in str(error.value)


def test_unknown_arguments_are_refused(architecture):
    with pytest.raises(TypeError, match="pixels"):
        tiny_model(ViTCustomForImageClassification, architecture)(random_images(), pixels=1)
