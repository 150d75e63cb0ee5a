"""The configuration: what it resolves to, what it refuses, and that it comes back as it was saved."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import ARCHITECTURES, HEADS, ONE_STAGE_ARCHITECTURES, main_output, random_images, tiny_config
from transformers import AutoConfig

from modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomConfig,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
)


# Every option away from its default; each has a meaning on all four architectures.
OPTIONS = {
    "num_channels": 1,
    "pooling": "mean",
    "hidden_act": "gelu_pytorch_tanh",
    "qkv_bias": False,
    "qk_norm": True,
    "layer_scale_init_value": 0.1,
    "layer_norm_eps": 1e-4,
    "patch_norm_eps": 1e-3,
    "sr_norm_eps": 1e-2,
    "drop_path_rate": 0.2,
    "drop_path_schedule": "constant",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "head_initializer_range": 0.0,
    "head_bias_init": -1.6,
    "norm_pix_loss": True,
    "position_antialias": True,
    "position_embedding_type": "sincos2d",
}
# These have none for an encoder with windows in its last stage, with several stages, or with a distillation token.
PREFIX_OPTIONS = {"num_register_tokens": 3}
ONE_STAGE_OPTIONS = {"patch_dropout": 0.25}
ONE_HEAD_OPTIONS = {"norm_after_pooling": True, "head_batch_norm": True}


def all_options(architecture: str) -> dict:
    prefix = {} if architecture == "swin" else PREFIX_OPTIONS
    one_stage = ONE_STAGE_OPTIONS if architecture in ONE_STAGE_ARCHITECTURES else {}
    one_head = {} if architecture == "deit" else ONE_HEAD_OPTIONS
    return {**OPTIONS, **prefix, **one_stage, **one_head}


@pytest.mark.parametrize("head", HEADS)
def test_all_options_together(head, architecture):
    if architecture not in HEADS[head]:
        pytest.skip("a masked autoencoder has one stage")
    options = all_options(architecture)
    if head in (ViTCustomBackbone, ViTCustomForMaskedImageModeling):
        options.pop("patch_dropout", None)  # feature maps need all patches
    if head in (ViTCustomForPreTraining, ViTCustomForMaskedImageModeling):
        options.pop("norm_after_pooling", None)  # a reconstruction needs normalised tokens
    model = head(tiny_config(architecture, **options)).train()
    images = random_images(channels=1)
    labels = {"labels": torch.tensor([0, 4])} if head is ViTCustomForImageClassification else {}
    outputs = model(images, **labels)
    (outputs.loss if "loss" in outputs else outputs[0][0].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert "loss" not in outputs or parameter.grad is not None, name
    assert main_output(model.eval(), images).isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("vit", {"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ("pvt", {"num_attention_heads": [1, 3]}, "num_attention_heads=3 in stage 2 of 2"),
        ("pvt", {"num_attention_heads": [1, 2, 4]}, "num_attention_heads=[1, 2, 4] has 3 entries for 2 stage(s)"),
        ("vit", {"patch_size": [8, 2]}, "patch_size=[8, 2] has 2 entries for 1 stage(s)"),
        ("pvt", {"depths": [1, 1, 1]}, "hidden_sizes=[16, 32] and depths=[1, 1, 1] must have the same length"),
        ("pvt", {"depths": []}, "depths=[] needs at least one stage"),
        ("pvt", {"hidden_size": 16}, "hidden_size=16 contradicts the last of hidden_sizes=[16, 32]"),
        ("pvt", {"num_hidden_layers": 9}, "num_hidden_layers=9 contradicts the sum of depths=[1, 2]"),
        ("swin", {"use_class_token": True}, "window_size=4 leaves no place for 1 prefix token(s)"),
        ("swin", {"num_register_tokens": 2}, "window_size=4 leaves no place for 2 prefix token(s)"),
        ("swin", {"pooling": "cls"}, "pooling='cls' needs use_class_token=True"),
        ("swin", {"sr_ratios": 2}, "window_size=4 and sr_ratio=2 exclude each other"),
        ("swin", {"patch_dropout": 0.5}, "patch_dropout=0.5 needs a single stage of global attention"),
        ("pvt", {"patch_dropout": 0.5}, "patch_dropout=0.5 needs a single stage of global attention"),
        ("swin", {"token_merging": 8}, "token_merging=8 needs a single stage of global attention"),
        ("pvt", {"token_merging": 8}, "token_merging=8 needs a single stage of global attention"),
        ("vit", {"token_merging": -1}, "token_merging=-1 must be at least 0"),
        ("vit", {"use_class_token": False}, "pooling='cls' needs use_class_token=True"),
        (
            "vit",
            {"use_class_token": False, "pooling": "mean", "use_distillation_token": True},
            "use_distillation_token=True needs use_class_token=True",
        ),
        ("deit", {"norm_after_pooling": True}, "norm_after_pooling=True leaves the distillation token"),
        ("deit", {"head_batch_norm": True}, "head_batch_norm=True is for a single head"),
        ("vit", {"pooling": "max"}, "pooling='max' must be one of 'cls', 'mean'"),
        ("vit", {"hidden_act": "relu"}, "hidden_act='relu' must be one of"),
        ("vit", {"position_embedding_type": "rotary"}, "position_embedding_type='rotary' must be one of"),
        ("pvt", {"position_embedding_type": ["none", "x"]}, "position_embedding_type='x' must be one of"),
        ("vit", {"drop_path_schedule": "cosine"}, "drop_path_schedule='cosine' must be one of"),
        (
            "vit",
            {"position_embedding_type": "sincos2d", "hidden_size": 6, "num_attention_heads": 2},
            "position_embedding_type='sincos2d' needs a width that 4 divides, not hidden_size=6",
        ),
        ("vit", {"image_size": 0}, "image_size=0 must be at least 1"),
        ("vit", {"image_size": [32, -1]}, "image_size=[32, -1] must be at least 1"),
        ("vit", {"image_size": [32]}, "image_size=[32] must be one side or (height, width)"),
        ("vit", {"image_size": [32, 32, 3]}, "image_size=[32, 32, 3] must be one side or (height, width)"),
        ("vit", {"patch_size": 0}, "patch_size=0 must be at least 1"),
        ("pvt", {"patch_size": [4, -2]}, "patch_size=-2 must be at least 1 in stage 2 of 2"),
        ("vit", {"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ("vit", {"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ("pvt", {"depths": [2, 0]}, "depths=[2, 0] must be at least 1"),
        ("vit", {"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ("vit", {"num_attention_heads": -4}, "num_attention_heads=-4 must be at least 1"),
        ("vit", {"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ("pvt", {"sr_ratios": [0, 1]}, "sr_ratio=0 must be at least 1 in stage 1 of 2"),
        ("swin", {"window_size": -1}, "window_size=-1 must be at least 0"),
        ("vit", {"num_channels": 0}, "num_channels=0 must be at least 1"),
        ("vit", {"num_labels": 0}, "num_labels=0 must be an integer of at least 1"),
        ("vit", {"num_labels": "10"}, "num_labels='10' must be an integer of at least 1"),
        ("vit", {"num_labels": True}, "num_labels=True must be an integer of at least 1"),
        ("vit", {"id2label": {}}, "id2label={} must name at least one class"),
        ("vit", {"head_bias_init": float("nan")}, "head_bias_init=nan must be finite"),
        ("vit", {"initializer_range": float("nan")}, "initializer_range=nan must be finite"),
        ("vit", {"layer_norm_eps": float("inf")}, "layer_norm_eps=inf must be finite"),
        ("vit", {"image_size": 4}, "image_size=4 is smaller than one patch of side 8"),
        ("vit", {"patch_merging": True}, "patch_merging=True needs a second stage"),
        ("swin", {"position_antialias": True}, "position_antialias=True has nothing to interpolate"),
        ("vit", {"num_register_tokens": -1}, "num_register_tokens=-1 must be at least 0"),
        ("vit", {"layer_norm_eps": -1.0}, "layer_norm_eps=-1.0 must be at least 0"),
        ("vit", {"initializer_range": -0.1}, "initializer_range=-0.1 must be at least 0"),
        ("vit", {"head_initializer_range": -0.1}, "head_initializer_range=-0.1 must be at least 0"),
        ("vit", {"drop_path_rate": 1.0}, "drop_path_rate=1.0 must lie in [0, 1)"),
        ("vit", {"drop_path_rate": float("nan")}, "drop_path_rate=nan must lie in [0, 1)"),
        ("vit", {"patch_dropout": -0.1}, "patch_dropout=-0.1 must lie in [0, 1)"),
        ("vit", {"hidden_dropout_prob": 1}, "hidden_dropout_prob=1 must lie in [0, 1)"),
        ("vit", {"mask_ratio": 1.5}, "mask_ratio=1.5 must lie in [0, 1)"),
        ("vit", {"mask_patch_size": 0}, "mask_patch_size=0 must be at least 1"),
        ("pvt", {"out_strides": [0]}, "out_strides=[0] must be at least 1"),
        ("vit", {"out_features": ["stage2"]}, "stage2"),
    ],
)
def test_impossible_mixes_are_refused_in_one_line(architecture, fields, message):
    with pytest.raises(ValueError) as error:
        tiny_config(architecture, **fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("head", "architecture", "fields", "message"),
    [
        (ViTCustomForPreTraining, "pvt", {}, "not 2 stage(s) with sr_ratios=[2, 1] and window_size=0"),
        (ViTCustomForPreTraining, "swin", {}, "not 2 stage(s) with sr_ratios=1 and window_size=4"),
        (ViTCustomForPreTraining, "vit", {"sr_ratios": 2}, "not 1 stage(s) with sr_ratios=2"),
        (ViTCustomForPreTraining, "vit", {"decoder_hidden_size": 0}, "decoder_hidden_size=0 must be at least 1"),
        (ViTCustomForPreTraining, "vit", {"decoder_hidden_size": 18}, "decoder_hidden_size=18 must be a multiple of 4"),
        (ViTCustomForPreTraining, "vit", {"decoder_num_attention_heads": 3}, "decoder_num_attention_heads=3"),
        (ViTCustomForPreTraining, "vit", {"decoder_num_attention_heads": 0}, "decoder_num_attention_heads=0"),
        (ViTCustomForMaskedImageModeling, "vit", {"mask_patch_size": 12}, "mask_patch_size=12 must be a multiple"),
        (ViTCustomForMaskedImageModeling, "vit", {"patch_dropout": 0.5}, "patch_dropout=0.0, not 0.5"),
        (ViTCustomForPreTraining, "vit", {"norm_after_pooling": True}, "set norm_after_pooling=False"),
        (ViTCustomForMaskedImageModeling, "swin", {"norm_after_pooling": True}, "set norm_after_pooling=False"),
        (ViTCustomBackbone, "vit", {"patch_dropout": 0.5}, "patch_dropout=0.0, not 0.5"),
        (ViTCustomBackbone, "pvt", {"out_strides": [4, 8]}, "out_strides=[4, 8] must have one entry for each"),
    ],
)
def test_a_head_refuses_what_it_cannot_be_built_on(head, architecture, fields, message):
    config = tiny_config(architecture, **fields)
    with pytest.raises(ValueError) as error:
        head(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", 32.5),
        ("num_attention_heads", None),
        ("patch_size", [8.0]),
        ("image_size", "32"),
        ("depths", 2),
        ("use_class_token", "yes"),
        ("pooling", 3),
        ("norm_after_pooling", "mean"),
        ("head_batch_norm", 1),
        ("drop_path_rate", "0.1"),
        ("layer_norm_eps", None),
        ("qkv_bias", 1),
    ],
)
def test_wrong_types_are_refused(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field) as error:
        tiny_config("vit", **{field: value})
    assert repr(value) in str(error.value)
    config = tiny_config("vit")
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        setattr(config, field, value)


def test_a_config_broken_afterwards_is_not_saved(tmp_path):
    config = tiny_config("vit")
    config.num_attention_heads = 5
    with pytest.raises(Exception, match="hidden_size=32 is not a multiple of num_attention_heads=5"):
        config.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken" / "config.json").exists()
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        ViTCustomModel(config)


@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
def test_round_trips(architecture, options, tmp_path):
    fields = all_options(architecture) if options else {}
    config = tiny_config(architecture, id2label={0: "ant", 1: "bee"}, num_labels=2, image_size=[32, 48], **fields)
    config.save_pretrained(tmp_path)
    loaded = ViTCustomConfig.from_pretrained(tmp_path)
    copies = [ViTCustomConfig.from_dict(config.to_dict()), loaded, AutoConfig.from_pretrained(tmp_path)]
    for copy in copies:
        assert type(copy) is ViTCustomConfig
        assert copy.stages == config.stages
        assert copy.id2label == {0: "ant", 1: "bee"}
        for name, value in config.to_dict().items():
            # A saved one knows the code that its folder serves, and a loaded one where it came from.
            assert name in {"auto_map", "_name_or_path"} or copy.to_dict()[name] == value
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_a_tuple_as_image_size_round_trips(tmp_path):
    config = tiny_config("vit", image_size=(32, 48))
    config.save_pretrained(tmp_path)
    assert ViTCustomConfig.from_pretrained(tmp_path).native_size == (32, 48) == config.native_size


def test_all_auto_classes_are_written_down(architecture, tmp_path):
    ViTCustomModel(tiny_config(architecture)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"].keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoModelForPreTraining",
        "AutoModelForMaskedImageModeling",
        "AutoBackbone",
    }


def test_overrides_through_from_pretrained(architecture, tmp_path):
    ViTCustomForImageClassification(tiny_config(architecture)).save_pretrained(tmp_path)
    model = ViTCustomForImageClassification.from_pretrained(
        tmp_path, drop_path_rate=0.5, problem_type="multi_label_classification", output_hidden_states=True
    )
    assert model.config.stages[-1].drop_path_rates[-1] == 0.5
    assert model.config.problem_type == "multi_label_classification"
    assert len(model(random_images()).hidden_states) == model.config.num_hidden_layers + 1
    config = ViTCustomConfig.from_pretrained(tmp_path, num_labels=7, image_size=64)
    assert (config.num_labels, config.native_size) == (7, (64, 64))
    with pytest.raises(ValueError, match="pooling='max' must be one of"):
        ViTCustomForImageClassification.from_pretrained(tmp_path, pooling="max")


def test_other_depths_through_from_pretrained(tmp_path):
    tiny_config("vit").save_pretrained(tmp_path)
    assert ViTCustomConfig.from_pretrained(tmp_path, num_hidden_layers=3).stages[0].depth == 3


def test_lists_and_single_values_mean_the_same():
    one = tiny_config("swin", window_size=4, num_attention_heads=2, position_embedding_type="none")
    many = tiny_config("swin", window_size=[4, 4], num_attention_heads=[2, 2], position_embedding_type=["none"] * 2)
    assert one.stages == many.stages


def test_width_of_the_mlp_follows_each_stage():
    assert [stage.intermediate_size for stage in tiny_config("pvt", intermediate_size=None).stages] == [64, 128]
    assert tiny_config("vit", intermediate_size=None).stages[0].intermediate_size == 128


@pytest.mark.parametrize(("schedule", "rates"), [("linear", [0.0, 0.1, 0.2, 0.3]), ("constant", [0.3, 0.3, 0.3, 0.3])])
def test_drop_path_schedule_runs_over_all_stages(schedule, rates):
    config = tiny_config("swin", drop_path_rate=0.3, drop_path_schedule=schedule)
    assert [rate for stage in config.stages for rate in stage.drop_path_rates] == pytest.approx(rates)
    blocks = [block for stage in ViTCustomModel(config).stages for block in stage.blocks]
    assert [getattr(block.drop_path, "rate", 0.0) for block in blocks] == pytest.approx(rates)


def test_names_of_feature_maps(architecture):
    config = tiny_config(architecture)
    stages = [f"stage{i + 1}" for i in range(len(config.stages))]
    blocks = [f"block{i + 1}" for i in range(config.num_hidden_layers)]
    assert config.stage_names == ["stem", *stages, *blocks]
    assert config.out_features == [stages[-1]]
    assert tiny_config(architecture, out_indices=[0, 1]).out_features == ["stem", "stage1"]


def test_stage_grids_round_up():
    assert [stage.grid_size for stage in tiny_config("pvt", image_size=[33, 50]).stages] == [(9, 13), (5, 7)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_keep_the_config_as_it_is(name):
    config = tiny_config(name)
    before = config.to_dict()
    model = ViTCustomForImageClassification(config)
    model(random_images(height=40, width=24), labels=torch.tensor([0, 1]), output_attentions=True)
    after = model.config.to_dict()
    assert {name: value for name, value in after.items() if before[name] != value} == {}
