"""The command that measures a classifier: what it writes, that its figures are right, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from test_finetune import SHORT, error_of
from tiny_models import tiny_config, tiny_model
from transformers import TimmWrapperConfig, ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

from model_cards.evaluation import FILES, MISTAKES, ROBUSTNESS, SIZES
from modeling_vit_custom import ViTCustomForImageClassification
from trainers.corruptions import CORRUPTIONS
from trainers.evaluate import list_corruptions
from trainers.evaluate import main as evaluate
from trainers.evaluation import make_views, show
from trainers.finetune import main as finetune
from trainers.inference import Classifier, match_classes
from trainers.metrics import METRICS


CLASSES = ["circle", "cross", "dot", "line", "ring", "square"]
QUICK = ["--bootstrap", "100", "--num_workers", "0", "--use_cpu"]


def draw(label: int, number: int) -> Image.Image:
    """An image of about its class's colour, with some noise."""
    generator = np.random.default_rng([label, number])
    colour = np.array([30 * label, 190 - 30 * label, 40 * (label % 3)]) + generator.integers(-30, 30, 3)
    noise = generator.integers(0, 60, (20, 24, 3))
    return Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Ten images of each of six classes to train on and five to test on."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    for split, count in {"train": 10, "test": 5}.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                draw(label, 100 * count + number).save(folder / split / name / f"{number}.png")
    return folder


def save_model(model, folder: Path, names: list[str], size: int = 32) -> str:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory, images) -> str:
    """One that has learnt some of it, so that its figures are neither 0 nor 1."""
    torch.manual_seed(0)
    model = ViTCustomForImageClassification(tiny_config("vit", num_labels=6))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(model, folder, CLASSES)
    split = load_dataset("imagefolder", data_dir=str(images), split="train")
    pixels = Classifier(str(folder), device=torch.device("cpu")).prepare([row["image"] for row in split])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(pixels, labels=torch.tensor(split["label"][:])).loss.backward()
        optimizer.step()
    return save_model(model.eval(), folder, CLASSES)


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    monkeypatch.setattr("model_cards.pages.FIGURE_DPI", 40)


def run(tmp_path, *argv, quick: list[str] = QUICK) -> dict:
    folder = tmp_path / f"evaluation_{len(list(tmp_path.iterdir()))}"
    evaluate([*map(str, argv), "--output_dir", str(folder), *quick])
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def confusion_matrix(facts: dict) -> list[list[int]]:
    matrix = np.zeros((len(facts["label_names"]),) * 2, dtype=int)
    for true, predicted, images in facts["confusions"]:
        matrix[true, predicted] = images
    return matrix.tolist()


def values(results: dict) -> dict[str, float]:
    return {name: figure["value"] for name, figure in results.items()}


# ----------------------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_the_metrics(model, images, tmp_path):
    facts = run(tmp_path, model, images)
    classifier = Classifier(model, device=torch.device("cpu"))
    split = load_dataset("imagefolder", data_dir=str(images), split="test")
    logits = classifier(classifier.prepare([row["image"] for row in split])).numpy()
    labels = np.array(split["label"][:])
    assert values(facts["results"]) == pytest.approx(
        {each: METRICS[each](logits, labels) for each in facts["results"]}, rel=1e-4
    )
    assert confusion_matrix(facts) == METRICS["confusion_matrix"](logits, labels).tolist()
    np.testing.assert_allclose(
        [row["recall"]["value"] for row in facts["classes"]], METRICS["per_class_recall"](logits, labels)
    )
    assert [row["images"] for row in facts["classes"]] == [5] * 6


def test_figures_are_those_of_training(images, tmp_path):
    """Of the split that was held out of train, with the same fraction and seed."""
    argv = ["--dataset", str(images / "train"), "--model", "vit_nano_patch4_32", "--output_dir", str(tmp_path / "run")]
    finetune([*argv, *SHORT, "--validation_fraction", "0.3", "--split_seed", "5", "--eval_strategy", "no"])
    reported = json.loads((tmp_path / "run" / "run.json").read_text())
    facts = run(tmp_path, tmp_path / "run", images / "train", "--validation_fraction", "0.3", "--split-seed", "5")
    assert facts["is_held_out"]
    assert facts["split"] == reported["evaluation_split"] == "validation"
    assert facts["num_images"] == 18
    assert values(facts["results"]) == pytest.approx(reported["results"], abs=2e-6)
    assert confusion_matrix(facts) == reported["confusion_matrix"]
    other = run(tmp_path, tmp_path / "run", images / "train", "--validation_fraction", "0.3", "--split_seed", "6")
    assert other["results"]["loss"] != facts["results"]["loss"]


def test_the_order_of_classes_does_not_matter(model, images, tmp_path):
    order = [3, 1, 5, 0, 4, 2]
    permuted = ViTCustomForImageClassification.from_pretrained(model)
    head = permuted.head.classifier
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    other = save_model(permuted, tmp_path / "permuted", [CLASSES[index] for index in order])
    facts, facts_of_other = run(tmp_path, model, images), run(tmp_path, other, images)
    for name, figure in facts["results"].items():
        assert figure == pytest.approx(facts_of_other["results"][name], rel=1e-6), name
    by_name = {row["name"]: row for row in facts_of_other["classes"]}
    assert all(by_name[row["name"]] == row for row in facts["classes"])
    assert 0.3 < facts["results"]["accuracy"]["value"] < 0.97
    by_index = run(tmp_path, other, images, "--labels_by_index")
    assert by_index["results"]["loss"] != facts["results"]["loss"]


def test_a_folder_of_nothing_but_a_test_split_will_do(model, images, tmp_path):
    few = tmp_path / "few"
    shutil.copytree(images / "test", few / "test")
    facts, of_all = run(tmp_path, model, few), run(tmp_path, model, images)
    assert facts["split"] == "test"
    assert facts["results"] == of_all["results"]


def test_a_part_of_the_classes_will_do(model, images, tmp_path, capsys):
    few = tmp_path / "few"
    for name in ("ring", "dot"):
        (few / name).mkdir(parents=True)
        for number in range(6):
            draw(CLASSES.index(name), number).save(few / name / f"{number}.png")
    facts = run(tmp_path, model, few, "--split", "all")
    assert facts["num_images"] == 12
    assert facts["absent_classes"] == ["circle", "cross", "line", "square"]
    assert np.sum(confusion_matrix(facts)) == 12
    assert facts["classes"][0]["recall"]["value"] is None
    assert (
        "4 of which the data set does not have" in (sorted(tmp_path.glob("evaluation_*"))[0] / "report.md").read_text()
    )
    assert "no label" not in capsys.readouterr().err


def test_mirror_images_are_averaged_as_probabilities(images, tmp_path):
    # Of large random weights, which make much of what is left and right.
    scrambled = tiny_model(ViTCustomForImageClassification, "vit", num_labels=6)
    model = save_model(scrambled, tmp_path / "scrambled", CLASSES)
    facts = run(tmp_path, model, images, "--flips")
    classifier = Classifier(model, device=torch.device("cpu"))
    split = load_dataset("imagefolder", data_dir=str(images), split="test")
    pixels = classifier.prepare([row["image"] for row in split])
    assert (classifier(pixels).softmax(-1) - classifier(pixels.flip(3)).softmax(-1)).abs().max() > 0.05
    both = (classifier(pixels).softmax(-1) + classifier(pixels.flip(3)).softmax(-1)) / 2
    labels = torch.tensor(split["label"][:])
    plain, mirrored = facts["variants"]
    assert [plain["flips"], mirrored["flips"]] == [False, True]
    assert plain["results"] == facts["results"]
    assert mirrored["results"]["accuracy"]["value"] == (both.argmax(-1) == labels).double().mean()
    expected = -both.double()[range(len(labels)), labels].log().mean().item()
    assert mirrored["results"]["loss"]["value"] == pytest.approx(expected, rel=1e-5)


def test_other_sizes(model, images, tmp_path, capsys):
    facts = run(tmp_path, model, images, "--image_sizes", "48", "32", "24", "--flips")
    sizes = [(row["image_size"], row["flips"]) for row in facts["variants"]]
    assert sizes == [([side, side], flips) for side in (24, 32, 48) for flips in (False, True)]
    assert facts["image_size"] == [32, 32]
    assert facts["variants"][2]["results"] == facts["results"]
    alone = run(tmp_path, model, images, "--image_size", "48")
    assert alone["results"] == facts["variants"][4]["results"]
    assert "Accuracy at 24 x 24, mirrored too" in capsys.readouterr().out


def test_a_draw_of_images(model, images, tmp_path):
    facts, again = (run(tmp_path, model, images, "--max_images", "12") for _ in range(2))
    other = run(tmp_path, model, images, "--max_images", "12", "--seed", "1")
    assert facts["num_images"] == 12
    assert facts["drawn_from"] == 30
    assert facts["results"] == again["results"]
    assert [row["images"] for row in facts["classes"]] != [row["images"] for row in other["classes"]]


def test_splits(model, images, tmp_path):
    counts = {
        split: run(tmp_path, model, images, "--split", split)["num_images"]
        for split in ("train", "validation", "test", "all")
    }
    assert counts == {"train": 48, "validation": 12, "test": 30, "all": 90}
    whole = run(tmp_path, model, images, "--split", "train", "--validation_fraction", "0")
    assert whole["num_images"] == 60


@pytest.fixture
def parquet(images, tmp_path) -> Path:
    """The test images alone, as a data set with a split `test` and none to train on."""
    split = load_dataset("imagefolder", data_dir=str(images), split="test")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    (tmp_path / "parquet").mkdir()
    split.cast(features).to_parquet(tmp_path / "parquet" / "test.parquet")
    return tmp_path / "parquet"


def test_streams_and_test_sets_alone(model, images, parquet, tmp_path):
    facts = run(tmp_path, model, images)
    of_parquet = run(tmp_path, model, parquet)
    assert of_parquet["split"] == "test"
    assert not of_parquet["is_held_out"]
    streamed = run(tmp_path, model, parquet, "--streaming")
    assert facts["results"] == of_parquet["results"] == streamed["results"]
    few = run(tmp_path, model, parquet, "--streaming", "--max_images", "7")
    assert few["num_images"] == 7
    assert few["drawn_from"] is None


# -------------------------------------------------------------------------------------------------------- robustness


def test_robustness_is_accuracy_on_corrupted_images(model, images, tmp_path):
    facts = run(tmp_path, model, images, "--corruptions", "contrast", "noise", "--severities", "5", "1")
    robustness = facts["robustness"]
    assert robustness["severities"] == [1, 5]
    assert [row["name"] for row in robustness["corruptions"]] == [
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "contrast",
    ]
    classifier = Classifier(model, device=torch.device("cpu"))
    split = load_dataset("imagefolder", data_dir=str(images), split="test")
    views = [(row["name"], severity) for row in robustness["corruptions"] for severity in (1, 5)]
    pixels = make_views([row["image"] for row in split], classifier.processor, views, seed=0)
    assert pixels.shape == (30, 8, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    labels = torch.tensor(split["label"][:])
    right = torch.stack(
        [classifier((pixels[:, view] / 255 - 0.5) / 0.5).argmax(-1) == labels for view in range(8)], dim=1
    )
    found = [each["value"] for row in robustness["corruptions"] for each in row["accuracy"]]
    np.testing.assert_allclose(found, right.double().mean(0))
    error = 1 - right.double().mean().item()
    assert robustness["mean_corruption_error"]["value"] == pytest.approx(error)
    clean = 1 - facts["results"]["accuracy"]["value"]
    assert robustness["clean_error"]["value"] == pytest.approx(clean)
    assert robustness["added_error"]["value"] == pytest.approx(error - clean)
    assert robustness["added_error"]["low"] <= error - clean <= robustness["added_error"]["high"]
    np.testing.assert_allclose(
        [each["value"] for each in robustness["accuracy_by_severity"]], right.double().view(30, 4, 2).mean((0, 1))
    )


@pytest.mark.parametrize("batch_size", [64, 3])
def test_workers_and_batches_change_nothing(batch_size, model, images, tmp_path):
    argv = [model, images, "--corruptions", "all", "--severities", "4", "--max_images", "8"]
    facts = run(tmp_path, *argv)
    quick = ["--bootstrap", "100", "--use_cpu", "--num_workers", "2", "--batch_size", str(batch_size)]
    other = run(tmp_path, *argv, quick=quick)
    assert facts["robustness"] == other["robustness"]
    assert values(facts["results"]) == pytest.approx(values(other["results"]), rel=1e-5)


def test_a_killed_reader_is_one_line(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.evaluation.corrupt", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    folder = tmp_path / "evaluation"
    argv = ["--corruptions", "fog", "--severities", "1", "--use_cpu", "--bootstrap", "100", "--num_workers", "1"]
    with pytest.raises(SystemExit, match=r"^evaluate: error: a process that reads images was killed.*nothing was"):
        evaluate([model, str(images), "--output_dir", str(folder), *argv])
    assert not folder.exists()


def test_a_model_sees_corrupted_images_as_others(model):
    """What is shown is what is normalised: without corruption nothing would change."""
    classifier, image = Classifier(model, device=torch.device("cpu")), draw(2, 0)
    (pixels,) = show(classifier.processor, [image])
    again = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(again[None], classifier.prepare([image]))


# ------------------------------------------------------------------------------------------------------ other models


def tiny_vit(image_size: int = 32) -> ViTForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=image_size, patch_size=8, num_labels=6, **sizes))


def save_timm(folder: Path, architecture: str, size: int = 32) -> str:
    data = {"input_size": [3, size, size], "mean": [0.4] * 3, "std": [0.2] * 3, "interpolation": "bicubic"}
    config = TimmWrapperConfig(architecture=architecture, label_names=CLASSES, pretrained_cfg={**data, "crop_pct": 1.0})
    config.num_labels = 6
    TimmWrapperForImageClassification(config).eval().save_pretrained(folder)
    return str(folder)


def test_a_vit_of_transformers_at_several_sizes(images, tmp_path):
    other = save_model(tiny_vit(), tmp_path / "vit", CLASSES)
    facts = run(tmp_path, other, images, "--image_sizes", "16", "40", "--corruptions", "fog", "--severities", "1")
    assert facts["model_type"] == "vit"
    assert [row["image_size"] for row in facts["variants"]] == [[16, 16], [32, 32], [40, 40]]
    assert len(facts["robustness"]["corruptions"]) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_timm_model(images, tmp_path):
    other = save_timm(tmp_path / "timm", "resnet10t")
    facts = run(tmp_path, other, images, "--image_sizes", "48", "--flips", "--corruptions", "fog", "--severities", "1")
    assert facts["model_type"] == "timm_wrapper"
    assert [row["image_size"] for row in facts["variants"]] == [[32, 32], [32, 32], [48, 48], [48, 48]]


# ------------------------------------------------------------------------------------------------------------- files


def test_what_is_written(model, images, tmp_path, capsys):
    argv = [model, str(images), "--corruptions", "fog", "snow", "--severities", "1", "--image_sizes", "24"]
    folder = tmp_path / "out"
    evaluate([*argv, "--output_dir", str(folder), *QUICK])
    assert {path.name for path in folder.iterdir()} == set(FILES)
    output = capsys.readouterr().out
    assert re.search(r"Accuracy +\d+\.\d\d% \(\d+\.\d\d% to \d+\.\d\d%\)", output)
    page, facts = (folder / "report.md").read_text(), (folder / "evaluation.json").read_text()
    shown = re.findall(r"\]\((\w+\.png)\)", page)
    assert sorted(shown) == sorted(name for name in FILES if name.endswith(".png"))
    for text in (page, facts):
        assert str(tmp_path) not in text
        assert str(images.parent) not in text
    assert json.loads(facts)["command"].startswith("python -m trainers.evaluate tiny shapes --corruptions fog snow")
    assert json.loads(facts)["dataset"] == "shapes"
    for name in shown:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 80

    # A second time only if that is said, and then nothing of the first is left.
    (folder / "mine.txt").write_text("keep me")
    assert "already holds an evaluation: pass --overwrite" in error_of(
        capsys, [*argv, "--output_dir", str(folder), *QUICK], evaluate
    )
    evaluate([model, str(images), "--output_dir", str(folder), "--overwrite", *QUICK])
    left = {path.name for path in folder.iterdir()}
    assert "mine.txt" in left
    assert not left & {ROBUSTNESS, SIZES}


def test_many_classes_and_none_wrong(images, tmp_path):
    """The best and the worst of many are listed, and without a mistake there is no picture of one."""
    names = [f"class {index:02}" for index in range(30)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    pictures = [Image.new("RGB", (16, 16), (8 * index, 0, 0)) for index in range(30)] * 2
    Dataset.from_dict({"image": pictures, "label": list(range(30)) * 2}, features=features).to_parquet(
        tmp_path / "many" / "test.parquet"
    )
    other = save_model(tiny_model(ViTCustomForImageClassification, "vit", num_labels=30), tmp_path / "model", names)
    folder = tmp_path / "out"
    evaluate([other, str(tmp_path / "many"), "--output_dir", str(folder), *QUICK])
    page = (folder / "report.md").read_text()
    assert "The 10 that are recognised worst of 30" in page
    # A model of one answer, on images of that class alone.
    sure = tiny_model(ViTCustomForImageClassification, "vit", num_labels=6)
    sure.head.classifier.weight.data.zero_()
    sure.head.classifier.bias.data = torch.tensor([0.0, 9, 0, 0, 0, 0])
    right = save_model(sure, tmp_path / "right", CLASSES)
    for number in range(4):
        (tmp_path / "one" / "cross").mkdir(parents=True, exist_ok=True)
        draw(1, number).save(tmp_path / "one" / "cross" / f"{number}.png")
    evaluate([right, str(tmp_path / "one"), "--split", "all", "--output_dir", str(tmp_path / "all_right"), *QUICK])
    assert "No image was misclassified." in (tmp_path / "all_right" / "report.md").read_text()
    assert not (tmp_path / "all_right" / MISTAKES).exists()


def test_nothing_half_written_is_left_by_what_fails(model, images, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainers.evaluate.measure_robustness", fail)
    argv = [model, str(images), "--corruptions", "fog", "--output_dir", str(tmp_path / "out"), *QUICK]
    with pytest.raises(SystemExit) as status:
        evaluate(argv)
    assert status.value.code == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_terminal_stays_quiet(model, images, tmp_path):
    argv = [model, str(images), "--output_dir", str(tmp_path / "out"), "--flips", *QUICK]
    command = [sys.executable, "-m", "trainers.evaluate", *argv]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert not [line for line in re.split(r"[\r\n]", ended.stderr) if line.strip() and "image" not in line]


# ------------------------------------------------------------------------------------------------------------ errors


def test_corruptions_by_kind():
    assert list_corruptions([]) == []
    assert list_corruptions(["all"]) == list(CORRUPTIONS)
    assert list_corruptions(["fog", "noise"]) == ["gaussian_noise", "shot_noise", "impulse_noise", "fog"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--corruptions", "gausian_noise"], "no corruption 'gausian_noise'; did you mean 'gaussian_noise'?"),
        (["--corruptions", "rain"], "no corruption 'rain': give all, or some of gaussian_noise"),
        (["--corruptions", "fog", "--severities", "0", "2"], "--severities 0 must lie between 1 and 5"),
        (["--severities", "2"], "--severities 2 is of --corruptions"),
        (["--split", "dev"], "has no split 'dev': give one of train, validation, test, all"),
        (["--split", "validation", "--validation_fraction", "0"], "--validation_fraction 0 holds nothing out of"),
        (["--max_images", "0"], "0 must be at least 1"),
        (["--bootstrap", "many"], "'many' is no whole number"),
        (["--label_column", "kind"], "--label_column 'kind' is no column"),
        (["--streaming"], "--streaming true is for parquet files"),
        (["--validation_fraction", "2"], "validation_fraction=2.0 must lie between 0 and 1"),
        (["--sizes", "3"], "unrecognized arguments: --sizes 3 (see --help)"),
        (["--revision", "nowhere", "--dataset_config", "x"], "--dataset_config 'x' is for data sets on the Hub"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(argv, message, model, images, tmp_path, capsys):
    argv = [model, str(images), "--output_dir", str(tmp_path / "out"), *QUICK, *argv]
    assert message in error_of(capsys, argv, evaluate)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(model, images, tmp_path, capsys):
    def error(*argv) -> str:
        return error_of(capsys, [*map(str, argv), "--output_dir", str(tmp_path / "out"), *QUICK], evaluate)

    assert "there is no classifier 'runs/none'" in error("runs/none", images)
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in error(tmp_path / "empty", images)
    headless = tiny_vit().vit
    headless.save_pretrained(tmp_path / "headless")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "headless")
    assert "has no weights for classifier" in error(tmp_path / "headless", images)
    strange = save_model(tiny_vit(), tmp_path / "strange", ["cat", *CLASSES[1:]])
    message = error(strange, images)
    assert "such as 'circle'; if they are the same in the same order, pass --labels_by_index" in message
    few = save_model(tiny_model(ViTCustomForImageClassification, "vit"), tmp_path / "few", CLASSES[:5])
    assert "does not know 1 of the data set's 6 classes, such as 'square'" in error(few, images)
    assert "has 5 classes, not the data set's 6" in error(few, images, "--labels_by_index")
    broken = tiny_vit()
    broken.classifier.bias.data[0] = torch.nan
    diverged = save_model(broken, tmp_path / "diverged", CLASSES)
    assert "gives logits that are no numbers" in error(diverged, images)
    stubborn = save_timm(tmp_path / "stubborn", "vit_tiny_patch16_224", size=224)
    assert "cannot work on images of 32 x 32 pixels" in error(stubborn, images, "--image_sizes", "32")
    assert "cannot work on images of 4 x 4 pixels" in error(model, images, "--image_size", "4")


def test_data_that_do_not_fit(model, images, tmp_path, capsys):
    def error(*argv) -> str:
        return error_of(capsys, [model, *map(str, argv), "--output_dir", str(tmp_path / "out"), *QUICK], evaluate)

    assert "there is no folder 'runs/no/images'" in error("runs/no/images")
    (tmp_path / "loose").mkdir()
    draw(0, 0).save(tmp_path / "loose" / "0.png")
    assert "holds no images in class folders" in error(tmp_path / "loose")
    unlabelled = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    pictures = [draw(0, number) for number in range(3)]
    hidden = Dataset.from_dict({"image": pictures, "label": [-1, 0, -1]}, features=unlabelled)
    hidden.to_parquet(tmp_path / "hidden" / "test.parquet")
    assert "2 of 3 images of split 'test'" in error(tmp_path / "hidden")
    numbers = Dataset.from_dict({"image": pictures, "label": [0, 1, 1]}, features=unlabelled).data.table
    odd = numbers.set_column(1, "label", [pa.array([0, 7, 1])])  # as no writer of ours would
    (tmp_path / "odd").mkdir()
    pq.write_table(odd.cast(numbers.schema), tmp_path / "odd" / "test.parquet")
    assert f"has label 7, outside 0..{len(CLASSES) - 1} (1 of 3 images)" in error(tmp_path / "odd")
    plain = Dataset.from_dict({"image": pictures}, features=Features({"image": ImageFeature()}))
    plain.to_parquet(tmp_path / "plain" / "test.parquet")
    assert "the data set has no label columns among image" in error(tmp_path / "plain")
    (tmp_path / "broken" / "dot").mkdir(parents=True)
    (tmp_path / "broken" / "dot" / "0.png").write_bytes(b"no image")
    draw(2, 1).save(tmp_path / "broken" / "dot" / "1.png")
    assert "cannot be decoded" in error(tmp_path / "broken", "--split", "all")
    (tmp_path / "broken" / "dot" / "1.png").write_bytes(b"no image")
    assert "holds no images" in error(tmp_path / "broken", "--split", "all", "--on_corrupt", "skip")
    draw(2, 1).save(tmp_path / "broken" / "dot" / "1.png")
    facts = run(tmp_path, model, tmp_path / "broken", "--split", "all", "--on_corrupt", "skip")
    assert facts["num_images"] == facts["drawn_from"] == 1


def test_folders_that_are_not_ours_are_left_alone(model, images, tmp_path, capsys):
    def error(folder: Path) -> str:
        return error_of(capsys, [model, str(images), "--overwrite", "--output_dir", str(folder), *QUICK], evaluate)

    assert "holds a model" in error(Path(model))
    (tmp_path / "report.md").write_text("of something else")
    assert "holds a 'report.md' of something else" in error(tmp_path)
    assert "is a file: give a folder" in error(tmp_path / "report.md")


def test_classes_are_matched_by_name():
    assert match_classes(["a", "b", "c"], ["c", "a"]) == [2, 0]
    assert match_classes(["x", "y"], ["a", "b"], by_index=True) == [0, 1]
    with pytest.raises(ValueError, match=r"model does not know 1 of the data set's 1 classes, such as 'd'$"):
        match_classes(["a", "b", "c"], ["d"], flag="--flag")
    # A bird and a machine of ImageNet share their name.
    with pytest.raises(ValueError, match=r"has 2 classes called 'crane', which cannot be told apart; if .* --flag$"):
        match_classes(["crane", "owl", "crane"], ["owl", "crane", "crane"], flag="--flag")
