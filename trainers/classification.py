"""Training a classifier: data, model and Trainer put together, evaluated, saved and described by a card."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForImageClassification, TrainerState, pipeline, set_seed

from model_cards.facts import TrainingRun
from model_cards.rendering import METRIC_TITLES, write_card
from modeling_vit_custom.command_line import report_user_errors
from trainers.arguments import (
    AugmentationArguments,
    LossArguments,
    TrainingCommand,
)
from trainers.data import (
    LABEL,
    TEST,
    TRAIN,
    VALIDATION,
    Splits,
    label_names,
    sample_images,
)
from trainers.illustrations import NUM_EXAMPLES, illustrate, write_examples
from trainers.losses import Criterion, effective_number_weights, logit_adjustment
from trainers.metrics import SINGLE_METRICS, calibration_bins, compute_metrics, count_confusions
from trainers.mixing import Mixing
from trainers.models import make_model, read_processor
from trainers.run_facts import describe_model, gather_facts, name_split
from trainers.runs import (
    check_output_dir,
    describe,
    load_training_splits,
    prepare_images,
    push,
    train,
)
from trainers.sampling import BalancedOrder, RandomOrder, RepeatedOrder
from trainers.teachers import Teacher
from trainers.vit_trainer import ViTTrainer


def train_classifier(command: TrainingCommand) -> None:
    """Leaves a folder that the Auto classes and pipelines open: weights, code, processor, metrics, figures, card.

    Raises:
        SystemExit: with one line, where what was asked for cannot be done.
    """
    training_args = command.training
    with report_user_errors(command.program):
        check_given(command)
        check_output_dir(command)
        set_seed(training_args.seed)
        splits = load_training_splits(command)
        model, processor = make_model(command.model, label_names(splits))
        _, mean, std = read_processor(processor)
        train_dataset, augmentation, evaluated = prepare_images(command, splits, processor)
        labels = [] if command.data.streaming else splits[TRAIN][LABEL][:]
        training_args.label_names = ["labels"]  # models that compute no loss do not name them
        counts = torch.bincount(torch.tensor(labels, dtype=torch.long), minlength=model.config.num_labels)
        trainer = ViTTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=evaluated.get(VALIDATION),
            processing_class=processor,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=take_logits,
            augmentation=augmentation,
            mixing=make_mixing(command.augmentation, command.loss, model.config.num_labels),
            criterion=make_criterion(command.loss, counts),
            order=make_order(command.augmentation, command.loss, labels, training_args.seed),
            teacher=Teacher(command.loss, label_names(splits), mean, std, training_args.device, training_args.bf16)
            if command.loss.teacher
            else None,
            describe=lambda: TrainingRun(**facts(), **latest_evaluation(trainer.state, splits)),
        )

    unchanging = describe_model(trainer.published_model(), processor) | {
        "label_names": label_names(splits),
        "train_counts": [] if command.data.streaming else counts.tolist(),
    }

    def facts() -> dict:
        return unchanging | gather_facts(command, trainer)

    if trainer.is_world_process_zero():
        print(describe(f"{command.model.model}, {model.config.num_labels} classes", model, splits, training_args))
    trained = train(trainer, command)
    trainer.save_metrics(TRAIN, trained.metrics)
    trainer.save_state()
    trainer.save_model()

    # The split that nothing was chosen on speaks for the model.
    reported = TEST if TEST in evaluated else VALIDATION
    predictions = {
        name: trainer.predict(evaluated[name], metric_key_prefix=name) for name in evaluated if name != TRAIN
    }
    for name, prediction in predictions.items():
        trainer.save_metrics(name, prediction.metrics)
    if not trainer.is_world_process_zero():
        return

    output_dir, judged = Path(training_args.output_dir), predictions[reported]
    results = {name.removeprefix(f"{reported}_"): value for name, value in judged.metrics.items()}
    known, count = facts(), training_args.card_images
    # From here on with what was saved, which may be the averaged weights, and is whole in one process.
    published = AutoModelForImageClassification.from_pretrained(
        output_dir, trust_remote_code=command.model.trust_remote_code
    ).to(training_args.device)
    pictures, learnt = illustrate(published.eval(), processor, splits[reported], judged.predictions, count)
    run = TrainingRun(
        **known,
        **learnt,
        split_sizes=({} if command.data.streaming else {TRAIN: len(labels)})
        | {name: len(prediction.label_ids) for name, prediction in predictions.items()},
        evaluation_split=reported,
        evaluation_origin=name_split(splits, reported),
        results={name: results[name] for name in METRIC_TITLES if name in results},
        confusion_matrix=count_confusions(judged.predictions, judged.label_ids),
        calibration=calibration_bins(judged.predictions, judged.label_ids),
        examples=write_examples(output_dir, splits[reported], min(count, NUM_EXAMPLES)),
    )
    write_card(output_dir, run, pictures, keep_edits=bool(training_args.resume_from_checkpoint))
    print(
        f"\n{reported} accuracy {results['accuracy']:.2%} after {known['wall_time']:.0f} s of training; "
        f"saved to {output_dir}"
    )
    show_predictions(output_dir, splits[reported], command.model.trust_remote_code)
    push(trainer, command.program)


def latest_evaluation(state: TrainerState, splits: Splits) -> dict:
    """Fields of `TrainingRun` from an evaluation of the weights as they are, if there was one."""
    logged = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    if logged.get("step") != state.global_step:
        return {}
    return {
        "results": {name: logged[f"eval_{name}"] for name in METRIC_TITLES if f"eval_{name}" in logged},
        "evaluation_split": VALIDATION,
        "evaluation_origin": name_split(splits, VALIDATION),
        "split_sizes": {name: len(split) for name, split in splits.items() if isinstance(split, Dataset)},
    }


def take_logits(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """(B, L), also of a model that gives those of several heads as well."""
    return logits[0] if isinstance(logits, tuple) else logits


def check_given(command: TrainingCommand) -> None:
    """Raises ValueError for a field that nothing would heed."""
    for name in ("distillation", "distillation_weight", "distillation_temperature", "teacher_labels_by_index"):
        if name in command.given and command.loss.teacher is None:
            raise ValueError(f"--{name} needs a --teacher to learn from")
    if "optim" in command.given:
        raise ValueError(f"--optim {command.given['optim']} is not looked at: choose by --optimizer")
    judge, names = command.training.metric_for_best_model, ("loss", *SINGLE_METRICS)
    if judge is not None and judge.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model={judge!r} must be one of {', '.join(names)}")


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
    """The loss, given the number of training images of each class (L,).

    Raises:
        ValueError: for what the loss cannot make sense of.
    """
    if arguments.loss == "binary_cross_entropy":
        for name in ("label_smoothing", "class_weight_beta", "logit_adjustment"):
            if getattr(arguments, name):
                raise ValueError(
                    f"{name}={getattr(arguments, name)} is for cross_entropy: "
                    "binary_cross_entropy wants every class that is in the image whole"
                )
    beta, strength = arguments.class_weight_beta, arguments.logit_adjustment
    return Criterion(
        loss=arguments.loss,
        class_weights=effective_number_weights(counts, beta) if beta else None,
        logit_adjustment=logit_adjustment(counts, strength) if strength else None,
        distillation=arguments.distillation,
        distillation_weight=arguments.distillation_weight,
        temperature=arguments.distillation_temperature,
    )


def make_order(
    arguments: AugmentationArguments, loss_arguments: LossArguments, labels: Sequence[int], seed: int
) -> RandomOrder:
    """The order of the training images.

    Raises:
        ValueError: if images are to be seen less than once, or classes are to be balanced twice.
    """
    if loss_arguments.class_balanced_sampling:
        for name, value in {
            "repeated_augmentation": arguments.repeated_augmentation - 1,
            "class_weight_beta": loss_arguments.class_weight_beta,
            "logit_adjustment": loss_arguments.logit_adjustment,
        }.items():
            if value:
                raise ValueError(f"--class_balanced_sampling true does not go with --{name}: choose one of them")
        return BalancedOrder(labels, seed)
    if arguments.repeated_augmentation < 1:
        raise ValueError(f"repeated_augmentation={arguments.repeated_augmentation} must be at least 1")
    if arguments.repeated_augmentation > 1:
        return RepeatedOrder(len(labels), arguments.repeated_augmentation, seed)
    return RandomOrder(len(labels), seed)


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
