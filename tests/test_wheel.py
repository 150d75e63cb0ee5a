"""The built wheel, installed away from the checkout, does what the checkout does."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = {"model_cards", "modeling_vit_custom", "trainers"}
SHORT = ["--max_steps", "2", "--disable_tqdm", "true", "--probe_images", "50"]
SMALL = ["--dataset", "digits", "--model", "vit_nano_patch2_8", "--per_device_train_batch_size", "8"]
COMMANDS = {
    "3 held-out images through pipeline": ["-m", "trainers.finetune", "--recipe", "quickstart", *SHORT[:4]],
    "fine-tune it": ["-m", "trainers.pretrain", "--recipe", "cifar10_mae", *SMALL, *SHORT],
    "gallery.png: 6 images": ["-m", "trainers.gallery", "--recipe", "quickstart"],
    "{'macro_f1': 1.0}": [
        "-c",
        "from trainers.metrics import load_metric; "
        "print(load_metric('macro_f1').compute(predictions=[[1, 0], [0, 1]], references=[0, 1]))",
    ],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # Without isolation, because a build environment of its own would be fetched from the network.
    # From a copy, because what an earlier build left in the checkout would be packed as well.
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_it_holds_the_packages_and_their_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert packages == PACKAGES
    recipes = {f"trainers/recipes/{path.name}" for path in (ROOT / "trainers" / "recipes").glob("*.yaml")}
    assert len(recipes) > 20
    assert {"model_cards/template.md", *recipes} <= set(names)
    assert not [name for name in names if "test" in name or "__pycache__" in name]


@pytest.mark.slow
def test_it_trains_in_an_environment_that_has_no_checkout(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    # The dependencies of this environment, but not its own link to the checkout: that works in site folders only.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = subprocess.run(
        [python, "-c", "import trainers; print(trainers.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert where.stdout.strip() == str(site_packages / "trainers" / "__init__.py"), where.stderr
    for expected, command in COMMANDS.items():
        ended = subprocess.run(
            [python, *command], cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stderr
        assert expected in ended.stdout
    assert (tmp_path / "runs" / "digits" / "modeling_vit_custom.py").is_file()
    assert (tmp_path / "runs" / "cifar10_mae" / "reconstructions.png").is_file()
