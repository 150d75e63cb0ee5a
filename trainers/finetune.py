"""Train an image classifier with the HF Trainer, from random weights or from a checkpoint.

Leaves a folder that the Auto classes and pipelines open: weights, code, image processor, metrics, figures and a card.
"""

import sys

from modeling_vit_custom.command_line import report_user_errors
from trainers.arguments import (
    COMMON_GROUPS,
    TrainingArguments,
    TrainingCommand,
    parse_arguments,
)
from trainers.classification import train_classifier
from trainers.runs import noticing_lost_images


PROGRAM = "python -m trainers.finetune"
EXAMPLES = f"""\
  # handwritten digits, from random weights (the first real run)
  {PROGRAM} --recipe quickstart

  # a folder of photographs, one sub-folder a class, from a checkpoint
  {PROGRAM} --dataset path/to/images --model user/name --output_dir runs/mine --min_crop 0.35 --horizontal_flip 0.5

  # a preset from random weights at another size, with fields of its configuration replaced
  {PROGRAM} --dataset user/data --model swin_nano_patch2_window4_32 --image_size 48 \\
      --config_overrides drop_path_rate=0.1 --num_train_epochs 100 --learning_rate 1e-3"""


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    groups = [*COMMON_GROUPS, TrainingArguments]
    with report_user_errors("finetune"):
        command = TrainingCommand("finetune", argv, *parse_arguments(groups, argv, PROGRAM, __doc__, EXAMPLES))
    with noticing_lost_images(command):
        train_classifier(command)


if __name__ == "__main__":
    main()
