"""Checkpoints on the Hub: which files of a folder go there, what must hold before, and what a refusal means."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME

from model_cards.facts import RUN, read_run
from model_cards.metadata import find_card_errors
from model_cards.rendering import CARD, FIGURES, merge_cards, render_card


WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
PROCESSORS = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
RECIPE = "recipe.yaml"
# Nothing else of a folder leaves it: neither checkpoints nor what is pickled.
PUBLISHED = (*WEIGHTS, *PROCESSORS, CONFIG_NAME, CARD, RUN, RECIPE, "*_results.json", *FIGURES, "examples/*.png")
# Opens a folder as somebody would who has transformers and nothing of ours, and classifies noise.
STRANGER = """
import sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
classifies = config.architectures and config.architectures[0].endswith("ForImageClassification")
auto_class = AutoModelForImageClassification if classifies else AutoModel
model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
with torch.no_grad():
    output = model(**processor(noise, return_tensors="pt"))[0]
if not output.isfinite().all():
    raise ValueError("its outputs are not finite")
"""


class RefusedError(OSError):
    """The Hub did not take something, in words for the one who asked."""


@dataclass(frozen=True)
class Destination:
    """Where on the Hub a folder goes.

    Attributes:
        repo_id: `user/name`, or `name` for one of the user's own.
        private: For a repository that is made; an existing one stays as it is.
        revision: The branch, made from main where there is none of that name.
        create_pr: Whether to propose the commit as a pull request.
    """

    repo_id: str
    private: bool | None = None
    revision: str = "main"
    create_pr: bool = False


def create_repo(destination: Destination) -> str:
    """Makes a repository and its branch, if there is none yet; the id with its namespace comes back.

    Raises:
        RefusedError: if the Hub does not.
    """
    api = HfApi()
    with explain_refusals(destination.repo_id):
        if get_token() is None:
            raise RefusedError("there is no token of the Hub: log in by `hf auth login`")
        repo_id = api.create_repo(destination.repo_id, private=destination.private, exist_ok=True).repo_id
        if destination.revision != "main":
            api.create_branch(repo_id, branch=destination.revision, exist_ok=True)
    return repo_id


def upload(folder: Path, destination: Destination, message: str) -> CommitInfo:
    """Sends what is missing or has changed in one commit. The card is rendered for its new place.

    Generated parts of a card that is there already are replaced, and what people wrote in it is kept.

    Args:
        destination: An existing repository by its full id, and a branch of it.

    Raises:
        RefusedError: if the Hub does not take it.
    """
    api, files = HfApi(), collect_files(folder)
    with explain_refusals(destination.repo_id):
        state = api.repo_info(destination.repo_id, revision=destination.revision)
        there = {sibling.rfilename for sibling in state.siblings}
        remote = {name: download(destination.repo_id, name, state.sha) for name in (CARD, RUN) if name in there}
    contents = dict(files)
    try:
        contents[CARD] = render_for_hub(folder, destination.repo_id, files, remote).encode()
    except ValueError as error:
        raise RefusedError(f"the card on the Hub cannot be brought up to date: {error}") from error
    if RECIPE in files:
        contents[RECIPE] = hide_folders_of_recipe(files[RECIPE].read_text(encoding="utf-8")).encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    # Weights of another number of shards would be taken for a part of these.
    stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
    operations += [CommitOperationDelete(name) for name in stale]
    with explain_refusals(destination.repo_id):
        return api.create_commit(
            destination.repo_id,
            operations,
            commit_message=message,
            revision=destination.revision,
            create_pr=destination.create_pr,
            parent_commit=state.sha,  # or what somebody wrote into the card meanwhile would be lost
        )


def add_tag(repo_id: str, tag: str, commit: str) -> None:
    """Raises RefusedError if the tag is at another commit already, or must not be made."""
    api = HfApi()
    with explain_refusals(repo_id, taken=f"tag {tag!r} of another version"):
        tags = {each.name: each.target_commit for each in api.list_repo_refs(repo_id).tags}
        if tags.get(tag) != commit:
            api.create_tag(repo_id, tag=tag, revision=commit)


def add_to_collection(repo_id: str, collection: str) -> str:
    """Adds a model to a collection, by its slug (user/title-hash) or by its title, and gives its slug.

    Raises:
        RefusedError: if there is none of that slug, or it is not the user's.
    """
    api = HfApi()
    with explain_refusals(repo_id):
        slug = collection
        if not re.fullmatch(r"[^/]+/.+-[0-9a-f]{16,24}", collection):
            namespace = repo_id.partition("/")[0]
            slug = api.create_collection(collection, namespace=namespace, exists_ok=True).slug
        api.add_collection_item(slug, repo_id, "model", exists_ok=True)
    return slug


def collect_files(folder: Path) -> dict[str, Path]:
    """What of a folder goes to the Hub, by its name there."""
    patterns = [*PUBLISHED, *code_files(folder)]
    paths = sorted([*folder.glob("*"), *folder.glob("examples/*")])  # a pattern's star takes in slashes as well
    found = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return {name: path for name, path in found.items() if any(fnmatch(name, pattern) for pattern in patterns)}


def code_files(folder: Path) -> list[str]:
    """The Python files that a configuration refers to, and the siblings that these import."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    references = [reference for reference in config.get("auto_map", {}).values() if isinstance(reference, str)]
    # "user/name--module.Class" lies in another repository.
    names = {reference.partition(".")[0] for reference in references if "--" not in reference}
    pending, found = sorted(names), []
    while pending:
        name = f"{pending.pop()}.py"
        if name in found:
            continue
        found.append(name)
        if (folder / name).is_file():
            source = (folder / name).read_text(encoding="utf-8")
            pending += re.findall(r"^\s*from\s+\.(\w+)\s+import", source, re.MULTILINE)
    return found


def check_publishable(folder: Path) -> None:
    """Raises ValueError, naming what is missing or wrong, unless a folder is a complete checkpoint that opens."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{str(folder)!r} holds no {CONFIG_NAME}: give a folder that a training run left")
    missing = [name for name in (*code_files(folder), CARD) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in PROCESSORS):
        missing.append(IMAGE_PROCESSOR_NAME)
    weights = find_weights(folder)
    missing += [path.name for path in weights if not path.is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {', '.join(missing)}: save the model and its card once more")
    check_weights(weights)
    errors = find_card_errors((folder / CARD).read_text(encoding="utf-8"))
    if errors:
        raise ValueError(f"the card {str(folder / CARD)!r} is not valid: {'; '.join(errors)}")
    check_opens(folder)


def find_weights(folder: Path) -> list[Path]:
    """The files that hold a model's weights, whether they are there or not."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [folder / WEIGHTS[0]]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / Path(name).name for name in sorted(set(names))]


def check_weights(files: list[Path]) -> None:
    """Raises ValueError for a weight that is not a finite number, or a file that cannot be read."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    if not tensors.get_tensor(name).isfinite().all():
                        raise ValueError(f"{name} in {str(file)!r} is not finite: take an earlier checkpoint")
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} cannot be read: {error}") from error


def check_opens(folder: Path) -> None:
    """Raises ValueError unless a fresh process without this package opens a folder and gets finite outputs."""
    with tempfile.TemporaryDirectory() as elsewhere:
        variables = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": elsewhere, "TRANSFORMERS_VERBOSITY": "error"}
        result = subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder.resolve())],
            cwd=elsewhere,
            env={**os.environ, **variables, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
    if result.returncode:
        last = (result.stderr.strip() or "it says nothing").splitlines()[-1]
        raise ValueError(f"{str(folder)!r} does not open in a fresh process: {last}")


def render_for_hub(folder: Path, repo_id: str, files: Collection[str], remote: Mapping[str, Path]) -> str:
    """A folder's card for its place on the Hub, with what people wrote into the one that is there, or else into this.

    Args:
        files: The names of what goes there.
        remote: Copies of the card and the facts that are on the Hub, by their names, as far as they are there.
    """
    local = (folder / CARD).read_text(encoding="utf-8")
    if not (folder / RUN).is_file():
        return local  # somebody's own: nothing in it is generated
    run = read_run(folder)
    card = str(render_card(run, files, hub_id=repo_id))
    card = merge_cards(local, card, generated=str(render_card(run, files)))
    if CARD not in remote:
        return card
    generated = None
    if RUN in remote:
        with suppress(ValueError):  # of another version, or spoilt by hand
            generated = str(render_card(read_run(remote[RUN].parent), hub_id=repo_id))
    return merge_cards(remote[CARD].read_text(encoding="utf-8"), card, generated)


def download(repo_id: str, name: str, commit: str) -> Path:
    return Path(HfApi().hf_hub_download(repo_id, name, revision=commit))


def hide_folders_of_recipe(text: str) -> str:
    """A recipe without what lies above the folders that it names."""
    fields = yaml.safe_load(text)
    hidden = {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in fields.items()
    }
    return yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)


def check_repo_id(name: str) -> None:
    """Raises ValueError unless a name may be that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository such as user/name: {error}") from error


@contextmanager
def explain_refusals(repo_id: str, taken: str | None = None) -> Iterator[None]:
    """Turns what the Hub or the way there answers into `RefusedError`; `taken` is what may be there already."""
    try:
        yield
    except RefusedError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise RefusedError(explain(error, repo_id, taken)) from error


def explain(error: Exception, repo_id: str, taken: str | None) -> str:
    # The client wraps what goes wrong with large files and with downloads.
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 keeps everything from the Hub: unset it"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return explain_status(error, repo_id, taken)
    if isinstance(error, ValueError):
        return f"the Hub refuses the card: {one_line(error)}"  # the client's word for what it finds in the metadata
    return f"the connection to the Hub failed ({type(error).__name__}: {one_line(error)})"


def explain_status(error: HfHubHTTPError, repo_id: str, taken: str | None) -> str:
    status, said = error.response.status_code, one_line(error.server_message or "")
    reasons = {
        400: "the Hub refuses it",
        401: "the Hub does not know your token: log in by `hf auth login`",
        402: "the Hub wants payment for this, or your quota is used up",
        403: f"your token has no right to write to {repo_id!r}, or your quota is used up",
        404: f"there is no repository {repo_id!r} or no such revision, or your token may not see it",
        409: f"{taken or repr(repo_id)} is there already",
        412: f"somebody else changed {repo_id!r} meanwhile",
        413: "a file is too large for the Hub",
        429: "the Hub asks you to wait: too many requests",
    }
    reason = reasons.get(status, f"the Hub failed with status {status}" if status >= 500 else f"status {status}")
    return f"{reason} ({status}{f': {said}' if said else ''})"


def one_line(text: object) -> str:
    return " ".join(str(text).split())
