"""Conversions from transformers and timm: the same logits, losses and gradients on random weights, or a clear refusal.

Every layer norm of a peer gets an epsilon that shows where it is mixed up with another one.
"""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from benchmarks.peers import CONVERTERS, logits_of, make_images, max_difference, randomise, set_attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from modeling_vit_custom.convert import from_timm, from_transformers


BOUND = 1e-5
EPS = 1e-2
IMPLEMENTATIONS = ("eager", "sdpa")

TRANSFORMERS_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "layer_norm_eps": EPS,
    "num_labels": 7,
}
TRANSFORMERS_PVT = {"image_size": 64, "layer_norm_eps": EPS, "num_labels": 7}
TRANSFORMERS_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 96,
    "depths": [2, 2, 2],
    "num_heads": [3, 6, 12],
    "window_size": 4,
    "layer_norm_eps": EPS,
    "num_labels": 7,
}
TRANSFORMERS_MAE = {
    **{name: value for name, value in TRANSFORMERS_VIT.items() if name != "num_labels"},
    "decoder_hidden_size": 128,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 256,
}
NORM = partial(nn.LayerNorm, eps=EPS)
TIMM_VIT = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 7,
    "norm_layer": NORM,
}
TIMM_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 96,
    "depths": (2, 2, 2),
    "num_heads": (3, 6, 12),
    "window_size": 4,
    "num_classes": 7,
    "norm_layer": NORM,
}


def transformers_model(name: str, defaults: dict, **fields) -> nn.Module:
    config_class = getattr(transformers, name.partition("For")[0].removesuffix("Model") + "Config")
    return randomise(getattr(transformers, name)(config_class(**{**defaults, **fields})))


def timm_model(model_class: type[nn.Module], defaults: dict, **fields) -> nn.Module:
    return randomise(model_class(**{**defaults, **fields}))


vit = partial(transformers_model, "ViTForImageClassification", TRANSFORMERS_VIT)
deit = partial(transformers_model, "DeiTForImageClassification", TRANSFORMERS_VIT)
deit_distilled = partial(transformers_model, "DeiTForImageClassificationWithTeacher", TRANSFORMERS_VIT)
pvt = partial(transformers_model, "PvtForImageClassification", TRANSFORMERS_PVT)
swin = partial(transformers_model, "SwinForImageClassification", TRANSFORMERS_SWIN)
vit_mae = partial(transformers_model, "ViTMAEForPreTraining", TRANSFORMERS_MAE)
timm_vit = partial(timm_model, VisionTransformer, TIMM_VIT)
timm_deit_distilled = partial(timm_model, VisionTransformerDistilled, TIMM_VIT)
timm_deit3 = partial(timm_vit, no_embed_class=True, init_values=1e-6)
timm_swin = partial(timm_model, SwinTransformer, TIMM_SWIN)

Build = Callable[[], nn.Module]
CLASSIFIERS: dict[str, tuple[str, Build]] = {
    "transformers ViT": ("transformers", vit),
    "transformers ViT, no qkv bias, tanh GELU": (
        "transformers",
        partial(vit, qkv_bias=False, hidden_act="gelu_pytorch_tanh"),
    ),
    "transformers ViT, one channel": ("transformers", partial(vit, num_channels=1)),
    "transformers ViT, not square": ("transformers", partial(vit, image_size=(24, 40))),
    "transformers DeiT, one head": ("transformers", deit),
    "transformers DeiT, two heads": ("transformers", deit_distilled),
    "transformers PVT": ("transformers", pvt),
    "transformers PVT, no qkv bias": ("transformers", partial(pvt, qkv_bias=False)),
    "transformers PVT, three stages": (
        "transformers",
        partial(
            pvt,
            num_encoder_blocks=3,
            depths=[1, 2, 1],
            hidden_sizes=[32, 64, 160],
            num_attention_heads=[1, 2, 5],
            sequence_reduction_ratios=[4, 2, 1],
            patch_sizes=[4, 2, 2],
            strides=[4, 2, 2],
            mlp_ratios=[8, 4, 4],
        ),
    ),
    "transformers Swin": ("transformers", swin),
    "transformers Swin, absolute embeddings": ("transformers", partial(swin, use_absolute_embeddings=True)),
    "transformers Swin, no qkv bias, window 8, MLP ratio 2": (
        "transformers",
        partial(swin, qkv_bias=False, image_size=64, window_size=8, mlp_ratio=2.0),
    ),
    "timm ViT": ("timm", timm_vit),
    "timm ViT, registers and qk-norm": ("timm", partial(timm_vit, reg_tokens=4, qk_norm=True)),
    "timm ViT, registers without positions": ("timm", partial(timm_vit, reg_tokens=4, no_embed_class=True)),
    "timm ViT, mean pooling": ("timm", partial(timm_vit, global_pool="avg", fc_norm=False)),
    "timm ViT, mean pooling, registers, no class token": (
        "timm",
        partial(timm_vit, global_pool="avg", fc_norm=False, class_token=False, reg_tokens=2),
    ),
    "timm ViT, norm after mean pooling": ("timm", partial(timm_vit, global_pool="avg")),
    "timm ViT, norm after mean pooling, registers, no class token": (
        "timm",
        partial(timm_vit, global_pool="avg", fc_norm=True, class_token=False, reg_tokens=2),
    ),
    "timm ViT, norm after the class token": ("timm", partial(timm_vit, global_pool="token", fc_norm=True)),
    "timm ViT, no qkv bias, MLP ratio 2": ("timm", partial(timm_vit, qkv_bias=False, mlp_ratio=2.0)),
    "timm ViT, tanh GELU": ("timm", partial(timm_vit, act_layer=partial(nn.GELU, approximate="tanh"))),
    # With a class token timm's oldest versions lose it here.
    "timm ViT, no positions": (
        "timm",
        partial(timm_vit, pos_embed="none", class_token=False, global_pool="avg", fc_norm=False),
    ),
    "timm ViT, not square": ("timm", partial(timm_vit, img_size=(24, 40))),
    "timm DeiT distilled": ("timm", timm_deit_distilled),
    "timm DeiT III": ("timm", timm_deit3),
    "timm Swin": ("timm", timm_swin),
    "timm Swin, no qkv bias, window 8": ("timm", partial(timm_swin, qkv_bias=False, img_size=64, window_size=8)),
    # 32 pixels leave grids of 16, 8 and 4 patches: windows of 8 shrink to 4 in the last stage.
    "timm Swin, window shrinks with the grid": ("timm", partial(timm_swin, window_size=8)),
    "timm Swin, one channel": ("timm", partial(timm_swin, in_chans=1)),
}


def native_images(ours: nn.Module, seed: int = 1) -> Tensor:
    return make_images(2, ours.config.native_size, seed, ours.config.num_channels)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("library, build", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
@torch.no_grad()
def test_classifiers_give_the_same_logits(library: str, build: Build, implementation: str):
    peer = set_attention(build(), implementation)
    ours = set_attention(CONVERTERS[library](peer), implementation)
    images = native_images(ours)
    expected = logits_of(peer, images)
    assert expected.std() > 0.1
    assert max_difference(logits_of(ours, images), expected) <= BOUND


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_both_heads_of_deit_agree(implementation: str):
    peer = set_attention(deit_distilled(), implementation)
    ours = set_attention(from_transformers(peer), implementation)
    images = native_images(ours)
    expected, outputs = peer(images), ours(images)
    for name in ("cls_logits", "distillation_logits", "logits"):
        assert max_difference(outputs[name], expected[name]) <= BOUND
    assert max_difference(outputs.cls_logits, outputs.distillation_logits) > 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@torch.no_grad()
def test_masked_autoencoder_gives_the_same_loss_and_reconstruction(norm_pix_loss: bool, implementation: str):
    peer = set_attention(vit_mae(norm_pix_loss=norm_pix_loss, mask_ratio=0.6), implementation)
    ours = set_attention(from_transformers(peer), implementation)
    images, noise = native_images(ours), torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    expected, outputs = peer(images, noise=noise), ours(images, noise=noise)
    assert max_difference(outputs.loss, expected.loss) <= BOUND
    assert max_difference(outputs.logits, expected.logits) <= BOUND
    assert torch.equal(outputs.mask, expected.mask)
    assert torch.equal(outputs.ids_restore, expected.ids_restore)
    assert expected.logits.std() > 0.1


# ---------------------------------------------------------------------------------------------------- bare encoders

BARE = {
    "ViT": partial(transformers_model, "ViTModel", TRANSFORMERS_VIT),
    "DeiT": partial(transformers_model, "DeiTModel", TRANSFORMERS_VIT),
    "PVT": partial(transformers_model, "PvtModel", TRANSFORMERS_PVT),
    "Swin": partial(transformers_model, "SwinModel", TRANSFORMERS_SWIN),
}


@pytest.mark.parametrize("name", BARE)
@torch.no_grad()
def test_bare_transformers_models_give_the_same_tokens(name: str):
    peer = BARE[name]()
    ours = from_transformers(peer)
    images = native_images(ours)
    outputs, expected = ours(images), peer(images).last_hidden_state
    assert max_difference(outputs.last_hidden_state, expected) <= BOUND
    pooled = expected.mean(dim=1) if name == "Swin" else expected[:, 0]
    assert max_difference(outputs.pooler_output, pooled) <= BOUND


@torch.no_grad()
def test_bare_masked_autoencoder_gives_the_same_visible_tokens():
    peer = transformers_model("ViTMAEModel", TRANSFORMERS_MAE)
    ours = from_transformers(peer)
    images, noise = native_images(ours), torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    expected = peer(images, noise=noise).last_hidden_state
    outputs = ours(images, ids_keep=noise.argsort(dim=1)[:, :4])
    assert max_difference(outputs.last_hidden_state, expected) <= BOUND


@pytest.mark.parametrize(("library", "build"), [("transformers", vit), ("timm", timm_swin)])
def test_the_dtype_stays(library: str, build: Build):
    source = build().bfloat16()
    ours = {"transformers": from_transformers, "timm": from_timm}[library](source)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    count = sum(parameter.double().abs().sum() for parameter in source.parameters())
    torch.testing.assert_close(sum(p.double().abs().sum() for p in ours.parameters()), count, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "build",
    [timm_vit, timm_deit3, timm_swin, partial(timm_vit, reg_tokens=2), partial(timm_vit, global_pool="avg")],
)
@torch.no_grad()
def test_timm_models_without_a_classifier_give_the_same_features(build: Build):
    peer = build(num_classes=0)
    ours = from_timm(peer)
    images = native_images(ours)
    outputs, expected = ours(images), peer.forward_features(images)
    # Swin's feature maps are (B, h, w, D) there.
    expected = expected.flatten(1, 2) if expected.ndim == 4 else expected
    assert max_difference(outputs.last_hidden_state, expected) <= BOUND
    assert max_difference(outputs.pooler_output, peer(images)) <= BOUND


@torch.no_grad()
def test_distilled_timm_model_without_a_classifier_gives_the_same_tokens():
    # The mean of two tokens, which it gives itself then, is no pooling of ours.
    peer = timm_deit_distilled(num_classes=0)
    ours = from_timm(peer)
    images = native_images(ours)
    assert max_difference(ours(images).last_hidden_state, peer.forward_features(images)) <= BOUND


# ------------------------------------------------------------------------------------------------ other image sizes


@pytest.mark.parametrize("size", [(48, 48), (16, 16), (40, 64), (64, 24)])
@pytest.mark.parametrize("build", [vit, deit, deit_distilled])
@torch.no_grad()
def test_transformers_positions_are_interpolated_alike(build: Build, size: tuple[int, int]):
    peer = build()
    ours = from_transformers(peer)
    images = make_images(2, size)
    assert max_difference(ours(images).logits, peer(images, interpolate_pos_encoding=True).logits) <= BOUND


@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
@pytest.mark.parametrize("absolute", [False, True])
@torch.no_grad()
def test_transformers_swin_agrees_at_sizes_that_windows_divide(absolute: bool, size: tuple[int, int]):
    peer = swin(use_absolute_embeddings=absolute, depths=[2, 2], num_heads=[3, 6])
    ours = from_transformers(peer)
    images = make_images(2, size)
    assert max_difference(ours(images).logits, peer(images, interpolate_pos_encoding=True).logits) <= BOUND


@pytest.mark.parametrize("size", [(48, 48), (16, 16), (40, 64), (64, 24)])
@pytest.mark.parametrize("build", [timm_vit, timm_deit_distilled, timm_deit3, partial(timm_vit, reg_tokens=3)])
@torch.no_grad()
def test_timm_positions_are_interpolated_alike(build: Build, size: tuple[int, int]):
    peer = build(dynamic_img_size=True)
    ours = from_timm(peer)
    images = make_images(2, size)
    assert max_difference(ours(images).logits, peer(images)) <= BOUND


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@torch.no_grad()
def test_timm_swin_agrees_at_sizes_that_windows_divide(size: tuple[int, int]):
    peer = timm_swin()
    ours = from_timm(peer)
    peer.set_input_size(img_size=size, window_size=(4, 4))
    images = make_images(2, size)
    assert max_difference(ours(images).logits, peer(images)) <= BOUND


# -------------------------------------------------------------------------------------------------------- gradients

# Our parameter, and those of the peer that it is made of, one after the other; one of every kind.
STAGE, BLOCK = "model.stages.0", "model.stages.0.blocks.1"


def transformers_gradients(base: str, layers: str) -> dict[str, list[str]]:
    block = f"{layers}.1"
    return {
        f"{STAGE}.embedding.projection.weight": [f"{base}.embeddings.patch_embeddings.projection.weight"],
        f"{BLOCK}.attention.qkv.weight": [f"{block}.attention.{part}_proj.weight" for part in "qkv"],
        f"{BLOCK}.attention.qkv.bias": [f"{block}.attention.{part}_proj.bias" for part in "qkv"],
        f"{BLOCK}.attention.projection.weight": [f"{block}.attention.o_proj.weight"],
        f"{BLOCK}.attention_norm.weight": [f"{block}.layernorm_before.weight"],
        f"{BLOCK}.mlp_norm.bias": [f"{block}.layernorm_after.bias"],
        f"{BLOCK}.mlp.fc1.weight": [f"{block}.mlp.fc1.weight"],
        f"{BLOCK}.mlp.fc2.bias": [f"{block}.mlp.fc2.bias"],
        "model.norm.weight": [f"{base}.layernorm.weight"],
    }


def timm_gradients(blocks: str) -> dict[str, list[str]]:
    block = f"{blocks}.1"
    return {
        f"{STAGE}.embedding.projection.weight": ["patch_embed.proj.weight"],
        f"{BLOCK}.attention.qkv.weight": [f"{block}.attn.qkv.weight"],
        f"{BLOCK}.attention.qkv.bias": [f"{block}.attn.qkv.bias"],
        f"{BLOCK}.attention.projection.weight": [f"{block}.attn.proj.weight"],
        f"{BLOCK}.attention_norm.weight": [f"{block}.norm1.weight"],
        f"{BLOCK}.mlp_norm.bias": [f"{block}.norm2.bias"],
        f"{BLOCK}.mlp.fc1.weight": [f"{block}.mlp.fc1.weight"],
        f"{BLOCK}.mlp.fc2.bias": [f"{block}.mlp.fc2.bias"],
        "model.norm.weight": ["norm.weight"],
    }


CLASS_TOKEN = f"{STAGE}.prefix_tokens.class_token"
DISTILLATION_TOKEN = f"{STAGE}.prefix_tokens.distillation_token"
POSITIONS = f"{STAGE}.position_embedding.weight"
PVT_BLOCK = "pvt.encoder.block.0.1"
GRADIENTS: dict[str, tuple[str, Build, dict[str, list[str]]]] = {
    "transformers ViT": (
        "transformers",
        vit,
        {
            **transformers_gradients("vit", "vit.layers"),
            CLASS_TOKEN: ["vit.embeddings.cls_token"],
            POSITIONS: ["vit.embeddings.position_embeddings"],
            "head.classifier.weight": ["classifier.weight"],
        },
    ),
    "transformers DeiT, one head": (
        "transformers",
        deit,
        {
            f"{STAGE}.prefix_tokens.register_tokens": ["deit.embeddings.distillation_token"],
            CLASS_TOKEN: ["deit.embeddings.cls_token"],
            POSITIONS: ["deit.embeddings.position_embeddings"],
            "head.classifier.bias": ["classifier.bias"],
        },
    ),
    "transformers DeiT, two heads": (
        "transformers",
        deit_distilled,
        {
            **transformers_gradients("deit", "deit.layers"),
            CLASS_TOKEN: ["deit.embeddings.cls_token"],
            DISTILLATION_TOKEN: ["deit.embeddings.distillation_token"],
            POSITIONS: ["deit.embeddings.position_embeddings"],
            "head.classifier.weight": ["cls_classifier.weight"],
            "head.distillation_classifier.weight": ["distillation_classifier.weight"],
        },
    ),
    "transformers PVT": (
        "transformers",
        pvt,
        {
            f"{STAGE}.embedding.projection.weight": ["pvt.encoder.patch_embeddings.0.projection.weight"],
            f"{STAGE}.embedding.norm.weight": ["pvt.encoder.patch_embeddings.0.layer_norm.weight"],
            "model.stages.2.embedding.projection.bias": ["pvt.encoder.patch_embeddings.2.projection.bias"],
            POSITIONS: ["pvt.encoder.patch_embeddings.0.position_embeddings"],
            "model.stages.3.position_embedding.weight": ["pvt.encoder.patch_embeddings.3.position_embeddings"],
            "model.stages.3.prefix_tokens.class_token": ["pvt.encoder.patch_embeddings.3.cls_token"],
            f"{BLOCK}.attention.query.weight": [f"{PVT_BLOCK}.attention.self.query.weight"],
            f"{BLOCK}.attention.key_value.weight": [
                f"{PVT_BLOCK}.attention.self.key.weight",
                f"{PVT_BLOCK}.attention.self.value.weight",
            ],
            f"{BLOCK}.attention.reduction.weight": [f"{PVT_BLOCK}.attention.self.sequence_reduction.weight"],
            f"{BLOCK}.attention.reduction_norm.weight": [f"{PVT_BLOCK}.attention.self.layer_norm.weight"],
            f"{BLOCK}.attention.projection.weight": [f"{PVT_BLOCK}.attention.output.dense.weight"],
            f"{BLOCK}.attention_norm.weight": [f"{PVT_BLOCK}.layer_norm_1.weight"],
            f"{BLOCK}.mlp_norm.bias": [f"{PVT_BLOCK}.layer_norm_2.bias"],
            f"{BLOCK}.mlp.fc1.weight": [f"{PVT_BLOCK}.mlp.dense1.weight"],
            f"{BLOCK}.mlp.fc2.bias": [f"{PVT_BLOCK}.mlp.dense2.bias"],
            "model.stages.3.blocks.1.attention.qkv.weight": [
                f"pvt.encoder.block.3.1.attention.self.{part}.weight" for part in ("query", "key", "value")
            ],
            "model.norm.weight": ["pvt.encoder.layer_norm.weight"],
            "head.classifier.weight": ["classifier.weight"],
        },
    ),
    "transformers Swin": (
        "transformers",
        partial(swin, use_absolute_embeddings=True),
        {
            **transformers_gradients("swin", "swin.encoder.layers.0.blocks"),
            POSITIONS: ["swin.embeddings.position_embeddings"],
            f"{STAGE}.embedding.norm.bias": ["swin.embeddings.norm.bias"],
            f"{BLOCK}.attention.relative_position_bias_table": [
                "swin.encoder.layers.0.blocks.1.attention.relative_position_bias.relative_position_bias_table"
            ],
            "model.stages.1.embedding.norm.weight": ["swin.encoder.layers.0.downsample.norm.weight"],
            "model.stages.1.embedding.projection.weight": ["swin.encoder.layers.0.downsample.reduction.weight"],
            "head.classifier.weight": ["classifier.weight"],
        },
    ),
    "timm ViT, registers and qk-norm": (
        "timm",
        partial(timm_vit, reg_tokens=4, qk_norm=True),
        {
            **timm_gradients("blocks"),
            CLASS_TOKEN: ["cls_token"],
            f"{STAGE}.prefix_tokens.register_tokens": ["reg_token"],
            POSITIONS: ["pos_embed"],
            f"{BLOCK}.attention.query_norm.weight": ["blocks.1.attn.q_norm.weight"],
            f"{BLOCK}.attention.key_norm.weight": ["blocks.1.attn.k_norm.weight"],
            "head.classifier.weight": ["head.weight"],
        },
    ),
    "timm DeiT distilled": (
        "timm",
        timm_deit_distilled,
        {
            **timm_gradients("blocks"),
            CLASS_TOKEN: ["cls_token"],
            DISTILLATION_TOKEN: ["dist_token"],
            POSITIONS: ["pos_embed"],
            "head.classifier.weight": ["head.weight"],
            "head.distillation_classifier.bias": ["head_dist.bias"],
        },
    ),
    "timm DeiT III": (
        "timm",
        timm_deit3,
        {
            **timm_gradients("blocks"),
            CLASS_TOKEN: ["cls_token"],
            POSITIONS: ["pos_embed"],
            f"{BLOCK}.attention_scale.weight": ["blocks.1.ls1.gamma"],
            f"{BLOCK}.mlp_scale.weight": ["blocks.1.ls2.gamma"],
        },
    ),
    "timm ViT, norm after mean pooling": (
        "timm",
        partial(timm_vit, global_pool="avg"),
        {"model.pooling.norm.weight": ["fc_norm.weight"], "model.pooling.norm.bias": ["fc_norm.bias"]},
    ),
    "timm Swin": (
        "timm",
        timm_swin,
        {
            **timm_gradients("layers.0.blocks"),
            f"{BLOCK}.attention.relative_position_bias_table": ["layers.0.blocks.1.attn.relative_position_bias_table"],
            f"{STAGE}.embedding.norm.bias": ["patch_embed.norm.bias"],
            "model.stages.1.embedding.norm.weight": ["layers.1.downsample.norm.weight"],
            "model.stages.1.embedding.projection.weight": ["layers.1.downsample.reduction.weight"],
            "head.classifier.weight": ["head.fc.weight"],
        },
    ),
}


def assert_same_gradients(ours: nn.Module, peer: nn.Module, names: dict[str, list[str]]):
    our_parameters, their_parameters = dict(ours.named_parameters()), dict(peer.named_parameters())
    for name, sources in names.items():
        gradient = our_parameters[name].grad
        expected = torch.cat([their_parameters[source].grad for source in sources])
        if name.endswith("position_embedding.weight"):
            # Positions of prefix tokens are part of the tokens, with the same gradient.
            expected = expected[:, expected.shape[1] - gradient.shape[1] :]
        expected = expected.reshape(gradient.shape)
        scale = expected.abs().max().item()
        assert scale > 0, f"{name}: no gradient"
        difference = max_difference(gradient, expected)
        assert difference <= 1e-4 * scale, f"{name}: gradients up to {scale:.1e} differ by {difference:.1e}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("library, build, names", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_classifiers_give_the_same_gradients(
    library: str, build: Build, names: dict[str, list[str]], implementation: str
):
    peer = set_attention(build(), implementation)
    ours = set_attention(CONVERTERS[library](peer), implementation)
    images, labels = native_images(ours), torch.tensor([2, 5])
    F.cross_entropy(logits_of(peer, images), labels).backward()
    ours(images, labels=labels).loss.backward()
    assert_same_gradients(ours, peer, names)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_masked_autoencoder_gives_the_same_gradients(norm_pix_loss: bool):
    peer = vit_mae(norm_pix_loss=norm_pix_loss)
    ours = from_transformers(peer)
    images, noise = native_images(ours), torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    peer(images, noise=noise).loss.backward()
    ours(images, noise=noise).loss.backward()
    layer = "decoder.decoder_layers.0"
    names = {
        **transformers_gradients("vit", "vit.layers"),
        CLASS_TOKEN: ["vit.embeddings.cls_token"],
        "decoder.mask_token.weight": ["decoder.mask_token"],
        "decoder.embedding.weight": ["decoder.decoder_embed.weight"],
        "decoder.blocks.0.attention.qkv.weight": [f"{layer}.attention.{part}_proj.weight" for part in "qkv"],
        "decoder.blocks.0.mlp_norm.weight": [f"{layer}.layernorm_after.weight"],
        "decoder.norm.bias": ["decoder.decoder_norm.bias"],
        "decoder.prediction.weight": ["decoder.decoder_pred.weight"],
    }
    assert_same_gradients(ours, peer, names)
    # Fixed positions stay fixed.
    assert ours.model.stages[0].position_embedding.weight.grad is None
    assert ours.decoder.position_embedding.weight.grad is None


# ---------------------------------------------------------------------------------------- what else is carried over


@pytest.mark.parametrize("build", [vit, deit_distilled, pvt, swin])
def test_labels_and_problem_type_are_carried_over(build: Build):
    id2label = {0: "ant", 1: "bee", 2: "cat"}
    fields = {"num_labels": 3, "id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    peer = build(**fields, problem_type="multi_label_classification")
    config = from_transformers(peer).config
    assert config.id2label == id2label
    assert config.label2id == {"ant": 0, "bee": 1, "cat": 2}
    assert config.num_labels == 3
    assert config.problem_type == "multi_label_classification"


def test_number_of_labels_is_carried_over_without_names():
    assert from_timm(timm_vit(num_classes=11)).config.num_labels == 11
    assert from_transformers(pvt(num_labels=11)).config.num_labels == 11


def test_drop_path_of_transformers_models_is_carried_over():
    assert from_transformers(swin(drop_path_rate=0.3)).config.drop_path_rate == 0.3
    assert from_transformers(pvt(drop_path_rate=0.3)).config.drop_path_rate == 0.3


@pytest.mark.parametrize("library, build", [("transformers", pvt), ("timm", timm_deit_distilled)])
@torch.no_grad()
def test_the_converted_model_has_weights_of_its_own_and_evaluates(library: str, build: Build):
    peer = build()
    ours = CONVERTERS[library](peer)
    assert not ours.training
    images = native_images(ours)
    before = logits_of(ours, images)
    for parameter in peer.parameters():
        parameter.zero_()
    assert torch.equal(logits_of(ours, images), before)


# --------------------------------------------------------------------------------------------------------- refusals


def transformers_resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


def transformers_vit_for_masked_image_modeling() -> nn.Module:
    return transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**TRANSFORMERS_VIT))


def mae_with_a_decoder_position_of_the_class_token() -> nn.Module:
    model = vit_mae()
    with torch.no_grad():
        model.decoder.decoder_pos_embed[:, 0] = 1
    return model


REFUSED: dict[str, tuple[str, Build, str]] = {
    "transformers ResNet": ("transformers", transformers_resnet, "ResNetForImageClassification"),
    "transformers head": ("transformers", transformers_vit_for_masked_image_modeling, "ViTForMaskedImageModeling"),
    "transformers activation": ("transformers", partial(vit, hidden_act="relu"), "relu"),
    "transformers patches": ("transformers", partial(swin, patch_size=(2, 4)), "patch_size"),
    "transformers image cut by patches": ("transformers", partial(vit, image_size=30), "shape"),
    "overlapping patches": ("transformers", partial(pvt, strides=[3, 2, 2, 2]), "strides"),
    "class position in the decoder": ("transformers", mae_with_a_decoder_position_of_the_class_token, "decoder"),
    "timm ResNet": ("timm", lambda: timm.create_model("resnet18", num_classes=7), "ResNet"),
    "timm norm that no head applies": ("timm", partial(timm_deit_distilled, fc_norm=True), "fc_norm"),
    "timm norm before the blocks": ("timm", partial(timm_vit, pre_norm=True), "norm_pre"),
    "timm no final norm": ("timm", partial(timm_vit, final_norm=False), "norm"),
    "timm attention pooling": ("timm", partial(timm_vit, global_pool="map"), "global_pool"),
    "timm max pooling": ("timm", partial(timm_vit, global_pool="max", fc_norm=False), "global_pool"),
    "timm pooling with prefix": (
        "timm",
        partial(timm_vit, global_pool="avg", fc_norm=False, pool_include_prefix=True),
        "pool",
    ),
    "timm activation": ("timm", partial(timm_vit, act_layer=nn.ReLU), "ReLU"),
    "timm gated MLP": ("timm", partial(timm_vit, mlp_layer=timm.layers.SwiGLU), "SwiGLU"),
    "timm norm in attention": ("timm", partial(timm_vit, scale_attn_norm=True), "attn.norm"),
    "timm no projection bias": ("timm", partial(timm_vit, proj_bias=False), "attn.proj.bias"),
    "timm other blocks": (
        "timm",
        partial(timm_vit, block_fn=timm.models.vision_transformer.ResPostBlock),
        "ResPostBlock",
    ),
    "timm patches": ("timm", partial(timm_vit, patch_size=(4, 8)), "patch_size"),
    "timm windows": ("timm", partial(timm_swin, img_size=(32, 64), window_size=(4, 8)), "window_size"),
    "timm Swin pooling": ("timm", partial(timm_swin, global_pool=""), "global_pool"),
    "timm Swin that shifts a single window": ("timm", partial(timm_swin, always_partition=True), "always_partition"),
    "timm Swin with wider heads": ("timm", partial(timm_swin, head_dim=64), "shape"),
}


@pytest.mark.parametrize("library, build, named", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_counterpart_is_refused_in_one_line(library: str, build: Build, named: str):
    with pytest.raises(ValueError) as error:
        CONVERTERS[library](build())
    message = str(error.value)
    assert named in message
    assert "\n" not in message
