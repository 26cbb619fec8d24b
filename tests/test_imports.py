"""What importing does (nothing), what each package may import, and what our source never holds."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "tokenizer", "minillm", "benchmarks")
SOURCES = sorted([p for name in PACKAGES for p in (ROOT / name).rglob("*.py")] + list(ROOT.glob("*.py")))
EXTRAS = {
    "datasets", "fastapi", "gguf", "huggingface_hub", "IPython", "matplotlib", "onnx", "optuna", "pandas", "peft",
    "pyarrow", "pytest", "sacrebleu", "scipy", "sklearn", "tensorboard", "torchao", "trackio", "transformers",
    "uvicorn", "wandb",
}  # fmt: skip


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# ---- what importing does

LOADED = """
import json, sys
import {module}
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("minillm", {"torch", "triton", "numpy", "tyro", "tqdm", "sentencepiece"}),
        ("minillm.presets", {"torch", "triton", "numpy", "tyro", "tqdm", "sentencepiece"}),
        ("minillm.model.transformer", {"triton", "kernels", "tyro", "sentencepiece"}),
        ("tokenizer", {"torch", "triton", "numpy", "minillm", "kernels"}),
        ("kernels", {"torch", "triton", "minillm"}),
    ],
)
def test_an_import_brings_only_what_it_needs(module: str, absent: set[str]) -> None:
    done = python(LOADED.format(module=module))
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert module.partition(".")[0] in loaded
    assert loaded & (absent | EXTRAS) == set()


QUIET = """
import importlib, json, sys, threading
names = {names}
before = threading.active_count()
for name in names:
    importlib.import_module(name)
extras = sorted(set({extras}) & {{name.partition(".")[0] for name in sys.modules}})
sys.stderr.write(json.dumps([threading.active_count() - before, extras, len(names)]))
"""


def test_importing_all_modules_prints_nothing_and_starts_no_thread() -> None:
    names = [module_of(path) for path in SOURCES if path.parent != ROOT and path.stem != "__main__"]
    done = python(QUIET.format(names=names, extras=sorted(EXTRAS)))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert json.loads(done.stderr) == [0, [], len(names)]


def test_the_package_that_is_called_kernels_is_inert() -> None:
    """Another package of this name exists, and Transformers probes for it: ours must do nothing when it is found."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 2
    docstring, version = body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str)
    assert isinstance(version, ast.Assign) and [name.id for name in version.targets] == ["__version__"]
    assert isinstance(version.value, ast.Constant)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_beside_ours() -> None:
    done = python("import transformers, kernels; from transformers import LlamaConfig; print(LlamaConfig().model_type)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "llama"


# ---- who may import whom (DESIGN.md, the table of section 2)

STANDARD = set(sys.stdlib_module_names)
MAY_IMPORT = {  # package -> third parties and parts of minillm; the longest name that fits a module counts
    "kernels": {"kernels", "torch", "triton"},
    "tokenizer": {"tokenizer", "sentencepiece"},
    "minillm.config": set(),
    "minillm.presets": {"minillm.config"},
    "minillm.cpu": {"torch"},
    "minillm.tensors": {"torch", "safetensors", "minillm.config"},
    "minillm.ops": {"torch", "minillm.config", "minillm.cpu"},
    "minillm.model": {"torch", "einops", "minillm.config", "minillm.ops"},
    "minillm.data": {"torch", "numpy", "minillm.config"},
    "minillm.evaluation": {"torch", "numpy"},
    "minillm.training": {
        "torch", "numpy", "safetensors", "tqdm", "minillm.config", "minillm.ops", "minillm.model", "minillm.data",
        "minillm.evaluation", "minillm.peft", "minillm.tensors",
    },
    "minillm.tasks": {
        "torch", "numpy", "minillm.config", "minillm.data", "minillm.evaluation", "minillm.model", "minillm.inference",
        "minillm.training",
    },
    "minillm.inference": {"torch", "minillm.config", "minillm.model"},
    "minillm.inspection": {"torch", "minillm.config", "minillm.model"},
}  # fmt: skip


INSIDE = {"minillm.ops": {"kernels"}}  # where a kernel is called, and nowhere above


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """Every imported module by its full name, and whether the import stands inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: -child.level + 1 or None] if child.level else []
                base = ".".join(filter(None, [*above, child.module]))
                yield from ((f"{base}.{alias.name}", inside) for alias in child.names)
            yield from walk(child, inside or isinstance(child, ast.FunctionDef))

    yield from walk(tree, False)


def forbidden_imports(module: str, source: str, *, package: str | None = None) -> list[str]:
    rules = [name for name in MAY_IMPORT if module == name or module.startswith(name + ".")]
    if not rules:
        return []
    room = max(rules, key=len)
    allowed = MAY_IMPORT[room] | {room}
    found = []
    for name, inside in imports(ast.parse(source), package or module.rpartition(".")[0]):
        top = name.partition(".")[0]
        fits = top in STANDARD or any(name == a or name.startswith(a + ".") for a in allowed)
        if not fits and not (inside and top in EXTRAS | INSIDE.get(room, set())):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_each_package_imports_what_it_may(path: Path) -> None:
    module = module_of(path)
    package = module if path.name == "__init__.py" else None
    assert forbidden_imports(module, path.read_text(encoding="utf-8"), package=package) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("tokenizer.trainer", "def f():\n    import torch", ["torch"]),
        ("minillm.model.block", "from minillm.training import loop", ["minillm.training.loop"]),
        ("minillm.model.block", "from ..data import batch", ["minillm.data.batch"]),
        ("minillm.data.readers", "import pyarrow", ["pyarrow"]),
        ("minillm.data.readers", "def f():\n    import pyarrow.parquet", []),
        ("minillm.data.readers", "from .batch import Batch\nimport json", []),
        ("kernels.rope", "from ._launch import jit\nfrom minillm import ops", ["minillm.ops"]),
        ("minillm.cli", "import tokenizer, kernels, tyro", []),
        ("minillm.ops", "from kernels.rope import rope", ["kernels.rope.rope"]),
        ("minillm.ops", "def f():\n    from kernels.rope import rope", []),
        ("minillm.model.block", "def f():\n    from kernels.rope import rope", ["kernels.rope.rope"]),
    ],
)
def test_the_rule_sees_what_is_forbidden(module: str, source: str, expected: list[str]) -> None:
    assert forbidden_imports(module, source) == expected


def test_the_contracts_of_import_linter_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


# ---- what our source never holds

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.hub.load", "yaml.load",
}  # fmt: skip
UNSAFE_OPTIONS = {("shell", True), ("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True)}


def unsafe(source: str) -> list[str]:
    """Everything that can run code found in a file or a string."""
    tree, found = ast.parse(source), []
    for name, _ in imports(tree, ""):
        if name.partition(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS:
            found.append(name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) in UNSAFE_CALLS:
            found.append(ast.unparse(node.func))
        for option in node.keywords:
            value = option.value.value if isinstance(option.value, ast.Constant) else None
            if any(option.arg == name and value is bad for name, bad in UNSAFE_OPTIONS):
                found.append(f"{option.arg}={value}")
    return found


def test_our_source_runs_no_code_from_files() -> None:
    assert len(SOURCES) > 30
    found = {module_of(path): unsafe(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {module: faults for module, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("from torch import load", ["torch.load"]),
        ("def f(x):\n    return eval(x)", ["eval"]),
        ("exec('1')", ["exec"]),
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=False)", ["torch.load", "weights_only=False"]),
        ("subprocess.run(x, shell=True)", ["shell=True"]),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", ["trust_remote_code=True"]),
        ("np.load(path, allow_pickle=True)", ["allow_pickle=True"]),
        ("model.eval()\nshell = False\nf(shell=False, weights_only=True)", []),
    ],
)
def test_the_scan_sees_what_is_unsafe(source: str, expected: list[str]) -> None:
    assert unsafe(source) == expected
