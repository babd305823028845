"""Private names of PyTorch are used through one module, which names what is missing."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from cgspn import compat

SOURCE = Path(compat.__file__).parent


def dotted(node):
    """`a.b.c` of an attribute, "" for what does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def private_names(tree):
    """Names below torch with a part that begins with one underscore."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "torch")
        elif isinstance(node, ast.Attribute) and dotted(node).split(".")[0] in ("torch", "forward_ad", "dist"):
            yield dotted(node)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_private_name_of_torch_elsewhere(path):
    if path.name != "compat.py":
        names = private_names(ast.parse(path.read_text()))
        assert not [n for n in names if any(p.startswith("_") and not p.startswith("__") for p in n.split("."))]


def test_missing_name_says_which_versions_have_it():
    with pytest.raises(ImportError, match=r"torch\._no\.such does not exist in torch .*2\.9 to"):
        compat.private("_no.such")


@pytest.mark.parametrize("path", ["_inductor.aoti_load_package", "_inductor.aoti_compile_and_package"])
def test_private_finds_what_is_looked_up_at_use(path):
    assert callable(compat.private(path))


def test_transform_is_seen_inside_alone():
    seen = []

    def f(x):
        seen.append(compat.in_transform())
        return x.sum()

    f(torch.ones(2))
    torch.func.grad(f)(torch.ones(2))
    torch.func.vmap(f)(torch.ones(2, 2))
    assert seen == [False, True, True]
    assert not compat.in_transform()


def test_forward_ad_is_seen_inside_a_level_alone():
    assert not compat.in_forward_ad()
    with forward_ad.dual_level():
        assert compat.in_forward_ad()
    assert not compat.in_forward_ad()


@pytest.mark.parametrize(
    ("kind", "name"),
    list(zip(["forward", "forward_pre", "backward", "full_backward_pre"], compat.HOOKS)),
)
def test_hooks_are_where_they_are_looked_for(kind, name):
    layer = nn.Linear(2, 2)
    assert not layer.__dict__[name]
    getattr(layer, f"register_{kind}_hook")(lambda *args: None)
    assert layer.__dict__[name]


def test_a_compiled_call_is_where_it_is_looked_for():
    layer = nn.Linear(2, 2)
    assert getattr(layer, compat.COMPILED_CALL) is None
    layer.compile()
    assert layer.__dict__[compat.COMPILED_CALL] is not None


def test_cpp_compiler_is_a_path_or_none():
    found = compat.cpp_compiler()
    assert found is None or Path(found).exists()
