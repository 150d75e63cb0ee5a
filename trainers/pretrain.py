"""Pretrain an encoder with the HF Trainer: by masked images, without labels, or as a classifier.

Leaves a folder that the Auto classes open, `AutoModel` as an encoder and `AutoModelForImageClassification` with a new
head, for trainers.finetune to go on from.
"""

import shlex
import sys
from collections.abc import Collection
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForMaskedImageModeling, AutoModelForPreTraining, PreTrainedModel, set_seed

from model_cards.facts import FEATURES, TrainingRun
from model_cards.figures import plot_images
from model_cards.rendering import METRIC_TITLES, RECONSTRUCTIONS, write_card
from modeling_vit_custom.command_line import report_user_errors
from trainers.arguments import (
    COMMON_GROUPS,
    LossArguments,
    PretrainingArguments,
    PretrainingTrainingArguments,
    TrainingCommand,
    parse_arguments,
)
from trainers.classification import make_order, train_classifier
from trainers.data import (
    LABEL,
    TEST,
    TRAIN,
    VALIDATION,
)
from trainers.illustrations import NUM_MEASURED, show_learnt
from trainers.image_ops import to_arrays
from trainers.models import make_model, read_processor
from trainers.probing import probe
from trainers.reconstruction import reconstruct
from trainers.run_facts import describe_model, gather_facts, name_split
from trainers.runs import (
    check_output_dir,
    describe,
    load_training_splits,
    noticing_lost_images,
    prepare_images,
    push,
    train,
)
from trainers.vit_trainer import ViTTrainer


PROGRAM = "python -m trainers.pretrain"
EXAMPLES = f"""\
  # a masked autoencoder on a folder of images, then a classifier of a part of them
  {PROGRAM} --recipe mae --dataset path/to/images --model vit_small_patch16_224 --output_dir runs/mae
  python -m trainers.finetune --recipe mae_finetune --dataset path/to/labelled --model runs/mae

  # masked images for an encoder of shifted windows
  {PROGRAM} --recipe simmim --dataset user/data --model swin_tiny_patch4_window7_224

  # a classifier from random weights, by a recipe of trainers.finetune
  {PROGRAM} --recipe deit --dataset user/data"""

NUM_RECONSTRUCTIONS = 6
MASKED = {
    "masked_autoencoder": AutoModelForPreTraining,
    "masked_image_modeling": AutoModelForMaskedImageModeling,
}
FINE_TUNING = {"masked_autoencoder": "mae_finetune", "masked_image_modeling": "finetune"}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    groups = [PretrainingArguments, *COMMON_GROUPS, PretrainingTrainingArguments]
    with report_user_errors("pretrain"):
        arguments, *rest = parse_arguments(groups, argv, PROGRAM, __doc__, EXAMPLES)
        command = TrainingCommand("pretrain", argv, *rest)
    with noticing_lost_images(command):
        if arguments.objective == "supervised":
            train_classifier(command)
        else:
            train_encoder(command, arguments)


def train_encoder(command: TrainingCommand, arguments: PretrainingArguments) -> None:
    """Learn to reconstruct masked images.

    Raises:
        SystemExit: with one line, where what was asked for cannot be done.
    """
    training_args, streaming = command.training, command.data.streaming
    with report_user_errors(command.program):
        check_given(command.given, arguments.objective)
        check_output_dir(command)
        set_seed(training_args.seed)
        splits = load_training_splits(command, needs_labels=False)
        model, processor = make_model(command.model, auto_class=MASKED[arguments.objective])
        _, mean, std = read_processor(processor)
        train_dataset, augmentation, evaluated = prepare_images(command, splits, processor)
        judging = next((name for name in (VALIDATION, TEST) if name in splits), None)
        # Only their number counts here.
        labels = [] if streaming else range(len(splits[TRAIN]))
        # The loss is the model's own, of the images alone, and its reconstructions need not be collected.
        training_args.label_names, training_args.prediction_loss_only = ["pixel_values"], True
        trainer = ViTTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=evaluated.get(judging),
            processing_class=processor,
            augmentation=augmentation,
            order=make_order(command.augmentation, command.loss, labels, training_args.seed),
            describe=lambda: TrainingRun(**facts()),
        )

    facts_of_model = describe_model(model.base_model, processor)
    facts_of_model |= {"task": FEATURES, "objective": arguments.objective}

    def facts() -> dict:
        return facts_of_model | gather_facts(command, trainer)

    if trainer.is_world_process_zero():
        print(describe(f"{command.model.model}, {arguments.objective}", model, splits, training_args))
    trained = train(trainer, command)
    trainer.save_metrics(TRAIN, trained.metrics)
    trainer.save_state()
    trainer.save_model()
    metrics = {} if judging is None else trainer.evaluate(metric_key_prefix=judging)
    if not trainer.is_world_process_zero():
        return

    # From here on with what was saved, which may be the averaged weights.
    model = type(model).from_pretrained(training_args.output_dir).to(training_args.device)
    results = {} if judging is None else {"loss": metrics[f"{judging}_loss"]}
    if judging is not None and LABEL in splits[TRAIN].features and arguments.probe_images:
        try:
            results |= probe(
                model,
                evaluated[TRAIN],
                evaluated[judging],
                batch_size=training_args.per_device_eval_batch_size,
                device=training_args.device,
                max_images=arguments.probe_images,
                seed=training_args.seed,
            )
        except ValueError as error:
            print(f"The features could not be judged: {error}.")
    if judging is not None:
        trainer.save_metrics(judging, metrics | {f"{judging}_{name}": value for name, value in results.items()})

    output_dir = Path(training_args.output_dir)
    known, measured = facts(), evaluated[judging or TRAIN]
    seen = [torch.as_tensor(row["pixel_values"]) for row in islice(measured, NUM_MEASURED)]
    pictures, learnt = show_learnt(model.eval(), torch.stack(seen))
    run = TrainingRun(
        **known,
        **learnt,
        split_sizes={} if streaming else {name: len(split) for name, split in splits.items()},
        evaluation_split=judging,
        evaluation_origin=None if judging is None else name_split(splits, judging),
        results=results,
    )
    count = min(training_args.card_images, NUM_RECONSTRUCTIONS)
    if count:
        rows = show_reconstructions(model, torch.stack(seen[:count]), mean, std)
        # Trained on normalised patches, a model says nothing of their brightness and contrast.
        normalised = getattr(model.config, "norm_pix_loss", False) and arguments.objective == "masked_autoencoder"
        title = "reconstructed\nbut for mean\nand contrast" if normalised else "reconstructed"
        pictures[RECONSTRUCTIONS] = plot_images(rows, ("image", "masked", title))
    write_card(output_dir, run, pictures, keep_edits=bool(training_args.resume_from_checkpoint))
    figures = ", ".join([judging or "not judged", *(f"{METRIC_TITLES[name]} {results[name]:.4f}" for name in results)])
    print(f"\n{figures} after {known['wall_time']:.0f} s of training; saved to {output_dir}")
    print(
        f"\nNext:\n"
        f"  read the card and the figures   {output_dir / 'README.md'}\n"
        f"  fine-tune it                    python -m trainers.finetune --recipe {FINE_TUNING[arguments.objective]} "
        f"--dataset path/to/images --model {shlex.quote(str(output_dir))}"
    )
    push(trainer, command.program)


def check_given(given: Collection[str], objective: str) -> None:
    """Raises ValueError for a field that means nothing without labels, or for a head."""
    without_meaning = {each.name for each in fields(LossArguments)} | {
        "mixup",
        "cutmix",
        "mix_probability",
        "mix_switch_probability",
        "unmixed_epochs",
        "freeze_encoder",
        "lora_rank",
    }
    for name in given:
        if name in without_meaning:
            raise ValueError(f"--{name} means nothing for --objective {objective}: leave it out")


def show_reconstructions(
    model: PreTrainedModel, pixels: torch.Tensor, mean: list[float], std: list[float]
) -> list[tuple[np.ndarray, ...]]:
    """Rows of images (N, C, H, W) as 8-bit arrays: whole, masked and reconstructed."""
    mask, reconstructed = reconstruct(model, pixels.to(model.device))
    # The mean colour where nothing was seen.
    columns = (pixels, pixels.masked_fill(mask.cpu(), 0.0), reconstructed)
    return list(zip(*(to_arrays(column, mean, std) for column in columns)))


if __name__ == "__main__":
    main()
