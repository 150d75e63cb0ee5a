"""Configuration of the staged vision transformer encoder."""

import math
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


# Every Auto class that a saved folder serves, whichever head was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_vit_custom.ViTCustomConfig",
    "AutoModel": "modeling_vit_custom.ViTCustomModel",
    "AutoModelForImageClassification": "modeling_vit_custom.ViTCustomForImageClassification",
    "AutoModelForPreTraining": "modeling_vit_custom.ViTCustomForPreTraining",
    "AutoModelForMaskedImageModeling": "modeling_vit_custom.ViTCustomForMaskedImageModeling",
    "AutoBackbone": "modeling_vit_custom.ViTCustomBackbone",
}

HIDDEN_ACTS = ("gelu", "gelu_pytorch_tanh")
POOLINGS = ("cls", "mean")
POSITION_EMBEDDING_TYPES = ("learned", "sincos2d", "none")
DROP_PATH_SCHEDULES = ("linear", "constant")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class StageConfig:
    """One stage of the encoder, with every per-stage field resolved to one value.

    `grid_size` is the (height, width) in patches at the configured image size; `drop_path_rates` has one entry a block.
    """

    in_channels: int
    patch_size: int
    patch_merging: bool
    patch_norm: bool
    hidden_size: int
    depth: int
    num_attention_heads: int
    intermediate_size: int
    sr_ratio: int
    window_size: int
    position_embedding_type: str
    num_prefix_tokens: int
    grid_size: tuple[int, int]
    drop_path_rates: tuple[float, ...]


@strict
class ViTCustomConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of a sequence of transformer stages; ViT, DeiT, PVT and Swin are values of these fields.

    A field that is an `int`, a `str` or a list holds one value for all stages or one for each stage.
    The default is ViT-B/16 at 224 pixels (https://arxiv.org/abs/2010.11929, table 1).

    Args:
        image_size (`int` or (height, width), defaults to 224): Native size in pixels; other sizes work as well.
        num_channels (`int`, defaults to 3): Channels of an image.
        patch_size (`int` or `list[int]`, defaults to 16): Side of the patches that a stage embeds, in units of the
            grid that it receives (pixels for the first stage).
        patch_norm (`bool`, defaults to `False`): Layer norm after a convolutional patch embedding.
        patch_merging (`bool`, defaults to `False`): Stages after the first one embed by concatenating the patch,
            normalising and projecting it (https://arxiv.org/abs/2103.14030, section 3.1) instead of convolving.
        hidden_size (`int`, defaults to 768): Width of a single stage; of the last one where `hidden_sizes` is given.
        hidden_sizes (`list[int]`, *optional*): Width of each stage.
        num_hidden_layers (`int`, defaults to 12): Blocks of a single stage; of all where `depths` is given.
        depths (`list[int]`, *optional*): Blocks of each stage.
        num_attention_heads (`int` or `list[int]`, defaults to 12): Attention heads.
        intermediate_size (`int` or `list[int]`, *optional*): Width of the MLP, by default 4 times the stage's width.
        sr_ratios (`int` or `list[int]`, defaults to 1): Spatial reduction of keys and values
            (https://arxiv.org/abs/2102.12122, section 3.3); 1 reduces nothing.
        window_size (`int` or `list[int]`, defaults to 0): Side in patches of shifted attention windows with a relative
            position bias (https://arxiv.org/abs/2103.14030, section 3.2); 0 attends globally.
        use_class_token (`bool`, defaults to `True`): Prepend a class token in the last stage.
        use_distillation_token (`bool`, defaults to `False`): Prepend a distillation token after the class token, with a
            head of its own (https://arxiv.org/abs/2012.12877, section 4).
        num_register_tokens (`int`, defaults to 0): Registers after these tokens (https://arxiv.org/abs/2309.16588).
        position_embedding_type (`str` or `list[str]`, defaults to `"learned"`): `"learned"`, `"sincos2d"` (fixed,
            https://arxiv.org/abs/2111.06377, appendix A.1) or `"none"`; added to a stage's patches.
        position_antialias (`bool`, defaults to `False`): Antialias when positions are interpolated.
        pooling (`str`, defaults to `"cls"`): `"cls"` or `"mean"` (over the patches).
        norm_after_pooling (`bool`, defaults to `False`): The final norm follows the pooling instead of preceding it, so
            that the tokens come without one; as masked autoencoders are fine-tuned (https://arxiv.org/abs/2111.06377).
        hidden_act (`str`, defaults to `"gelu"`): `"gelu"` (exact) or `"gelu_pytorch_tanh"`.
        qkv_bias (`bool`, defaults to `True`): Bias in the projections to queries, keys and values.
        qk_norm (`bool`, defaults to `False`): Layer norm over each head's queries and keys.
        layer_scale_init_value (`float`, *optional*): Learn a scale of each residual branch, starting from this value
            (https://arxiv.org/abs/2103.17239).
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of the norms in blocks and of the final one.
        patch_norm_eps (`float`, defaults to 1e-5): Epsilon of the norms in patch embeddings and patch merging.
        sr_norm_eps (`float`, defaults to 1e-5): Epsilon of the norm after spatial reduction.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth (https://arxiv.org/abs/1603.09382): the rate of the
            last block (`"linear"`) or of every block (`"constant"`).
        drop_path_schedule (`str`, defaults to `"linear"`): `"linear"` from 0 over all blocks, or `"constant"`.
        patch_dropout (`float`, defaults to 0.0): Share of the patches to drop in training; prefix tokens stay
            (https://arxiv.org/abs/2212.00794).
        token_merging (`int`, defaults to 0): Patches that each block merges into those most like them, half of them at
            most: faster, in training as well, at some cost in accuracy (https://arxiv.org/abs/2210.09461). Drop path
            then computes every image's attention.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout after positions and after every dense layer of a block.
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout of attention weights.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the truncated normal initialisation.
        head_initializer_range (`float`, *optional*): The same for classification heads; 0.0 starts them from zero.
        head_bias_init (`float`, defaults to 0.0): Initial bias of classification heads; -log(number of classes) suits
            a sigmoid loss.
        representation_size (`int`, *optional*): Width of a hidden layer with tanh before the classifier, as in ViT's
            pretraining (https://arxiv.org/abs/2010.11929, section 3.1).
        head_batch_norm (`bool`, defaults to `False`): Batch norm without learnt scale and shift before the classifier,
            for linear probing (https://arxiv.org/abs/2111.06377, appendix A.1).
        mask_ratio (`float`, defaults to 0.75): Share of the patches that masked pretraining hides.
        mask_patch_size (`int`, defaults to 32): Side in pixels of the squares that masked image modeling hides
            (https://arxiv.org/abs/2111.09886, section 3.2).
        norm_pix_loss (`bool`, defaults to `False`): Normalise each patch of the masked autoencoder's target.
        decoder_hidden_size (`int`, defaults to 512): Width of the masked autoencoder's decoder, by default that of its
            paper; presets narrower than ViT-B have a smaller one.
        decoder_num_hidden_layers (`int`, defaults to 8): Its blocks.
        decoder_num_attention_heads (`int`, defaults to 16): Its heads.
        decoder_intermediate_size (`int`, defaults to 2048): Width of its MLPs.
        out_features (`list[str]`, *optional*): Feature maps of a backbone: `"stem"`, `"stage1"`... and `"block1"`...
            (blocks are counted through all stages); by default the last stage.
        out_indices (`list[int]`, *optional*): The same as indices into `stage_names`.
        out_strides (`list[int]`, *optional*): Resize these maps to the image size divided by these numbers, so that a
            plain ViT gives a pyramid; by default each map keeps its own size.

    Raises:
        ValueError: where values contradict each other, naming the value and what would be right.
    """

    model_type = "vit_custom"
    keys_to_ignore_at_inference = ["cls_logits", "distillation_logits", "hidden_states", "attentions"]

    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    patch_size: int | list[int] = 16
    patch_norm: bool = False
    patch_merging: bool = False
    hidden_size: int | None = None
    hidden_sizes: list[int] | None = None
    num_hidden_layers: int | None = None
    depths: list[int] | None = None
    num_attention_heads: int | list[int] = 12
    intermediate_size: int | list[int] | None = None
    sr_ratios: int | list[int] = 1
    window_size: int | list[int] = 0
    use_class_token: bool = True
    use_distillation_token: bool = False
    num_register_tokens: int = 0
    position_embedding_type: str | list[str] = "learned"
    position_antialias: bool = False
    pooling: str = "cls"
    norm_after_pooling: bool = False
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale_init_value: float | int | None = None
    layer_norm_eps: float = 1e-6
    patch_norm_eps: float = 1e-5
    sr_norm_eps: float = 1e-5
    drop_path_rate: float | int = 0.0
    drop_path_schedule: str = "linear"
    patch_dropout: float | int = 0.0
    token_merging: int = 0
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    head_initializer_range: float | int | None = None
    head_bias_init: float | int = 0.0
    representation_size: int | None = None
    head_batch_norm: bool = False
    mask_ratio: float | int = 0.75
    mask_patch_size: int = 32
    norm_pix_loss: bool = False
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    out_strides: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.hidden_size is None:
            self.hidden_size = self.hidden_sizes[-1] if self.hidden_sizes else 768
        if self.num_hidden_layers is None:
            self.num_hidden_layers = sum(self.depths) if self.depths else 12
        if self.intermediate_size is None:
            self.intermediate_size = (
                [4 * width for width in self.hidden_sizes] if self.hidden_sizes else 4 * self.hidden_size
            )
        num_labels = kwargs.get("num_labels", 1)
        if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
            raise ValueError(f"num_labels={num_labels!r} must be an integer of at least 1")
        self.validate_architecture()
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_features = [f"stage{len(self.stages)}"]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    @property
    def native_size(self) -> tuple[int, int]:
        """The configured image size as (height, width) in pixels."""
        return _pair(self.image_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens, in this order, in front of the last stage's patches."""
        return int(self.use_class_token) + int(self.use_distillation_token) + self.num_register_tokens

    @property
    def is_plain(self) -> bool:
        """Whether a single stage of global attention is all: no block needs a grid, so patches can be left out."""
        return len(self.stages) == 1 and self.stages[0].window_size == 0 and self.stages[0].sr_ratio == 1

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps that a backbone can return: the stem, stages, then single blocks."""
        stages = [f"stage{i + 1}" for i in range(len(self.depths or [1]))]
        return ["stem", *stages, *(f"block{i + 1}" for i in range(self.num_hidden_layers))]

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The stages, each with its own values.

        Raises:
            ValueError: if the fields contradict each other.
        """
        widths, depths = self.hidden_sizes or [self.hidden_size], self.depths or [self.num_hidden_layers]
        if widths[-1] != self.hidden_size:
            raise ValueError(f"hidden_size={self.hidden_size} contradicts the last of hidden_sizes={widths}: set one")
        if sum(depths) != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} contradicts the sum of depths={depths}: set one"
            )
        if len(widths) != len(depths):
            raise ValueError(
                f"hidden_sizes={widths} and depths={depths} must have the same length, one entry for each stage"
            )
        count = len(widths)
        heads = self._per_stage("num_attention_heads", count)
        intermediate_sizes = self._per_stage("intermediate_size", count)
        patch_sizes = self._per_stage("patch_size", count)
        sr_ratios = self._per_stage("sr_ratios", count)
        windows = self._per_stage("window_size", count)
        position_types = self._per_stage("position_embedding_type", count)

        total = sum(depths)
        if self.drop_path_schedule == "constant" or total <= 1:
            rates = [float(self.drop_path_rate)] * total
        else:
            rates = [self.drop_path_rate * block / (total - 1) for block in range(total)]

        stages, grid, first_block = [], self.native_size, 0
        for i in range(count):
            grid = tuple(-(-side // max(patch_sizes[i], 1)) for side in grid)
            stages.append(
                StageConfig(
                    in_channels=widths[i - 1] if i else self.num_channels,
                    patch_size=patch_sizes[i],
                    patch_merging=self.patch_merging and i > 0,
                    patch_norm=self.patch_norm,
                    hidden_size=widths[i],
                    depth=depths[i],
                    num_attention_heads=heads[i],
                    intermediate_size=intermediate_sizes[i],
                    sr_ratio=sr_ratios[i],
                    window_size=windows[i],
                    position_embedding_type=position_types[i],
                    num_prefix_tokens=self.num_prefix_tokens if i == count - 1 else 0,
                    grid_size=grid,
                    drop_path_rates=tuple(rates[first_block : first_block + depths[i]]),
                )
            )
            first_block += depths[i]
        return tuple(stages)

    @property
    def decoder_stage(self) -> StageConfig:
        """The masked autoencoder's decoder as a stage over the encoder's grid."""
        encoder = self.stages[-1]
        return StageConfig(
            in_channels=encoder.hidden_size,
            patch_size=encoder.patch_size,
            patch_merging=False,
            patch_norm=False,
            hidden_size=self.decoder_hidden_size,
            depth=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads,
            intermediate_size=self.decoder_intermediate_size,
            sr_ratio=1,
            window_size=0,
            position_embedding_type="sincos2d",
            num_prefix_tokens=encoder.num_prefix_tokens,
            grid_size=encoder.grid_size,
            drop_path_rates=(0.0,) * self.decoder_num_hidden_layers,
        )

    def validate_architecture(self):
        """Refuse values that are out of range or contradict each other.

        Raises:
            ValueError: in one line that names the value and what would be right.
        """
        _check_choice("hidden_act", self.hidden_act, HIDDEN_ACTS)
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_choice("drop_path_schedule", self.drop_path_schedule, DROP_PATH_SCHEDULES)
        if self.problem_type is not None:
            _check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        if len(_pair(self.image_size)) != 2:
            raise ValueError(f"image_size={self.image_size} must be one side or (height, width)")
        for name in ("image_size", "num_channels", "mask_patch_size", "out_strides", "representation_size"):
            _check_at_least(name, getattr(self, name), 1)
        for name in (
            "num_register_tokens",
            "token_merging",
            "layer_norm_eps",
            "patch_norm_eps",
            "sr_norm_eps",
            "initializer_range",
        ):
            _check_at_least(name, getattr(self, name), 0)
        if not math.isfinite(self.head_bias_init):
            raise ValueError(f"head_bias_init={self.head_bias_init} must be finite")
        if self.id2label is not None and not self.id2label:
            raise ValueError("id2label={} must name at least one class")
        for name in ("hidden_sizes", "depths", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}=[] needs at least one stage")
            _check_at_least(name, getattr(self, name), 1)
        for name in (
            "drop_path_rate",
            "patch_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "mask_ratio",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.head_initializer_range is not None:
            _check_at_least("head_initializer_range", self.head_initializer_range, 0)

        stages = self.stages
        for i, stage in enumerate(stages):
            where = f" in stage {i + 1} of {len(stages)}" if len(stages) > 1 else ""
            _check_stage(stage, where)
        if min(self.native_size) < stages[0].patch_size:
            raise ValueError(f"image_size={self.image_size} is smaller than one patch of side {stages[0].patch_size}")
        if self.patch_merging and len(stages) == 1:
            raise ValueError("patch_merging=True needs a second stage, whose patches it merges")
        if self.position_antialias and all(stage.position_embedding_type == "none" for stage in stages):
            raise ValueError("position_antialias=True has nothing to interpolate with position_embedding_type='none'")
        if self.pooling == "cls" and not self.use_class_token:
            raise ValueError("pooling='cls' needs use_class_token=True; without a class token use pooling='mean'")
        if self.use_distillation_token and not self.use_class_token:
            raise ValueError("use_distillation_token=True needs use_class_token=True, whose head it accompanies")
        if self.norm_after_pooling and self.use_distillation_token:
            raise ValueError(
                "norm_after_pooling=True leaves the distillation token, which is not pooled, without a norm: "
                "set use_distillation_token=False"
            )
        if self.head_batch_norm and self.use_distillation_token:
            raise ValueError("head_batch_norm=True is for a single head: set use_distillation_token=False")
        if self.representation_size is not None and (self.use_distillation_token or self.head_batch_norm):
            raise ValueError(
                f"representation_size={self.representation_size} is for a single head without batch norm: "
                "set use_distillation_token=False and head_batch_norm=False"
            )
        for name in ("patch_dropout", "token_merging"):
            if getattr(self, name) > 0 and not self.is_plain:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs a single stage of global attention (sr_ratios=1, "
                    f"window_size=0); this one has {len(stages)} stage(s), sr_ratios={self.sr_ratios}, "
                    f"window_size={self.window_size}"
                )

    def validate_output_attentions(self):
        # Attention weights are computed on request whatever the implementation, so nothing here contradicts another.
        pass

    @property
    def output_attentions(self) -> bool:
        """Whether models return attention weights by default."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool):
        self._output_attentions = value

    def _per_stage(self, name: str, count: int) -> list:
        """The values of field `name`, one for each of `count` stages."""
        value = getattr(self, name)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(values) != count:
            raise ValueError(f"{name}={value} has {len(values)} entries for {count} stage(s)")
        return values


def _pair(value: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def _check_choice(name: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def _check_at_least(name: str, value, minimum: int, where: str = ""):
    values = value if isinstance(value, (list, tuple)) else [value]
    values = [item for item in values if item is not None]
    if not all(math.isfinite(item) for item in values):
        raise ValueError(f"{name}={value} must be finite{where}")
    if any(item < minimum for item in values):
        raise ValueError(f"{name}={value} must be at least {minimum}{where}")


def _check_stage(stage: StageConfig, where: str):
    for name in ("patch_size", "num_attention_heads", "intermediate_size", "sr_ratio"):
        _check_at_least(name, getattr(stage, name), 1, where)
    _check_at_least("window_size", stage.window_size, 0, where)
    _check_choice("position_embedding_type", stage.position_embedding_type, POSITION_EMBEDDING_TYPES)
    if stage.hidden_size % stage.num_attention_heads:
        raise ValueError(
            f"hidden_size={stage.hidden_size} is not a multiple of "
            f"num_attention_heads={stage.num_attention_heads}{where}"
        )
    if stage.position_embedding_type == "sincos2d" and stage.hidden_size % 4:
        raise ValueError(
            f"position_embedding_type='sincos2d' needs a width that 4 divides, "
            f"not hidden_size={stage.hidden_size}{where}"
        )
    if stage.window_size and stage.sr_ratio > 1:
        raise ValueError(
            f"window_size={stage.window_size} and sr_ratio={stage.sr_ratio} exclude each other{where}: "
            "keys of a window are not reduced"
        )
    if stage.window_size and stage.num_prefix_tokens:
        raise ValueError(
            f"window_size={stage.window_size} leaves no place for {stage.num_prefix_tokens} prefix token(s){where}: "
            "set use_class_token=False, use_distillation_token=False and num_register_tokens=0, and pooling='mean'"
        )


ViTCustomConfig.register_for_auto_class()

__all__ = ["AUTO_MAP", "StageConfig", "ViTCustomConfig"]
