"""What this demo is made of: its model, and the version and commit of its code."""

import json
import subprocess
from pathlib import Path

import modeling_vit_custom


FOLDER = Path(__file__).resolve().parent
# Written where a Space is published: `model`, a folder beside this file or a model of the Hub at a `revision`, and the
# `commit` of the code.
MADE_OF = FOLDER / "space.json"
OWN_MODEL = "cifar10_vit"


def default_model() -> tuple[str, str | None]:
    """The model that comes along, as a folder or an id of the Hub, and its revision there."""
    made_of = read_made_of()
    model = made_of.get("model", OWN_MODEL)
    return (str(FOLDER / model), None) if (FOLDER / model).is_dir() else (model, made_of.get("revision"))


def describe_version() -> str:
    """`vit-custom 0.1.0 (0123abcd)`; without the commit where it is not known."""
    commit = read_made_of().get("commit") or find_commit()
    version = f"vit-custom {modeling_vit_custom.__version__}"
    return version if commit is None else f"{version} ({commit})"


def find_commit() -> str | None:
    """The commit of the checkout that this file lies in, marked where files differ from it; none outside of one."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def read_made_of() -> dict[str, str]:
    return json.loads(MADE_OF.read_text(encoding="utf-8")) if MADE_OF.exists() else {}
