"""The repository's own files: workflows, forms, hooks, changelog and metadata are well formed and name what exists."""

from __future__ import annotations

import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")

if not GITHUB.exists():  # the tests run against the wheel, beside a copy of what they need
    pytest.skip("no checkout", allow_module_level=True)


def parsed(path: Path) -> Any:  # noqa: ANN401 - any YAML
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@cache
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+): .*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_exists_with_the_least_rights_and_a_limit(path: Path) -> None:
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        chosen = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step.get("uses", "actions/none@v1"))
            words = shlex.split(step.get("run", ""))
            if words[:1] == ["make"]:
                named = [word for word in words[1:] if re.fullmatch(r"[a-z]+", word)]
                assert named or chosen
                assert {*named, *chosen} <= targets()
            elif words and "/" in words[0]:
                assert (ROOT / words[0]).is_file()


def test_the_tests_run_on_every_python_that_the_metadata_names() -> None:
    ((_, job), *_) = parsed(GITHUB / "workflows" / "ci.yml")["jobs"].items()
    named = {
        classifier.rpartition(" ")[2]
        for classifier in project()["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", classifier)
    }
    assert set(job["strategy"]["matrix"]["python"]) == named
    assert project()["requires-python"] == f">={min(named, key=lambda version: int(version[2:]))}"


def test_updates_are_looked_for_where_there_are_dependencies() -> None:
    files = {
        "pip": "pyproject.toml",
        "npm": "package.json",
        "github-actions": ".github/workflows/ci.yml",
        "docker": "Dockerfile",
    }
    for update in parsed(GITHUB / "dependabot.yml")["updates"]:
        for folder in update.get("directories", [update.get("directory")]):
            assert (ROOT / folder.lstrip("/") / files[update["package-ecosystem"]]).is_file()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_what_a_form_needs(path: Path) -> None:
    form = parsed(path)
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown"}
        assert field["attributes"].get("label") or field["attributes"].get("value")


def test_the_hooks_run_what_lint_and_types_run() -> None:
    hooks = [hook for repo in parsed(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in hooks:
        words = hook["entry"].split()
        if words[0] == "make":
            assert words[1] in targets()
        else:
            assert f"$(PY) -m {' '.join(words[2:4])}" in makefile


def test_the_addresses_of_the_project_are_of_one_repository() -> None:
    urls = project()["urls"]
    assert set(urls) >= {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    for link in parsed(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]:
        assert link["url"].startswith(urls["Homepage"])


def test_the_changelog_keeps_its_form_and_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\](?: - (.+))?$", text, re.MULTILINE)
    assert len(versions) == len(re.findall(r"^## ", text, re.MULTILINE))
    assert project()["version"] in {version for version, _ in versions}
    for version, date in versions:
        assert re.fullmatch(r"\d+\.\d+\.\d+|Unreleased", version)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d|Unreleased|", date)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert len(set(found)) == len(found)


def test_every_upper_bound_has_its_reason_beside_it() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.scripts]")[0].splitlines()
    bounded = [line for line in lines if re.search(r'"[\w-]+>=[\d.]+,<', line)]
    assert bounded
    assert not [line for line in bounded if " # " not in line]


def test_all_is_every_other_extra_that_users_install() -> None:
    extras = project()["optional-dependencies"]
    assert extras["all"] == ["openfeature-provider-external-oms[server,redis]"]
    assert extras["server"][0] == "openfeature-provider-external-oms[flask]"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (checked,) = re.findall(r"^EXTRAS := (.+)$", makefile, re.MULTILINE)
    assert set(checked.split()) == set(extras) - {"test", "docs", "dev", "release"}
