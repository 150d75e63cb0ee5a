"""The page of the demo and its endpoints `/classify`, `/explain` and `/compare`."""

import base64
import html
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from classifier import ATTENTION, BY_LAYER, GRAD_CAM, ROLLOUT, Classifier, UnusableModelError
from PIL import Image
from starlette.middleware import Middleware
from uploads import MAX_FILE_BYTES, NO_IMAGE, SECONDS_KEPT, UploadsOnlyBlocks, WithoutSideDoors, open_upload, refuse


try:
    from spaces import GPU  # Hugging Face's ZeroGPU, where a function gets a GPU for as long as it runs
except ImportError:

    def GPU(duration):
        return lambda function: function


EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.png"))
MAX_TOP_K = 20
MAX_WAITING = 64
LIKELIEST = "the most likely class"
# Whatever opens an image or runs a model waits in one line.
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
PAPERS = {
    "ViT": "2010.11929",
    "DeiT": "2012.12877",
    "PVT": "2102.12122",
    "Swin": "2103.14030",
}
METHODS = {
    GRAD_CAM: "and the gradient-weighted maps show what speaks for a class.",
    ROLLOUT: "follows attention through all layers, whatever the class.",
    ATTENTION: "is what one head of one layer looks at, or all of them on average.",
}

CSS = """
.gradio-container { width: 100%; max-width: 72rem !important; margin: 0 auto !important; }
#introduction, #introduction .html-container { padding: 0; }
#introduction h1 { font-size: 1.4rem; font-weight: 600; margin: 0.5rem 0 0.25rem; }
#introduction p, #about { opacity: 0.8; overflow-wrap: anywhere; }
#about .prose { text-align: center; font-size: 0.8rem; }
/* A small picture is shown as large as there is room. */
.image-frame img { width: 100%; height: 100%; object-fit: contain; }
#card table { display: block; overflow-x: auto; border: none; }
#card img { max-width: min(100%, 44rem); background: white; }
.note p { font-size: 0.85rem; opacity: 0.8; }
"""
# Gradio's own button colours leave white text with a contrast of 2.5; these have 5.4 and more.
THEME = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"]).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    stat_background_fill="*primary_600",
    stat_background_fill_dark="*primary_500",
)
LAUNCH_OPTIONS = {
    "theme": THEME,
    "css": CSS,
    "max_file_size": MAX_FILE_BYTES,
    "share": False,
    "ssr_mode": False,  # else pages and files come from a second server, which WithoutSideDoors is not in front of
    "show_error": False,
    "state_session_capacity": 200,  # visitors whose last answers are kept
    "app_kwargs": {"middleware": [Middleware(WithoutSideDoors)]},
}


def build_demo(classifiers: Sequence[Classifier], version: str = "vit-custom") -> gr.Blocks:
    """The page; launch it with LAUNCH_OPTIONS. The first classifier is shown, the others can be compared with it.

    Raises:
        UnusableModelError: if some cannot be compared.
    """
    first = classifiers[0]
    if len(classifiers) > 1:
        for each in classifiers:
            if each.transparent is None:
                raise UnusableModelError(f"{each.name!r} is no ViT, DeiT, PVT or Swin: it cannot be compared")
        name, count = Counter(each.name for each in classifiers).most_common(1)[0]
        if count > 1:
            raise UnusableModelError(f"{count} models are called {name!r}: rename their folders")
    # Uploads are looked for as often as they grow that old.
    with UploadsOnlyBlocks(title=f"{first.name} · vit-custom", delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as demo:
        gr.HTML(introduction(first), elem_id="introduction")
        with gr.Tabs():
            with gr.Tab("Try it"), gr.Row():
                with gr.Column(min_width=280, scale=2):
                    image_input = gr.Image(
                        label="Image",
                        type="filepath",
                        sources=["upload", "clipboard"],
                        height=320,
                        buttons=["fullscreen"],
                    )
                    button = gr.Button("Classify", variant="primary")
                    examples = find_examples(first)
                    if examples:
                        gr.Examples([[str(file)] for file in examples], image_input, elem_id="examples")
                with gr.Column(min_width=280, scale=3), gr.Tabs():
                    with gr.Tab("Classes"):
                        add_classes(demo, first, image_input, button)
                    if first.methods:
                        with gr.Tab("What it looks at"):
                            add_explanation(demo, first, image_input, button)
                    if first.transparent is not None:
                        with gr.Tab("Compare"):
                            add_comparison(demo, classifiers, image_input)
            if first.transparent is not None:
                with gr.Tab("What it learnt") as tab:
                    add_learnt(first, tab)
            if first.card is not None:
                with gr.Tab("Card") as tab:
                    add_card(first, tab)
        gr.HTML(about(first, version), elem_id="about")
    # A bounded number of visitors waiting, and no way around the queue.
    return demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


# ---------------------------------------------------------------------------------------------------------------- tabs


def add_classes(demo: gr.Blocks, classifier: Classifier, image_input: gr.Image, button: gr.Button):
    most = min(MAX_TOP_K, len(classifier.labels))
    answer = gr.Label(label="Most likely classes")
    top_k_input = gr.Slider(1, most, value=min(5, most), step=1, label="Classes to show")

    @GPU(duration=10)
    def classify(image: dict[str, Any] | None, top_k: float) -> dict[str, float]:
        """Classify an uploaded image: its most likely classes with their probabilities, the most likely first."""
        if image is None:
            raise refuse(NO_IMAGE)
        require_whole(top_k, 1, most, "number of classes")
        return classifier.classify(open_upload(image, Path(demo.GRADIO_CACHE)), int(top_k))

    def classify_again(image: dict[str, Any] | None, top_k: float) -> dict[str, float] | None:
        return None if image is None else classify(image, top_k)

    # Without preprocess=False, gradio opens and decodes the image before our limits are looked at.
    event = {"inputs": [image_input, top_k_input], "outputs": answer, "preprocess": False, **ONE_AT_A_TIME}
    button.click(classify, api_name="classify", **event)
    # An upload, an example and none are changes alike.
    gr.on([image_input.change, top_k_input.release], classify_again, api_visibility="private", **event)


def add_explanation(demo: gr.Blocks, classifier: Classifier, image_input: gr.Image, button: gr.Button):
    heads = classifier.heads
    with gr.Row():
        method_input = gr.Dropdown(classifier.methods, value=classifier.methods[0], label="Method")
        label_input = gr.Dropdown([LIKELIEST, *classifier.labels], value=LIKELIEST, label="What speaks for")
    with gr.Row():
        layer_input = gr.Slider(
            1, max(2, len(heads)), value=len(heads), step=1, label="Layer", info="of attention", interactive=False
        )
        head_input = gr.Slider(0, max(heads), value=0, step=1, label="Head", info="0 is the mean", interactive=False)
    shown = gr.Image(
        label="What it rests on, from black to yellow",
        elem_id="explanation",
        height=320,
        interactive=False,
        buttons=["fullscreen"],
    )
    words = [f"**{method}** {METHODS[method]}" for method in classifier.methods if method in METHODS]
    gr.Markdown(" ".join(words), elem_classes="note")

    @GPU(duration=10)
    def explain(image: dict[str, Any] | None, method: str, label: str, layer: float, head: float) -> Image.Image:
        """What a prediction rests on: the image in grey, and over it from black to yellow how much it counts.

        Layers are counted from 1, and heads too; head 0 is the mean over all of them.
        """
        if image is None:
            raise refuse(NO_IMAGE)
        require_choice(method, classifier.methods, "method")
        require_choice(label, [LIKELIEST, *classifier.labels], "class")
        require_whole(layer, 1, len(heads), "layer")
        require_whole(head, 0, heads[int(layer) - 1], f"head of layer {int(layer)}")
        named = None if label == LIKELIEST else label
        opened = open_upload(image, Path(demo.GRADIO_CACHE))
        return classifier.explain(opened, method, int(layer), int(head), named)

    def explain_again(image: dict[str, Any] | None, *options: Any) -> Image.Image | None:
        return None if image is None else explain(image, *options)

    def explain_quietly(*inputs: Any) -> Image.Image | None:
        """What is wrong with an image is said once, where it is classified."""
        try:
            return explain_again(*inputs)
        except gr.Error:
            return None

    def fit(method: str, layer: float, head: float) -> tuple[dict, dict, dict]:
        """Only what a method heeds can be moved, and no further than there are heads."""
        most = heads[int(layer) - 1] if layer in range(1, len(heads) + 1) else 1
        attends = method == ATTENTION
        return (
            gr.update(interactive=method in BY_LAYER and len(heads) > 1),
            gr.update(interactive=attends and most > 1, maximum=max(1, most), value=min(head, most) if attends else 0),
            gr.update(interactive=method not in (ROLLOUT, ATTENTION)),
        )

    inputs = [image_input, method_input, label_input, layer_input, head_input]
    event = {"inputs": inputs, "outputs": shown, "preprocess": False, **ONE_AT_A_TIME}
    gr.on([image_input.change, button.click], explain_quietly, api_visibility="private", **event)
    gr.Button(visible=False).click(explain, api_name="explain", **event)  # the endpoint
    gr.on([label_input.input, head_input.release], explain_again, api_visibility="private", **event)
    gr.on(
        [method_input.input, layer_input.release],
        fit,
        [method_input, layer_input, head_input],
        [layer_input, head_input, label_input],
        api_visibility="private",
    ).then(explain_again, api_visibility="private", **event)


def add_comparison(demo: gr.Blocks, classifiers: Sequence[Classifier], image_input: gr.Image):
    names = {each.name: each for each in classifiers}
    patch = max(each.transparent.config.stages[0].patch_size for each in classifiers)
    scales = [scale for scale in SCALES if min(min(each.size_at(scale)) for each in classifiers) >= patch]
    what = "by two models, at their own size or another." if len(names) > 1 else "at two sizes."
    gr.Markdown(f"The same image seen {what}", elem_classes="note")
    sides = []
    for default in (1.0, 1.5):
        with gr.Row(equal_height=False):
            with gr.Column(min_width=160):
                model = list(names)[-1 if default != 1.0 and len(names) > 1 else 0]
                model_input = gr.Dropdown(list(names), value=model, label="Model", visible=len(names) > 1)
                scale = 1.0 if len(names) > 1 else default
                size_input = gr.Dropdown(
                    [(describe_scale(each, classifiers), each) for each in scales], value=scale, label="Size"
                )
                answer = gr.Label(label="Most likely classes", num_top_classes=3)
            with gr.Column(min_width=160):
                shown = gr.Image(label="What it rests on", height=240, interactive=False, buttons=["fullscreen"])
        sides.append(([model_input, size_input], [answer, shown]))
    button = gr.Button("Compare", variant="primary")

    @GPU(duration=10)
    def compare(
        image: dict[str, Any] | None, model_a: str, scale_a: float, model_b: str, scale_b: float
    ) -> tuple[dict[str, float], Image.Image, dict[str, float], Image.Image]:
        """Two answers to an image, and what each rests on: by two models, or at two multiples of a model's own size."""
        if image is None:
            raise refuse(NO_IMAGE)
        opened, results = open_upload(image, Path(demo.GRADIO_CACHE)), []
        for model, scale in ((model_a, scale_a), (model_b, scale_b)):
            require_choice(model, list(names), "model")
            require_choice(scale, scales, "size")
            classifier = names[model]
            size = classifier.size_at(scale)
            results.append(classifier.classify_at(opened, size, 3))
            method, last = classifier.methods[0], len(classifier.heads)
            results.append(classifier.explain(opened, method, last, 0, size=size))
        return tuple(results)

    button.click(
        compare,
        [image_input, *sides[0][0], *sides[1][0]],
        [*sides[0][1], *sides[1][1]],
        api_name="compare",
        preprocess=False,
        **ONE_AT_A_TIME,
    )


def add_learnt(classifier: Classifier, tab: gr.Tab):
    with gr.Row(equal_height=False):
        with gr.Column(min_width=420):
            gr.Markdown("### Filters\nWhat the first layer looks for in a patch, as principal components.")
            filters = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"])
        with gr.Column(min_width=420, visible=classifier.has_positions):
            gr.Markdown(
                "### Positions\nHow alike the position of each patch is to all others: most of all to those around it."
            )
            positions = gr.Image(
                label="Position similarity", show_label=False, interactive=False, buttons=["fullscreen"]
            )
        with gr.Column(min_width=420):
            gr.Markdown(
                "### Attention distance\nHow far each head looks on average. A low one sees only what is near, as "
                "convolutions do."
            )
            distance = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"])

    @GPU(duration=10)
    def learnt(progress: gr.Progress = gr.Progress()) -> tuple[Image.Image | None, ...]:  # noqa: B008 (gradio's way)
        files = [] if classifier.learnt else progress.tqdm(find_examples(classifier), desc="Reading examples")
        drawn = classifier.draw_learnt([Image.open(file).convert("RGB") for file in files])
        return tuple(drawn.get(name) for name in ("filters", "positions", "distance"))

    tab.select(learnt, outputs=[filters, positions, distance], api_visibility="private", **ONE_AT_A_TIME)


def add_card(classifier: Classifier, tab: gr.Tab):
    card = gr.Markdown(elem_id="card", sanitize_html=True)
    tab.select(lambda: read_card(classifier.card), outputs=card, api_visibility="private")


def read_card(folder: Path) -> str:
    """A card without its metadata, with its figures inside, since no file of the server is given out."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)

    def embed(match: re.Match) -> str:
        # By its name: what came from the Hub is a link to where its contents are kept.
        file = folder / match[2]
        if Path(match[2]).is_absolute() or ".." in Path(match[2]).parts or not file.is_file():
            return match[1]
        return f"![{match[1]}](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"

    return re.sub(r"!\[([^\]]*)\]\(([\w./-]+\.png)\)", embed, body)


# --------------------------------------------------------------------------------------------------------------- words


def introduction(classifier: Classifier) -> str:
    shown = ", ".join(classifier.labels[:MAX_TOP_K])
    rest = ", …" if len(classifier.labels) > MAX_TOP_K else ""
    is_transparent = classifier.transparent is not None
    more = " See what it takes an image for, what that rests on, and what it learnt." if is_transparent else ""
    return (
        "<h1>What is in this image?</h1>"
        f"<p>A {'Vision Transformer' if is_transparent else 'model'} tells {len(classifier.labels):,} classes apart:"
        f" {html.escape(shown)}{rest}.{more}</p>"
    )


def about(classifier: Classifier, version: str) -> str:
    parameters = f"{classifier.model.num_parameters():,} parameters"
    name = html.escape(classifier.name)
    if classifier.address is not None:
        name = f'<a href="{html.escape(classifier.address)}">{name}</a>'
    papers = " · ".join(f'<a href="https://arxiv.org/abs/{number}">{title}</a>' for title, number in PAPERS.items())
    return " · ".join((name, parameters, html.escape(version), papers))


def describe_scale(scale: float, classifiers: Sequence[Classifier]) -> str:
    sizes = {classifier.size_at(scale) for classifier in classifiers}
    if len(sizes) == 1:
        return "{} x {} pixels".format(*sizes.pop())
    return "its own" if scale == 1 else f"{scale:g} times its own"


def find_examples(classifier: Classifier) -> list[Path]:
    """Images that fit a model: its own, beside its card, or those of this folder, if it knows their classes."""
    if {file.stem for file in EXAMPLES} <= set(classifier.labels):
        return EXAMPLES
    return [] if classifier.card is None else sorted((classifier.card / "examples").glob("*.png"))


# -------------------------------------------------------------------------------------------------------------- checks


def require_whole(value: Any, low: int, high: int, name: str):
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(low, high + 1):
        raise refuse(f"The {name} must be a whole number from {low} to {high}.")


def require_choice(value: Any, choices: Sequence[Any], name: str):
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value not in choices:
        raise refuse(f"Choose a {name} from the list.")
