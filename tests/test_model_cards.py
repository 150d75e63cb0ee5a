"""Model cards: what is known is in them, what is not known is not, and no name can break them."""

import functools
import html
import itertools
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from matplotlib import pyplot
from matplotlib.colors import to_hex
from PIL import Image
from scipy.stats import binomtest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from model_cards.card import main as rebuild
from model_cards.citations import PAPERS
from model_cards.facts import FEATURES, TrainingRun, read_run
from model_cards.figures import (
    collect_curves,
    plot_calibration,
    plot_confusion_matrix,
    plot_predictions,
    plot_training_curves,
)
from model_cards.metadata import LICENSES, build_metadata, find_card_errors, split_card
from model_cards.rendering import (
    ATTENTION,
    FIGURES,
    FILTERS,
    POSITIONS,
    PREDICTIONS,
    confidence_interval,
    escape_markdown,
    find_parts,
    find_worst_classes,
    merge_cards,
    render_card,
    write_card,
)
from modeling_vit_custom.interpretability.figures import plot_filters, plot_maps, plot_position_similarity


NASTY_NAMES = [
    "a|b",
    "<b>bold</b> & <img src=x>",
    'it\'s "quoted": `code` *star* _under_ ~~gone~~ [link](x) \\',
    "two\n---\nlines | - key: value",
    "$x$ é {{ 7 * 7 }}",
]
LOG_HISTORY = [
    {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.5, "step": 1},
    {"loss": 1.5, "grad_norm": 1.0, "learning_rate": 5e-4, "epoch": 1.0, "step": 2},
    {"eval_loss": 1.6, "eval_accuracy": 0.4, "eval_runtime": 0.1, "epoch": 1.0, "step": 2},
    {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.0, "epoch": 2.0, "step": 4},
    {"eval_loss": 1.7, "eval_accuracy": 0.3, "eval_runtime": 0.1, "epoch": 2.0, "step": 4},
    {"train_runtime": 3.0, "train_loss": 1.5, "epoch": 2.0, "step": 4},
    # The best weights were loaded back and evaluated once more.
    {"eval_loss": 1.6, "eval_accuracy": 0.4, "eval_runtime": 0.1, "epoch": 2.0, "step": 4},
]
FULL_RUN = TrainingRun(
    name="deit-tiny-flowers",
    architecture="deit",
    preset="deit_tiny",
    num_parameters=5_524_416,
    flops=2_510_000_000,
    stages=[{"Stage": 1, "Attention": "global | all"}],
    image_size=224,
    preprocessing="Images are scaled to 0..1.",
    label_names=["daisy", "rose", "tulip"],
    base_model="facebook/deit-tiny-patch16-224",
    dataset="someone/flowers",
    split_sizes={"train": 1200, "test": 30},
    train_counts=[800, 320, 80],
    evaluation_split="test",
    results={"accuracy": 0.8, "top5_accuracy": 1.0, "loss": 0.51234},
    confusion_matrix=np.array([[10, 0, 0], [1, 8, 1], [4, 0, 6]]),
    calibration=[(10, 0.5, 0.4), (20, 0.9, 1.0)],
    attention_distances=[[20.5, 60.0], [80.0, 90.0]],
    even_attention_distances=[110.0, 110.0],
    map_scores={"Grad-CAM": [0.6, 0.2]},
    log_history=LOG_HISTORY,
    command="python -m trainers.finetune \\\n  --recipe flowers",
    seed=0,
    versions={"torch": "2.8.0", "transformers": "5.17.0"},
    hardware="1 x NVIDIA A100",
    wall_time=3723.4,
    images_per_second=812.4,
    peak_memory=3 * 2**30,
    commit="0123456789ab",
)
MINIMAL_RUN = TrainingRun(name="checkpoint-3")
IMAGE = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
PICTURES = {
    PREDICTIONS: plot_predictions({"drawn at random": [(IMAGE, "daisy", "rose", 0.75)] * 9}),
    ATTENTION: plot_maps([IMAGE] * 3, ["daisy"] * 3, {"Grad-CAM": [torch.linspace(0, 1, 64).view(8, 8)] * 3}),
    FILTERS: plot_filters(torch.linspace(-1, 1, 96).view(2, 3, 4, 4), torch.tensor([0.5, 0.25])),
    POSITIONS: plot_position_similarity(torch.linspace(-1, 1, 16).view(2, 2, 2, 2)),
}


def read_table(text, header):
    """Reads the markdown table under a header row: a list of rows of unescaped cells."""
    lines = text[text.index(header) :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        rows.append([html.unescape(re.sub(r"\\(.)", r"\1", cell.strip())) for cell in cells])
    return rows


# ---------------------------------------------------------------------------------------------------------- metadata


def test_metadata_survives_writing_and_loading(tmp_path):
    path = write_card(tmp_path, FULL_RUN)
    assert path == tmp_path / "README.md"
    card = ModelCard.load(path)
    assert card.data.to_dict() == build_metadata(FULL_RUN).to_dict()
    assert card.data.license is None
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert "vit_custom" in card.data.tags
    assert card.data.datasets == ["someone/flowers"]
    assert card.data.base_model == "facebook/deit-tiny-patch16-224"
    assert card.data.base_model_relation == "finetune"
    assert card.data.metrics == ["accuracy", "top_5_accuracy"]
    assert card.data.model_name == "deit-tiny-flowers"
    for result in card.data.eval_results:
        assert (result.task_type, result.dataset_type, result.dataset_split) == (
            "image-classification",
            "someone/flowers",
            "test",
        )
    measured = [(result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert measured == [("accuracy", 0.8), ("top_5_accuracy", 1.0)]
    assert find_card_errors(path.read_text(encoding="utf-8"), tmp_path) == []


def test_a_card_shows_no_older_figures(tmp_path):
    write_card(tmp_path, FULL_RUN, PICTURES)
    assert {file.name for file in tmp_path.glob("*.png")} == {*FIGURES} - {"reconstructions.png"}
    assert ".png" not in write_card(tmp_path, MINIMAL_RUN, {}).read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.png"))


def test_numpy_numbers_become_yaml_numbers():
    run = TrainingRun(name="out", dataset="someone/flowers", results={"accuracy": np.float32(0.75)})
    assert ModelCard(str(render_card(run))).data.eval_results[0].metric_value == 0.75


def test_license_can_be_chosen():
    assert render_card(TrainingRun(name="out", license="mit")).data.license == "mit"


def test_a_local_dataset_is_never_named_as_a_hub_dataset():
    run = TrainingRun(name="out", dataset_folder="flowers", results={"accuracy": 0.5}, base_folder="pretrained")
    card = render_card(run)
    assert card.data.datasets is None
    assert card.data.base_model is None
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("local", "flowers")
    assert "huggingface.co" not in str(card)
    assert "the local folder flowers" in card.text
    assert find_card_errors(str(card)) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"license": "apache 2"}, "license 'apache 2' is none that the Hub knows"),
        ({"license": "other"}, "license 'other' needs license_name and license_link"),
        ({"license": 2}, "license is no text"),
        ({"library_name": None}, "library_name is missing"),
        ({"datasets": ["imagefolder"]}, "dataset 'imagefolder' is none on the Hub"),
        ({"datasets": ["/home/me/images"]}, "dataset '/home/me/images' is none on the Hub"),
        ({"datasets": "someone/flowers"}, "datasets is no list of texts"),
        ({"base_model": "../runs/mine"}, "base_model '../runs/mine' is none on the Hub"),
        ({"base_model_relation": "child"}, "base_model_relation 'child' is none of finetune"),
        ({"widget": [{"example_title": "x"}]}, "a widget example has no src"),
        ({"widget": [{"src": "no.png"}]}, "no.png is not there"),
        ({"model-index": [{"results": []}]}, "model-index has an entry without a name"),
        ({"model-index": [{"name": "x", "results": [{}]}]}, "model-index has a result without a task type"),
    ],
)
def test_what_the_hub_would_object_to_is_found_without_it(tmp_path, change, error):
    metadata = render_card(FULL_RUN).data.to_dict()
    text = yaml.safe_dump({**metadata, **change})
    assert any(each.startswith(error) for each in find_card_errors(f"---\n{text}---\n", tmp_path))


@pytest.mark.parametrize("value", [float("nan"), "0.5", None])
def test_a_result_without_a_finite_value_is_found(value):
    metadata = render_card(FULL_RUN).data.to_dict()
    metadata["model-index"][0]["results"][0]["metrics"][0]["value"] = value
    errors = find_card_errors(f"---\n{yaml.safe_dump(metadata)}---\n")
    assert [error.partition(":")[0] for error in errors] == [
        "model-index has a metric without a type or a finite value"
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("---\n[1\n---\n", "the metadata are not YAML"),
        ("---\n- 1\n---\n", "the metadata are not a mapping"),
        ("# no metadata", "library_name is missing"),
    ],
)
def test_metadata_that_are_none_are_found(text, error):
    assert find_card_errors(text)[0].startswith(error)


def test_no_result_is_indexed_without_a_dataset():
    card = render_card(TrainingRun(name="out", results={"accuracy": 0.5}))
    assert "model-index" not in str(card)
    assert "50.00%" in card.text


# -------------------------------------------------------------------------------------------------------------- text


def test_full_card_states_every_fact(tmp_path):
    text = write_card(tmp_path, FULL_RUN).read_text(encoding="utf-8")
    summary = next(line for line in text.splitlines() if line.startswith("A Vision Transformer"))
    assert "preset deit\\_tiny, 5.5 M parameters, 2.51 GFLOPs an image, images of 224 x 224 pixels" in summary
    assert "(https://huggingface.co/facebook/deit-tiny-patch16-224)" in summary
    assert "Measured on the test split (30 images) of [someone/flowers]" in text
    assert read_table(text, "| Metric |") == [
        ["Accuracy", "80.00% (95 % interval 62.7% to 90.5%)"],
        ["Top-5 accuracy", "100.00% (95 % interval 88.6% to 100.0%)"],
        ["Loss", "0.5123"],
    ]
    assert read_table(text, "| Class | Training images | Images |") == [
        ["daisy", "800", "10", "100.0%", "66.7%", "80.0%"],
        ["rose", "320", "10", "80.0%", "100.0%", "88.9%"],
        ["tulip", "80", "10", "60.0%", "85.7%", "70.6%"],
    ]
    assert "It is less confident than right: mean confidence is 76.7%, 3.3 points below accuracy." in text
    assert "arxiv.org/abs/2012.12877" in text
    assert read_table(text, "| Split |") == [["train", "1,200"], ["test", "30"]]
    assert "```bash\npython -m trainers.finetune \\\n  --recipe flowers\n```" in text
    assert read_table(text, "| Fact |") == [
        ["Seed", "0"],
        ["Hardware", "1 x NVIDIA A100"],
        ["Wall time", "1 h 02 min"],
        ["Speed", "812 images a second"],
        ["Peak memory", "3.00 GiB"],
        ["Code", "vit-custom, commit 0123456789ab"],
        ["torch", "2.8.0"],
        ["transformers", "5.17.0"],
    ]
    assert "](training_curves.png)" in text
    assert "](confusion_matrix.png)" in text
    # The daisies were all found: they are no weak side.
    assert read_table(text, "| Class | Recall |") == [
        ["tulip", "60.0%", "10", "daisy"],
        ["rose", "80.0%", "10", "daisy"],
    ]


def test_unknown_facts_are_absent(tmp_path):
    text = write_card(tmp_path, MINIMAL_RUN).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# checkpoint-3",
        "## How to use",
        "## Use and limits",
    ]
    assert "\nA Vision Transformer (`vit_custom`) that classifies images.\n" in text
    assert "None" not in text
    assert "|" not in text
    assert ".png" not in text
    assert set(ModelCard(text).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "run.json"}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"from_scratch": True}, "classifies images, trained from scratch."),
        ({"base_folder": "pretrained"}, "classifies images, fine-tuned from the local checkpoint pretrained."),
        ({"ema_decay": 0.999}, "classifies images, with weights averaged over training (decay 0.999)."),
        ({"step": 20, "max_steps": 1000}, "These are the weights of step 20 of 1,000: training had not ended."),
        (
            {"calibration": [(10, 0.9, 0.75)]},
            "It is more confident than right: mean confidence is 90.0%, 15.0 points above accuracy.",
        ),
        ({"energy": 0.0123}, "| Energy | 0.0123 kWh, by the counters of the processors and GPUs |"),
        ({"stages": [{"Stage": 1, "A|B": "x|y"}]}, "| Stage | A\\|B |\n|---|---|\n| 1 | x\\|y |"),
        (
            {"attention_distances": [[4.0, 2.0], [8.0, 9.0]], "even_attention_distances": [10.0, 10.0]},
            "from the first block to the last: 3.0, 8.5 pixels; even attention would have 10.0 in the last. The most "
            "local head, of block 1, looks 2.0 pixels far.",
        ),
        (
            {"preset": "vit_nano", "preset_changes": ["patch_size=4", "image_size=16"]},
            "classifies images, preset vit\\_nano with patch\\_size=4, image\\_size=16.",
        ),
        ({"preprocessing": "Images are scaled."}, "## Model\n\nImages are scaled.\n"),
        ({"image_size": (192, 256)}, "classifies images, images of 192 x 256 pixels."),
        ({"num_parameters": 24_610}, "classifies images, 0.025 M parameters."),
        ({"wall_time": 61.0}, "| Wall time | 1 min 01 s |"),
        ({"wall_time": 59.4}, "| Wall time | 59 s |"),
        ({"results": {"loss": 1.0}}, "The split is not recorded."),
        ({"results": {"loss": 1.0}, "evaluation_split": "test"}, "Measured on the test split."),
        (
            {
                "results": {"loss": 1.0},
                "evaluation_split": "validation",
                "evaluation_origin": "train",
                "dataset": "a/b",
            },
            "Measured on the validation split, held out of the train split of [a/b]",
        ),
        (
            {"results": {"loss": 1.0}, "evaluation_split": "validation", "evaluation_origin": "dev"},
            "Measured on the dev split.",
        ),
        ({"results": {"loss": 1.0}, "dataset_folder": "cats"}, "Measured on the local folder cats."),
        ({"results": {"balanced_accuracy": 0.75}}, "| Balanced accuracy (mean recall) | 75.00% |"),
        ({"results": {"macro_f1": 0.125}}, "| Macro F1 | 12.50% |"),
        ({"results": {"expected_calibration_error": 0.0125}}, "| Calibration error (ECE, 15 bins) | 1.25% |"),
        ({"results": {"brier_score": 0.0125}}, "| brier\\_score | 0.0125 |"),
        ({"command": "echo '```'"}, "````bash\necho '```'\n````"),
    ],
)
def test_single_facts(facts, words):
    assert words in render_card(TrainingRun(name="out", **facts)).text


@pytest.mark.parametrize("run", [FULL_RUN, MINIMAL_RUN], ids=["full", "minimal"])
def test_the_template_asks_for_nothing_that_is_not_given(run, monkeypatch):
    # By default Jinja renders a misspelt name as nothing.
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))
    render_card(run, files=[*FIGURES, "recipe.yaml"])
    render_card(replace(run, task=FEATURES), files=FIGURES, hub_id="someone/model")


def test_impossible_facts_are_refused():
    with pytest.raises(ValueError, match=r"accuracy is a fraction between 0 and 1, got 91\.2"):
        TrainingRun(name="out", results={"accuracy": 91.2})
    with pytest.raises(ValueError, match="accuracy is a fraction between 0 and 1, got nan"):
        TrainingRun(name="out", results={"accuracy": float("nan")})
    with pytest.raises(ValueError, match="macro_f1 is a fraction between 0 and 1, got 62"):
        TrainingRun(name="out", results={"macro_f1": 62})
    with pytest.raises(ValueError, match="from scratch has no base model, got 'google/vit'"):
        TrainingRun(name="out", from_scratch=True, base_model="google/vit")
    with pytest.raises(ValueError, match=r"shape \(2, 2\) does not fit 3 label names"):
        TrainingRun(name="out", label_names=["a", "b", "c"], confusion_matrix=np.eye(2, dtype=int))
    with pytest.raises(ValueError, match=r"rebalancing is by logit_adjustment, .*, got 'focal_loss'"):
        TrainingRun(name="a", rebalancing={"focal_loss": 2.0})
    with pytest.raises(ValueError, match="1 counts of classes do not fit 2 label names"):
        TrainingRun(name="out", label_names=["a", "b"], train_counts=[3])


# ------------------------------------------------------------------------------------------------------- nasty names


def test_nasty_class_names_survive(tmp_path):
    num_classes = len(NASTY_NAMES)
    # Every image is taken for the next class; the classes have 5, 4, 3, ... images, so they come in order.
    matrix = np.roll(np.diag(np.arange(num_classes, 0, -1)), 1, axis=1)
    run = TrainingRun(
        name=NASTY_NAMES[2],
        label_names=NASTY_NAMES,
        confusion_matrix=matrix,
        dataset_folder=NASTY_NAMES[4],
        evaluation_split=NASTY_NAMES[3],
        split_sizes={NASTY_NAMES[0]: 1},
        results={"accuracy": 0.0},
        hardware=NASTY_NAMES[1],
    )
    text = write_card(tmp_path, run).read_text(encoding="utf-8")
    expected = [" ".join(name.split()) for name in NASTY_NAMES]
    rows = read_table(text, "| Class | Recall |")
    assert [row[0] for row in rows] == expected
    assert [row[3] for row in rows] == expected[1:] + expected[:1]
    assert read_table(text, "| Split |") == [["a|b", "1"]]
    assert read_table(text, "| Fact |") == [["Hardware", expected[1]]]
    assert "<b>" not in text
    assert "<img" not in text
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == build_metadata(run).to_dict()
    assert card.data.model_name == NASTY_NAMES[2]
    assert card.data.eval_results[0].dataset_split == NASTY_NAMES[3]
    # What is not on the Hub is opened in its own folder, whatever that is called.
    assert 'pipeline("image-classification", model=".", trust_remote_code=True)' in text


def test_a_title_stands_for_a_data_set_on_the_hub_too():
    run = TrainingRun(name="out", dataset="user/data", dataset_title="Leaves of *June*", results={"accuracy": 0.5})
    rendered = render_card(run)
    assert r"[Leaves of \*June\*](https://huggingface.co/datasets/user/data)" in rendered.text
    (result,) = build_metadata(run).eval_results
    assert (result.dataset_name, result.dataset_type) == ("Leaves of *June*", "user/data")


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"train_fraction": 0.1}, "It was trained on a share of 0.1 of the training images."),
        (
            {"train_imbalance": 50.0},
            "It was trained on all training images of the first class, on a smaller share of each later one, 50 times "
            "smaller of the last, and on one of each at least.",
        ),
        (
            {"train_fraction": 0.5, "train_imbalance": 2.0, "label_names": ["a|b", "c"], "train_counts": [20, 10]},
            "It was trained on a share of 0.5 of the training images of the first class, on a smaller share of each "
            "later one, 2 times smaller of the last, and on one of each at least. Classes have 10 (c) to "
            r"20 (a\|b) training images.",
        ),
        ({"label_names": ["a", "b"], "train_counts": [7, 7]}, None),
        (
            {"rebalancing": {"logit_adjustment": 0.5, "class_balanced_sampling": True}},
            "Classes were balanced by [logit adjustment](https://arxiv.org/abs/2007.07314) of strength 0.5 and "
            "drawing every class equally often.",
        ),
    ],
    ids=["share", "imbalance", "both", "balanced", "rebalanced"],
)
def test_what_was_taken_of_the_training_images_is_told(facts, sentence):
    text = render_card(TrainingRun(name="out", dataset_folder="cats", **facts)).text
    data = text.partition("## Data")[2].partition("<!-- end data -->")[0].strip().splitlines()
    assert data == ["The images are those of the local folder cats.", *(["", sentence] if sentence else [])]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"teacher": "someone/cats"}, "[someone/cats](https://huggingface.co/someone/cats)"),
        ({"teacher_folder": "cats_0"}, r"the local checkpoint cats\_0"),
    ],
)
def test_the_teacher_is_told(facts, words):
    assert f", taught by {words}." in render_card(TrainingRun(name="out", **facts)).text


def test_a_model_of_the_library_needs_no_trust():
    card = render_card(TrainingRun(name="flowers", model_type="vit"), hub_id="someone/flowers")
    assert card.data.tags == ["vit", "vision"]
    assert 'pipeline("image-classification", model="someone/flowers")' in card.text
    assert "trust_remote_code" not in card.text
    assert "A model (`vit`) that classifies images." in card.text


def test_escape_markdown_escapes_every_special_character():
    assert escape_markdown("a|b\r\nc\t<i>") == r"a\|b c &lt;i&gt;"
    assert escape_markdown(r"\|") == r"\\\|"
    assert escape_markdown("&lt;") == "&amp;lt;"


# ------------------------------------------------------------------------------------------------------------ limits


def test_worst_classes_come_by_recall_then_by_number_of_images():
    matrix = np.array(
        [
            [5, 5, 0, 0, 0],
            [0, 9, 0, 1, 0],
            [0, 50, 50, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 0, 0, 7],
        ]
    )
    names = ["few", "good", "many", "unseen", "perfect"]
    assert find_worst_classes(matrix, names, 3) == [
        ("many", 0.5, 100, "good"),
        ("few", 0.5, 10, "good"),
        ("good", 0.9, 10, "unseen"),
    ]
    assert [row[0] for row in find_worst_classes(matrix, names, 1)] == ["many"]
    text = render_card(TrainingRun(name="out", label_names=names, confusion_matrix=matrix)).text
    assert "1 of 5 classes have no image in the evaluation split" in text


def test_a_perfect_matrix_is_not_praised():
    run = TrainingRun(name="out", label_names=["a", "b"], confusion_matrix=np.diag([3, 4]), evaluation_split="test")
    text = render_card(run).text
    assert "No image of the test split was misclassified" in text
    assert "| Class | Recall |" not in text


# ---------------------------------------------------------------------------------------------------------- snippets


def test_snippets_run_as_they_stand(tmp_path, monkeypatch, capsys):
    # Any image classifier will do: it is the card's code that is tested.
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        id2label={0: "daisy", 1: "rose"},
    )
    folder = tmp_path / "checkpoint-3"
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    Image.new("RGB", (20, 30), "red").save(folder / "image.jpg")
    monkeypatch.chdir(folder)
    text = write_card(folder, MINIMAL_RUN).read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 3
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 30), "blue").save(folder / "images" / name / f"{number}.png")
    outputs = []
    for snippet in snippets:
        Path("snippet.py").write_text(snippet, encoding="utf-8")
        runpy.run_path("snippet.py")
        outputs.append(capsys.readouterr().out)
    classes = re.findall("daisy|rose", outputs[0])
    assert sorted(classes) == ["daisy", "rose"]
    # Both ways agree on the likeliest class.
    assert outputs[1].strip() == classes[0]
    assert "'train_loss'" in outputs[2]


# --------------------------------------------------------------------------------------------------- facts and edits


def test_facts_survive_their_file(tmp_path):
    run = replace(FULL_RUN, examples={"examples/1.png": "daisy"}, image_size=(192, 256), versions={"é": "1"})
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "1.png").touch()
    write_card(tmp_path, run)
    assert str(render_card(read_run(tmp_path), FIGURES)) == str(render_card(run, FIGURES))


def test_facts_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no run.json in .*: give a folder that a training run left"):
        read_run(tmp_path)
    for text in (
        "{",
        "[1]",
        '{"name": "x", "colour": 1}',
        '{"name": "x", "results": {"accuracy": 2}}',
        '{"name": "x", "results": [1]}',
        '{"name": "x", "architecture": "resnet"}',
        '{"name": null}',
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="holds no facts of a run"):
            read_run(tmp_path)


def test_what_people_wrote_survives_a_new_card():
    old = str(render_card(MINIMAL_RUN, hub_id="someone/model"))
    edited = old.replace("# checkpoint-3", "# Our flowers\n\nTaken in May.").replace(
        "<!-- end use -->", "<!-- end use -->\n\n## Thanks\n\nTo all."
    )
    edited = edited.replace("library_name: transformers", "library_name: nonsense\nlicense: mit\nlanguage: en")
    edited = edited.replace("tags:", "tags:\n- flowers").replace("classify = pipeline", "classify = guess")
    new = str(render_card(replace(FULL_RUN, license="apache-2.0"), FIGURES, hub_id="someone/model"))
    merged = merge_cards(edited, new, generated=old)
    metadata, body = split_card(merged)
    for words in ("# Our flowers\n\nTaken in May.", "## Thanks\n\nTo all.", "## Results", "```bibtex"):
        assert words in body
    for words in ("# deit-tiny-flowers", "guess", "nonsense"):
        assert words not in merged
    assert find_parts(body) == find_parts(split_card(new)[1])
    assert list(find_parts(body)) == list(find_parts(split_card(new)[1]))
    assert (metadata["license"], metadata["language"]) == ("mit", "en")
    assert set(metadata["tags"]) == {"flowers", "vit_custom", "vision", "arxiv:2012.12877"}
    assert metadata["model-index"] == split_card(new)[0]["model-index"]
    assert merge_cards(merged, new, generated=new) == merged
    # What the newer run does not know goes.
    assert "## Results" not in merge_cards(merged, old, generated=new)


def test_a_card_by_hand_stays_above_the_generated_parts():
    new = str(render_card(MINIMAL_RUN))
    merged = merge_cards("# By hand\n\nAll of it.\n", new)
    assert split_card(merged)[1].lstrip().startswith("# By hand\n\nAll of it.\n\n<!-- begin summary")
    assert find_parts(merged) == find_parts(new)
    with pytest.raises(ValueError, match=r"the card's part 'use' has no '<!-- end use -->'"):
        merge_cards(merged.replace("<!-- end use -->", ""), new)


def test_a_card_is_rebuilt_from_what_the_run_left(tmp_path, capsys):
    write_card(tmp_path, FULL_RUN, PICTURES)
    card, curves = tmp_path / "README.md", tmp_path / "training_curves.png"
    whole = card.read_text(encoding="utf-8")
    card.write_text(whole.replace("80.00%", "99.99%").replace("# deit-tiny-flowers", "# Mine"), encoding="utf-8")
    curves.unlink()
    rebuild([str(tmp_path)])
    assert card.read_text(encoding="utf-8").splitlines() == whole.replace("# deit-tiny-flowers", "# Mine").splitlines()
    assert curves.exists()
    assert (tmp_path / PREDICTIONS).exists()
    card.unlink()
    rebuild([str(tmp_path)])
    assert "# deit-tiny-flowers" in card.read_text(encoding="utf-8")
    capsys.readouterr()


ROOT = Path(__file__).parents[1]
OWN_CARDS = [*sorted(ROOT.glob("model_cards/*/run.json")), *sorted(ROOT.glob("spaces/*/run.json"))]


@pytest.mark.parametrize("facts", OWN_CARDS, ids=lambda path: f"{path.parent.parent.name}/{path.parent.name}")
def test_the_cards_of_this_project_say_what_their_runs_left(facts):
    folder = facts.parent
    text = (folder / "README.md").read_text(encoding="utf-8")
    generated = str(render_card(read_run(folder), [path.name for path in folder.iterdir()]))
    assert find_parts(split_card(text)[1]) == find_parts(split_card(generated)[1])
    assert split_card(text)[0] == split_card(generated)[0]
    assert find_card_errors(text, folder) == []


def test_there_is_a_card_of_a_run_of_this_project():
    assert len(OWN_CARDS) > 1


def test_a_card_that_cannot_be_made_replaces_nothing(tmp_path):
    write_card(tmp_path, FULL_RUN, PICTURES)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "README.md").write_text(before["README.md"].decode().replace("<!-- end results -->", ""))
    broken = (tmp_path / "README.md").read_bytes()
    with pytest.raises(ValueError, match="results"):
        write_card(tmp_path, replace(FULL_RUN, confusion_matrix=None), keep_edits=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before | {"README.md": broken}


def test_an_example_that_is_gone_is_not_shown(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "2.png").touch()
    run = replace(MINIMAL_RUN, examples={"examples/1.png": "a", "examples/2.png": "b"})
    text = write_card(tmp_path, run).read_text(encoding="utf-8")
    assert split_card(text)[0]["widget"] == [{"src": "examples/2.png", "example_title": "b"}]


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("base_model: 3", "base_model 3 is none on the Hub"),
        ("widget:\n- src: 3", "a widget example has no src"),
        (
            "model-index:\n- name: x\n  results:\n  - task: y",
            "a result that is no mapping of task, dataset and metrics",
        ),
        ("model-index:\n- name: x\n  results:\n  - 3", "a result that is no mapping of task, dataset and metrics"),
    ],
)
def test_metadata_of_the_wrong_kind_are_named(metadata, error):
    card = f"---\nlibrary_name: x\npipeline_tag: y\ntags: [z]\n{metadata}\n---\n"
    assert any(error in found for found in find_card_errors(card))


def test_snippets_of_a_branch_open_that(tmp_path):
    card = str(render_card(FULL_RUN, hub_id="someone/model", revision="dev"))
    assert card.count('"someone/model", revision="dev", trust_remote_code=True') == 4
    assert card.count(', ignore_mismatched_sizes=True, revision="dev", trust_remote_code=True') == 1


def test_tags_that_are_lost_come_back():
    new = str(render_card(FULL_RUN))
    metadata, _ = split_card(merge_cards("# Mine", new, generated=new))
    assert metadata["tags"] == split_card(new)[0]["tags"]


def test_a_card_that_cannot_be_rebuilt(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        rebuild([str(tmp_path)])
    assert exit_info.value.code == 2
    assert re.fullmatch(r"card: error: there is no run.json in .*\n", capsys.readouterr().err)
    write_card(tmp_path, FULL_RUN)
    (tmp_path / "confusion_matrix.png").unlink()
    with pytest.raises(SystemExit):
        rebuild([str(tmp_path), "--check"])
    assert "confusion_matrix.png is not there" in capsys.readouterr().err


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (24, 30), (1, 1), (8830, 10000)])
def test_intervals_are_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(confidence_interval(right / count, count), expected, atol=1e-6)


def test_papers_have_their_entries():
    for paper in PAPERS.values():
        entry = paper.bibtex()
        assert entry.count("{") == entry.count("}")
        assert re.search(r"arxiv.org/abs/\d{4}\.\d{5}}", entry)
    assert len({paper.arxiv for paper in PAPERS.values()}) == len(PAPERS)
    assert {"apache-2.0", "mit", "other"} <= LICENSES


# ----------------------------------------------------------------------------------------------------------- figures


def read_lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_training_curves_hold_the_log():
    loss, accuracy, learning_rate = plot_training_curves(LOG_HISTORY).axes
    assert read_lines(loss) == {
        "train": ([0.5, 1.0, 2.0], [2.0, 1.5, 1.0]),
        "evaluation": ([1.0, 2.0], [1.6, 1.7]),
    }
    assert read_lines(accuracy) == {"evaluation": ([1.0, 2.0], [0.4, 0.3])}
    assert read_lines(learning_rate) == {"train": ([0.5, 1.0, 2.0], [1e-3, 5e-4, 0.0])}
    assert [axes.get_title(loc="left") for axes in (loss, accuracy, learning_rate)] == [
        "Loss",
        "Accuracy",
        "Learning rate",
    ]
    assert {text.get_text() for text in loss.get_legend().get_texts()} == {"train", "evaluation"}
    assert to_hex(loss.get_lines()[0].get_color()) != to_hex(loss.get_lines()[1].get_color())


def test_training_curves_without_evaluation_have_no_empty_panel():
    log_history = [entry for entry in LOG_HISTORY if "loss" in entry]
    figure = plot_training_curves(log_history)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Learning rate"]
    assert list(read_lines(figure.axes[0])) == ["train"]


def test_a_log_without_curves(tmp_path):
    # A run shorter than the logging interval logs its summary only.
    summary = [{"train_runtime": 3.0, "train_loss": 1.5, "epoch": 2.0, "step": 4}]
    assert collect_curves(summary) == {}
    with pytest.raises(ValueError, match="1 entries"):
        plot_training_curves(summary)
    text = write_card(tmp_path, TrainingRun(name="out", log_history=summary)).read_text(encoding="utf-8")
    assert ".png" not in text


@pytest.mark.parametrize("values", [[float("nan")], [1.0, float("nan"), float("inf")]])
def test_a_diverged_run_can_be_drawn(values, tmp_path):
    log_history = [{"loss": value, "epoch": float(index)} for index, value in enumerate(values)]
    plot_training_curves(log_history).savefig(tmp_path / "curves.png")


def test_confusion_matrix_is_coloured_by_row_and_labelled_by_count():
    matrix = np.array([[30, 10, 0], [0, 5, 5], [0, 0, 0]])
    axes, color_bar = plot_confusion_matrix(matrix, ["a", "$b$", "c\nd" + "x" * 50]).axes
    shares = axes.get_images()[0].get_array()
    np.testing.assert_allclose(shares[:2], [[0.75, 0.25, 0], [0, 0.5, 0.5]])
    assert np.ma.getmaskarray(shares)[2].all()
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    # (column, row): a zero is an empty cell
    assert counts == {(0, 0): "30", (1, 0): "10", (1, 1): "5", (2, 1): "5"}
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        names = [label.get_text() for label in labels]
        assert names[:2] == ["a", "$b$"]
        assert names[2].startswith("c dx")
        assert len(names[2]) == 24
        assert not labels[1].get_parse_math()
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert color_bar.get_ylim() == (0, 1)


@pytest.mark.parametrize(("num_classes", "has_counts"), [(20, True), (21, False), (100, False)])
def test_a_large_confusion_matrix_is_thinned_out(num_classes, has_counts):
    matrix = np.diag(np.arange(1, num_classes + 1))
    figure = plot_confusion_matrix(matrix, [f"class {index}" for index in range(num_classes)])
    axes = figure.axes[0]
    assert len(axes.texts) == (num_classes if has_counts else 0)
    ticks = axes.get_xticks()
    assert len(ticks) <= 25
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"class {tick}" for tick in ticks]


@pytest.mark.parametrize("num_classes", [10, 37, 100])
def test_names_of_classes_do_not_overlap(num_classes):
    names = [f"a class with a name {index}" for index in range(num_classes)]
    figure = plot_confusion_matrix(np.eye(num_classes, dtype=int), names)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for label in axes.get_yticklabels() + axes.get_xticklabels() + [axes.xaxis.label, axes.yaxis.label]:
        box = label.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.y1 <= figure.bbox.height
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
    # Turned by 45 degrees, lines of text stay apart when their anchors are sqrt(2) line heights apart.
    anchors = [axes.transData.transform((tick, 0))[0] for tick in axes.get_xticks()]
    line_height = boxes[0].height
    assert min(np.diff(anchors)) >= line_height * 2**0.5


def test_confusion_matrix_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) does not fit 2 label names"):
        plot_confusion_matrix(np.zeros((2, 3), dtype=int), ["a", "b"])
    with pytest.raises(ValueError, match="holds counts, not float64"):
        plot_confusion_matrix(np.eye(2), ["a", "b"])


def test_figures_are_written_as_pngs_of_sensible_size(tmp_path):
    write_card(tmp_path, FULL_RUN, PICTURES)
    for name in ("training_curves.png", "confusion_matrix.png", "calibration.png", PREDICTIONS, ATTENTION):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.format == "PNG"
            assert 500 <= image.width <= 2500
            assert 200 <= image.height <= 2500
            assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 50


def test_figures_leave_pyplot_alone(tmp_path):
    before = pyplot.get_fignums()
    write_card(tmp_path, FULL_RUN)
    assert pyplot.get_fignums() == before


def test_commands_are_broken_between_their_options():
    command = "python -m trainers.finetune --recipe cifar10_vit --config_overrides 'pooling=mean --x' a=1 --seed 0"
    text = render_card(TrainingRun(name="out", command=command)).text
    broken = re.search(r"```bash\n(.*?)\n```", text, re.DOTALL)[1]
    assert broken.splitlines()[1:] == [
        "  --recipe cifar10_vit \\",
        "  --config_overrides 'pooling=mean --x' a=1 \\",
        "  --seed 0",
    ]
    assert shlex.split(broken.replace("\\\n", "")) == shlex.split(command)


def test_a_bin_of_few_images_has_no_accuracy():
    line = plot_calibration([(1, 0.2, 0.0), (30, 0.9, 1.0)]).axes[0].get_lines()[1]
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, 1.0])


def test_calibration_holds_the_bins():
    above, below = plot_calibration([(10, 0.5, 0.4), (30, 0.9, 1.0)]).axes
    assert read_lines(above)["this model"] == ([0.5, 0.9], [0.4, 1.0])
    assert [bar.get_height() for bar in below.patches] == [0.25, 0.75]


def test_predictions_say_what_is_wrong():
    figure = plot_predictions({"drawn at random": [(IMAGE, "a", "a", 0.5), (IMAGE, "a", "$b", 0.25)], "none": []})
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["a 50%", "$b 25%\nis: a"]
