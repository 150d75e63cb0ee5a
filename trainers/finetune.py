"""Train an image classifier with the HF Trainer, from random weights or from a checkpoint.

Leaves a folder that the Auto classes and pipelines open: weights, code, image processor, metrics, figures and a card.
"""

import platform
import shlex
import sys
import time
from pathlib import Path

import accelerate
import datasets
import torch
import transformers
import yaml
from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    ViTImageProcessor,
    default_data_collator,
    pipeline,
    set_seed,
)

from model_cards.card import TrainingRun, write_card
from modeling_vit_custom import ViTCustomForImageClassification, list_presets, preset_config
from trainers.arguments import (
    AugmentationArguments,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
    report_user_errors,
)
from trainers.augmentation import train_transform
from trainers.data import (
    BUILT_IN_TITLES,
    IMAGE,
    LABEL,
    TEST,
    TRAIN,
    VALIDATION,
    label_names,
    load_splits,
    processor_transform,
    with_transform,
)
from trainers.metrics import compute_metrics, count_confusions


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
        model_args, data_args, augmentation_args, training_args = parse_arguments(
            [ModelArguments, DataArguments, AugmentationArguments, TrainingArguments],
            argv,
            PROGRAM,
            __doc__,
            EXAMPLES,
        )
        check_output_dir(training_args)
        set_seed(training_args.seed)
        splits = load_splits(data_args)
        model, processor = make_model(model_args, label_names(splits))
        size = (processor.size["height"], processor.size["width"])
        transform = train_transform(augmentation_args, size, processor.image_mean, processor.image_std)

    train_dataset = with_transform(splits[TRAIN], transform)
    evaluated = {
        name: with_transform(split, processor_transform(processor)) for name, split in splits.items() if name != TRAIN
    }
    print(describe(model_args, model, splits, training_args))
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=default_data_collator,
        train_dataset=train_dataset,
        eval_dataset=evaluated[VALIDATION],
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    start = time.perf_counter()
    trained = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
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
        name=training_args.hub_model_id or output_dir.name,
        preset=model_args.model if model_args.model in list_presets() else None,
        num_parameters=model.num_parameters(),
        image_size=size,
        label_names=label_names(splits),
        base_model=None if model_args.model in list_presets() else model_args.model,
        from_scratch=model_args.model in list_presets(),
        dataset=None if data_args.dataset in BUILT_IN_TITLES else data_args.dataset,
        dataset_title=BUILT_IN_TITLES.get(data_args.dataset),
        split_sizes={name: len(split) for name, split in splits.items()},
        evaluation_split=reported,
        results={name: results[name] for name in ("accuracy", "top5_accuracy", "macro_f1", "loss") if name in results},
        confusion_matrix=count_confusions(predictions[reported].predictions, predictions[reported].label_ids),
        log_history=trainer.state.log_history,
        command=f"{PROGRAM} {shlex.join(argv)}",
        seed=training_args.seed,
        versions=library_versions(),
        hardware=describe_hardware(),
        wall_time=wall_time,
    )
    write_card(output_dir, run)
    print(f"\n{reported} accuracy {results['accuracy']:.2%} after {wall_time:.0f} s of training; saved to {output_dir}")
    show_predictions(output_dir, splits[reported])


def check_output_dir(training_args: TrainingArguments) -> None:
    """Refuse to replace a model that nobody said may go.

    Raises:
        ValueError: if the output folder holds a model, and neither overwriting nor resuming was asked for.
    """
    folder = Path(training_args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} is a file: give a folder")
    replace = training_args.overwrite or training_args.resume_from_checkpoint
    if (folder / "config.json").exists() and not replace:
        raise ValueError(f"output_dir {str(folder)!r} already holds a model: pass --overwrite or another --output_dir")


def make_model(arguments: ModelArguments, labels: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier of these labels, of a preset or a checkpoint, with the image processor that belongs to it.

    Raises:
        ValueError: if there is neither, or a field of the configuration does not fit.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    overrides = parse_overrides(arguments.config_overrides)
    if arguments.model in list_presets():
        if arguments.image_size is not None:
            overrides["image_size"] = arguments.image_size
        config = preset_config(arguments.model, **names, **overrides)
        height, width = config.native_size
        return ViTCustomForImageClassification(config), ViTImageProcessor(size={"height": height, "width": width})

    is_folder = Path(arguments.model).is_dir()
    if not is_folder and arguments.model.count("/") != 1:
        raise ValueError(
            f"there is no model {arguments.model!r}: give a folder written by save_pretrained, a Hub id such as "
            f"user/name, or a preset ({', '.join(list_presets())})"
        )
    origin = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(arguments.model, **origin)
        processor = AutoImageProcessor.from_pretrained(arguments.model, **origin)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot open the model {arguments.model!r}: {error}") from error
    unknown = sorted(key for key in overrides if not hasattr(config, key))
    if unknown:
        raise ValueError(f"--config_overrides: {arguments.model!r} has no field {unknown[0]!r}")
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model, **origin, **names, **overrides, ignore_mismatched_sizes=True
    )
    if arguments.image_size is not None:
        if not hasattr(model, "resize_image_size"):
            raise ValueError(f"--image_size: a {type(model).__name__} cannot be resized; leave it out")
        model.resize_image_size(arguments.image_size)
        processor.size = {"height": arguments.image_size, "width": arguments.image_size}
    return model, processor


def parse_overrides(overrides: list[str]) -> dict:
    """`["drop_path_rate=0.1"]` -> `{"drop_path_rate": 0.1}`, values as YAML reads them.

    Raises:
        ValueError: if an entry has no `=`.
    """
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ValueError(f"--config_overrides {wrong[0]!r} must be FIELD=VALUE")
    return {name: yaml.safe_load(value) for name, _, value in (override.partition("=") for override in overrides)}


def describe(
    arguments: ModelArguments, model: PreTrainedModel, splits: DatasetDict, training_args: TrainingArguments
) -> str:
    """Two lines on what is about to happen."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    return (
        f"{arguments.model}: {model.num_parameters():,} parameters, {model.config.num_labels} classes\n"
        f"{sizes} images; {training_args.num_train_epochs:g} epochs on {describe_hardware()}"
    )


def describe_hardware() -> str:
    """The accelerator, or the processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads of {names[0] if names else platform.processor() or platform.machine()}"


def library_versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "accelerate": accelerate.__version__,
    }


def show_predictions(output_dir: Path, dataset: datasets.Dataset, count: int = 3) -> None:
    """Open the folder as a user would, classify a few held-out images and say what to do next."""
    classifier = pipeline("image-classification", model=str(output_dir), device="cpu")
    names = dataset.features[LABEL].names
    rows = dataset.select(range(0, len(dataset), max(1, len(dataset) // count))).select(range(min(count, len(dataset))))
    print(f"\n{rows.num_rows} held-out images through pipeline('image-classification', model={str(output_dir)!r}):")
    for row in rows:
        best = classifier(row[IMAGE].convert("RGB"), top_k=1)[0]
        verdict = "right" if best["label"] == names[row[LABEL]] else "wrong"
        print(f"  {names[row[LABEL]]!r} classified as {best['label']!r} with {best['score']:.1%}: {verdict}")
    print(
        f"\nNext:\n"
        f"  read the card and the figures   {output_dir / 'README.md'}\n"
        f"  try it in a browser             python spaces/app.py --model {output_dir}\n"
        f"  train on your own images        {PROGRAM} --dataset path/to/images --model {output_dir} "
        "--output_dir runs/mine"
    )


if __name__ == "__main__":
    main()
