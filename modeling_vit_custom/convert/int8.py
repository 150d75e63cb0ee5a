"""Classifiers in int8 for x86 processors: dense layers by oneDNN, everything else in bfloat16, compiled."""

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from ..configuration_vit_custom import ViTCustomConfig
from ..kernels import Linear
from ..modeling_vit_custom import ViTCustomForImageClassification, ViTCustomImageClassifierOutput
from .graphs import Graph, check_exportable


OLDEST_TORCH = "2.15"
MAX_BATCH_SIZES = 64


class Int8Classifier(nn.Module):
    """What `to_int8` makes, for inference: images (B, C, H, W) -> logits (B, L), in fp32.

    Images are of the size (C, H, W) that it was calibrated on. It compiles for every batch size that it meets, and
    keeps what it compiled: give it few different ones, and 64 at most.
    """

    def __init__(self, graph: GraphModule, config: ViTCustomConfig, shape: tuple[int, int, int]):
        super().__init__()
        self.config = config
        self.shape = shape
        self.graph = torch.compile(graph, dynamic=False)

    def train(self, mode: bool = True) -> "Int8Classifier":
        """Nothing: it is always in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> ViTCustomImageClassifierOutput:
        """See the class.

        Raises:
            ValueError: for images of another size.
        """
        import torch._dynamo.config as dynamo_config  # here, because few who convert models compile them
        import torch._inductor.config as inductor_config

        _check_shape(pixel_values, self.shape)
        # Frozen weights are quantised and laid out once, when it compiles.
        with (
            torch.autocast("cpu", torch.bfloat16),
            dynamo_config.patch(recompile_limit=MAX_BATCH_SIZES),
            inductor_config.patch(freezing=True),
        ):
            (logits,) = self.graph(pixel_values.float().contiguous())
            return ViTCustomImageClassifierOutput(logits=logits.float())


def _check_shape(pixel_values: Tensor, shape: tuple[int, int, int]):
    if tuple(pixel_values.shape[1:]) != shape:
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)} must be (batch, {', '.join(map(str, shape))}), as in "
            "calibration"
        )


def to_int8(model: ViTCustomForImageClassification, batches: Iterable[Tensor]) -> Int8Classifier:
    """A classifier whose dense layers in blocks multiply 8-bit integers, with scales that images were looked at for.

    Weights have a scale for each output, activations one for each layer, from histograms of what the images make of
    them (torchao's quantiser for x86). The model itself stays as it is.

    Args:
        model: In fp32 on the CPU.
        batches: Normalised images (B, C, H, W) like those to come, all of one size, two at least in the first batch; a
            few hundred are enough.

    Raises:
        ValueError: for another kind of model, device or dtype, for no images, and if torchao is missing or torch old.
    """
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise ValueError("int8 needs another library: pip install torchao") from error
    if torch.__version__ < OLDEST_TORCH:
        raise ValueError(
            f"int8 needs torch {OLDEST_TORCH} or newer, this is {torch.__version__}, which does not fuse it"
        )
    check_exportable(model)
    if not isinstance(model, ViTCustomForImageClassification):
        raise ValueError(f"a {type(model).__name__} is no classifier")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(f"the model is {model.dtype} on {model.device.type}: it must be in float32 on the CPU")
    batches = iter(batches)
    first = next(batches, None)
    if first is None or len(first) < 2:
        count = 0 if first is None else len(first)
        raise ValueError(f"int8 needs images to be calibrated on, two at least in the first batch, not {count}")

    with torch.no_grad():
        graph = torch.export.export(Graph(_plain_twin(model)), (first,), dynamic_shapes=({0: Dim.AUTO},)).module()
        for node in list(graph.graph.nodes):
            # That all is in fp32 will not hold.
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                graph.graph.erase_node(node)
        graph.recompile()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared, shape = prepare_pt2e(graph, quantizer), tuple(first.shape[1:])
        for batch in itertools.chain([first], batches):
            _check_shape(batch, shape)
            prepared(batch)
    return Int8Classifier(convert_pt2e(prepared), model.config, shape)


def _plain_twin(model: ViTCustomForImageClassification) -> ViTCustomForImageClassification:
    """The same weights behind layers that a quantiser knows, and attention by products."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    twin.set_attn_implementation("products")
    for module in twin.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear
    return twin
