"""Put a finished checkpoint on the Hub: weights, configuration, code, image processor, card, figures, recipe, metrics.

Only what is missing there is sent. What people wrote into the card on the Hub is kept.
"""

import argparse
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from modeling_vit_custom.command_line import Parser, report_user_errors
from trainers import hub


PROGRAM = "python -m trainers.publish"
EXAMPLES = f"""\
examples:
  # what would go, without a network
  {PROGRAM} runs/mine user/name --dry_run

  # a new private repository, or the next version of an old one
  {PROGRAM} runs/mine user/name --private --tag v1.0

  # a pull request against somebody's repository
  {PROGRAM} runs/mine user/name --create_pr --message "Trained for longer"

Text of the card outside its generated parts: where somebody has written into it on the Hub, that stays, else what is
written into OUTPUT_DIR/README.md goes there.

A token is taken from `hf auth login` or HF_TOKEN, and needs the right to write."""

# What git takes for a branch or a tag of one's own.
REFERENCE = re.compile(r"(?!refs/|HEAD$)(?!.*(\.\.|//|/\.|\.lock$|[./]$))[A-Za-z0-9_][\w./-]*")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    again = f"{PROGRAM} {shlex.join(argv)}"
    try:
        with report_user_errors("publish"):
            arguments = parse_arguments(argv)
            check(arguments)
        if arguments.dry_run:
            hub.show_files(hub.collect_files(arguments.folder), arguments.repo_id)
        else:
            publish(arguments)
    except hub.RefusedError as error:
        raise SystemExit(f"publish: error: {error}; nothing is lost: settle that and go on by `{again}`") from error
    except KeyboardInterrupt:
        print(f"\npublish: interrupted; nothing is lost: go on by `{again}`", file=sys.stderr)
        raise SystemExit(130) from None


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__, EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="a folder that a training run left")
    parser.add_argument("repo_id", metavar="user/name", help="repository on the Hub, made if there is none")
    parser.add_argument(
        "--private", action="store_true", help="only you can see it; one that is public already is refused"
    )
    parser.add_argument("--revision", default="main", help="branch, made from main if there is none (main)")
    parser.add_argument(
        "--create_pr", "--create-pr", action="store_true", help="propose a pull request instead of a commit"
    )
    parser.add_argument("--tag", help="a name for this version, such as v1.0")
    parser.add_argument("--collection", help="slug (user/title-hash) or title of a collection to add the model to")
    parser.add_argument("--message", default="Publish the checkpoint and its card", help="title of the commit")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="say what would go")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be published, or not in this way."""
    hub.check_repo_id(arguments.repo_id)
    for name in ("revision", "tag"):
        value = getattr(arguments, name)
        if value is not None and not REFERENCE.fullmatch(value):
            raise ValueError(f"--{name} {value!r} is no name that git allows: letters, digits, '.', '_', '-' and '/'")
    for name in ("message", "collection"):
        if getattr(arguments, name) == "":
            raise ValueError(f"--{name} is empty")
    if arguments.create_pr and arguments.tag:
        raise ValueError(f"--tag {arguments.tag} names what is there: not with --create_pr, which proposes something")
    hub.check_publishable(arguments.folder)


def publish(arguments: argparse.Namespace) -> None:
    """Sends a folder, tags the commit and adds the model to a collection.

    Raises:
        RefusedError: if the Hub does not take one of them.
    """
    folder = arguments.folder
    destination = hub.Destination(arguments.repo_id, arguments.private or None, arguments.revision, arguments.create_pr)
    repo_id = hub.create_repo(destination)
    destination = replace(destination, repo_id=repo_id)
    if arguments.tag:
        hub.check_tag(destination, arguments.tag)
    commit = hub.upload(folder, destination, arguments.message)
    if arguments.create_pr and commit.pr_url is None:
        print(f"Nothing differs from {repo_id}: there is nothing to propose")
        return
    print(commit.pr_url or commit.commit_url)
    if arguments.tag:
        hub.add_tag(repo_id, arguments.tag, commit.oid)
        print(f"tagged {arguments.tag}")
    if arguments.collection:
        print(f"in collection {hub.add_to_collection(repo_id, arguments.collection)}")
    config = hub.read_json(folder / "config.json")
    where = f'"{repo_id}", revision="{arguments.tag or commit.oid}"'
    where += ", trust_remote_code=True" if "auto_map" in config else ""
    classifies = (config.get("architectures") or [""])[0].endswith("ForImageClassification")
    opened = f'pipeline("image-classification", {where})' if classifies else f"AutoModel.from_pretrained({where})"
    print(f"\nOpen it by transformers:\n  {opened}")


if __name__ == "__main__":
    main()
