"""Pushing while a run goes on, and the whole way from training to somebody else's fine-tuning."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import WRITE_TOKEN, LoopbackHub
from PIL import Image
from safetensors.torch import load, load_file
from tiny_models import PixelImages, random_images, tiny_model
from transformers import ViTImageProcessor, set_seed

from model_cards.facts import TrainingRun
from modeling_vit_custom import ViTCustomForImageClassification
from trainers.arguments import TrainingArguments
from trainers.hub import RefusedError
from trainers.losses import Criterion
from trainers.mixing import Mixing
from trainers.vit_trainer import ViTTrainer


REPO = "someone/mine"


def make_trainer(folder, **options) -> ViTTrainer:
    defaults = {"per_device_train_batch_size": 16, "max_steps": 4, "learning_rate": 1e-3, "eval_strategy": "no"}
    defaults |= {"save_strategy": "steps", "save_steps": 2, "disable_tqdm": True, "report_to": "none", "use_cpu": True}
    defaults |= {"push_to_hub": True, "hub_model_id": REPO, "ema_decay": 0.5}
    set_seed(0)
    trainer = ViTTrainer(
        model=tiny_model(ViTCustomForImageClassification, "vit"),
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=PixelImages(random_images(32), torch.arange(32) % 5),
        processing_class=ViTImageProcessor(size={"height": 32, "width": 32}),
        mixing=Mixing(0, 0, 1.0, 0.5, 5),
        criterion=Criterion(),
        describe=lambda: TrainingRun(name="mine", step=trainer.state.global_step, max_steps=trainer.state.max_steps),
    )
    return trainer


def test_every_checkpoint_leaves_a_repository_that_opens(hub, tmp_path):
    trainer = make_trainer(tmp_path / "run", hub_private_repo=True)
    assert hub.repos["model", REPO].private
    trainer.train()
    commit = hub.repos["model", REPO].branches["main"]
    assert re.fullmatch(r"Training in progress, step [24]", commit.title)
    step = int(commit.title[-1])
    files = hub.files(REPO)
    assert f"These are the weights of step {step} of 4" in files["README.md"].decode()
    assert {"modeling_vit_custom.py", "preprocessor_config.json", "config.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name]
    # The averages, not the weights to go on from.
    pushed, averages = load(files["model.safetensors"]), trainer.ema.averages
    if step == 4:
        torch.testing.assert_close({name: pushed[name] for name in averages}, averages)


def test_what_the_hub_refuses_does_not_stop_a_run(hub, tmp_path, capsys):
    trainer = make_trainer(tmp_path / "run")
    hub.fail("POST .*/commit/", status=403, times=9)
    trainer.train()
    assert "Not on the Hub yet: your token has no right to write" in capsys.readouterr().out
    assert trainer.state.global_step == 4
    assert (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").exists()
    hub.faults.clear()
    assert hub.files(REPO) == {}


def test_only_the_end_is_pushed_if_that_is_asked_for(hub, tmp_path):
    trainer = make_trainer(tmp_path / "run", hub_strategy="end")
    trainer.train()
    assert hub.files(REPO) == {}
    trainer.save_model()
    with pytest.raises(ValueError, match=r"lacks README.md"):
        trainer.push_to_hub()


def test_a_run_that_may_not_push_does_not_start(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RefusedError, match="there is no token of the Hub: log in by `hf auth login`"):
        make_trainer(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_with_pickles_stay_here(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would publish pickled files"):
        TrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy)


# ------------------------------------------------------------------------------------------------------ the whole way


def run(command: list[str], hub: LoopbackHub, cwd: Path, caches: Path, **options) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {**hub.environment(), "HF_HOME": str(caches)}
    result = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert WRITE_TOKEN not in result.stdout
    return result


# Runs the card's snippets where this package cannot be imported.
SNIPPETS = """
import re, runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_vit_custom", "trainers", "model_cards"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Absent())
text = open("README.md", encoding="utf-8").read()
snippets = re.findall(r"```python\\n(.*?)```", text, flags=re.DOTALL)
assert len(snippets) == 3
for number, snippet in enumerate(snippets):
    with open(f"snippet_{number}.py", "w") as file:
        file.write(snippet)
    runpy.run_path(f"snippet_{number}.py", run_name="__main__")
print("all snippets ran")
"""


@pytest.mark.slow
def test_from_training_to_somebody_elses_fine_tuning(tmp_path):
    root, caches = Path(__file__).parents[1], tmp_path / "caches"
    train = [sys.executable, "-m", "trainers.finetune", "--recipe", "quickstart", "--output_dir", str(tmp_path / "run")]
    train += ["--push_to_hub", "true", "--hub_model_id", "someone/digits", "--license", "mit"]
    # Long enough that the first push is on its way before training ends.
    train += ["--num_train_epochs", "40", "--save_strategy", "epoch", "--disable_tqdm", "true"]
    with LoopbackHub() as hub:
        # Killed in the middle of a push: no clean-up, nothing said.
        slow = hub.fail("PUT", seconds=60.0)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {**hub.environment(), "HF_HOME": str(caches)}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(train, cwd=root, env=environment, stdout=log, stderr=log)
            deadline = time.monotonic() + 300
            while slow.times:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
        assert WRITE_TOKEN not in (tmp_path / "log").read_text()
        assert hub.files("someone/digits") == {}

        resumed = run([*train, "--resume_from_checkpoint", "true"], hub, root, caches)
        assert resumed.returncode == 0, resumed.stdout
        assert "On the Hub: " in resumed.stdout
        commits = [commit.title for commit in _history(hub, "someone/digits")]
        assert commits[0] == "End of training"
        assert any(title.startswith("Training in progress") for title in commits)
        for file in (tmp_path / "run").rglob("*"):
            assert not file.is_file() or WRITE_TOKEN.encode() not in file.read_bytes(), file

        publish = [sys.executable, "-m", "trainers.publish", str(tmp_path / "run"), "someone/digits", "--tag", "v1"]
        published = run(publish, hub, root, caches)
        assert published.returncode == 0, published.stdout
        tagged = hub.repos["model", "someone/digits"].tags["v1"]
        assert tagged.title == "End of training"  # nothing had changed

        # In an empty place: the card as it is on the Hub, run where this package is not.
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        (stranger / "README.md").write_bytes(hub.files("someone/digits")["README.md"])
        Image.new("L", (20, 30), 200).save(stranger / "image.jpg")
        for name in ("cat", "dog"):
            (stranger / "images" / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (20, 30), (40 * number, 0, 0)).save(stranger / "images" / name / f"{number}.png")
        ran = run([sys.executable, "-c", SNIPPETS], hub, stranger, tmp_path / "stranger_caches")
        assert "all snippets ran" in ran.stdout, ran.stdout

        pinned = f"""
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(
    "someone/digits", revision="{tagged.oid}", trust_remote_code=True)
print(model.num_parameters())
"""
        opened = run([sys.executable, "-c", pinned], hub, stranger, tmp_path / "pinned_caches")
        assert re.search(r"^\d+$", opened.stdout, re.MULTILINE), opened.stdout

        # Other classes, from that checkpoint, published beside it.
        for number, name in enumerate("ab"):
            (tmp_path / "letters" / name).mkdir(parents=True)
            for image in range(10):
                Image.new("L", (8, 8), 100 * number + image).save(tmp_path / "letters" / name / f"{image}.png")
        finetune = [sys.executable, "-m", "trainers.finetune", "--dataset", str(tmp_path / "letters")]
        finetune += ["--model", "someone/digits", "--output_dir", str(tmp_path / "letters_run"), "--max_steps", "2"]
        finetune += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--seed", "1"]
        finetune += ["--push_to_hub", "true", "--hub_model_id", "someone/letters"]
        finetuned = run(finetune, hub, root, caches)
        assert finetuned.returncode == 0, finetuned.stdout
        card = ModelCard(hub.files("someone/letters")["README.md"].decode())
        assert card.data.base_model == "someone/digits"
        assert card.data.base_model_relation == "finetune"
        assert "datasets" not in card.data.to_dict()
        assert str(tmp_path) not in str(card)
        weights = load_file(tmp_path / "letters_run" / "model.safetensors")
        torch.testing.assert_close(load(hub.files("someone/letters")["model.safetensors"]), weights, rtol=0, atol=0)


def _history(hub, repo_id):
    commit, commits = hub.repos["model", repo_id].branches["main"], []
    while commit is not None:
        commits.append(commit)
        commit = commit.parent
    return commits
