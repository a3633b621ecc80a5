"""What the project says about itself, held against what is there: names, dependencies, documents, sizes, imports."""

from __future__ import annotations
import __future__

import ast
import functools
import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "trainfn"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

OPTIONAL = [
    "matplotlib",
    "onnx",
    "onnxscript",
    "pandas",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "transformers",
]
HEAVY = ["torch._dynamo", "torch._inductor", *OPTIONAL]


def read(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def module_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- what an import costs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty module for every optional package, so that `try: import pandas` works everywhere."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name in OPTIONAL:
        (folder / f"{name}.py").touch()
    return folder


@pytest.fixture(scope="module")
def torch_alone(stand_ins: Path) -> set[str]:
    return modules_after("import torch", stand_ins)


def modules_after(program: str, stand_ins: Path) -> set[str]:
    """Run ``program``, which prints nothing, in a fresh process; return the names of the modules it has loaded."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{program}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        check=False,
        cwd=stand_ins,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(stand_ins), str(ROOT)])},
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def heavy(modules: set[str]) -> list[str]:
    return sorted(m for m in modules if any(m == name or m.startswith(f"{name}.") for name in HEAVY))


def test_import_loads_nothing_heavy(stand_ins: Path, torch_alone: set[str]) -> None:
    loaded = modules_after("import trainfn", stand_ins)
    assert "trainfn" in loaded
    assert heavy(loaded - torch_alone) == []


RUN = """import torch, trainfn
x = torch.ones(8, 1, 4, 8)
class Attention(torch.nn.Linear):
    def forward(self, x):
        return super().forward(torch.nn.functional.scaled_dot_product_attention(x, x, x)).mean((1, 2))
trainfn.fit(Attention(8, 2), (x, torch.zeros(8, dtype=torch.long)), loss="classification", max_steps=3, seed=0,
            batch_size=4, optimizer=trainfn.optim.adamw(1e-3), progress=False, device="cpu", compile="eager")
"""


def test_a_run_in_eager_does_not_wait_for_the_compiler(stand_ins: Path) -> None:
    assert "torch._dynamo" not in modules_after(RUN, stand_ins)


def test_import_loads_nothing_heavy_control(stand_ins: Path, torch_alone: set[str]) -> None:
    program = "import torch, torch._dynamo\ntry:\n    import pandas\nexcept ImportError:\n    pass"
    found = heavy(modules_after(program, stand_ins) - torch_alone)
    assert {"torch._dynamo", "pandas"} <= set(found)


# --- the front door ---------------------------------------------------------------------------------------------------


def nodes_outside(scopes: tuple[type[ast.AST], ...], tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below ``tree``, without looking into those of the types ``scopes``."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, scopes):
            yield from nodes_outside(scopes, node)


def bound_names(source: str) -> set[str]:
    """Return the public names that a module's own statements bind, those under `if TYPE_CHECKING` or `try` included.

    >>> sorted(bound_names("import os.path, json as j; from a import b, _c, d as e; x: int = 1; y = z = 2"))
    ['b', 'e', 'j', 'os', 'x', 'y', 'z']
    >>> sorted(bound_names("class A:\\n  x = 1\\ndef f(): y = 1\\nif TYPE_CHECKING: import b\\nelse: c = 1"))
    ['A', 'b', 'c', 'f']
    """
    names: set[str] = set()
    scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.expr)
    for node in nodes_outside(scopes, ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def has_own_docstring(name: str, value: object) -> bool:
    """Whether somebody wrote a docstring for ``value``; one inherited from its type or made up by a tool is none."""
    if isinstance(value, type):
        text = value.__dict__.get("__doc__")
        made_up = re.match(rf"{re.escape(value.__name__)}\(.*\)$", text or "", re.DOTALL)  # as NamedTuple does
        return bool(text and text.strip()) and not made_up
    if isinstance(value, (types.FunctionType, types.ModuleType)):
        return bool(value.__doc__ and value.__doc__.strip())
    # Anything else (an alias of a type, a constant) has its docstring below the assignment, where only readers see it.
    return any(assigned_with_docstring(name, ast.parse(read(path))) for path in SOURCES)


def assigned_with_docstring(name: str, tree: ast.Module) -> bool:
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return (
                    isinstance(following, ast.Expr)
                    and isinstance(following.value, ast.Constant)
                    and isinstance(following.value.value, str)
                )
    return False


def test_all_is_what_there_is() -> None:
    import trainfn

    listed = [name for name in trainfn.__all__ if name != "__version__"]
    assert listed == sorted(set(listed), key=lambda name: (not name.isupper(), name)), "sorted, as ruff sorts __all__"
    assert set(listed) == bound_names(read("trainfn/__init__.py"))
    assert [name for name in listed if not hasattr(trainfn, name)] == []
    rooms = {path.stem for path in PACKAGE.iterdir()}  # importing anything from a room binds its name, meant or not
    stray = [
        name
        for name, value in vars(trainfn).items()
        if not (name.startswith("_") or name in listed or value is __future__.annotations)
        and not (name in rooms and isinstance(value, types.ModuleType))
    ]
    assert stray == []


def test_every_public_name_has_a_docstring() -> None:
    import trainfn

    assert trainfn.__doc__
    assert trainfn.__doc__.strip()
    names = [name for name in trainfn.__all__ if name != "__version__"]
    assert names
    assert [name for name in names if not has_own_docstring(name, getattr(trainfn, name))] == []


def test_every_public_name_has_a_docstring_control() -> None:
    from typing import NamedTuple

    class Bare(NamedTuple):
        x: int

    class Child(ValueError):
        pass

    assert not has_own_docstring("Bare", Bare)
    assert not has_own_docstring("Child", Child)
    assert not has_own_docstring("f", lambda: None)
    assert not has_own_docstring("a_name_nobody_assigns", dict[str, int])
    assert not assigned_with_docstring("X", ast.parse("X = 1\nY = 2\n'''of Y'''"))
    assert assigned_with_docstring("Y", ast.parse("X = 1\nY = 2\n'''of Y'''"))


# --- dependencies -----------------------------------------------------------------------------------------------------


def core() -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins() -> dict[str, str]:
    """Return ``constraints.txt`` as {name: version}; every line of it must be an exact, public pin."""
    found: dict[str, str] = {}
    for line in read("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line)
            assert match, f"constraints.txt: not of the form name==version: {line!r}"
            name = canonicalize_name(match[1])
            assert name not in found, f"constraints.txt: {name} is pinned twice"
            found[name] = match[2]
    return found


def test_every_dependency_is_pinned() -> None:
    extras = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
    required = [*core().values(), *extras]
    pinned = pins()
    assert [str(r) for r in required if canonicalize_name(r.name) not in pinned] == []
    assert [str(r) for r in required if not r.specifier.contains(pinned[canonicalize_name(r.name)])] == []


def test_no_platform_package_is_pinned() -> None:
    assert [name for name in pins() if re.match(r"nvidia|cuda|triton|pytorch-triton", name)] == []


def test_every_core_dependency_is_in_the_readme() -> None:
    rows = {canonicalize_name(name) for name in re.findall(r"^\| `([^`]+)` \|", read("README.md"), re.MULTILINE)}
    assert sorted(set(core()) - rows) == []


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported: not those inside functions or `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.orelse:
                yield from at_import(ast.Module(body=[statement], type_ignores=[]))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_import(node)


@functools.cache
def distributions() -> Mapping[str, list[str]]:
    """Return which installed distributions provide each importable package."""
    return importlib.metadata.packages_distributions()


def foreign_imports(source: str, allowed: set[str]) -> list[str]:
    """Return the packages that importing ``source`` imports and no distribution in ``allowed`` provides.

    The standard library and trainfn itself do not count.
    """
    found = []
    for node in at_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"trainfn"}:
            if not allowed & {canonicalize_name(name) for name in distributions().get(top, [])}:
                found.append(top)
    return sorted(found)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_only_core_dependencies(path: Path) -> None:
    assert foreign_imports(read(path), set(core())) == []


def test_imports_only_core_dependencies_control() -> None:
    source = """
import os, torch.nn, attrs
from attr import define
from . import tree
try:
    import pandas
except ImportError:
    pass
if TYPE_CHECKING:
    import matplotlib
class A:
    from sklearn import datasets
def f():
    import transformers
"""
    assert foreign_imports(source, set(core())) == ["pandas", "sklearn"]


# --- sizes and documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_file_is_over_400_lines(path: Path) -> None:
    assert len(read(path).splitlines()) <= 400


def python_blocks(markdown: str) -> list[tuple[int, str]]:
    """Return (line, code) of each fenced block marked `python`.

    >>> python_blocks("a\\n```python\\nx = 1\\n```\\n```bash\\nls\\n```\\n")
    [(3, 'x = 1\\n')]
    """
    matches = re.finditer(r"^```python[^\n]*\n(.*?)^```[ \t]*$", markdown, re.MULTILINE | re.DOTALL)
    return [(markdown.count("\n", 0, match.start(1)) + 1, match[1]) for match in matches]


def test_the_readme_s_python_parses() -> None:
    text = read("README.md")
    blocks = python_blocks(text)
    assert blocks
    assert len(blocks) == len(re.findall(r"^[ \t]*```+[ \t]*(?:python|py)\b", text, re.MULTILINE)), "an unusual fence"
    for line, code in blocks:
        try:
            ast.parse(code)
        except SyntaxError as error:
            pytest.fail(f"README.md:{line + (error.lineno or 1) - 1}: {error.msg}")


def missing_names(code: str) -> list[str]:
    """Return the dotted names starting with `trainfn` that ``code`` uses and that do not exist."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "trainfn":
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            used.add(ast.unparse(node))
    ours = [name for name in used if re.fullmatch(r"trainfn(\.\w+)+", name)]
    return sorted(name for name in ours if not exists(name))


def exists(dotted: str) -> bool:
    try:
        pkgutil.resolve_name(dotted)
    except (AttributeError, ImportError):
        return False
    return True


def test_the_readme_s_python_names_what_exists() -> None:
    assert [name for _, code in python_blocks(read("README.md")) for name in missing_names(code)] == []


def test_the_readme_s_python_names_what_exists_control() -> None:
    code = """
import trainfn.errors, trainfn.nowhere
from trainfn.errors import DataError, NoSuchError
trainfn.errors.ConfigError(trainfn.nothing)
other.trainfn.nothing_either
"""
    assert missing_names(code) == ["trainfn.errors.NoSuchError", "trainfn.nothing", "trainfn.nowhere"]


def test_the_readme_holds_the_command_that_ci_runs() -> None:
    match = re.search(r"^<!-- ci:test -->.*?^```bash\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    assert match
    assert re.search(r"install .*-c constraints\.txt", match[1])
    assert "pytest" in match[1]
