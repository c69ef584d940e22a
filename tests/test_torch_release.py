"""The releases of PyTorch that revnet supports: the declared ones, the refusal of older ones, names that they lack."""

import ast
import importlib
import importlib.util
import re
import sys
import tomllib
import warnings
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import nn

import revnet
from revnet import _torch_release
from revnet._torch_release import NEWEST_TESTED, OLDEST, RELEASE, check_release, release_of

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "revnet"


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.13.0", (2, 13)), ("2.11.0+cu130", (2, 11)), ("2.16.0a0+git1234", (2, 16)), ("3.0", (3, 0))],
)
def test_release_of_a_version(version, release):
    assert release_of(version) == release


def test_the_oldest_release_is_the_declared_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = ".".join(map(str, OLDEST))
    assert [requirement for requirement in project["dependencies"] if requirement.startswith("torch")] == [
        f"torch>={oldest}"
    ]
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert OLDEST <= release_of(pinned) <= NEWEST_TESTED
    newest = ".".join(map(str, NEWEST_TESTED))
    assert f"from {oldest} to {newest}" in (ROOT / "docs" / "releases.md").read_text()


def test_an_old_release_is_refused_in_one_line():
    check_release(".".join(map(str, OLDEST)))
    with pytest.raises(revnet.MissingDependencyError) as refusal:
        check_release("2.10.1+cpu")
    assert str(refusal.value) == (
        "revnet needs PyTorch 2.11 or later, but version 2.10.1+cpu is installed; run `pip install --upgrade "
        "'torch>=2.11'`."
    )


def load_again(monkeypatch, version):
    """Return the module as it is under another version of PyTorch."""
    monkeypatch.setattr(torch, "__version__", version)
    spec = importlib.util.spec_from_file_location("another_release", _torch_release.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_release_is_refused_on_import(monkeypatch):
    with pytest.raises(revnet.MissingDependencyError, match=r"revnet needs PyTorch 2\.11 or later"):
        load_again(monkeypatch, "2.10.0")


def test_an_old_release_is_refused_before_its_missing_names(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    monkeypatch.delattr(torch.nn.modules.module, "_has_any_global_hook")
    for name in ("revnet._torch_release", "revnet._torch_internals"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(revnet.MissingDependencyError, match=r"but version 2\.7\.1 is installed"):
        importlib.import_module("revnet._torch_internals")


def test_a_newer_release_warns_once_when_it_is_used(monkeypatch):
    monkeypatch.setattr(_torch_release, "_is_untested", True)
    block = revnet.ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.warns(
        UserWarning, match="is newer than .*, the newest release that this version of revnet was"
    ) as caught:
        block(torch.ones(1, 4)).sum().backward()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        revnet.ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))(torch.ones(1, 4)).sum().backward()


def test_a_newer_release_warns_when_a_model_is_compiled(monkeypatch):
    monkeypatch.setattr(_torch_release, "_is_untested", True)
    torch._dynamo.reset()
    block = revnet.ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="the newest release that this version of revnet was tested with"):
        torch.compile(block, backend="eager", fullgraph=True)(torch.ones(1, 4))


@pytest.mark.parametrize(("version", "is_untested"), [("2.15.1", False), ("2.16.0", True)])
def test_only_releases_above_the_newest_tested_one_are_untested(monkeypatch, version, is_untested):
    assert load_again(monkeypatch, version)._is_untested == is_untested


def test_an_object_is_passed_by_its_address_on_old_releases(monkeypatch):
    module = load_again(monkeypatch, "2.11.0")
    function = module.constant_of_object(lambda instance: instance)
    instance = object()
    assert function(instance) is instance


# Names of PyTorch that src uses ---------------------------------------------------------------------------------------

NEWER = {
    "torch.accelerator.Graph",
    "torch.accelerator.empty_host_cache",
    "torch.accelerator.graphs",
    "torch.autograd.enforce_grad_layout_policy",
    "torch.autograd.graph.region_activation_memory_budget",
    "torch.autograd.graph.set_override_stale_capture_stream",
    "torch.backends.cuda.blas_workspace_size",
    "torch.backends.cuda.cublas_workspace_size",
    "torch.backends.cuda.cublaslt_workspace_size",
    "torch.backends.cuda.is_ck_sdpa_available",
    "torch.compiler.get_default_backend",
    "torch.compiler.set_default_backend",
    "torch.cuda.caching_allocator_disabled",
    "torch.cuda.current_solver_handle",
    "torch.distributed.all_gather_single",
    "torch.distributed.fsdp.DataParallelMeshDims",
    "torch.distributed.record_comm",
    "torch.distributed.reduce_scatter_single",
    "torch.func.rearrange",
    "torch.nn.LinearCrossEntropyLoss",
    "torch.nn.LinearCrossEntropyOptions",
    "torch.nn.functional.linear_cross_entropy",
    "torch.nn.modules.linear_cross_entropy",
    "torch.optim.swap_in_optimizer_params_and_state",
    "torch.random.thread_safe_generator",
    "torch.thread_safe_generator",
}
"""Public names that PyTorch 2.13 has and 2.11, the oldest release, lacks."""
GUARDED = {
    # In a function that is called for an operator of this module only, which the oldest release does not have.
    ("_torch_internals.py", "torch.nn.modules.linear_cross_entropy"),
}
"""Files that may use such a name, because they do without it on older releases."""


def names_of_torch(path):
    """Yield every name of PyTorch that a file uses, in full."""
    tree = ast.parse(path.read_text())
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torch":
                    known[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name) and node.id in known:
            yield ".".join([known[node.id], *reversed(attributes)])


def exists(name):
    """Return whether PyTorch has a name: a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):  # A function may have the name of its module.
        try:
            reduce(getattr, parts[count:], importlib.import_module(".".join(parts[:count])))
        except (ImportError, AttributeError):
            continue
        return True
    return False


def newer_names(path):
    """Return the names in a file that the oldest release lacks."""
    return {name for used in names_of_torch(path) for name in NEWER if f"{used}.".startswith(f"{name}.")}


def test_src_uses_no_name_that_the_oldest_release_lacks():
    used = {(path.relative_to(SOURCE).as_posix(), name) for path in SOURCE.rglob("*.py") for name in newer_names(path)}
    assert used - GUARDED == set(), "write it for the oldest release, or guard it and add it to GUARDED"
    assert used >= GUARDED, "no longer used; delete it from GUARDED"


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.nn.functional.linear_cross_entropy(x)",
        "import torch.nn.functional as F\nF.linear_cross_entropy(x)",
        "from torch.nn import functional as F\nF.linear_cross_entropy(x)",
        "from torch.nn.functional import linear_cross_entropy",
    ],
)
def test_newer_names_are_found_however_they_are_written(tmp_path, line):
    file = tmp_path / "file.py"
    file.write_text(line)
    assert newer_names(file) == {"torch.nn.functional.linear_cross_entropy"}


@pytest.mark.skipif(RELEASE not in (OLDEST, (2, 13)), reason="the list compares two releases")
def test_newer_names_are_right():
    """Also finds a name in src that the release lacks and that is missing from the list."""
    assert {name for name in NEWER if exists(name)} == (set() if RELEASE == OLDEST else NEWER)
    used = {name for path in SOURCE.rglob("*.py") for name in names_of_torch(path)}
    own = {name for name in used if name.startswith("torch.ops.revnet.")}
    assert {name for name in used - own if not exists(name)} <= {name for _, name in GUARDED}
