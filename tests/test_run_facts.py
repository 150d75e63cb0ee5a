"""What a card says of a run's model, images and command."""

import pytest
from datasets import Dataset, DatasetDict, NamedSplit
from transformers import CLIPImageProcessor, TrainerState, ViTImageProcessor

from modeling_vit_custom import list_presets, preset_config
from trainers.classification import latest_evaluation
from trainers.run_facts import (
    describe_preprocessing,
    describe_stages,
    format_command,
    hide_folders,
    name_architecture,
)


def columns(preset, *names):
    return [tuple(stage[name] for name in names) for stage in describe_stages(preset_config(preset))]


def test_stages_of_the_papers_are_theirs():
    """Table 1 of ViT, tables 1 of PVT and 7 of Swin, at 224 pixels."""
    (vit,) = describe_stages(preset_config("vit_base_patch16_224"))
    assert vit == {
        "Stage": 1,
        "Patches": "14 x 14",
        "Pixels of each": "16 x 16",
        "Blocks": 12,
        "Width": 768,
        "Heads": 12,
        "MLP": 3072,
        "Attention": "global",
        "Positions": "learned",
    }
    assert columns("swin_tiny_patch4_window7_224", "Patches", "Pixels of each", "Blocks", "Width", "Heads") == [
        ("56 x 56", "4 x 4", 2, 96, 3),
        ("28 x 28", "8 x 8", 2, 192, 6),
        ("14 x 14", "16 x 16", 6, 384, 12),
        ("7 x 7", "32 x 32", 2, 768, 24),
    ]
    windows = ("windows of 7 x 7, every other block's shifted", "relative")
    assert columns("swin_tiny_patch4_window7_224", "Attention", "Positions") == [windows] * 4
    assert columns("pvt_tiny_224", "MLP", "Attention", "Positions") == [
        (512, "global, keys of 8 x 8 patches in one", "learned"),
        (1024, "global, keys of 4 x 4 patches in one", "learned"),
        (1280, "global, keys of 2 x 2 patches in one", "learned"),
        (2048, "global", "learned"),
    ]


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_has_a_row_for_each_stage(preset):
    config = preset_config(preset)
    assert len(describe_stages(config)) == len(config.stages)


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_is_of_the_paper_in_its_name(preset):
    family = preset.partition("_")[0]
    if family == "deit" and "distilled" not in preset:
        family = "vit"  # which it is but for its recipe
    assert name_architecture(preset_config(preset)) == family


def test_preprocessing_is_told_as_it_is_done():
    squeezed = ViTImageProcessor(size={"height": 32, "width": 48}, resample=3)
    assert describe_preprocessing(squeezed) == (
        "Images are resized to 32 x 48 pixels (bicubic), scaled to 0..1 and normalised by mean (0.5, 0.5, 0.5) and "
        "standard deviation (0.5, 0.5, 0.5)."
    )
    cropped = CLIPImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=2, do_normalize=False
    )
    assert describe_preprocessing(cropped) == (
        "Images are resized to a shorter side of 256 pixels (bilinear), cropped to the middle 224 x 224, "
        "scaled to 0..1."
    )
    larger = ViTImageProcessor(
        size={"height": 256, "width": 256}, do_center_crop=True, crop_size={"height": 224, "width": 224}, resample=None
    )
    assert "resized to 256 x 256 pixels, cropped to the middle 224 x 224, scaled" in describe_preprocessing(larger)


def test_commands_of_many_processes_say_how_they_were_started(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert format_command("finetune", ["--bf16", "true"]) == "python -m trainers.finetune --bf16 true"
    assert format_command("pretrain", [], 4) == "torchrun --nproc_per_node 4 -m trainers.pretrain "
    assert format_command("pretrain", [], 8) == "torchrun --nnodes 2 --nproc_per_node 4 -m trainers.pretrain "


def test_figures_are_those_of_the_weights_beside_them():
    # Whose only split is called so, as some are on the Hub; a part of it was held out.
    rows = Dataset.from_dict({"image": [], "label": []}, split=NamedSplit("full"))
    splits = DatasetDict(train=rows, validation=rows)
    logged = [{"eval_loss": 1.0, "eval_accuracy": 0.5, "step": 20}, {"loss": 2.0, "step": 23}]
    found = latest_evaluation(TrainerState(global_step=20, log_history=logged), splits)
    assert found["results"] == {"accuracy": 0.5, "loss": 1.0}
    assert (found["evaluation_split"], found["evaluation_origin"]) == ("validation", "train")
    assert found["split_sizes"] == {"train": 0, "validation": 0}
    assert latest_evaluation(TrainerState(global_step=23, log_history=logged), splits) == {}
    assert latest_evaluation(TrainerState(global_step=23, log_history=[]), splits) == {}


def test_commands_push_to_nobodys_repository():
    argv = [
        "--seed",
        "0",
        "--push_to_hub",
        "true",
        "--hub_model_id=me/mine",
        "--hub_private_repo",
        "true",
        "--bf16",
        "true",
    ]
    assert format_command("finetune", argv) == "python -m trainers.finetune --seed 0 --bf16 true"


def test_folders_that_are_gone_or_not_there_yet_are_shown_by_their_names():
    argv = "--output_dir acme/eval --resume_from_checkpoint=acme/run/checkpoint-8 --dataset_title Cats/dogs/us"
    shown = "--output_dir eval --resume_from_checkpoint=checkpoint-8 --dataset_title Cats/dogs/us"
    assert format_command("finetune", argv.split()) == f"python -m trainers.finetune {shown}"
    argv = "--output_dir acme/eval google/vit user/data --split test"
    assert format_command("evaluate", argv.split()).endswith(" --output_dir eval google/vit user/data --split test")
    assert format_command("finetune", ["--resume_from_checkpoint", "true"]).endswith(" --resume_from_checkpoint true")


def test_local_folders_are_shown_by_their_names(tmp_path, monkeypatch):
    (tmp_path / "private" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hide_folders("private/images") == "images"
    assert hide_folders("user/name") == "user/name"


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/home/me/images", "images"),
        ("/home/me/run=3/images", "images"),
        ("--dataset=/home/me/images", "--dataset=images"),
        ("runs/mine", "runs/mine"),
        ("clients/acme/names.txt", "names.txt"),  # whether it is there or not: no id on the Hub is so long
        ("../runs/mine", "mine"),
        ("--output_dir=~/mine", "--output_dir=mine"),
        ("--dataset_title=~5,000 photographs", "--dataset_title=~5,000 photographs"),  # of no user
        ("--rotation=5", "--rotation=5"),
    ],
)
def test_cards_show_no_home_folders(argument, shown):
    assert hide_folders(argument) == shown
