"""Models to train: which of their weights, and what is published of them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_vit_trainer import make_trainer
from tiny_models import ARCHITECTURES, random_images, tiny_model
from transformers import (
    AutoImageProcessor,
    AutoModelForPreTraining,
    DeiTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessor,
    TimmWrapperConfig,
    ViTImageProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

from modeling_vit_custom import ViTCustomForImageClassification
from trainers.arguments import LossArguments, ModelArguments
from trainers.mixing import Mixing
from trainers.models import freeze, make_model, open_processor, read_processor
from trainers.pace import count_flops
from trainers.teachers import Teacher


@pytest.fixture(params=ARCHITECTURES)
def checkpoint(request, tmp_path):
    folder = tmp_path / "checkpoint"
    fields = {} if request.param == "pvt" else {"drop_path_rate": 0.5}
    tiny_model(ViTCustomForImageClassification, request.param, **fields).save_pretrained(folder)
    return folder


def make(checkpoint, **fields):
    model, _ = make_model(ModelArguments(model=str(checkpoint), **fields), labels=list("abcde"))
    return model


def test_cnns_have_names_as_well():
    overrides = ["embedding_size=8", "hidden_sizes=[8,16]", "depths=[1,1]"]
    model, processor = make_model(ModelArguments("resnet_nano_64", config_overrides=overrides), list("abcde"))
    assert isinstance(model, ResNetForImageClassification) and model.config.id2label[4] == "e"
    assert read_processor(processor)[0] == (64, 64)
    assert read_processor(open_processor(ModelArguments("resnet_nano_64", image_size=32)))[0] == (32, 32)
    assert model(random_images(2, 64)).logits.shape == (2, 5)
    with pytest.raises(ValueError, match="is a CNN: only a vit_custom can be pretrained"):
        make_model(ModelArguments("resnet_nano_64"), auto_class=AutoModelForPreTraining)
    with pytest.raises(ValueError, match="unknown field 'depht' for 'resnet18_224'"):
        make_model(ModelArguments("resnet18_224", config_overrides=["depht=[1]"]))
    with pytest.raises(ValueError, match="did you mean 'resnet18_224'"):
        make_model(ModelArguments("resnet18"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hidden_act=foo", "hidden_act='foo' must be one of "),
        ("hidden_act=[relu]", "must be one of "),
        ("hidden_sizes=[]", r"hidden_sizes=\[\] must be a list, of a whole number of at least 1 for each stage"),
        ("depths=[2,0,2]", r"depths=\[2, 0, 2\] must be"),
        ("hidden_sizes=[8,8.5,9]", r"hidden_sizes=\[8, 8.5, 9\] must be"),
        ("embedding_size=0", "embedding_size=0 must be a whole number"),
        ("dtype=foo", "unknown field 'dtype' for 'resnet_nano_64': choose among num_channels, embedding_size"),
    ],
)
def test_a_cnn_says_what_it_cannot_be(override, message):
    with pytest.raises(ValueError, match=message):
        make_model(ModelArguments("resnet_nano_64", config_overrides=[override]))


@pytest.mark.parametrize(("name", "millions"), [("resnet18_224", 11.69), ("resnet50_224", 25.56)])
def test_cnns_are_as_large_as_their_paper_s(name, millions):
    """https://arxiv.org/abs/1512.03385, by the counts of torchvision's."""
    model, _ = make_model(ModelArguments(name), [str(index) for index in range(1000)])
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.01)
    assert count_flops(model, (224, 224)) / 2e9 == pytest.approx(
        {"resnet18_224": 1.82, "resnet50_224": 4.1}[name], abs=0.05
    )


def tiny_model_of(checkpoint) -> torch.nn.Module:
    return ViTCustomForImageClassification.from_pretrained(checkpoint)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_frozen_encoder_stays_as_it_is(checkpoint, tmp_path):
    model = make(checkpoint, freeze_encoder=True)
    before = state(model)
    model.train()
    images = random_images()
    assert torch.equal(model(images).logits, model(images).logits)  # nothing is dropped at random
    trainer = make_trainer(tmp_path / "run", model)
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("head.")}


def test_a_frozen_batch_norm_keeps_its_statistics():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
    model = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))
    freeze(model)
    before = state(model)
    model.train()
    model(random_images(4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("checkpoint", ["vit", "pvt", "swin"], indirect=True)
def test_linear_probing_standardises_features(checkpoint, tmp_path):
    overrides = ["head_batch_norm=true", "head_initializer_range=0.0"]
    model = make(checkpoint, freeze_encoder=True, config_overrides=overrides)
    trainer = make_trainer(tmp_path / "run", model, optimizer="lars", learning_rate=0.5, max_steps=8)
    trainer.train()
    trainer.save_model()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert weights["head.batch_norm.num_batches_tracked"] == 8
    assert weights["head.classifier.weight"].abs().max() > 0


def test_the_layer_before_a_classifier_stays_or_goes(tmp_path):
    """https://arxiv.org/abs/2010.11929, section 3.2, fine-tunes without it."""
    whole = tiny_model(ViTCustomForImageClassification, "vit", representation_size=16)
    whole.save_pretrained(tmp_path)
    kept = make(tmp_path)
    assert torch.equal(kept.head.representation.weight, whole.head.representation.weight)
    plain = make(tmp_path, config_overrides=["representation_size=null"])
    assert plain.head.classifier.weight.shape == (5, 32)
    assert {name for name in state(plain) if "representation" in name} == set()
    for model in (kept, plain):
        assert all(torch.equal(tensor, whole.model.state_dict()[name]) for name, tensor in state(model.model).items())


def test_low_rank_changes_are_published_merged(checkpoint, tmp_path):
    model = make(checkpoint, lora_rank=2, lora_alpha=8.0)
    whole = make(checkpoint)
    before = state(whole)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained < whole.num_parameters() / 2
    trainer = make_trainer(tmp_path / "run", model, learning_rate=1e-2, max_steps=6, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    published = ViTCustomForImageClassification.from_pretrained(tmp_path / "run")
    with trainer.averaged_weights():
        expected = model.eval()(random_images()).logits
    torch.testing.assert_close(published(random_images()).logits, expected, rtol=1e-4, atol=1e-4)
    # All matrices of the encoder changed, by no more than the rank, and nothing else but the head.
    for name, tensor in published.state_dict().items():
        change = tensor - before[name] if tensor.is_floating_point() else tensor - tensor
        if name.startswith("head."):
            assert change.abs().max() > 0
        elif name.endswith("weight") and tensor.ndim == 2 and ".blocks." in name:
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-3) <= 2, name
        elif tensor.ndim < 2:
            assert torch.equal(tensor, before[name]), name


def test_a_low_rank_run_is_resumed(tmp_path):
    tiny_model(ViTCustomForImageClassification, "vit").save_pretrained(tmp_path / "checkpoint")
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5, "max_steps": 4, "ema_decay": 0.9}
    whole = make_trainer(tmp_path / "whole", make(tmp_path / "checkpoint", lora_rank=2), **options)
    whole.train()
    whole.save_model()
    resumed = make_trainer(tmp_path / "resumed", make(tmp_path / "checkpoint", lora_rank=2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    resumed.save_model()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_encoder": True}, "--freeze_encoder keeps the encoder's weights, but those of .* are random"),
        ({"lora_rank": 4}, "--lora_rank keeps the encoder's weights, but those of .* are random"),
    ],
    ids=["frozen", "lora"],
)
def test_random_weights_are_not_kept(fields, message):
    with pytest.raises(ValueError, match=message):
        make("vit_nano_patch2_8", **fields)


def test_ranks_out_of_range_are_refused(checkpoint):
    with pytest.raises(ValueError, match="lora_rank=-1 must be at least 1, or 0 for none"):
        make(checkpoint, lora_rank=-1)
    with pytest.raises(ValueError, match="leaves nothing to change by --lora_rank 2"):
        make(checkpoint, lora_rank=2, freeze_encoder=True)


def test_a_processor_comes_without_its_model(checkpoint):
    arguments = ModelArguments(model=str(checkpoint), image_size=48)
    assert read_processor(open_processor(arguments))[0] == (48, 48)
    assert read_processor(open_processor(ModelArguments(model="vit_nano_patch4_32")))[0] == (32, 32)
    with pytest.raises(ValueError, match="there is no model 'vit_nano'"):
        open_processor(ModelArguments(model="vit_nano"))


def test_images_are_prepared_as_the_papers_did():
    """DeiT's: 256 pixels at the shorter side, and of them the middle 224."""
    fields = {"normalization": "imagenet", "eval_interpolation": "bicubic", "eval_crop": 0.875}
    processor = open_processor(ModelArguments(model="deit_small_patch16_224", **fields))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    moments = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    theirs = DeiTImageProcessor(size={"shortest_edge": 256}, resample=Image.Resampling.BICUBIC, **moments)
    expected = theirs(image, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 224, 224)
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"], expected)
    assert read_processor(processor) == ((224, 224), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_another_size_keeps_the_share_of_the_centre(checkpoint):
    fields = {"image_size": 48, "eval_crop": 0.75}
    open_processor(ModelArguments(model=str(checkpoint), **fields)).save_pretrained(checkpoint)
    processor = open_processor(ModelArguments(model=str(checkpoint), image_size=96))
    assert dict(processor.size)["shortest_edge"] == 128
    assert read_processor(processor)[0] == (96, 96)


def test_a_prepared_image_survives_saving(checkpoint, tmp_path):
    arguments = ModelArguments(model=str(checkpoint), image_size=48, eval_crop=0.5, eval_interpolation="bicubic")
    processor = open_processor(arguments)
    processor.save_pretrained(tmp_path)
    opened = AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    one, two = (each(image, return_tensors="pt")["pixel_values"] for each in (processor, opened))
    assert one.shape == (1, 3, 48, 48)
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalization": "none"}, "normalization='none' must be half or imagenet"),
        ({"eval_interpolation": "nearest"}, "eval_interpolation='nearest' must be bilinear or bicubic"),
        ({"eval_crop": 1.5}, "eval_crop=1.5 must lie between 0 and 1"),
        ({"eval_crop": 0.5, "config_overrides": ["image_size=[32,16]"]}, "needs square images, not of 32 x 16 pixels"),
        ({"new_head": True}, "--new_head true needs a checkpoint"),
    ],
    ids=str,
)
def test_what_cannot_be_prepared_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make("vit_nano_patch4_32", **fields)


@pytest.mark.parametrize("new", [False, True])
def test_a_head_of_the_same_classes_is_kept_or_made_anew(checkpoint, new):
    model = make(checkpoint, new_head=new, config_overrides=["head_initializer_range=0.0"])
    before = state(tiny_model_of(checkpoint))
    for name, value in state(model).items():
        if name.startswith("head.") and name.endswith("weight"):
            assert bool((value == 0).all()) == new
            assert torch.equal(value, before[name]) != new
        elif not name.startswith("head."):
            assert torch.equal(value, before[name])


@pytest.fixture
def timm_teacher(tmp_path):
    data = {"input_size": [3, 24, 24], "mean": [0.4] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    config = TimmWrapperConfig(architecture="resnet10t", label_names=list("edcba"), pretrained_cfg=data)
    config.num_labels = 5
    TimmWrapperForImageClassification(config).eval().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_a_timm_model_is_trained(timm_teacher, tmp_path):
    model, _ = make_model(ModelArguments(model=timm_teacher, freeze_encoder=True), labels=list("vwxyz"))
    before = state(model)
    trainer = make_trainer(tmp_path / "run", model, trainer_options={"mixing": Mixing(0, 0, 1.0, 0.5, 5)})
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "timm_model.fc.weight",
        "timm_model.fc.bias",
    }
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"timm_model.fc.weight", "timm_model.fc.bias"}  # and no statistics of the encoder's batch norms


@pytest.mark.parametrize("field", [{"freeze_encoder": True}, {"lora_rank": 2}], ids=str)
def test_an_encoder_that_cannot_be_told_from_its_head_is_not_frozen(tmp_path, field):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = SiglipConfig(text_config={**sizes, "vocab_size": 10}, vision_config=vision, num_labels=3)
    SiglipForImageClassification(config).save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model, _ = make_model(ModelArguments(model=str(tmp_path)), labels=list("abcd"))
    assert model.classifier.out_features == 4
    message = rf"--{next(iter(field))}: a SiglipForImageClassification does not tell which part of it is the encoder"
    with pytest.raises(ValueError, match=message):
        make_model(ModelArguments(model=str(tmp_path), **field), labels=list("abcd"))


def test_a_timm_model_teaches(timm_teacher):
    arguments = LossArguments(teacher=timm_teacher)
    teacher = Teacher(arguments, "abcde", [0.5] * 3, [0.5] * 3, torch.device("cpu"))
    raw = torch.rand(2, 3, 24, 24)
    model = TimmWrapperForImageClassification.from_pretrained(timm_teacher).eval()
    expected = model((raw - 0.4) / 0.2).logits.flip(1)
    torch.testing.assert_close(teacher((raw - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_other_names_is_taken_by_index(timm_teacher):
    with pytest.raises(ValueError, match=r"5 classes, such as 'v'; if they are the same .*by_index true"):
        Teacher(LossArguments(teacher=timm_teacher), "vwxyz", [0.5] * 3, [0.5] * 3, torch.device("cpu"))
    arguments = LossArguments(teacher=timm_teacher, teacher_labels_by_index=True)
    teacher = Teacher(arguments, "vwxyz", [0.5] * 3, [0.5] * 3, torch.device("cpu"))
    assert teacher.order.tolist() == [0, 1, 2, 3, 4]


def test_a_teacher_that_is_not_there_is_no_hub_id():
    with pytest.raises(ValueError, match="there is no teacher 'runs/teacher': give a folder"):
        Teacher(LossArguments(teacher="runs/teacher"), "ab", [0.5] * 3, [0.5] * 3, torch.device("cpu"))


def test_processors_of_transformers_and_timm_are_read(timm_teacher):
    arguments = ModelArguments(model=timm_teacher)
    assert read_processor(open_processor(arguments)) == ((24, 24), [0.4] * 3, [0.2] * 3)
    size, mean, std = read_processor(ViTImageProcessor(size={"height": 8, "width": 4}))
    assert (size, mean, std) == ((8, 4), [0.5] * 3, [0.5] * 3)
