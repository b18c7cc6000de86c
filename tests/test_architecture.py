"""The rules that keep the package readable, checked on its source: layers, sizes, names, examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fmeta

PACKAGE = Path(fmeta.__file__).parent
README = PACKAGE.parent / "README.md"
FILES = sorted(PACKAGE.rglob("*.py"))

FIRST = (
    ("types",),
    ("tree",),
    ("rates", "functional", "calibration"),
    ("parts",),
    ("weights", "losses", "schedules", "uphill"),
    ("models", "data"),
    ("tasks",),
)
"""The parts of the lowest layers, in an order of their own."""
LAYERS = (
    *FIRST,
    ("optim", "adjoint", "implicit"),
    ("adapt",),
    ("metric", "beside", "stopping", "sharp", "annealing"),
    ("algorithms",),
    ("parallel",),
    ("meta", "standalone"),
    ("estimators",),
    ("learned",),
    ("embeddings", "predict"),
    ("fmeta",),  # the public names, gathered
    ("train",),
    ("__main__",),
)
"""A file imports from lower layers, or from its own folder."""
STRANGERS = ("optim", "algorithms")
"""Folders whose files never import each other: what two of them share belongs one layer down."""


def name_of(file: Path) -> str:
    """``fmeta/optim/sgd.py`` -> ``optim.sgd``; a folder's ``__init__`` has the folder's name."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer_of(module: str) -> int:
    first = module.split(".")[0]
    found = [index for index, names in enumerate(LAYERS) if first in names]
    assert found, f"{first} is in no layer: give it a place in LAYERS"
    return found[0]


def imported(file: Path) -> Iterator[str]:
    """Names of the package's modules that a file imports, those inside functions too."""
    modules = {name_of(other) for other in FILES}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import, write the whole path"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name.removeprefix("fmeta.") in modules else str(node.module) for name in inner]
        else:
            continue
        yield from (n.removeprefix("fmeta.") for n in found if n == "fmeta" or n.startswith("fmeta."))


def may_import(importer: str, other: str) -> bool:
    """Whether the layer table allows ``importer`` to import ``other``."""
    a, b = importer.split(".")[0], other.split(".")[0]
    if a == b:
        return a not in STRANGERS or importer == a
    return layer_of(b) < layer_of(a)


@pytest.mark.parametrize("file", [f for f in FILES if name_of(f)], ids=name_of)
def test_imports_point_to_lower_layers(file: Path) -> None:
    wrong = [other for other in imported(file) if not may_import(name_of(file), other)]
    assert not wrong, f"{name_of(file)} (layer {layer_of(name_of(file))}) imports {wrong}"


def test_no_import_cycles() -> None:
    names = {name_of(file) for file in FILES} - {""}
    graph = {name_of(file): set(imported(file)) & names for file in FILES if name_of(file)}
    # A folder's __init__ gathers its files; these never wait for it, so the edge between them is no cycle.
    for name in graph:
        graph[name] -= {name, *(other for other in graph[name] if other.startswith(f"{name}."))}
    done: list[str] = []
    while len(done) < len(graph):
        ready = [name for name, needs in graph.items() if name not in done and needs <= set(done)]
        assert ready, f"import cycle among {sorted(set(graph) - set(done))}"
        done += ready


def strategies(tree: ast.AST) -> Iterator[str]:
    """Uses of what only ``parallel`` may know: vmap, torch.compile, make_fx, torch.distributed."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id="vmap" | "make_fx" as name) | ast.Attribute(attr="vmap" | "make_fx" as name):
                yield name
            case ast.Attribute(value=ast.Name(id="torch"), attr="compile" | "distributed" as name):
                yield f"torch.{name}"
            case ast.ImportFrom(module=module, names=names):
                yield from (a.name for a in names if a.name in ("vmap", "make_fx", "distributed"))
                if module and (module.startswith("torch.distributed") or "proxy_tensor" in module):
                    yield module
            case ast.Import(names=names):
                yield from (a.name for a in names if a.name.startswith("torch.distributed"))


@pytest.mark.parametrize(
    "file", [f for f in FILES if name_of(f) and not name_of(f).startswith("parallel")], ids=name_of
)
def test_strategy_lives_in_parallel_only(file: Path) -> None:
    assert not list(strategies(ast.parse(file.read_text())))


@pytest.mark.parametrize(
    "source", ["torch.vmap(f)", "from torch.func import vmap", "import torch.distributed as d"]
)
def test_the_search_for_strategies_finds_them(source: str) -> None:
    assert list(strategies(ast.parse(source)))


def calls(tree: ast.AST) -> Iterator[str]:
    """Prints and reads of values; a check (by its name) may read values, for it runs once and eagerly."""
    match tree:
        case ast.FunctionDef(name=name) if "check" in name:
            return
        case ast.Call(func=ast.Name(id="print")):
            yield f"print in line {tree.lineno}"
        case ast.Call(func=ast.Attribute(attr="item"), args=[]):
            yield f".item() in line {tree.lineno}"
    for child in ast.iter_child_nodes(tree):
        yield from calls(child)


@pytest.mark.parametrize(
    "file", [f for f in FILES if name_of(f) and not name_of(f).startswith(("train", "__main__"))], ids=name_of
)
def test_no_prints_and_no_waiting_for_values_below_the_trainer(file: Path) -> None:
    assert not list(calls(ast.parse(file.read_text())))


def code_lines(function: ast.FunctionDef) -> int:
    """Length of a function without its docstring."""
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        length -= (first.end_lineno or first.lineno) - first.lineno + 1
    return length


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text()
    limit = 100 if name_of(file).startswith("algorithms") else 250
    assert len(text.splitlines()) <= limit, f"{len(text.splitlines())} lines, at most {limit}"
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {f.name: code_lines(f) for f in functions if code_lines(f) > 50}
    assert not long, f"longer than 50 lines without the docstring: {long}"


def raised_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Message of every ``raise``, with ``{}`` where a value is put in."""
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id="Unsupported"))):
                pass  # why a graph goes to another compiler, which nobody is shown
            case ast.Raise(exc=ast.Call(args=[ast.Constant(value=str(text)), *_])):
                yield node.lineno, text
            case ast.Raise(exc=ast.Call(args=[ast.JoinedStr(values=parts), *_])):
                texts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts]
                yield node.lineno, "".join(texts)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_messages_open_with_the_call_they_are_about(file: Path) -> None:
    opening = re.compile(r"^[\w.(){}=]+: ")
    wrong = [found for found in raised_texts(ast.parse(file.read_text())) if not opening.match(found[1])]
    assert not wrong, f"expected 'call: what was expected, got what', found {wrong}"


SIGNATURES = {
    "functionalize": ["module"],
    "adapt": ["loss_fn", "params", "batch", "inner", "*steps", "*adjoint"],
    "maml": [
        "loss_fn", "inner", "*steps", "*adjoint", "*query_loss", "*adapts", "*batches",
    ],
    "anil": ["loss_fn", "inner", "*steps", "*adapts"],
    "reptile": ["loss_fn", "inner", "*steps"],
    "metasgd": ["loss_fn", "*steps", "*lr"],
    "mamlpp": ["loss_fn", "*steps", "*lr", "*weights", "*per_step", "*adjoint", "*adapts"],
    "mamlpp_schedule": ["steps", "total", "*multi_step", "*first_order", "*levels"],
    "sharpmaml": ["loss_fn", "inner", "*steps", "*inner_radius", "*outer_radius", "*adjoint", "*adapts"],
    "sharpness_aware": ["algorithm", "*inner_radius", "*outer_radius"],
    "protonet": ["apply", "*distance"],
    "learned_update": ["loss_fn", "rule", "*steps", "*learns_start", "*adapts"],
    "estimate": ["system", "estimator", "plan", "*each"],
    "estimate_init": ["system", "estimator", "outer", "theta", "tasks", "seed"],
    "estimate_step": ["system", "estimator", "outer", "plan", "*each"],
    "bptt": ["truncation"],
    "forward_mode": ["truncation"],
    "es": ["std", "*pairs"],
    "pes": ["std", "*truncation", "*pairs"],
    "hypergrad": ["inner_loss", "outer_loss", "inner", "*steps", "*method", "*solver", "*batches", "*plan"],
    "learned.meta_transformer": ["*lr", "*width", "*layers", "*heads", "*hidden", "*knowledge", "*policy"],
    "learned.mlp": ["*hidden", "*layers", "*lr"],
    "learned.lstm": ["*hidden", "*layers", "*scale", "*lr"],
    "learned.schedule": ["*lr", "*width", "*layers", "*heads"],
    "learned.training": ["problem", "rule", "*steps", "*log"],
    "learned.curves": ["problem", "rule", "theta", "tasks", "steps", "plan", "*each"],
    "learned.load": ["path"],
    "learned.save": ["path", "rule", "theta"],
    "sgd": ["lr"],
    "adam": ["lr", "*eps", "*eps_root"],
    "unroll": [],
    "first_order": [],
    "truncated": ["last"],
    "meta_init": ["algorithm", "outer", "params"],
    "meta_grad": ["algorithm", "plan"],
    "meta_step": ["algorithm", "outer", "plan"],
    "meta_eval": ["algorithm", "plan", "steps"],
    "meta_predict": ["algorithm", "plan", "steps"],
    "explain": ["algorithm", "plan", "meta", "tasks"],
    "losses.cross_entropy": ["apply"],
    "losses.mse": ["apply"],
    "losses.calibration_error": ["logits", "labels", "bins"],
    "losses.reliability": ["logits", "labels", "bins"],
    "tasks.sinusoid": ["tasks", "shots", "queries"],
    "tasks.few_shot": ["pool", "ways", "shots", "queries", "tasks", "augment", "device"],
    "tasks.mixture": ["samplers", "*tasks"],
    "embeddings.pca": ["pool", "dim", "*whiten"],
    "embeddings.prototransfer": ["pool", "*module", "*steps", "*ways", "*queries", "*augment", "*lr", "*seed"],
    "data.glyphs": [],
    "data.omniglot": ["root", "download", "split", "seed"],
    "data.image_folder": ["path"],
    "data.cactus": ["pool", "embed", "*clusters", "*partitions", "*smallest", "*seed"],
    "data.from_tensors": ["x", "y", "split"],
    "data.text_csv": ["path", "tokenizer", "*split", "*max_length"],
    "models.encoder": ["model", "*pooling"],
    "models.mlp": [],
    "models.conv4": ["in_channels", "ways", "channels", "pool", "head", "size"],
    "models.resnet12": ["in_channels", "ways"],
    "models.warped": ["module", "at"],
}  # fmt: skip
"""Public functions and the arguments that users call by name; ``*`` for keyword-only ones."""

FIELDS = {
    "Batch": ("x", "y"),
    "Task": ("support", "query"),
    "Transform": ("init", "update"),
    "Adapted": ("params", "opt_state", "losses"),
    "MetaState": ("meta", "opt_state", "step", "carry"),
    "System": ("start", "step", "steps", "length"),
    "InnerLoop": ("start", "loss", "inner", "outer", "steps", "weights"),
    "Algorithm": ("init", "inner_loop", "adapt", "loss", "predict"),
}


def look_up(path: str) -> Any:
    found: Any = fmeta
    for part in path.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_public_functions_take_the_documented_arguments(path: str) -> None:
    parameters = inspect.signature(look_up(path)).parameters
    for expected in SIGNATURES[path]:
        name = expected.removeprefix("*")
        assert name in parameters, f"{path} has no argument {name}: {list(parameters)}"
        only = parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert only or not expected.startswith("*"), f"{path}: {name} must be keyword-only"


@pytest.mark.parametrize("name", FIELDS)
def test_records_have_the_documented_fields_in_order(name: str) -> None:
    assert getattr(fmeta, name)._fields[: len(FIELDS[name])] == FIELDS[name]


def test_the_default_plan() -> None:
    plan = fmeta.Plan()
    assert (plan.engine, plan.tasks, plan.chunk_size, plan.compile) == ("adjoint", "vmap", None, "auto")
    assert (plan.remat, plan.precision, plan.mesh, plan.randomness) == (None, None, None, "error")


def test_all_is_sorted_and_complete() -> None:
    names = list(fmeta.__all__)
    assert names == sorted(set(names)), "fmeta.__all__ must be sorted and free of repeats"
    missing = [name for name in names if not hasattr(fmeta, name)]
    assert not missing, f"in __all__ but not there: {missing}"
    modules = {name for name, value in vars(fmeta).items() if isinstance(value, ModuleType)}
    public = {name for name in vars(fmeta) if not name.startswith("_")} - modules - {"annotations"}
    assert public <= set(names), f"public but not in __all__: {sorted(public - set(names))}"


def modules() -> list[str]:
    found = pkgutil.walk_packages(fmeta.__path__, "fmeta.")
    return ["fmeta", *(module.name for module in found if not module.name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(module, optionflags=flags)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed, see above"


def public_functions() -> list[str]:
    here = [name for name in getattr(fmeta, "__all__", ()) if inspect.isfunction(getattr(fmeta, name))]
    return [*here, *(path for path in SIGNATURES if "." in path)]


@pytest.mark.parametrize("path", public_functions())
def test_public_functions_are_documented(path: str) -> None:
    text = inspect.getdoc(look_up(path)) or ""
    assert text, f"{path} has no docstring"
    named = list(inspect.signature(look_up(path)).parameters)
    if len(named) > 1 and not re.search(r"[Aa]rguments.* as for", text):
        undocumented = [name for name in named if not re.search(rf"\b{name}\b", text)]
        assert not undocumented, f"{path}: the docstring does not say what {undocumented} is"


def test_readme_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not README.exists():
        pytest.skip("README.md is not written yet")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks, "README.md has no python block"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
