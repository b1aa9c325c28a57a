"""The shape of the package, read from its source: the order of imports, the seam, the docstrings."""

import ast
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import vitembed

ROOT = Path(vitembed.__file__).parent

# Each module or folder may import from those above it, and from itself.
ORDER = [
    "errors",
    "files",
    "metrics",
    "plots",
    "images",
    "layouts",
    "ink",
    "preprocess",
    "architecture",
    "weights",
    "vit",
    "model_card",
    "embedding_net",
    "saved_model",
    "decoding",
    "embedder",
    "explain",
    "export",
    "index",
    "training",
    "verify",
    "evaluate",
    "report",
    "evaluation_page",
    "decision_page",
    "gallery",
    "embedding_map",
    "doctor",
    "demo",
    "cli",
    "__main__",
]

# What never imports torch. `evaluate` and `report` measure and show what the left side made.
RIGHT_OF_THE_SEAM = [
    "errors",
    "files",
    "metrics",
    "plots",
    "images",
    "layouts",
    "ink",
    "preprocess",
    "index",
    "verify",
    "evaluate",
    "report",
    "evaluation_page",
    "decision_page",
    "gallery",
    "embedding_map",
]


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module by its dotted name below `vitembed`."""
    trees = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def exists(name: str) -> bool:
    """Tell whether a dotted name is a module of ours."""
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(tree: ast.AST) -> set[str]:
    """Return the dotted names that a module imports, wherever it does, but for what only a type checker sees."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from package import module` needs the module, `from module import name` needs `module`.
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if exists(name) else str(node.module) for name in full}
        names |= imported(node)
    return names


def ours(names: set[str]) -> set[str]:
    """Return the modules of `vitembed` among dotted names, without the prefix."""
    known = set(modules())
    stripped = {name.removeprefix("vitembed.") for name in names if name.startswith("vitembed.")}
    return {name for name in stripped if name in known}


def test_every_module_has_its_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in modules() if name} == set(ORDER)


def test_modules_import_only_from_above() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        if name
        for other in ours(imported(tree))
        if ORDER.index(other.split(".")[0]) > ORDER.index(name.split(".")[0])
    ]
    assert wrong == []


def test_there_is_no_cycle() -> None:
    graph = {name: ours(imported(tree)) - {name} for name, tree in modules().items() if name}
    # A package's own __init__ may import its modules; they must not import it back.
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_nothing_right_of_the_seam_imports_torch() -> None:
    left = {"torch", "torchvision", "accelerate", "safetensors"}
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        if name.split(".")[0] in RIGHT_OF_THE_SEAM
        for other in imported(tree)
        if other.split(".")[0] in left
        or (other.startswith("vitembed.") and other.split(".")[1] in set(ORDER) - set(RIGHT_OF_THE_SEAM))
    ]
    assert wrong == []


def test_faiss_is_imported_in_one_place() -> None:
    users = {name for name, tree in modules().items() if "faiss" in imported(tree)}
    assert users == {"index.faiss_kernels", "index.faiss_files", "doctor"}


@pytest.mark.parametrize("statement", ["import vitembed", "import vitembed.cli", "import vitembed.errors"])
def test_importing_is_light(statement: str) -> None:
    code = f"import sys; {statement}; print(*(m for m in ('torch', 'faiss', 'numpy', 'PIL') if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("module", ["vitembed.index", "vitembed.verify", "vitembed.metrics", "vitembed.preprocess"])
def test_the_right_side_runs_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_is_importable_without_faiss_and_typer() -> None:
    code = "import sys\nfor m in ('faiss', 'typer', 'pytorch_metric_learning'): sys.modules[m] = None\n"
    subprocess.run([sys.executable, "-c", code + "import vitembed.training, vitembed.embedder"], check=True)


def test_every_public_name_is_there_and_listed() -> None:
    for name in vitembed.__all__:
        assert getattr(vitembed, name) is not None
    assert set(vitembed.__all__) <= set(dir(vitembed))
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        vitembed.Embeder  # noqa: B018
    stub = {
        alias.asname
        for node in ast.walk(modules()[""])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert stub | {"__version__"} == set(vitembed.__all__), "what type checkers see differs from what there is"


def public_objects() -> list[tuple[str, object]]:
    found = []
    for info in pkgutil.walk_packages(vitembed.__path__, "vitembed."):
        if info.name.split(".")[-1].startswith("_"):
            continue
        module = importlib.import_module(info.name)
        found.append((info.name, module))
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                found.append((f"{info.name}.{name}", value))
            if inspect.isclass(value):
                found += [
                    (f"{info.name}.{name}.{method}", member)
                    for method, member in vars(value).items()
                    if not method.startswith("_")
                    and (inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod))
                ]
    return found


def test_every_public_name_has_a_docstring() -> None:
    objects = public_objects()
    assert len(objects) > 150
    assert [name for name, value in objects if not inspect.getdoc(value)] == []


def test_no_function_is_longer_than_a_reader_can_hold() -> None:
    long = {
        f"{name}.{node.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None and node.end_lineno - node.lineno >= 100
    }
    assert long <= {"cli.training.train"}  # its signature is the list of options
