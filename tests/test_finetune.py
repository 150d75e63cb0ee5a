"""The training script: what it leaves behind, what it refuses, and how recipes and flags combine."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from model_cards.facts import read_run
from model_cards.metadata import find_card_errors
from modeling_vit_custom import ViTCustomForImageClassification, preset_config
from trainers.arguments import (
    RECIPES,
    AugmentationArguments,
    DataArguments,
    LossArguments,
    ModelArguments,
    PretrainingArguments,
    TrainingArguments,
    list_recipes,
    parse_arguments,
    read_recipe,
    write_recipe,
)
from trainers.augmentation import Augmentation, Crop
from trainers.data import load_splits, processor_transform
from trainers.draws import Draws
from trainers.finetune import main as finetune
from trainers.illustrations import write_examples
from trainers.models import make_model, parse_overrides, read_processor
from trainers.pretrain import main as pretrain
from trainers.runs import is_whole, last_checkpoint


SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--disable_tqdm", "true", "--report_to", "none"]
SHORT += ["--card_images", "0"]
FILES = {
    "README.md",
    "recipe.yaml",
    "all_results.json",
    "attention.png",
    "attention_distance.png",
    "calibration.png",
    "config.json",
    "configuration_vit_custom.py",
    "confusion_matrix.png",
    "examples",
    "filters.png",
    "kernels.py",
    "model.safetensors",
    "modeling_vit_custom.py",
    "positions.png",
    "predictions.png",
    "preprocessor_config.json",
    "run.json",
    "training_curves.png",
    "trainer_state.json",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder that two steps on the digits left."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    argv = ["--recipe", "quickstart", "--output_dir", str(folder), "--logging_steps", "1", *SHORT]
    finetune([*argv, "--card_images", "4"])
    return folder


def parse(argv, more=()):
    dataclasses = [ModelArguments, DataArguments, AugmentationArguments, LossArguments, TrainingArguments, *more]
    return parse_arguments(dataclasses, argv, "finetune", "", "")


def error_of(capsys, argv, command=finetune) -> str:
    """What a command prints for a user's mistake; it must be one line and exit with 2."""
    with pytest.raises(SystemExit) as exit_status:
        command(argv)
    assert exit_status.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_leaves_a_complete_folder(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} >= FILES
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageClassification"].endswith("ViTCustomForImageClassification")
    assert list(config["label2id"]) == list("0123456789")
    results = json.loads((checkpoint / "all_results.json").read_text())
    assert 0 <= results["validation_accuracy"] <= 1
    with Image.open(checkpoint / "training_curves.png") as curves:
        assert min(curves.size) > 300


def test_the_card_tells_what_was_measured(checkpoint):
    card = ModelCard.load(checkpoint / "README.md")
    results = json.loads((checkpoint / "all_results.json").read_text())
    reported = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert reported["accuracy"] == pytest.approx(results["validation_accuracy"], abs=1e-4)
    assert "--recipe quickstart" in card.text
    assert "(360 images), held out of the train split of scikit-learn's handwritten digits." in card.text
    assert card.data.eval_results[0].dataset_type == "local"
    assert "vit_nano_patch2_8".replace("_", "\\_") in card.text
    assert find_card_errors((checkpoint / "README.md").read_text(encoding="utf-8"), checkpoint) == []
    run = read_run(checkpoint)
    assert run.confusion_matrix.sum() == 360
    assert sum(images for images, _, _ in run.calibration) == 360
    assert run.label_names == list("0123456789")
    held_out = run.confusion_matrix.sum(axis=1)
    assert (run.train_counts + held_out == np.bincount(load_digits().target)).all()
    assert [widget["example_title"] in run.label_names for widget in card.data.widget] == [True] * 3
    assert str(checkpoint.parent) not in (checkpoint / "run.json").read_text()


def test_the_card_tells_what_was_left_out(tmp_path):
    share = ["--train_fraction", "0.5", "--train_imbalance", "4", "--logit_adjustment", "1"]
    finetune(["--recipe", "quickstart", "--output_dir", str(tmp_path), *SHORT, *share])
    run = read_run(tmp_path)
    splits = load_splits(DataArguments(dataset="digits", train_fraction=0.5, train_imbalance=4.0))
    assert run.train_counts == np.bincount(splits["train"]["label"]).tolist()
    assert run.split_sizes["train"] == sum(run.train_counts)
    assert run.rebalancing == {"logit_adjustment": 1.0}
    assert "a share of 0.5 of the training images of the first class" in (tmp_path / "README.md").read_text(
        encoding="utf-8"
    )


def test_the_card_tells_who_taught_and_what_the_images_are_called(checkpoint, tmp_path):
    taught = ["--teacher", str(checkpoint), "--dataset_title", "Digits of 1998"]
    finetune(["--recipe", "quickstart", "--output_dir", str(tmp_path / "out"), *SHORT, *taught])
    run, text = read_run(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (run.teacher, run.teacher_folder, run.dataset_title) == (None, checkpoint.name, "Digits of 1998")
    assert "taught by the local checkpoint" in text and "of Digits of 1998" in text


def test_the_pipeline_scores_what_the_run_scored(checkpoint):
    held_out = load_splits(DataArguments(dataset="digits"))["validation"]
    classifier = pipeline("image-classification", model=str(checkpoint), device="cpu")
    images = [image.convert("RGB") for image in held_out["image"]]
    best = [scores[0]["label"] for scores in classifier(images, top_k=1, batch_size=60)]
    accuracy = sum(label == str(truth) for label, truth in zip(best, held_out["label"])) / len(best)
    results = json.loads((checkpoint / "all_results.json").read_text())
    assert accuracy == pytest.approx(results["validation_accuracy"])


def test_a_checkpoint_is_fine_tuned_on_other_classes_and_sizes(checkpoint, tmp_path, capsys):
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (20 + index, 12), colour).save(tmp_path / "images" / name / f"{index}.png")
    output_dir = tmp_path / "colours"
    argv = ["--dataset", str(tmp_path / "images"), "--model", str(checkpoint), "--output_dir", str(output_dir)]
    finetune([*argv, "--image_size", "32", "--horizontal_flip", "0.5", "--min_crop", "0.5", *SHORT])
    model = AutoModelForImageClassification.from_pretrained(output_dir)
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert model.config.image_size == 32
    assert model.model.stages[0].position_embedding.weight.shape[1] == 64
    assert json.loads((output_dir / "preprocessor_config.json").read_text())["size"] == {"height": 32, "width": 32}
    printed = capsys.readouterr().out
    assert "3 held-out images through pipeline" in printed
    assert printed.count("classified as") == 3


def test_resampled_positions_not_random_ones(checkpoint):
    small, _ = make_model(ModelArguments(model=str(checkpoint)), list("0123456789"))
    large, _ = make_model(ModelArguments(model=str(checkpoint), image_size=32), list("0123456789"))
    before, after = (model.model.stages[0].position_embedding for model in (small, large))
    assert (before.interpolate((8, 8)) == after.weight).all()


def test_an_encoder_never_starts_from_random_weights(checkpoint, tmp_path, capsys):
    argv = ["--dataset", "digits", "--model", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    message = error_of(capsys, [*argv, "--config_overrides", "image_size=32"])
    assert "has no weights that fit model.stages.0.position_embedding.weight (1 tensors)" in message
    assert "has no weights that fit" in error_of(capsys, [*argv, "--config_overrides", "hidden_size=256"])


def test_a_run_can_be_repeated_from_its_own_folder(checkpoint):
    recipe = checkpoint / "recipe.yaml"
    first = parse(["--recipe", "quickstart", "--logging_steps", "1", *SHORT, "--card_images", "4"])[-1]
    assert {**parse(["--recipe", str(recipe)])[-1], "output_dir": "runs/digits"} == first


def test_a_repeated_run_replaces_nothing(tmp_path):
    """What was said of one output folder is not said of the next."""
    given = {"learning_rate": 0.1, "output_dir": "a", "overwrite": True, "resume_from_checkpoint": "true"}
    write_recipe(tmp_path / "recipe.yaml", given)
    assert read_recipe(str(tmp_path / "recipe.yaml")) == {"learning_rate": 0.1}


def test_checkpoints_of_a_run_that_ended_early_are_kept(tmp_path, capsys):
    for step, file in {2: "trainer_state.json", 10: "trainer_state.json", 11: "model.safetensors"}.items():
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "out" / f"checkpoint-{step}" / file).write_text("{}")
    (tmp_path / "out" / "checkpoint-12").mkdir()
    (tmp_path / "out" / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 12, "log_his')  # killed
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-10")
    argv = ["--dataset", "digits", "--model", "vit_nano_patch2_8", "--output_dir", str(tmp_path / "out")]
    assert "pass --resume_from_checkpoint true to go on" in error_of(capsys, argv)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_a_checkpoint_of_which_a_part_is_gone_is_none(tmp_path):
    """As after a kill while it was being deleted."""
    argv = ["--recipe", "quickstart", "--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "1"]
    finetune([*argv, *SHORT, "--save_total_limit", "2"])
    first, second = sorted(tmp_path.glob("checkpoint-*"))
    assert is_whole(first)
    assert is_whole(second)
    (tmp_path / "checkpoint-averaged").mkdir()  # somebody's own
    (tmp_path / "checkpoint-9").touch()
    for part in ("optimizer.pt", "model.safetensors", "rng_state.pth"):
        (second / part).rename(second / "elsewhere")
        assert last_checkpoint(tmp_path) == str(first)
        (second / "elsewhere").rename(second / part)
    assert last_checkpoint(tmp_path) == str(second)


def test_a_run_goes_on_where_it_ended(tmp_path, capsys):
    argv = ["--recipe", "quickstart", "--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "2"]
    finetune([*argv, *SHORT])
    state_file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state["stateful_callbacks"]["Spent"]["attributes"]["before"]["seconds"] += 3600
    state_file.write_text(json.dumps(state))
    finetune([*argv, *SHORT, "--max_steps", "3", "--resume_from_checkpoint", "true"])
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3
    assert "| Wall time | 1 h 00 min |" in (tmp_path / "README.md").read_text()
    (saved,) = tmp_path.glob("checkpoint-*")
    again = [*argv, *SHORT, "--resume_from_checkpoint", str(saved)]
    assert "nothing is left to train" in error_of(capsys, again)


def test_weights_alone_are_not_resumed(tmp_path, capsys):
    argv = ["--recipe", "quickstart", "--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "1"]
    finetune([*argv, *SHORT, "--save_only_model", "true"])
    again = [*argv, *SHORT, "--max_steps", "9", "--resume_from_checkpoint", "true"]
    assert "holds weights alone: fine-tune it by --model, or start again" in error_of(capsys, again)


def test_a_run_of_another_optimizer_is_not_resumed(tmp_path, capsys):
    argv = ["--recipe", "quickstart", "--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "1"]
    finetune([*argv, *SHORT])
    again = [*argv, *SHORT, "--max_steps", "9", "--resume_from_checkpoint", "true", "--optimizer", "sgd"]
    with pytest.raises(SystemExit) as ended:
        finetune(again)
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch("finetune: error: .* is of another optimizer .*: resume with the arguments it had", last)


def test_a_classifier_of_several_heads_is_trained(tmp_path):
    """DeiT's of transformers computes no loss, and gives the logits of its two heads as well."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = DeiTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "deit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "deit")
    out = tmp_path / "out"
    finetune(["--dataset", "digits", "--model", str(tmp_path / "deit"), "--output_dir", str(out), *SHORT])
    assert 0 <= json.loads((out / "all_results.json").read_text())["validation_accuracy"] <= 1
    assert "Macro F1" in (out / "README.md").read_text()


def test_a_broken_image_of_a_stream_ends_in_one_line(tmp_path):
    good = io.BytesIO()
    Image.new("RGB", (8, 8)).save(good, "png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": good.getvalue() if row != 5 else b"nothing", "path": f"{row}.png"} for row in range(8)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 4}, features=features)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    argv = ["--dataset", str(tmp_path / "data"), "--model", "vit_nano_patch2_8", "--output_dir", str(tmp_path / "out")]
    argv += ["--streaming", "true", "--max_steps", "9", "--validation_fraction", "0", "--dataloader_num_workers", "1"]
    command = [sys.executable, "-m", "trainers.pretrain", *argv, "--objective", "masked_autoencoder"]
    ended = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    line = r"^pretrain: error: image 5\.png of the stream .*; --on_corrupt skip leaves it out$"
    assert re.search(line, ended.stderr, re.MULTILINE)


def test_what_cannot_be_written_to_is_found_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["--dataset", "digits", "--model", "vit_nano_patch2_8", "--output_dir"]
    assert "is a file: give a folder" in error_of(capsys, [*argv, str(tmp_path / "file")])
    assert "output_dir '/proc/no/such' cannot be written to" in error_of(capsys, [*argv, "/proc/no/such"])


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys):
    argv = ["--recipe", "quickstart", "--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "2"]
    command = [sys.executable, "-m", "trainers.finetune", *argv, "--disable_tqdm", "true"]
    log, deadline = tmp_path / "log", time.monotonic() + 120
    # What runs in the background ignores this signal, and so would what it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr, preexec_fn=heed) as process:
        try:
            while last_checkpoint(tmp_path) is None:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    message = log.read_text()
    assert "Traceback" not in message and "%|" not in message
    same = r"interrupted at step \d+: .*checkpoint-\d+ is complete: the same command goes on from there"
    assert re.search(same, message)
    differs = error_of(capsys, [*argv, "--learning_rate", "1e-4"])
    assert "holds an unfinished run with no --disable_tqdm" not in differs
    assert re.search(
        r"holds an unfinished run with --learning_rate 0\.001, and now there is --learning_rate 0\.0001: "
        r"pass --resume_from_checkpoint true to go on, --overwrite true to start again",
        differs,
    )


def test_a_run_that_diverges_leaves_no_model(tmp_path, capsys):
    argv = ["--recipe", "quickstart", "--output_dir", str(tmp_path), "--learning_rate", "1e38", *SHORT]
    with pytest.raises(SystemExit, match="training diverged"):
        finetune(argv)
    assert not (tmp_path / "README.md").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_full_output_folder_is_not_replaced(checkpoint, capsys):
    before = (checkpoint / "model.safetensors").read_bytes()
    argv = ["--dataset", "digits", "--model", "vit_nano_patch2_8", "--output_dir", str(checkpoint)]
    assert "already holds a model: pass --overwrite" in error_of(capsys, argv)
    elsewhere = ["--resume_from_checkpoint", str(checkpoint.parent / "other" / "checkpoint-2")]
    assert "already holds another run than" in error_of(capsys, [*argv, *elsewhere])
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_figures_of_something_else_are_not_replaced(tmp_path, capsys):
    (tmp_path / "attention.png").write_bytes(b"mine")
    argv = ["--dataset", "digits", "--model", "vit_nano_patch2_8", "--output_dir", str(tmp_path)]
    assert "holds a attention.png, in whose place the model's would come" in error_of(capsys, argv)
    assert (tmp_path / "attention.png").read_bytes() == b"mine"


def test_examples_of_somebody_else_stay(tmp_path):
    (tmp_path / "examples").mkdir()
    for name in ("2024-holiday.png", "7.png"):
        (tmp_path / "examples" / name).touch()
    write_examples(tmp_path, load_splits(DataArguments(dataset="digits"))["validation"], 2)
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == ["1.png", "2.png", "2024-holiday.png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --model, --dataset"),
        (
            ["--dataset", "digits", "--model", "vit_nano"],
            "there is no model 'vit_nano'...did you mean 'vit_nano_patch2_8'",
        ),
        (["--dataset", "digits", "--model", "."], "'.' holds no config.json"),
        (["--dataset", "no_such_folder/x/y", "--model", "vit_nano_patch2_8"], "there is no folder"),
        (["--recipe", "no_such"], "there is no recipe 'no_such'"),
        (["--recipe", "quickstart", "--num_epochs", "3"], "'--num_epochs'; did you mean '--num_train_epochs'?"),
        (["--recipe", "quickstart", "--dataloader_drop_last", "true"], "would leave images out of the evaluation"),
        (["--recipe", "quickstart", "--report_to", "nothing"], "nothing"),
        (["--recipe", "quickstart", "--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--recipe", "quickstart", "--config_overrides", "num_attention_heads=5"], "hidden_size=128 is not"),
        (["--recipe", "quickstart", "--config_overrides", "hidden_size=wide"], "hidden_size"),
        (["--recipe", "quickstart", "--config_overrides", "heads=3"], "unknown field 'heads'"),
        (["--recipe", "quickstart", "--config_overrides", "pooling"], "'pooling' must be FIELD=VALUE"),
        (["--recipe", "quickstart", "--image_size", "0"], "image_size=0 must be at least 1"),
        (["--recipe", "quickstart", "--rotation", "-5"], "rotation=-5.0"),
        (["--recipe"], "expected one argument"),
        (["--recipe", "quickstart", "--config_overrides", "depths=[2,2"], "'depths=[2,2' is not YAML"),
        (["--recipe", "quickstart", "--config_overrides", "id2label={0: a}"], "the data set decides on id2label"),
        (["--recipe", "quickstart", "--config_overrides", "num_channels=1"], "num_channels=1: images are read in RGB"),
        (["--recipe", "quickstart", "--image_size", "1"], "image_size=1 is smaller than one patch"),
        (["--recipe", "quickstart", "--model", "runs/nothing"], "there is no model 'runs/nothing'"),
        (["--recipe", "quickstart", "--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be"),
        (["--recipe", "quickstart", "--num_train_epochs", "0"], "num_train_epochs=0.0 must be above 0"),
        (
            ["--recipe", "quickstart", "--metric_for_best_model", "acuracy"],
            "metric_for_best_model='acuracy' must be one of loss, accuracy, balanced_accuracy, macro_f1",
        ),
        (["--recipe", "quickstart", "--new_head", "true"], "--new_head true needs a checkpoint"),
        (["--recipe", "quickstart", "--learning_rate", "-1"], "learning_rate=-1.0 must be above 0"),
        (["--recipe", "quickstart", "--remove_unused_columns", "true"], "would drop the images"),
        (["--recipe", "quickstart", "--hub_token", "hf_secret"], "run `hf auth login` instead"),
        (
            ["--recipe", "quickstart", "--push_to_hub", "true"],
            "there is no token of the Hub: log in by `hf auth login`",
        ),
        (
            ["--recipe", "quickstart", "--license", "other", "--push_to_hub", "true"],
            "license='other' needs license_name and license_link in the card",
        ),
        (
            ["--recipe", "quickstart", "--license", "apache"],
            "none that the Hub knows; did you mean 'apache-2.0'",
        ),
        (["--recipe", "quickstart", "--card_images", "-1"], "card_images=-1 must be 0 or more"),
        (["--recipe", "quickstart", "--resume_from_checkpoint", "true"], "holds no checkpoint to resume from"),
        (["--recipe", "quickstart", "--resume_from_checkpoint", "x"], "'x' is no checkpoint"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(argv, message, capsys, tmp_path):
    output_dir = tmp_path / "out"
    line = error_of(capsys, [*argv, "--output_dir", str(output_dir)])
    assert all(part in line for part in message.split("..."))
    assert not output_dir.exists()


def test_a_mistake_ends_the_process_with_2_and_no_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "trainers.finetune", "--dataset", "empty", "--model", "vit_nano_patch2_8"]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("finetune: error: folder 'empty' holds no images")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_recipe_lies_between_defaults_and_flags(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("dataset: digits\nmodel: vit_nano_patch2_8\nlearning_rate: 1e-3\nrotation: 5\n")
    _, data, augmentation, _, training, given = parse(["--recipe", str(recipe), "--rotation", "7"])
    assert data.dataset == "digits"
    assert training.learning_rate == 1e-3
    assert augmentation.rotation == 7
    assert training.num_train_epochs == 10
    assert given == {"dataset": "digits", "model": "vit_nano_patch2_8", "learning_rate": 1e-3, "rotation": 7}


def test_an_unknown_recipe_field_is_named(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rte: 1.0e-3\n")
    with pytest.raises(ValueError, match="has an unknown field 'learning_rte'"):
        parse(["--recipe", str(recipe)])
    recipe.write_text("- 1\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        parse(["--recipe", str(recipe)])
    recipe.write_text("model: vit_nano_patch2_8\ndataset: digits\nrotation: [1, 2]\n")
    with pytest.raises(ValueError, match="unknown argument '2'"):
        parse(["--recipe", str(recipe)])
    recipe.write_text(
        "model: vit_nano_patch2_8\ndataset: digits\nlr_scheduler_kwargs: {num_cycles: 2}\nconfig_overrides: []\n"
    )
    assert parse(["--recipe", str(recipe)])[4].lr_scheduler_kwargs == {"num_cycles": 2}
    recipe.write_text("model: vit_nano_patch2_8\ndataset: digits\nrotation: much\nmin_crop: null\n")
    with pytest.raises(ValueError, match="invalid float value: 'much'"):
        parse(["--recipe", str(recipe)])


# A small model for each recipe that is not for a checkpoint.
SMALL_MODELS = {
    "cifar10_deit_distilled": "deit_nano_distilled_patch2_8",
    "cifar10_mae": "vit_nano_patch2_8",
    "cifar10_pvt": "pvt_nano_8",
    "cifar10_swin": "swin_nano_patch1_window4_8",
    "cifar10_vit": "vit_nano_patch2_8",
    "deit": "vit_nano_patch2_8",
    "deit3": "vit_nano_patch2_8",
    "deit_distilled": "deit_nano_distilled_patch2_8",
    "mae": "vit_nano_patch2_8",
    "pvt": "pvt_nano_8",
    "quickstart": "vit_nano_patch2_8",
    "simmim": "swin_nano_patch1_window4_8",
    "swin": "swin_nano_patch1_window4_8",
    "vit": "vit_nano_patch2_8",
}


SCRIPTS = {"finetune": finetune, "pretrain": pretrain}


def script_of(name: str) -> str:
    """The one that the recipe's header names."""
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    (script,) = re.findall(rf"-m trainers\.(\w+) --recipe {name}\b", header)
    return script


# What trains one model.
TRAINING_RECIPES = [name for name in list_recipes() if script_of(name) != "scaling"]


@pytest.mark.parametrize("name", TRAINING_RECIPES)
def test_every_recipe_parses_to_what_it_says(name):
    fields = read_recipe(name)
    needed = {"model": "vit_nano_patch2_8", "dataset": "digits"}
    argv = [f"--{field}={value}" for field, value in needed.items() if field not in fields] + ["--recipe", name]
    parsed = parse(argv, [PretrainingArguments] if script_of(name) == "pretrain" else [])
    for field, value in fields.items():
        (holder,) = [arguments for arguments in parsed[:-1] if hasattr(arguments, field)]
        found = getattr(holder, field)
        assert getattr(found, "value", found) == value
    assert parsed[4].output_dir == f"runs/{ {'quickstart': 'digits'}.get(name, name) }"


@pytest.mark.parametrize("name", TRAINING_RECIPES)
def test_every_recipe_makes_a_step(name, checkpoint, tmp_path, capsys):
    argv = ["--recipe", name, "--dataset", "digits", "--model", SMALL_MODELS.get(name, str(checkpoint))]
    argv += ["--teacher", str(checkpoint)] if "distilled" in name else []
    argv += ["--validation_fraction", "0.2"] if read_recipe(name).get("validation_fraction") == 0 else []
    argv += ["--output_dir", str(tmp_path), "--image_size", "24", *SHORT, "--warmup_steps", "0"]
    # What is right for 192 pixels hides all of 24.
    argv += ["--config_overrides", "mask_patch_size=8", "window_size=4"] if name == "simmim" else []
    before = capsys.readouterr()
    script = script_of(name)
    argv += ["--logging_steps", "1"]
    argv += ["--probe_images", "50"] if script == "pretrain" else []
    SCRIPTS[script](argv)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert state["log_history"][0]["learning_rate"] > 0
    (trained,) = [entry for entry in state["log_history"] if "train_loss" in entry]
    assert trained["train_loss"] > 0
    said = "3 held-out images through pipeline" if script == "finetune" else "fine-tune it"
    assert said in capsys.readouterr().out, before


def test_a_learning_rate_for_256_images_is_scaled(tmp_path):
    argv = ["--recipe", "deit", "--gradient_accumulation_steps", "4"]
    assert parse(argv)[4].learning_rate == pytest.approx(2.5e-4 * 128 * 4 / 256)


def test_a_rate_that_is_typed_replaces_the_recipe_s():
    """Also where the recipe gives it for 256 images."""
    arguments, *_, given = parse(["--recipe", "deit", "--learning_rate", "1e-5"])[4:]
    assert arguments.learning_rate == 1e-5
    assert "base_learning_rate" not in given
    arguments = parse(["--recipe", "deit3", "--base_learning_rate", "1e-4"])[4]
    assert arguments.learning_rate == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="--learning_rate and --base_learning_rate are two ways"):
        parse(["--recipe", "vit", "--learning_rate", "1e-5", "--base_learning_rate", "1e-5"])


def test_overrides_that_are_typed_join_the_recipe_s(tmp_path):
    argv = [
        "--recipe",
        "mae_finetune",
        "--model",
        "user/name",
        "--config_overrides",
        "drop_path_rate=0.2",
        "qk_norm=true",
    ]
    model, *_, given = parse(argv)
    expected = read_recipe("mae_finetune")["config_overrides"]
    expected[-1:] = ["drop_path_rate=0.2", "qk_norm=true"]
    assert model.config_overrides == given["config_overrides"] == expected


def test_a_checkpoint_in_half_precision_is_trained_in_full(checkpoint, tmp_path):
    model = ViTCustomForImageClassification.from_pretrained(checkpoint).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    opened, _ = make_model(ModelArguments(model=str(tmp_path / "half")), list("0123456789"))
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    assert opened.config.dtype == torch.float32


def test_overwriting_leaves_no_checkpoint_of_another_run(checkpoint, tmp_path):
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / "out").mkdir(exist_ok=True)
        shutil.copy(checkpoint / name, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-900").mkdir()
    (tmp_path / "out" / "checkpoint-900" / "trainer_state.json").write_text("{}")
    finetune(["--recipe", "quickstart", "--output_dir", str(tmp_path / "out"), "--overwrite", "true", *SHORT])
    assert last_checkpoint(tmp_path / "out") is None


def test_the_card_of_a_low_rank_run_counts_what_was_published(checkpoint, tmp_path):
    argv = [
        "--recipe",
        "lora",
        "--dataset",
        "digits",
        "--model",
        str(checkpoint),
        "--output_dir",
        str(tmp_path),
        *SHORT,
    ]
    finetune(argv)
    count = ViTCustomForImageClassification.from_pretrained(tmp_path).num_parameters()
    assert f"{count / 1e6:.3f} M parameters" in (tmp_path / "README.md").read_text()


def test_the_recipe_for_own_images_takes_any_family(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    argv = ["--recipe", "finetune", "--dataset", "digits", "--model", str(tmp_path / "vit")]
    finetune([*argv, "--output_dir", str(tmp_path / "out"), *SHORT])
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.model_type == "vit"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss", "binary_cross_entropy", "--label_smoothing", "0.1"], "label_smoothing=0.1 is for cross_entropy"),
        (["--loss", "binary_cross_entropy", "--logit_adjustment", "1"], "logit_adjustment=1.0 is for cross_entropy"),
        (["--loss", "bce"], "loss='bce' must be one of"),
        (["--recipe", "cifar10_deit_distilled", "--validation_fraction", "0.2"], "--distillation needs a --teacher"),
        (["--optim", "adafactor"], "--optim adafactor is not looked at"),
        (["--class_balanced_sampling", "true", "--logit_adjustment", "1"], "does not go with --logit_adjustment"),
        (["--class_balanced_sampling", "true", "--repeated_augmentation", "3"], "with --repeated_augmentation"),
        (["--repeated_augmentation", "0"], "repeated_augmentation=0 must be at least 1"),
        (["--full_size_epochs", "1"], "full_size_epochs=1.0 needs an initial_image_size"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
        (["--lr_scheduler_kwargs", '{"nothing": 1}'], "lr_scheduler_kwargs={'nothing': 1} makes no schedule"),
        (["--base_learning_rate", "-1"], "base_learning_rate=-1.0 must be above 0"),
        (["--weight_decay", "-1"], "weight_decay=-1.0 must be 0 or more"),
        (["--teacher", "runs/nothing"], "there is no teacher 'runs/nothing'"),
        (["--mixup", "-1"], "mixup=-1.0 must be 0 or more"),
        (["--recipe", "mae"], "recipe 'mae' has an unknown field 'objective' (finetune has none"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_choices_that_nothing_would_heed_are_refused(argv, message, tmp_path, capsys):
    given = ["--dataset", "digits", "--model", "deit_nano_distilled_patch2_8", "--output_dir", str(tmp_path / "out")]
    assert message in error_of(capsys, [*given, *argv]).replace("python -m trainers.finetune", "finetune")
    assert not (tmp_path / "out").exists()


def test_averages_that_are_not_there_are_not_resumed(tmp_path, capsys):
    argv = [
        "--recipe",
        "quickstart",
        "--output_dir",
        str(tmp_path),
        *SHORT,
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ]
    finetune(argv)
    line = error_of(capsys, [*argv, "--max_steps", "4", "--resume_from_checkpoint", "true", "--ema_decay", "0.9"])
    assert "holds no averages: resume it with --ema_decay 0" in line


def test_help_shows_fields_and_examples(capsys):
    with pytest.raises(SystemExit) as exit_status:
        finetune(["--help"])
    assert exit_status.value.code == 0
    printed = capsys.readouterr().out
    assert "--recipe quickstart" in printed
    assert "--min_crop" in printed
    assert len(printed.split("options:")[0].splitlines()) < 10
    assert all(f"\n{group}:\n" in printed for group in ("model", "data", "augmentation", "loss", "training"))
    assert "--bf16 true|false" in printed
    assert "--adam_beta1" not in printed


def test_overrides_are_read_as_yaml():
    overrides = parse_overrides(["layer_norm_eps=1e-5", "pooling=mean", "qk_norm=true", "depths=[1, 2]"])
    assert overrides == {"layer_norm_eps": 1e-5, "pooling": "mean", "qk_norm": True, "depths": [1, 2]}
    model, _ = make_model(ModelArguments(model="vit_nano_patch2_8", config_overrides=["pooling=mean"]), ["a", "b"])
    assert model.config.pooling == "mean"
    assert model.config.id2label == {0: "a", 1: "b"}


def test_a_checkpoint_of_another_family_can_be_trained(tmp_path, capsys):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    argv = ["--dataset", "digits", "--model", str(tmp_path / "vit"), "--output_dir", str(tmp_path / "out")]
    finetune([*argv, *SHORT])
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_labels == 10
    assert "cannot be resized" in error_of(capsys, [*argv, "--overwrite", "--image_size", "16"])


def test_a_checkpoint_without_a_processor_gets_the_familys_own(tmp_path):
    ViTCustomForImageClassification(preset_config("vit_nano_patch2_8")).save_pretrained(tmp_path)
    _, processor = make_model(ModelArguments(model=str(tmp_path)), ["a", "b"])
    assert read_processor(processor) == ((8, 8), [0.5] * 3, [0.5] * 3)


def test_processors_are_read_as_they_work():
    cropped = ViTImageProcessor(
        size={"height": 12, "width": 12}, do_center_crop=True, crop_size={"height": 8, "width": 8}, do_normalize=False
    )
    assert read_processor(cropped) == ((8, 8), [0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="must have a height and a width"):
        read_processor(ViTImageProcessor(size={"shortest_edge": 8}))
    with pytest.raises(ValueError, match=r"rescales by 0\.5, not by 1/255"):
        read_processor(ViTImageProcessor(size={"height": 8, "width": 8}, rescale_factor=0.5))


@pytest.mark.parametrize("options", [{}, {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}])
def test_training_and_evaluation_see_the_same_pixels(options):
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], **options)
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))]
    size, mean, std = read_processor(processor)
    crop, augmentation = Crop(AugmentationArguments(), size), Augmentation(AugmentationArguments(), mean, std)
    trained = augmentation(crop(images, Draws.any(1)), Draws.any(1))
    torch.testing.assert_close(trained, processor_transform(processor)(images), rtol=0, atol=1e-6)


def test_a_truncated_checkpoint_is_one_line(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    argv = ["--dataset", "digits", "--model", str(tmp_path / "cut"), "--output_dir", str(tmp_path / "out")]
    assert f"cannot open the model '{tmp_path / 'cut'}'" in error_of(capsys, argv)


def test_weights_that_diverged_are_refused(tmp_path, capsys):
    model = ViTCustomForImageClassification(preset_config("vit_nano_patch2_8"))
    model.head.classifier.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "nan")
    argv = ["--dataset", "digits", "--model", str(tmp_path / "nan"), "--output_dir", str(tmp_path / "out")]
    assert "head.classifier.weight holds 1 values that are not finite" in error_of(capsys, argv)
