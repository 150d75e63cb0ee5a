"""The demo in spaces/: its answers, everything it must refuse, and the command that starts it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from PIL import Image
from tiny_models import tiny_model
from transformers import CLIPImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from modeling_vit_custom import ViTCustomForImageClassification
from modeling_vit_custom.interpretability import (
    attention_map,
    attention_rollout,
    grad_cam,
    gradient_attention,
    gradient_rollout,
    to_pixels,
)
from modeling_vit_custom.interpretability.figures import overlay


gradio = pytest.importorskip("gradio")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "spaces"))  # as the command has it

import app  # noqa: E402
import page  # noqa: E402
import uploads  # noqa: E402
from classifier import (  # noqa: E402
    ATTENTION,
    GRAD_CAM,
    GRADIENT_ATTENTION,
    GRADIENT_ROLLOUT,
    ROLLOUT,
    Classifier,
    UnusableModelError,
    distinct_labels,
    load_classifier,
)
from page import LAUNCH_OPTIONS, build_demo  # noqa: E402
from uploads import (  # noqa: E402
    DELETED,
    MAX_FILE_BYTES,
    MAX_REQUEST_BYTES,
    NO_IMAGE,
    NOT_AN_IMAGE,
    NOT_UPLOADED,
    TOO_DEEP,
    TOO_LARGE,
    TOO_MANY_PIXELS,
)
from version import describe_version  # noqa: E402


VERSION = "vit-custom 9.9.9 (0123abc)"
LABELS = ["ant", "bee", "cat", "dog", "eel"]
# The code of a model that only its own checkpoint knows: a linear classifier of the mean colour.
CUSTOM_CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class MeanColourConfig(PreTrainedConfig):
    model_type = "mean_colour"


class MeanColourForImageClassification(PreTrainedModel):
    config_class = MeanColourConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(3, config.num_labels)
        self.post_init()

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.head(pixel_values.mean(dim=(2, 3))))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        initializer_range=0.5,  # far from equal probabilities
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def upload_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def demo(checkpoint, upload_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(upload_folder))
        demo = build_demo([load_classifier(str(checkpoint))], VERSION)
        demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **LAUNCH_OPTIONS)
        yield demo
        demo.close()


@pytest.fixture
def client(demo, tmp_path):
    return Client(demo.local_url, verbose=False, analytics_enabled=False, download_files=str(tmp_path / "downloads"))


@pytest.fixture
def quiet_transformers():
    """`main` silences transformers for the whole process; the other tests want it as it was."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def picture(width=40, height=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def expected_probabilities(checkpoint, image):
    pixels = ViTImageProcessor.from_pretrained(checkpoint)(images=image, return_tensors="pt")
    with torch.no_grad():
        logits = ViTForImageClassification.from_pretrained(checkpoint)(**pixels).logits[0]
    return dict(zip(LABELS, logits.softmax(dim=-1).tolist(), strict=True))


def answered_probabilities(answer):
    return {entry["label"]: entry["confidence"] for entry in answer["confidences"]}


def request(url, body=None, headers=None):
    """The status and the text of the answer to a GET, or to a POST where there is a body."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data=body, headers=headers or {}), timeout=60
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call(demo, *data, function="classify"):
    """Call a function of the page as a browser does, without gradio's client: did it succeed, and its output."""
    [index] = [index for index, block_function in demo.fns.items() if block_function.api_name == function]
    body = {"data": data, "fn_index": index, "session_hash": uuid.uuid4().hex}
    status, text = request(
        f"{demo.local_api_url}queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    assert status == 200, text
    _, stream = request(f"{demo.local_api_url}queue/data?session_hash={body['session_hash']}")
    messages = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line]
    [completed] = [message for message in messages if message["msg"] == "process_completed"]
    return completed["success"], completed["output"]


# Answers


def test_answer_is_the_softmax_of_the_model(client, checkpoint, tmp_path):
    image = picture()
    image.save(tmp_path / "picture.png")
    answer = client.predict(handle_file(tmp_path / "picture.png"), 3, api_name="/classify")
    expected = expected_probabilities(checkpoint, image)
    best = sorted(expected, key=expected.get, reverse=True)[:3]
    assert answer["label"] == best[0]
    assert list(answered_probabilities(answer)) == best
    assert answered_probabilities(answer) == pytest.approx({label: expected[label] for label in best}, abs=1e-5)


def test_image_is_turned_the_way_the_camera_was_held(client, checkpoint, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the tag of the orientation: the camera was turned by a quarter
    picture().save(tmp_path / "picture.png", exif=exif)
    answer = answered_probabilities(client.predict(handle_file(tmp_path / "picture.png"), 5, api_name="/classify"))
    upright = picture().transpose(Image.Transpose.ROTATE_270)
    assert answer == pytest.approx(expected_probabilities(checkpoint, upright), abs=1e-5)
    assert answer != pytest.approx(expected_probabilities(checkpoint, picture()), abs=1e-3)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "jpg"), ("P", "gif"), ("RGBA", "webp"), ("CMYK", "jpg"), ("RGB", "bmp")],
)
def test_every_colour_mode_becomes_rgb(client, checkpoint, tmp_path, mode, suffix):
    path = tmp_path / f"picture.{suffix}"
    picture().convert(mode).save(path)
    with Image.open(path) as image:
        expected = expected_probabilities(checkpoint, image.convert("RGB"))
    answer = client.predict(handle_file(path), 5, api_name="/classify")
    assert answered_probabilities(answer) == pytest.approx(expected, abs=1e-5)


def test_independent_labels_have_independent_probabilities(checkpoint):
    classifier = load_classifier(str(checkpoint))
    classifier.model.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        logits = classifier.model(**classifier.image_processor(images=picture(), return_tensors="pt")).logits[0]
    expected = dict(zip(LABELS, logits.sigmoid().tolist(), strict=True))
    assert classifier.classify(picture(), 5) == pytest.approx(expected, abs=1e-5)


def test_classes_that_share_a_label_stay_apart():
    assert distinct_labels({0: "crane", 1: "ant", 2: "crane"}) == ("crane (0)", "ant", "crane (2)")


# Refusals


def save_text(path):
    path.write_text("no image")


def save_truncated(path):
    picture(400, 400).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def save_unlisted_format(path):
    picture().save(path, format="TIFF")


def save_deep_grey(path):
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(path, format="png")


def save_damaged_orientation(path):
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 40
    picture().save(path, format="JPEG", exif=exif)
    # The second tag, the width, becomes a text: Pillow reads it, and fails to write it when it turns the image.
    path.write_bytes(path.read_bytes().replace(b"\x01\x00\x00\x04", b"\x01\x00\x00\x02", 1))


def save_pixel_bomb(path):
    Image.new("1", (9_000, 9_000)).save(path)


def save_pillows_own_pixel_bomb(path):
    Image.new("1", (20_000, 20_000)).save(path)


def save_thin_strip(path):
    Image.new("1", (1_000, 20)).save(path)


def save_long_strip(path):
    Image.new("1", (70_000, 1)).save(path)


@pytest.mark.parametrize(
    ("save", "sentence"),
    [
        (save_text, NOT_AN_IMAGE),
        (save_truncated, NOT_AN_IMAGE),
        (save_unlisted_format, NOT_AN_IMAGE),
        (save_damaged_orientation, NOT_AN_IMAGE),
        (save_deep_grey, TOO_DEEP),
        (save_pixel_bomb, TOO_MANY_PIXELS),
        (save_pillows_own_pixel_bomb, TOO_MANY_PIXELS),
        (save_long_strip, TOO_MANY_PIXELS),
        (save_thin_strip, TOO_MANY_PIXELS),
    ],
)
def test_unfit_file_gets_one_sentence(client, tmp_path, save, sentence):
    path = tmp_path / "picture.png"
    save(path)
    assert path.stat().st_size < MAX_FILE_BYTES
    with pytest.raises(AppError) as refusal:
        client.predict(handle_file(path), 3, api_name="/classify")
    assert refusal.value.message == sentence


def test_uploads_are_no_way_around_the_limits(demo, upload_folder):
    address = urlsplit(demo.local_api_url)

    def post(path: str, *headers: tuple[str, str], chunks: Iterable[bytes] = ()) -> tuple[int, bytes]:
        """The answer to a request that does not end."""
        connection = HTTPConnection(address.netloc, timeout=60)
        connection.putrequest("POST", f"{address.path}{path}")
        for header in headers:
            connection.putheader(*header)
        connection.endheaders()
        for chunk in chunks:
            connection.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        with closing(connection.getresponse()) as answer:
            return answer.status, answer.read()

    refused = (413, b"Too long")
    # A function of that name, which there is not.
    assert post("call/upload", ("Content-Length", str(MAX_REQUEST_BYTES + 1))) == refused
    assert post("upload", ("Content-Length", str(MAX_FILE_BYTES + MAX_REQUEST_BYTES + 1))) == refused
    # Neither a file nor of a known length.
    field = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
    chunks = [field, *[bytes(2**16)] * (MAX_FILE_BYTES // 2**16), bytes(MAX_REQUEST_BYTES)]
    headers = (("Content-Type", "multipart/form-data; boundary=b"), ("Transfer-Encoding", "chunked"))
    assert post("upload", *headers, chunks=chunks) == refused


def test_old_uploads_are_deleted_whoever_left_them(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("uploads.SECONDS_KEPT", 0.1)
    (tmp_path / "theirs").touch()
    os.utime(tmp_path / "theirs", (0, 0))
    with uploads.own_upload_folder() as folder:
        assert folder.parent == tmp_path and os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "name").mkdir()
        (folder / "name" / "old").touch()
        os.utime(folder / "name" / "old", (0, 0))
        (folder / "name" / "new").touch()
        uploads.delete_uploads(folder, age=60)
        assert [path.name for path in folder.rglob("*")] == ["name", "new"]
        deadline = time.monotonic() + 20
        while (folder / "name" / "new").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_oversized_upload_is_refused_at_the_door(demo, upload_folder):
    boundary, size = "boundary", MAX_FILE_BYTES + 1
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + bytes(size) + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    before = set(upload_folder.rglob("*"))
    status, text = request(f"{demo.local_api_url}upload", body, headers)
    assert status == 413
    assert f"maximum allowed size of {MAX_FILE_BYTES} bytes" in text
    assert set(upload_folder.rglob("*")) == before


def test_oversized_file_is_refused_unopened(demo, upload_folder):
    path = upload_folder / "oversized.png"
    picture().save(path)
    with path.open("ab") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    success, output = call(demo, {"path": str(path)}, 3)
    assert (success, output["error"]) == (False, TOO_LARGE)


@pytest.fixture
def server_file(tmp_path):
    """An image that lies on the server and that nobody uploaded."""
    path = tmp_path / "private.png"
    picture().save(path)
    return path


MARK = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize("mark", [{}, MARK], ids=["unmarked", "marked"])
@pytest.mark.parametrize("target", ["image", "passwd", "dots", "link", "folder", "relative", "address", "null byte"])
def test_only_uploads_are_opened(demo, upload_folder, server_file, target, mark):
    link = upload_folder / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(server_file)
    path = {
        "image": str(server_file),
        "passwd": "/etc/passwd",
        "dots": f"{upload_folder}/{os.path.relpath(server_file, upload_folder)}",
        "link": str(link),
        "folder": str(upload_folder),
        "relative": "README.md",
        "address": "http://127.0.0.1:9/picture.png",
        "null byte": f"{upload_folder}/a\0.png",
    }[target]
    success, output = call(demo, {"path": path, **mark}, 3)
    assert (success, output["error"]) == (False, NOT_UPLOADED)
    assert path not in json.dumps(output)


def test_function_behind_the_slider_opens_only_uploads(demo, upload_folder, server_file):
    picture().save(upload_folder / "picture.png")
    success, output = call(demo, {"path": str(upload_folder / "picture.png")}, 2, function="classify_again")
    assert success
    assert len(output["data"][0]["confidences"]) == 2
    success, output = call(demo, {"path": str(server_file)}, 2, function="classify_again")
    assert (success, output["error"]) == (False, NOT_UPLOADED)
    assert call(demo, None, 2, function="classify_again")[0]


@pytest.mark.parametrize(
    "path",
    [
        "process_recording",
        "file=http://127.0.0.1:9/x",
        "file=HTTPS://x.org/a.png",
        "file=http%3A//127.0.0.1:9/x",
        "file/http://127.0.0.1:9/x",
        "deep_link?session_hash=a",
    ],
)
def test_side_doors_are_closed(demo, path):
    body = b"" if path == "process_recording" else None
    assert request(f"{demo.local_api_url}{path}", body) == (404, "Not found")


@pytest.mark.parametrize("length", [("Content-Length", "200000"), ("Transfer-Encoding", "chunked")])
def test_long_questions_are_refused_unread(demo, length):
    url = urlsplit(f"{demo.local_api_url}queue/join")
    connection = HTTPConnection(url.netloc, timeout=60)
    connection.putrequest("POST", url.path)
    connection.putheader(*length)
    connection.endheaders()
    with closing(connection.getresponse()) as answer:
        assert (answer.status, answer.read()) == (413, b"Too long")


def test_an_image_that_was_deleted_is_asked_for_again(demo, upload_folder):
    success, output = call(demo, {"path": str(upload_folder / "gone.png")}, 3)
    assert (success, output["error"]) == (False, DELETED)


def test_image_inside_the_payload_is_refused(demo):
    success, output = call(demo, {"url": "data:image/png;base64,iVBORw0KGgo="}, 3)
    assert (success, output["error"]) == (False, NOT_UPLOADED)


def test_no_other_input_names_a_file(demo, server_file):
    success, output = call(demo, None, [{"deep": {"path": str(server_file), **MARK}}])
    assert (success, output["error"]) == (False, NOT_UPLOADED)


def test_upload_is_opened_without_the_mark(demo, upload_folder):
    """The refusals above are about the place of a file, not about the form of a payload."""
    picture().save(upload_folder / "picture.png")
    success, _ = call(demo, {"path": str(upload_folder / "picture.png")}, 3)
    assert success


def test_no_image_gets_one_sentence(demo):
    success, output = call(demo, None, 3)
    assert (success, output["error"]) == (False, NO_IMAGE)


@pytest.mark.parametrize("top_k", [0, 6, 2.5, -1, 1e300, "3", None, [3]])
def test_impossible_number_of_classes_gets_one_sentence(demo, upload_folder, top_k):
    picture().save(upload_folder / "picture.png")
    success, output = call(demo, {"path": str(upload_folder / "picture.png")}, top_k)
    assert (success, output["error"]) == (False, "The number of classes must be a whole number from 1 to 5.")


def test_queue_cannot_be_passed_by(demo):
    body = json.dumps({"data": [None, 3]}).encode()
    status, text = request(f"{demo.local_api_url}run/classify", body, {"Content-Type": "application/json"})
    assert status == 404
    assert "join the queue" in text


# What a prediction rests on


def shown(answer):
    """The picture that an endpoint gave."""
    with Image.open(answer["path"] if isinstance(answer, dict) else answer) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def file(tmp_path):
    picture(64, 48).save(tmp_path / "picture.png")
    return handle_file(tmp_path / "picture.png")


@pytest.mark.parametrize("method", [GRAD_CAM, ROLLOUT, GRADIENT_ROLLOUT, GRADIENT_ATTENTION, ATTENTION])
def test_a_map_is_laid_over_the_image(client, checkpoint, file, method):
    classifier = load_classifier(str(checkpoint))
    least = list(classifier.classify(picture(64, 48), 5))[-1]
    found = shown(client.predict(file, method, least, 2, 1, api_name="/explain"))
    pixels, model = classifier.prepare(picture(64, 48)), classifier.transparent
    wanted = torch.tensor([LABELS.index(least)])
    maps = {
        GRAD_CAM: lambda: grad_cam(model, pixels, wanted)[0][0],
        ROLLOUT: lambda: attention_rollout(model, pixels)[0],
        GRADIENT_ROLLOUT: lambda: gradient_rollout(model, pixels, wanted)[0],
        GRADIENT_ATTENTION: lambda: gradient_attention(model, pixels, 1, wanted)[0],
        ATTENTION: lambda: attention_map(model, pixels, 1)[0, 0],
    }
    seen = picture(64, 48).resize((320, 240), Image.Resampling.NEAREST)
    expected = overlay(np.asarray(seen), to_pixels(model, maps[method]()[None], (16, 16))[0]).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 4  # it travels as a compressed picture
    assert found.std() > 5


def test_the_likeliest_class_is_explained_unless_another_is_asked_for(client, checkpoint, file):
    classifier = load_classifier(str(checkpoint))
    likeliest = next(iter(classifier.classify(picture(64, 48), 1)))
    other = next(label for label in LABELS if label != likeliest)
    default, named, another = (
        shown(client.predict(file, GRADIENT_ATTENTION, label, 2, 0, api_name="/explain"))
        for label in (page.LIKELIEST, likeliest, other)
    )
    np.testing.assert_array_equal(default, named)
    assert np.abs(default - another).max() > 10


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["Magic", page.LIKELIEST, 1, 0], "Choose a method from the list."),
        ([None, page.LIKELIEST, 1, 0], "Choose a method from the list."),
        ([["Grad-CAM"], page.LIKELIEST, 1, 0], "Choose a method from the list."),
        ([GRAD_CAM, "unicorn", 1, 0], "Choose a class from the list."),
        ([ATTENTION, page.LIKELIEST, 0, 0], "The layer must be a whole number from 1 to 2."),
        ([ATTENTION, page.LIKELIEST, 3, 0], "The layer must be a whole number from 1 to 2."),
        ([ATTENTION, page.LIKELIEST, 1.5, 0], "The layer must be a whole number from 1 to 2."),
        ([ATTENTION, page.LIKELIEST, 2, 3], "The head of layer 2 must be a whole number from 0 to 2."),
        ([ATTENTION, page.LIKELIEST, 2, "1"], "The head of layer 2 must be a whole number from 0 to 2."),
    ],
)
def test_impossible_explanations_get_one_sentence(demo, upload_folder, options, sentence):
    picture().save(upload_folder / "picture.png")
    success, output = call(demo, {"path": str(upload_folder / "picture.png")}, *options, function="explain")
    assert (success, output["error"]) == (False, sentence)


@pytest.mark.parametrize(
    ("function", "options"),
    [("explain", [GRAD_CAM, page.LIKELIEST, 1, 0]), ("compare", ["tiny", 1.0, "tiny", 2.0])],
)
def test_every_function_opens_only_uploads(demo, server_file, function, options):
    success, output = call(demo, {"path": str(server_file)}, *options, function=function)
    assert (success, output["error"]) == (False, NOT_UPLOADED)
    success, output = call(demo, None, *options, function=function)
    assert (success, output["error"]) == (False, NO_IMAGE)


def test_two_sizes_are_compared(client, checkpoint, file):
    first, seen, second, seen_again = client.predict(file, "tiny", 1.0, "tiny", 2.0, api_name="/compare")
    classifier = load_classifier(str(checkpoint))
    assert answered_probabilities(first) == pytest.approx(classifier.classify(picture(64, 48), 3), abs=1e-5)
    expected = classifier.classify_at(picture(64, 48), (32, 32), 3)
    assert answered_probabilities(second) == pytest.approx(expected, abs=1e-5)
    assert answered_probabilities(first) != pytest.approx(answered_probabilities(second), abs=1e-3)
    assert shown(seen).shape == shown(seen_again).shape == (240, 320, 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["other", 1.0, "tiny", 1.0], "Choose a model from the list."),
        (["../secret", 1.0, "tiny", 1.0], "Choose a model from the list."),
        (["tiny", 1.0, "tiny", 1000], "Choose a size from the list."),
        (["tiny", True, "tiny", 1.0], "Choose a size from the list."),
        (["tiny", "1.0", "tiny", 1.0], "Choose a size from the list."),
    ],
)
def test_impossible_comparisons_get_one_sentence(demo, upload_folder, options, sentence):
    picture().save(upload_folder / "picture.png")
    success, output = call(demo, {"path": str(upload_folder / "picture.png")}, *options, function="compare")
    assert (success, output["error"]) == (False, sentence)


def save_classifier(model, folder):
    model.config.id2label = dict(enumerate(LABELS))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return load_classifier(str(folder))


def test_every_architecture_has_methods_of_its_own(architecture, tmp_path):
    classifier = save_classifier(tiny_model(ViTCustomForImageClassification, architecture), tmp_path / architecture)
    rollouts = [ROLLOUT, GRADIENT_ROLLOUT] if architecture in ("vit", "deit") else []
    assert classifier.methods == [GRAD_CAM, *rollouts, GRADIENT_ATTENTION, ATTENTION]
    for method in classifier.methods:
        for layer, heads in enumerate(classifier.heads, start=1):
            assert classifier.explain(picture(), method, layer, heads).size == (320, 160)
    drawn = classifier.draw_learnt([picture(), picture(seed=1)])
    assert drawn.keys() == {"filters", "distance"} | ({"positions"} if architecture != "swin" else set())
    build_demo([classifier])


def test_two_models_are_compared(checkpoint, tmp_path):
    other = save_classifier(tiny_model(ViTCustomForImageClassification, "swin"), tmp_path / "swin")
    demo = build_demo([load_classifier(str(checkpoint)), other])
    choices = [block.choices for block in demo.blocks.values() if getattr(block, "label", "") == "Model"]
    assert choices == [[("tiny", "tiny"), ("swin", "swin")]] * 2


def test_a_model_of_another_kind_is_classified_with_and_not_looked_into(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=5)
    classifier = save_classifier(transformers.ResNetForImageClassification(config), tmp_path / "resnet")
    assert classifier.transparent is None
    assert classifier.methods == []
    assert len(classifier.classify(picture(), 5)) == 5
    tabs = [block.label for block in build_demo([classifier]).blocks.values() if isinstance(block, gradio.Tab)]
    assert tabs == ["Try it", "Classes"]


def test_what_a_processor_cuts_off_is_not_shown():
    classifier = Classifier(
        "name",
        tiny_model(ViTCustomForImageClassification, "vit"),
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        tuple(LABELS),
    )
    image = picture(200, 100)
    frame = classifier.find_frame(image)
    assert frame == (60, 10, 140, 90)
    whole, same_size = classifier.prepare(image), classifier.prepare(image, (32, 32))
    squeezed = classifier.image_processor(
        image, size={"height": 32, "width": 32}, do_center_crop=False, return_tensors="pt"
    )["pixel_values"]
    assert (whole - same_size).abs().mean() < 0.1 < 0.4 < (whole - squeezed).abs().mean()


def test_the_frame_of_a_processor_that_squeezes_and_cuts():
    processor = ViTImageProcessor(
        size={"height": 256, "width": 256}, do_center_crop=True, crop_size={"height": 224, "width": 224}
    )
    classifier = Classifier("name", None, processor, tuple(LABELS))
    assert classifier.find_frame(Image.new("RGB", (1024, 512))) == (64, 32, 960, 480)


def test_models_that_cannot_be_compared_are_named(checkpoint, tmp_path):
    first = load_classifier(str(checkpoint))
    other = replace(first, name="other")
    with pytest.raises(UnusableModelError, match="2 models are called 'other': rename their folders"):
        build_demo([first, other, other])
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=5)
    other = save_classifier(transformers.ResNetForImageClassification(config), tmp_path / "resnet")
    with pytest.raises(UnusableModelError, match="'resnet' is no ViT, DeiT, PVT or Swin"):
        build_demo([first, other])


def test_weights_of_half_precision_are_used_as_they_are(checkpoint, tmp_path):
    network = ViTForImageClassification.from_pretrained(checkpoint, dtype=torch.bfloat16)
    classifier = save_classifier(network, tmp_path / "half")
    assert classifier.model.dtype == torch.bfloat16
    assert sum(classifier.classify(picture(), 5).values()) == pytest.approx(1, abs=1e-2)
    assert classifier.explain(picture(), GRAD_CAM, 1, 0).size == (320, 160)


def test_examples_are_of_the_models_own_kind(checkpoint, tmp_path):
    assert page.find_examples(load_classifier(str(checkpoint))) == []
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "README.md").write_text("# Mine")
    (folder / "examples").mkdir()
    picture().save(folder / "examples" / "1.png")
    assert page.find_examples(load_classifier(str(folder))) == [folder / "examples" / "1.png"]
    own = load_classifier(str(ROOT / "spaces" / "cifar10_vit"))
    assert [file.stem for file in page.find_examples(own)] == sorted(own.labels)


def test_a_card_is_shown_with_its_figures(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    picture().save(tmp_path / "model" / "figure.png")
    picture().save(tmp_path / "secret.png")
    (tmp_path / "model" / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# Mine\n<!-- begin results: generated -->\n![a](figure.png)\n![b](../secret.png)\n"
        "![c](gone.png)\n![d](linked.png)\n"
    )
    # As the Hub's cache keeps a file.
    (tmp_path / "blobs").mkdir()
    picture().save(tmp_path / "blobs" / "0123", format="png")
    (tmp_path / "model" / "linked.png").symlink_to("../blobs/0123")
    monkeypatch.chdir(tmp_path / "blobs")
    assert "data:image" in page.read_card(Path("../model"))
    text = page.read_card(tmp_path / "model")
    assert "license" not in text
    assert "<!--" not in text
    figures = re.findall(r"!\[(\w)\]\(data:image/png;base64,([\w+/=]+)\)", text)
    assert [name for name, _ in figures] == ["a", "d"]
    assert base64.b64decode(figures[0][1]) == (tmp_path / "model" / "figure.png").read_bytes()
    assert "secret" not in text


# The page


def test_page_names_model_parameters_and_version(demo, checkpoint):
    _, text = request(f"{demo.local_url}config")
    count = load_classifier(str(checkpoint)).model.num_parameters()
    assert f"tiny · {count:,} parameters · {VERSION}" in json.loads(text)["components"][-1]["props"]["value"]
    assert "5 classes apart: ant, bee, cat, dog, eel." in text
    assert str(checkpoint) not in text


def test_the_version_is_that_of_the_code(tmp_path, monkeypatch):
    assert re.fullmatch(r"vit-custom \d+\.\d+\.\d+( \([0-9a-f]+(-dirty)?\))?", describe_version())
    (tmp_path / "space.json").write_text('{"commit": "0123abc"}')
    monkeypatch.setattr("version.MADE_OF", tmp_path / "space.json")
    assert describe_version().endswith(" (0123abc)")


def test_page_escapes_what_a_checkpoint_says(checkpoint):
    loaded = load_classifier(str(checkpoint))
    labels = ("<script>", *LABELS[1:])
    classifier = replace(loaded, name="<b>name</b>", labels=labels, address='https://x/"><script>')
    words = page.introduction(classifier) + page.about(classifier, "<b>1</b>")
    assert "<script>" not in words
    assert "<b>" not in words


def test_page_is_closed(demo, client):
    config = json.loads(request(f"{demo.local_url}config")[1])
    assert config["analytics_enabled"] is False
    assert config["show_error"] is False
    assert config.get("run_history", False) is False  # gradio 6.10 has none
    assert demo.share is False
    assert demo._queue.max_size == page.MAX_WAITING
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/classify", "/explain", "/compare"}


# The command


def test_a_model_of_a_run_that_was_not_made_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "spaces" / "app.py"), "--model", "runs/digits"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    # torch warns of how torchao registers itself, where that is installed, and torchao of older versions of torch.
    noise = ("torch/utils/_pytree.py", "torchao version")
    assert [line for line in result.stderr.splitlines() if not any(part in line for part in noise)] == [
        "app.py: error: there is no model in 'runs/digits': run `make quickstart` first or pass --model"
    ]
    assert result.stdout == ""


def break_nothing_but_the_name(folder):
    shutil.rmtree(folder)


def break_config(folder):
    (folder / "config.json").write_text("{")


def break_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def remove_image_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def remove_head(folder):
    transformers.ViTModel.from_pretrained(folder).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_nothing_but_the_name, "there is no folder"),
        (break_config, "JSON"),
        (break_weights, "SafetensorError"),
        (remove_image_processor, "preprocessor_config.json"),
        (remove_head, "lacks classifier.bias, classifier.weight"),
    ],
)
def test_unusable_model_is_one_line(checkpoint, tmp_path, monkeypatch, capfd, quiet_transformers, damage, reason):
    monkeypatch.delattr("gradio.Blocks.launch")
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        app.main(["--model", str(folder)])
    assert stopped.value.code == 2
    output = capfd.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("app.py: error: ")
    assert repr(str(folder)) in line
    assert reason in line
    assert "pass --model a folder written by save_pretrained or a Hub id such as user/name" in line


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "mean-colour"
    folder.mkdir()
    shutil.copy(checkpoint / "preprocessor_config.json", folder)
    (folder / "modeling_mean_colour.py").write_text(CUSTOM_CODE)
    config = {
        "model_type": "mean_colour",
        "architectures": ["MeanColourForImageClassification"],
        "auto_map": {
            "AutoConfig": "modeling_mean_colour.MeanColourConfig",
            "AutoModelForImageClassification": "modeling_mean_colour.MeanColourForImageClassification",
        },
        "id2label": {str(index): label for index, label in enumerate(LABELS)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"head.weight": torch.zeros(5, 3), "head.bias": torch.arange(5.0)}, folder / "pytorch_model.bin")
    with pytest.raises(UnusableModelError, match="pass --trust_remote_code if you trust it"):
        load_classifier(str(folder))
    assert not (tmp_path / "modules").exists()
    classifier = load_classifier(str(folder), trust_remote_code=True)
    assert list(classifier.classify(picture(), 2)) == ["eel", "dog"]


def test_command_serves_the_model_that_was_named(checkpoint, monkeypatch, quiet_transformers):
    launches = []
    monkeypatch.setattr("gradio.Blocks.launch", lambda self, **options: launches.append((self.title, options)))
    assert app.main(["--model", str(checkpoint), "--port", "7861"]) == 0
    [(title, options)] = launches
    assert title == "tiny · vit-custom"
    assert options == {"server_port": 7861, **LAUNCH_OPTIONS}
    assert options["share"] is False  # not None: the environment could share it then


def test_port_in_use_is_one_line(demo, checkpoint, capsys, quiet_transformers):
    assert app.main(["--model", str(checkpoint), "--port", str(demo.server_port)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{demo.server_port}-{demo.server_port}): pass another --port")


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_impossible_port_is_refused(capsys, port):
    with pytest.raises(SystemExit) as refusal:
        app.main(["--port", port])
    assert refusal.value.code == 2
    assert "--port" in capsys.readouterr().err


# The files that make the folder a Space


def test_front_matter_is_complete():
    front_matter = yaml.safe_load((ROOT / "spaces" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front_matter["sdk"] == "gradio"
    assert re.fullmatch(r"\d+\.\d+\.\d+", front_matter["sdk_version"])
    assert (ROOT / "spaces" / front_matter["app_file"]).is_file()
    assert front_matter["license"] == "apache-2.0"
    assert len(front_matter["short_description"]) <= 60  # the Hub refuses a longer one
    assert "image-classification" in front_matter["tags"]
    [floor] = re.findall(r'"gradio>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert Version(front_matter["sdk_version"]) >= Version(floor)


def test_space_requires_what_the_project_requires():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = (ROOT / "spaces" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert requirements
    assert [line for line in requirements if f'"{line}"' not in project] == []


def test_the_model_that_comes_with_the_demo_is_small_and_whole():
    folder = ROOT / "spaces" / "cifar10_vit"
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 8e6
    classifier = load_classifier(str(folder))
    assert classifier.model.dtype == torch.float32
    assert "truck" in classifier.labels
    probabilities = classifier.classify(Image.new("RGB", (32, 32), (90, 160, 250)), 10)
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert max(probabilities.values()) > 0.2
