"""Features of encoders, and what nearest neighbours and a linear classifier make of them."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from tiny_models import HEADS_AND_ARCHITECTURES, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTImageProcessor

from modeling_vit_custom import ViTCustomForImageClassification, ViTCustomModel
from trainers import probing
from trainers.data import load_digits, processor_transform, with_transform
from trainers.probing import draw_images, extract_features, knn_accuracy, linear_probe_accuracy, probe


@pytest.fixture(scope="module")
def digits():
    """Digits as an evaluated split yields them, for models of 32 pixels."""
    transform = processor_transform(ViTImageProcessor(size={"height": 32, "width": 32}))
    return with_transform(load_digits()["train"], transform)


# ---------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize(("head", "architecture"), HEADS_AND_ARCHITECTURES)
def test_features_are_what_the_encoder_pools(head, architecture, digits):
    model = tiny_model(head, architecture, hidden_dropout_prob=0.5, drop_path_rate=0.5)
    rows = digits.select(range(5))
    with torch.no_grad():
        expected = model.base_model(torch.stack([row["pixel_values"] for row in rows])).pooler_output
    model.train()
    model.config.return_dict = False
    features, labels = extract_features(model, rows, 2, "cpu")
    torch.testing.assert_close(features, expected)
    assert features.dtype == torch.float32
    assert labels.tolist() == [row["labels"] for row in rows] == [0, 1, 2, 3, 4]


def test_features_of_a_model_in_low_precision_are_single_precision(digits):
    model = tiny_model(ViTCustomModel, "vit").to(torch.bfloat16)
    assert extract_features(model, digits.select(range(2)), 2, "cpu")[0].dtype == torch.float32


def test_the_model_stays_as_it_was(digits):
    model = tiny_model(ViTCustomForImageClassification, "vit").train()
    model.model.stages[0].eval()  # as if it were frozen
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    features, _ = extract_features(model, digits.select(range(4)), 4, "cpu")
    with pytest.raises(ValueError, match="smaller than one patch"):
        small = digits.select(range(4)).with_transform(
            lambda rows: {"pixel_values": [torch.zeros(3, 1, 1)] * len(rows["label"]), "labels": rows["label"]}
        )
        extract_features(model, small, 4, "cpu")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}
    assert all((parameter.grad == 1).all() and parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    # What is learnt on top of them needs ordinary tensors.
    assert not features.requires_grad
    torch.nn.Linear(features.shape[1], 2)(features).sum().backward()


def test_no_images_have_no_features(digits):
    with pytest.raises(ValueError, match="holds no images to extract features of"):
        extract_features(tiny_model(ViTCustomModel, "vit"), digits.select([]), 4, "cpu")


# -------------------------------------------------------------------------------------------------------- neighbours


def clusters(images: int, seed: int, classes: int = 4, dimensions: int = 8):
    """Features around one axis for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    return torch.eye(dimensions)[labels] + 0.1 * torch.randn(images, dimensions, generator=generator), labels


def test_votes_by_hand():
    # Seen from the query, one image of class 0 at similarity 1 and two of class 1 at 1/2; lengths mean nothing.
    half, height = 0.5, 0.75**0.5
    train = torch.tensor([[2.0, 0, 0], [half, height, 0], [10 * half, 0, 10 * height]])
    train_labels, query = torch.tensor([0, 1, 1]), torch.tensor([[0.1, 0, 0]])

    def votes_for_zero(**options) -> bool:
        return knn_accuracy(train, train_labels, query, torch.tensor([0]), **options) == 1.0

    # exp(1 / T) > 2 exp(0.5 / T) below T = 0.5 / log(2) = 0.721.
    assert votes_for_zero(temperature=0.70)
    assert not votes_for_zero(temperature=0.74)
    assert votes_for_zero(temperature=0.74, neighbours=2)
    assert votes_for_zero()
    # Here exp(1 / T) is beyond single precision.
    assert votes_for_zero(temperature=0.001)
    assert knn_accuracy(train, 1 - train_labels, query, torch.tensor([1]), temperature=0.001) == 1.0


def test_a_class_that_was_not_trained_on_counts_as_wrong():
    train_features, train_labels = torch.eye(2), torch.tensor([0, 1])
    features, labels = torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0]]), torch.tensor([0, 1, 7])
    assert knn_accuracy(train_features, train_labels, features, labels) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (150, 0.5)])
def test_neighbours_are_those_of_scikit_learn(neighbours, temperature):
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(150, 6, generator=generator), torch.randn(200, 6, generator=generator)
    train_labels = (train[:, 0] > 0).long() + 2 * (train[:, 1] > 0).long()
    reference = KNeighborsClassifier(
        neighbours,
        weights=lambda distance: np.exp((1 - distance) / temperature),
        metric="cosine",
        algorithm="brute",
    ).fit(train.double().numpy(), train_labels.numpy())
    predicted = torch.from_numpy(reference.predict(queries.double().numpy()))
    assert knn_accuracy(train, train_labels, queries, predicted, neighbours, temperature) == 1.0
    # And the other way round: what it does not predict is wrong.
    assert knn_accuracy(train, train_labels, queries, (predicted + 1) % 4, neighbours, temperature) == 0.0


class LargestTensor(TorchDispatchMode):
    """Looks at what every operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return output


def test_similarities_come_in_chunks(monkeypatch):
    train, queries = clusters(500, seed=0), clusters(300, seed=1)
    queries[1][:77] = (queries[1][:77] + 1) % 4
    whole = knn_accuracy(*train, *queries)
    assert whole == pytest.approx(223 / 300)
    # Seven queries at a time: the features are larger than that, the similarities of all would be 150,000.
    monkeypatch.setattr(probing, "MAX_SIMILARITIES", 3500)
    with LargestTensor() as largest:
        assert knn_accuracy(*train, *queries) == whole
    assert largest.num_elements == train[0].numel() == 4000


# --------------------------------------------------------------------------------------------------- both accuracies


ACCURACIES = [knn_accuracy, linear_probe_accuracy]


@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_separable_features_give_one_and_shuffled_labels_chance(accuracy):
    train, evaluated = clusters(600, seed=0), clusters(1000, seed=1)
    assert accuracy(*train, *evaluated) == 1.0
    assert accuracy(*train, evaluated[0], evaluated[1][torch.randperm(1000)]) == pytest.approx(0.25, abs=0.05)
    # Nor is anything learnt where features know nothing of the labels.
    assert accuracy(torch.randn(600, 8), train[1], torch.randn(1000, 8), evaluated[1]) == pytest.approx(0.25, abs=0.05)


def test_a_linear_probe_does_not_depend_on_the_scale_of_features():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(400, 3, generator=generator), torch.randint(3, (400,), generator=generator)
    features[:, 2] += labels  # told apart in part only
    train, evaluated = (features[:200], labels[:200]), (features[200:], labels[200:])
    plain = linear_probe_accuracy(*train, *evaluated)
    assert 0.4 < plain < 0.9
    scale, shift = torch.tensor([100.0, 1.0, 1e-4]), torch.tensor([5.0, 0.0, 3.0])
    scaled = linear_probe_accuracy(train[0] * scale + shift, train[1], evaluated[0] * scale + shift, evaluated[1])
    assert scaled == pytest.approx(plain, abs=0.01)


@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_features_that_do_not_fit_are_refused(accuracy):
    features, labels = torch.eye(4), torch.arange(4)
    with pytest.raises(ValueError, match=r"train_features of shape \(4,\) must be \(images, dimensions\)"):
        accuracy(labels, labels, features, labels)
    with pytest.raises(ValueError, match=r"as many dimensions as train_features of shape \(4, 4\)"):
        accuracy(features, labels, features[:, :3], labels)
    with pytest.raises(ValueError, match=r"features of shape \(0, 4\) must be \(images, dimensions\), at least one"):
        accuracy(features, labels, features[:0], labels[:0])
    with pytest.raises(ValueError, match=r"train_labels of shape \(3,\) must be \(4,\): one for each image"):
        accuracy(features, labels[:3], features, labels)
    with pytest.raises(ValueError, match="features hold 2 values that are not finite"):
        accuracy(features, labels, features.masked_fill(torch.arange(4) == 1, torch.inf)[:2], labels[:2])


def test_impossible_options_are_refused(digits):
    train = torch.eye(4), torch.arange(4)
    with pytest.raises(ValueError, match="neighbours=0 must be at least 1"):
        knn_accuracy(*train, *train, neighbours=0)
    for temperature in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature={temperature} must be positive"):
            knn_accuracy(*train, *train, temperature=temperature)
    with pytest.raises(ValueError, match="at least 2 classes"):
        linear_probe_accuracy(train[0], torch.zeros(4, dtype=torch.long), *train)
    with pytest.raises(ValueError, match="max_images=0 must be at least 1"):
        probe(tiny_model(ViTCustomModel, "vit"), digits, digits, 4, "cpu", max_images=0, seed=0)


# ----------------------------------------------------------------------------------------------------------- probing


def test_images_are_drawn_by_the_seed(digits):
    def labels(seed: int, max_images: int = 100) -> list[int]:
        return list(draw_images(digits, max_images, seed).with_format(None)["label"])

    assert len(labels(0)) == 100
    assert set(labels(0)) == set(range(10))
    assert labels(0) == labels(0) != labels(1)
    assert labels(0, max_images=10**6) == list(digits.with_format(None)["label"])


def test_an_encoder_with_random_weights_knows_something_of_digits(digits):
    model = tiny_model(ViTCustomForImageClassification, "vit")
    train, evaluated = digits.select(range(1000)), digits.select(range(1000, 1797))
    accuracies = probe(model, train, evaluated, 64, "cpu", max_images=200, seed=0)
    assert list(accuracies) == ["knn_accuracy", "linear_probe_accuracy"]
    # Twice as much as chance, which is 1 in 10.
    assert all(type(accuracy) is float and accuracy > 0.2 for accuracy in accuracies.values())
    features = extract_features(model, draw_images(train, 200, 0), 200, "cpu")
    evaluated_features = extract_features(model, draw_images(evaluated, 200, 0), 200, "cpu")
    assert accuracies == {
        "knn_accuracy": knn_accuracy(*features, *evaluated_features),
        "linear_probe_accuracy": linear_probe_accuracy(*features, *evaluated_features),
    }
