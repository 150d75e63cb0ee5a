"""Which package may import which, and what the files that travel to the Hub may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# The arrows: what each package may import of the others. Nothing imports a script.
ALLOWED = {
    "modeling_vit_custom": (),
    "model_cards": ("modeling_vit_custom",),
    "trainers": ("modeling_vit_custom", "model_cards"),
    # What its command sends to the Hub imports only the first of them, which travels along.
    "spaces": ("modeling_vit_custom", "trainers.hub"),
}
SCRIPTS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ALLOWED
    for path in (ROOT / package).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
}
HUB_FILES = ("configuration_vit_custom", "kernels", "modeling_vit_custom")


def imported_modules(tree: ast.AST, package: str) -> list[str]:
    """Absolute names of all modules that a file of `package` imports, wherever in the file."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parent = package.split(".")
                parent = parent[: len(parent) - node.level + 1]
                module = ".".join([*parent, module] if module else parent)
            # `from a import b` may import the module a.b.
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def forbidden_imports(source: str, package: str) -> list[str]:
    """Imports of our own packages, from a file of `package`, that no arrow allows."""
    found = []
    for name in imported_modules(ast.parse(source), package):
        if any(is_within(name, script) for script in SCRIPTS):
            found.append(name)
        elif name.split(".")[0] in ALLOWED and not is_within(name, package.split(".")[0]):
            allowed = ALLOWED[package.split(".")[0]]
            # `from model_cards import figures` names model_cards first, and figures next.
            if not any(is_within(name, module) or is_within(module, name) for module in allowed):
                found.append(name)
    return found


FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    assert forbidden_imports(path.read_text(), package) == []


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("from modeling_vit_custom import ViTCustomModel", "trainers", []),
        ("from .data import load", "trainers", []),
        ("from trainers.hub import explain_refusals", "spaces", []),
        ("import trainers.optim", "modeling_vit_custom", ["trainers.optim"]),
        ("def f():\n    from trainers.data import x", "model_cards", ["trainers.data", "trainers.data.x"]),
        ("from model_cards.card import x", "spaces", ["model_cards.card", "model_cards.card.x"]),
        ("from .finetune import main", "trainers", ["trainers.finetune", "trainers.finetune.main"]),
    ],
)
def test_the_walk_finds_what_it_should(source, package, found):
    assert forbidden_imports(source, package) == found


def test_every_package_of_the_arrows_is_there():
    assert {package for package in ALLOWED if list((ROOT / package).glob("*.py"))} == set(ALLOWED)


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_import_only_what_every_user_has(name):
    tree = ast.parse((ROOT / "modeling_vit_custom" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in {"torch", *sys.stdlib_module_names} for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            # The library copies flat siblings only, and finds them by a line that begins with their import.
            assert node.level == 1
            assert node.module in HUB_FILES
            assert node.col_offset == 0
        elif isinstance(node, ast.ImportFrom):
            top = node.module.split(".")[0]
            assert top in {"torch", "transformers", *sys.stdlib_module_names} or (
                node.module == "huggingface_hub.dataclasses"
            )


def test_scripts_are_found():
    assert {"trainers.finetune", "spaces.app"} <= SCRIPTS


def test_the_package_starts_without_its_neighbours():
    heavy = ["datasets", "gradio", "matplotlib", "model_cards", "spaces", "timm", "trainers"]
    code = f"import sys\nfor name in {heavy}: sys.modules[name] = None\nimport modeling_vit_custom"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
