"""The benchmarks of costs and of the training loop: what they count, and that they run on tiny models and images."""

import io
import json
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from benchmarks import costs, loop
from benchmarks.costs import Case
from benchmarks.steps import format_number, format_quartiles, measure_rise, rotated

from modeling_vit_custom import preset_config
from modeling_vit_custom.modeling_vit_custom import EncoderBlock
from trainers.data import DataArguments, load_splits
from trainers.pace import count_flops


README = Path(__file__).parent / "benchmarks" / "README.md"
VIT, SWIN = "vit_nano_patch2_8", "swin_nano_patch1_window4_8"
QUICK = ["--repeats", "2", "--seconds", "0.1", "--device", "cpu", "--no_progress"]
QUICK_COSTS = [*QUICK, "--models", VIT, SWIN, "--image_sizes", "8", "16", "--depths", "1", "2", "--widths", "32", "64"]
QUICK_COSTS += ["--batch_sizes", "1", "2", "--batch_size", "5"]
QUICK_LOOP = ["--model", VIT, "--steps", "5", "--batch_size", "4", "--workers", "0", "1", "--device", "cpu"]
NUMBER = r"[\d,.]+"
QUARTILES = rf"{NUMBER} \[{NUMBER}, {NUMBER}\]"


def read_rows(text: str) -> list[list[str]]:
    """Cells of all tables, without their heads."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    heads = [index - 1 for index, row in enumerate(rows) if set(row) == {"---"}]
    return [row for index, row in enumerate(rows) if index not in heads and index - 1 not in heads]


def saving(name: str, **fields) -> Case:
    cases = costs.list_savings(VIT, "float32", batch_size=5)
    [case] = [case for case in cases if case.name.startswith(name)]
    vars(case).update(fields)
    return case


# ------------------------------------------------------------------------------------------------------------- costs


def test_costs_are_tabulated_with_every_time_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "costs.md"
    costs.main([*QUICK_COSTS, "--dtypes", "bfloat16", "--output", str(output)])
    text = output.read_text()
    tables, picture = text.strip().rsplit("\n\n", 1)
    assert tables in capsys.readouterr().out
    assert picture == "![Time an image](costs.png)"
    assert "- CPU: " in text and f"--models {VIT} {SWIN}" in text
    rows = read_rows(text)
    savings, points = [row for row in rows if row[0] not in (VIT, SWIN)], [row for row in rows if row[0] in (VIT, SWIN)]
    # Two models by image and batch size, one by depth and width, all of it in two modes.
    assert len(savings) == 10 + 5 and len(points) == 2 * (4 + 2 + 2 + 4)
    for row in savings:
        assert all(re.fullmatch(QUARTILES, row[column]) for column in (1, 5))
        assert (float(row[3]) <= 1 or "the paper" in row[0]) and float(row[6]) > 0
    assert all(re.fullmatch(QUARTILES, row[column]) for row in points for column in (4, 5))

    head, *records = map(json.loads, output.with_suffix(".jsonl").read_text().splitlines())
    assert head["arguments"]["batch_size"] == 5
    assert len(records) == len(rows)
    assert all(len(record["times"]) == 2 and min(record["times"]) > 0 for record in records)
    with PIL.Image.open(output.with_suffix(".png")) as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_savings_leave_out_what_they_say():
    plain = saving("plain")
    # 16 patches of 12 values, and 10 classes; the last of the four blocks is for the class token alone.
    ends = 2 * 128 * (16 * 12 + 10)
    one, two = (costs.count_flops(saving("plain", fields={"num_hidden_layers": depth})) for depth in (1, 2))
    block, last = two - one, one - ends
    assert costs.count_flops(plain) == ends + 3 * block + last
    assert count_flops(plain.build(), (8, 8)) == ends + 4 * block
    # Three of five images in every branch.
    assert costs.count_flops(saving("drop path")) == pytest.approx(ends + 0.6 * (3 * block + last))
    assert [module.rate for module in saving("drop path").build().modules() if hasattr(module, "choose")] == [0.4] * 4
    # In evaluation nothing is dropped.
    assert costs.count_flops(saving("drop path", mode="inference")) == costs.count_flops(plain)
    half = costs.count_flops(saving("patch dropout"))
    assert 0.45 < half / costs.count_flops(plain) < 0.55
    merged = costs.count_flops(saving("token merging, 8"))
    assert 0.3 < merged / costs.count_flops(plain) < 0.5
    assert saving("images of 6").shape == (5, 3, 6, 6)
    decoders = [saving(f"masked autoencoder 0.75, {kind}").build().decoder for kind in ("the paper's", "small")]
    assert [(len(each.blocks), each.norm.normalized_shape) for each in decoders] == [(8, (512,)), (2, (64,))]
    recomputing = [module for module in saving("gradient").build().modules() if isinstance(module, EncoderBlock)]
    assert len(recomputing) == 4 and all(block.gradient_checkpointing for block in recomputing)


def test_only_plain_models_leave_patches_out():
    names = [case.name for case in costs.list_savings(SWIN, "float32", 2)]
    assert names == ["plain step", "drop path 0.4 in every block", "images of 4 pixels", "gradient checkpointing"]
    names = [case.name for case in costs.list_savings("vit_small_patch16_224", "float32", 2)]
    assert "images of 160 pixels" in names and len(names) == 10
    names = [case.name for case in costs.list_inference_savings(SWIN, "float32", 2)]
    assert names == ["plain inference", "images of 4 pixels"]


def test_goals_are_judged_by_the_median_of_ratios():
    plain = saving("plain", times=[1.0, 2.0, 1.0], flops=10.0, memory=None)
    met = saving("drop path", times=[0.7, 1.4, 5.0], flops=5.0)
    assert costs.format_saving(met, plain)[1:4] == ["0.70 [0.70, 2.85]", "at most 0.75: met", "0.50"]
    missed = saving("drop path", times=[0.8, 1.6, 0.1], flops=5.0)
    assert costs.format_saving(missed, plain)[2] == "at most 0.75: missed"


def test_each_begins_a_round():
    assert [rotated([1, 2, 3], count) for count in (0, 1, 3)] == [[1, 2, 3], [2, 3, 1], [1, 2, 3]]
    assert rotated([], 5) == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of a peak")
def test_memory_is_the_peak_of_one_step():
    def take(megabytes: int) -> torch.Tensor:
        return torch.ones(megabytes, 2**18).sum()  # gone when the step ends

    large, small = (measure_rise(lambda size=size: take(size), "cpu") / 2**20 for size in (128, 32))
    assert large == pytest.approx(128, abs=16) and small == pytest.approx(32, abs=16)


def test_steps_learn_and_inference_does_not():
    for case in (saving("plain"), saving("masked autoencoder 0.75, small")):
        torch.manual_seed(0)
        model, images = case.build(), torch.randn(case.shape)
        before = [parameter.clone() for parameter in model.parameters()]
        step = costs.make_step(model, images, "float32")
        assert step().ndim == 0
        assert all(parameter.grad is None for parameter in model.parameters())
        assert any(not torch.equal(*pair) for pair in zip(before, model.parameters()))
        first, *_, last = [step().item() for _ in range(50)]
        assert last < first
    model = saving("plain").build().eval()
    assert costs.make_step(model, images, "autocast")().shape == (5, 10)


def test_what_does_not_fit_is_shown_as_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    prepare = costs.prepare

    def short_of_memory(case, *args):
        if case.is_masked:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried | to allocate")
        return prepare(case, *args)

    monkeypatch.setattr(costs, "prepare", short_of_memory)
    costs.main([*QUICK_COSTS, "--parts", "savings", "--dtypes", "autocast"])
    rows = read_rows(capsys.readouterr().out)
    assert [row[1].startswith("failed: OutOfMemoryError: CUDA out of memory. Tried ") for row in rows] == [
        row[0].startswith("masked") for row in rows
    ]


def test_figures_have_three_digits():
    values = [0.01234, 0.1, 1.0, 99.94, 123.4, 1234.5, 0.0]
    assert [format_number(value) for value in values] == ["0.0123", "0.100", "1.00", "99.9", "123", "1,234", "0"]
    assert format_quartiles([1, 2, 3, 4, 5]) == "3.00 [2.00, 4.00]"
    assert format_quartiles([]) == "-"


def test_widths_keep_their_heads():
    config = preset_config(VIT, **costs.widened(VIT, 64))
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (64, 2, 256)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--models", "resnet"], "resnet"),
        (["--models", SWIN, VIT, "--parts", "depth"], SWIN),
        (["--models", VIT, "--widths", "100"], "100"),
        (["--parts", "heads"], "heads"),
        (["--batch_size", "0"], "0"),
        (["--output", "no/such/folder/costs.md"], "no/such/folder"),
    ],
)
def test_costs_refuse_what_they_cannot_time(argv: list[str], named: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as error:
        costs.main(argv)
    assert error.value.code == 2
    assert named in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- loop


def encode(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Five JPEG files, some of them in sub-folders."""
    folder = tmp_path / "photographs"
    for index, place in enumerate(["a", "a", "a/b", "c", "c"]):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / f"{index}.jpg").write_bytes(encode(index))
    return folder


def test_photographs_are_read_from_folders_and_parquet_files(photographs: Path, tmp_path: Path):
    assert sorted(loop.read_photographs(photographs)) == sorted(encode(index) for index in range(5))
    (tmp_path / "parquet").mkdir()
    # Each of a class of its own, which could not be trained on.
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))})
    rows = {"image": [{"bytes": encode(index), "path": None} for index in range(3)], "label": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "parquet" / "train.parquet")
    assert loop.read_photographs(tmp_path / "parquet") == [encode(index) for index in range(3)]
    (photographs / "c" / "5.png").write_bytes(encode(5, "PNG"))
    with pytest.raises(ValueError, match=r"5\.png is of kind PNG, not JPEG"):
        loop.read_photographs(photographs)


def test_a_run_has_more_images_than_it_reads(tmp_path: Path):
    arguments = loop.parse_arguments(["--data", str(tmp_path), *QUICK_LOOP])
    loop.write_photographs([encode(index) for index in range(3)], arguments, tmp_path / "images")
    splits = load_splits(DataArguments(dataset=str(tmp_path / "images"), validation_fraction=0.0))
    assert len(splits["train"]) == 4 * (5 + 2 + 1) and len(splits["test"]) == 2
    files = sorted((tmp_path / "images" / "train").rglob("*.jpg"), key=lambda path: path.name)
    assert [path.read_bytes() for path in files] == [encode(index % 3) for index in range(32)]


def test_rates_of_a_run_are_those_of_its_whole_time():
    # 60 images in 6 and in 2 seconds, of which 3 and 0.2 were waited.
    run = loop.Run(0, 1, "data loader", images_per_second=[10.0, 30.0], data_wait=[0.5, 0.1])
    assert run.rate == pytest.approx(120 / 8)
    assert run.waiting == pytest.approx(3.2 / 8)


def test_cores_load_what_steps_take_less_what_may_be_lost():
    assert loop.count_cores(step_rate=1000, rate_of_core=100) == 10  # 9.5
    assert loop.count_cores(step_rate=1000, rate_of_core=95) == 10
    assert loop.count_cores(step_rate=1000, rate_of_core=94.9) == 11
    assert loop.count_cores(step_rate=10, rate_of_core=500) == 1


def test_parts_are_timed_and_described(photographs: Path, tmp_path: Path):
    arguments = loop.parse_arguments(["--data", str(photographs), *QUICK_LOOP])
    loop.write_photographs(loop.read_photographs(photographs), arguments, tmp_path / "images")
    bare = loop.BareParts(arguments, tmp_path)
    # As in a run with the recipe: 8-bit pixels where the device augments, normalised ones where it was done.
    assert bare.images.__getitems__([0, 1])["pixel_values"].dtype == torch.uint8
    assert bare.augmented_images.__getitems__([0, 1])["pixel_values"].dtype == torch.float32
    assert bare.augmentation.policy is not None
    threads = torch.get_num_threads()
    parts = bare.measure(0, seconds=0)
    assert torch.get_num_threads() == threads
    assert {name: len(seconds) for name, seconds in parts.seconds.items()} == dict.fromkeys(loop.PARTS, 3)

    parts = loop.Parts(0, dict(zip(loop.PARTS, ([1.0, 1.0, 2.0], [0.04, 0.04, 0.2], [0.4] * 3, [0.8] * 3))))
    runs = [loop.Run(0, workers, by, [2.0], [0.25]) for workers in (0, 1) for by in loop.AUGMENTED_BY]
    text = loop.format_tables(runs, [parts], arguments)
    rows = read_rows(text)
    assert rows[0][:5] == ["0", "training device", "0.50 [0.50, 0.50]", "2.00 [2.00, 2.00]", "25.0% [25.0%, 25.0%]"]
    assert [row[4] for row in rows[5:]] == [
        "1", "0.040 [0.040, 0.070]", "0.400 [0.300, 0.400]", "0.800 [0.600, 0.800]"
    ]  # fmt: skip
    assert rows[6][5] == "at most 0.05: met"
    # 4 images a second are taken, and 10 or 5 come from a core.
    assert "must come from 1 core(s)" in text


@pytest.mark.slow
def test_loop_compares_runs_with_the_bare_step(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "loop.md"
    argv = ["--data", str(photographs), *QUICK_LOOP, "--workers", "1", "--repeats", "2", "--seconds", "0"]
    loop.main([*argv, "--no_progress", "--output", str(output)])
    text = output.read_text()
    tables, picture = text.strip().rsplit("\n\n", 1)
    assert tables == capsys.readouterr().out.strip()
    assert picture.endswith("](loop.png)")
    assert str(tmp_path) not in text and "- data: 5 JPEG files, at the median 40 pixels wide, 30 high" in text
    rows = read_rows(text)
    assert [row[:2] for row in rows] == [
        ["1", "training device"],
        ["1", "data loader"],
        ["bare step", "-"],
        *([name, "one core" if name in loop.OF_WORKERS else "1 thread(s)"] for name in loop.PARTS),
    ]
    assert str(tmp_path) not in output.with_suffix(".jsonl").read_text()
    _, *records = map(json.loads, output.with_suffix(".jsonl").read_text().splitlines())
    runs = [record for record in records if "workers" in record]
    assert [(run["round"], run["augmented_by"]) for run in runs] == [
        (0, "training device"),
        (0, "data loader"),
        (1, "training device"),
        (1, "data loader"),
    ]
    for run in runs:
        assert len(run["images_per_second"]) == len(run["data_wait"]) == loop.LINES - 1
        assert all(0 <= share <= 1 for share in run["data_wait"])
    with PIL.Image.open(output.with_suffix(".png")) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400


@pytest.mark.parametrize(
    "argv, named",
    [
        ([], "--data"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--data", ".", "--steps", "7"], "--steps 7"),
        (["--data", ".", "--workers", "-1"], "-1"),
        (["--data", "PHOTOGRAPHS", "--recipe", "finetun"], "finetun"),
        (["--data", "PHOTOGRAPHS", "--model", "vit_nano"], "vit_nano"),
    ],
)
def test_loop_refuses_what_it_cannot_run(argv: list[str], named: str, photographs: Path, capsys: pytest.CaptureFixture):
    argv = [str(photographs) if word == "PHOTOGRAPHS" else word for word in argv]
    with pytest.raises(SystemExit) as error:
        loop.main([*argv, "--device", "cpu"])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message
