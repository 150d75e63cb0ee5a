"""Figures of what a model has learnt: what they draw, and the command that writes them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from tiny_models import tiny_model
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from modeling_vit_custom import ViTCustomForImageClassification, ViTCustomForPreTraining
from modeling_vit_custom.interpretability.__main__ import main as draw
from modeling_vit_custom.interpretability.figures import (
    MAX_TILES,
    overlay,
    plot_attention_distance,
    plot_filters,
    plot_maps,
    plot_neighbours,
    plot_position_similarity,
    plot_sizes,
)


GREY = np.full((32, 32, 3), 200, np.uint8)


def drawn(axes) -> np.ndarray:
    return axes.get_images()[0].get_array()


# ------------------------------------------------------------------------------------------------------------- figures


def test_filters_have_their_own_contrast_around_grey():
    components = torch.randn(9, 3, 4, 4) * torch.tensor([0.01, 100.0, *[1.0] * 7]).view(9, 1, 1, 1)
    panels = plot_filters(components, torch.full((9,), 0.1)).axes
    assert len(panels) == 14
    for axes, component in zip(panels, components):
        expected = 0.5 + component.permute(1, 2, 0) / component.abs().max() / 2
        np.testing.assert_allclose(drawn(axes), expected, atol=1e-6)
    assert not panels[9].get_images()
    assert "9 principal components: 90% of" in plot_filters(components, torch.full((9,), 0.1)).get_suptitle()


@pytest.mark.parametrize("channels", [1, 4])
def test_filters_that_are_not_coloured_are_grey(channels):
    component = torch.randn(1, channels, 2, 2)
    mean = component[0].mean(dim=0)
    expected = 0.5 + mean / mean.abs().max() / 2
    np.testing.assert_allclose(drawn(plot_filters(component, torch.ones(1)).axes[0]), expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (24, 24)])
def test_every_position_has_its_tile(grid):
    similarity = torch.rand(*grid, *grid)
    canvas = np.ma.filled(drawn(plot_position_similarity(similarity).axes[0]).astype(float), np.nan)
    step = 2 if max(grid) > MAX_TILES else 1
    height, width = grid
    for i, row in enumerate(range(0, height, step)):
        for j, column in enumerate(range(0, width, step)):
            tile = canvas[i * (height + 1) : i * (height + 1) + height, j * (width + 1) : j * (width + 1) + width]
            np.testing.assert_allclose(tile, similarity[row, column], atol=1e-6)


def test_attention_distances_are_points():
    (axes,) = plot_attention_distance([[1.0, 3.0], [4.0, 8.0]], [9.0, 10.0]).axes
    points = np.concatenate([each.get_offsets() for each in axes.collections])
    np.testing.assert_array_equal(points, [[1, 1], [1, 3], [2, 4], [2, 8]])
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {"mean of the heads": [2, 6], "even attention": [9, 10]}


def test_maps_are_colours_over_grey():
    weights = torch.full((32, 32), 3.0)
    weights[:16] = 7.0
    mapped = overlay(GREY, weights)
    for part, level in ((mapped[:16], 1.0), (mapped[16:], 0.0)):
        expected = 100 + 255 * np.array(colormaps["inferno"](level)[:3]) / 2
        np.testing.assert_allclose(part, np.broadcast_to(expected, part.shape), atol=1)
    colors = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])
    np.testing.assert_array_equal(overlay(GREY, colors)[5, [3, 20]], [[255, 0, 128], [0, 255, 0]])


def test_each_image_is_beside_its_maps():
    images, titles = [GREY, GREY // 2, GREY // 4], ["a", "$b", "c"]
    maps = {"one": list(torch.rand(3, 4, 4)), "the other": list(torch.rand(3, 4, 4))}
    panels = plot_maps(images, titles, maps, width=6).axes
    assert [axes.get_title(loc="left") for axes in panels[:6]] == ["a", "one", "the\nother", "$b", "one", "the\nother"]
    assert panels[6].get_title(loc="left") == "c"
    for index, image in enumerate(images):
        own = panels[3 * index : 3 * index + 3]
        np.testing.assert_array_equal(drawn(own[0]), image)
        for axes, name in zip(own[1:], maps):
            np.testing.assert_array_equal(drawn(axes), overlay(image, maps[name][index]))


def test_sizes_follow_the_class_of_the_native_size():
    probabilities = {
        16: torch.tensor([[0.25, 0.75]]),
        32: torch.tensor([[0.5 + 2**-3, 0.5 - 2**-3]]),
        64: torch.tensor([[1.0, 0.0]]),
    }
    (axes,) = plot_sizes(probabilities, 32, ["a"]).axes
    assert list(axes.lines[0].get_ydata()) == [0.25, 0.625, 1.0]


def test_neighbours_follow_their_image():
    panels = plot_neighbours([GREY], ["a"], [[GREY // 2, GREY // 4]], torch.tensor([[0.5, 0.25]])).axes
    assert [panels[0].get_title(loc="left"), *(axes.get_title() for axes in panels[1:])] == ["a", "0.50", "0.25"]
    np.testing.assert_array_equal(drawn(panels[2]), GREY // 4)


class OnAnotherDevice(torch.Tensor):
    """As one on a GPU, it has no array before it is brought to the CPU."""

    def numpy(self, **options):
        raise TypeError("can't convert device tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_figures_of_a_gpus_tensors_are_drawn():
    plot_filters(torch.rand(2, 3, 4, 4).as_subclass(OnAnotherDevice), torch.ones(2))
    plot_position_similarity(torch.rand(2, 2, 2, 2).as_subclass(OnAnotherDevice))
    overlay(GREY, torch.rand(4, 4).as_subclass(OnAnotherDevice))


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("one.png", "more/two.jpg", "more/three.PNG"):
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def save(model, folder, side=32):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return str(folder)


def run(checkpoint, photos, output_dir, *options):
    draw([checkpoint, str(photos), "--output_dir", str(output_dir), *options])
    return {file.name for file in output_dir.iterdir()}, json.loads((output_dir / "report.json").read_text())


FILES = {"attention_distance.png", "features.png", "filters.png", "maps.png", "report.json", "sizes.png"}


def test_the_command_writes_figures(architecture, photos, tmp_path, capsys):
    checkpoint = save(tiny_model(ViTCustomForImageClassification, architecture), tmp_path / "model")
    files, report = run(checkpoint, photos, tmp_path / "out", "--batch_size", "2")
    assert files == FILES | ({"positions.png"} if architecture != "swin" else set())
    assert report["images"] == 3
    assert report["image_size"] == [32, 32]
    plain = {"rollout", "gradient rollout"} if architecture in ("vit", "deit") else set()
    assert report["insertion"].keys() == report["deletion"].keys() == {"Grad-CAM", "gradient attention"} | plain
    assert "Mean attention distance over 3 images" in capsys.readouterr().out


def test_the_batch_size_changes_nothing(photos, tmp_path):
    checkpoint = save(tiny_model(ViTCustomForImageClassification, "swin"), tmp_path / "model")
    _, whole = run(checkpoint, photos, tmp_path / "whole", "--neighbours", str(photos))
    _, single = run(checkpoint, photos, tmp_path / "single", "--batch_size", "1")
    for found, expected in zip(single["attention_distance"], whole["attention_distance"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert single["insertion"] == pytest.approx(whole["insertion"], rel=1e-5)
    assert (tmp_path / "whole" / "neighbours.png").exists()


def test_another_size_is_looked_at(photos, tmp_path):
    checkpoint = save(tiny_model(ViTCustomForImageClassification, "vit"), tmp_path / "model")
    _, report = run(checkpoint, photos, tmp_path / "out", "--image_size", "48")
    assert report["image_size"] == [48, 48]
    # 6 x 6 patches of 8 pixels.
    centres = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)) * 8
    assert report["even_attention_distance"][0] == pytest.approx(torch.cdist(centres, centres).mean().item(), rel=1e-5)


def test_sizes_that_are_less_than_a_patch_are_left_out(photos, tmp_path):
    model = tiny_model(ViTCustomForImageClassification, "vit", patch_size=32)
    files, _ = run(save(model, tmp_path / "model"), photos, tmp_path / "out")
    assert "sizes.png" in files


def save_deep_grey(photos: str) -> str:
    file = Path(photos).parent / "deep.png"
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(file)
    return str(file)


def test_an_encoder_has_no_predictions_to_explain(photos, tmp_path):
    checkpoint = save(tiny_model(ViTCustomForPreTraining, "vit"), tmp_path / "model")
    files, report = run(checkpoint, photos, tmp_path / "out")
    assert files == FILES - {"maps.png", "sizes.png"} | {"positions.png"}
    assert "insertion" not in report


def test_models_of_transformers_are_looked_into(photos, tmp_path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    files, _ = run(save(ViTForImageClassification(config), tmp_path / "model"), photos, tmp_path / "out")
    assert files == FILES | {"positions.png"}
    files, _ = run(save(ViTModel(config), tmp_path / "encoder"), photos, tmp_path / "encoded")
    assert "filters.png" in files
    distilled = DeiTForImageClassificationWithTeacher(DeiTConfig(**config.to_diff_dict()))
    files, report = run(save(distilled, tmp_path / "distilled"), photos, tmp_path / "of_distilled")
    assert files == FILES | {"positions.png"} and "insertion" in report


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda model, photos: [model, "nowhere"], "there is no 'nowhere'"),
        (lambda model, photos: ["nowhere", photos], "nowhere"),
        (lambda model, photos: [model, f"{photos}/notes.txt"], r"notes.txt' cannot be read as an image: .*"),
        (lambda model, photos: [model, save_deep_grey(photos)], r"deep.png' has mode I;16, which would be clipped: .*"),
        (lambda model, photos: [model, photos, "--neighbours", f"{model}"], "holds no images .*"),
        (lambda model, photos: [model, photos, "--output_dir", f"{photos}/one.png"], ".*one.png.*"),
    ],
)
def test_mistakes_are_one_line(break_it, message, photos, tmp_path, capsys):
    checkpoint = save(tiny_model(ViTCustomForImageClassification, "vit"), tmp_path / "model")
    with pytest.raises(SystemExit) as exit_info:
        draw(["--output_dir", str(tmp_path / "out"), *break_it(checkpoint, str(photos))])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"interpretability: error: .*{message}.*\n", error), error
