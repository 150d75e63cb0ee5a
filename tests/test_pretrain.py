"""Pretraining: what it leaves behind, what fine-tuning makes of that, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_finetune import SHORT, error_of
from tiny_models import random_images, tiny_model
from transformers import AutoModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

from modeling_vit_custom import (
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
)
from modeling_vit_custom.modeling_vit_custom import patchify
from trainers.arguments import DataArguments
from trainers.data import load_splits
from trainers.finetune import main as finetune
from trainers.image_ops import to_arrays
from trainers.pretrain import main as pretrain
from trainers.reconstruction import reconstruct


MASKED = {
    "masked_autoencoder": ("vit_nano_patch2_8", ViTCustomForPreTraining),
    "masked_image_modeling": ("swin_nano_patch1_window4_8", ViTCustomForMaskedImageModeling),
}


def run(folder, objective="masked_autoencoder", *argv):
    model = MASKED[objective][0]
    given = ["--objective", objective, "--model", model, "--dataset", "digits", "--output_dir", str(folder)]
    pretrain([*given, "--probe_images", "60", *SHORT, "--card_images", "4", *argv])
    return folder


@pytest.fixture(scope="module", params=MASKED)
def pretrained(request, tmp_path_factory):
    return request.param, run(tmp_path_factory.mktemp("runs") / request.param, request.param)


def test_a_run_leaves_an_encoder_that_opens(pretrained):
    objective, folder = pretrained
    encoder = AutoModel.from_pretrained(folder)
    assert isinstance(encoder, ViTCustomModel)
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in encoder.state_dict().items())
    assert type(MASKED[objective][1].from_pretrained(folder)) is MASKED[objective][1]


def test_a_run_says_how_good_the_features_are(pretrained):
    _, folder = pretrained
    results = json.loads((folder / "all_results.json").read_text())
    assert results["validation_loss"] > 0
    assert 0 <= results["validation_knn_accuracy"] <= 1
    assert 0.2 < results["validation_linear_probe_accuracy"] <= 1  # ten digits, and random features know something
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "pretrained by reconstructing masked images" in card.text
    assert f"| Loss | {results['validation_loss']:.4f} |" in card.text
    with Image.open(folder / "reconstructions.png") as figure:
        assert figure.size[1] > figure.size[0] > 300


def test_no_title_of_the_reconstructions_is_cut_off(tmp_path):
    folder = run(tmp_path, "masked_autoencoder", "--config_overrides", "norm_pix_loss=true")
    with Image.open(folder / "reconstructions.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    assert (pixels[:, [0, -1]] == 255).all() and (pixels[[0, -1]] == 255).all()


def test_the_loss_of_a_run_is_that_of_its_model(pretrained):
    """Masks are drawn from the training seed, so that the figure can be had again."""
    _, folder = pretrained
    results = json.loads((folder / "all_results.json").read_text())
    (folder.parent / "again").mkdir(exist_ok=True)
    argv = ["--model", str(folder), "--learning_rate", "1e-12", "--optimizer", "sgd", "--overwrite", "true"]
    objective = pretrained[0]
    run(folder.parent / "again", objective, *argv)
    again = json.loads((folder.parent / "again" / "all_results.json").read_text())
    assert again["validation_loss"] == pytest.approx(results["validation_loss"], rel=1e-5)


def test_fine_tuning_starts_from_what_was_pretrained(pretrained, tmp_path):
    _, folder = pretrained
    argv = ["--dataset", "digits", "--model", str(folder), "--output_dir", str(tmp_path / "tuned"), *SHORT]
    finetune([*argv, "--learning_rate", "1e-12", "--optimizer", "sgd"])
    tuned, before = (load_file(path / "model.safetensors") for path in (tmp_path / "tuned", folder))
    shared = before.keys() & tuned.keys()
    assert all(torch.allclose(tuned[name], before[name], atol=1e-6) for name in shared)
    assert any(".blocks." in name for name in shared)


def test_a_masked_autoencoder_is_tuned_with_a_norm_behind_its_pooling(tmp_path):
    folder = run(tmp_path / "mae", "masked_autoencoder", "--config_overrides", "position_embedding_type=sincos2d")
    argv = ["--recipe", "mae_finetune", "--dataset", "digits", "--model", str(folder), "--output_dir"]
    finetune([*argv, str(tmp_path / "tuned"), "--bf16", "false", *SHORT])
    model = ViTCustomForImageClassification.from_pretrained(tmp_path / "tuned")
    assert model.config.norm_after_pooling
    assert isinstance(model.model.norm, torch.nn.Identity)
    before = load_file(folder / "model.safetensors")["model.stages.0.position_embedding.weight"]
    after = model.model.stages[0].position_embedding.weight
    assert isinstance(after, torch.nn.Parameter)  # fixed before, learnt from here on
    assert 0 < (after - before).abs().max() < 1e-2


def test_averages_are_what_is_judged_and_saved(tmp_path):
    folder = run(tmp_path / "ema", "masked_autoencoder", "--ema_decay", "0.5", "--learning_rate", "1e-2")
    checkpoint = next(folder.glob("checkpoint-*"))
    averages = load_file(checkpoint / "ema.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], average) for name, average in averages.items())


def test_images_without_classes_will_do(tmp_path):
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    folder = run(tmp_path / "out", "masked_autoencoder", "--dataset", str(tmp_path / "images"))
    results = json.loads((folder / "all_results.json").read_text())
    assert results["validation_loss"] > 0
    assert "validation_knn_accuracy" not in results
    card = (folder / "README.md").read_text()
    assert "| validation | 4 |" in card


def test_all_of_train_can_be_learnt_from(tmp_path, capsys):
    folder = run(tmp_path / "out", "masked_autoencoder", "--validation_fraction", "0")
    printed = capsys.readouterr().out
    assert "1,797 train images" in printed
    assert "not judged after" in printed
    card = (folder / "README.md").read_text()
    assert "## Results" not in card
    assert (folder / "reconstructions.png").is_file()


def test_features_that_cannot_be_judged_cost_nothing_else(tmp_path, capsys):
    folder = run(tmp_path / "out", "masked_autoencoder", "--probe_images", "1")
    assert "The features could not be judged: " in capsys.readouterr().out
    assert json.loads((folder / "all_results.json").read_text())["validation_loss"] > 0
    assert (folder / "README.md").is_file()


def test_labels_that_are_missing_judge_nothing(tmp_path):
    for index in range(24):
        folder = tmp_path / "images" / (f"train/c{index % 2}" if index < 16 else "val")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (10 * index, 0, 0)).save(folder / f"{index}.png")
    folder = run(tmp_path / "out", "masked_autoencoder", "--dataset", str(tmp_path / "images"))
    results = json.loads((folder / "all_results.json").read_text())
    assert "validation_loss" in results
    assert "validation_knn_accuracy" not in results


def test_the_same_images_are_held_out_as_in_fine_tuning(tmp_path):
    arguments = DataArguments(dataset="digits")
    splits = [load_splits(arguments, needs_labels=needed)["validation"] for needed in (True, False)]
    assert splits[0]["label"] == splits[1]["label"]
    assert splits[0][5]["image"].tobytes() == splits[1][5]["image"].tobytes()


def test_a_stream_is_learnt_from(tmp_path):
    load_splits(DataArguments(dataset="digits"))["train"].to_parquet(tmp_path / "images" / "train.parquet")
    folder = run(tmp_path / "out", "masked_autoencoder", "--dataset", str(tmp_path / "images"), "--streaming", "true")
    results = json.loads((folder / "all_results.json").read_text())
    assert results["train_loss"] > 0
    assert (folder / "reconstructions.png").is_file()


def test_supervised_pretraining_is_a_classifier(tmp_path, capsys):
    argv = ["--recipe", "quickstart", "--output_dir", str(tmp_path), *SHORT]
    pretrain(argv)
    assert "3 held-out images through pipeline" in capsys.readouterr().out
    assert "python -m trainers.pretrain \\\n  --recipe quickstart" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--objective", "mae"], "objective='mae' must be one of supervised, masked_autoencoder"),
        (["--mixup", "0.8"], "--mixup means nothing for --objective masked_autoencoder: leave it out"),
        (["--label_smoothing", "0.1"], "--label_smoothing means nothing"),
        (["--lora_rank", "4"], "--lora_rank means nothing"),
        (["--model", "swin_nano_patch1_window4_8"], "a masked autoencoder needs a single stage"),
        (["--config_overrides", "mask_ratio=0.0"], "mask_ratio=0.0 hides none of 16 patch(es)"),
        (["--per_device_train_batch_size", "2000"], "per_device_train_batch_size=2000 on 1 device(s) is more than"),
        (["--streaming", "true"], "--streaming true needs --max_steps"),
        (["--probe_images", "-1"], "probe_images=-1 must be 0 or more"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(argv, message, tmp_path, capsys):
    given = ["--objective", "masked_autoencoder", "--model", "vit_nano_patch2_8", "--dataset", "digits"]
    line = error_of(capsys, [*given, "--output_dir", str(tmp_path / "out"), *argv], pretrain)
    assert line.startswith("pretrain: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_another_family_is_not_pretrained(tmp_path, capsys):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    given = ["--objective", "masked_image_modeling", "--dataset", "digits", "--output_dir", str(tmp_path / "out")]
    line = error_of(capsys, [*given, "--model", str(tmp_path / "vit")], pretrain)
    assert "is a vit: only a vit_custom can be pretrained" in line


@pytest.mark.parametrize("size", [(32, 32), (30, 27)], ids=str)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_reconstruction_keeps_what_was_seen(size, norm_pix_loss):
    model = tiny_model(ViTCustomForPreTraining, "vit", norm_pix_loss=norm_pix_loss)
    pixels = random_images(3, *size)
    torch.manual_seed(0)
    mask, reconstructed = reconstruct(model, pixels)
    assert mask.shape == pixels.shape
    assert torch.equal(reconstructed.masked_fill(mask, 0), pixels.masked_fill(mask, 0))
    torch.manual_seed(0)
    outputs = model(pixels)
    patches = outputs.logits
    if norm_pix_loss:
        own = patchify(pixels, model.patch_size)
        patches = patches * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
    hidden = outputs.mask.bool()
    # Of patches that lie inside the image, all predicted pixels are shown.
    rows, columns = (side // model.patch_size for side in size)
    grid = torch.zeros(-(-size[0] // model.patch_size), -(-size[1] // model.patch_size), dtype=torch.bool)
    grid[:rows, :columns] = True
    hidden &= grid.flatten()
    shown = patchify(reconstructed, model.patch_size)
    torch.testing.assert_close(shown[hidden], patches[hidden])


@pytest.mark.parametrize("architecture", ["vit", "swin", "pvt"])
def test_masked_images_are_filled_in_by_the_model(architecture):
    model = tiny_model(ViTCustomForMaskedImageModeling, architecture, mask_patch_size=16)
    pixels = random_images(2)
    torch.manual_seed(0)
    mask, reconstructed = reconstruct(model, pixels)
    torch.manual_seed(0)
    expected = model(pixels).reconstruction
    assert 0 < mask.float().mean() < 1
    torch.testing.assert_close(reconstructed, torch.where(mask, expected, pixels))


def test_arrays_are_the_pixels_before_they_were_normalised():
    images = torch.randint(0, 256, (2, 3, 4, 5))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    pixels = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    arrays = to_arrays(pixels, mean, std)
    assert arrays[0].dtype == np.uint8
    assert np.array_equal(np.stack(arrays), images.permute(0, 2, 3, 1).numpy())
