"""Checkpoints on the Hub: which files of a folder go there, what must hold before, and what a refusal means."""

import json
import os
import re
import shlex
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
from model_cards.metadata import find_card_errors, find_files_of_card, is_beside, split_card
from model_cards.rendering import CARD, FIGURES, find_parts, join_card, merge_cards, render_card


WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
PROCESSORS = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
RECIPE, EXAMPLES = "recipe.yaml", "examples/*.png"
# Nothing else of a folder leaves it: neither checkpoints nor what is pickled.
PUBLISHED = (*WEIGHTS, *PROCESSORS, CONFIG_NAME, CARD, "LICENSE*", RUN, RECIPE, "*_results.json", *FIGURES, EXAMPLES)
# Opens a folder as somebody would who has transformers and nothing of ours, and classifies noise.
STRANGER = """
import sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

folder = sys.argv[1]
# Nobody else has these.
sys.modules |= dict.fromkeys(("modeling_vit_custom", "model_cards", "trainers"))
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
        check_token(api)
        repo_id = api.create_repo(destination.repo_id, private=destination.private, exist_ok=True).repo_id
        if destination.private and not api.repo_info(repo_id).private:
            raise RefusedError(f"{repo_id!r} is there already, and public: nothing was sent")
        if destination.revision != "main":
            api.create_branch(repo_id, branch=destination.revision, exist_ok=True)
    return repo_id


def check_token(api: HfApi) -> None:
    """Raises RefusedError unless there is a token that may write."""
    if get_token() is None:
        raise RefusedError("there is no token of the Hub: log in by `hf auth login` or set HF_TOKEN")
    try:
        who = api.whoami()
    except HfHubHTTPError as error:
        if error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500):
            return  # it is asked for by too many; what comes next may work all the same
        raise
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise RefusedError(f"your token, of {who['name']!r}, may only read: make one that may write")


def upload(folder: Path, destination: Destination, message: str) -> CommitInfo:
    """Sends what is missing or has changed in one commit. The card is rendered for its new place.

    Generated parts of a card that is there already are replaced, and what people wrote in it is kept.

    Args:
        destination: An existing repository by its full id, and a branch of it.

    Raises:
        RefusedError: if the Hub does not take it.
    """
    api, files = HfApi(), collect_files(folder)
    repo_id = destination.repo_id
    with explain_refusals(repo_id):
        state = api.repo_info(destination.repo_id, revision=destination.revision)
        there = {sibling.rfilename for sibling in state.siblings}
        remote = {name: download(destination.repo_id, name, state.sha) for name in (CARD, RUN) if name in there}
    contents = dict(files)
    try:
        card = render_for_hub(folder, destination, files, remote)
    except ValueError as error:
        raise RefusedError(f"the card on the Hub cannot be brought up to date: {error}") from error
    errors = find_card_errors(card)
    if errors:
        raise RefusedError(f"the card, with what stands in that on the Hub, would not be valid: {'; '.join(errors)}")
    contents[CARD] = card.encode()
    if RECIPE in files:
        contents[RECIPE] = render_recipe(files[RECIPE]).encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    # Weights of another number of shards would be taken for a part of these, and older figures for the new model's.
    generated = (*WEIGHTS, *FIGURES, *examples_of(remote))
    stale = {name for name in there - files.keys() if any(fnmatch(name, pattern) for pattern in generated)}
    stale -= {*find_files_of_card(card)}
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


def render_recipe(file: Path) -> str:
    """A recipe as others may see it: without the folders that lead to local files.

    Args:
        file: Beside the run's facts, which know what was local where it was trained.
    """
    recipe, local = read_recipe(file), {}
    if (file.parent / RUN).is_file():
        run = read_run(file.parent)
        local = {"dataset": run.dataset_folder, "model": run.base_folder, "teacher": run.teacher_folder}
    for name, value in recipe.items():
        if isinstance(value, str):
            recipe[name] = value if name == "dataset_title" else local.get(name) or hide_folder(value)
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def show_files(files: Mapping[str, Path], destination: str) -> None:
    """What would go, with its size."""
    print(f"To {destination}, those that differ from what is there:")
    for name, path in files.items():
        print(f"  {path.stat().st_size:>13,} bytes  {name}")
    print(f"  {sum(path.stat().st_size for path in files.values()):>13,} bytes in {len(files)} files")


def check_tag(destination: Destination, tag: str) -> None:
    """Raises RefusedError if a tag is there already, but for that of the newest version."""
    api, repo_id = HfApi(), destination.repo_id
    with explain_refusals(repo_id):
        tags = list_tags(api, repo_id)
        if tag in tags and tags[tag] != api.repo_info(repo_id, revision=destination.revision).sha:
            raise RefusedError(f"there is a tag {tag!r} already, of another version: choose another one")


def add_tag(repo_id: str, tag: str, commit: str) -> None:
    """Raises RefusedError if the tag is at another commit already, or must not be made."""
    api = HfApi()
    with explain_refusals(repo_id):
        tags = list_tags(api, repo_id)
        if tag in tags and tags[tag] != commit:
            raise RefusedError(f"the new version is there, but tag {tag!r} is of the one before: choose another one")
        if tag not in tags:
            api.create_tag(repo_id, tag=tag, revision=commit)


def list_tags(api: HfApi, repo_id: str) -> dict[str, str]:
    """Tags with their commits."""
    return {each.name: each.target_commit for each in api.list_repo_refs(repo_id).tags}


def add_to_collection(repo_id: str, collection: str) -> str:
    """Adds a model to a collection, by its slug (user/title-hash) or by its title, and gives its slug.

    Raises:
        RefusedError: if there is none of that slug, or it is not the user's.
    """
    api = HfApi()
    with explain_refusals(collection, kind="collection"):
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
    chosen = {name: path for name, path in found.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    # And the pictures that somebody put into the card.
    card, own = folder / CARD, []
    if card.is_file():
        with suppress(ValueError):  # one that cannot be read is refused elsewhere
            own = find_files_of_card(card.read_text(encoding="utf-8"))
    return chosen | {name: folder / name for name in own if is_beside(name) and (folder / name).is_file()}


def examples_of(remote: Mapping[str, Path]) -> list[str]:
    """The example images that a run published, as far as its facts on the Hub say so."""
    if RUN not in remote:
        return []
    with suppress(ValueError):
        return list(read_run(remote[RUN].parent).examples or {})
    return []


def read_json(file: Path) -> dict:
    """Raises ValueError, naming the file, unless it holds a mapping."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds no mapping, but {content!r}")
    return content


def code_files(folder: Path) -> list[str]:
    """The Python files that a configuration refers to, and the siblings that these import."""
    config = read_json(folder / CONFIG_NAME)
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
        is_file = "is a file: give the folder that it is in" if folder.is_file() else "is not there"
        raise ValueError(f"{str(folder)!r} {is_file}")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{str(folder)!r} holds no {CONFIG_NAME}: give a folder that a training run left")
    missing = [name for name in (*code_files(folder), CARD) if not (folder / name).is_file()]
    # timm's models keep in their configuration how images are prepared.
    is_of_timm = read_json(folder / CONFIG_NAME).get("model_type") == "timm_wrapper"
    if not is_of_timm and not any((folder / name).is_file() for name in PROCESSORS):
        missing.append(IMAGE_PROCESSOR_NAME)
    weights = find_weights(folder)
    missing += [path.name for path in weights if not path.is_file()]
    if missing:
        how = f"make the card by `python -m model_cards.card {shlex.quote(str(folder))}`"
        how = how if missing == [CARD] and (folder / RUN).is_file() else "give the folder that a finished run left"
        raise ValueError(f"{str(folder)!r} lacks {', '.join(missing)}: {how}")
    for file in collect_files(folder).values():
        with file.open("rb"):  # what cannot be read is said now
            pass
    check_weights(weights)
    if (folder / RUN).is_file():
        try:
            render_card(read_run(folder))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(folder / RUN)!r} holds no facts of a run: {error}") from error
    if (folder / RECIPE).is_file():
        read_recipe(folder / RECIPE)
    errors = find_card_errors((folder / CARD).read_text(encoding="utf-8"), folder)
    if errors:
        raise ValueError(f"the card {str(folder / CARD)!r} is not valid: {'; '.join(errors)}")
    check_opens(folder)


def find_weights(folder: Path) -> list[Path]:
    """The files that hold a model's weights, whether they are there or not."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [folder / WEIGHTS[0]]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{str(index)!r} has no weight_map of tensors and files")
    return [folder / Path(name).name for name in sorted(set(names.values()))]


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


def render_for_hub(folder: Path, destination: Destination, files: Collection[str], remote: Mapping[str, Path]) -> str:
    """A folder's card for its place on the Hub, with what people wrote into the one that is there, or else into this.

    Args:
        files: The names of what goes there.
        remote: Copies of the card and the facts that are on the Hub, by their names, as far as they are there.
    """
    local = (folder / CARD).read_text(encoding="utf-8")
    if not (folder / RUN).is_file():
        return local  # somebody's own: nothing in it is generated
    run, repo_id = read_run(folder), destination.repo_id
    branch = None if destination.revision == "main" else destination.revision
    card = str(render_card(run, files, hub_id=repo_id, revision=branch))
    card = merge_cards(local, card, generated=str(render_card(run, files)))
    if CARD not in remote:
        return card
    there, generated = remote[CARD].read_text(encoding="utf-8"), None
    if RUN in remote:
        with suppress(AttributeError, KeyError, TypeError, ValueError):  # of another version, or spoilt by hand
            generated = str(render_card(read_run(remote[RUN].parent), hub_id=repo_id, revision=branch))
    merged = merge_cards(there, card, generated)
    words = find_own_words(there)
    if not words or (generated is not None and words == find_own_words(generated)):
        return join_card(split_card(merged)[0], split_card(card)[1])  # nobody has written there
    if find_own_words(merged) != find_own_words(card):
        print(f"The card of {repo_id} keeps the words that it has on the Hub; those in {folder / CARD} stay here.")
    return merged


def find_own_words(card: str) -> str:
    """What in a card's body is not generated."""
    body = split_card(card)[1]
    for part in find_parts(body).values():
        body = body.replace(part, "")
    return " ".join(body.split())


def download(repo_id: str, name: str, commit: str) -> Path:
    return Path(HfApi().hf_hub_download(repo_id, name, revision=commit))


def read_recipe(file: Path) -> dict:
    """Raises ValueError unless it is a mapping in YAML."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(file)!r} is not YAML: {one_line(error)}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{str(file)!r} holds no mapping, but {recipe!r}")
    return recipe


def hide_folder(value: str) -> str:
    """The last part of a local path: the whole may say more of its owner than of what lies there."""
    path = Path(value)
    # An id on the Hub has one slash.
    is_deep = len(path.parts) > 2 or (len(path.parts) > 1 and path.exists())
    is_local = path.is_absolute() or value.startswith(("~", "..")) or is_deep
    return Path(os.path.abspath(os.path.expanduser(value))).name if is_local else value


def check_repo_id(name: str) -> None:
    """Raises ValueError unless a name may be that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository such as user/name: {error}") from error


@contextmanager
def explain_refusals(repo_id: str, kind: str = "repository") -> Iterator[None]:
    """Turns what the Hub or the way there answers into `RefusedError`; `kind` is what is asked about."""
    try:
        yield
    except RefusedError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise RefusedError(explain(error, repo_id, kind)) from error


def explain(error: Exception, repo_id: str, kind: str) -> str:
    # The client wraps what goes wrong with large files and with downloads.
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 keeps everything from the Hub: unset it"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return explain_status(error, repo_id, kind)
    if isinstance(error, ValueError):
        return f"the Hub refuses the card: {one_line(error)}"  # the client's word for what it finds in the metadata
    return f"the connection to the Hub failed ({type(error).__name__}: {one_line(error)})"


def explain_status(error: HfHubHTTPError, repo_id: str, kind: str) -> str:
    status, said = error.response.status_code, one_line(error.server_message or "")
    reasons = {
        400: "the Hub refuses it",
        401: "the Hub does not know your token: log in by `hf auth login`",
        402: "the Hub wants payment for this, or your quota is used up",
        403: f"your token has no right to write to {repo_id!r}, or your quota is used up",
        404: f"there is no {kind} {repo_id!r} or no such revision, or your token may not see it",
        409: f"{repo_id!r} is there already",
        412: f"somebody else changed {repo_id!r} meanwhile",
        413: "a file is too large for the Hub",
        429: "the Hub asks you to wait: too many requests",
    }
    reason = reasons.get(status, f"the Hub failed with status {status}" if status >= 500 else f"status {status}")
    return f"{reason} ({status}{f': {said}' if said else ''})"


def one_line(text: object) -> str:
    return " ".join(str(text).split())
