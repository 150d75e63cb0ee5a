"""The demo as people use it: a real Chromium on the page with the model that comes along.

`make test-browser` installs what is missing: Debian's package chromium, and Playwright for Python. Pictures of what was
seen are left in runs/screenshots.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image


sync_api = pytest.importorskip("playwright.sync_api", reason="`make test-browser` installs Playwright")

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = ROOT / "runs" / "screenshots"
EXAMPLES = ROOT / "spaces" / "examples"
LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `make test-browser` or `apt-get install chromium`"),
]
expect = sync_api.expect


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the demo runs, as its command starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads"))}
    command = [sys.executable, str(ROOT / "spaces" / "app.py"), "--port", str(port)]
    said = tmp_path_factory.mktemp("demo") / "log.txt"
    with said.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    for _ in range(600):
        time.sleep(0.2)
        assert process.poll() is None, said.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    else:
        raise AssertionError("the demo did not start")
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; nothing may be written to the console as an error, nor asked of any other machine."""
    contexts, complaints = [], []

    def open_it(size=LAPTOP, **options):
        context = browser.new_context(viewport=size, **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url) else None)
        page.goto(address)
        expect(page.get_by_role("heading", name="What is in this image?")).to_be_visible()
        return page

    def is_foreign(url):
        return not url.startswith((address, "data:", "blob:"))

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def choose_example(page, number=7):
    """Horses are the eighth."""
    page.locator("#examples img").nth(number).click()


def upload(page, file):
    page.locator("input[type=file]").first.set_input_files(file)


def likeliest(page):
    return page.locator("[data-testid=label-output-value]").first


def explanation(page, before=None):
    """The address of the picture that explains, once it is another than before."""
    shown = page.locator("#explanation img")
    expect(shown).to_be_visible()
    if before is not None:
        expect(shown).not_to_have_attribute("src", before)
    return shown.get_attribute("src")


def move_right(slider):
    slider.focus()
    slider.press("ArrowRight")
    slider.dispatch_event("pointerup")  # as a mouse that lets go


def keep(page, name, full_page=False):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(600)  # what moves comes to rest
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full_page)


def has_no_sideways_scrolling(page):
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_an_example_is_one_click_away(open_page):
    page = open_page()
    choose_example(page)
    expect(likeliest(page)).to_have_text(re.compile("horse"))
    keep(page, "classes")


def test_an_upload_is_classified(open_page, tmp_path):
    with Image.open(EXAMPLES / "ship.png") as image:
        image.resize((1600, 1200)).save(tmp_path / "photograph.jpg")
    page = open_page()
    upload(page, tmp_path / "photograph.jpg")
    expect(likeliest(page)).to_have_text(re.compile("ship"))


def test_the_slider_shows_more_classes(open_page):
    page = open_page()
    choose_example(page)
    expect(likeliest(page)).to_be_visible()
    expect(page.locator("[data-testid$=-confidence-set]")).to_have_count(5)
    move_right(page.get_by_role("slider", name="range slider for Classes to show"))
    expect(page.locator("[data-testid$=-confidence-set]")).to_have_count(6)


def test_a_bad_file_gets_a_sentence(open_page, tmp_path):
    (tmp_path / "letter.png").write_text("Dear Sir or Madam")
    page = open_page()
    upload(page, tmp_path / "letter.png")
    expect(page.get_by_text("This file cannot be read as an image.")).to_have_count(1)
    page.wait_for_timeout(1000)
    expect(page.get_by_text("This file cannot be read as an image.")).to_have_count(1)
    keep(page, "bad_file")
    choose_example(page, 8)
    expect(likeliest(page)).to_have_text(re.compile("ship"))


def test_no_image_gets_a_sentence(open_page):
    page = open_page()
    page.get_by_role("button", name="Classify").click()
    expect(page.get_by_text("Choose an image first.")).to_have_count(1)


def test_maps_follow_method_layer_and_head(open_page):
    page = open_page()
    choose_example(page)
    expect(likeliest(page)).to_be_visible()
    page.get_by_role("tab", name="What it looks at").click()
    cam = explanation(page)
    keep(page, "what_it_looks_at")
    layer, head = (page.get_by_role("slider", name=f"range slider for {name}") for name in ("Layer", "Head"))
    expect(layer).to_be_disabled()
    page.get_by_role("combobox", name="Method").click()
    page.get_by_role("option", name="Attention", exact=True).click()
    expect(layer).to_be_enabled()
    mean = explanation(page, cam)
    move_right(head)
    one = explanation(page, mean)
    keep(page, "attention_of_a_head")
    speaks_for = page.get_by_role("combobox", name="What speaks for")
    expect(speaks_for).to_be_disabled()
    page.get_by_role("combobox", name="Method").click()
    page.get_by_role("option", name="Gradient-weighted attention").click()
    expect(head).to_be_disabled()
    likeliest_class = explanation(page, one)
    speaks_for.click()
    page.get_by_role("option", name="dog").click()
    explanation(page, likeliest_class)


def test_two_sizes_are_compared(open_page):
    page = open_page()
    choose_example(page)
    expect(likeliest(page)).to_be_visible()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare").click()
    answers = page.get_by_role("tabpanel").locator("[data-testid=label-output-value]:visible")
    expect(answers).to_have_count(2)
    keep(page, "compare", full_page=True)


def test_what_it_learnt_is_drawn(open_page):
    page = open_page()
    page.get_by_role("tab", name="What it learnt").click()
    for heading in ("Filters", "Positions", "Attention distance"):
        expect(page.get_by_role("heading", name=heading)).to_be_visible()
    expect(page.locator(".image-frame img:visible")).to_have_count(3)
    keep(page, "what_it_learnt", full_page=True)


def test_the_card_has_its_figures(open_page):
    page = open_page()
    page.get_by_role("tab", name="Card").click()
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    figures = page.locator("#card img")
    expect(figures).to_have_count(8)
    assert all(figures.evaluate_all("images => images.map(image => image.complete && image.naturalWidth > 100)"))
    keep(page, "model_card")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(open_page, scheme):
    page = open_page(PHONE, color_scheme=scheme, device_scale_factor=2)
    choose_example(page)
    expect(likeliest(page)).to_have_text(re.compile("horse"))
    assert has_no_sideways_scrolling(page)
    keep(page, f"phone_{scheme}", full_page=True)
    page.get_by_role("tab", name="What it learnt").click()
    expect(page.locator(".image-frame img:visible")).to_have_count(3)
    assert has_no_sideways_scrolling(page)
    page.get_by_role("tab", name="Card").click()
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    assert has_no_sideways_scrolling(page)


def test_the_page_in_the_dark(open_page):
    page = open_page(color_scheme="dark")
    choose_example(page)
    expect(likeliest(page)).to_have_text(re.compile("horse"))
    keep(page, "dark")
