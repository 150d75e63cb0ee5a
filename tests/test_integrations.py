"""What the ecosystem does with any model it does with ours: adapters, int8, devices, pipelines; outputs compared."""

import copy
import os

import optimum.quanto
import peft
import pytest
import torch
import torchao.quantization
from PIL import Image
from tiny_models import main_output, random_images, tiny_model
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    QuantoConfig,
    TorchAoConfig,
    ViTImageProcessor,
    pipeline,
)

from modeling_vit_custom import ViTCustomForImageClassification, ViTCustomForPreTraining


@pytest.fixture
def checkpoint(architecture, tmp_path):
    """A folder with a classifier and its image processor."""
    model = tiny_model(ViTCustomForImageClassification, architecture, id2label=dict(enumerate("abcde")))
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights_size(folder) -> int:
    return sum(os.path.getsize(file) for file in folder.glob("*.safetensors"))


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# -------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_lora_adapters_are_trained_saved_and_merged(checkpoint, tmp_path):
    torch.manual_seed(0)
    images, labels = random_images(4), torch.tensor([0, 1, 2, 3])
    base = AutoModelForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        before = base(images).logits
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["head"])
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, before)  # an adapter starts as nothing
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(images).logits
        assert relative_difference(expected, before) > 1e-3
        fresh = AutoModelForImageClassification.from_pretrained(checkpoint)
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(images).logits, expected)
        merged = loaded.merge_and_unload()
        assert type(merged) is ViTCustomForImageClassification
        torch.testing.assert_close(merged(images).logits, expected, rtol=1e-4, atol=1e-4)
    assert weights_size(tmp_path / "adapter") < weights_size(checkpoint)


# -------------------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("scheme", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@torch.no_grad()
def test_int8_by_torchao(scheme, checkpoint, tmp_path):
    images = random_images()
    expected = AutoModelForImageClassification.from_pretrained(checkpoint)(images).logits
    config = TorchAoConfig(getattr(torchao.quantization, scheme)(version=2))
    model = AutoModelForImageClassification.from_pretrained(checkpoint, quantization_config=config)
    found = model(images).logits
    assert 0 < relative_difference(found, expected) < 0.05
    model.save_pretrained(tmp_path / "int8")
    assert weights_size(tmp_path / "int8") < 0.7 * weights_size(checkpoint)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "int8")
    assert torch.equal(loaded(images).logits, found)


@torch.no_grad()
def test_int8_by_optimum(checkpoint):
    images = random_images()
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    expected = model(images).logits
    quantized = copy.deepcopy(model)
    optimum.quanto.quantize(quantized, weights=optimum.quanto.qint8)
    optimum.quanto.freeze(quantized)
    assert 0 < relative_difference(quantized(images).logits, expected) < 0.05
    config = QuantoConfig(weights="int8")
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint, quantization_config=config)
    assert 0 < relative_difference(loaded(images).logits, expected) < 0.05


# ----------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(device_map, checkpoint):
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint, device_map=device_map)
    found = loaded(random_images().to(loaded.device)).logits.cpu()
    torch.testing.assert_close(found, model(random_images()).logits)


def test_parts_may_stay_on_disk(tmp_path):
    model = tiny_model(ViTCustomForPreTraining, "vit")
    model.save_pretrained(tmp_path / "model")
    loaded = ViTCustomForPreTraining.from_pretrained(
        tmp_path / "model", device_map={"model": "cpu", "decoder": "disk"}, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(main_output(loaded, random_images()), main_output(model, random_images()))


# --------------------------------------------------------------------------------------------------------- pipelines


@torch.no_grad()
def test_pipelines(checkpoint):
    pictures = [Image.effect_noise((50, 40), 80).convert("RGB"), Image.new("RGB", (20, 60), "orange")]
    pixels = AutoImageProcessor.from_pretrained(checkpoint)(pictures, return_tensors="pt").pixel_values
    logits = AutoModelForImageClassification.from_pretrained(checkpoint)(pixels).logits
    answers = pipeline("image-classification", model=str(checkpoint), top_k=5)(pictures)
    for answer, row in zip(answers, logits.softmax(1)):
        scores = {each["label"]: each["score"] for each in answer}
        torch.testing.assert_close(torch.tensor([scores[name] for name in "abcde"]), row)

    outputs = AutoModel.from_pretrained(checkpoint)(pixels)
    tokens = pipeline("image-feature-extraction", model=str(checkpoint))(pictures)
    torch.testing.assert_close(torch.tensor(tokens)[:, 0], outputs.last_hidden_state)
    pooled = pipeline("image-feature-extraction", model=str(checkpoint), pool=True)(pictures)
    torch.testing.assert_close(torch.tensor(pooled)[:, 0], outputs.pooler_output)
