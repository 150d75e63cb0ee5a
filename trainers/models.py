"""Models to train, of presets and checkpoints, and the image processors that belong to them."""

from contextlib import suppress
from pathlib import Path

import yaml
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    ViTImageProcessor,
    logging,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from modeling_vit_custom import ViTCustomConfig, ViTCustomForImageClassification, list_presets, preset_config
from trainers.arguments import ModelArguments, suggest


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
