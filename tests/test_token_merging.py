"""Token merging: against a slow reading of the paper, where it must change nothing, and what cannot have it."""

import pytest
import torch
from tiny_models import random_images, tiny_config, tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
    preset_config,
)
from modeling_vit_custom.convert import to_exported_program, to_npz, to_timm, to_transformers
from modeling_vit_custom.interpretability import attention_distance, explain, feature_colors
from modeling_vit_custom.modeling_vit_custom import TokenMerging


SIMPLE = {"position_embedding_type": "none", "num_hidden_layers": 4}
ENDS = [
    {},
    {"qk_norm": True},
    {"use_class_token": False, "pooling": "mean"},
    {"use_distillation_token": True, "num_register_tokens": 2},
]


def make_alike() -> Tensor:
    """Two images of 4 x 8 patches, each of them one of two."""
    generator = torch.Generator().manual_seed(0)
    two, which = torch.randn(2, 2, 3, 8, 8, generator=generator), torch.randint(2, (4, 8), generator=generator)
    # (B, h, w, C, 8, 8) -> (B, C, H, W)
    return two[:, which].permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def merge_slowly(tokens: Tensor, sizes: Tensor, keys: Tensor, count: int, num_prefix_tokens: int):
    """Of one image (T, D), (T,), (T, d): the steps of the paper's section 3, edge by edge."""
    patches = range(num_prefix_tokens, len(tokens))
    sources, targets = list(patches)[::2], list(patches)[1::2]
    edges = []
    for source in sources:
        alike = [torch.cosine_similarity(keys[source], keys[target], dim=0) for target in targets]
        best = max(range(len(targets)), key=lambda index: alike[index])
        edges.append((alike[best], source, targets[best]))
    edges = sorted(edges, key=lambda edge: edge[0], reverse=True)[:count]
    groups = {target: [target] for target in targets}
    for _, source, target in edges:
        groups[target].append(source)
    gone = {source for _, source, _ in edges}
    alone = [[index] for index in range(len(tokens)) if index not in gone and index not in groups]
    merged = [
        (sum(tokens[index] * sizes[index] for index in group) / sum(sizes[index] for index in group),
         sum(sizes[index] for index in group))
        for group in [*alone, *groups.values()]
    ]  # fmt: skip
    return torch.stack([token for token, _ in merged]), torch.stack([size for _, size in merged])


@pytest.mark.parametrize("num_patches", [2, 9, 16])
@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("num_prefix_tokens", [0, 2])
def test_merging_follows_the_paper(num_patches, count, num_prefix_tokens):
    generator, total = torch.Generator().manual_seed(0), num_prefix_tokens + num_patches
    tokens, keys = torch.randn(3, total, 8, generator=generator), torch.randn(3, total, 4, generator=generator)
    sizes = torch.randint(1, 5, (3, total), generator=generator).float()
    merged, merged_sizes = TokenMerging(count, num_prefix_tokens)(tokens, sizes, keys)
    most = min(count, num_patches // 2)
    assert merged.shape == (3, total - most, 8)
    assert torch.equal(merged_sizes.sum(dim=1), sizes.sum(dim=1))
    for image in range(3):
        expected, expected_sizes = merge_slowly(tokens[image], sizes[image], keys[image], most, num_prefix_tokens)
        torch.testing.assert_close(merged[image, :num_prefix_tokens], tokens[image, :num_prefix_tokens])
        # Sets of tokens: each one has its own, and they have no order.
        nearest = torch.cdist(merged[image], expected, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        assert nearest.values.max() < 1e-5
        assert sorted(nearest.indices.tolist()) == list(range(len(expected)))
        assert torch.equal(merged_sizes[image], expected_sizes[nearest.indices])


@pytest.mark.parametrize("fields", ENDS)
@pytest.mark.parametrize("implementation", ["auto", "eager", "sdpa", "products"])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_patches_that_are_alike_can_be_merged_without_a_trace(fields, implementation, needs_gradient):
    """A token counts as often as it holds patches, so equal ones that become one change nothing."""
    images = make_alike()
    fields = fields | SIMPLE
    plain = tiny_model(ViTCustomForImageClassification, "vit", **fields)
    merging = ViTCustomForImageClassification(tiny_config("vit", token_merging=4, **fields)).eval()
    merging.load_state_dict(plain.state_dict())
    for model in (plain, merging):
        model.set_attn_implementation(implementation)
    other = random_images(height=32, width=64, seed=5)
    with torch.set_grad_enabled(needs_gradient):
        outputs = merging(images, output_hidden_states=True)
        prefix = plain.config.num_prefix_tokens
        assert [states.shape[1] - prefix for states in outputs.hidden_states] == [32, 28, 24, 20, 16]
        torch.testing.assert_close(merging(images).logits, plain(images).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs.logits, plain(images).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(merging(other).logits, plain(other).logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_patches_become_one_in_half_precision(dtype):
    """Half precision can say the mean of a token of 300 patches and one of a single patch, but cannot count to 301."""
    tokens, sizes = torch.tensor([[[1.0], [3.0]]], dtype=dtype), torch.tensor([[300.0, 1.0]])
    merged, merged_sizes = TokenMerging(1, 0)(tokens, sizes, torch.ones(1, 2, 4, dtype=dtype))
    assert merged_sizes.tolist() == [[301.0]]
    assert merged.dtype == dtype
    assert merged.item() == torch.tensor(303 / 301).to(dtype).item()


def test_blocks_are_given_fewer_patches_down_to_what_is_left():
    model = tiny_model(ViTCustomModel, "vit", token_merging=6, num_hidden_layers=6)
    outputs = model(random_images(), output_hidden_states=True, output_attentions=True)
    assert [states.shape[1] for states in outputs.hidden_states] == [17, 11, 6, 4, 3, 2, 2]
    assert [weights.shape[-1] for weights in outputs.attentions] == [17, 11, 6, 4, 3, 2]
    assert outputs.last_hidden_state.shape == (2, 2, 32)
    large = model(random_images(height=48, width=40), output_hidden_states=True)
    assert [states.shape[1] for states in large.hidden_states] == [31, 25, 19, 13, 7, 4, 3]


def test_merging_saves_work():
    def count(**fields) -> int:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = ViTCustomForImageClassification(preset_config("vit_small_patch16_224", **fields))
            model(torch.zeros(1, 3, 224, 224), output_attentions=True)
        return counter.get_total_flops()

    # 2.7 of 4.6 billion products, https://github.com/facebookresearch/ToMe gives 2.7.
    assert count(token_merging=13) / count() == pytest.approx(2.7 / 4.6, abs=0.03)


@pytest.mark.parametrize("fields", ENDS)
def test_mixed_precision_follows_single_precision(fields):
    model = tiny_model(ViTCustomForImageClassification, "vit", token_merging=2, **SIMPLE, **fields)
    images = make_alike()
    expected = torch.autograd.grad(model(images).logits.square().sum(), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images, output_hidden_states=True).logits
    found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    assert (logits - model(images).logits).norm() < 0.05 * logits.norm()
    norms = [(one - other).norm() / other.norm() for one, other in zip(found, expected) if other.norm() > 1e-3]
    assert max(norms) < 0.2


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("fields", [*ENDS, {"layer_scale_init_value": 0.5, "drop_path_rate": 0.3}])
def test_training_reaches_every_weight(fields):
    model = tiny_model(ViTCustomForImageClassification, "vit", token_merging=3, **fields).train()
    torch.manual_seed(0)
    model(random_images(8), labels=torch.arange(8) % 5).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    torch.manual_seed(0)
    model(random_images(8), labels=torch.arange(8) % 5).loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient)


def test_it_can_be_chosen_when_a_checkpoint_is_opened(tmp_path):
    plain = tiny_model(ViTCustomForImageClassification, "vit")
    plain.save_pretrained(tmp_path)
    merging = AutoModelForImageClassification.from_pretrained(tmp_path, token_merging=4)
    images = random_images()
    assert not torch.allclose(merging(images).logits, plain(images).logits, atol=1e-3)
    merging.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.token_merging == 4
    assert torch.equal(again(images).logits, merging(images).logits)
    without = AutoModelForImageClassification.from_pretrained(tmp_path, token_merging=0)
    assert torch.equal(without(images).logits, plain(images).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_merges_as_well(dtype):
    model = tiny_model(ViTCustomForImageClassification, "vit", token_merging=4).to(dtype)
    images = random_images().to(dtype)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images).logits
        torch.testing.assert_close(compiled, model(images).logits, rtol=1e-2, atol=1e-4 if dtype.itemsize > 2 else 0.5)


def test_what_a_model_looks_at_is_shown_without_merging():
    plain, images = tiny_model(ViTCustomForImageClassification, "vit"), random_images()
    merging = ViTCustomForImageClassification(tiny_config("vit", token_merging=4)).eval()
    merging.load_state_dict(plain.state_dict())
    assert attention_distance(merging, [images]) == attention_distance(plain, [images])
    assert torch.equal(feature_colors(merging, images), feature_colors(plain, images))
    maps, expected = explain(merging, images), explain(plain, images)
    assert maps.keys() == expected.keys()
    assert all(torch.equal(maps[name], expected[name]) for name in maps)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (ViTCustomForPreTraining, "a reconstruction needs all patches: set token_merging=0, not 4"),
        (ViTCustomForMaskedImageModeling, "a reconstruction needs all patches: set token_merging=0, not 4"),
        (ViTCustomBackbone, "a feature map needs all patches: set token_merging=0, not 4"),
    ],
)
def test_heads_that_need_all_patches_refuse_it(head, message):
    with pytest.raises(ValueError, match=message):
        head(tiny_config("vit", token_merging=4))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_kernels_without_a_bias_of_keys_are_refused(implementation):
    with pytest.raises(ValueError, match="cannot weigh the tokens of token_merging=4; use 'auto', 'products'"):
        ViTCustomModel(tiny_config("vit", token_merging=4, attn_implementation=implementation))


@pytest.mark.parametrize("convert", [to_timm, to_transformers, to_npz, to_exported_program])
def test_what_it_has_no_place_in_refuses_it(convert):
    model = tiny_model(ViTCustomForImageClassification, "vit", token_merging=4, hidden_act="gelu_pytorch_tanh")
    with pytest.raises(ValueError, match="token_merging=4") as error:
        convert(model)
    assert "\n" not in str(error.value)
