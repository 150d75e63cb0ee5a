"""Named sizes: every parameter count is pinned, and compared with timm's where timm has the model."""

import functools

import pytest
import timm
import torch
from tiny_models import random_images

from modeling_vit_custom import (
    ViTCustomConfig,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    list_presets,
    preset_config,
)


PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_224,
    "vit_small_patch16_224": 22_050_280,
    "vit_base_patch16_224": 86_566_888,
    "vit_large_patch16_224": 304_325_608,
    "vit_base_patch32_224": 88_223_464,
    "vit_huge_patch14_224": 632_044_520,
    "deit_tiny_patch16_224": 5_717_224,
    "deit_small_patch16_224": 22_050_280,
    "deit_base_patch16_224": 86_566_888,
    "deit_tiny_distilled_patch16_224": 5_910_416,
    "deit_small_distilled_patch16_224": 22_435_664,
    "deit_base_distilled_patch16_224": 87_336_656,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_medium_patch16_224": 38_849_512,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_large_patch16_224": 304_374_760,
    "deit3_huge_patch14_224": 632_126_440,
    "pvt_tiny_224": 13_228_776,
    "pvt_small_224": 24_485_352,
    "pvt_medium_224": 44_207_592,
    "pvt_large_224": 61_368_808,
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window7_224": 196_532_476,
    "vit_nano_patch2_8": 798_474,
    "deit_nano_distilled_patch2_8": 799_892,
    "pvt_nano_8": 635_018,
    "swin_nano_patch1_window4_8": 566_072,
    "vit_nano_patch4_32": 2_697_418,
    "deit_nano_distilled_patch4_32": 2_699_540,
    "pvt_nano_32": 2_537_290,
    "swin_nano_patch2_window4_32": 2_643_758,
}
# Millions of parameters as the papers' tables print them (PVT v1: table 1; the others are compared with timm).
PAPERS = {"pvt_tiny_224": 13.2, "pvt_small_224": 24.5, "pvt_medium_224": 44.2, "pvt_large_224": 61.4}
NANO = [name for name in PARAMETERS if "_nano_" in name]


def count_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_preset_is_pinned():
    assert list_presets() == list(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = ViTCustomForImageClassification(preset_config(name))
    assert count_parameters(model) == PARAMETERS[name]
    if name in PAPERS:
        assert round(PARAMETERS[name] / 1e6, 1) == PAPERS[name]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name in timm.list_models()])
def test_parameter_count_is_that_of_timm(name, monkeypatch):
    # Older versions of timm read their drop path rates off a tensor, which the meta device has no values for.
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        # timm's default ViT-H has no head of 1000 classes.
        reference = timm.create_model(name, num_classes=1000)
    config = preset_config(name)
    # timm has positions for prefix tokens too, except in DeiT III; here they fold into the tokens.
    rows = 0 if name.startswith("deit3") else config.num_prefix_tokens
    assert count_parameters(reference) - PARAMETERS[name] == rows * config.hidden_size


def test_timm_has_all_the_names_but_those_of_pvt_and_the_small_ones():
    missing = set(PARAMETERS) - set(timm.list_models())
    assert missing == {*PAPERS, *NANO}


@pytest.mark.parametrize("name", PARAMETERS)
def test_name_says_what_the_preset_is(name):
    config = preset_config(name)
    parts = name.split("_")
    assert config.image_size == int(parts[-1])
    assert config.num_labels == (10 if name in NANO else 1000)
    for part in parts:
        if part.startswith("patch"):
            assert config.stages[0].patch_size == int(part.removeprefix("patch"))
        if part.startswith("window"):
            assert {stage.window_size for stage in config.stages} == {int(part.removeprefix("window"))}
    assert config.use_distillation_token == ("distilled" in parts)
    assert (config.layer_scale_init_value is not None) == name.startswith("deit3")
    assert config.pooling == ("mean" if name.startswith("swin") else "cls")


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name not in NANO])
def test_width_of_a_head(name):
    """Which no parameter count shows."""
    width = 32 if name.startswith("swin") else 80 if "huge" in name else 64
    assert {stage.hidden_size / stage.num_attention_heads for stage in preset_config(name).stages} == {width}


@pytest.mark.parametrize("name", NANO)
def test_small_presets_classify_and_pretrain(name):
    config = preset_config(name)
    images = random_images(2, config.image_size, config.image_size)
    heads = [ViTCustomForImageClassification, ViTCustomForMaskedImageModeling]
    if len(config.stages) == 1:
        heads.append(ViTCustomForPreTraining)
    for head in heads:
        labels = {"labels": torch.tensor([0, 9])} if head is ViTCustomForImageClassification else {}
        loss = head(config)(images, **labels).loss
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_preset_can_be_pretrained(name):
    config = preset_config(name)
    head = ViTCustomForPreTraining if len(config.stages) == 1 else ViTCustomForMaskedImageModeling
    with torch.device("meta"):
        head(config)
        ViTCustomForMaskedImageModeling(config)


def test_overrides_replace_fields():
    config = preset_config("swin_tiny_patch4_window7_224", num_labels=3, drop_path_rate=0.2, image_size=[64, 96])
    assert (config.num_labels, config.drop_path_rate, config.native_size) == (3, 0.2, (64, 96))
    assert config.hidden_sizes == [96, 192, 384, 768]


def test_label_names_set_the_number_of_labels():
    config = preset_config("vit_nano_patch2_8", id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    assert config.num_labels == 2
    assert config.id2label[1] == "dog"


def test_presets_do_not_share_their_lists():
    preset_config("pvt_tiny_224").depths.append(7)
    assert preset_config("pvt_tiny_224").depths == [2, 2, 2, 2]


def test_default_config_is_the_base_model():
    assert ViTCustomConfig(num_labels=1000).to_dict() == preset_config("vit_base_patch16_224").to_dict()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit_enormous", {}, "unknown preset 'vit_enormous'; choose from vit_tiny_patch16_224"),
        ("vit_nano_patch2_8", {"drop_rate": 0.1}, "unknown field 'drop_rate' for preset 'vit_nano_patch2_8'"),
        ("vit_nano_patch2_8", {"num_attention_heads": 7}, "hidden_size=128 is not a multiple of num_attention_heads=7"),
    ],
)
def test_what_a_preset_cannot_be(name, overrides, message):
    with pytest.raises(ValueError) as error:
        preset_config(name, **overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
