"""Train an image classifier with the HF Trainer, from random weights or from a checkpoint.

Leaves a folder that the Auto classes and pipelines open: weights, code, image processor, metrics, figures and a card.
"""

import shlex
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import yaml
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    TrainerState,
    ViTImageProcessor,
    default_data_collator,
    logging,
    pipeline,
    set_seed,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from model_cards.card import TrainingRun, write_card
from model_cards.environment import describe_hardware, library_versions
from modeling_vit_custom import ViTCustomConfig, ViTCustomForImageClassification, list_presets, preset_config
from trainers.arguments import (
    AugmentationArguments,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
    report_user_errors,
    suggest,
    write_recipe,
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
        model_args, data_args, augmentation_args, training_args, given = parse_arguments(
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
        size, mean, std = read_processor(processor)
        transform = train_transform(augmentation_args, size, mean, std)

        train_dataset = with_transform(splits[TRAIN], transform)
        evaluated = {
            name: with_transform(split, processor_transform(processor))
            for name, split in splits.items()
            if name != TRAIN
        }
        trainer = Trainer(
            model=model,
            args=training_args,
            data_collator=default_data_collator,
            train_dataset=train_dataset,
            eval_dataset=evaluated[VALIDATION],
            processing_class=processor,
            compute_metrics=compute_metrics,
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
    wall_time = time.perf_counter() - start
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise SystemExit("finetune: error: training diverged, weights are not finite: lower --learning_rate")
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
        split_sizes={name: len(split) for name, split in splits.items()},
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
        check_channels(config.num_channels)
        return ViTCustomForImageClassification(config), make_processor(config)

    is_folder = Path(arguments.model).is_dir()
    # A folder of runs that is not there must never become a Hub id: anybody could own that name.
    if not is_folder and (arguments.model.count("/") != 1 or arguments.model.startswith("runs/")):
        raise ValueError(
            f"there is no model {arguments.model!r}: give a folder written by save_pretrained, a Hub id such as "
            f"user/name, or one of list_presets(){suggest(arguments.model, list_presets())}"
        )
    origin = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(arguments.model, **origin)
        if config.model_type == ViTCustomConfig.model_type and is_folder and not has_processor(arguments.model):
            processor = make_processor(config)
        else:
            processor = AutoImageProcessor.from_pretrained(arguments.model, **origin)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot open the model {arguments.model!r}: {error}") from error
    unknown = sorted(key for key in overrides if not hasattr(config, key))
    if unknown:
        raise ValueError(f"--config_overrides: {arguments.model!r} has no field {unknown[0]!r}")
    check_channels(overrides.get("num_channels", getattr(config, "num_channels", 3)))
    overrides["problem_type"] = "single_label_classification"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what was made anew is judged below
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            arguments.model, **origin, **names, **overrides, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot open the model {arguments.model!r}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    # A new head starts from random weights, the encoder must not.
    made_anew = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    encoder = sorted(key for key in made_anew if key.startswith(f"{model.base_model_prefix}."))
    if encoder:
        raise ValueError(
            f"{arguments.model!r} has no weights that fit {encoder[0]} ({len(encoder)} tensors): "
            "change no sizes by --config_overrides, and the image size by --image_size"
        )
    if arguments.image_size is not None:
        if not hasattr(model, "resize_image_size"):
            raise ValueError(f"--image_size: a {type(model).__name__} cannot be resized; leave it out")
        model.resize_image_size(arguments.image_size)
        processor.size = {"height": arguments.image_size, "width": arguments.image_size}
        processor.crop_size = processor.size
    return model, processor


def make_processor(config: ViTCustomConfig) -> ViTImageProcessor:
    """The family's own processor: resize to the native size, scale to -1..1."""
    height, width = config.native_size
    return ViTImageProcessor(size={"height": height, "width": width})


def has_processor(folder: str) -> bool:
    return any((Path(folder) / name).exists() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME))


def read_processor(processor: BaseImageProcessor) -> tuple[tuple[int, int], list[float], list[float]]:
    """Size (H, W) of the images that a processor makes, and the mean and deviation that it normalises by.

    Raises:
        ValueError: if the size depends on the image, or pixels are not scaled to 0..1.
    """
    cropped = getattr(processor, "do_center_crop", False)
    size = dict(processor.crop_size if cropped else processor.size)
    if not size.get("height") or not size.get("width"):
        raise ValueError(f"the image processor's size {size} must have a height and a width")
    if not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError(f"the image processor rescales by {processor.rescale_factor}, not by 1/255")
    if not getattr(processor, "do_normalize", True):
        return (size["height"], size["width"]), [0.0] * 3, [1.0] * 3
    return (size["height"], size["width"]), list(processor.image_mean), list(processor.image_std)


def check_channels(num_channels: int) -> None:
    if num_channels != 3:
        raise ValueError(f"num_channels={num_channels}: images are read in RGB, a model must take 3 channels")


def parse_overrides(overrides: list[str]) -> dict:
    """`["drop_path_rate=0.1"]` -> `{"drop_path_rate": 0.1}`, values as YAML reads them.

    Raises:
        ValueError: if an entry has no `=`, or a field is not to be set here.
    """
    parsed = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--config_overrides {override!r} must be FIELD=VALUE")
        if name in ("id2label", "label2id", "num_labels", "problem_type"):
            raise ValueError(f"--config_overrides {override!r}: the data set decides on {name}")
        try:
            parsed[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--config_overrides {override!r} is not YAML: {error}") from error
        with suppress(TypeError, ValueError):  # YAML takes 1e-6 for text
            parsed[name] = float(parsed[name]) if isinstance(parsed[name], str) else parsed[name]
    return parsed


def hide_folders(argument: str) -> str:
    """The last part of an absolute path: the whole may say more of its owner than of what lies there."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    return max((str(state.parent) for state in states), key=lambda path: int(path.rpartition("-")[2]), default=None)


def describe(
    arguments: ModelArguments, model: PreTrainedModel, splits: DatasetDict, training_args: TrainingArguments
) -> str:
    """Two lines on what is about to happen."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    steps, epochs = training_args.max_steps, training_args.num_train_epochs
    length = f"{steps:,} steps" if steps > 0 else f"{epochs:g} epochs"
    return (
        f"{arguments.model}: {model.num_parameters():,} parameters, {model.config.num_labels} classes\n"
        f"{sizes} images; {length} on {describe_hardware()}"
    )


def show_predictions(output_dir: Path, dataset: Dataset, trust_remote_code: bool = False, count: int = 3) -> None:
    """Open the folder as a user would, classify a few held-out images and say what to do next."""
    classifier = pipeline(
        "image-classification", model=str(output_dir), device="cpu", trust_remote_code=trust_remote_code
    )
    names = dataset.features[LABEL].names
    rows = dataset.select(range(0, len(dataset), max(1, len(dataset) // count))).select(range(min(count, len(dataset))))
    print(f"\n{rows.num_rows} held-out images through pipeline('image-classification', model={str(output_dir)!r}):")
    for row in rows:
        best = classifier(row[IMAGE], top_k=1)[0]
        verdict = "right" if best["label"] == names[row[LABEL]] else "wrong"
        print(f"  {names[row[LABEL]]!r} classified as {best['label']!r} with {best['score']:.1%}: {verdict}")
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
