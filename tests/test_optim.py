"""Parameter groups and optimizers."""

import pytest
import torch
from tiny_models import ARCHITECTURES, random_images, tiny_config
from transformers import ViTConfig, ViTForImageClassification

from modeling_vit_custom import ViTCustomForImageClassification, preset_config
from trainers.arguments import OPTIMIZERS
from trainers.optim import has_decay, layer_of, make_optimizer, parameter_groups


def make_model(name: str) -> ViTCustomForImageClassification:
    options = {} if name == "swin" else {"num_register_tokens": 2}
    return ViTCustomForImageClassification(tiny_config(name, layer_scale_init_value=0.1, qk_norm=True, **options))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matrices_decay_and_nothing_else(name):
    decayed = {name for name, parameter in make_model(name).named_parameters() if has_decay(name, parameter)}
    endings = ("qkv.weight", "query.weight", "key_value.weight", "projection.weight", "reduction.weight")
    endings += ("fc1.weight", "fc2.weight", "classifier.weight")
    assert decayed == {name for name, _ in make_model(name).named_parameters() if name.endswith(endings)}


def test_transformers_tokens_and_positions_do_not_decay():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    kept = {
        name for name, parameter in model.named_parameters() if parameter.ndim > 1 and not has_decay(name, parameter)
    }
    assert kept == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_hold_every_parameter_once(name):
    model = make_model(name)
    grouped = [parameter for group in parameter_groups(model, 1.0, 0.1, 0.5) for parameter in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))


def test_layers_count_through_stages():
    names = {
        "model.stages.0.embedding.projection.weight": 0,
        "model.stages.0.position_embedding.weight": 0,
        "model.stages.0.blocks.0.mlp.fc1.weight": 1,
        "model.stages.0.blocks.1.mlp.fc1.weight": 2,
        "model.stages.1.embedding.norm.weight": 2,
        "model.stages.1.blocks.0.attention.qkv.weight": 3,
        "model.stages.1.blocks.2.attention.qkv.weight": 5,
        "model.norm.weight": 6,
        "head.classifier.weight": 6,
    }
    assert {name: layer_of(name, [2, 3]) for name in names} == names


def test_layer_decay_of_mae():
    """https://github.com/facebookresearch/mae, util/lr_decay.py: 0.65 to the power of the layers above."""
    model = ViTCustomForImageClassification(preset_config("vit_nano_patch4_32"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in parameter_groups(model, 1e-3, 0.05, 0.65) for p in group["params"]}
    assert rates["head.classifier.weight"] == rates["model.norm.bias"] == 1e-3
    assert rates["model.stages.0.blocks.8.mlp.fc2.weight"] == pytest.approx(1e-3 * 0.65)
    assert rates["model.stages.0.prefix_tokens.class_token"] == pytest.approx(1e-3 * 0.65**10)


def test_layer_decay_needs_known_layers():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    with pytest.raises(ValueError, match=r"layer_decay=0\.5 needs a vit_custom model, not vit"):
        parameter_groups(model, 1.0, 0.1, 0.5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(optimizer, architecture):
    model = make_model(architecture)
    # Those that scale an update by the norm of its weights are slow where weights are small.
    rate, bound = {
        "adamw": (3e-3, 0.3),
        "sgd": (0.1, 0.8),
        "lamb": (0.01, 0.97),
        "lars": (0.5, 0.98),
        "muon": (3e-3, 0.3),
    }[optimizer]
    groups = parameter_groups(model, rate, 0.01)
    chosen = make_optimizer(optimizer, groups, (0.9, 0.999), 1e-8, 0.9)
    images, labels = random_images(8), torch.arange(8) % 5
    before = model(images, labels=labels).loss.item()
    for _ in range(40):
        chosen.zero_grad()
        model(images, labels=labels).loss.backward()
        chosen.step()
    assert model(images, labels=labels).loss.item() < bound * before


def test_muon_is_for_the_matrices_of_blocks():
    model = make_model("swin")
    optimizer = make_optimizer("muon", parameter_groups(model, 1e-3, 0.1), (0.9, 0.95), 1e-8, 0.9)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = {names[id(p)] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    assert muon == {n for n, p in model.named_parameters() if ".blocks." in n and has_decay(n, p)}
    assert "model.stages.1.blocks.0.attention.relative_position_bias_table" not in muon
