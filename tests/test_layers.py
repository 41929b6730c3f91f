"""The layers of the code: imports point only downwards and never in a cycle, files and functions are short."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

# Lowest first: a file imports only from its own folder and from folders of lower layers.
LAYERS = [
    {"training.runtime"},
    {"training.readers"},
    {"dataloaders", "training.data", "training.loss"},
    {"training.flags"},
    {"training.model.packing", "training.model.weights"},
    {"training.model.names"},
    {"training.model.tokenizers"},
    {"training.model.towers"},
    {"training.model.assembly"},
    {"training.eval", "training.prepare"},
    {"training.train"},
    {"training.export", "training.search"},
    {"training"},  # main.py and the other entry points
    {"benchmarks"},
]


def modules() -> dict[str, Path]:
    found = {}
    for base in (ROOT / "src", ROOT):
        for package in ("training", "dataloaders", "benchmarks"):
            for path in (base / package).rglob("*.py"):
                parts = path.relative_to(base).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in known and known[name].name != "__init__.py"}


def folder_of(module: str) -> str:
    parts = module.split(".")
    depth = 3 if parts[:2] == ["training", "model"] else 2 if parts[0] == "training" and len(parts) > 2 else 1
    return ".".join(parts[:depth])


def test_imports_point_down():
    layer_of = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}
    known = modules()
    for module, path in known.items():
        for other in imports_of(path, known):
            mine, its = folder_of(module), folder_of(other)
            assert mine == its or layer_of[its] < layer_of[mine], f"{module} imports {other}, which is not below it"


# Optional packages: imported only when needed; a message names them if they are not installed.
OPTIONAL = {"wandb", "vllm", "clip_benchmark", "onnx", "onnxscript", "onnxruntime", "peft", "pillow_heif"}


def declared(*files: str) -> set[str]:
    lines = [line.strip() for file in files for line in (ROOT / file).read_text().splitlines()]
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in lines if line and not line.startswith("#")}
    return {name.lower().replace("_", "-") for name in names}


def test_every_package_that_is_imported_is_declared():
    beside = [*(ROOT / "tests").glob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    own = {"training", "dataloaders", "benchmarks"} | {path.stem for path in beside}
    distributions = packages_distributions()
    installed = [path for path in modules().values() if "benchmarks" not in path.relative_to(ROOT).parts]
    others = [path for folder in ("tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    sources = {"requirements-training.txt": installed, "requirements-test.txt": others}
    needed, missing = set(), []
    for file, paths in sources.items():
        needed |= declared(file)
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                for name in {name.split(".")[0] for name in names} - own - OPTIONAL - set(sys.stdlib_module_names):
                    packages = {package.lower().replace("_", "-") for package in distributions.get(name, [name])}
                    missing += [] if packages & needed else [f"{path} imports {name}, not declared in {file}"]
    assert not missing


def test_no_import_cycles():
    known = modules()
    graph = {module: imports_of(path, known) for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_files_and_functions_are_short():
    for path in [*modules().values(), *(ROOT / "tests").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"


def test_public_functions_are_documented_and_typed():
    for path in modules().values():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.returns is not None, f"{path}: {node.name} returns what?"
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                assert all(a.annotation for a in arguments), f"{path}: {node.name} has an untyped argument"
