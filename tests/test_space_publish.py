"""The demo as a Space: what goes to the Hub, and whether that runs where there is nothing else."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml


pytest.importorskip("gradio")

from gradio_client import Client, handle_file
from huggingface_hub import HfApi
from loopback_hub import READ_TOKEN
from tiny_models import tiny_model
from transformers import ViTImageProcessor

from model_cards.facts import TrainingRun
from model_cards.rendering import write_card
from modeling_vit_custom import ViTCustomForImageClassification


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "spaces"))  # as the command has it

from publish import main as publish  # noqa: E402


SPACE, MODEL = "someone/demo", "someone/tiny"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "tiny"
    model = tiny_model(ViTCustomForImageClassification, "swin")
    model.config.id2label = dict(enumerate(["ant", "bee", "cat", "dog", "eel"]))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    write_card(folder, TrainingRun(name="tiny"))
    return folder


def space_files(hub):
    return hub.files(SPACE, repo_type="space")


def front_matter(files):
    return yaml.safe_load(files["README.md"].decode().split("---\n")[1])


def test_the_demo_goes_with_its_own_model(hub):
    publish([SPACE])
    files = space_files(hub)
    assert hub.repos["space", SPACE].sdk == "gradio"
    assert {"app.py", "classifier.py", "page.py", "uploads.py", "version.py"} <= files.keys()
    assert {"requirements.txt", "README.md", "space.json"} <= files.keys()
    assert {"cifar10_vit/model.safetensors", "modeling_vit_custom/interpretability/attention.py"} <= files.keys()
    assert not [name for name in files if "__pycache__" in name or name.startswith(("publish", "trainers", "tests"))]
    assert json.loads(files["space.json"])["model"] == "cifar10_vit"
    assert files["cifar10_vit/model.safetensors"] == (ROOT / "spaces/cifar10_vit/model.safetensors").read_bytes()
    assert front_matter(files)["app_file"] == "app.py"
    assert len([name for name in files if name.startswith("examples/")]) == 10


def test_what_is_not_part_of_it_any_more_leaves(hub, checkpoint):
    publish([SPACE])
    publish([SPACE, "--model", str(checkpoint)])
    files = space_files(hub)
    assert not [name for name in files if name.startswith("cifar10_vit/")]
    assert "tiny/model.safetensors" in files


def test_a_model_of_the_hub_is_named_at_its_revision(hub, checkpoint):
    HfApi().create_repo(MODEL)
    HfApi().upload_folder(repo_id=MODEL, folder_path=checkpoint)
    publish([SPACE, "--model", MODEL, "--private"])
    files = space_files(hub)
    assert json.loads(files["space.json"])["model"] == MODEL
    assert json.loads(files["space.json"])["revision"] == hub.repos["model", MODEL].branches["main"].oid
    assert front_matter(files)["models"] == [MODEL]
    assert hub.repos["space", SPACE].private
    assert not [name for name in files if name.endswith(".safetensors")]


def test_a_dry_run_asks_nobody(hub, capsys):
    publish([SPACE, "--dry_run"])
    assert "modeling_vit_custom/modeling_vit_custom.py" in capsys.readouterr().out
    assert not hub.requests


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a b/c"], "'a b/c' is no name of a repository"),
        ([SPACE, "--model", "nowhere/at-all"], "there is no repository 'nowhere/at-all'"),
        ([SPACE, "--model", "tests"], "holds no config.json"),
    ],
)
def test_mistakes_are_one_line(hub, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_info:
        publish(argv)
    assert exit_info.value.code == 2
    assert re.fullmatch(f"publish: error: .*{message}.*\n", capsys.readouterr().err)
    assert ("space", SPACE) not in hub.repos


def test_a_refusal_says_how_to_go_on(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(SystemExit, match=r"may only read: .* go on by `python spaces/publish.py"):
        publish([SPACE])


def wait_for(address, process):
    for _ in range(600):
        time.sleep(0.2)
        assert process.poll() is None, process.stderr.read()
        with socket.socket() as probe:
            if probe.connect_ex(address) == 0:
                return
    raise AssertionError("it did not start")


@pytest.mark.slow
@pytest.mark.parametrize("model", [None, MODEL])
def test_what_was_uploaded_runs_where_there_is_nothing_else(hub, checkpoint, tmp_path, model):
    HfApi().create_repo(MODEL)
    HfApi().upload_folder(repo_id=MODEL, folder_path=checkpoint)
    publish([SPACE, *(["--model", model] if model else [])])
    folder = tmp_path / "space"
    for name, content in space_files(hub).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    code = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('timm', 'trainers', 'model_cards'))  # nobody has these there\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "import modeling_vit_custom\n"
        f"assert modeling_vit_custom.__file__.startswith({str(folder)!r}), modeling_vit_custom.__file__\n"
        f"sys.argv = ['app.py', '--port', '{port}']\n"
        "runpy.run_path('app.py', run_name='__main__')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        wait_for(("127.0.0.1", port), process)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False)
        photograph = handle_file(folder / "examples" / "horse.png")
        answer = client.predict(photograph, 3, api_name="/classify")
        assert answer["label"] in ({"horse"} if model is None else {"ant", "bee", "cat", "dog", "eel"})
        assert client.predict(photograph, "Grad-CAM", "the most likely class", 1, 0, api_name="/explain")
    finally:
        process.terminate()
        process.communicate(timeout=60)
