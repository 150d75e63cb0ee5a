"""Losses by problem type, what labels are refused, and that accumulating gradients changes nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import ARCHITECTURES, random_images, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_vit_custom import ViTCustomForImageClassification, ViTCustomForMaskedImageModeling


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.exp().sum(-1, keepdim=True).log()


def loss_of(architecture: str, labels: torch.Tensor, **fields):
    model = tiny_model(ViTCustomForImageClassification, architecture, **fields)
    before = model.config.to_dict()
    outputs = model(random_images(len(labels)), labels=labels)
    assert model.config.to_dict() == before
    return outputs.loss, outputs.logits


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_single_label(architecture, problem_type, dtype):
    labels = torch.tensor([0, 4, 2], dtype=dtype)
    loss, logits = loss_of(architecture, labels, problem_type=problem_type)
    expected = -sum(log_softmax(logits)[i, label] for i, label in enumerate(labels.tolist())) / 3
    torch.testing.assert_close(loss, expected)


def test_ignored_labels_do_not_count(architecture):
    loss, logits = loss_of(architecture, torch.tensor([-100, 4, -100, 1]))
    expected = -(log_softmax(logits)[1, 4] + log_softmax(logits)[3, 1]) / 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_soft_targets_are_a_cross_entropy(architecture, problem_type):
    labels = torch.tensor([[0.7, 0.3, 0.0, 0.0, 0.0], [0.2] * 5])
    loss, logits = loss_of(architecture, labels, problem_type=problem_type)
    torch.testing.assert_close(loss, -(labels * log_softmax(logits)).sum() / 2)


def test_soft_targets_that_are_certain_are_labels(architecture):
    labels = torch.tensor([3, 0])
    soft, _ = loss_of(architecture, nn.functional.one_hot(labels, 5).float())
    torch.testing.assert_close(soft, loss_of(architecture, labels)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_multi_label(architecture, dtype):
    labels = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]).to(dtype)
    loss, logits = loss_of(architecture, labels, problem_type="multi_label_classification")
    probabilities = 1 / (1 + (-logits).exp())
    chances = torch.where(labels.bool(), probabilities, 1 - probabilities)
    torch.testing.assert_close(loss, -chances.log().mean())


@pytest.mark.parametrize("problem_type", [None, "regression"])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_regression_to_one_value(architecture, problem_type, shape):
    labels = torch.tensor([0.5, -1.0, 2.0]).reshape(shape)
    loss, logits = loss_of(architecture, labels, problem_type=problem_type, num_labels=1)
    expected = sum((logits[i, 0] - labels.flatten()[i]) ** 2 for i in range(3)) / 3
    torch.testing.assert_close(loss, expected)


def test_regression_to_several_values(architecture):
    labels = torch.randn(2, 5)
    loss, logits = loss_of(architecture, labels, problem_type="regression")
    torch.testing.assert_close(loss, (logits - labels).square().mean())


@pytest.mark.parametrize(
    ("labels", "fields", "message"),
    [
        (torch.tensor([0, 5]), {}, "label 5 is outside 0..4 (num_labels=5)"),
        (torch.tensor([-1, 0]), {}, "label -1 is outside 0..4 (num_labels=5)"),
        (torch.tensor([0, 1, 2]), {}, "labels of shape (3,) and dtype torch.int64 do not fit logits of shape (2, 5)"),
        (torch.tensor([[0], [1]]), {}, "labels of shape (2, 1)"),
        (torch.zeros(2, 5, dtype=torch.long), {}, "one class an image is needed"),
        (torch.zeros(2), {}, "a probability for every class is needed"),
        (torch.zeros(2, 4), {}, "labels of shape (2, 4)"),
        (torch.tensor([0, 1]), {"problem_type": "multi_label_classification"}, "a 0 or 1 for every class is needed"),
        (torch.zeros(2), {"problem_type": "regression"}, "one value an output is needed"),
        (torch.zeros(3), {"num_labels": 1}, "labels of shape (3,)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, fields, message):
    for name in ARCHITECTURES:
        model = tiny_model(ViTCustomForImageClassification, name, **fields)
        with pytest.raises(ValueError) as error:
            model(random_images(2), labels=labels)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_unknown_problem_types_are_refused():
    # Some versions of the library refuse it by its type.
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=r"(?s)problem_type.*ranking"):
        tiny_model(ViTCustomForImageClassification, "vit", problem_type="ranking")


def test_losses_are_in_full_precision(architecture):
    model = tiny_model(ViTCustomForImageClassification, architecture).bfloat16()
    outputs = model(random_images(2), labels=torch.tensor([0, 1]))
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ accumulation

LABELS = {
    # Ignored labels leave every small batch a different number of labels.
    "classes": ({}, torch.tensor([0, 1, 2, -100, 4, 0, 1, 2, -100, -100, -100, 3, 4, 0, 1, 2])),
    "soft": ({}, torch.rand(16, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)),
    "multi-label": (
        {"problem_type": "multi_label_classification"},
        (torch.rand(16, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float(),
    ),
    "regression": ({"num_labels": 1}, torch.rand(16, generator=torch.Generator().manual_seed(0))),
}


def train(model, labels, folder, batch_size: int, steps: int) -> dict[str, torch.Tensor]:
    """Weights after three updates on the same 16 images."""
    items = [{"pixel_values": image} for image in random_images(16)]
    if labels is not None:
        items = [{**item, "labels": label} for item, label in zip(items, labels)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        max_steps=3,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=items).train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(one: dict, two: dict, start: dict):
    moved = max((one[name] - start[name]).abs().max().item() for name in start)
    assert moved > 5e-3
    for name in start:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("kind", LABELS)
def test_accumulated_batches_train_like_one(architecture, kind, tmp_path):
    fields, labels = LABELS[kind]
    ends = []
    for batch_size, steps in ((16, 1), (4, 4), (5, 4)):
        model = tiny_model(ViTCustomForImageClassification, architecture, **fields)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        ends.append(train(model, labels, tmp_path, batch_size, steps))
    assert_same_weights(ends[0], ends[1], start)
    # Also where the last small batch is smaller still: 5, 5, 5 and 1.
    assert_same_weights(ends[0], ends[2], start)


def test_accumulated_masked_images_train_like_one(architecture, tmp_path):
    """Every image hides the same number of pixels, so the mean of means is the mean."""

    class FixedMask(ViTCustomForMaskedImageModeling):
        def make_mask(self, pixel_values):
            grid = self.model.feature_grids(tuple(pixel_values.shape[-2:]))[0]
            return (torch.arange(grid[0] * grid[1]) % 2 == 0).expand(len(pixel_values), -1)

    ends = []
    for batch_size, steps in ((16, 1), (4, 4)):
        model = tiny_model(FixedMask, architecture)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        ends.append(train(model, None, tmp_path, batch_size, steps))
    assert_same_weights(*ends, start)


TWO_RANKS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_losses
from modeling_vit_custom import ViTCustomForImageClassification
from tiny_models import tiny_model

for name in test_losses.ARCHITECTURES:
    for kind, (fields, labels) in test_losses.LABELS.items():
        model = tiny_model(ViTCustomForImageClassification, name, **fields)
        weights = test_losses.train(model, labels, sys.argv[2], 4, 2)
        if os.environ["RANK"] == "0":
            torch.save(weights, os.path.join(sys.argv[2], f"{name}_{kind}.pt"))
assert torch.distributed.get_world_size() == 2
"""


@pytest.mark.slow
def test_two_ranks_train_like_one(tmp_path):
    script = tmp_path / "train_on_two_ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run(
        [*command, os.path.dirname(__file__), str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ARCHITECTURES:
        for kind, (fields, labels) in LABELS.items():
            model = tiny_model(ViTCustomForImageClassification, name, **fields)
            start = {key: value.clone() for key, value in model.state_dict().items()}
            alone = train(model, labels, tmp_path, 16, 1)
            assert_same_weights(alone, torch.load(tmp_path / f"{name}_{kind}.pt"), start)


def test_evaluation_reports_the_mean_over_labels(architecture, tmp_path):
    """What a Trainer hands to metrics are the logits alone, also of a model with two heads."""
    model = tiny_model(ViTCustomForImageClassification, architecture)
    images, labels = random_images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    items = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True)
    prediction = Trainer(model, arguments).predict(items)
    assert prediction.predictions.shape == (6, 5)
    with torch.no_grad():
        outputs = model(images, labels=labels)
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), outputs.logits, rtol=1e-4, atol=1e-5)
    assert json.loads(json.dumps(prediction.metrics))["test_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)
