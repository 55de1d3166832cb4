"""What a fresh machine meets: the pinned packages, the conda file and the script ./do."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import s4s_core

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = [
    line
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    if not line.lstrip().startswith("#")
]


def package(requirement: str) -> str:
    """Normalised name of the package that a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_every_package_is_pinned_exactly():
    for pin in PINS:
        assert re.match(r"[a-z0-9-]+==[\w.]+( ; |$)", pin), pin


def test_every_dependency_is_pinned():
    wanted = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    missing = set(map(package, wanted)) - set(map(package, PINS)) - {PROJECT["name"]}
    assert not missing


def test_conda_installs_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "s4s"
    assert environment["channels"] == ["conda-forge"]
    assert conda == ["python=3.11", "pip"] and PROJECT["requires-python"] == ">=3.11"
    assert pip == {"pip": [*PINS, "-e ."]}


@pytest.mark.parametrize("name", ["requirements.txt", "environment.yml", "pyproject.toml", "do"])
def test_no_file_names_a_package_host(name):
    text = (ROOT / name).read_text("utf-8")
    assert "://" not in text
    assert not re.search(r"index-url|find-links|trusted-host", text)


def test_no_lock_file_is_committed():
    assert "uv.lock" in (ROOT / ".gitignore").read_text("utf-8").splitlines()
    if git := shutil.which("git"):  # none on a bare machine, where nothing can be committed either
        command = [git, "ls-files", "uv.lock"]
        assert not subprocess.run(command, cwd=ROOT, capture_output=True).stdout


def test_versions_and_paper_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == PROJECT["version"] == s4s_core.__version__
    paper = citation["preferred-citation"]
    assert paper["title"] == "S4S: Solving for a Fast Diffusion Model Solver"
    families = [author["family-names"] for author in paper["authors"]]
    assert families == ["Frankel", "Chen", "Li", "Koh", "Ratliff", "Oh"]


def test_ci_runs_the_command_of_the_readme():
    command = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1]
    assert command == "CI=true ./do test"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(r"^\./do tour\b", readme, re.M) and re.search(r"^\./do test\b", readme, re.M)
    assert os.access(ROOT / "do", os.X_OK) and os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.fixture
def checkout(tmp_path):
    for name in ("do", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def interpreter(folder: Path, script: str) -> Path:
    """A stand-in for Python that answers as `script` says."""
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            'case "$*" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac',
            "and .* is Python 3.9.2",
        ),
        ('case "$*" in *ensurepip*) exit 1 ;; esac', "lacks the module venv"),
        (None, "Python 3.11 or later is needed, and there is no"),
    ],
)
def test_an_unfit_python_is_told_in_one_sentence(checkout, script, sentence):
    python = interpreter(checkout, script) if script else checkout / "nowhere"
    result = subprocess.run(
        ["./do", "setup"],
        cwd=checkout,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and not result.stdout
    assert re.fullmatch(rf"do: .*{sentence}.*\.\n", result.stderr), result.stderr
    assert not (checkout / ".venv").exists()


def test_setup_does_nothing_when_nothing_changed(checkout):
    (checkout / ".venv").mkdir()
    wanted = "".join(
        (checkout / name).read_text() for name in ("requirements.txt", "pyproject.toml")
    )
    (checkout / ".venv" / "installed").write_text(f"{checkout}\n{wanted}")
    setup = [checkout / "do", "setup"]
    without_python = {**os.environ, "PYTHON": "no-such-python"}
    assert subprocess.run(setup, env=without_python).returncode == 0
    (checkout / "requirements.txt").write_text("torch==2.0")
    assert subprocess.run(setup, env=without_python, stderr=subprocess.DEVNULL).returncode == 1


def test_usage_names_every_command(checkout):
    result = subprocess.run(["./do"], cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 2
    for command in ("setup", "tour", "test", "lab", "lock"):
        assert f"./do {command}" in result.stderr
