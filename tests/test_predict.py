"""Predictions for many images: what the rows say, where images come from, and what is left when something ends it."""

import csv
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_finetune import error_of
from tiny_models import scramble, tiny_model
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from modeling_vit_custom import ViTCustomForImageClassification
from trainers import image_sources, inference, predict, row_files


ROOT = Path(__file__).parents[1]
COUNT = 45
SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
LABELS = {index: f"class, {index}" for index in range(5)}  # with a comma, for CSV


def save_model(folder: Path, model: torch.nn.Module) -> str:
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    tiny = tiny_model(ViTCustomForImageClassification, "vit", id2label=LABELS)
    return save_model(tmp_path_factory.mktemp("model"), tiny)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(predict, "BLOCK_ROWS", 8)


def encode(index: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (20 + index % 3, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def save_images(folder: Path, count: int = COUNT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index:03}.png").write_bytes(encode(index))
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return save_images(tmp_path / "photos")


def save_parquet(file: Path, count: int = COUNT, **options) -> Path:
    """The images of `save_images`, in row groups of ten."""
    file.parent.mkdir(exist_ok=True)
    rows = [{"bytes": encode(index), "path": f"{index:03}.png"} for index in range(count)]
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict({"label": [0] * count, "image": rows}, features=features)
    pq.write_table(table.data.table, file, row_group_size=10, **options)
    return file


def run(model: str, *argv: object, options: tuple = ()) -> list[dict]:
    """Rows of the output, which is the last of the arguments."""
    *images, output = map(str, argv)
    predict.main([model, *images, "--output", output, "--num_workers", "0", "--batch_size", "3", *map(str, options)])
    return read(output)


def read(output: str | Path) -> list[dict]:
    """Rows of any format, as those of JSONL."""
    output = Path(output)
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
    if output.suffix == ".parquet":
        return pq.read_table(output).to_pylist()
    rows = []
    for line in csv.DictReader(output.open(encoding="utf-8", newline="")):
        best = [int(name.removeprefix("label_")) for name in line if name.startswith("label_")]
        broken = bool(line["error"])
        rows.append(
            {
                "row": int(line["row"]),
                "image": line["image"] or None,
                "labels": None if broken else [line[f"label_{rank}"] for rank in best],
                "probabilities": None if broken else [float(line[f"probability_{rank}"]) for rank in best],
                "error": line["error"] or None,
            }
        )
    return rows


def scores(row: dict) -> dict[str, float]:
    return dict(zip(row["labels"], row["probabilities"]))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_rows_say_what_the_pipeline_says(tmp_path, photos, suffix, problem_type):
    tiny = tiny_model(ViTCustomForImageClassification, "vit", id2label=LABELS, problem_type=problem_type)
    model = save_model(tmp_path / "model", tiny)
    rows = run(model, photos, tmp_path / f"rows.{suffix}", options=("--top_k", 3))
    files = sorted(map(str, photos.iterdir()))
    classifier = pipeline("image-classification", model=model, device="cpu")
    assert [row["row"] for row in rows] == list(range(COUNT))
    assert [row["image"] for row in rows] == files
    for row, expected in zip(rows, classifier(files, top_k=3)):
        assert list(row) == ["row", "image", "labels", "probabilities", "error"]
        assert row["labels"] == [answer["label"] for answer in expected]
        assert row["probabilities"] == pytest.approx([answer["score"] for answer in expected], abs=1e-6)
        assert row["error"] is None


def test_formats_hold_the_same_single_precision_numbers(tmp_path, model, photos):
    options = ("--features",)
    jsonl, parquet = (
        run(model, photos, tmp_path / f"rows.{suffix}", options=options) for suffix in ("jsonl", "parquet")
    )
    table = run(model, photos, tmp_path / "rows.csv")
    for name in ("probabilities", "features"):
        exact = np.array([row[name] for row in parquet], dtype=np.float32)
        assert (np.array([row[name] for row in jsonl]).astype(np.float32) == exact).all()
    exact = np.array([row["probabilities"] for row in parquet], dtype=np.float32)
    assert (np.array([row["probabilities"] for row in table]).astype(np.float32) == exact).all()
    assert pq.read_schema(tmp_path / "rows.parquet").field("features").type == pa.list_(pa.float32())
    assert datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=tmp_path)[0] == parquet[0]


def test_nine_digits_are_enough():
    values = np.random.default_rng(0).integers(0, 2**31, 20_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    assert (np.array(row_files.shorten(values.tolist())).astype(np.float32) == values).all()


def test_workers_and_batches_change_nothing_but_the_last_digits(tmp_path, model, photos):
    one = run(model, photos, tmp_path / "one.jsonl")
    run(model, photos, tmp_path / "two.jsonl", options=("--num_workers", 2))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    large = run(model, photos, tmp_path / "large.jsonl", options=("--batch_size", 8, "--num-workers", 2))
    for row, other in zip(one, large, strict=True):
        assert row["image"] == other["image"]
        assert scores(row) == pytest.approx(scores(other), abs=1e-6)


def test_bf16_and_another_size_are_obeyed(tmp_path, model, photos):
    plain = run(model, photos, tmp_path / "plain.jsonl")
    halved = run(model, photos, tmp_path / "bf16.jsonl", options=("--bf16",))
    larger = run(model, photos, tmp_path / "large.jsonl", options=("--image_size", 48))
    differences = [
        max(
            abs(scores(row)[label] - value) for row, other in zip(plain, rows) for label, value in scores(other).items()
        )
        for rows in (halved, larger)
    ]
    assert 1e-6 < differences[0] < 0.1
    assert differences[1] > 1e-3


# What is classified.


def test_images_come_in_the_order_of_the_arguments(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(Path("photos/b"), 2)
    save_images(Path("photos/a.png"), 1)  # a folder by the name of an image
    save_images(Path("photos/b/deeper"), 1)
    save_images(Path("photos/.hidden"), 1)
    save_images(Path("photos"), 1)
    for name in ("photos/notes.txt", "photos/b/.DS_Store.png"):
        Path(name).write_bytes(b"no image")
    save_parquet(Path("data/train.parquet"), 2)
    walked = ["photos/000.png", "photos/a.png/000.png", "photos/b/000.png", "photos/b/001.png"]
    walked += ["photos/b/deeper/000.png"]

    def images(*given):
        return [row["image"] for row in run(model, *given, "rows.jsonl", options=("--overwrite", "--top_k", 1))]

    assert images("photos") == walked
    assert images("photos/b/001.png", "data", "photos/000.png") == [
        "photos/b/001.png",
        "000.png",
        "001.png",
        "photos/000.png",
    ]
    assert images("photos/**/*.png") == walked
    assert images("photos/*/*1.png") == ["photos/b/001.png"]
    assert images("photos/b*") == walked[2:]  # as when a shell puts the folder in its place
    assert images("*/b/?0[0].png") == ["photos/b/000.png"]
    assert images("./photos/*.png") == ["./photos/000.png", "./photos/a.png/000.png"]
    assert images(f"{tmp_path}/photos/b/*/*") == [f"{tmp_path}/photos/b/deeper/000.png"]
    Path("photos/[x].png").write_bytes(encode(0))
    assert images("photos/[x].png") == ["photos/[x].png"]  # the file itself, not a pattern


def test_links_are_followed_but_not_in_circles(tmp_path, model):
    photos, elsewhere = save_images(tmp_path / "photos", 1), save_images(tmp_path / "elsewhere", 2)
    (photos / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)
    (photos / "self.png").symlink_to(photos / "self.png")
    (photos / "gone.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(photos / "pipe.png")  # whoever opens it waits
    rows = run(model, photos, tmp_path / "rows.jsonl")
    names = [row["image"].removeprefix(f"{photos}/") for row in rows]
    assert names == ["000.png", "gone.png", "self.png", "more/000.png", "more/001.png"]
    assert ["cannot be decoded" in (row["error"] or "") for row in rows] == [False, True, True, False, False]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_names_of_any_bytes_are_written(tmp_path, model, suffix):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"caf\xe9.png", "Größe, 大.png".encode(), b'two\nlines "quoted".png', b"line\xe2\x80\xa8.png"):
        Path(os.fsdecode(os.fsencode(photos) + b"/" + name)).write_bytes(encode(0))
    (Path(os.fsdecode(os.fsencode(photos) + b"/broken\xff.png"))).write_bytes(b"")
    rows = run(model, photos, tmp_path / f"rows.{suffix}")
    names = [row["image"].removeprefix(f"{photos}/") for row in rows]
    expected = ["Größe, 大.png", "broken\\udcff.png", "caf\\udce9.png", "line\u2028.png", 'two\nlines "quoted".png']
    assert sorted(names) == sorted(expected)
    assert sum(row["error"] is not None for row in rows) == 1


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary", "paths", "bytes alone"])
def test_parquet_files_of_all_kinds(tmp_path, model, photos, kind):
    contents = [encode(index) for index in range(COUNT)]
    column = {
        "struct": pa.array([{"bytes": each, "path": None} for each in contents]),
        "binary": pa.array(contents),
        "large_binary": pa.array(contents, pa.large_binary()),
        "paths": pa.array(sorted(map(str, photos.iterdir()))),
        "bytes alone": pa.array([{"bytes": each} for each in contents]),
    }[kind]
    pq.write_table(pa.table({"id": range(COUNT), "picture": column}), tmp_path / "a.parquet", row_group_size=7)
    options = ("--image_column", "picture") if kind == "paths" else ()
    rows = run(model, tmp_path / "a.parquet", tmp_path / "rows.jsonl", options=options)
    expected = run(model, photos, tmp_path / "expected.jsonl")
    assert [row["labels"] for row in rows] == [row["labels"] for row in expected]
    assert [row["probabilities"] for row in rows] == [row["probabilities"] for row in expected]
    assert [row["image"] for row in rows] == [row["image"] if kind == "paths" else None for row in expected]


@pytest.fixture
def hub_data(tmp_path, monkeypatch):
    """A data set that the Hub's client finds, and what it was asked for; its commit can be changed."""
    save_parquet(tmp_path / "hub" / "train.parquet", 20)
    save_parquet(tmp_path / "hub" / "test.parquet", 11)
    load, asked = datasets.load_dataset, {"sha": "c0ffee"}

    def load_dataset(name, config=None, revision=None, **options):
        asked.update(name=name, config=config, revision=revision, **options)
        if name != "user/data":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return load(str(tmp_path / "hub"), **options)

    class Api:
        def dataset_info(self, name):
            return type("Info", (), {"sha": asked["sha"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(image_sources, "HfApi", Api)
    return asked


def test_a_data_set_on_the_hub_is_streamed(tmp_path, model, hub_data):
    rows = run(model, "user/data", tmp_path / "rows.jsonl", options=("--split", "test"))
    assert [row["image"] for row in rows] == [f"{index:03}.png" for index in range(11)]
    assert hub_data["streaming"] is True
    assert hub_data["revision"] == "c0ffee"
    expected = run(model, tmp_path / "hub" / "test.parquet", tmp_path / "expected.jsonl")
    assert rows == expected


def test_errors_of_data_sets_on_the_hub_are_one_line(tmp_path, model, hub_data, capsys, monkeypatch):
    argv = ["--output", str(tmp_path / "rows.jsonl")]
    assert "splits train, test: pass --split" in error_of(capsys, [model, "user/data", *argv], predict.main)
    wrong = error_of(capsys, [model, "user/data", "--split", "tset", *argv], predict.main)
    assert "user/data" in wrong and "tset" in wrong
    missing = error_of(capsys, [model, "user/nothing", *argv], predict.main)
    assert "no file or folder 'user/nothing'" in missing and "doesn't exist on the Hub" in missing
    wrong = [model, "user/data", "--split", "test", "--image_column", "picture", *argv]
    assert "--image_column 'picture' is no column" in error_of(capsys, wrong, predict.main)
    interrupt_after(monkeypatch, 0)
    with pytest.raises(SystemExit, match="130"):
        run(model, "user/data", argv[1], options=("--split", "test"))
    capsys.readouterr()
    hub_data["sha"] = "decaf"
    moved = error_of(capsys, [model, "user/data", "--split", "test", *argv], predict.main)
    assert "the commit c0ffee, not with the commit decaf" in moved


# Broken images.


def bomb() -> bytes:
    """A PNG that says it has 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(file, "png")
    return file.getvalue()


BROKEN = {
    0: (b"", "cannot be decoded (cannot identify image file"),
    3: (b"no image", "cannot be decoded (cannot identify image file"),
    4: (encode(0)[:700], "truncated"),
    8: (bomb(), "decompression bomb"),
    9: (sixteen_bits(), "has mode I;16"),
    # A whole batch, and the last one.
    **dict.fromkeys((16, 17, 18, 43, 44), (b"", "cannot be decoded")),
}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_broken_images_are_rows_of_their_own(tmp_path, model, photos, suffix, source, capsys):
    sound = run(model, photos, tmp_path / "sound.jsonl")
    for index, (content, _) in BROKEN.items():
        (photos / f"{index:03}.png").write_bytes(content)
    files = sorted(photos.iterdir())
    if source == "parquet":
        column = pa.array([{"bytes": file.read_bytes(), "path": file.name} for file in files])
        pq.write_table(pa.table({"image": column}), tmp_path / "images.parquet")
    capsys.readouterr()
    given = photos if source == "folder" else tmp_path / "images.parquet"
    rows = run(model, given, tmp_path / f"rows.{suffix}", options=("--num_workers", 1))
    printed = capsys.readouterr()
    name = str(photos / "000.png") if source == "folder" else "000.png"
    assert f"45 rows; 10 broken images (the first, {name}, cannot be decoded (" in printed.out
    assert "Warning" not in printed.err
    for index, (row, before) in enumerate(zip(rows, sound, strict=True)):
        assert row["row"] == index
        if index in BROKEN:
            assert BROKEN[index][1] in row["error"]
            assert row["labels"] is None and row["probabilities"] is None
            assert "0x" not in row["error"]  # an address, which is another one each time
        else:
            assert row["error"] is None
            assert scores(row) == pytest.approx(scores(before), abs=1e-6)


def test_images_that_are_missing_or_cannot_be_prepared_are_rows_of_their_own(tmp_path, model, monkeypatch):
    column = pa.array([{"bytes": encode(0), "path": None}, None, {"bytes": None, "path": None}])
    pq.write_table(pa.table({"image": column}), tmp_path / "images.parquet")
    rows = run(model, tmp_path / "images.parquet", tmp_path / "rows.jsonl")
    assert [bool(row["error"]) for row in rows] == [False, True, True]
    assert rows[1]["error"] == "is missing"
    assert rows[0]["image"] is None

    class Fussy(ViTImageProcessor):
        def __call__(self, images, **options):
            if any(image.width == 1 for image in images):
                raise MemoryError("out of\nmemory")
            return super().__call__(images, **options)

    photos = save_images(tmp_path / "photos", 5)
    Image.new("RGB", (1, 9)).save(photos / "002.png")
    processor = Fussy(size={"height": 32, "width": 32})
    monkeypatch.setattr("trainers.inference.open_processor", lambda arguments: processor)
    rows = run(model, photos, tmp_path / "fussy.jsonl")
    assert [row["error"] for row in rows] == [None, None, "cannot be prepared (out of memory)", None, None]


def test_large_images_are_prepared_a_few_at_a_time(tmp_path, model, photos, monkeypatch):
    expected = run(model, photos, tmp_path / "expected.jsonl")
    sizes, transform = [], predict.processor_transform

    def watched(processor):
        return lambda images: sizes.append(len(images)) or transform(processor)(images)

    monkeypatch.setattr(predict, "processor_transform", watched)
    monkeypatch.setattr("trainers.data.MAX_PIXELS", 700)
    assert run(model, photos, tmp_path / "rows.jsonl") == expected
    assert set(sizes) == {1, 2}


def test_values_that_are_not_finite_are_errors(tmp_path, photos):
    theirs = ViTForImageClassification(ViTConfig(**SMALL))
    with torch.no_grad():
        theirs.classifier.bias[0] = torch.nan
    with pytest.raises(SystemExit, match="no image could be classified"):
        run(save_model(tmp_path / "model", theirs), photos, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["error"] for row in rows} == {"gives the model's output a value that is not finite"}


def test_an_output_among_the_images_is_refused(model, tmp_path, photos, capsys):
    source = tmp_path / "images.parquet"
    run(model, photos, source)
    before = source.read_bytes()
    with pytest.raises(SystemExit):
        predict.main([model, str(source), "--output", str(source), "--overwrite"])
    assert "is among the images: give another place" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_another_parquet_file_of_the_same_name_is_noticed(tmp_path):
    features, file, keys = datasets.Features({"image": datasets.Image()}), tmp_path / "images.parquet", []
    for first in (0, 100):
        images = [np.full((8, 8, 3), first + row, np.uint8) for row in range(20)]
        datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(file)
        keys.append({row.key for row in image_sources.LocalImages([str(file)]).read(lambda number: True)})
    assert len(keys[0]) == len(keys[1]) == 20
    assert not keys[0] & keys[1]


# Features.


def features_of(model: str, photos: Path, output: Path) -> np.ndarray:
    return np.array([row["features"] for row in run(model, photos, output, options=("--features",))])


def pixels_of(photos: Path) -> torch.Tensor:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return processor([Image.open(file) for file in sorted(photos.iterdir())], return_tensors="pt")["pixel_values"]


def test_features_are_what_the_encoder_pools(tmp_path, photos, architecture):
    tiny = tiny_model(ViTCustomForImageClassification, architecture)
    features = features_of(save_model(tmp_path / "model", tiny), photos, tmp_path / "rows.jsonl")
    with torch.no_grad():
        expected = tiny.model(pixels_of(photos)).pooler_output
    assert features == pytest.approx(expected.numpy(), abs=1e-5)


def test_features_of_other_libraries_are_what_their_heads_read(tmp_path, photos):
    theirs = scramble(ViTForImageClassification(ViTConfig(**SMALL))).eval()
    features = features_of(save_model(tmp_path / "vit", theirs), photos, tmp_path / "vit.parquet")
    with torch.no_grad():
        expected = theirs.vit(pixels_of(photos)).last_hidden_state[:, 0]
    assert features == pytest.approx(expected.numpy(), abs=1e-5)

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    data = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    names = {"label_names": list("abcde"), "pretrained_cfg": data}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=options, **names)
    config.num_labels = 5
    timm_model = TimmWrapperForImageClassification(config).eval()
    timm_model.save_pretrained(tmp_path / "timm")
    features = features_of(str(tmp_path / "timm"), photos, tmp_path / "timm.parquet")
    assert features.shape == (COUNT, 16)
    logits = timm_model.timm_model.get_classifier()(torch.tensor(features, dtype=torch.float32))
    probabilities = logits.softmax(dim=1).sort(dim=1, descending=True).values.detach().numpy()
    rows = read(tmp_path / "timm.parquet")
    assert probabilities == pytest.approx(np.array([row["probabilities"] for row in rows]), abs=1e-5)


def test_a_model_with_two_heads_is_refused_features(tmp_path, photos, capsys):
    model = save_model(tmp_path / "deit", DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL)))
    argv = [model, str(photos), "--features", "--output", str(tmp_path / "rows.jsonl")]
    message = error_of(capsys, argv, predict.main)
    assert "--features: a DeiTForImageClassificationWithTeacher has no one head" in message
    assert not (tmp_path / "rows.jsonl.parts").exists()


# Interrupted and started again.


def interrupt_after(monkeypatch, blocks: int):
    """Presses Ctrl-C in a block, behind its first batch if it has several, and never again."""
    original = predict.Prediction.add_rows

    def add_rows(self, batch, columns):
        if batch["block"] == blocks and (columns["row"] or len(batch["names"]) == predict.BLOCK_ROWS):
            monkeypatch.setattr(predict.Prediction, "add_rows", original)
            raise KeyboardInterrupt
        original(self, batch, columns)

    monkeypatch.setattr(predict.Prediction, "add_rows", add_rows)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_ctrl_c_and_the_same_command_go_on(tmp_path, model, photos, suffix, source, monkeypatch, capsys):
    given = photos if source == "folder" else save_parquet(tmp_path / "data" / "images.parquet")
    (photos / "011.png").write_bytes(b"broken")
    run(model, given, tmp_path / f"whole.{suffix}")
    output, decoded, decode = tmp_path / f"rows.{suffix}", [], predict.decode
    monkeypatch.setattr(predict, "decode", lambda encoded: decoded.append(1) or decode(encoded))
    for blocks in (2, 4):
        interrupt_after(monkeypatch, blocks)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_status:
            run(model, given, output)
        assert exit_status.value.code == 130
        assert capsys.readouterr().err.rstrip().endswith(f"--output {output} --num_workers 0 --batch_size 3`")
        assert len(list(Path(f"{output}.parts").glob("part-*"))) == blocks
        assert not output.exists()
    before = len(decoded)
    (Path(f"{output}.parts") / "part-00000004-8-aa.arrow.tmp").write_bytes(b"half")  # what SIGKILL leaves
    run(model, given, output)
    assert len(decoded) - before == COUNT - 4 * 8
    assert "45 rows, 32 of them from before; " in capsys.readouterr().out
    assert output.read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert not Path(f"{output}.parts").exists()


def test_row_groups_that_are_done_are_not_read_again(tmp_path, model, monkeypatch):
    file, read_groups, iterate = save_parquet(tmp_path / "data" / "images.parquet"), [], pq.ParquetFile.iter_batches

    def watched(self, *args, row_groups, **options):
        read_groups.extend(row_groups)
        return iterate(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    interrupt_after(monkeypatch, 3)
    with pytest.raises(SystemExit):
        run(model, file, tmp_path / "rows.jsonl")
    read_groups.clear()
    run(model, file, tmp_path / "rows.jsonl")
    assert read_groups == [2, 3, 4]  # 24 rows are done, of row groups of ten


def test_a_killed_joining_goes_on(tmp_path, model, photos, monkeypatch):
    run(model, photos, tmp_path / "whole.jsonl")
    output, replace = tmp_path / "rows.jsonl", os.replace

    def kill_at_the_end(source, target):
        if target == output:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(os, "replace", kill_at_the_end)
        run(model, photos, output)
    assert not output.exists()
    monkeypatch.setattr(predict.Prediction, "add_rows", None)  # nothing is left to classify
    run(model, photos, output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


OTHER_ARGUMENTS = {
    "--top_k 5, not with --top_k 2": ("--top_k", 2),
    "--bf16 False, not with --bf16 True": ("--bf16",),
    "--image_size None, not with --image_size 16": ("--image_size", 16),
    "--features False, not with --features True": ("--features",),
    "--revision main, not with --revision other": ("--revision", "other"),
}


def test_other_arguments_do_not_go_on(tmp_path, model, photos, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    interrupt_after(monkeypatch, 2)
    with pytest.raises(SystemExit):
        run(model, photos, output)
    capsys.readouterr()
    argv = [model, str(photos), "--output", str(output), "--num_workers", "0"]
    for message, options in OTHER_ARGUMENTS.items():
        told = error_of(capsys, [*argv, *map(str, options)], predict.main)
        assert f"was begun with {message}: take the same arguments to go on, or --overwrite" in told
    told = error_of(capsys, [model, str(photos), str(photos), *argv[2:]], predict.main)
    assert f"images {photos}, not with images {photos} {photos}" in told
    # The same name, other weights.
    other = tmp_path / "other"
    save_model(other, tiny_model(ViTCustomForImageClassification, "vit", seed=1, id2label=LABELS))
    trained = ViTCustomForImageClassification.from_pretrained(other)
    with monkeypatch.context() as patch:
        patch.setattr("trainers.inference._open_model", lambda *arguments: trained)
        assert "was begun with weights and preparation" in error_of(capsys, argv, predict.main)
    # What may differ.
    predict.main([*argv, "--batch_size", "5"])
    assert [row["row"] for row in read(output)] == list(range(COUNT))


@pytest.mark.parametrize("change", ["fewer", "more", "renamed", "many fewer"])
def test_images_that_changed_are_noticed(tmp_path, model, photos, change, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    interrupt_after(monkeypatch, 3)
    with pytest.raises(SystemExit):
        run(model, photos, output)
    capsys.readouterr()
    if change == "fewer":
        (photos / "007.png").unlink()
    elif change == "more":
        (photos / "0000.png").write_bytes(encode(0))
    elif change == "renamed":
        (photos / "020.png").rename(photos / "0195.png")
    else:
        for index in range(16, COUNT):
            (photos / f"{index:03}.png").unlink()
    argv = [model, str(photos), "--output", str(output), "--num_workers", "0"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_status:
        patch.setattr(predict.Prediction, "add_rows", None)  # it is noticed before anything is classified
        predict.main(argv)
    assert exit_status.value.code == 2
    assert "the images are not those that this output was begun with" in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists()
    predict.main([*argv, "--overwrite"])
    assert [row["image"] for row in read(output)] == sorted(map(str, photos.iterdir()))


def test_what_was_done_by_an_overwriting_run_goes_on_without_it(tmp_path, model, photos, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    run(model, photos, output, options=("--top_k", 1))
    before = output.read_bytes()
    argv = [model, str(photos), "--output", str(output), "--num_workers", "0"]
    assert "is there already: --overwrite replaces it" in error_of(capsys, argv, predict.main)
    interrupt_after(monkeypatch, 2)
    with pytest.raises(SystemExit):
        predict.main([*argv, "--overwrite"])
    assert output.read_bytes() == before  # until the new one is whole
    assert "--overwrite" not in capsys.readouterr().err.splitlines()[-1]
    predict.main(argv)
    assert "16 of them from before" in capsys.readouterr().out
    assert len(read(output)[0]["labels"]) == 5


def test_two_commands_do_not_write_one_output(tmp_path, model, photos, capsys):
    output, parts = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.parts"
    code = "import sys; from trainers.row_files import Parts; from pathlib import Path\n"
    code += "parts = Parts(Path(sys.argv[1])); parts.begin({}, False); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        argv = [model, str(photos), "--output", str(output), "--overwrite"]
        assert "another process is writing" in error_of(capsys, argv, predict.main)
        assert (parts / "manifest.json").exists()
        other.stdin.close()
    predict.main([*argv, "--num_workers", "0"])
    assert not parts.exists()


def test_files_that_are_not_ours_stay(tmp_path, model, photos):
    parts = tmp_path / "rows.jsonl.parts"
    parts.mkdir()
    (parts / "letter.txt").write_text("dear")
    run(model, photos, tmp_path / "rows.jsonl")
    assert [path.name for path in parts.iterdir()] == ["letter.txt"]


def test_a_source_that_fails_is_one_line_and_goes_on(tmp_path, model, hub_data, monkeypatch, capsys):
    read, output = image_sources.HubImages.read, tmp_path / "rows.jsonl"

    def cut(self, is_needed):
        for number, row in enumerate(read(self, is_needed)):
            if number == 9:
                raise ConnectionError("the network\nis gone")
            yield row

    options = ("--split", "test")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as raised:
        patch.setattr(image_sources.HubImages, "read", cut)
        run(model, "user/data", output, options=options)
    assert "images cannot be read on: the network is gone; nothing is lost" in raised.value.code
    assert len(run(model, "user/data", output, options=options)) == 11


# A command of its own: signals, disks, several processes.

SCRIPT = """
import os, resource, sys, time
sys.path.insert(0, {root!r})
from trainers import predict
predict.BLOCK_ROWS = 8
original = predict.Prediction.add_rows
def add_rows(self, batch, columns):
    time.sleep({seconds})
    original(self, batch, columns)
predict.Prediction.add_rows = add_rows
{more}
if __name__ == "__main__":
    predict.main()
"""


def command(tmp_path: Path, *argv: object, seconds: float = 0.0, more: str = "", processes: int = 1) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), seconds=seconds, more=more))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    options = ["--num_workers", "1", "--batch_size", "3", "--use_cpu"]
    return [sys.executable, *launcher, str(script), *map(str, argv), *options]


def end(arguments: list[str], parts: Path, blocks: int, number: int) -> subprocess.Popen:
    """Sends a signal as soon as so many blocks are done."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(parts.glob("part-*.arrow"))) < blocks:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    process.output = process.communicate(timeout=60)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_killed_and_started_again_it_gives_the_same_bytes(tmp_path, model, photos, suffix):
    (photos / "011.png").write_bytes(b"broken")
    run(model, photos, tmp_path / f"whole.{suffix}")
    output = tmp_path / f"rows.{suffix}"
    parts = Path(f"{output}.parts")
    arguments = command(tmp_path, model, photos, "--output", output, seconds=0.1)
    for blocks in (1, 3, 4):
        assert end(arguments, parts, blocks, signal.SIGKILL).returncode == -signal.SIGKILL
        assert not output.exists()
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "of them from before" in done.stdout
    assert output.read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_cleanly(tmp_path, model, photos, number, status):
    output = tmp_path / "rows.jsonl"
    arguments = command(tmp_path, model, photos, "--output", output, seconds=0.1)
    process = end(arguments, tmp_path / "rows.jsonl.parts", 2, number)
    assert process.returncode == status, process.output
    errors = process.output[1]
    assert "Traceback" not in errors
    assert errors.rstrip().endswith("`") and "predict: interrupted; nothing is lost: go on by `python -m" in errors
    assert not list((tmp_path / "rows.jsonl.parts").glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("order", [(2, 1), (1, 2), (2, 2)])
def test_processes_share_the_work_and_one_goes_on_for_two(tmp_path, model, photos, order):
    run(model, photos, tmp_path / "whole.jsonl")
    output, parts = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.parts"
    first, second = (command(tmp_path, model, photos, "--output", output, seconds=0.1, processes=n) for n in order)
    process = end(first, parts, 2, signal.SIGTERM)
    assert not output.exists(), process.output
    time.sleep(1)  # what torchrun started ends a little after it
    done = subprocess.run(second, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{output}: 45 rows") == 1
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not parts.exists()


@pytest.mark.slow
def test_a_mistake_of_two_processes_is_told_once(tmp_path, model, photos):
    for argv, message in {
        (model, photos, "--output", tmp_path / "rows.txt"): "must end with",
        (tmp_path, photos, "--output", tmp_path / "rows.csv"): "holds no config.json",
        (model, photos, "--output", tmp_path / "rows.csv", "--top_k", 9): "--top_k 9 is more than the 5 classes",
    }.items():
        done = subprocess.run(command(tmp_path, *argv, processes=2), capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert len([line for line in done.stderr.splitlines() if "predict: error" in line and message in line]) == 1
        assert not list(tmp_path.glob("*.parts"))


FULL_DISK = "resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("limit", [1200, 3000])  # of a part, and of what they are joined to
def test_a_full_disk_leaves_nothing_half_written(tmp_path, model, photos, suffix, limit, monkeypatch):
    monkeypatch.chdir(tmp_path)  # parts hold names, whose length would be that of the temporary folder's
    run(model, photos.name, f"whole.{suffix}")
    output = tmp_path / f"rows.{suffix}"
    parts = Path(f"{output}.parts")
    argv = (model, photos.name, "--output", output.name)
    # Without workers, whose shared memory would be full as well.
    arguments = [*command(tmp_path, *argv, more=FULL_DISK.format(limit=limit)), "--num_workers", "0"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "predict: error" in line]
    assert "could not be written (File too large); nothing is lost" in line
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert not output.exists()
    assert not list(parts.glob("*.tmp"))
    assert len(list(parts.glob("part-*"))) == (0 if limit == 1200 else 6)
    done = subprocess.run(command(tmp_path, *argv), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


@pytest.mark.slow
def test_a_killed_reader_is_one_line(tmp_path, model, photos):
    more = "decode = predict.decode\n"
    more += "predict.decode = lambda encoded: os.kill(os.getpid(), 9) if '020' in encoded['path'] else decode(encoded)"
    arguments = command(tmp_path, model, photos, "--output", tmp_path / "rows.jsonl", more=more)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    # Above it torch may say that its own tidying up was disturbed.
    assert "a process that reads images was killed" in done.stderr.splitlines()[-1]


def test_a_killed_reader_is_noticed_once(monkeypatch):
    """Also where its end is heard of after what it was handing over is missed."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    try:
        batches = iter(torch.utils.data.DataLoader(range(8), num_workers=1))
        next(batches)
        with pytest.raises(inference.ReadersKilledError), inference.noticing_killed_readers():
            raise ConnectionResetError
        for process in multiprocessing.active_children():
            process.kill()
        time.sleep(0.5)  # where PyTorch would raise
    finally:
        signal.signal(signal.SIGCHLD, before)


# What is refused, each in one line.


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    save_images(tmp_path / "photos", 3)
    save_parquet(tmp_path / "data" / "images.parquet", 3)
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), "texts.parquet")
    pq.write_table(pa.table({"a": [b""], "b": [b""]}), "two.parquet")
    for name in ("broken.parquet", "photos/notes.txt"):
        Path(name).write_bytes(b"no parquet")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("model photos", "--output"),
        ("model --output a.jsonl", "IMAGES"),
        ("model photos --output a.txt", "--output 'a.txt' must end with .jsonl, .csv, .parquet"),
        ("model photos --output nowhere/a.csv", "there is no folder 'nowhere'"),
        ("model photos --output photos/a.csv --top_k 0", "0 must be at least 1"),
        ("model photos --output a.csv --top-k 6", "--top_k 6 is more than the 5 classes of 'model'"),
        ("model photos --output a.csv --features", "--features does not fit in CSV"),
        ("model photos --output a.csv --batch_size x", "'x' is no whole number"),
        ("model photos --output a.csv --wrong", "--wrong"),
        ("modle photos --output a.csv", "there is no classifier 'modle'"),
        ("empty photos --output a.csv", "'empty' holds no config.json"),
        ("model photso --output a.csv", "there is no file or folder 'photso'"),
        ("model photos/none.png --output a.csv", "there is no file or folder 'photos/none.png'"),
        ("model photos some/data --output a.csv", "must be given alone"),
        ("model photos/*.jpg --output a.csv", "'photos/*.jpg' leads to no images"),
        ("model nowhere/*.jpg --output a.csv", "'nowhere/*.jpg' leads to no images"),
        ("model photos empty --output a.csv", "'empty' leads to no images"),
        ("model texts.parquet --output a.csv", "'texts.parquet': the data set has no image columns among id, text"),
        ("model two.parquet --output a.csv", "several image columns among a, b: pass --image_column"),
        ("model data --image_column id --output a.csv", "--image_column 'id' is no column"),
        ("model data --image_column label --output a.csv", "'label' of 'data/images.parquet' is of type int64"),
        ("model photos --image_column image --output a.csv", "--image_column 'image' is for parquet files"),
        ("model broken.parquet --output a.csv", "cannot read 'broken.parquet'"),
        ("model photos --split test --output a.csv", "--split 'test' is for data sets on the Hub"),
        ("model photos --dataset_config c --output a.csv", "--dataset_config 'c' is for data sets on the Hub"),
    ],
)
def test_mistakes_are_one_line(place, argv, message, capsys):
    assert message in error_of(capsys, argv.split(), predict.main)
    assert not list(place.glob("*.parts"))


def test_outputs_that_cannot_be_are_refused_before_the_model_is_opened(place, capsys, monkeypatch):
    monkeypatch.setattr(predict, "open_classifier", None)
    Path("there.csv").write_text("row\n")
    Path("folder.csv").mkdir()
    assert "'there.csv' is there already" in error_of(
        capsys, ["model", "photos", "--output", "there.csv"], predict.main
    )
    assert "'folder.csv' is a folder" in error_of(capsys, ["model", "photos", "--output", "folder.csv"], predict.main)


def test_models_that_tell_no_probabilities_or_fit_no_batch_are_refused(tmp_path, photos, capsys):
    tiny = tiny_model(ViTCustomForImageClassification, "vit", problem_type="regression")
    argv = [save_model(tmp_path / "model", tiny), str(photos), "--output", str(tmp_path / "rows.csv")]
    assert "is a regression model" in error_of(capsys, argv, predict.main)


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        predict.main(["--help"])
    assert "torchrun --nproc_per_node 4 -m trainers.predict" in capsys.readouterr().out
