"""Models of this family as graphs, for runtimes that know neither this package nor transformers.

A graph takes any number of images of any size with more than one patch of the last stage: nothing in it is fixed to
the size that it was traced at.
"""

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomForImageClassification,
    ViTCustomModel,
    ViTCustomPreTrainedModel,
)


if TYPE_CHECKING:
    from torch.onnx import ONNXProgram


# ONNX's number for a set of operators; the newest that torch's exporter writes itself.
OPSET = 18
OLDEST_TORCH = "2.11"
NO_MERGING = "token_merging={} has no counterpart in {}: open the model with token_merging=0, or edit its config.json"


class Graph(nn.Module):
    """A model with a fixed set of outputs: pixel_values (B, C, H, W) -> tensors in the order of `names`."""

    def __init__(self, model: ViTCustomPreTrainedModel):
        super().__init__()
        self.model = model
        if isinstance(model, ViTCustomForImageClassification):
            self.names = ["logits"]
        elif isinstance(model, ViTCustomBackbone):
            if model.config.out_strides is not None:
                raise ValueError("maps resized to out_strides are of fixed sizes: a graph needs out_strides=None")
            self.names = list(model.config.out_features)
        elif isinstance(model, ViTCustomModel):
            self.names = ["last_hidden_state", "pooler_output"]
        else:
            raise ValueError(
                f"a {type(model).__name__} is for training: make a graph of its encoder or of a classifier"
            )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values)
        if isinstance(self.model, ViTCustomBackbone):
            return outputs.feature_maps
        return tuple(outputs[name] for name in self.names)


def check_exportable(model: ViTCustomPreTrainedModel) -> None:
    """Raises ValueError for what is no model of this family, or has tensors that are elsewhere or quantised."""
    if not isinstance(model, ViTCustomPreTrainedModel):
        raise ValueError(f"a {type(model).__name__} is no model of this family")
    for name, tensor in model.state_dict().items():
        if type(tensor) is not Tensor or tensor.is_meta:
            raise ValueError(f"{name} is quantised, or not in memory: open the model without that first")


def to_exported_program(model: ViTCustomPreTrainedModel) -> ExportedProgram:
    """What `torch.export.save` writes and ahead-of-time compilers take, in evaluation mode.

    It is called with pixel values (B, C, H, W) alone, whose sides are longer than a patch of the last stage, and
    returns a tuple: the logits of a classifier; the tokens and their pooling; or a backbone's feature maps.

    Raises:
        ValueError: for a model that masks or merges patches, a backbone with `out_strides`, and an older torch.
    """
    check_exportable(model)
    if model.config.token_merging:
        # How many merge where few patches are left depends on the size of the images.
        raise ValueError(NO_MERGING.format(model.config.token_merging, "a graph for all sizes"))
    if torch.__version__ < OLDEST_TORCH:
        raise ValueError(f"a graph for all sizes needs torch {OLDEST_TORCH} or newer, this is {torch.__version__}")
    graph, modes = Graph(model), {module: module.training for module in model.modules()}
    config, implementation = model.config, model.config._attn_implementation
    stride = math.prod(stage.patch_size for stage in config.stages)
    # Neither an even grid nor a native one: sizes that a graph could be fixed to by accident.
    images = torch.zeros(2, config.num_channels, 2 * stride + 1, 3 * stride + 1, dtype=model.dtype, device=model.device)
    sizes = {0: Dim("batch", min=1), 2: Dim("height", min=stride + 1), 3: Dim("width", min=stride + 1)}
    # A grid of one window is none of shifted ones, and both are to go through one graph.
    has_windows = any(stage.window_size for stage in config.stages)
    try:
        # The one that every runtime has; flex_attention and flash_attention_2 are kernels of a GPU.
        model.eval().set_attn_implementation("sdpa")
        with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=has_windows):
            return torch.export.export(graph, (images,), dynamic_shapes=(sizes,))
    finally:
        model.set_attn_implementation(implementation)
        for module, is_training in modes.items():
            module.training = is_training


def to_onnx(model: ViTCustomPreTrainedModel) -> "ONNXProgram":
    """What onnxruntime and others run; its `save(path)` writes the file, and beyond 2 GB a second one for the weights.

    The input is `pixel_values` (B, C, H, W), in the precision of the weights; the outputs are named as ours are. Sides
    are longer than a patch of the last stage.

    Raises:
        ValueError: as `to_exported_program`; for weights in bfloat16, which onnxruntime does not compute on CPUs; and
            if the onnx or the onnxscript library is missing.
    """
    check_exportable(model)
    if model.dtype == torch.bfloat16:
        raise ValueError("runtimes of ONNX compute no bfloat16 on CPUs: make it float32 or float16 (--dtype) first")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX needs more libraries: pip install onnx onnxruntime onnxscript") from error

    names = Graph(model).names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how torch names dimensions and copies trees
        return torch.onnx.export(
            to_exported_program(model),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=names,
            opset_version=OPSET,
            verbose=False,
        )
