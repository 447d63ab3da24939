"""The law of imports, held: downward only, each foreign library in its rooms, nothing heavy before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "external_oms"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "clock", "freshness", "signals"),
    ("store_url", "tenants"),
    ("settings_errors",),
    ("settings", "config", "signature", "transport"),
    ("auth",),
    ("client", "stores"),
    ("judgement", "workers"),
    ("resolution", "status"),
    ("flights", "seats"),
    ("cache",),
    ("members", "operations"),
    ("assemble",),
    ("sdk",),
    ("provider",),
    ("__init__",),
    ("emulated",),
    ("emulator",),
    ("testing",),
    ("pytest_plugin", "web"),
    ("cli",),
    ("__main__",),
)
"""From the ground up: a room imports rooms of lower floors, and inside itself; never its neighbours on one floor."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "cachetools": ("cache", "stores.memory", "stores.sqlite", "stores.redis"),
    "click": ("cli",),
    "flask": ("web", "emulator", "emulated"),
    "gunicorn": ("web", "cli"),
    "itsdangerous": ("web",),
    "jinja2": ("web",),
    "limits": ("web",),
    "markupsafe": ("web",),
    "openfeature": ("resolution", "provider", "sdk", "testing", "pytest_plugin", "web"),
    "platformdirs": ("cli",),
    "prometheus_client": ("web.gauges", "web.metrics"),
    "pydantic": ("tenants", "settings", "auth"),
    "pydantic_core": ("settings_errors",),
    "pydantic_settings": ("settings",),
    "pytest": ("pytest_plugin",),
    "redis": ("stores.redis_client",),
    "requests": ("transport", "auth", "client", "assemble", "provider"),
    "rich": ("cli",),
    "standardwebhooks": ("signature",),
    "urllib3": ("transport",),
    "werkzeug": ("web", "emulator", "emulated"),
}
"""Every foreign library and the rooms that may import it, at whatever depth of the code."""

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
)
"""What `import external_oms` must not bring."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module below the package by its dotted name; a package goes by its own name, the face is `__init__`."""
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


def room_of(name: str) -> str:
    """The room in which a module of ours stands: the first part of its name below the package."""
    inner = name.removeprefix(PACKAGE).removeprefix(".")
    return inner.partition(".")[0] or "__init__"


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_floors_below_it(module: str) -> None:
    room = room_of(module)
    assert room in FLOOR_OF, f"{module} stands on no floor; say on which in FLOORS, and in docs/architecture.md"
    upward = [
        f"{MODULES[module].name}:{line} imports {name}"
        for line, name in imports(MODULES[module])
        if name.partition(".")[0] == PACKAGE
        and room_of(name) != room
        and FLOOR_OF.get(room_of(name), len(FLOORS)) >= FLOOR_OF[room]
    ]
    assert not upward


@pytest.mark.parametrize("module", MODULES)
def test_a_foreign_library_is_imported_only_in_its_own_rooms(module: str) -> None:
    strays = []
    for line, name in imports(MODULES[module]):
        library = name.partition(".")[0]
        if library in {PACKAGE, "_typeshed"} or library in sys.stdlib_module_names:
            continue
        if not any(within(module, room) for room in FOREIGN.get(library, ())):
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
def test_a_module_states_its_law_and_names_its_face(module: str) -> None:
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


def test_every_floor_is_built_and_drawn() -> None:
    drawing = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = [line.split() for line in drawing.split("## The rooms")[1].split("```")[1].splitlines()[1:]]
    assert [set(words[: len(rooms)]) for words, rooms in zip(drawn, reversed(FLOORS), strict=True)] == [
        set(rooms) for rooms in reversed(FLOORS)
    ]
    assert set(FLOOR_OF) == {room_of(f"{PACKAGE}.{name}") for name in MODULES}


@pytest.mark.parametrize("word", ["utils", "util", "helpers", "helper", "manager", "data", "common", "misc"])
def test_no_module_is_named_by_a_word_that_says_nothing(word: str) -> None:
    assert not [name for name in MODULES if word in name.replace(".", "_").split("_")]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_read_in_one_sitting(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 400


def test_importing_the_package_brings_nothing_that_is_not_used_yet() -> None:
    script = f"import sys, {PACKAGE}; print(*[name for name in {LATE_ONLY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=30, check=True)
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
