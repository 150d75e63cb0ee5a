"""Show what a recipe does to training images: a few of them, as they are, augmented and mixed."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from datasets import Image
from transformers import set_seed

from model_cards.figures import plot_images
from modeling_vit_custom.command_line import report_user_errors
from trainers.arguments import (
    COMMON_GROUPS,
    PretrainingArguments,
    PretrainingTrainingArguments,
    parse_arguments,
)
from trainers.augmentation import Augmentation, Crop
from trainers.classification import make_mixing
from trainers.data import IMAGE, TRAIN, decode, load_splits, processor_transform, with_transform
from trainers.draws import Draws
from trainers.image_ops import to_arrays
from trainers.models import open_processor, read_processor


PROGRAM = "python -m trainers.gallery"
EXAMPLES = f"""\
  {PROGRAM} --recipe quickstart
  {PROGRAM} --recipe deit --dataset path/to/images --gallery deit.png
  {PROGRAM} --recipe finetune --dataset path/to/images --model user/name --min_crop 0.2 --erasing 0.25"""


@dataclass
class GalleryArguments:
    """What to draw."""

    _argument_group_name: ClassVar[str] = "gallery"

    gallery: str = field(default="gallery.png", metadata={"help": "File to write, .png, .jpg, .pdf or .svg."})
    gallery_images: int = field(default=6, metadata={"help": "Images to show, a row each."})
    gallery_views: int = field(default=4, metadata={"help": "Augmented views of each image."})

    def __post_init__(self):
        for name in ("gallery_images", "gallery_views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if Path(self.gallery).suffix not in SUFFIXES:
            raise ValueError(f"gallery={self.gallery!r} must end in one of {', '.join(SUFFIXES)}")
        if not Path(self.gallery).resolve().parent.is_dir():
            raise ValueError(f"gallery={self.gallery!r} lies in a folder that does not exist")


SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    groups = [GalleryArguments, PretrainingArguments, *COMMON_GROUPS, PretrainingTrainingArguments]
    with report_user_errors("gallery"):
        arguments, pretraining_args, model_args, data_args, augmentation_args, loss_args, training_args, _ = (
            parse_arguments(groups, argv, PROGRAM, __doc__, EXAMPLES)
        )
        if data_args.streaming:
            raise ValueError("--streaming true has no images to choose from: leave it out")
        set_seed(training_args.seed)
        processor = open_processor(model_args)
        size, mean, std = read_processor(processor)
        crop, augmentation = Crop(augmentation_args, size), Augmentation(augmentation_args, mean, std)
        data_args.validation_fraction = 0.0  # nothing is held out of what is only looked at
        train = load_splits(data_args, needs_labels=False)[TRAIN]
        few = train.select(torch.randperm(len(train))[: arguments.gallery_images].tolist())
        whole = torch.stack([row["pixel_values"] for row in with_transform(few, processor_transform(processor))])
        # Each view is a batch of all the images, since they are mixed with one another.
        images, views = [decode(row) for row in few.cast_column(IMAGE, Image(decode=False))[IMAGE]], []
        for _ in range(arguments.gallery_views):
            views.append(augmentation(crop(images, Draws.any(len(few))), Draws.any(len(few))))
        columns = {"image": whole} | {f"view {number}": view for number, view in enumerate(views, start=1)}
        if pretraining_args.objective == "supervised" and (augmentation_args.mixup or augmentation_args.cutmix):
            mixing = make_mixing(augmentation_args, loss_args, num_labels=1)
            for number, view in enumerate(views, start=1):
                labels = torch.zeros(len(view), dtype=torch.long)
                columns[f"view {number}, mixed"], _ = mixing(view, labels, Draws.any(len(view)))
        rows = zip(*(to_arrays(pixels, mean, std) for pixels in columns.values()))
        plot_images(list(rows), list(columns)).savefig(arguments.gallery, dpi=150)
    print(f"{arguments.gallery}: {len(few)} images at {size[0]} x {size[1]} pixels")


if __name__ == "__main__":
    main()
