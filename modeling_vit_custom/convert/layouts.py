"""How other libraries name the tensors of this family: one table for each, read both ways.

Both sides of a row are templates of names. `{s}` and `{b}` are the numbers of a stage and of a block, `{2s+1}` is a
stage that is counted otherwise, `{p}` is weight or bias. `[query,key,value]` stands for three tensors on top of each
other: libraries stack them in different ways, and so do our own classes of attention.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


FIELD = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}")
# What torch's parallel and compiled modules put in front.
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
STACK = re.compile(r"\[([a-z,]+)\]")


@dataclass(frozen=True)
class Piece:
    """A tensor of a file or a model, or one of those that are stacked in it."""

    name: str
    index: int = 0
    count: int = 1


class Template:
    """A pattern of names."""

    def __init__(self, text: str):
        self.text, pattern, end, self.fields = text, "", 0, []
        for match in FIELD.finditer(text):
            factor, variable, offset = match.groups()
            self.fields.append((variable, int(factor or 1), int(offset or 0)))
            number = "(weight|bias)" if variable == "p" else r"(0|[1-9]\d*)"
            pattern, end = pattern + re.escape(text[end : match.start()]) + number, match.end()
        self.pattern = re.compile(pattern + re.escape(text[end:]))

    def match(self, name: str) -> dict[str, int | str] | None:
        """The values with which `fill` gives this name, if there are any."""
        found, values = self.pattern.fullmatch(name), {}
        if found is None:
            return None
        for (variable, factor, offset), text in zip(self.fields, found.groups()):
            value, rest = (text, 0) if variable == "p" else divmod(int(text) - offset, factor)
            if rest or (variable != "p" and value < 0) or values.setdefault(variable, value) != value:
                return None
        return values

    def fill(self, values: Mapping[str, int | str]) -> str:
        """The name with these values in it."""
        text = self.text
        for variable, factor, offset in self.fields:
            value = values[variable]
            text = FIELD.sub(str(value if variable == "p" else factor * value + offset), text, count=1)
        return text


class Row:
    """One kind of tensor: its name elsewhere, and those of ours that are stacked in it."""

    def __init__(self, theirs: str, ours: str):
        stack = STACK.search(ours)
        parts = stack[1].split(",") if stack else [""]
        self.theirs = Template(theirs)
        self.ours = [Template(STACK.sub(part, ours)) for part in parts]

    def read(self, name: str) -> dict[str, Piece]:
        """Our tensors in theirs of that name; none if it is of another kind."""
        values = self.theirs.match(name)
        if values is None:
            return {}
        return {each.fill(values): Piece(name, index, len(self.ours)) for index, each in enumerate(self.ours)}

    def write(self, name: str) -> tuple[str, int, int] | None:
        """Their name for a tensor of ours, its place in it, and how many there are; None if it is of another kind."""
        for index, each in enumerate(self.ours):
            values = each.match(name)
            if values is not None:
                return self.theirs.fill(values), index, len(self.ours)
        return None


@dataclass(frozen=True)
class Layout:
    """The names of one library for one architecture.

    Attributes:
        title: What messages call it.
        rows: Of several that write the same tensor, the first one does.
        prefix: Of the names of the encoder's tensors, where there is more than an encoder.
        ignored: Names that hold nothing which is learnt, as a regular expression.
        class_row: Whether the table of positions has rows for the class and distillation tokens.
    """

    title: str
    rows: tuple[Row, ...]
    prefix: str = ""
    ignored: str = r"(?!)"
    class_row: bool = True

    def read(self, names: Iterable[str]) -> tuple[dict[str, Piece], list[str]]:
        """Where each of our tensors is among theirs, and the names that mean nothing here."""
        pieces, strange = {}, []
        for name in names:
            bare = WRAPPERS.sub("", name).removeprefix(self.prefix)
            if re.fullmatch(self.ignored, bare):
                continue
            found = next((found for row in self.rows if (found := row.read(bare))), {})
            if not found or found.keys() & pieces.keys():
                strange.append(name)
            pieces |= {ours: Piece(name, each.index, each.count) for ours, each in found.items()}
        return pieces, strange

    def locate(self, name: str) -> tuple[str, int, int] | None:
        """Their name for a tensor of ours, its place in it, and how many there are; None if it has no place there."""
        found = next((found for row in self.rows if (found := row.write(name))), None)
        return found and (self.prefix * name.startswith("model.") + found[0], *found[1:])

    def write(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Their tensors, each with those of ours that are stacked in it.

        Raises:
            ValueError: for a tensor that has no place there.
        """
        stacks: dict[str, list[str]] = {}
        for name in names:
            found = self.locate(name)
            if found is None:
                raise ValueError(f"{self.title} has no place for {name}")
            theirs, index, count = found
            stacks.setdefault(theirs, [""] * count)[index] = name
        return stacks


def own_pieces(names: Iterable[str]) -> dict[str, Piece]:
    """Where in our own tensors of these names each unstacked one is."""
    pieces = {}
    for name in names:
        for fused, parts in (("qkv", ("query", "key", "value")), ("key_value", ("key", "value"))):
            before, found, after = name.partition(f".attention.{fused}.")
            if found:
                pieces |= {
                    f"{before}.attention.{part}.{after}": Piece(name, index, len(parts))
                    for index, part in enumerate(parts)
                }
                break
        else:
            pieces[name] = Piece(name)
    return pieces


def assemble(pieces: list[Piece], tensors: Mapping[str, Tensor]) -> Tensor:
    """Stack what lies apart, or take as it is what lies together."""
    first = pieces[0]
    if pieces == [Piece(first.name, index, len(pieces)) for index in range(len(pieces))] and len(pieces) == first.count:
        return tensors[first.name]
    chunks = (tensors[each.name].chunk(each.count)[each.index] for each in pieces)
    return torch.cat(list(chunks))


def _rows(*pairs: tuple[str, str]) -> tuple[Row, ...]:
    return tuple(Row(theirs, ours) for theirs, ours in pairs)


def _block(theirs: str, ours: str, table: Iterable[tuple[str, str]]) -> tuple[Row, ...]:
    """The rows of a block, whose names go on after these."""
    return tuple(Row(theirs + theirs_end, ours + ours_end) for theirs_end, ours_end in table)


_QKV = "attention.[query,key,value].{p}"
_STAGE, _BLOCK, _DECODER_BLOCK = "model.stages.0.", "model.stages.0.blocks.{b}.", "decoder.blocks.{b}."
_STAGES, _BLOCKS = "model.stages.{s}.", "model.stages.{s}.blocks.{b}."
_CLASS, _DISTILLATION = "head.classifier.{p}", "head.distillation_classifier.{p}"
_SWIN_IGNORED = r".*\.(relative_position_index|attn_mask)"

# Of timm, and of the codes of DeiT, DeiT III, PVT, Swin and MAE, which grew out of it.
_TIMM_BLOCK = (
    ("norm1.{p}", "attention_norm.{p}"),
    ("attn.qkv.{p}", _QKV),
    ("attn.q.{p}", "attention.query.{p}"),
    ("attn.kv.{p}", "attention.[key,value].{p}"),
    ("attn.sr.{p}", "attention.reduction.{p}"),
    ("attn.norm.{p}", "attention.reduction_norm.{p}"),
    ("attn.q_norm.{p}", "attention.query_norm.{p}"),
    ("attn.k_norm.{p}", "attention.key_norm.{p}"),
    ("attn.relative_position_bias_table", "attention.relative_position_bias_table"),
    ("attn.proj.{p}", "attention.projection.{p}"),
    ("norm2.{p}", "mlp_norm.{p}"),
    ("mlp.fc1.{p}", "mlp.fc1.{p}"),
    ("mlp.fc2.{p}", "mlp.fc2.{p}"),
)
_LAYER_SCALE = (("ls1.gamma", "attention_scale.weight"), ("ls2.gamma", "mlp_scale.weight"))
_DEIT3_LAYER_SCALE = (("gamma_1", "attention_scale.weight"), ("gamma_2", "mlp_scale.weight"))

TIMM_VIT = Layout(
    "timm ViT",
    _rows(
        ("cls_token", _STAGE + "prefix_tokens.class_token"),
        ("dist_token", _STAGE + "prefix_tokens.distillation_token"),
        ("reg_token", _STAGE + "prefix_tokens.register_tokens"),
        ("pos_embed", _STAGE + "position_embedding.weight"),
        ("patch_embed.proj.{p}", _STAGE + "embedding.projection.{p}"),
        ("norm.{p}", "model.norm.{p}"),
        ("fc_norm.{p}", "model.pooling.norm.{p}"),
        ("head.{p}", _CLASS),
        ("head_dist.{p}", _DISTILLATION),
        ("mask_token", "decoder.mask_token.weight"),
        ("decoder_embed.{p}", "decoder.embedding.{p}"),
        ("decoder_pos_embed", "decoder.position_embedding.weight"),
        ("decoder_norm.{p}", "decoder.norm.{p}"),
        ("decoder_pred.{p}", "decoder.prediction.{p}"),
    )
    + _block("blocks.{b}.", _BLOCK, (*_TIMM_BLOCK, *_LAYER_SCALE, *_DEIT3_LAYER_SCALE))
    + _block("decoder_blocks.{b}.", _DECODER_BLOCK, _TIMM_BLOCK),
)

TIMM_SWIN = Layout(
    "timm Swin",
    _rows(
        ("patch_embed.proj.{p}", _STAGE + "embedding.projection.{p}"),
        ("patch_embed.norm.{p}", _STAGE + "embedding.norm.{p}"),
        ("layers.{s}.downsample.norm.{p}", _STAGES + "embedding.norm.{p}"),
        ("layers.{s}.downsample.reduction.{p}", _STAGES + "embedding.projection.{p}"),
        ("norm.{p}", "model.norm.{p}"),
        ("head.fc.{p}", _CLASS),
    )
    + _block("layers.{s}.blocks.{b}.", _BLOCKS, _TIMM_BLOCK),
    ignored=_SWIN_IGNORED,
)

OFFICIAL_SWIN = Layout(
    "Swin's own code",
    _rows(
        ("patch_embed.proj.{p}", _STAGE + "embedding.projection.{p}"),
        ("patch_embed.norm.{p}", _STAGE + "embedding.norm.{p}"),
        ("absolute_pos_embed", _STAGE + "position_embedding.weight"),
        ("layers.{s-1}.downsample.norm.{p}", _STAGES + "embedding.norm.{p}"),
        ("layers.{s-1}.downsample.reduction.{p}", _STAGES + "embedding.projection.{p}"),
        ("norm.{p}", "model.norm.{p}"),
        ("head.{p}", _CLASS),
        ("mask_token", _STAGE + "mask_token.weight"),
        ("decoder.0.{p}", "decoder.{p}"),
    )
    + _block("layers.{s}.blocks.{b}.", _BLOCKS, _TIMM_BLOCK),
    prefix="encoder.",
    ignored=_SWIN_IGNORED,
)

OFFICIAL_PVT = Layout(
    "PVT's own code",
    _rows(
        ("patch_embed{s+1}.proj.{p}", _STAGES + "embedding.projection.{p}"),
        ("patch_embed{s+1}.norm.{p}", _STAGES + "embedding.norm.{p}"),
        ("pos_embed{s+1}", _STAGES + "position_embedding.weight"),
        ("cls_token", "model.stages.3.prefix_tokens.class_token"),
        ("norm.{p}", "model.norm.{p}"),
        ("head.{p}", _CLASS),
    )
    + _block("block{s+1}.{b}.", _BLOCKS, _TIMM_BLOCK),
)

# transformers' names since 5.0, and after each those of 4.x.
_TRANSFORMERS_BLOCK = (
    ("layernorm_before.{p}", "attention_norm.{p}"),
    ("layernorm_after.{p}", "mlp_norm.{p}"),
    ("attention.q_proj.{p}", "attention.query.{p}"),
    ("attention.k_proj.{p}", "attention.key.{p}"),
    ("attention.v_proj.{p}", "attention.value.{p}"),
    ("attention.o_proj.{p}", "attention.projection.{p}"),
    ("attention.relative_position_bias.relative_position_bias_table", "attention.relative_position_bias_table"),
    ("mlp.fc1.{p}", "mlp.fc1.{p}"),
    ("mlp.fc2.{p}", "mlp.fc2.{p}"),
    ("attention.output.dense.{p}", "attention.projection.{p}"),
    ("intermediate.dense.{p}", "mlp.fc1.{p}"),
    ("output.dense.{p}", "mlp.fc2.{p}"),
    *((f"attention.attention.{part}.{{p}}", f"attention.{part}.{{p}}") for part in ("query", "key", "value")),
    *((f"attention.self.{part}.{{p}}", f"attention.{part}.{{p}}") for part in ("query", "key", "value")),
    ("attention.self.relative_position_bias_table", "attention.relative_position_bias_table"),
)
_TRANSFORMERS_HEADS = (
    ("classifier.{p}", _CLASS),
    ("decoder.0.{p}", "decoder.{p}"),  # of masked image modeling
)


def _transformers_vit(title: str, prefix: str, heads: Iterable[tuple[str, str]]) -> Layout:
    return Layout(
        title,
        _rows(
            ("embeddings.cls_token", _STAGE + "prefix_tokens.class_token"),
            ("embeddings.distillation_token", _STAGE + "prefix_tokens.distillation_token"),
            ("embeddings.mask_token", _STAGE + "mask_token.weight"),
            ("embeddings.position_embeddings", _STAGE + "position_embedding.weight"),
            ("embeddings.patch_embeddings.projection.{p}", _STAGE + "embedding.projection.{p}"),
            ("layernorm.{p}", "model.norm.{p}"),
            ("decoder.mask_token", "decoder.mask_token.weight"),
            ("decoder.decoder_embed.{p}", "decoder.embedding.{p}"),
            ("decoder.decoder_pos_embed", "decoder.position_embedding.weight"),
            ("decoder.decoder_norm.{p}", "decoder.norm.{p}"),
            ("decoder.decoder_pred.{p}", "decoder.prediction.{p}"),
            *heads,
        )
        + _block("layers.{b}.", _BLOCK, _TRANSFORMERS_BLOCK)
        + _block("encoder.layer.{b}.", _BLOCK, _TRANSFORMERS_BLOCK)
        + _block("decoder.decoder_layers.{b}.", _DECODER_BLOCK, _TRANSFORMERS_BLOCK)
        # What 5.x makes of that when it saves, as it renames the encoder's.
        + _block("decoder.decoder_encoder.layer.{b}.", _DECODER_BLOCK, _TRANSFORMERS_BLOCK),
        prefix,
        r"pooler\..+",
    )


TRANSFORMERS_VIT = _transformers_vit("transformers ViT", "vit.", _TRANSFORMERS_HEADS)
TRANSFORMERS_DEIT = _transformers_vit(
    "transformers DeiT",
    "deit.",
    (
        ("cls_classifier.{p}", _CLASS),
        ("distillation_classifier.{p}", _DISTILLATION),
        *_TRANSFORMERS_HEADS,
    ),
)
# To write one whose distillation token has no head; the table above reads it as well.
TRANSFORMERS_SINGLE_DEIT = _transformers_vit("transformers DeiT", "deit.", _TRANSFORMERS_HEADS)
TRANSFORMERS_SWIN = Layout(
    "transformers Swin",
    _rows(
        ("embeddings.mask_token", _STAGE + "mask_token.weight"),
        ("embeddings.position_embeddings", _STAGE + "position_embedding.weight"),
        ("embeddings.patch_embeddings.projection.{p}", _STAGE + "embedding.projection.{p}"),
        ("embeddings.norm.{p}", _STAGE + "embedding.norm.{p}"),
        ("encoder.layers.{s-1}.downsample.norm.{p}", _STAGES + "embedding.norm.{p}"),
        ("encoder.layers.{s-1}.downsample.reduction.{p}", _STAGES + "embedding.projection.{p}"),
        ("layernorm.{p}", "model.norm.{p}"),
        *_TRANSFORMERS_HEADS,
    )
    + _block("encoder.layers.{s}.blocks.{b}.", _BLOCKS, _TRANSFORMERS_BLOCK),
    "swin.",
    _SWIN_IGNORED,
)
TRANSFORMERS_PVT = Layout(
    "transformers PVT",
    _rows(
        ("encoder.patch_embeddings.{s}.cls_token", _STAGES + "prefix_tokens.class_token"),
        ("encoder.patch_embeddings.{s}.position_embeddings", _STAGES + "position_embedding.weight"),
        ("encoder.patch_embeddings.{s}.projection.{p}", _STAGES + "embedding.projection.{p}"),
        ("encoder.patch_embeddings.{s}.layer_norm.{p}", _STAGES + "embedding.norm.{p}"),
        ("encoder.layer_norm.{p}", "model.norm.{p}"),
        ("classifier.{p}", _CLASS),
    )
    + _block(
        "encoder.block.{s}.{b}.",
        _BLOCKS,
        (
            ("layer_norm_1.{p}", "attention_norm.{p}"),
            ("layer_norm_2.{p}", "mlp_norm.{p}"),
            *((f"attention.self.{part}.{{p}}", f"attention.{part}.{{p}}") for part in ("query", "key", "value")),
            ("attention.self.sequence_reduction.{p}", "attention.reduction.{p}"),
            ("attention.self.layer_norm.{p}", "attention.reduction_norm.{p}"),
            ("attention.output.dense.{p}", "attention.projection.{p}"),
            ("mlp.dense1.{p}", "mlp.fc1.{p}"),
            ("mlp.dense2.{p}", "mlp.fc2.{p}"),
        ),
    ),
    "pvt.",
)

TORCHVISION_VIT = Layout(
    "torchvision ViT",
    _rows(
        ("class_token", _STAGE + "prefix_tokens.class_token"),
        ("encoder.pos_embedding", _STAGE + "position_embedding.weight"),
        ("conv_proj.{p}", _STAGE + "embedding.projection.{p}"),
        ("encoder.ln.{p}", "model.norm.{p}"),
        ("heads.head.{p}", _CLASS),
        ("heads.pre_logits.{p}", "head.representation.{p}"),
    )
    + _block(
        "encoder.layers.encoder_layer_{b}.",
        _BLOCK,
        (
            ("ln_1.{p}", "attention_norm.{p}"),
            ("self_attention.in_proj_{p}", _QKV),
            ("self_attention.out_proj.{p}", "attention.projection.{p}"),
            ("ln_2.{p}", "mlp_norm.{p}"),
            ("mlp.0.{p}", "mlp.fc1.{p}"),
            ("mlp.3.{p}", "mlp.fc2.{p}"),
            # Of its first version, whose files are still about.
            ("mlp.linear_1.{p}", "mlp.fc1.{p}"),
            ("mlp.linear_2.{p}", "mlp.fc2.{p}"),
        ),
    ),
)
TORCHVISION_SWIN = Layout(
    "torchvision Swin",
    _rows(
        ("features.0.0.{p}", _STAGE + "embedding.projection.{p}"),
        ("features.0.2.{p}", _STAGE + "embedding.norm.{p}"),
        ("features.{2s}.norm.{p}", _STAGES + "embedding.norm.{p}"),
        ("features.{2s}.reduction.{p}", _STAGES + "embedding.projection.{p}"),
        ("norm.{p}", "model.norm.{p}"),
        ("head.{p}", _CLASS),
    )
    + _block(
        "features.{2s+1}.{b}.",
        _BLOCKS,
        (
            *(row for row in _TIMM_BLOCK if not row[0].startswith("mlp.")),
            ("mlp.0.{p}", "mlp.fc1.{p}"),
            ("mlp.3.{p}", "mlp.fc2.{p}"),
        ),
    ),
    ignored=_SWIN_IGNORED,
)


def _jax(title: str, positions: str, attention: str, norm2: str, mlp: str) -> Layout:
    return Layout(
        title,
        _rows(
            ("cls", _STAGE + "prefix_tokens.class_token"),
            (positions, _STAGE + "position_embedding.weight"),
            ("embedding.{p}", _STAGE + "embedding.projection.{p}"),
            ("Transformer.encoder_norm.{p}", "model.norm.{p}"),
            ("pre_logits.{p}", "head.representation.{p}"),
            ("head.{p}", _CLASS),
        )
        + _block(
            "Transformer.encoderblock_{b}.",
            _BLOCK,
            (
                ("LayerNorm_0.{p}", "attention_norm.{p}"),
                *((f"{attention}.{part}.{{p}}", f"attention.{part}.{{p}}") for part in ("query", "key", "value")),
                (f"{attention}.out.{{p}}", "attention.projection.{p}"),
                (f"{norm2}.{{p}}", "mlp_norm.{p}"),
                (f"{mlp}.Dense_0.{{p}}", "mlp.fc1.{p}"),
                (f"{mlp}.Dense_1.{{p}}", "mlp.fc2.{p}"),
            ),
        ),
    )


# As `checkpoints` reads these files: dots for slashes, kernels and scales as weights, in torch's order of dimensions.
VIT_JAX = _jax(
    "vit_jax", "Transformer.posembed_input.pos_embedding", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"
)
BIG_VISION = _jax("big_vision", "pos_embedding", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")

LAYOUTS = (
    TIMM_VIT,
    TIMM_SWIN,
    OFFICIAL_SWIN,
    OFFICIAL_PVT,
    TRANSFORMERS_VIT,
    TRANSFORMERS_DEIT,
    TRANSFORMERS_SWIN,
    TRANSFORMERS_PVT,
    TORCHVISION_VIT,
    TORCHVISION_SWIN,
    VIT_JAX,
    BIG_VISION,
)


def recognise(names: Iterable[str]) -> Layout:
    """The layout that means the most of these names.

    Raises:
        ValueError: if they are of no architecture of this family.
    """
    names = list(names)

    def fit(layout: Layout) -> tuple[int, int]:
        pieces, strange = layout.read(names)
        is_embedded = f"{_STAGE}embedding.projection.weight" in pieces
        return is_embedded, len(pieces) - len(strange)

    best = max(LAYOUTS, key=fit)
    is_embedded, surplus = fit(best)
    if not is_embedded or surplus <= 0:
        shown = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"holds tensors such as {shown}: they are of no ViT, DeiT, PVT, Swin, ViTMAE or SimMIM of "
            + ", ".join(layout.title for layout in LAYOUTS)
        )
    return best
