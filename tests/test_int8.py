"""Classifiers in int8: as near to single precision as 8 bits are, whatever the batch size."""

import copy

import pytest
import torch
from tiny_models import random_images, tiny_config, tiny_model
from torch.profiler import profile
from torch.torch_version import TorchVersion

from modeling_vit_custom import ViTCustomForImageClassification, ViTCustomModel
from modeling_vit_custom.convert import to_int8
from modeling_vit_custom.convert.int8 import OLDEST_TORCH
from modeling_vit_custom.kernels import Linear


new_torch = pytest.mark.skipif(torch.__version__ < OLDEST_TORCH, reason=f"needs torch {OLDEST_TORCH}")


def check(model: ViTCustomForImageClassification, batch_sizes: tuple[int, ...]) -> None:
    state, implementation = copy.deepcopy(model.state_dict()), model.config._attn_implementation
    quantized = to_int8(model, random_images(32, seed=3).split(8)).eval()
    for batch_size in batch_sizes:
        images = random_images(batch_size)
        with torch.no_grad():
            expected = model(images).logits
        found = quantized(images).logits
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert 0 < (found - expected).norm() / expected.norm() < 0.15
    with profile() as profiled:
        quantized(images)
    names = [event.name for event in profiled.events()]
    # All dense layers of blocks but the last one's, which is for a class token where there is one.
    assert names.count("onednn::qlinear_pointwise") >= 4 * max(1, model.config.num_hidden_layers - 1)
    # The model itself is as it was.
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert any(type(module) is Linear for module in model.modules())
    with pytest.raises(ValueError, match=r"\(3, 3, 16, 32\) must be \(batch, 3, 32, 32\), as in calibration"):
        quantized(images[:, :, :16])


@new_torch
def test_scales_serve_any_batch_before_it_compiles(architecture, monkeypatch):
    """Integers are simulated then: no compiler of C++ is needed."""
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)
    model = tiny_model(ViTCustomForImageClassification, architecture)
    quantized = to_int8(model, random_images(32, seed=3).split(8)).eval()
    for batch_size in (8, 3):
        images = random_images(batch_size)
        with torch.no_grad():
            expected = model(images).logits
        assert 0 < (quantized(images).logits - expected).norm() / expected.norm() < 0.15


@pytest.mark.slow
@new_torch
def test_logits_stay_where_they_were(architecture):
    check(tiny_model(ViTCustomForImageClassification, architecture), (8, 1, 3))


@pytest.mark.slow
@new_torch
def test_scales_follow_the_images():
    """Images fifty times as bright as those that it was calibrated on leave the range of 8 bits."""
    model = tiny_model(ViTCustomForImageClassification, "vit")
    images = random_images(16)
    with torch.no_grad():
        expected = model(images).logits
    errors = []
    for scale in (1.0, 0.02):
        quantized = to_int8(model, (scale * random_images(32, seed=3)).split(8))
        errors.append((quantized(images).logits - expected).norm() / expected.norm())
    assert errors[0] < 0.5 * errors[1]


@new_torch
@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (lambda: tiny_model(ViTCustomModel, "vit"), [random_images()], "a ViTCustomModel is no classifier"),
        (
            lambda: tiny_model(ViTCustomForImageClassification, "vit").bfloat16(),
            [random_images()],
            "the model is torch.bfloat16 on cpu: it must be in float32 on the CPU",
        ),
        (lambda: tiny_model(ViTCustomForImageClassification, "vit"), [], "int8 needs images to be calibrated on"),
        (lambda: tiny_model(ViTCustomForImageClassification, "vit"), [random_images(1)], "in the first batch, not 1"),
        (
            lambda: tiny_model(ViTCustomForImageClassification, "vit"),
            [random_images(), random_images(2, 16, 16)],
            r"of shape \(2, 3, 16, 16\) must be \(batch, 3, 32, 32\), as in calibration",
        ),
        (lambda: torch.nn.Linear(3, 3), [random_images()], "a Linear is no model of this family"),
    ],
)
def test_what_cannot_be_quantised_is_refused(model, batches, message):
    with pytest.raises(ValueError, match=message) as error:
        to_int8(model(), batches)
    assert "\n" not in str(error.value)


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    with pytest.raises(ValueError, match=r"int8 needs torch 2.15 or newer, this is 2.11.0"):
        to_int8(tiny_model(ViTCustomForImageClassification, "vit"), [random_images()])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(ValueError, match="int8 needs another library: pip install torchao"):
        to_int8(ViTCustomForImageClassification(tiny_config("vit")), [random_images()])
