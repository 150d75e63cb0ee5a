"""Put the demo on the Hub as a Space of its own: the page, the packages it needs, its examples, and its model.

The model is the one that comes along, a folder that a training run left, or one of the Hub, at the revision of today.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from classifier import load_classifier
from huggingface_hub import HfApi
from transformers.utils import logging
from version import FOLDER, MADE_OF, OWN_MODEL, find_commit

import modeling_vit_custom
from modeling_vit_custom.command_line import Parser, report_user_errors
from trainers import hub


PROGRAM = "python spaces/publish.py"
EXAMPLES = f"""\
examples:
  # what would go, without a network
  {PROGRAM} user/space --dry_run

  # the demo of a model on the Hub
  {PROGRAM} user/space --model user/name

  # of your own checkpoint, which travels along
  {PROGRAM} user/space --model runs/mine --private

A token is taken from `hf auth login` or HF_TOKEN, and needs the right to write. The Hub may want a paid plan."""

OWN_FILES = ("app.py", "classifier.py", "page.py", "uploads.py", "version.py", "requirements.txt", "examples/*.png")
PACKAGE = Path(modeling_vit_custom.__file__).parent


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        with report_user_errors("publish"):
            arguments = parse_arguments(argv)
            hub.check_repo_id(arguments.repo_id)
            assemble(Path(folder), arguments.model)
        if arguments.dry_run:
            found = (file for file in sorted(Path(folder).rglob("*")) if file.is_file())
            files = {file.relative_to(folder).as_posix(): file for file in found}
            hub.show_files(files, f"the Space {arguments.repo_id}")
            return
        try:
            url = upload(Path(folder), arguments.repo_id, arguments.private or None)
        except hub.RefusedError as error:
            again = f"{PROGRAM} {shlex.join(argv)}"
            raise SystemExit(f"publish: error: {error}; nothing is lost: settle that and go on by `{again}`") from error
    print(url)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__, EXAMPLES)
    parser.add_argument("repo_id", metavar="user/space", help="the Space, made if there is none")
    parser.add_argument(
        "--model", default=str(FOLDER / OWN_MODEL), metavar="DIR|user/name", help="(the one that comes along)"
    )
    parser.add_argument("--private", action="store_true", help="for a Space that is made: only you can see it")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="say what would go")
    return parser.parse_args(argv)


def assemble(folder: Path, model: str) -> None:
    """Everything that the Space needs, into an empty folder.

    Raises:
        ValueError: if a local model is no complete checkpoint.
        RefusedError: if the Hub does not give one of its own.
        UnusableModelError: if a model cannot be shown.
    """
    for file in (file for pattern in OWN_FILES for file in FOLDER.glob(pattern)):
        copy(file, folder / file.relative_to(FOLDER))
    copy(FOLDER.parent / "LICENSE", folder / "LICENSE")
    for file in PACKAGE.rglob("*.py"):
        copy(file, folder / PACKAGE.name / file.relative_to(PACKAGE))
    made_of, front_matter = {"commit": find_commit()}, {}
    if Path(model).is_dir():
        hub.check_publishable(Path(model))
        load_classifier(model)
        made_of["model"] = Path(model).resolve().name
        if (folder / made_of["model"]).exists():
            raise ValueError(f"a folder called {made_of['model']!r} is a part of the demo: rename that of the model")
        for name, file in hub.collect_files(Path(model)).items():
            copy(file, folder / made_of["model"] / name)
    else:
        with hub.explain_refusals(model):
            made_of |= {"model": model, "revision": HfApi().model_info(model).sha}
        load_classifier(model, revision=made_of["revision"])
        front_matter["models"] = [model]
    _, metadata, text = (FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_dump(yaml.safe_load(metadata) | front_matter, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{metadata}---\n{text}", encoding="utf-8")
    known = {name: value for name, value in made_of.items() if value is not None}
    (folder / MADE_OF.name).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def upload(folder: Path, repo_id: str, private: bool | None) -> str:
    """Sends what is missing or has changed, removes what is not part of it any more, and gives the address.

    Raises:
        RefusedError: if the Hub does not take it.
    """
    api = HfApi()
    with hub.explain_refusals(repo_id):
        hub.check_token(api)
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        if private and not api.repo_info(url.repo_id, repo_type="space").private:
            raise hub.RefusedError(f"Space {url.repo_id!r} is there already, and public: nothing was sent")
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            repo_type="space",
            commit_message="Publish the demo",
            delete_patterns="*",
        )
    return str(url)


if __name__ == "__main__":
    main()
