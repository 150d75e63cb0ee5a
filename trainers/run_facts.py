"""What a card says of a run: its model, its data, its command, and what it took."""

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Resampling
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainerState
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.trainer_callback import ExportableState

from model_cards.citations import PAPERS, REBALANCING
from model_cards.environment import EnergyMeter, code_commit, describe_hardware, library_versions, peak_memory
from model_cards.metadata import is_repo_id
from modeling_vit_custom import ViTCustomConfig
from trainers.arguments import ModelArguments, TrainingCommand
from trainers.data import BUILT_IN_TITLES, TRAIN, Splits
from trainers.hub import hide_folder
from trainers.models import is_preset, read_processor
from trainers.pace import count_flops, is_countable
from trainers.vit_trainer import ViTTrainer


SECONDS_BETWEEN_READINGS = 60.0  # of the energy counters


class Spent(TrainerCallback, ExportableState):
    """Seconds and joules of training, kept in the Trainer's state: a resumed run adds to those of its checkpoint."""

    def __init__(self):
        self.before = {"seconds": 0.0, "joules": 0.0}
        self.start = self.last_reading = time.perf_counter()
        self.meter = EnergyMeter()

    @classmethod
    def read(cls, state: TrainerState) -> dict[str, float | None]:
        """`seconds`, and `joules` if they could be measured from the start."""
        saved = state.stateful_callbacks.get(cls.__name__)
        return saved["attributes"]["before"] if saved else {"seconds": 0.0, "joules": 0.0}

    def state(self) -> dict:
        self.meter.update()
        joules = (self.before["joules"], self.meter.joules)
        spent = {
            "seconds": self.before["seconds"] + time.perf_counter() - self.start,
            "joules": None if None in joules else sum(joules),
        }
        return {"args": {}, "attributes": {"before": spent}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.before, self.start, self.meter = self.read(state), time.perf_counter(), EnergyMeter()
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_end(self, args, state, control, **kwargs):
        if time.perf_counter() - self.last_reading > SECONDS_BETWEEN_READINGS:
            self.meter.update()
            self.last_reading = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        state.stateful_callbacks[type(self).__name__] = self.state()


def gather_facts(command: TrainingCommand, trainer: ViTTrainer) -> dict:
    """What a card says of any run, finished or not, as fields of `TrainingRun`; of its model, see `describe_model`."""
    args, state, model, data = trainer.args, trainer.state, command.model.model, command.data.dataset
    from_scratch, is_built_in = is_preset(model), data in BUILT_IN_TITLES
    is_done = state.global_step >= state.max_steps
    spent = Spent.read(state)
    wall_time, energy = spent["seconds"], spent["joules"]
    images = state.global_step * args.images_per_step
    return {
        "name": (args.hub_model_id or Path(args.output_dir).resolve().name).rpartition("/")[-1],
        "license": args.license,
        "preset": model if from_scratch else None,
        "preset_changes": describe_changes(command.model) if from_scratch else [],
        "ema_decay": args.ema_decay or None,
        **name_origin("teacher", "teacher_folder", command.loss.teacher),
        "rebalancing": {name: value for name in REBALANCING if (value := getattr(command.loss, name))},
        "from_scratch": from_scratch,
        **name_origin("base_model", "base_folder", None if from_scratch else model),
        **name_origin("dataset", "dataset_folder", None if is_built_in else data),
        "dataset_title": command.data.dataset_title or BUILT_IN_TITLES.get(data),
        "train_fraction": command.data.train_fraction if command.data.train_fraction < 1 else None,
        "train_imbalance": command.data.train_imbalance if command.data.train_imbalance > 1 else None,
        "log_history": state.log_history,
        "step": None if is_done else state.global_step,
        "max_steps": None if is_done else state.max_steps,
        "command": format_command(command.program, command.argv, args.world_size),
        "commit": code_commit(),
        "seed": args.seed,
        "versions": library_versions(),
        "hardware": describe_hardware(args.device, args.world_size),
        "wall_time": wall_time,
        "images_per_second": images / wall_time if wall_time else None,
        "peak_memory": peak_memory(args.device),
        "energy": energy / 3.6e6 if energy else None,
        "carbon": energy / 3.6e6 * args.carbon_intensity if energy and args.carbon_intensity else None,
    }


def describe_model(model: PreTrainedModel, processor: BaseImageProcessor) -> dict:
    """What a model is and the images it takes, as fields of `TrainingRun`."""
    config, (size, _, _) = model.config, read_processor(processor)
    is_our_own = config.model_type == ViTCustomConfig.model_type
    return {
        "model_type": config.model_type,
        "architecture": name_architecture(config),
        "num_parameters": model.num_parameters(),
        "flops": count_flops(model, size) if is_countable(model) else None,
        "image_size": size,
        "stages": describe_stages(config) if is_our_own else [],
        "preprocessing": describe_preprocessing(processor),
    }


def name_architecture(config: PreTrainedConfig) -> str | None:
    """The paper that a configuration comes closest to, as a key of `model_cards.citations.PAPERS`."""
    if config.model_type != ViTCustomConfig.model_type:
        return config.model_type if config.model_type in PAPERS else None
    if config.window_size:
        return "swin"
    if len(config.stages) > 1:
        return "pvt"
    if config.use_distillation_token:
        return "deit"
    return "vit" if config.layer_scale_init_value is None else "deit3"


def describe_stages(config: ViTCustomConfig) -> list[dict[str, str | int]]:
    """How an encoder is built: what each stage's row of a table says, by column."""
    rows, stride = [], 1
    for number, stage in enumerate(config.stages, start=1):
        stride *= stage.patch_size
        attention, positions = "global", stage.position_embedding_type
        if stage.window_size:
            attention = f"windows of {stage.window_size} x {stage.window_size}, every other block's shifted"
            positions = "relative" if positions == "none" else f"{positions}, relative"
        elif stage.sr_ratio > 1:
            attention = f"global, keys of {stage.sr_ratio} x {stage.sr_ratio} patches in one"
        rows.append(
            {
                "Stage": number,
                "Patches": "{} x {}".format(*stage.grid_size),
                "Pixels of each": f"{stride} x {stride}",
                "Blocks": stage.depth,
                "Width": stage.hidden_size,
                "Heads": stage.num_attention_heads,
                "MLP": stage.intermediate_size,
                "Attention": attention,
                "Positions": positions,
            }
        )
    return rows


def describe_preprocessing(processor: BaseImageProcessor) -> str | None:
    """One sentence on what becomes of an image before the model sees it; none for what timm does."""
    if isinstance(processor, TimmWrapperImageProcessor):
        return None
    (height, width), mean, std = read_processor(processor)
    steps, size = [], dict(processor.size or {})
    if getattr(processor, "do_resize", False):
        if "shortest_edge" in size:
            resized = f"a shorter side of {size['shortest_edge']} pixels"
        else:
            resized = f"{size['height']} x {size['width']} pixels"
        how = "" if processor.resample is None else f" ({Resampling(processor.resample).name.lower()})"
        steps.append(f"resized to {resized}{how}")
    if getattr(processor, "do_center_crop", False):
        steps.append(f"cropped to the middle {height} x {width}")
    scaled = "scaled to 0..1"
    if getattr(processor, "do_normalize", True):
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (mean, std))
        scaled += f" and normalised by mean ({mean}) and standard deviation ({std})"
    return f"Images are {', '.join([*steps, scaled])}."


def name_split(splits: Splits, name: str) -> str | None:
    """What a split is called in its data set, if it is another name: `train` where it was held out of that."""
    origin = None if splits[name].split is None else str(splits[name].split)
    if name != TRAIN and origin is not None and origin == str(splits[TRAIN].split):
        return TRAIN  # whatever that is called there
    return None if origin == name else origin


def name_origin(on_hub: str, local: str, name: str | None) -> dict[str, str]:
    """What a model or a data set is called: by its Hub id, or by its folder without what lies above it.

    As everywhere in the ecosystem, a folder takes precedence over a Hub id that reads like it.
    """
    if name is None:
        return {}
    if Path(name).exists() or not is_repo_id(name):
        return {local: Path(name).resolve().name}
    return {on_hub: name}


def describe_changes(arguments: ModelArguments) -> list[str]:
    """What of a preset was set otherwise."""
    size = [] if arguments.image_size is None else [f"image_size={arguments.image_size}"]
    return [*size, *arguments.config_overrides]


def format_command(program: str, argv: Sequence[str], num_processes: int = 1) -> str:
    """A command line as it may be published: without what lies above folders, and where it was pushed to."""
    launcher = "python"
    if num_processes > 1:
        on_each_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
        nodes = f"--nnodes {num_processes // on_each_node} " if num_processes > on_each_node else ""
        launcher = f"torchrun {nodes}--nproc_per_node {on_each_node}"
    published, name = [], ""
    for argument in argv:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
        if name == "dataset_title":
            published.append(argument)
        elif not name.startswith(("push_to_hub", "hub_")):
            published.append(hide_folders(argument, name in ("output_dir", "resume_from_checkpoint")))
        if not argument.startswith("--") or "=" in argument:
            name = ""  # each of these has one value
    return f"{launcher} -m trainers.{program} {shlex.join(published)}"


def hide_folders(argument: str, is_folder: bool = False) -> str:
    """An argument with no more than the last part of a local path, which it is for sure if `is_folder`."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{Path(value).resolve().name if is_folder and value else hide_folder(value)}"
