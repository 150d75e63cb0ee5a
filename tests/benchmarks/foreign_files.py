"""Checkpoints exactly as other libraries and the papers' codes publish them, with random weights.

Where a format has no library of its own here, it is made of one that has the same architecture, by the names in the
papers' repositories.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.peers import randomise


LABELS = 11
Names = Callable[[str], str]


@dataclass(frozen=True)
class Sizes:
    """What is given to the builders: nothing for the published sizes, or tiny ones for tests."""

    vit: Mapping
    distilled: Mapping
    swin: Mapping
    transformers_vit: Mapping
    transformers_swin: Mapping
    transformers_pvt: Mapping
    mae: Mapping
    torchvision_vit: Mapping | None
    torchvision_swin: Mapping | None


PUBLISHED = Sizes(
    vit={"model_name": "vit_small_patch16_224"},
    distilled={"model_name": "deit_small_distilled_patch16_224"},
    swin={"model_name": "swin_tiny_patch4_window7_224"},
    transformers_vit={"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    transformers_swin={},
    transformers_pvt={},
    mae={"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    torchvision_vit=None,
    torchvision_swin=None,
)
_TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
# Sides of 32 windows, as all published ones have: a file does not tell them.
_TINY_SWIN = {"img_size": 64, "patch_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2}
_TINY_TRANSFORMERS = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "encoder_stride": 8,
}
TINY = Sizes(
    vit={"model_name": "vit_tiny_patch16_224", **_TINY},
    distilled={"model_name": "deit_tiny_distilled_patch16_224", **_TINY},
    swin={"model_name": "swin_tiny_patch4_window7_224", **_TINY_SWIN},
    transformers_vit=_TINY_TRANSFORMERS,
    transformers_swin={
        "image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2,
        "encoder_stride": 8,
    },
    transformers_pvt={"image_size": 64, "depths": [1, 2, 1, 1]},
    mae={
        **_TINY_TRANSFORMERS,
        "decoder_hidden_size": 64,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 128,
    },
    torchvision_vit={
        "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 384,
    },
    torchvision_swin={
        "patch_size": [4, 4], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [7, 7],
    },
)  # fmt: skip


@dataclass(frozen=True)
class ForeignFile:
    """A source on disk.

    Attributes:
        path: The file, or the folder.
        peer: The model of the source's own library, or of one that has the same architecture.
        image_size: Side of the images in pixels.
    """

    path: Path
    peer: nn.Module
    image_size: int


def _side(model: nn.Module, default: int = 224) -> int:
    if hasattr(model, "patch_embed"):
        return model.patch_embed.img_size[0]
    config = getattr(model, "config", None)
    return config.image_size if config is not None else getattr(model, "image_size", default)


def _timm(sizes: Mapping, **fields) -> nn.Module:
    return randomise(timm.create_model(**{**sizes, "num_classes": LABELS, **fields}))


def _save_pth(folder: Path, model: nn.Module, rename: Names = str, wrapper: str | None = "model") -> ForeignFile:
    tensors = {rename(name): tensor for name, tensor in model.state_dict().items()}
    torch.save({wrapper: tensors} if wrapper else tensors, folder / "weights.pth")
    return ForeignFile(folder / "weights.pth", model, _side(model))


def _deit3_names(name: str) -> str:
    return re.sub(r"ls(\d)\.gamma", r"gamma_\1", name)


def official_swin_names(name: str) -> str:
    name = re.sub(r"layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name)
    return name.replace("head.fc.", "head.")


def timm_folder(folder: Path, sizes: Sizes, model: nn.Module) -> ForeignFile:
    arguments = {name: value for name, value in sizes.items() if name != "model_name"}
    timm.models.save_for_hf(model, folder, {"label_names": [f"class {index}" for index in range(LABELS)]}, arguments)
    return ForeignFile(folder, model, _side(model))


def _transformers(name: str, fields: Mapping) -> nn.Module:
    config_class = getattr(transformers, name.partition("For")[0] + "Config")
    return randomise(getattr(transformers, name)(config_class(**{**fields, "num_labels": LABELS})))


def transformers_folder(folder: Path, model: nn.Module, newest_names: bool = False) -> ForeignFile:
    """As `save_pretrained` writes it, which keeps the names of 4.x, or with the names that 5.x has in memory."""
    model.save_pretrained(folder)
    if newest_names:
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
    return ForeignFile(folder, model, _side(model))


def _pvt_names(model: nn.Module) -> dict[str, Tensor]:
    """As PVT's own code names them: keys and values in one product, stages counted from one."""
    tensors = {name.removeprefix("pvt.encoder."): tensor for name, tensor in model.state_dict().items()}
    renamed = {}
    rules = [
        (r"patch_embeddings\.(\d)\.cls_token", r"cls_token"),
        (r"patch_embeddings\.(\d)\.position_embeddings", r"pos_embed<\1>"),
        (r"patch_embeddings\.(\d)\.projection", r"patch_embed<\1>.proj"),
        (r"patch_embeddings\.(\d)\.layer_norm", r"patch_embed<\1>.norm"),
        (r"block\.(\d)\.(\d+)\.", r"block<\1>.\2."),
        (r"layer_norm_([12])", r"norm\1"),
        (r"attention\.self\.query", "attn.q"),
        (r"attention\.self\.sequence_reduction", "attn.sr"),
        (r"attention\.self\.layer_norm", "attn.norm"),
        (r"attention\.output\.dense", "attn.proj"),
        (r"mlp\.dense([12])", r"mlp.fc\1"),
        (r"^layer_norm\.", "norm."),
        (r"^classifier\.", "head."),
    ]
    for name, tensor in tensors.items():
        if ".self.value." in name:
            continue
        if ".self.key." in name:
            tensor = torch.cat([tensor, tensors[name.replace(".key.", ".value.")]])
            name = name.replace("attention.self.key", "attn.kv")
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[re.sub(r"<(\d)>", lambda match: str(int(match[1]) + 1), name)] = tensor
    return renamed


def official_pvt(folder: Path, model: nn.Module) -> ForeignFile:
    torch.save(_pvt_names(model), folder / "pvt.pth")
    return ForeignFile(folder / "pvt.pth", model, _side(model))


def _fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of transformers' names in one product, as timm's."""
    fused = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        name = name.replace("attention.o_proj", "attn.proj")
        name = name.replace(
            "attention.relative_position_bias.relative_position_bias_table", "attn.relative_position_bias_table"
        )
        fused[name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")] = tensor
    return fused


def official_mae(folder: Path, model: nn.Module) -> ForeignFile:
    tensors = {}
    for name, tensor in _fuse(dict(model.state_dict())).items():
        name = name.removeprefix("vit.embeddings.").removeprefix("vit.")
        name = name.replace("patch_embeddings.projection", "patch_embed.proj").replace(
            "position_embeddings", "pos_embed"
        )
        name = re.sub(r"^layers\.", "blocks.", name).replace("decoder.decoder_layers.", "decoder_blocks.")
        name = re.sub(r"^layernorm\.", "norm.", name).removeprefix("decoder.")
        tensors[name] = tensor
    torch.save({"model": tensors}, folder / "mae.pth")
    return ForeignFile(folder / "mae.pth", model, _side(model))


def official_simmim(folder: Path, model: nn.Module) -> ForeignFile:
    tensors = {}
    for name, tensor in _fuse(dict(model.state_dict())).items():
        name = name.replace("swin.embeddings.patch_embeddings.projection", "encoder.patch_embed.proj")
        name = name.replace("swin.embeddings.norm", "encoder.patch_embed.norm")
        name = name.replace("swin.embeddings.mask_token", "encoder.mask_token")
        name = name.replace("swin.encoder.layers", "encoder.layers").replace("swin.layernorm", "encoder.norm")
        tensors[name] = tensor
    torch.save({"model": tensors}, folder / "simmim.pth")
    return ForeignFile(folder / "simmim.pth", model, _side(model))


def flax_arrays(model: nn.Module, big_vision: bool) -> dict[str, np.ndarray]:
    """A timm ViT by the names of vit_jax or big_vision."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    attention, norm, mlp = (
        ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
        if big_vision
        else ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    )
    arrays = {
        "embedding/kernel": tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": tensors["patch_embed.proj.bias"],
        "cls": tensors["cls_token"],
        "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding": tensors["pos_embed"],
        "Transformer/encoder_norm/scale": tensors["norm.weight"],
        "Transformer/encoder_norm/bias": tensors["norm.bias"],
        "head/kernel": tensors["head.weight"].T,
        "head/bias": tensors["head.bias"],
    }
    for index in range(len(model.blocks)):
        theirs, ours = f"Transformer/encoderblock_{index}", f"blocks.{index}"
        for there, here in (("LayerNorm_0", "norm1"), (norm, "norm2")):
            arrays[f"{theirs}/{there}/scale"] = tensors[f"{ours}.{here}.weight"]
            arrays[f"{theirs}/{there}/bias"] = tensors[f"{ours}.{here}.bias"]
        weights, biases = (np.split(tensors[f"{ours}.attn.qkv.{kind}"], 3) for kind in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases):
            arrays[f"{theirs}/{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{theirs}/{attention}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{theirs}/{attention}/out/kernel"] = tensors[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{theirs}/{attention}/out/bias"] = tensors[f"{ours}.attn.proj.bias"]
        for number in (0, 1):
            arrays[f"{theirs}/{mlp}/Dense_{number}/kernel"] = tensors[f"{ours}.mlp.fc{number + 1}.weight"].T
            arrays[f"{theirs}/{mlp}/Dense_{number}/bias"] = tensors[f"{ours}.mlp.fc{number + 1}.bias"]
    return arrays


class PreLogits(nn.Module):
    """A timm ViT with the hidden layer that vit_jax has before the head."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.pre_logits = model, randomise(nn.Linear(model.embed_dim, model.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return self.model.head(self.pre_logits(pooled).tanh())


def google(folder: Path, model: nn.Module, dialect: str) -> ForeignFile:
    """`vit_jax`, `pre_logits`, `optimizer` (with its prefix), `big_vision`, `scan` (stacked blocks) or `bfloat16`."""
    arrays, peer = flax_arrays(model, dialect in ("big_vision", "scan")), model
    if dialect == "pre_logits":
        peer = PreLogits(model)
        arrays["pre_logits/kernel"] = peer.pre_logits.weight.detach().numpy().T
        arrays["pre_logits/bias"] = peer.pre_logits.bias.detach().numpy()
    elif dialect == "optimizer":
        arrays = {f"opt/target/{name}": array for name, array in arrays.items()}
        arrays["opt/state/step"] = np.array(7)
    elif dialect == "big_vision":
        arrays = {f"params/{name}": array for name, array in arrays.items()}
    elif dialect == "scan":
        stacks: dict[str, list] = {}
        for name in [name for name in arrays if "encoderblock_" in name]:
            stacks.setdefault(re.sub(r"encoderblock_\d+", "encoderblock", name), []).append(arrays.pop(name))
        arrays |= {name: np.stack(stack) for name, stack in stacks.items()}
    elif dialect == "bfloat16":
        # What numpy makes of arrays that it does not know.
        halves = {name: torch.from_numpy(np.ascontiguousarray(array)).bfloat16() for name, array in arrays.items()}
        arrays = {name: tensor.view(torch.int16).numpy().view("V2") for name, tensor in halves.items()}
        peer = model.bfloat16()
    np.savez(folder / "weights.npz", **arrays)
    return ForeignFile(folder / "weights.npz", peer, _side(model))


def _google_vit(folder: Path, sizes: Sizes, dialect: str) -> ForeignFile:
    """flax's `nn.gelu` is the one by tanh, which timm, for one, takes for the exact one when it reads these files."""
    return google(folder, _timm(sizes.vit, act_layer="gelu_tanh"), dialect)


def _torchvision(kind: str, sizes: Mapping | None) -> nn.Module:
    if sizes is None:
        return randomise(torchvision.models.get_model({"vit": "vit_b_16", "swin": "swin_t"}[kind], num_classes=LABELS))
    builder = {"vit": torchvision.models.VisionTransformer, "swin": torchvision.models.SwinTransformer}[kind]
    return randomise(builder(**sizes, num_classes=LABELS))


def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of a classifier, or the reconstruction for a fixed choice of patches."""
    name, generator = type(model).__name__, torch.Generator().manual_seed(0)
    if name.endswith("ForPreTraining"):
        patch = model.config.patch_size
        patch = patch[0] if isinstance(patch, list) else patch
        noise = torch.rand(len(images), (images.shape[-1] // patch) ** 2, generator=generator)
        return model(images, noise=noise).logits
    if name.endswith("ForMaskedImageModeling"):
        patch = model.config.patch_size
        patch = patch[0] if isinstance(patch, list) else patch
        masked = torch.rand(len(images), (images.shape[-1] // patch) ** 2, generator=generator) < 0.5
        return model(images, bool_masked_pos=masked).reconstruction
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


# By (source, architecture): how the file is made in a folder, of given sizes.
SOURCES: dict[tuple[str, str], Callable[[Path, Sizes], ForeignFile]] = {
    (f"Google's .npz, {title}", "ViT"): partial(_google_vit, dialect=dialect)
    for title, dialect in {
        "vit_jax": "vit_jax",
        "vit_jax, pre-logits": "pre_logits",
        "vit_jax, opt/target": "optimizer",
        "big_vision": "big_vision",
        "big_vision, stacked blocks": "scan",
    }.items()
} | {
    ("timm folder", "ViT"): lambda folder, sizes: timm_folder(folder, sizes.vit, _timm(sizes.vit)),
    ("timm folder", "DeiT distilled"): lambda folder, sizes: timm_folder(
        folder, sizes.distilled, _timm(sizes.distilled)
    ),
    ("timm folder", "Swin"): lambda folder, sizes: timm_folder(folder, sizes.swin, _timm(sizes.swin)),
    ("timm .pth", "ViT"): lambda folder, sizes: _save_pth(folder, _timm(sizes.vit), wrapper=None),
    ("DeiT's .pth", "DeiT"): lambda folder, sizes: _save_pth(folder, _timm(sizes.vit)),
    ("DeiT's .pth", "DeiT distilled"): lambda folder, sizes: _save_pth(folder, _timm(sizes.distilled)),
    ("DeiT III's .pth", "DeiT III"): lambda folder, sizes: _save_pth(
        folder, _timm(sizes.vit, init_values=1e-6, no_embed_class=True), _deit3_names
    ),
    ("Swin's .pth", "Swin"): lambda folder, sizes: _save_pth(folder, _timm(sizes.swin), official_swin_names),
    ("PVT's .pth", "PVT"): lambda folder, sizes: official_pvt(
        folder, _transformers("PvtForImageClassification", sizes.transformers_pvt)
    ),
    ("MAE's .pth", "ViTMAE"): lambda folder, sizes: official_mae(
        folder, _transformers("ViTMAEForPreTraining", {**sizes.mae, "layer_norm_eps": 1e-6})
    ),
    ("MAE's .pth, fine-tuned", "ViT"): lambda folder, sizes: _save_pth(
        folder, _timm(sizes.vit, global_pool="avg", fc_norm=True)
    ),
    ("SimMIM's .pth", "Swin"): lambda folder, sizes: official_simmim(
        folder, _transformers("SwinForMaskedImageModeling", sizes.transformers_swin)
    ),
    ("torchvision", "ViT"): lambda folder, sizes: _save_pth(
        folder, _torchvision("vit", sizes.torchvision_vit), wrapper=None
    ),
    ("torchvision", "Swin"): lambda folder, sizes: _save_pth(
        folder, _torchvision("swin", sizes.torchvision_swin), wrapper=None
    ),
}
for _title, _newest in (("transformers 4.x", False), ("transformers 5.x", True)):
    for _architecture, _name, _sizes in (
        ("ViT", "ViTForImageClassification", "transformers_vit"),
        ("DeiT", "DeiTForImageClassification", "transformers_vit"),
        ("DeiT distilled", "DeiTForImageClassificationWithTeacher", "transformers_vit"),
        ("PVT", "PvtForImageClassification", "transformers_pvt"),
        ("Swin", "SwinForImageClassification", "transformers_swin"),
        ("ViTMAE", "ViTMAEForPreTraining", "mae"),
        ("SimMIM ViT", "ViTForMaskedImageModeling", "transformers_vit"),
        ("SimMIM Swin", "SwinForMaskedImageModeling", "transformers_swin"),
    ):
        SOURCES[_title, _architecture] = lambda folder, sizes, name=_name, field=_sizes, newest=_newest: (
            transformers_folder(folder, _transformers(name, getattr(sizes, field)), newest)
        )


# What each library has no model for, by a part of the source's or the architecture's name.
NOT_THERE = {
    "timm": ("PVT", "ViTMAE", "SimMIM", "pre-logits"),
    "transformers": ("DeiT III", "fine-tuned", "pre-logits"),
    "npz": (
        "DeiT III",
        "PVT",
        "Swin",
        "ViTMAE",
        "SimMIM",
        "distilled",
        "fine-tuned",
        "transformers 4.x, DeiT",
        "transformers 5.x, DeiT",
    ),
}


def has_counterpart(source: tuple[str, str], library: str) -> bool:
    return not any(part in ", ".join(source) for part in NOT_THERE[library])
