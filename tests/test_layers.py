"""Imports run downward; only the listed modules import foreign libraries, and heavy ones when they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from external_oms.testing import ConfigAPIEmulator

PACKAGE = "external_oms"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "clock", "signals", "forks"),
    ("records", "config", "store_url", "tenants", "signature", "transport"),
    ("settings_errors", "entry", "problems"),
    ("policy", "codec"),
    ("settings", "auth", "scheduler"),
    ("client", "stores"),
    ("singleflight", "resolution", "status"),
    ("cache",),
    ("heartbeat", "operations"),
    ("wiring",),
    ("sdk", "override"),
    ("provider",),
    ("webhook",),
    ("__init__",),
    ("emulator",),
    ("testing",),
    ("pytest_plugin", "web"),
    ("cli",),
    ("__main__",),
)
"""From the ground up: a module imports modules of lower layers and of its own package, never others of its layer."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "cachetools": ("stores.memory",),
    "click": ("cli",),
    "flask": ("web", "emulator"),
    "gunicorn": ("web", "cli"),
    "itsdangerous": ("web",),
    "jinja2": ("web",),
    "flask_wtf": ("web",),
    "limits": ("web",),
    "markupsafe": ("web",),
    "openfeature": ("resolution", "provider", "sdk", "override", "web"),
    "prometheus_client": ("web.metrics", "web.serving"),
    "pydantic": ("tenants", "settings", "auth"),
    "pydantic_core": ("settings_errors",),
    "pydantic_settings": ("settings",),
    "pytest": ("pytest_plugin",),
    "redis": ("stores.redis_client",),
    "requests": ("transport", "auth", "client", "wiring", "provider"),
    "urllib3": ("transport",),
    "werkzeug": ("web", "emulator"),
}
"""Every foreign library and the modules that may import it, anywhere in their code."""

LATE_ONLY = (
    "flask",
    "redis",
    "sqlite3",
    "tomllib",
    "click",
    "standardwebhooks",
    "prometheus_client",
    "gunicorn",
    "pytest",
    "requests",
    "urllib3",
    "cachetools",
)
"""What `import external_oms` must not import."""

LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Return every module by its dotted name below the package; a package has its own name."""
    named = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        named[".".join(parts)] = path
    return named


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, late imports and those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import hides what is imported"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(f"{PACKAGE}.")
                yield node.lineno, f"{PACKAGE}.{inner}" if inner in MODULES else module


def top_of(name: str) -> str:
    """The first part of the name of a module below the package."""
    inner = name.removeprefix(PACKAGE).removeprefix(".")
    return inner.partition(".")[0] or "__init__"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_layers_below_it(module: str) -> None:
    top = top_of(module)
    assert top in LAYER_OF, f"{module} is in no layer; add it to LAYERS and to docs/architecture.md"
    upward = [
        f"{MODULES[module].name}:{line} imports {name}"
        for line, name in imports(MODULES[module])
        if name.partition(".")[0] == PACKAGE
        and top_of(name) != top
        and LAYER_OF.get(top_of(name), len(LAYERS)) >= LAYER_OF[top]
    ]
    assert not upward


@pytest.mark.parametrize("module", MODULES)
def test_a_foreign_library_is_imported_only_by_the_listed_modules(module: str) -> None:
    strays = []
    for line, name in imports(MODULES[module]):
        library = name.partition(".")[0]
        if library in {PACKAGE, "_typeshed"} or library in sys.stdlib_module_names:
            continue
        if not any(within(module, package) for package in FOREIGN.get(library, ())):
            strays.append(f"{MODULES[module].name}:{line} imports {library}")
    assert not strays


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = {
        module: {
            inner
            for _, name in imports(path)
            if name.startswith(f"{PACKAGE}.") and (inner := name.removeprefix(f"{PACKAGE}.")) in MODULES
        }
        for module, path in MODULES.items()
    }

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' → '.join((*above, module))}"
        for inner in edges[module]:
            walk(inner, (*above, module))

    for module in edges:
        walk(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_docstring_and_names_what_it_exports(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    if MODULES[module].name == "__init__.py" and len(tree.body) == 1:
        return  # a package that is only a place: nothing to name
    targets = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    ]
    assert "__all__" in targets, f"{module} has no __all__"


def test_every_layer_exists_and_is_in_the_documentation() -> None:
    drawing = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = [line.split() for line in drawing.split("## Modules")[1].split("```")[1].splitlines()[1:]]
    assert [set(words[: len(names)]) for words, names in zip(drawn, reversed(LAYERS), strict=True)] == [
        set(names) for names in reversed(LAYERS)
    ]
    assert set(LAYER_OF) == {top_of(f"{PACKAGE}.{name}") for name in MODULES}


@pytest.mark.parametrize("word", ["utils", "util", "helpers", "helper", "manager", "data", "common", "misc"])
def test_no_module_is_named_by_a_word_that_says_nothing(word: str) -> None:
    assert not [name for name in MODULES if word in name.replace(".", "_").split("_")]


def test_importing_the_package_brings_nothing_that_is_not_used_yet() -> None:
    # a tool that measures the coverage of the process may have brought some before
    script = (
        "import sys; before = set(sys.modules)\n"
        f"import {PACKAGE}; print(*[name for name in {LATE_ONLY!r} if name in sys.modules and name not in before])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == []


def test_no_worker_imports_what_the_thread_that_makes_the_provider_can_import(
    external_oms_api: ConfigAPIEmulator,
) -> None:
    """A child that is forked while another thread imports keeps the lock of that module for ever."""
    given = {
        "tenant": external_oms_api.tenants[0],
        "base_url": external_oms_api.base_url,
        "token_url": external_oms_api.token_url,
        **external_oms_api.tenant_settings().model_dump(include={"client_id"}),
    }
    secret = external_oms_api.tenant_settings().client_secret
    assert secret is not None
    script = (
        f"import sys; import {PACKAGE}\n"
        f"provider = {PACKAGE}.ExternalOMSProvider({PACKAGE}.Settings(**{given!r}, client_secret=sys.argv[1]))\n"
        "before = set(sys.modules)\n"
        "provider.enabled(); provider.invalidate(); provider.refresh(); provider.shutdown()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-c", script, secret.get_secret_value()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_the_walk_sees_late_imports_and_those_for_type_checkers(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import flask\n"
        "def late():\n    from external_oms import provider, settings\n    from redis.client import Redis\n",
        encoding="utf-8",
    )
    seen = {name for _, name in imports(path)}
    assert {"flask", "external_oms.settings", "redis.client"} <= seen
