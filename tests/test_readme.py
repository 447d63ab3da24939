"""The README's blocks do what they say, as they are printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import urllib.request
import venv
from pathlib import Path

from tests.support.ports import free_port
from tests.support.servers import read_until, started

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The arguments of every command in a console block that runs this program."""
    lines = [shlex.split(line[2:]) for block in blocks("console") for line in block.splitlines() if line[:2] == "$ "]
    return [line[1:] for line in lines if Path(line[0]).name == program]


def test_every_command_is_one_that_these_tests_know() -> None:
    printed = sum(line.startswith("$ ") for block in blocks("console") for line in block.splitlines())
    assert printed == sum(len(commands(program)) for program in ("make", "flask", "curl", "pip"))


def test_the_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [target for (target,) in commands("make")]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}: .* ## ", makefile, re.MULTILINE), target


def test_the_application_answers_the_request_as_printed(tmp_path: Path) -> None:
    (example,), (run,) = blocks("python"), commands("flask")
    ((*_, method, printed_url),) = commands("curl")
    (expected,) = re.findall(r"^\$ curl .*\n(.*)$", README, re.MULTILINE)
    port = str(free_port())
    assert run[-2] == "--port"
    assert f":{run[-1]}/" in printed_url
    url = printed_url.replace(f":{run[-1]}/", f":{port}/")
    (tmp_path / "app.py").write_text(example, encoding="utf-8")
    with started([sys.executable, "-m", "flask", *run[:-1], port], cwd=tmp_path) as flask:
        read_until(flask.stdout, "Serving Flask app")
        read_until(flask.stderr, "Running on")
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=20) as answer:
            assert answer.read().decode().strip() == expected
    assert json.loads(expected) == {"external": True}


def test_the_package_is_installed_from_a_checkout_as_printed(tmp_path: Path) -> None:
    """What the package rests on comes from the environment of the tests, so that no package index is asked."""
    (given,) = commands("pip")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site_packages / "tests.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    installed = subprocess.run(
        [python, "-m", "pip", *given],
        cwd=ROOT,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    (extra,) = re.findall(r"\[(\w+)\]", given[-1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    satisfied = set(re.findall(r"^requirement already satisfied: ([\w-]+)", installed.stdout.lower(), re.MULTILINE))
    extras = project["optional-dependencies"]
    requirements = {
        re.split("[<>=]", one)[0].lower() for one in (*project["dependencies"], *extras[extra], *extras["flask"])
    }
    assert requirements - {f"{project['name']}[flask]"} <= satisfied
    code = "import external_oms.web; print(external_oms.__file__)"
    printed = subprocess.check_output([python, "-I", "-c", code], cwd=tmp_path, text=True)
    assert Path(printed.strip()) == site_packages / "external_oms" / "__init__.py"
    command = subprocess.check_output([python.with_name("external-oms"), "--version"], cwd=tmp_path, text=True)
    assert project["version"] in command
