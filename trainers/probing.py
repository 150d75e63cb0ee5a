"""How good an encoder's features are without training it: nearest neighbours and a linear classifier on top."""

import random

import torch
import torch.nn.functional as F
from datasets import Dataset
from datasets.utils import tqdm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator


# Similarities held at a time, 64 MiB of them.
MAX_SIMILARITIES = 2**24


def probe(
    model: PreTrainedModel,
    train: Dataset,
    evaluated: Dataset,
    batch_size: int,
    device: torch.device | str,
    max_images: int,
    seed: int,
) -> dict[str, float]:
    """Accuracies `knn_accuracy` and `linear_probe_accuracy` of an encoder's features.

    Args:
        model: Any model of the family; its head, if it has one, plays no part.
        train: What neighbours are looked for in and the linear classifier is fitted to; see `extract_features`.
        evaluated: What the accuracies are measured on.
        batch_size: Images that the encoder sees at a time.
        device: Where the encoder runs.
        max_images: At most so many images of each data set, drawn at random.
        seed: Of that draw.

    Raises:
        ValueError: if there are no images, or features are not finite.
    """
    if max_images < 1:
        raise ValueError(f"max_images={max_images} must be at least 1")
    features = [
        *extract_features(model, draw_images(train, max_images, seed), batch_size, device),
        *extract_features(model, draw_images(evaluated, max_images, seed), batch_size, device),
    ]
    return {"knn_accuracy": knn_accuracy(*features), "linear_probe_accuracy": linear_probe_accuracy(*features)}


def draw_images(dataset: Dataset, max_images: int, seed: int) -> Dataset:
    """At most so many rows, drawn at random, in their order."""
    rows = random.Random(seed).sample(range(len(dataset)), min(max_images, len(dataset)))
    return dataset.select(sorted(rows))


def extract_features(
    model: PreTrainedModel, dataset: Dataset, batch_size: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Pooled output of the encoder (N, D), in fp32, and labels (N,), both on the CPU.

    The model is moved to the device and otherwise left as it was.

    Args:
        model: Any model of the family; what its base model pools is extracted.
        dataset: Rows of `pixel_values` (C, H, W) and `labels`, as `trainers.data.with_transform` makes them.
        batch_size: Images that the encoder sees at a time.
        device: Where the encoder runs.

    Raises:
        ValueError: if the data set holds no images.
    """
    if not len(dataset):
        raise ValueError("the data set holds no images to extract features of")
    encoder = model.to(device).base_model
    batches = DataLoader(dataset, batch_size, collate_fn=default_data_collator)
    features, labels = [], []
    # Frozen parts may be in evaluation mode while the rest is in training.
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.inference_mode():
            for batch in tqdm(batches, desc="Extracting features", leave=False):
                outputs = encoder(batch["pixel_values"].to(device), return_dict=True)
                features.append(outputs.pooler_output.float().cpu())
                labels.append(batch["labels"])
    finally:
        for module, training in modes.items():
            module.training = training
    # Outside the inference mode: what is made inside can never take part in a backward pass.
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of images (M, D) whose nearest training images (N, D), by cosine similarity, vote for the true class.

    A vote weighs exp(similarity / temperature): https://arxiv.org/abs/1805.01978, section 3.4. Where there are fewer
    training images than neighbours, all of them vote.

    Raises:
        ValueError: if shapes do not fit, features are not finite, or there are no neighbours or no temperature.
    """
    _check_features(train_features, train_labels, features, labels)
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    neighbours = min(neighbours, len(train_features))
    num_classes = int(train_labels.max()) + 1
    train_features = F.normalize(train_features.float(), dim=-1)
    chunk_size = max(1, MAX_SIMILARITIES // max(len(train_features), num_classes))
    correct = 0
    for queries, true_classes in zip(features.split(chunk_size), labels.split(chunk_size)):
        similarities = F.normalize(queries.float(), dim=-1) @ train_features.T
        nearest, indices = similarities.topk(neighbours)
        # Relative to the nearest, or a low temperature would overflow.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(queries), num_classes).scatter_add_(1, train_labels[indices], weights)
        correct += int((votes.argmax(dim=-1) == true_classes).sum())
    return correct / len(labels)


def linear_probe_accuracy(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> float:
    """Share of images (M, D) that a linear classifier, fitted to the training images (N, D), gets right.

    Multinomial logistic regression on standardised features, with scikit-learn's default penalty.

    Raises:
        ValueError: if shapes do not fit, features are not finite, or all training images are of one class.
    """
    _check_features(train_features, train_labels, features, labels)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train_features.double().numpy(), train_labels.numpy())
    return float(classifier.score(features.double().numpy(), labels.numpy()))


def _check_features(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> None:
    for name, rows, classes in (("train_", train_features, train_labels), ("", features, labels)):
        shape = tuple(rows.shape)
        if len(shape) != 2 or 0 in shape or shape[1] != train_features.shape[-1]:
            raise ValueError(
                f"{name}features of shape {shape} must be (images, dimensions), at least one image and as many "
                f"dimensions as train_features of shape {tuple(train_features.shape)}"
            )
        if tuple(classes.shape) != shape[:1]:
            raise ValueError(f"{name}labels of shape {tuple(classes.shape)} must be {shape[:1]}: one for each image")
        if not rows.isfinite().all():
            raise ValueError(f"{name}features hold {int((~rows.isfinite()).sum())} values that are not finite")
