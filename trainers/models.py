"""Models to train, of presets and checkpoints, and the image processors that belong to them."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
    logging,
)
from transformers.image_utils import PILImageResampling
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from modeling_vit_custom import ViTCustomConfig, list_presets, preset_config
from trainers.arguments import NORMALIZATIONS, ModelArguments, suggest
from trainers.cnns import cnn_config, cnn_size, list_cnns


if TYPE_CHECKING:
    import peft


def make_model(
    arguments: ModelArguments, labels: Sequence[str] | None = None, auto_class: type = AutoModelForImageClassification
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A model of a preset or a checkpoint, with the image processor that belongs to it.

    Args:
        arguments: Which one.
        labels: Names of a classifier's classes.
        auto_class: What kind of model.

    Raises:
        ValueError: if there is neither, or a field of the configuration does not fit.
    """
    overrides = parse_overrides(arguments.config_overrides)
    if labels is not None:
        overrides["id2label"] = dict(enumerate(labels))
        overrides["label2id"] = {label: index for index, label in enumerate(labels)}
    if is_preset(arguments.model):
        model, processor = _from_preset(arguments, overrides, auto_class)
    else:
        check_is_model(arguments.model, "model")
        model, processor = _from_checkpoint(arguments, overrides, auto_class)
    if arguments.freeze_encoder and arguments.lora_rank:
        raise ValueError(f"--freeze_encoder true leaves nothing to change by --lora_rank {arguments.lora_rank}")
    if (arguments.freeze_encoder or arguments.lora_rank) and not has_own_encoder(model):
        name = "freeze_encoder" if arguments.freeze_encoder else "lora_rank"
        raise ValueError(f"--{name}: a {type(model).__name__} does not tell which part of it is the encoder")
    if arguments.freeze_encoder:
        freeze(model)
    if arguments.lora_rank:
        model = add_lora(model, arguments.lora_rank, arguments.lora_alpha)
    return model, processor


def _from_preset(
    arguments: ModelArguments, overrides: dict, auto_class: type
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    if arguments.freeze_encoder or arguments.lora_rank:
        name = "freeze_encoder" if arguments.freeze_encoder else "lora_rank"
        raise ValueError(f"--{name} keeps the encoder's weights, but those of preset {arguments.model!r} are random")
    if arguments.new_head:
        raise ValueError(f"--new_head true needs a checkpoint: the head of preset {arguments.model!r} is new anyway")
    if auto_class is not AutoModelForImageClassification and arguments.model in list_cnns():
        raise ValueError(f"--model {arguments.model!r} is a CNN: only a vit_custom can be pretrained")
    config = _preset_config(arguments, overrides)
    return auto_class.from_config(config), _preset_processor(arguments, config)


def is_preset(model: str) -> bool:
    """Whether a model is one that has a name here, and random weights."""
    return model in list_named()


def list_named() -> list[str]:
    """Presets of this family and named CNNs."""
    return [*list_presets(), *list_cnns()]


def _preset_config(arguments: ModelArguments, overrides: dict) -> PreTrainedConfig:
    if arguments.model in list_cnns():
        config = cnn_config(arguments.model, **overrides)
    else:
        size = {} if arguments.image_size is None else {"image_size": arguments.image_size}
        config = preset_config(arguments.model, **{**overrides, **size})
    check_channels(config.num_channels)
    return config


def _preset_processor(arguments: ModelArguments, config: PreTrainedConfig) -> BaseImageProcessor:
    is_ours = isinstance(config, ViTCustomConfig)
    size = config.native_size if is_ours else (cnn_size(arguments.model),) * 2
    return adapt_processor(make_processor(size), arguments)


def _from_checkpoint(
    arguments: ModelArguments, overrides: dict, auto_class: type
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    config, processor = _open_config(arguments)
    if auto_class is not AutoModelForImageClassification and config.model_type != ViTCustomConfig.model_type:
        raise ValueError(f"--model {arguments.model!r} is a {config.model_type}: only a vit_custom can be pretrained")
    unknown = sorted(key for key in overrides if not hasattr(config, key))
    if unknown:
        raise ValueError(f"--config_overrides: {arguments.model!r} has no field {unknown[0]!r}")
    check_channels(overrides.get("num_channels", getattr(config, "num_channels", 3)))
    if "id2label" in overrides:
        overrides = {**overrides, "problem_type": "single_label_classification"}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what was made anew is judged below
    try:
        model, loading = auto_class.from_pretrained(
            arguments.model,
            **_origin(arguments),
            **overrides,
            dtype=torch.float32,  # whatever the checkpoint's: averages and small steps vanish in half precision
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot open the model {arguments.model!r}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    # A new head starts from random weights, and so may a norm behind the pooling; the encoder must not.
    made_anew = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])} - name_head(model)
    prefix = f"{model.base_model_prefix}."
    if has_own_encoder(model):
        made_anew = {key for key in made_anew if key.startswith(prefix) and not key.startswith(f"{prefix}pooling.")}
    encoder = sorted(made_anew)
    if encoder:
        raise ValueError(
            f"{arguments.model!r} has no weights that fit {encoder[0]} ({len(encoder)} tensors): "
            "change no sizes by --config_overrides, and the image size by --image_size"
        )
    if arguments.new_head:
        model = _with_new_head(model)
    if arguments.image_size is not None:
        if not hasattr(model, "resize_image_size"):
            raise ValueError(f"--image_size: a {type(model).__name__} cannot be resized; leave it out")
        model.resize_image_size(arguments.image_size)
    return model, processor


def _with_new_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same encoder under a head of random weights."""
    new, head = type(model)._from_config(model.config, dtype=torch.float32), name_head(model)
    encoder = {name: value for name, value in model.state_dict().items() if name not in head}
    new.load_state_dict(encoder, strict=False)
    return new


def _origin(arguments: ModelArguments) -> dict:
    return {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}


def _open_config(arguments: ModelArguments) -> tuple[PreTrainedConfig, BaseImageProcessor]:
    """Of a checkpoint; the processor makes images of the size to train at."""
    try:
        config = AutoConfig.from_pretrained(arguments.model, **_origin(arguments))
        is_ours = config.model_type == ViTCustomConfig.model_type
        if is_ours and Path(arguments.model).is_dir() and not has_processor(arguments.model):
            processor = make_processor(config.native_size)
        else:
            processor = AutoImageProcessor.from_pretrained(arguments.model, **_origin(arguments))
    except (AttributeError, OSError, TypeError, ValueError) as error:  # the first two of files that hold something else
        raise ValueError(f"cannot open the model {arguments.model!r}: {error}") from error
    return config, adapt_processor(processor, arguments)


def open_processor(arguments: ModelArguments) -> BaseImageProcessor:
    """The image processor of a preset or a checkpoint, without the model.

    Raises:
        ValueError: if there is neither.
    """
    if is_preset(arguments.model):
        return _preset_processor(arguments, _preset_config(arguments, parse_overrides(arguments.config_overrides)))
    check_is_model(arguments.model, "model")
    return _open_config(arguments)[1]


def check_is_model(name: str, argument: str) -> None:
    """Raises ValueError unless a name is a folder, or may be a Hub id."""
    # A folder of runs that is not there must never become a Hub id: anybody could own that name.
    if Path(name).is_dir() and not Path(name, "config.json").exists():
        raise ValueError(f"folder {name!r} holds no config.json: give one that was written by save_pretrained")
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith(("runs/", "/", ".", "~"))):
        presets = f", or one of list_presets(){suggest(name, list_named())}" if argument == "model" else ""
        raise ValueError(
            f"there is no {argument} {name!r}: give a folder written by save_pretrained, a Hub id such as "
            f"user/name{presets}"
        )


def name_head(model: PreTrainedModel) -> set[str]:
    """Names of the weights that belong to a classifier's head, not to its encoder."""
    named = dict(model.named_parameters())
    if not has_own_encoder(model):
        return {name for name in named if name.startswith("classifier.")}
    if isinstance(model, TimmWrapperForImageClassification):
        head = {id(parameter) for parameter in model.timm_model.get_classifier().parameters()}
        return {name for name, parameter in named.items() if id(parameter) in head}
    return {name for name in named if not name.startswith(f"{model.base_model_prefix}.")}


def find_head(model: PreTrainedModel) -> nn.Module:
    """The module that makes logits of what the encoder pooled, which is its first argument.

    Raises:
        ValueError: if the head's weights lie in several modules, or the model does not tell which they are.
    """
    head = name_head(model)
    modules = {
        name: {f"{name}.{key}" for key, _ in module.named_parameters()} for name, module in model.named_modules()
    }
    paths = [name for name, weights in modules.items() if head and weights == head]
    if not paths:
        raise ValueError(f"a {type(model).__name__} has no one head whose input would be its features")
    return model.get_submodule(paths[-1])  # the innermost: what is around it may still change the shape


def has_own_encoder(model: PreTrainedModel) -> bool:
    """False for those that hold their encoder under another name than they say, such as CLIP's classifier."""
    return model.base_model is not model


def freeze(model: PreTrainedModel) -> None:
    """Keep an encoder as it is: no gradients, and evaluation mode for good, so that nothing is dropped at random."""
    head, encoder = name_head(model), model.base_model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    encoder.eval()
    encoder.train = lambda mode=True: encoder


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> "peft.PeftModel":
    """Low-rank changes of all matrices of the encoder (https://arxiv.org/abs/2106.09685); the head is trained whole.

    `merge_and_unload` of what comes back makes a plain model again.

    Raises:
        ValueError: if the peft library is missing, or the rank is below 1.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("--lora_rank needs the peft library: pip install 'peft>=0.18'") from error
    if rank < 1:
        raise ValueError(f"lora_rank={rank} must be at least 1, or 0 for none")
    head = {name.rpartition(".")[0] for name in name_head(model)}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in head]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, modules_to_save=sorted(head))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks the library by a name that has a newer one
        return peft.get_peft_model(model, config)


def make_processor(size: tuple[int, int]) -> ViTImageProcessor:
    """The family's own processor: resize to a size (H, W), scale to -1..1."""
    height, width = size
    return ViTImageProcessor(size={"height": height, "width": width})


def adapt_processor(processor: BaseImageProcessor, arguments: ModelArguments) -> BaseImageProcessor:
    """The same processor, changed as the arguments say.

    Raises:
        ValueError: if it cannot be.
    """
    given = [name for name in ("normalization", "eval_interpolation", "eval_crop") if getattr(arguments, name)]
    if given and isinstance(processor, TimmWrapperImageProcessor):
        raise ValueError(f"--{given[0]}: a timm model's images are prepared as its own configuration says")
    if arguments.image_size is not None and isinstance(processor, TimmWrapperImageProcessor):
        config = {**processor.data_config, "input_size": (3, arguments.image_size, arguments.image_size)}
        processor = TimmWrapperImageProcessor(config, processor.architecture)
    elif arguments.image_size is not None:
        side, shorter = arguments.image_size, dict(processor.size).get("shortest_edge")
        square = {"height": side, "width": side}
        if getattr(processor, "do_center_crop", False) and shorter:
            processor.size = {"shortest_edge": round(side * shorter / dict(processor.crop_size)["height"])}
        else:
            processor.size = square
        processor.crop_size = square
    if arguments.normalization is not None:
        processor.image_mean, processor.image_std = NORMALIZATIONS[arguments.normalization]
        processor.do_normalize = True
    if arguments.eval_interpolation is not None:
        processor.resample = PILImageResampling[arguments.eval_interpolation.upper()]
    if arguments.eval_crop is not None:
        height, width = read_processor(processor)[0]
        if height != width:
            raise ValueError(f"--eval_crop {arguments.eval_crop} needs square images, not of {height} x {width} pixels")
        processor.size = {"shortest_edge": round(height / arguments.eval_crop)}
        processor.do_center_crop, processor.crop_size = True, {"height": height, "width": width}
    return processor


def has_processor(folder: str) -> bool:
    return any((Path(folder) / name).exists() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME))


def read_processor(processor: BaseImageProcessor) -> tuple[tuple[int, int], list[float], list[float]]:
    """Size (H, W) of the images that a processor makes, and the mean and deviation that it normalises by.

    Raises:
        ValueError: if the size depends on the image, or pixels are not scaled to 0..1.
    """
    if isinstance(processor, TimmWrapperImageProcessor):
        data = processor.data_config
        return tuple(data["input_size"][1:]), list(data["mean"]), list(data["std"])
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
