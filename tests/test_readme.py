"""What the README says is run: its commands on small data, its snippets as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from benchmarks.foreign_files import official_swin_names
from PIL import Image
from test_finetune import SHORT, checkpoint  # noqa: F401  (a fixture)

from modeling_vit_custom.convert.__main__ import main as convert
from modeling_vit_custom.interpretability.__main__ import main as interpret
from trainers.arguments import list_recipes
from trainers.evaluate import main as evaluate
from trainers.finetune import main as finetune
from trainers.gallery import main as gallery
from trainers.predict import main as predict
from trainers.pretrain import main as pretrain
from trainers.scaling import main as scaling


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
SCRIPTS = {"finetune": finetune, "pretrain": pretrain, "gallery": gallery}
COMMANDS = re.findall(r"^\.venv/bin/python -m trainers\.(?!scaling)(\w+) (--recipe .*)$", README, re.MULTILINE)
EVALUATIONS = re.findall(r"^\.venv/bin/python -m trainers\.evaluate (.*)$", README, re.MULTILINE)
LAUNCHED = re.findall(
    r"^(?:PATH=\S+ )?((?:\.venv/bin/)?(?:torchrun|accelerate launch|sbatch) .*)$", README, re.MULTILINE
)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    """A working directory where the README's paths lead somewhere."""
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        (tmp_path / "path" / "to" / "images" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (20 + index, 12), colour).save(tmp_path / "path" / "to" / "images" / name / f"{index}.png")
    Image.new("L", (8, 8), 99).save(tmp_path / "path" / "to" / "digit.png")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_every_script_are_shown():
    assert {script for script, _ in COMMANDS} == SCRIPTS.keys()


@pytest.mark.parametrize(("script", "line"), COMMANDS, ids=[script for script, _ in COMMANDS])
def test_commands_run(script, line, place, hub):
    argv = shlex.split(line)
    if "--push_to_hub" in argv:
        argv = [argument.replace("user/", "someone/") for argument in argv]
    small = {"user/name": "runs/digits", "vit_small_patch16_224": "vit_nano_patch2_8"}
    argv = [small.get(argument, argument) for argument in argv]
    if "--model" not in argv:
        argv += ["--model", "vit_nano_patch2_8"]
    SCRIPTS[script]([*argv, *(["--bf16", "false", *SHORT] if script != "gallery" else [])])
    made = {"finetune": "runs/mine/README.md", "pretrain": "runs/mae/README.md", "gallery": "gallery.png"}
    if "--push_to_hub" in argv:
        assert "model.safetensors" in hub.files("someone/digits")
    else:
        assert (place / made[script]).is_file()


@pytest.mark.parametrize("line", EVALUATIONS, ids=["digits", "corruptions"])
def test_evaluations_run(line, place):
    line = line.replace("user/name", "runs/digits").replace("path/to/images", "digits")
    evaluate([*line.split(), "--num_workers", "0", "--max_images", "20"])
    folder = "runs/robustness" if "robustness" in line else "runs/evaluate"
    assert (place / folder / "report.md").is_file()


def test_grids_are_planned(place, capsys):
    own, recipe = re.findall(r"^\.venv/bin/python -m trainers\.scaling (.*)$", README, re.MULTILINE)
    small = [
        "--fractions",
        "1",
        "--max_minutes",
        "1e6",
        "--per_device_train_batch_size",
        "8",
        "--disable_tqdm",
        "true",
        "--dry_run",
    ]
    scaling([*own.split(), *small])
    assert "vit_small_patch16_224 x 1: " in capsys.readouterr().out
    scaling([*recipe.split(), "--dataset", "path/to/images", "--validation_fraction", "0.2", *small])
    assert "12 of 12 runs" in capsys.readouterr().out


def test_predictions_are_made(place):
    (line,) = re.findall(r"^\.venv/bin/python -m trainers\.predict (.*)$", README, re.MULTILINE)
    predict(line.split())
    assert len((place / "predictions.jsonl").read_text().splitlines()) == 20


def test_checkpoints_of_other_libraries_are_converted(place):
    lines = re.findall(r"^\.venv/bin/python -m modeling_vit_custom.convert (.*)$", README, re.MULTILINE)
    source, from_hub, back = (shlex.split(line) for line in lines)
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    torch.save({"model": {official_swin_names(name): tensor for name, tensor in swin.state_dict().items()}}, source[0])
    timm.models.save_for_hf(timm.create_model("deit3_small_patch16_224"), from_hub[0])
    for argv in (source, from_hub, back):
        convert(argv)
        assert (place / argv[1] / "config.json").is_file()


def test_launchers_find_their_configurations_and_scripts():
    assert {line.split()[0].rpartition("/")[2] for line in LAUNCHED} == {"torchrun", "accelerate", "sbatch"}
    for line in LAUNCHED:
        files = [word for word in line.split() if word.startswith("trainers/")]
        assert all((Path(__file__).parents[1] / file).is_file() for file in files)
        script, recipe = re.search(r"-m trainers\.(\w+) --recipe (\w+)", line).groups()
        assert script in SCRIPTS
        assert recipe in list_recipes()


def test_the_command_for_what_a_model_learnt_runs(place):
    (line,) = re.findall(r"^\.venv/bin/python -m modeling_vit_custom.interpretability (.*)$", README, re.MULTILINE)
    interpret(shlex.split(line))
    assert (place / "figures" / "maps.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet, place):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "snippet"})


def test_every_recipe_is_in_the_table():
    table = "".join(line for line in README.splitlines(keepends=True) if line.startswith("| `"))
    assert sorted(re.findall(r"`(\w+)`", table)) == list_recipes()


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        name, _, place = link.partition("#")
        file = Path(__file__).parents[1] / (name or "README.md")
        assert file.exists(), link
        if place:
            text = file.read_text(encoding="utf-8")
            titles = re.findall("^#+ (.*)$", text, re.MULTILINE)
            headings = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]  # as GitHub does
            assert place in headings or f'<a id="{place}">' in text, link
