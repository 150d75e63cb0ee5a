"""Command lines of the training scripts: typed fields, recipes under them, and one line for a user's mistake."""

import argparse
import difflib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import torch
import transformers
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from model_cards.metadata import LICENSES
from modeling_vit_custom.command_line import Parser


RECIPES = Path(__file__).parent / "recipes"
OPTIMIZERS = ("adamw", "sgd", "lamb", "lars", "muon")
INTERPOLATIONS = ("bilinear", "bicubic")
# Mean and deviation of pixels from 0 to 1.
NORMALIZATIONS = {
    "half": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
OBJECTIVES = ("supervised", "masked_autoencoder", "masked_image_modeling")
# Of the Trainer's hundred arguments, those that `--help` shows beside the ones with defaults of their own.
SHOWN_OF_TRAINER = {
    "help",
    "bf16",
    "dataloader_num_workers",
    "disable_tqdm",
    "gradient_accumulation_steps",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "max_steps",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "seed",
    "torch_compile",
    "use_cpu",
}


@dataclass
class ModelArguments:
    """Which model to train."""

    _argument_group_name: ClassVar[str] = "model"

    model: str = field(
        metadata={"help": "A preset (random weights), a folder written by save_pretrained, or a Hub id (fine-tuning)."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels to train at; positions of a checkpoint are resampled. Default: the model's."},
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of the configuration to replace, e.g. drop_path_rate=0.1 num_register_tokens=4."},
    )
    normalization: str | None = field(
        default=None,
        metadata={
            "help": "Of pixels: half (to -1..1) or imagenet (its mean and deviation). Default: as a checkpoint does, "
            "half with a preset."
        },
    )
    eval_interpolation: str | None = field(
        default=None,
        metadata={
            "help": "Of images to classify: bilinear or bicubic. Default: as a checkpoint does, bilinear with a preset."
        },
    )
    eval_crop: float | None = field(
        default=None,
        metadata={
            "help": "Classify the centre, this share of the shorter side, e.g. 0.875. Default: as a checkpoint does, "
            "with a preset the whole image, squeezed."
        },
    )
    new_head: bool = field(
        default=False, metadata={"help": "Start with a new head even where a checkpoint has the same classes."}
    )
    freeze_encoder: bool = field(
        default=False, metadata={"help": "Train the head alone, on the features of a checkpoint (linear probing)."}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train the head and low-rank changes of this rank (LoRA), merged at the end."}
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale of these changes, over their rank."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python files that come with a checkpoint; read them first."}
    )

    def __post_init__(self):
        if self.normalization is not None and self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization={self.normalization!r} must be {' or '.join(NORMALIZATIONS)}")
        if self.eval_interpolation not in (None, *INTERPOLATIONS):
            raise ValueError(f"eval_interpolation={self.eval_interpolation!r} must be {' or '.join(INTERPOLATIONS)}")
        if self.eval_crop is not None and not 0 < self.eval_crop <= 1:
            raise ValueError(f"eval_crop={self.eval_crop} must lie between 0 and 1")


@dataclass
class DataArguments:
    """Which images to train on."""

    _argument_group_name: ClassVar[str] = "data"

    dataset: str = field(
        metadata={
            "help": "digits (built in), a folder of images (one sub-folder a class, with or without train/val/test "
            "above), of parquet files or of WebDataset shards (train-0000.tar), or a Hub data set."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_title: str | None = field(
        default=None, metadata={"help": "What cards call the data set. Default: its Hub id or its folder's name."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images. Default: the only one."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels. Default: the only one."})
    class_names: str | None = field(
        default=None,
        metadata={"help": "File with the name of a class on each line, in their order. Default: the data set's own."},
    )
    validation_fraction: float = field(
        default=0.2,
        metadata={
            "help": "Stratified share of train to hold out where there is no validation split; 0 is none, to evaluate "
            "on the test split alone."
        },
    )
    train_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Train on this share of the images, of each class if all have one; a smaller share is a part of a "
            "larger one."
        },
    )
    train_imbalance: float = field(
        default=1.0,
        metadata={
            "help": "Train on smaller and smaller shares of the classes, in their order: of the last this many times "
            "smaller than of the first, exponentially between, but an image of each at least."
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of these choices, apart from the training seed."})
    on_corrupt: str = field(
        default="error", metadata={"help": "On images that cannot be decoded: error, or skip them."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read parquet files, shards or a Hub data set while training. Needs max_steps."},
    )
    shuffle_buffer: int = field(default=10000, metadata={"help": "Images of a stream that the next one is drawn from."})

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction={self.train_fraction} must be above 0 and at most 1")
        if not 1 <= self.train_imbalance < math.inf:
            raise ValueError(f"train_imbalance={self.train_imbalance} must be at least 1")
        if self.streaming and (self.train_fraction < 1 or self.train_imbalance > 1):
            name = "train_fraction" if self.train_fraction < 1 else "train_imbalance"
            raise ValueError(f"--{name} must know all training images beforehand: not with --streaming true")
        if self.on_corrupt not in ("error", "skip"):
            raise ValueError(f"on_corrupt={self.on_corrupt!r} must be error or skip")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={self.shuffle_buffer} must be at least 1")


@dataclass
class AugmentationArguments:
    """What happens to a training image."""

    _argument_group_name: ClassVar[str] = "augmentation"

    min_crop: float | None = field(
        default=None,
        metadata={"help": "Random resized crop of at least this share of the area, e.g. 0.35. Default: no crop."},
    )
    crop_padding: int = field(
        default=0, metadata={"help": "Shift by up to this many pixels each way, mirrored at the edges."}
    )
    interpolation: str = field(default="bilinear", metadata={"help": "Of crops and moves: bilinear or bicubic."})
    horizontal_flip: float = field(default=0.0, metadata={"help": "Probability of mirroring left and right."})
    rotation: float = field(default=0.0, metadata={"help": "Rotate by up to this many degrees."})
    translation: float = field(default=0.0, metadata={"help": "Shift by up to this share of each side."})
    zoom: float = field(default=0.0, metadata={"help": "Scale by up to this share, larger or smaller."})
    auto_augment: str | None = field(
        default=None,
        metadata={
            "help": "rand-m9-mstd0.5-inc1 (RandAugment, other numbers as well), 3a (3-Augment), imagenet or cifar10 "
            "(AutoAugment). Default: none."
        },
    )
    color_jitter: float = field(
        default=0.0, metadata={"help": "Change brightness, contrast and saturation by up to this share."}
    )
    erasing: float = field(default=0.0, metadata={"help": "Probability of replacing a rectangle by noise."})
    mixup: float = field(default=0.0, metadata={"help": "Beta distribution of Mixup, e.g. 0.8; 0 is off."})
    cutmix: float = field(default=0.0, metadata={"help": "The same for CutMix, e.g. 1.0."})
    mix_probability: float = field(default=1.0, metadata={"help": "Share of the images that are mixed."})
    mix_switch_probability: float = field(
        default=0.5, metadata={"help": "Probability of CutMix where Mixup is on as well."}
    )
    repeated_augmentation: int = field(
        default=1, metadata={"help": "See each image this many times in a batch, and accordingly fewer images."}
    )
    augment_on_device: bool = field(
        default=True,
        metadata={"help": "Augment whole batches on the training device; false: in the data loader's workers."},
    )


@dataclass
class LossArguments:
    """What a classifier is trained towards."""

    _argument_group_name: ClassVar[str] = "loss"

    loss: str = field(default="cross_entropy", metadata={"help": "cross_entropy or binary_cross_entropy."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability to spread over all classes."})
    class_weight_beta: float = field(
        default=0.0,
        metadata={"help": "Weigh classes by their effective number of images with this beta, e.g. 0.999; 0 is off."},
    )
    logit_adjustment: float = field(
        default=0.0, metadata={"help": "Strength of logit adjustment by class frequency, e.g. 1.0; 0 is off."}
    )
    class_balanced_sampling: bool = field(default=False, metadata={"help": "Draw every class equally often."})
    teacher: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a classifier to distil, of any kind. Default: none."}
    )
    teacher_labels_by_index: bool = field(
        default=False,
        metadata={"help": "Take the teacher's classes in their order as the data set's, whatever their names."},
    )
    trust_teacher_code: bool = field(
        default=False, metadata={"help": "Run the Python files that come with the teacher; read them first."}
    )
    distillation: str = field(default="hard", metadata={"help": "Learn the teacher's class (hard) or scores (soft)."})
    distillation_weight: float = field(default=0.5, metadata={"help": "Share of the teacher in the loss."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Of soft distillation."})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The Trainer's own arguments, with defaults for fine-tuning a vision transformer."""

    _argument_group_name: ClassVar[str] = "training"

    output_dir: str = field(default="runs/finetune", metadata={"help": "Where the model, card and figures go."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a model or a run that the output folder already holds."}
    )
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images in a step on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "The same for evaluation."})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, sgd, lamb, lars or muon."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    base_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate for 256 images a step, to be scaled with their number."}
    )
    weight_decay: float = field(
        default=0.05, metadata={"help": "Decoupled weight decay; of sgd and lars, part of the gradient."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate from each block to the one before it."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Of sgd and lars."})
    ema_decay: float = field(
        default=0.0, metadata={"help": "Average the weights with this decay, e.g. 0.999, for evaluation; 0 is off."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Of the weights, as the Hub calls it, e.g. apache-2.0. Default: not said."}
    )
    card_images: int = field(
        default=8, metadata={"help": "Held-out images that the card shows and the Hub gets; 0 is none."}
    )
    carbon_intensity: float | None = field(
        default=None,
        metadata={"help": "Of your electricity, in grams of CO2 equivalent a kWh, where its energy can be measured."},
    )
    initial_image_size: int | None = field(
        default=None, metadata={"help": "Start with smaller images, which grow to the model's size. Default: no."}
    )
    full_size_epochs: float = field(default=0.0, metadata={"help": "Last epochs at the full image size."})
    unmixed_epochs: float = field(default=0.0, metadata={"help": "Last epochs without Mixup and CutMix."})
    unmasked_epochs: float = field(default=0.0, metadata={"help": "Last epochs without patch dropout."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "cosine, linear, cosine_with_min_lr, warmup_stable_decay or another."}
    )
    decay_steps: float = field(
        default=0.2,
        metadata={"help": "Steps of decay at the end of warmup_stable_decay, or their share if below 1."},
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or their share if below 1."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between log lines, or their share if below 1."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Page-locked batches, for copies to a GPU."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace a loss that is not finite in the log by the mean of those before."}
    )
    # Transforms make the model's inputs out of columns that the Trainer would drop.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this as it is."})

    def __post_init__(self):
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be above 0, or max_steps be given")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1)")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must lie in (0, 1]")
        if self.full_size_epochs and self.initial_image_size is None:
            raise ValueError(f"full_size_epochs={self.full_size_epochs} needs an initial_image_size to grow from")
        for name in ("unmixed_epochs", "unmasked_epochs", "full_size_epochs", "decay_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor smooths the evaluation as well: use label_smoothing")
        for name in ("learning_rate", "base_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name}={rate} must be above 0")
        if self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last=True would leave images out of the evaluation")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the images before they become inputs")
        for name, usual in {
            "auto_find_batch_size": False,
            "data_seed": None,
            "train_sampling_strategy": "random",
        }.items():
            if getattr(self, name) != usual:
                raise ValueError(f"{name}={getattr(self, name)!r} is not heeded here: leave it out")
        if self.hub_token is not None:
            raise ValueError("hub_token on a command line ends in logs and histories: run `hf auth login` instead")
        if self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(f"hub_strategy={self.hub_strategy!r} would publish pickled files: use end or every_save")
        if self.license is not None and self.license not in LICENSES:
            near = suggest(self.license, LICENSES)
            raise ValueError(f"license={self.license!r} is none that the Hub knows{near}")
        if self.license == "other" and self.push_to_hub:
            raise ValueError(
                "license='other' needs license_name and license_link in the card: write them there after the run, and "
                "publish it by `python -m trainers.publish`"
            )
        for name in ("card_images", "carbon_intensity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or more")
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # or the Trainer asks for a GPU, while processors know bf16 as well
        super().__post_init__()
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != self.world_size:
            raise ValueError(
                f"{started} processes were started, and each would train alone, as there is no accelerator here: pass "
                "--use_cpu true, and to accelerate launch --cpu"
            )
        if self.n_gpu > 1:
            self._n_gpu = 1  # a process uses one device: torchrun starts one for each
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self.images_per_step / 256

    @property
    def images_per_step(self) -> int:
        """Of all processes and accumulated batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass
class PretrainingArguments:
    """What an encoder learns."""

    _argument_group_name: ClassVar[str] = "pretraining"

    objective: str = field(
        default="supervised",
        metadata={
            "help": "supervised (a classifier, as trainers.finetune trains one), masked_autoencoder (MAE: the encoder "
            "sees the visible patches only) or masked_image_modeling (SimMIM: for every encoder)."
        },
    )
    probe_images: int = field(
        default=5000,
        metadata={
            "help": "Images of each split of a labelled data set for the nearest-neighbour and linear classifiers "
            "that judge the features at the end of masked pretraining; 0 is none."
        },
    )

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} must be one of {', '.join(OBJECTIVES)}")
        if self.probe_images < 0:
            raise ValueError(f"probe_images={self.probe_images} must be 0 or more")


@dataclass
class PretrainingTrainingArguments(TrainingArguments):
    """The same with another output folder."""

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Where the model, card and figures go."})


@dataclass
class ScalingArguments:
    """Which runs to compare."""

    _argument_group_name: ClassVar[str] = "grid"

    models: list[str] = field(
        metadata={
            "help": "Families to compare, each by a preset (random weights), with fields of its configuration replaced "
            "where needed: vit_nano_patch4_32:num_hidden_layers=6,pooling=mean."
        }
    )
    widths: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Sizes of each, as shares of the preset's width."}
    )
    fractions: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.25, 0.5, 1.0], metadata={"help": "Shares of the training images."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "Each decides on weights, on images and on their order."}
    )
    min_steps: int = field(
        default=0, metadata={"help": "Train for so many steps at least, where epochs of few images would be fewer."}
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Leave out of the grid what is estimated to take longer in all; no call starts a run that would "
            "end later than this."
        },
    )
    max_flops: float | None = field(
        default=None, metadata={"help": "The same, by additions and multiplications, e.g. 1e17."}
    )
    jobs: int | None = field(
        default=None,
        metadata={
            "help": "Runs at the same time. Default: one on each GPU, or one on a CPU, whose threads they share."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Show what would be trained, and what it would cost."})

    def __post_init__(self):
        for name in ("models", "widths", "fractions", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values} must name at least one, and each once")
        for name in ("widths", "fractions"):
            for value in getattr(self, name):
                if not 0 < value < math.inf or (name == "fractions" and value > 1):
                    raise ValueError(f"{name}={value} must be above 0{' and at most 1' if name == 'fractions' else ''}")
        for name in ("max_minutes", "max_flops", "jobs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
        for name, least in (("min_steps", self.min_steps), ("seeds", min(self.seeds))):
            if least < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")


@dataclass
class ScalingTrainingArguments(TrainingArguments):
    """The same with another output folder."""

    output_dir: str = field(default="runs/scaling", metadata={"help": "Where the runs, the report and figures go."})


# What each script asks for, before its training arguments.
COMMON_GROUPS = (ModelArguments, DataArguments, AugmentationArguments, LossArguments)


@dataclass
class TrainingCommand:
    """All that a training script was told.

    Attributes:
        program: Name of the script.
        argv: What was typed after it.
        given: The fields that the recipe or the command line gave.
    """

    program: str
    argv: Sequence[str]
    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    loss: LossArguments
    training: TrainingArguments
    given: dict


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every help text, examples as they were written."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=116)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        # The parser takes every name with dashes as well, which need not be read twice.
        kinds = {str: "TEXT", int: "N", float: "NUMBER", string_to_bool: "true|false"}
        value = action.metavar or kinds.get(action.type, "VALUE")
        return f"{action.option_strings[0]} {'...' if action.nargs in ('+', '*') else value}"

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, []) else super()._get_help_string(action)

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(f"{self._prog} [--recipe NAME|FILE] [--FIELD VALUE ...]", [], [], prefix)


class FieldParser(HfArgumentParser):
    """Fields of dataclasses, and errors of one line."""

    error = Parser.error


def add_fields(parser: argparse.ArgumentParser, holder: type, **helps: str | None) -> None:
    """Fields of a dataclass as a group of options of another command, with their types, defaults and help texts.

    Args:
        parser: Of that command.
        holder: The dataclass.
        helps: Names of the fields, with a help text where the dataclass's own does not fit.
    """
    group, given = parser.add_argument_group(holder._argument_group_name), {each.name: each for each in fields(holder)}
    for name, text in helps.items():
        default = given[name].default
        if isinstance(default, bool):
            # Such a field may stand alone here, and takes true or false as in the training scripts.
            how = {"type": string_to_bool, "nargs": "?", "const": True, "metavar": "true|false"}
        elif isinstance(default, (int, float)):
            how = {"type": type(default), "metavar": "NUMBER"}
        else:
            how = {"metavar": "TEXT"}
        shown = "" if default is None or default is False else f" ({default})"
        text = (text or given[name].metadata["help"]).replace("%", "%%") + shown
        flags = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        group.add_argument(*flags, default=default, help=text, **how)


def parse_arguments(
    dataclasses: Sequence[type], argv: Sequence[str] | None, program: str, description: str, examples: str
) -> tuple:
    """One instance of each dataclass: defaults, then the recipe named by `--recipe`, then the command line.

    The last item is a mapping of the fields that the recipe or the command line gave.

    Raises:
        ValueError: for an unknown field or recipe, or a value of the wrong type.
    """
    parser = FieldParser(
        dataclasses,
        prog=program,
        description=description,
        epilog="All other fields of transformers.TrainingArguments work as well, or are refused with the reason.\n\n"
        f"examples:\n{examples}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    fields_of_parser = {action.dest for action in parser._actions} - {"help"}
    ours = [base for holder in dataclasses for base in holder.__mro__ if base.__module__ == __name__]
    shown = {name for holder in ours for name in holder.__annotations__} - {"remove_unused_columns"}
    for action in parser._actions:
        # What is true by default has a second flag, --no_NAME, which need not be read.
        if action.dest not in shown | SHOWN_OF_TRAINER or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
        elif action.required:
            action.help += " Required."
    recipe_help = f"Fields from a YAML file, or by name: {', '.join(list_recipes())}."
    parser.add_argument("--recipe", metavar="NAME|FILE", help=recipe_help)

    recipe_parser = FieldParser((), add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--recipe")
    named, rest = recipe_parser.parse_known_args(argv)
    fields = read_recipe(named.recipe) if named.recipe else {}
    unknown = sorted(fields.keys() - fields_of_parser)
    if unknown:
        raise ValueError(
            f"recipe {named.recipe!r} has an unknown field {unknown[0]!r}{suggest(unknown[0], fields_of_parser)} "
            f"({program} has none; a recipe's header says what it is for)"
        )
    typed = _read_given(dataclasses, rest)
    for name, rival in RIVALS.items():
        if name in typed:
            fields.pop(rival, None)
    # What comes later on a command line wins. One way in means that recipes are checked as the command line is.
    argv = [*to_argv(fields), *rest]
    if "config_overrides" in fields and "config_overrides" in typed:
        # Field by field, so that one more does not throw away what makes the recipe.
        merged = {entry.partition("=")[0]: entry for entry in [*fields["config_overrides"], *typed["config_overrides"]]}
        argv += to_argv({"config_overrides": list(merged.values())})
    given = _read_given(dataclasses, argv)
    for name, rival in RIVALS.items():
        if name in given and rival in given:
            raise ValueError(f"--{name} and --{rival} are two ways to say the same: give one of them")
    *parsed, unused = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unused:
        near = suggest(unused[0], [f"--{name}" for name in fields_of_parser])
        raise ValueError(f"unknown argument {unused[0]!r}{near} (see --help)")
    return (*parsed[: len(dataclasses)], given)


# Each says what the other says; one that is typed takes the place of the other in a recipe.
RIVALS = {"learning_rate": "base_learning_rate", "base_learning_rate": "learning_rate"}


def _read_given(dataclasses: Sequence[type], argv: Sequence[str] | None) -> dict:
    """The fields that a command line names, and nothing of the defaults."""
    parser = FieldParser(dataclasses, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_known_args(argv)[0])


def suggest(name: str, names: Iterable[str]) -> str:
    """What somebody who typed `name` may have meant, as the end of a message."""
    names = list(names)
    near = [longer for longer in names if longer.startswith(name)] or difflib.get_close_matches(
        name, names, n=1, cutoff=0.75
    )
    return f"; did you mean {near[0]!r}?" if near else ""


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict:
    """Fields of a recipe, by the name of a shipped one or the path of a YAML file.

    Raises:
        ValueError: if there is no such recipe, or it is not a flat mapping.
    """
    path = RECIPES / f"{name}.yaml" if name in list_recipes() else Path(name)
    if not path.is_file():
        raise ValueError(f"there is no recipe {name!r}: give a YAML file or one of {', '.join(list_recipes())}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name!r} is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"recipe {name!r} must be a mapping of fields to values")
    return fields


def write_recipe(path: Path, fields: dict) -> None:
    """The inverse of `read_recipe`, less what is about one output folder, which the next run must not share."""
    path.write_text(yaml.safe_dump(plain_recipe(fields), sort_keys=False, allow_unicode=True), encoding="utf-8")


def plain_recipe(fields: dict) -> dict:
    """Fields as `read_recipe` gives them back."""
    own = ("output_dir", "overwrite", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_revision")
    return {name: getattr(value, "value", value) for name, value in fields.items() if name not in own}


def find_difference(one: dict, other: dict) -> str | None:
    """The first field in which two plain recipes differ, but for those that tell how a run is watched."""
    names = (name for name in [*one, *other] if name not in ("disable_tqdm", "report_to"))
    return next((name for name in names if one.get(name) != other.get(name)), None)


def to_argv(fields: dict) -> list[str]:
    """`{"rotation": 5, "config_overrides": ["a=1", "b=2"]}` -> `["--rotation=5", "--config_overrides", "a=1", "b=2"]`.

    Empty values (null) stand for the default.
    """
    argv = []
    for name, value in fields.items():
        if isinstance(value, list) and value:
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            argv.append(f"--{name}={json.dumps(value)}")
        elif value not in (None, []):
            argv.append(f"--{name}={value}")
    return argv


def check_writable(folder: Path, argument: str) -> None:
    """Raises ValueError if a folder, which need not be there, cannot be written to: before hours of work."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{argument} {str(folder)!r} is a file: give a folder")
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{argument} {str(folder)!r} cannot be written to: {error.strerror}") from error
