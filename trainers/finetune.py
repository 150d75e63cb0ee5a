"""Train an image classifier with the HF Trainer, from random weights or from a checkpoint.

Leaves a folder that the Auto classes and pipelines open: weights, code, image processor, metrics, figures and a card.
"""

import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerState, pipeline, set_seed
from transformers.trainer_utils import IntervalStrategy

from model_cards.card import TrainingRun, write_card
from model_cards.environment import describe_hardware, library_versions
from modeling_vit_custom import list_presets
from trainers.arguments import (
    AugmentationArguments,
    DataArguments,
    LossArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
    report_user_errors,
    write_recipe,
)
from trainers.augmentation import Augmentation, Crop
from trainers.data import (
    BUILT_IN_TITLES,
    LABEL,
    TEST,
    TRAIN,
    VALIDATION,
    Splits,
    collate,
    label_names,
    load_splits,
    processor_transform,
    sample_images,
    training_images,
    with_transform,
)
from trainers.losses import Criterion, effective_number_weights, logit_adjustment
from trainers.metrics import compute_metrics, count_confusions
from trainers.mixing import Mixing
from trainers.models import make_model, read_processor
from trainers.sampling import ClassBalancedSampler, RepeatedAugmentationSampler
from trainers.teachers import Teacher
from trainers.vit_trainer import TrainingDivergedError, ViTTrainer


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
    with report_user_errors("finetune"):
        model_args, data_args, augmentation_args, loss_args, training_args, given = parse_arguments(
            [ModelArguments, DataArguments, AugmentationArguments, LossArguments, TrainingArguments],
            argv,
            PROGRAM,
            __doc__,
            EXAMPLES,
        )
        check_output_dir(training_args)
        set_seed(training_args.seed)
        if data_args.streaming:
            check_streaming(augmentation_args, loss_args, training_args)
        splits = load_splits(data_args, training_args.seed)
        if VALIDATION not in splits:
            train_without_validation(training_args)
        model, processor = make_model(model_args, label_names(splits))
        size, mean, std = read_processor(processor)
        crop, augmentation = Crop(augmentation_args, size), Augmentation(augmentation_args, mean, std)
        on_device = augmentation_args.augment_on_device
        train_dataset = training_images(
            splits[TRAIN], crop, None if on_device else augmentation, on_corrupt=data_args.on_corrupt
        )
        evaluated = {
            name: with_transform(split, processor_transform(processor), data_args.on_corrupt)
            for name, split in splits.items()
            if name != TRAIN
        }
        labels = [] if data_args.streaming else splits[TRAIN][LABEL][:]
        counts = torch.bincount(torch.tensor(labels, dtype=torch.long), minlength=model.config.num_labels)
        trainer = ViTTrainer(
            model=model,
            args=training_args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=evaluated.get(VALIDATION),
            processing_class=processor,
            compute_metrics=compute_metrics,
            augmentation=augmentation if on_device else None,
            mixing=make_mixing(augmentation_args, loss_args, model.config.num_labels),
            criterion=make_criterion(loss_args, counts),
            sampler=make_sampler(augmentation_args, loss_args, labels, training_args.seed),
            teacher=Teacher(loss_args, label_names(splits), mean, std, training_args.device)
            if loss_args.teacher
            else None,
        )
    print(describe(model_args, model, splits, training_args))
    start = time.perf_counter()
    try:
        trained = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    except KeyboardInterrupt:
        saved = last_checkpoint(training_args.output_dir)
        further = f"go on from {saved} by --resume_from_checkpoint true" if saved else "nothing was saved yet"
        print(f"\nfinetune: interrupted at step {trainer.state.global_step}: {further}", file=sys.stderr)
        raise SystemExit(130) from None
    except TrainingDivergedError as error:
        saved = last_checkpoint(training_args.output_dir)
        kept = f"{saved} is from before" if saved else "nothing was saved before"
        raise SystemExit(f"finetune: error: training diverged, {error}; {kept}: lower --learning_rate") from error
    wall_time = time.perf_counter() - start
    trainer.save_metrics(TRAIN, trained.metrics)
    trainer.save_state()

    # The split that nothing was chosen on speaks for the model.
    reported = TEST if TEST in evaluated else VALIDATION
    predictions = {name: trainer.predict(split, metric_key_prefix=name) for name, split in evaluated.items()}
    for name, prediction in predictions.items():
        trainer.save_metrics(name, prediction.metrics)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return

    output_dir = Path(training_args.output_dir)
    results = {name.removeprefix(f"{reported}_"): value for name, value in predictions[reported].metrics.items()}
    run = TrainingRun(
        name=training_args.hub_model_id or output_dir.resolve().name,
        model_type=model.config.model_type,
        preset=model_args.model if model_args.model in list_presets() else None,
        num_parameters=model.num_parameters(),
        image_size=size,
        label_names=label_names(splits),
        base_model=None if model_args.model in list_presets() else model_args.model,
        from_scratch=model_args.model in list_presets(),
        dataset=None if data_args.dataset in BUILT_IN_TITLES else data_args.dataset,
        dataset_title=BUILT_IN_TITLES.get(data_args.dataset),
        split_sizes=({} if data_args.streaming else {TRAIN: len(labels)})
        | {name: len(prediction.label_ids) for name, prediction in predictions.items()},
        evaluation_split=reported,
        results={name: results[name] for name in ("accuracy", "top5_accuracy", "macro_f1", "loss") if name in results},
        confusion_matrix=count_confusions(predictions[reported].predictions, predictions[reported].label_ids),
        log_history=trainer.state.log_history,
        command=f"{PROGRAM} {shlex.join(map(hide_folders, argv))}",
        seed=training_args.seed,
        versions=library_versions(),
        hardware=describe_hardware(),
        wall_time=wall_time,
    )
    write_card(output_dir, run)
    write_recipe(output_dir / "recipe.yaml", {name: value for name, value in given.items() if name != "output_dir"})
    print(f"\n{reported} accuracy {results['accuracy']:.2%} after {wall_time:.0f} s of training; saved to {output_dir}")
    show_predictions(output_dir, splits[reported], model_args.trust_remote_code)


def make_mixing(arguments: AugmentationArguments, loss_arguments: LossArguments, num_labels: int) -> Mixing:
    return Mixing(
        arguments.mixup,
        arguments.cutmix,
        arguments.mix_probability,
        arguments.mix_switch_probability,
        num_labels,
        loss_arguments.label_smoothing,
    )


def make_criterion(arguments: LossArguments, counts: torch.Tensor) -> Criterion:
    """The loss, given the number of training images of each class (L,)."""
    beta, strength = arguments.class_weight_beta, arguments.logit_adjustment
    return Criterion(
        loss=arguments.loss,
        class_weights=effective_number_weights(counts, beta) if beta else None,
        logit_adjustment=logit_adjustment(counts, strength) if strength else None,
        distillation=arguments.distillation,
        distillation_weight=arguments.distillation_weight,
        temperature=arguments.distillation_temperature,
    )


def make_sampler(
    arguments: AugmentationArguments, loss_arguments: LossArguments, labels: list[int], seed: int
) -> Sampler | None:
    """The order of the training images; none for a random permutation."""
    if loss_arguments.class_balanced_sampling:
        return ClassBalancedSampler(labels, seed)
    if arguments.repeated_augmentation > 1:
        return RepeatedAugmentationSampler(len(labels), arguments.repeated_augmentation, seed)
    return None


def check_streaming(
    augmentation_args: AugmentationArguments, loss_args: LossArguments, training_args: TrainingArguments
) -> None:
    """Raises ValueError for what must know the number of training images or their labels beforehand."""
    if training_args.max_steps <= 0:
        raise ValueError("--streaming true needs --max_steps: a stream does not say how long it is")
    needing = {
        "repeated_augmentation": augmentation_args.repeated_augmentation > 1,
        "class_balanced_sampling": loss_args.class_balanced_sampling,
        "class_weight_beta": loss_args.class_weight_beta,
        "logit_adjustment": loss_args.logit_adjustment,
        "unmixed_epochs": training_args.unmixed_epochs,
        "unmasked_epochs": training_args.unmasked_epochs,
    }
    refused = [name for name, value in needing.items() if value]
    if refused:
        raise ValueError(f"--{refused[0]} must know all training images beforehand: not with --streaming true")


def train_without_validation(training_args: TrainingArguments) -> None:
    """Nothing is evaluated before the end.

    Raises:
        ValueError: if the best checkpoint was asked for.
    """
    if training_args.load_best_model_at_end:
        raise ValueError("--load_best_model_at_end true needs a validation split to tell which model is best")
    training_args.eval_strategy = IntervalStrategy.NO


def check_output_dir(training_args: TrainingArguments) -> None:
    """Refuse to replace a model that nobody said may go, and a folder that cannot be written to after hours of work.

    Raises:
        ValueError: if the output folder holds a model, and neither overwriting nor resuming was asked for, or if there
            is no checkpoint to resume from.
        ValueError: if the folder cannot be written to.
    """
    folder = Path(training_args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} is a file: give a folder")
    if training_args.resume_from_checkpoint in ("true", "True"):
        training_args.resume_from_checkpoint = last_checkpoint(folder)
        if training_args.resume_from_checkpoint is None:
            raise ValueError(f"output_dir {str(folder)!r} holds no checkpoint to resume from")
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is not None:
        state_file = Path(checkpoint) / "trainer_state.json"
        if not state_file.exists():
            raise ValueError(f"--resume_from_checkpoint {checkpoint!r} is no checkpoint: give true or its folder")
        state = TrainerState.load_from_json(str(state_file))
        steps, epochs = training_args.max_steps, training_args.num_train_epochs
        if state.global_step >= steps if steps > 0 else state.epoch >= epochs:
            raise ValueError(
                f"{checkpoint!r} is {state.global_step} steps ({state.epoch:g} epochs) old: nothing is left to train"
            )
    if checkpoint is None and not training_args.overwrite:
        if (folder / "config.json").exists():
            raise ValueError(f"output_dir {str(folder)!r} already holds a model: pass --overwrite true or another one")
        if any(folder.glob("checkpoint-*")):
            raise ValueError(
                f"output_dir {str(folder)!r} already holds checkpoints: pass --resume_from_checkpoint true to go on, "
                "--overwrite true to start again, or another one"
            )
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be written to: {error.strerror}") from error


def hide_folders(argument: str) -> str:
    """The last part of an absolute path: the whole may say more of its owner than of what lies there."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    return max((str(state.parent) for state in states), key=lambda path: int(path.rpartition("-")[2]), default=None)


def describe(
    arguments: ModelArguments, model: PreTrainedModel, splits: Splits, training_args: TrainingArguments
) -> str:
    """Two lines on what is about to happen."""
    sizes = ", ".join(
        f"{len(split):,} {name}" if isinstance(split, Dataset) else f"streamed {name}" for name, split in splits.items()
    )
    steps, epochs = training_args.max_steps, training_args.num_train_epochs
    length = f"{steps:,} steps" if steps > 0 else f"{epochs:g} epochs"
    return (
        f"{arguments.model}: {model.num_parameters():,} parameters, {model.config.num_labels} classes\n"
        f"{sizes} images; {length} on {describe_hardware()}"
    )


def show_predictions(
    output_dir: Path, dataset: Dataset | IterableDataset, trust_remote_code: bool = False, count: int = 3
) -> None:
    """Open the folder as a user would, classify a few held-out images and say what to do next."""
    classifier = pipeline(
        "image-classification", model=str(output_dir), device="cpu", trust_remote_code=trust_remote_code
    )
    names, images = dataset.features[LABEL].names, sample_images(dataset, count)
    print(f"\n{len(images)} held-out images through pipeline('image-classification', model={str(output_dir)!r}):")
    for image, label in images:
        best = classifier(image, top_k=1)[0]
        verdict = "right" if best["label"] == names[label] else "wrong"
        print(f"  {names[label]!r} classified as {best['label']!r} with {best['score']:.1%}: {verdict}")
    executable = Path(sys.executable)
    python = executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else "python"
    model, other = shlex.quote(str(output_dir)), shlex.quote(f"{output_dir}-finetuned")
    print(
        f"\nNext:\n"
        f"  read the card and the figures   {output_dir / 'README.md'}\n"
        f"  install what the demo needs     {python} -m pip install -e '.[space]'\n"
        f"  try it in a browser             {python} spaces/app.py --model {model}\n"
        f"  train on your own images        {python} -m trainers.finetune --dataset path/to/images "
        f"--model {model} --output_dir {other}"
    )


if __name__ == "__main__":
    main()
