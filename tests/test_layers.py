"""Imports point one way: weight, scheme, errors, native < formats < compress, and weight < kernels < plugin."""

import ast
from pathlib import Path

import pytest

import vllm_sparse

PACKAGE = Path(vllm_sparse.__file__).parent
HUB = {"errors", "scheme", "weight", "native"}
ALLOWED = {
    "errors": set(),
    "scheme": {"errors"},
    "weight": {"errors", "scheme"},
    "native": {"errors"},
    "formats": HUB | {"formats"},
    "kernels": HUB | {"kernels"},
    "compress": HUB | {"formats", "compress"},
    "plugin": HUB | {"formats", "kernels", "plugin"},
    "bench": HUB | {"formats", "bench"},
}
SUBPROCESSES = {Path("bench/engine.py"), Path("bench/client.py")}  # modules of the benchmark that run alone
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """Return the absolute names of everything that ``file`` imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    rooms = {name.split(".")[1] for name in imported_modules(file) if name.startswith("vllm_sparse.")}
    # `from vllm_sparse.weight import …` also yields names below the module, which is the same room.
    assert rooms - {"__version__"} <= ALLOWED.get(room, rooms), f"{file} reaches back"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_plugin_and_the_commands_import_vllm(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ALLOWED and room != "plugin" and file.relative_to(PACKAGE) not in SUBPROCESSES:
        assert not [name for name in imported_modules(file) if name.split(".")[0] == "vllm"]
