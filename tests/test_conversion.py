"""Checkpoints of every format open, with the outputs of their own library, and go back; nothing else opens."""

import argparse
import io
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from benchmarks.foreign_files import SOURCES, TINY, flax_arrays, google, has_counterpart, outputs_of
from benchmarks.peers import make_images, max_difference
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from modeling_vit_custom import (
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
)
from modeling_vit_custom.convert import convert, from_timm, from_transformers, to_npz, to_onnx, to_timm, to_transformers
from modeling_vit_custom.convert.__main__ import main
from modeling_vit_custom.convert.preprocessing import describe_preprocessing


BOUND = 1e-5


@pytest.mark.parametrize("source", SOURCES, ids=", ".join)
@torch.no_grad()
def test_a_checkpoint_gives_the_outputs_of_its_own_library(source, tmp_path):
    made = SOURCES[source](tmp_path, TINY)
    ours, _ = convert(made.path)
    images = make_images(2, made.image_size)
    expected = outputs_of(made.peer, images)
    assert expected.std() > 0.05
    assert max_difference(outputs_of(ours, images), expected) <= BOUND
    assert ours.config.native_size == (made.image_size, made.image_size)
    assert not ours.training


@pytest.mark.parametrize(
    ("library", "there", "back"),
    [("timm", to_timm, from_timm), ("transformers", to_transformers, from_transformers)],
    ids=["timm", "transformers"],
)
@pytest.mark.parametrize("source", SOURCES, ids=", ".join)
@torch.no_grad()
def test_the_way_there_and_back_changes_no_bit(source, library, there, back, tmp_path):
    made = SOURCES[source](tmp_path, TINY)
    ours, _ = convert(made.path)
    if not has_counterpart(source, library):
        with pytest.raises(ValueError, match=r"ha(s|ve) no"):
            there(ours)
        return
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        theirs = there(ours)
    epsilons_differ = any("epsilon" in str(each.message) for each in warned)
    images = make_images(2, made.image_size)
    assert max_difference(outputs_of(theirs, images), outputs_of(ours, images)) <= (1e-3 if epsilons_differ else BOUND)
    before = ours.state_dict()
    again = back(theirs).state_dict()
    for parameter in theirs.parameters():
        parameter.zero_()  # which is nobody else's
    for name, tensor in before.items():
        assert torch.equal(again.pop(name), tensor), name
    assert not again


@pytest.mark.parametrize("architecture", ["ViT", "DeiT", "PVT", "Swin", "ViTMAE"])
def test_transformers_gets_the_names_that_it_writes_itself(architecture, tmp_path):
    """Those of 4.x, which older versions open as well."""
    (tmp_path / "made").mkdir()
    made = SOURCES["transformers 5.x", architecture](tmp_path / "made", TINY)
    theirs = to_transformers(convert(made.path)[0])
    theirs.save_pretrained(tmp_path / "ours")
    type(theirs)(theirs.config).save_pretrained(tmp_path / "theirs")
    names = [set(load_file(tmp_path / each / "model.safetensors")) for each in ("ours", "theirs")]
    assert names[0] == names[1]


# ------------------------------------------------------------------------------------------------- what comes along


def test_labels_normalisation_and_size_come_along(tmp_path):
    made = SOURCES["timm folder", "ViT"](tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, processor = convert(made.path)
    assert ours.config.id2label == {index: f"class {index}" for index in range(11)}
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert processor.size["shortest_edge"] == 40
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (32, 32)
    _, plain = convert(SOURCES["Google's .npz, vit_jax", "ViT"](tmp_path, TINY).path)
    assert (list(plain.image_mean), list(plain.image_std)) == ([0.5] * 3, [0.5] * 3)


def test_transformers_preprocessing_comes_along(tmp_path):
    made = SOURCES["transformers 5.x", "DeiT"](tmp_path, TINY)
    ViTImageProcessor(image_mean=[0.1] * 3, image_std=[0.2] * 3, resample=2).save_pretrained(made.path)
    _, processor = convert(made.path)
    assert (list(processor.image_mean), list(processor.image_std), processor.resample) == ([0.1] * 3, [0.2] * 3, 2)
    assert (processor.size["height"], processor.size["width"]) == (32, 32)


def test_labels_of_a_pvt_that_transformers_4_wrote(tmp_path):
    """Its configuration has names and no number, for which 5.x takes 1000."""
    made = SOURCES["transformers 4.x", "PVT"](tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_labels"]
    config |= {"id2label": {str(index): f"kind {index}" for index in range(11)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, _ = convert(made.path)
    assert ours.config.id2label == {index: f"kind {index}" for index in range(11)}


@torch.no_grad()
def test_a_checkpoint_in_parts_opens(tmp_path):
    made = SOURCES["transformers 4.x", "Swin"](tmp_path, TINY)
    (tmp_path / "model.safetensors").unlink()
    made.peer.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    images = make_images(2, made.image_size)
    assert max_difference(outputs_of(convert(tmp_path)[0], images), outputs_of(made.peer, images)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_safetensors_whose_first_bytes_look_like_another_format_open(start, tmp_path):
    made = SOURCES["transformers 5.x", "ViT"](tmp_path, TINY)
    file = made.path / "model.safetensors"
    tensors, padding = load_file(file), 0
    # The first bytes are the length of the header, which grows with its metadata.
    while not file.read_bytes().startswith(start):
        padding += 8
        save_file(tensors, file, {"padding": padding * "."})
    convert(made.path)


def test_bfloat16_of_google_opens(tmp_path):
    peer = timm.create_model(**TINY.vit, num_classes=11, act_layer="gelu_tanh")
    made = google(tmp_path, peer, "bfloat16")
    ours, _ = convert(made.path)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.head.classifier.weight, made.peer.head.weight)


def test_heads_are_those_of_a_preset_or_given(tmp_path):
    odd = {**TINY.vit, "embed_dim": 96, "num_heads": 3}
    torch.save(timm.create_model(**odd).state_dict(), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"attention heads.*--preset"):
        convert(tmp_path / "odd.pth")
    assert convert(tmp_path / "odd.pth", num_attention_heads=3)[0].config.num_attention_heads == 3
    with pytest.raises(ValueError, match="hidden_size is 96 by its tensors, and 192 by what is"):
        convert(tmp_path / "odd.pth", preset="deit_tiny_patch16_224")


def test_weights_behind_wrappers_open(tmp_path):
    made = SOURCES["timm .pth", "ViT"](tmp_path, TINY)
    tensors = {f"module.{name}": tensor for name, tensor in made.peer.state_dict().items()}
    training = {"state_dict": tensors, "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    torch.save(training, tmp_path / "wrapped.pth")
    ours, _ = convert(tmp_path / "wrapped.pth")
    assert torch.equal(ours.head.classifier.weight, made.peer.head.weight)


# The activation and the epsilon of norms are those of each library's own code; outputs hardly show them.
CODES = {
    ("Google's .npz, vit_jax", "ViT"): ("gelu_pytorch_tanh", 1e-6),
    ("timm .pth", "ViT"): ("gelu", 1e-6),
    ("Swin's .pth", "Swin"): ("gelu", 1e-5),
    ("torchvision", "ViT"): ("gelu", 1e-6),
    ("torchvision", "Swin"): ("gelu", 1e-5),
    ("transformers 4.x", "ViT"): ("gelu", 1e-12),
    ("transformers 4.x", "Swin"): ("gelu", 1e-5),
    ("transformers 4.x", "PVT"): ("gelu", 1e-6),
}


@pytest.mark.parametrize("source", CODES, ids=", ".join)
def test_activations_and_epsilons_are_those_of_the_code(source, tmp_path):
    ours, _ = convert(SOURCES[source](tmp_path, TINY).path)
    assert (ours.config.hidden_act, ours.config.layer_norm_eps) == CODES[source]


@pytest.mark.parametrize("crop", [("center", 1.0), ("center", 0.8), ("squash", 1.0), ("squash", 0.8)], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_prepared_as_timm_does(crop, interpolation, tmp_path):
    made = SOURCES["timm folder", "ViT"](tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    given = {"crop_mode": crop[0], "crop_pct": crop[1], "interpolation": interpolation, "mean": [0.4] * 3}
    config["pretrained_cfg"] |= given | {"input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, processor = convert(made.path)
    rows, columns = torch.meshgrid(torch.linspace(0, 9, 80), torch.linspace(0, 12, 120), indexing="ij")
    waves = torch.stack([rows.sin() * columns.cos(), columns.sin(), (rows + columns).cos()], dim=2)
    image = Image.fromarray(((waves + 1) * 127).to(torch.uint8).numpy())
    options = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    expected = timm.data.create_transform(**options)(image)
    found = processor(image, return_tensors="pt").pixel_values[0]
    assert (found - expected).abs().mean() < 0.01
    described = describe_preprocessing(processor, ours.config)
    assert {name: described[name] for name in given} == given


def test_an_older_configuration_of_timm_tells_the_normalisation(tmp_path):
    made = SOURCES["timm folder", "ViT"](tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pretrained_cfg"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"mean": [0.1, 0.2, 0.3]}))
    assert list(convert(made.path)[1].image_mean) == [0.1, 0.2, 0.3]


def test_a_file_is_not_torn_from_its_configuration(tmp_path):
    made = SOURCES["transformers 4.x", "Swin"](tmp_path, TINY)
    whole, _ = convert(made.path)
    assert convert(tmp_path / "model.safetensors")[0].config.to_dict() == whole.config.to_dict()


def test_a_square_size_around_a_crop_comes_along(tmp_path, capsys):
    """As transformers prepares images for its DeiT."""
    (tmp_path / "made").mkdir()
    made = SOURCES["transformers 4.x", "DeiT"](tmp_path / "made", TINY)
    ViTImageProcessor(size={"height": 40, "width": 40}, do_center_crop=True, crop_size=32).save_pretrained(made.path)
    main([str(made.path), str(tmp_path / "timm"), "--to", "timm"])
    described = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (described["crop_pct"], described["crop_mode"]) == (0.8, "squash")
    main([str(made.path), str(tmp_path / "larger"), "--image_size", "64"])
    processor = ViTImageProcessor.from_pretrained(tmp_path / "larger")
    assert (processor.size["height"], processor.crop_size["height"]) == (80, 64)


def test_heads_of_google_files_are_in_their_shapes(tmp_path):
    peer = timm.create_model(**{**TINY.vit, "num_heads": 6}, num_classes=11, act_layer="gelu_tanh")
    ours, _ = convert(google(tmp_path, peer, "big_vision").path)
    assert ours.config.num_attention_heads == 6


def test_what_is_assumed_is_said(tmp_path, capsys):
    made = SOURCES["timm .pth", "ViT"](tmp_path, TINY)
    main([str(made.path), str(tmp_path / "out")])
    warning = "convert: warning: the weights do not tell the number of attention heads: 3 are assumed, as vit_tiny"
    assert capsys.readouterr().err.startswith(warning)
    main([str(made.path), str(tmp_path / "told"), "--num_attention_heads", "3"])
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------ from the Hub


@torch.no_grad()
def test_a_model_on_the_hub_opens_under_a_revision(hub, tmp_path, capsys):
    """Two versions of one repository, written by timm and by transformers, a branch and a commit."""
    api = HfApi()
    api.create_repo("someone/model")
    made = {}
    for source, branch in ((("timm folder", "Swin"), "main"), (("transformers 4.x", "ViT"), "older")):
        folder = tmp_path / branch
        folder.mkdir()
        made[branch] = SOURCES[source](folder, TINY)
        if branch != "main":
            api.create_branch("someone/model", branch=branch)
        pushed = api.upload_folder(repo_id="someone/model", folder_path=folder, revision=branch, delete_patterns="*")
        made[pushed.oid] = made[branch]
    for revision, source in made.items():
        ours, _ = convert("someone/model", revision=revision)
        images = make_images(2, source.image_size)
        assert max_difference(outputs_of(ours, images), outputs_of(source.peer, images)) <= BOUND
    main(["someone/model", str(tmp_path / "out"), "--revision", "older"])
    assert "ViTCustomForImageClassification, 11 classes" in capsys.readouterr().out
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert max_difference(outputs_of(opened, images), outputs_of(made["older"].peer, images)) <= BOUND


@torch.no_grad()
def test_a_model_of_ours_on_the_hub_goes_elsewhere(hub, tmp_path):
    made = SOURCES["timm folder", "Swin"](tmp_path, TINY)
    ours, processor = convert(made.path)
    HfApi().create_repo("someone/model")
    HfApi().create_branch("someone/model", branch="trained")
    for each in (ours, processor):
        each.save_pretrained(tmp_path / "ours")
    HfApi().upload_folder(repo_id="someone/model", folder_path=tmp_path / "ours", revision="trained")
    main(["someone/model", str(tmp_path / "out"), "--revision", "trained", "--to", "transformers"])
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    images = make_images(2, made.image_size)
    assert max_difference(outputs_of(opened, images), outputs_of(made.peer, images)) <= BOUND


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("someone/missing", [], "there is no file or folder 'someone/missing', and on the Hub it does not open"),
        ("someone/model", ["--revision", "nowhere"], "there is no file or folder 'someone/model', and on the Hub"),
        ("someone/model", [], "'someone/model' holds no weights, such as model.safetensors"),
    ],
    ids=["repository", "revision", "empty"],
)
def test_what_the_hub_has_not_is_one_line(name, options, message, hub, tmp_path, capsys):
    HfApi().create_repo("someone/model")
    with pytest.raises(SystemExit) as stopped:
        main([name, str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"convert: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- what is refused


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def drop(path: Path, name: str) -> None:
    tensors = torch.load(path, weights_only=True)
    del tensors[name]
    torch.save(tensors, path)


def rename(path: Path, old: str, new: str) -> None:
    tensors = torch.load(path, weights_only=True)
    tensors[new] = tensors.pop(old)
    torch.save(tensors, path)


def change(path: Path, function: Callable) -> None:
    torch.save({name: function(tensor) for name, tensor in torch.load(path, weights_only=True).items()}, path)


def add(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "extra.weight": torch.zeros(2)}, path)


def bend(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "blocks.1.mlp.fc2.bias": torch.zeros(7)}, path)


def spoil(path: Path) -> None:
    tensors = torch.load(path, weights_only=True)
    tensors["blocks.0.norm1.weight"][3] = float("nan")
    torch.save(tensors, path)


DAMAGES = {
    "cut off": (cut, "no whole file of weights"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("<html>not found</html>"), "no whole file of weights"),
    "missing": (lambda path: drop(path, "blocks.0.norm1.bias"), "missing blocks.0.norm1.bias"),
    "missing block": (lambda path: drop(path, "patch_embed.proj.weight"), "unexpected|they are of no ViT"),
    "unexpected": (add, "unexpected extra.weight"),
    "other shape": (bend, r"mlp.fc2.bias has the shape \(7,\)"),
    "not finite": (spoil, "not finite"),
    "a block is missing": (
        lambda path: [drop(path, name) for name in torch.load(path, weights_only=True) if "blocks.0." in name],
        "blocks are missing",
    ),
    "a number of blocks that nobody has": (
        lambda path: rename(path, "blocks.1.norm1.weight", "blocks.999999999999.norm1.weight"),
        "blocks are missing",
    ),
    "integers": (lambda path: change(path, torch.Tensor.long), "weights must be floating-point numbers"),
    "no dimensions": (lambda path: change(path, torch.Tensor.sum), "must have 2 or 4 dimensions"),
    "ResNet": (lambda path: torch.save(timm.create_model("resnet18").state_dict(), path), "they are of no ViT"),
    "list": (lambda path: torch.save([torch.zeros(2)], path), "no tensors are in it"),
}


# A configuration and weights that are not of each other, by what differs.
LIES = {
    ("transformers 4.x", "ViT", "layers"): ({"num_hidden_layers": 3}, "num_hidden_layers is 2 by its tensors, and 3"),
    ("transformers 4.x", "ViT", "biases"): ({"qkv_bias": False}, "qkv_bias is True by its tensors, and False"),
    ("transformers 4.x", "ViT", "width"): ({"hidden_size": 96}, "hidden_size is 192 by its tensors, and 96"),
    ("transformers 4.x", "ViT", "size"): ({"image_size": 16}, r"position_embedding.weight has the shape"),
    ("transformers 4.x", "ViT", "labels"): ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "num_labels is 11 by its"),
    ("transformers 4.x", "ViT", "numbers"): ({"id2label": {"1": "a", "2": "b"}}, "must number the classes from 0"),
    ("transformers 4.x", "ViT", "kind"): ({"model_type": ["vit"]}, "something unexpected .TypeError"),
    ("transformers 4.x", "PVT", "ratios"): ({"sequence_reduction_ratios": [4, 2]}, "sr_ratios is|depths is"),
    ("transformers 4.x", "Swin", "depths"): ({"depths": [2, 3]}, "depths is 2 by its tensors, and .2, 3. by"),
    ("timm folder", "ViT", "depth"): ({"model_args": {**TINY.vit, "depth": 3}}, "num_hidden_layers is 2 by its"),
    ("timm folder", "ViT", "classes"): ({"num_classes": 7}, "num_labels is 11 by its tensors, and 7"),
    ("timm folder", "ViT", "architecture"): ({"architecture": "resnet18"}, "timm makes no 'resnet18'|must be a timm"),
    ("timm folder", "ViT", "path"): ({"model_args": {"checkpoint_path": "x.pth"}}, "hold 'checkpoint_path'"),
    ("timm folder", "ViT", "patch"): ({"model_args": {"patch_size": 0}}, "timm makes no"),
    ("timm folder", "ViT", "list"): ({"model_args": [1]}, "something unexpected"),
    ("timm folder", "ViT", "mean"): ({"pretrained_cfg": {"mean": None}}, "something unexpected .TypeError"),
}


@pytest.mark.parametrize("lie", LIES, ids=", ".join)
def test_a_configuration_that_lies_is_refused(lie, tmp_path):
    changed, message = LIES[lie]
    (tmp_path / "made").mkdir()
    made = SOURCES[lie[:2]](tmp_path / "made", TINY)
    file = made.path / "config.json"
    config = json.loads(file.read_text())
    if "id2label" in changed:
        config["label2id"] = {name: int(index) for index, name in changed["id2label"].items()}
    if "model_args" in changed and isinstance(changed["model_args"], dict):
        changed = {"model_args": {name: value for name, value in changed["model_args"].items() if name != "model_name"}}
    file.write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match=message):
        convert(made.path)


def test_a_path_in_a_configuration_is_not_opened(tmp_path):
    """timm's constructors load `checkpoint_path`, and before 1.0.21 ran what was pickled there."""
    made = SOURCES["timm folder", "ViT"](tmp_path, TINY)
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump(Malicious(tmp_path / "ran"), file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["checkpoint_path"] = str(tmp_path / "evil.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="checkpoint_path"):
        convert(made.path)
    assert not (tmp_path / "ran").exists()


def test_weights_without_what_the_configuration_promises_are_refused(tmp_path):
    for name, message in {
        "cls_token": "use_class_token is False",
        "position_embeddings": "position_embedding_type is none",
        "classifier": "have no classifier",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        made = SOURCES["transformers 4.x", "ViT"](folder, TINY)
        tensors = load_file(folder / "model.safetensors")
        save_file({key: tensor for key, tensor in tensors.items() if name not in key}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            convert(made.path)


def test_an_index_is_obeyed(tmp_path):
    made = SOURCES["transformers 4.x", "Swin"](tmp_path, TINY)
    (tmp_path / "model.safetensors").unlink()
    made.peer.save_pretrained(tmp_path, max_shard_size="200KB")
    expected = convert(made.path)[0].state_dict()
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    first = load_file(sorted(tmp_path.glob("model-*.safetensors"))[0])
    save_file({**{name: tensor + 1 for name, tensor in first.items()}, **load_file(last)}, last)
    found = convert(made.path)[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["nowhere.weight"] = last.name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"says that 'nowhere.weight' is in"):
        convert(made.path)


@pytest.mark.parametrize("shape", [(20000, 192), ()], ids=str)
def test_an_array_that_is_not_what_its_header_says_is_refused(shape, tmp_path):
    made = SOURCES["Google's .npz, big_vision, stacked blocks", "ViT"](tmp_path, TINY)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(made.path, "a") as archive:
        archive.writestr("params/Transformer/encoderblock/LayerNorm_9/scale.npy", header.getvalue())
    with pytest.raises(ValueError, match="holds 0 bytes, which are no array of shape"):
        convert(made.path)


def test_a_flipped_bit_of_an_archive_is_one_line(tmp_path):
    made = SOURCES["Google's .npz, vit_jax", "ViT"](tmp_path, TINY)
    content = bytearray(made.path.read_bytes())
    content[len(content) // 2] ^= 255
    made.path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"cannot convert .* something unexpected .BadZipFile: Bad CRC"):
        convert(made.path)


def test_fields_that_nobody_knows_are_refused(tmp_path):
    made = SOURCES["timm .pth", "ViT"](tmp_path, TINY)
    with pytest.raises(ValueError, match="ViTCustomConfig has no field 'img_size'"):
        convert(made.path, img_size=64)


REFUSED_EXPORTS = {
    "a mean that the other library does not take": (to_timm, "deit", {"pooling": "mean"}, "pooling='mean'"),
    "a PVT's mean": (to_transformers, "pvt", {"pooling": "mean"}, "pooling='mean'"),
    "two tokens": (
        to_transformers,
        "deit",
        {"use_distillation_token": True, "num_register_tokens": 1},
        "num_register_tokens=1",
    ),
    "a PVT that is not square": (to_transformers, "pvt", {"image_size": [32, 64]}, "must be square"),
    "a Swin's activation": (to_timm, "swin", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh'"),
    "a PVT with two heads": (
        to_transformers,
        "pvt",
        {"use_distillation_token": True},
        "transformers has no PvtForImageClassificationWithTeacher",
    ),
    "mean beside a class token": (to_npz, "vit", {"pooling": "mean"}, "pooling='mean'"),
    "not square": (to_npz, "vit", {"image_size": [32, 16]}, "image_size="),
    "no biases": (to_npz, "vit", {"qkv_bias": False}, "qkv_bias=False"),
    "no positions": (to_npz, "vit", {"position_embedding_type": "none"}, "position_embedding_type='none'"),
}


@pytest.mark.parametrize(("way", "architecture", "fields", "message"), REFUSED_EXPORTS.values(), ids=REFUSED_EXPORTS)
def test_what_would_be_another_model_elsewhere_is_refused(way, architecture, fields, message):
    with pytest.raises(ValueError, match=message):
        way(tiny_model(ViTCustomForImageClassification, architecture, **fields))


@pytest.mark.parametrize("way", [to_timm, to_transformers, to_npz, to_onnx])
def test_only_models_of_ours_in_memory_go_elsewhere(way):
    with pytest.raises(ValueError, match=r"a Linear is no model of this family"):
        way(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is quantised, or not in memory"):
        way(tiny_model(ViTCustomForImageClassification, "vit").to("meta"))


@pytest.mark.parametrize("way", [from_timm, from_transformers])
def test_only_models_of_that_library_are_taken(way):
    for model in (torch.nn.Linear(2, 2), torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)):
        with pytest.raises(ValueError, match=f"cannot convert a {type(model).__name__}: it must be a"):
            way(model)


def test_a_pyramid_without_a_model_there_is_refused():
    with pytest.raises(ValueError, match="transformers has no PvtForMaskedImageModeling"):
        to_transformers(tiny_model(ViTCustomForMaskedImageModeling, "pvt"))
    bare = tiny_model(ViTCustomModel, "vit", use_distillation_token=True, num_register_tokens=1)
    with pytest.raises(ValueError, match="num_register_tokens=1"):
        to_transformers(bare)
    with pytest.raises(ValueError, match="num_register_tokens=1"):
        to_transformers(tiny_model(ViTCustomForPreTraining, "vit", num_register_tokens=1))


def test_what_differs_of_a_swin_is_warned_of():
    with pytest.warns(UserWarning, match="one window high or wide: transformers does not shift"):
        to_transformers(tiny_model(ViTCustomForImageClassification, "swin", image_size=(16, 32), depths=[2, 2]))
    model = tiny_model(ViTCustomForImageClassification, "swin", patch_norm_eps=0.1)
    for way in (to_timm, to_transformers):
        with pytest.warns(UserWarning, match="has an epsilon of 1e-05 in norms where this model has 0.1"):
            way(model)


def test_padded_windows_are_warned_of(tmp_path):
    model = tiny_model(ViTCustomForImageClassification, "swin", window_size=3)
    for way in (to_timm, to_transformers):
        with pytest.warns(UserWarning, match="windows do not fill the grid"):
            way(model)


def test_the_source_is_never_written_over(tmp_path, capsys):
    made = SOURCES["timm folder", "ViT"](tmp_path, TINY)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for source in (made.path, next(tmp_path.glob("*model*"))):
        with pytest.raises(SystemExit):
            main([str(source), str(tmp_path), "--overwrite"])
        assert "holds SOURCE, which is to stay" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_options_that_mean_nothing_are_refused(tmp_path, capsys):
    tiny_model(ViTCustomForImageClassification, "vit").save_pretrained(tmp_path / "ours")
    for options in (["--preset", "vit_tiny_patch16_224"], ["--num_attention_heads", "2"]):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "timm", *options])
        assert f"{options[0]} means nothing for" in capsys.readouterr().err
    main([str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "timm"])
    assert "has no preprocessor_config.json: images are taken to go from -1 to 1" in capsys.readouterr().err


def test_nothing_is_written_beside_a_folder_in_the_way(tmp_path, capsys):
    made = SOURCES["timm .pth", "ViT"](tmp_path, TINY)
    (tmp_path / "out" / "preprocessor_config.json").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main([str(made.path), str(tmp_path / "out"), "--overwrite"])
    assert "has a folder 'preprocessor_config.json'" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["preprocessor_config.json"]
    with pytest.raises(SystemExit):
        main([str(made.path), str(tmp_path / "deep" / "er"), "--to", "npz", "--image_size", "-1"])
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_one_line_and_nothing_is_written(damage, expected, tmp_path, capsys):
    made = SOURCES["timm .pth", "ViT"](tmp_path, TINY)
    damage(made.path)
    with pytest.raises(SystemExit) as stop:
        main([str(made.path), str(tmp_path / "ours")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert: error: ")
    assert re.search(expected, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.pth"]


@pytest.mark.parametrize("kind", ["torch", "pickle", "npz", "npy"])
def test_nothing_that_a_file_holds_is_run(kind, tmp_path):
    done, path = tmp_path / "done", tmp_path / "weights"
    if kind == "torch":
        torch.save({"model": Malicious(done)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(done)))
    elif kind == "npz":
        np.savez(tmp_path / "made.npz", weights=np.array([Malicious(done)], dtype=object))
        (tmp_path / "made.npz").rename(path)
    else:
        with path.open("wb") as file:
            np.save(file, np.array([Malicious(done)], dtype=object))
    with pytest.raises(ValueError, match=r"could run code|no whole file"):
        convert(path)
    assert not done.exists()


def test_an_index_leads_to_nothing_outside_of_its_folder(tmp_path):
    made = SOURCES["transformers 5.x", "ViT"](tmp_path, TINY)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "outside.safetensors")
    index = {"weight_map": {"classifier.weight": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is not there"):
        convert(made.path)


# ------------------------------------------------------------------------------------------------------- the command


@torch.no_grad()
def test_the_command_converts_there_and_back(tmp_path, capsys):
    made = SOURCES["timm folder", "ViT"](tmp_path / "source", TINY)
    main([str(made.path), str(tmp_path / "ours")])
    assert "11 classes for 32 x 32 pixels" in capsys.readouterr().out
    images = make_images(2, 32)
    expected = outputs_of(made.peer, images)
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    assert max_difference(outputs_of(ours, images), expected) <= BOUND
    assert AutoImageProcessor.from_pretrained(tmp_path / "ours").crop_size["height"] == 32
    main([str(tmp_path / "ours"), str(tmp_path / "timm"), "--to", "timm"])
    weights = tmp_path / "timm" / "model.safetensors"  # which older timm takes for a pickle in a folder
    again = timm.create_model(f"local-dir:{weights.parent}", checkpoint_path=weights).eval()
    assert torch.equal(outputs_of(again, images), expected)
    assert again.pretrained_cfg["label_names"] == [f"class {index}" for index in range(11)]
    main([str(made.path), str(tmp_path / "transformers"), "--to", "transformers"])
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "transformers").eval()
    assert type(theirs).__name__ == "ViTForImageClassification"
    assert max_difference(outputs_of(theirs, images), expected) <= BOUND
    main([str(made.path), str(tmp_path / "npz"), "--to", "npz"])
    assert set(np.load(tmp_path / "npz" / "model.npz").files) == set(flax_arrays(made.peer, big_vision=False))


def test_the_command_resizes_and_rounds(tmp_path):
    made = SOURCES["timm folder", "Swin"](tmp_path / "source", TINY)
    main([str(made.path), str(tmp_path / "ours"), "--image_size", "128", "--window_size", "4", "--dtype", "bfloat16"])
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    assert (config.image_size, config.window_size, config.dtype) == (128, 4, torch.bfloat16)
    assert AutoImageProcessor.from_pretrained(tmp_path / "ours").crop_size["height"] == 128


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nowhere.pth", "OUT"], "there is no file or folder 'nowhere.pth'"),
        (["nowhere/nothing", "OUT"], "on the Hub it does not open"),
        (["SOURCE", "SOURCE"], "is a file"),
        (["SOURCE", "FULL"], "is not empty: pass --overwrite"),
        (["SOURCE", "OUT", "--to", "keras"], "invalid choice: 'keras'"),
        (["SOURCE", "OUT", "--window_size", "3"], "comes with --image_size"),
        (
            ["SOURCE", "OUT", "--image_size", "64", "--window_size", "3"],
            "is for a model with windows",
        ),
        (["SOURCE", "OUT", "--image_size", "0"], "0 must be at least 1"),
        (["SOURCE", "OUT", "--num_attention_heads", "7"], "not a multiple of num_attention_heads=7"),
        (["FULL", "OUT"], "no weights, such as model.safetensors"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(argv, expected, tmp_path, capsys, monkeypatch):
    made = SOURCES["timm .pth", "ViT"](tmp_path, TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    places = {"SOURCE": str(made.path), "OUT": "out", "FULL": "full"}
    with pytest.raises(SystemExit) as stop:
        main([places.get(each, each) for each in argv])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "weights.pth"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
