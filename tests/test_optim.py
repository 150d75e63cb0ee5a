"""Parameter groups and optimizers."""

import pytest
import timm
import torch
from tiny_models import ARCHITECTURES, random_images, tiny_config
from transformers import (
    PvtConfig,
    PvtForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_vit_custom import ViTCustomForImageClassification, preset_config
from trainers.arguments import OPTIMIZERS
from trainers.optim import has_decay, make_optimizer, number_layers, parameter_groups


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
        "model.stages.1.blocks.1.attention.qkv.weight": 4,
        "model.stages.1.blocks.2.attention.qkv.weight": 5,
        "model.norm.weight": 6,
        "decoder.blocks.0.mlp.fc1.weight": 6,
        "head.classifier.weight": 6,
    }
    assert number_layers(list(names)) == names


SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
OTHERS = {
    "ViT": (lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)), 3),
    "Swin": (lambda: SwinForImageClassification(SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[1, 2])), 3),
    "ResNet": (
        lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[2, 1])),
        3,
    ),
    "PVT": (lambda: PvtForImageClassification(PvtConfig(depths=[1, 1, 1, 1])), 4),
    "timm's ViT": (lambda: timm.create_model("vit_tiny_patch16_224", depth=3), 3),
    "timm's Swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), 4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_libraries_count_from_input_to_head(name):
    make, blocks = OTHERS[name]
    names = [name for name, _ in make().named_parameters()]
    layers = number_layers(names)
    assert [layers[name] for name in names] == sorted(layers.values())
    assert set(layers.values()) == set(range(blocks + 2))
    assert layers[names[0]] == 0
    assert all(index == blocks + 1 for name, index in layers.items() if name.startswith(("head.", "classifier.")))


def test_layer_decay_of_mae():
    """https://github.com/facebookresearch/mae, util/lr_decay.py: 0.65 to the power of the layers above."""
    model = ViTCustomForImageClassification(preset_config("vit_nano_patch4_32"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in parameter_groups(model, 1e-3, 0.05, 0.65) for p in group["params"]}
    assert rates["head.classifier.weight"] == rates["model.norm.bias"] == 1e-3
    assert rates["model.stages.0.blocks.8.mlp.fc2.weight"] == pytest.approx(1e-3 * 0.65)
    assert rates["model.stages.0.prefix_tokens.class_token"] == pytest.approx(1e-3 * 0.65**10)


def test_layer_decay_and_muon_need_blocks():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"layer_decay=0\.5 needs blocks, which a Sequential names otherwise"):
        parameter_groups(model, 1.0, 0.1, 0.5)
    with pytest.raises(ValueError, match="optimizer='muon' finds no matrices of blocks"):
        make_optimizer("muon", parameter_groups(model, 1.0, 0.1), (0.9, 0.999), 1e-8, 0.9)
    with pytest.raises(ValueError, match="the model has no weights to train"):
        parameter_groups(model.requires_grad_(False), 1.0, 0.1)


def test_muon_trains_the_blocks_of_another_library():
    model = OTHERS["ViT"][0]()
    optimizer = make_optimizer("muon", parameter_groups(model, 1e-3, 0.1), (0.9, 0.95), 1e-8, 0.9)
    count = sum(len(group["params"]) for group in optimizer.param_groups if group["use_muon"])
    assert count == 3 * 6  # query, key, value, output, and two of the MLP


def test_lamb_is_the_paper_s():
    """https://arxiv.org/abs/1904.00962, algorithm 2."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(5 * torch.randn(40, 30, generator=generator))  # of norm 170
    bias = torch.nn.Parameter(torch.randn(40, generator=generator))
    expected, expected_bias = matrix.detach().clone(), bias.detach().clone()
    groups = [{"params": [matrix], "lr": 0.1, "weight_decay": 0.05, "is_hidden": True}]
    groups += [{"params": [bias], "lr": 0.1, "weight_decay": 0.0, "is_hidden": False}]
    optimizer = make_optimizer("lamb", groups, (0.9, 0.99), 1e-6, 0.0)
    moments = {
        name: [torch.zeros_like(parameter), torch.zeros_like(parameter)]
        for name, parameter in {"matrix": matrix, "bias": bias}.items()
    }
    for step in range(1, 5):
        matrix.grad = torch.randn(matrix.shape, generator=generator)
        bias.grad = torch.randn(bias.shape, generator=generator)
        updates = {}
        for name, gradient in {"matrix": matrix.grad, "bias": bias.grad}.items():
            mean, square = moments[name]
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.99).add_(0.01 * gradient**2)
            updates[name] = mean / (1 - 0.9**step) / ((square / (1 - 0.99**step)).sqrt() + 1e-6)
        updates["matrix"] += 0.05 * expected
        ratio = expected.norm() / updates["matrix"].norm()
        expected -= 0.1 * ratio * updates["matrix"]
        expected_bias -= 0.1 * updates["bias"]
        optimizer.step()
        torch.testing.assert_close(matrix.detach(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bias.detach(), expected_bias, rtol=1e-4, atol=1e-4)


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


def test_kernels_of_convolutions_are_matrices_to_muon():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config)
    optimizer = make_optimizer("muon", parameter_groups(model, 1.0, 0.1), (0.9, 0.95), 1e-8, 0.9)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = {names[id(p)] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    assert muon == {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 4}
    assert "resnet.embedder.embedder.convolution.weight" not in muon
    name = "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight"
    kernel = model.get_parameter(name)
    before = kernel.detach().clone()
    model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    # An orthogonal update: of 16 channels, each of 16 x 3 x 3, with a norm like AdamW's.
    update = (kernel.detach() - before * (1 - 1.0 * 0.1)).flatten(1) / (0.2 * 144**0.5)
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_is_for_the_matrices_of_blocks():
    model = make_model("swin")
    optimizer = make_optimizer("muon", parameter_groups(model, 1e-3, 0.1), (0.9, 0.95), 1e-8, 0.9)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = {names[id(p)] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    assert muon == {n for n, p in model.named_parameters() if ".blocks." in n and has_decay(n, p)}
    assert "model.stages.1.blocks.0.attention.relative_position_bias_table" not in muon
