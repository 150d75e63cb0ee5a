"""Graphs give the model's outputs for any number of images of any size, in runtimes that know nothing of us."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_models import main_output, random_images, tiny_model
from transformers import ViTImageProcessor

from modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomForImageClassification,
    ViTCustomForPreTraining,
    ViTCustomModel,
)
from modeling_vit_custom.convert import export, to_exported_program, to_onnx
from modeling_vit_custom.convert.__main__ import main
from modeling_vit_custom.convert.graphs import OLDEST_TORCH


pytestmark = pytest.mark.skipif(
    torch.__version__ < OLDEST_TORCH, reason=f"torch traces for all sizes from {OLDEST_TORCH} on"
)

# Native; smaller than a window; padded in one direction and in both; more windows than one, shifted and not.
BATCHES = [(1, 32, 32), (3, 9, 9), (1, 64, 9), (2, 33, 70), (2, 40, 32)]
# A translation to ONNX takes seconds; the slow ones are of parts that the others have as well.
HEADS = [
    ViTCustomForImageClassification,
    pytest.param(ViTCustomModel, marks=pytest.mark.slow),
    pytest.param(ViTCustomBackbone, marks=pytest.mark.slow),
]
VARIANTS = {
    "interpolated with antialiasing": ("vit", {"position_antialias": True}),
    "windows and positions": ("swin", {"position_embedding_type": "learned"}),
    "fixed positions, mean": ("vit", {"position_embedding_type": "sincos2d", "pooling": "mean"}),
}
SLOW_VARIANTS = {
    "no positions": ("vit", {"position_embedding_type": "none"}),
    "registers and scales": ("vit", {"num_register_tokens": 2, "qk_norm": True, "layer_scale_init_value": 0.1}),
    "norm after pooling": ("vit", {"pooling": "mean", "norm_after_pooling": True, "head_batch_norm": True}),
    "pre-logits": ("vit", {"representation_size": 16}),
    "windows of two sizes": ("swin", {"window_size": [4, 3]}),
}


@torch.no_grad()
def assert_runs_like(model, run, batches=BATCHES):
    """Main outputs of a runtime, by our names or in their order, against the model's."""
    for batch_size, height, width in batches:
        images = random_images(batch_size, height, width)
        found = torch.cat([torch.as_tensor(part).flatten(1) for part in run(images)], dim=1)
        expected = main_output(model, images)
        assert expected.std() > 0.05
        torch.testing.assert_close(found, expected.flatten(1), rtol=1e-5, atol=1e-5)


def onnx_session(model, path):
    to_onnx(model).save(path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(path)


@pytest.mark.parametrize("head", [ViTCustomModel, ViTCustomForImageClassification, ViTCustomBackbone])
def test_an_exported_program_takes_all_sizes(head, architecture, tmp_path):
    model = tiny_model(head, architecture)
    torch.export.save(to_exported_program(model), tmp_path / "model.pt2")
    assert_runs_like(model, torch.export.load(tmp_path / "model.pt2").module())


@pytest.mark.parametrize("head", HEADS)
def test_onnx_takes_all_sizes(head, architecture, tmp_path):
    model = tiny_model(head, architecture)
    session = onnx_session(model, tmp_path / "model.onnx")
    assert [each.name for each in session.get_inputs()] == ["pixel_values"]
    names = {
        ViTCustomModel: ["last_hidden_state", "pooler_output"],
        ViTCustomForImageClassification: ["logits"],
        ViTCustomBackbone: model.config.out_features,
    }
    assert [each.name for each in session.get_outputs()] == names[head]
    assert_runs_like(model, lambda images: session.run(None, {"pixel_values": images.numpy()}))


@pytest.mark.parametrize(
    "variant", [*VARIANTS, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_VARIANTS)]
)
def test_onnx_of_all_that_a_configuration_can_say(variant, tmp_path):
    architecture, fields = (VARIANTS | SLOW_VARIANTS)[variant]
    model = tiny_model(ViTCustomForImageClassification, architecture, **fields)
    session = onnx_session(model, tmp_path / "model.onnx")
    assert_runs_like(model, lambda images: session.run(None, {"pixel_values": images.numpy()}))


def test_several_feature_maps_by_name(tmp_path):
    model = tiny_model(ViTCustomBackbone, "pvt", out_features=["stage1", "stage2"])
    session = onnx_session(model, tmp_path / "model.onnx")
    maps = session.run(["stage2", "stage1"], {"pixel_values": random_images(2, 33, 70).numpy()})
    assert [each.shape for each in maps] == [(2, 32, 5, 9), (2, 16, 9, 18)]
    assert_runs_like(model, lambda images: session.run(None, {"pixel_values": images.numpy()}))


@torch.no_grad()
def test_half_precision(tmp_path):
    model = tiny_model(ViTCustomForImageClassification, "vit", initializer_range=0.02)
    images, expected = random_images(2, 40, 32), main_output(model, random_images(2, 40, 32))
    session = onnx_session(model.half(), tmp_path / "model.onnx")
    (logits,) = session.run(None, {"pixel_values": images.half().numpy()})
    assert logits.dtype == np.float16
    torch.testing.assert_close(torch.tensor(logits).float(), expected, rtol=0.02, atol=0.02)


def test_a_model_stays_as_it_was():
    model = tiny_model(ViTCustomForImageClassification, "vit").train()
    model.set_attn_implementation("eager")
    to_exported_program(model)
    assert model.training and model.head.training
    assert model.config._attn_implementation == "eager"


# Runs in a fresh process: neither this package nor transformers nor timm can be imported.
RUNTIME = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_vit_custom", "transformers", "timm"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Absent())
import json
import numpy as np
import onnxruntime
import torch

folder = sys.argv[1]
images = np.load(folder + "/images.npy")
(logits,) = onnxruntime.InferenceSession(folder + "/onnx/model.onnx").run(None, {"pixel_values": images})
(others,) = torch.export.load(folder + "/pt2/model.pt2").module()(torch.tensor(images))
labels = json.load(open(folder + "/onnx/config.json"))["id2label"]
size = json.load(open(folder + "/onnx/preprocessor_config.json"))["size"]
print(json.dumps([logits.tolist(), others.tolist(), labels, size]))
"""


@torch.no_grad()
def test_a_process_without_us_runs_what_the_command_wrote(architecture, tmp_path, capsys):
    model = tiny_model(ViTCustomForImageClassification, architecture, id2label=dict(enumerate("abcde")))
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    for to in ("onnx", "pt2"):
        main([str(tmp_path / "model"), str(tmp_path / to), "--to", to])
        assert f"{tmp_path / to}: ViTCustomForImageClassification, 5 classes" in capsys.readouterr().out
    images = random_images(3, 24, 40)
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", RUNTIME, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    logits, others, labels, size = json.loads(answer.stdout)
    expected = model(images).logits
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(others), expected, rtol=1e-5, atol=1e-5)
    assert labels == {str(index): name for index, name in enumerate("abcde")}
    assert size == {"height": 32, "width": 32}


@pytest.mark.parametrize("to", [to_exported_program, to_onnx])
def test_what_has_no_graph_is_refused(to):
    with pytest.raises(ValueError, match="a ViTCustomForPreTraining is for training"):
        to(tiny_model(ViTCustomForPreTraining, "vit"))
    backbone = tiny_model(ViTCustomBackbone, "pvt", out_features=["stage1", "stage2"], out_strides=[4, 8])
    with pytest.raises(ValueError, match="a graph needs out_strides=None"):
        to(backbone)


def test_onnx_has_no_bfloat16(tmp_path):
    with pytest.raises(ValueError, match="make it float32 or float16"):
        to_onnx(tiny_model(ViTCustomModel, "vit").bfloat16())


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    tiny_model(ViTCustomForImageClassification, "vit").save_pretrained(tmp_path / "model")
    ViTImageProcessor().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", "onnx"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "convert: error: ONNX needs more libraries: pip install onnx onnxruntime onnxscript\n"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="pip install"):
        export(tiny_model(ViTCustomModel, "vit"), ViTImageProcessor(), "onnx", tmp_path)
