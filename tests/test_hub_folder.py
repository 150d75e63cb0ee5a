"""A saved folder opens in a fresh process that cannot import this package, and again from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import HEADS_AND_ARCHITECTURES, main_output, random_images, tiny_model
from transformers import ViTImageProcessor

from modeling_vit_custom import ViTCustomForImageClassification


CODE_FILES = {"configuration_vit_custom.py", "kernels.py", "modeling_vit_custom.py"}
AUTO_CLASSES = {
    "ViTCustomModel": "AutoModel",
    "ViTCustomForImageClassification": "AutoModelForImageClassification",
    "ViTCustomForPreTraining": "AutoModelForPreTraining",
    "ViTCustomForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "ViTCustomBackbone": "AutoBackbone",
}

# Runs in a fresh process: opens every folder, compares, and saves each once more under the second path.
STRANGER = """
import json, os, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_vit_custom":
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Absent())

import torch
import transformers
from PIL import Image

try:
    import modeling_vit_custom
except ImportError:
    pass
else:
    raise AssertionError("the package can be imported")

source, target, images_path = sys.argv[1:]
images = torch.load(images_path)
trust = {"trust_remote_code": True}


def refuses_without_trust(load, folder):
    try:
        load(folder, trust_remote_code=False)
    except ValueError as error:
        return "trust_remote_code" in str(error)
    return False


for name in sorted(os.listdir(source)):
    folder, auto_class = os.path.join(source, name), name.split("-")[0]
    expected = torch.load(os.path.join(folder, "expected.pt"))
    config = transformers.AutoConfig.from_pretrained(folder, **trust)
    assert config.model_type == "vit_custom" and type(config).__module__.startswith("transformers_modules.")
    load = getattr(transformers, auto_class).from_pretrained
    if auto_class == "AutoBackbone":
        # The library looks for a backbone's folder on the Hub only; its class and config come from the folder.
        auto = transformers.AutoBackbone.from_config(config, **trust)
        load = lambda folder, trust_remote_code: type(auto).from_pretrained(folder)
    elif name.endswith("-vit"):
        assert refuses_without_trust(load, folder)
    torch.manual_seed(0)
    model = load(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        found = {key: value for key, value in model(images).items() if isinstance(value, torch.Tensor)}
        if auto_class == "AutoBackbone":
            found = {str(i): value for i, value in enumerate(model(images).feature_maps)}
        elif auto_class in ("AutoModelForPreTraining", "AutoModelForMaskedImageModeling"):
            torch.manual_seed(7)
            found = {key: value for key, value in model(images).items() if isinstance(value, torch.Tensor)}
    assert found.keys() == expected.keys(), (name, found.keys(), expected.keys())
    for key, value in found.items():
        assert torch.equal(value, expected[key]), (name, key)

    # Whatever head was saved, the others start from its encoder.
    encoder = transformers.AutoModel.from_pretrained(folder, **trust)
    inner = model if auto_class == "AutoModel" else model.model
    own = {key: value for key, value in inner.state_dict().items() if "mask_token" not in key}
    assert own.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in own.items())
    transformers.AutoModelForImageClassification.from_pretrained(folder, **trust)

    picture = Image.open(os.path.join(folder, "picture.png"))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(picture, return_tensors="pt").pixel_values
    features = transformers.pipeline("image-feature-extraction", model=folder, **trust)(picture)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(features), encoder(pixels).last_hidden_state)
    if auto_class == "AutoModelForImageClassification":
        scores = transformers.pipeline("image-classification", model=folder, top_k=5, **trust)(picture)
        with torch.no_grad():
            chances = model(pixels).logits.softmax(-1)[0]
        assert {item["label"] for item in scores} == {"ant", "bee", "cat", "dog", "eel"}
        for item in scores:
            assert abs(chances[model.config.label2id[item["label"]]].item() - item["score"]) < 1e-5

    again = os.path.join(target, name)
    model.save_pretrained(again)
    processor.save_pretrained(again)
    torch.save(expected, os.path.join(again, "expected.pt"))
    picture.save(os.path.join(again, "picture.png"))
print("opened", len(os.listdir(source)))
"""

# Runs in a fresh process where the package is imported: nothing has to be trusted, and its own classes answer.
FRIEND = """
import os, sys
import torch, transformers
import modeling_vit_custom

images = torch.load(sys.argv[2])
for name in sorted(os.listdir(sys.argv[1])):
    folder, auto_class = os.path.join(sys.argv[1], name), name.split("-")[0]
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(config) is modeling_vit_custom.ViTCustomConfig
    if auto_class == "AutoBackbone":
        assert type(transformers.AutoBackbone.from_config(config)) is modeling_vit_custom.ViTCustomBackbone
        continue
    model = getattr(transformers, auto_class).from_pretrained(folder)
    assert type(model).__module__ == "modeling_vit_custom.modeling_vit_custom"
    assert type(transformers.AutoImageProcessor.from_pretrained(folder)).__name__.startswith("ViTImageProcessor")
    expected = torch.load(os.path.join(folder, "expected.pt"))
    torch.manual_seed(7)
    with torch.no_grad():
        outputs = model(images)
    assert all(torch.equal(outputs[key], value) for key, value in expected.items())
    if auto_class == "AutoModelForImageClassification":
        transformers.pipeline("image-classification", model=folder)(os.path.join(folder, "picture.png"))
        transformers.pipeline("image-feature-extraction", model=folder)(os.path.join(folder, "picture.png"))
print("opened", len(os.listdir(sys.argv[1])))
"""


def run_fresh(code: str, *arguments, folder: Path, isolated: bool):
    """Run code in a process with module caches of its own, away from the checkout."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    folder.mkdir()
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of folders, one for each head and architecture, and the images that were shown to them."""
    root = tmp_path_factory.mktemp("saved")
    images = random_images(2, 32, 48)
    torch.save(images, root / "images.pt")
    for head, name in HEADS_AND_ARCHITECTURES:
        fields = {"layer_scale_init_value": 0.1, "qk_norm": True}
        if head is ViTCustomForImageClassification and name in ("vit", "swin"):
            fields |= {"pooling": "mean", "norm_after_pooling": True, "head_batch_norm": True}
        labels = dict(enumerate(["ant", "bee", "cat", "dog", "eel"]))
        model = tiny_model(head, name, id2label=labels, label2id={v: k for k, v in labels.items()}, **fields)
        with torch.no_grad():
            model.train()(images)  # a batch norm has seen something
        model.eval()
        folder = root / "folders" / f"{AUTO_CLASSES[head.__name__]}-{name}"
        model.save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        noise = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        Image.fromarray(noise.numpy()).save(folder / "picture.png")
        torch.manual_seed(7)
        with torch.no_grad():
            outputs = model(images)
        tensors = {key: value for key, value in outputs.items() if isinstance(value, torch.Tensor)}
        if "feature_maps" in outputs:
            tensors = {str(i): value for i, value in enumerate(outputs.feature_maps)}
        torch.save(tensors, folder / "expected.pt")
    return root


def test_a_folder_holds_its_code_and_nothing_else(saved):
    for folder in (saved / "folders").iterdir():
        assert {path.name for path in folder.glob("*.py")} == CODE_FILES
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map.keys() == {"AutoConfig", *AUTO_CLASSES.values()}
        assert not any("--" in value for value in auto_map.values())


def test_strangers_open_it_save_it_and_open_that(saved, tmp_path):
    count = len(HEADS_AND_ARCHITECTURES)
    first, second = tmp_path / "first", tmp_path / "second"
    out = run_fresh(
        STRANGER, saved / "folders", first, saved / "images.pt", folder=tmp_path / "stranger", isolated=True
    )
    assert f"opened {count}" in out
    for folder in first.iterdir():
        assert {path.name for path in folder.glob("*.py")} == CODE_FILES
        for name in CODE_FILES:
            assert (folder / name).read_text() == (saved / "folders" / folder.name / name).read_text()
        one, two = (json.loads((path / folder.name / "config.json").read_text()) for path in (saved / "folders", first))
        assert {**one, "_name_or_path": None} == {**two, "_name_or_path": None}
    out = run_fresh(STRANGER, first, second, saved / "images.pt", folder=tmp_path / "stranger2", isolated=True)
    assert f"opened {count}" in out
    assert {path.name for folder in second.iterdir() for path in folder.glob("*.py")} == CODE_FILES


def test_friends_need_no_trust(saved, tmp_path):
    out = run_fresh(FRIEND, saved / "folders", saved / "images.pt", folder=tmp_path / "friend", isolated=False)
    assert f"opened {len(HEADS_AND_ARCHITECTURES)}" in out


def test_what_friends_save_again_carries_its_code(saved, tmp_path):
    loaded = ViTCustomForImageClassification.from_pretrained(saved / "folders" / "AutoModelForImageClassification-swin")
    loaded.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE_FILES
    images = random_images()
    again = ViTCustomForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(main_output(again, images), main_output(loaded, images))


def test_a_config_alone_carries_its_own_code(saved, tmp_path):
    loaded = ViTCustomForImageClassification.from_pretrained(saved / "folders" / "AutoModelForImageClassification-vit")
    loaded.config.save_pretrained(tmp_path)
    assert "configuration_vit_custom.py" in {path.name for path in tmp_path.glob("*.py")}
