# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The package itself: what importing it costs, its metadata, its pinned versions, and `.ci/run`."""

import importlib.metadata
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from code_blocks import read_blocks
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import diffusers_lsep


ROOT = Path(__file__).resolve().parents[1]


def imported_modules(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines())


@pytest.mark.slow
def test_import_loads_no_package_that_diffusers_does_not_load():
    ours, theirs = (f"from {name}" for name in ("diffusers_lsep import *", "diffusers import DiffusionPipeline"))
    extra = imported_modules(ours) - imported_modules(theirs)
    packages = {module.partition(".")[0] for module in extra} - set(sys.stdlib_module_names)
    assert "diffusers_lsep" in packages
    # Classes of diffusers itself are what this package is built from; torch may load a part of itself with them.
    assert packages <= {"diffusers_lsep", "diffusers", "torch"}, sorted(extra)


def test_exports():
    contract = {
        "SiTTransformer2DModel",
        "SIT_PRESETS",
        "FlowMatchSDEScheduler",
        "FlowMatchSDEMultistepScheduler",
        "FlowMapScheduler",
        "FlowMatchHeunODEScheduler",
        "LSEPPipeline",
        "LinearProbe",
        "LSEPObjective",
        "convert_original_checkpoint",
    }
    assert contract <= set(diffusers_lsep.__all__)
    for name in diffusers_lsep.__all__:
        assert getattr(diffusers_lsep, name) is not None and name in dir(diffusers_lsep), name
    with pytest.raises(AttributeError, match="module 'diffusers_lsep' has no attribute 'SiTPipeline'"):
        _ = diffusers_lsep.SiTPipeline


def test_type_hints_are_published():
    assert importlib.resources.files("diffusers_lsep").joinpath("py.typed").is_file()


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert diffusers_lsep.__version__ == importlib.metadata.version("diffusers_lsep") == citation["version"]


def test_metadata():
    metadata = importlib.metadata.metadata("diffusers_lsep")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "eval", "test"} <= set(metadata.get_all("Provides-Extra"))
    required = {
        requirement.name
        for requirement in map(Requirement, metadata.get_all("Requires-Dist"))
        if requirement.marker is None
    }
    assert required == {
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "datasets",
        "huggingface-hub",
        "safetensors",
        "evaluate",
    }


@pytest.mark.slow
def test_classifiers_name_what_it_runs_on():
    command = [sys.executable, "setup.py", "--classifiers"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    systems = [line for line in output.splitlines() if line.startswith("Operating System ::")]
    assert systems == ["Operating System :: POSIX :: Linux", "Operating System :: MacOS"]
    pythons = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", output, re.MULTILINE)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert pythons == sorted(set(re.findall(r'"(3\.\d+)"', workflow)), key=lambda version: int(version[2:]))


def test_data_files_are_shipped(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    here, shipped = (
        {path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        for root in (ROOT / "src" / "diffusers_lsep", tmp_path / "diffusers_lsep")
    )
    examples = [path for name in ("configs", "digits", "mnist") for path in (ROOT / "examples" / name).rglob("*")]
    here |= {path.relative_to(ROOT) for path in examples if path.is_file()}
    assert here == shipped


@pytest.mark.slow
def test_an_installed_package_trains_and_draws_without_a_clone(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "ACCELERATE_USE_CPU": "true"}

    def run(*arguments):
        command = [sys.executable, "-c", "from diffusers_lsep.cli import console_main; console_main()", *arguments]
        return subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)

    short = ["--max_train_steps", "1", "--num_layers", "3", "--validation_inference_steps", "1", "--report_to", "none"]
    trained = run(
        "train", "@examples/configs/digits", *short, "--num_validation_images", "1", "--train_batch_size", "8"
    )
    assert trained.returncode == 0, trained.stderr
    assert "1,437 to train on" in trained.stdout
    assert '"num_layers"' not in trained.stdout, "the settings as JSON are for --dry_run and for the file"
    assert "settings that are not the defaults: " in trained.stdout
    for command in (
        "diffusers-lsep sample --pretrained_model_name_or_path lsep-digits",
        "diffusers-lsep probe lsep-digits",
    ):
        assert f"  {command} " in trained.stdout
    model = ["--pretrained_model_name_or_path", "lsep-digits", "--num_inference_steps", "1"]
    drawn = run("sample", *model, "--class_labels", "3", "--output_dir", "drawn")
    assert drawn.returncode == 0 and (tmp_path / "empty" / "drawn" / "grid.png").is_file(), drawn.stderr
    planned = run("train", "@mnist", "--dry_run")
    assert planned.returncode == 0 and "8,000 to train on" in planned.stdout, planned.stderr
    refused = run("train", "@own-images-33")
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("diffusers-lsep train: error: ")


def test_what_commands_of_the_pages_write_is_ignored_by_git():
    pages = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    code = "".join(code for page in pages for _, code in read_blocks(page))
    written = {*re.findall(r"--output_dir ([\w.-]+)", code), *re.findall(r'\.save(?:_pretrained)?\("(.+?)"\)', code)}
    assert len(written) >= 15
    paths = [name if name.endswith(".png") else f"{name}/" for name in sorted(written)]
    command = ["git", "check-ignore", "--no-index", *paths]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert set(paths) == set(ignored)


def test_the_readme_says_where_to_install_from():
    """The address of setup.py, or the word that stands in its place."""
    repository = re.search(r'^REPOSITORY = "(.*)"$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
    for name in ("README.md", "docs/index.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f'pip install "diffusers_lsep[train] @ git+{repository or "ADDRESS"}"' in text
        assert bool(repository) == ("ADDRESS" not in text)


def test_command_line_entry_point():
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name="diffusers-lsep")
    assert callable(entry_point.load())


def test_constraints_pin_every_dependency():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert match, f"not a pin: {line}"
            pins[canonicalize_name(match[1])] = match[2]
    for requirement in map(Requirement, importlib.metadata.requires("diffusers_lsep")):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} forbids {pins[name]}"


def test_oldest_versions_are_the_lower_bounds():
    command = [sys.executable, ".ci/oldest_pins.py"]
    pins = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(pins) >= 15 and len(set(pins)) == len(pins)
    bounds = {
        f"{canonicalize_name(requirement.name)}=={specifier.version}"
        for requirement in map(Requirement, importlib.metadata.requires("diffusers_lsep"))
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    assert bounds == {f"{canonicalize_name(name)}=={bound}" for name, bound in (pin.split("==") for pin in pins)}


def test_what_contributors_are_told_to_run_exists(pytestconfig):
    """The commands of CONTRIBUTING.md and of the workflows: targets of the Makefile, markers, extras, files."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").iterdir()]
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\| `(.+?)` \|", contributing, re.MULTILINE)
    assert len(commands) >= 4 and any(command.startswith("pytest -n 2") for command in commands)
    text = "\n".join([*texts, contributing])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = set(re.findall(r"(?:`|run: |pytest && )make ([\w-]+)", text))
    assert {"quality", "style", "upstream"} <= called <= targets
    markers = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    used = set(re.findall(r'-m "(?:not )?(\w+)"', text)) | set(re.findall(r"@pytest\.mark\.(\w+)", contributing))
    assert used == {"slow"} and used <= markers
    extras = set(importlib.metadata.metadata("diffusers_lsep").get_all("Provides-Extra"))
    assert set(re.findall(r'-e "\.\[(\w+)\]"', text)) == {"test"} and "test" in extras
    for path in {*re.findall(r"bash (\S+?)`", text), "constraints.txt", "tests/upstream"}:
        assert (ROOT / path).exists(), path


def test_settings_for_github_and_pre_commit_are_yaml():
    paths = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(paths) >= 6
    documents = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths}
    # YAML 1.1 reads the key `on` as true.
    assert all(documents[name][True] and documents[name]["jobs"] for name in ("tests.yml", "upstream.yml"))
    hooks = {hook["id"]: hook["entry"] for hook in documents[".pre-commit-config.yaml"]["repos"][0]["hooks"]}
    assert hooks.keys() == {"ruff-check", "ruff-format", "mypy"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for entry in hooks.values():
        assert f"\t{' '.join(word for word in entry.split() if not word.startswith('--'))}" in makefile


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_make_upstream_needs_a_checkout(tmp_path, folder):
    command = ["make", "upstream", f"DIFFUSERS={tmp_path / folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "is not a checkout of diffusers: make upstream DIFFUSERS=path" in result.stderr


def test_every_source_file_names_its_license():
    header = "# Copyright 2026 The diffusers_lsep authors.\n# SPDX-License-Identifier: Apache-2.0\n"
    files = [ROOT / "setup.py"]
    files += [path for folder in ("src", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 5
    sources = {path: path.read_text(encoding="utf-8").removeprefix("#!/usr/bin/env python\n") for path in files}
    assert not [str(path) for path, source in sources.items() if not source.startswith(header)]


def write_program(path: Path, text: str):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_ci(tmp_path: Path, readme: str, search_path: str | None = None) -> subprocess.CompletedProcess:
    """
    Runs `.ci/run` of a small project with the given README, as CI does: `CI=true`, no standard input. Without
    `search_path`, on a machine that has a browser.
    """
    if search_path is None:
        write_program(tmp_path / "browser" / "chromedriver", "exit 1")
        search_path = f"{tmp_path / 'browser'}{os.pathsep}{os.environ['PATH']}"
    project = tmp_path / "project"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", project / ".ci" / "run")
    (project / "README.md").write_text(readme)
    (project / "Makefile").write_text("quality:\n\t@echo quality of $$(ls)\n")
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    subprocess.run(["git", "add", "."], cwd=project, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "Start"], cwd=project, check=True)
    (project / "untracked").touch()
    (tmp_path / "tmp").mkdir()
    return subprocess.run(
        ["bash", ".ci/run"],
        cwd=project,
        env={**os.environ, "CI": "true", "TMPDIR": str(tmp_path / "tmp"), "PATH": search_path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_ci_runs_the_readme_command_in_a_fresh_environment_and_clone(tmp_path):
    code = "import sys; print('*' * 3, 'pytest in', sys.prefix)"
    readme = f'# Title\n```bash\npip install --help > /dev/null && python -c "{code}"\npytest again\n```\n'
    result = run_ci(tmp_path, readme)
    assert result.returncode == 0, result.stderr
    ran = re.search(r"^\*\*\* pytest in (.*)\n\+ make quality\nquality of Makefile README.md$", result.stdout, re.M)
    assert ran, result.stdout
    assert Path(ran[1]).is_relative_to(tmp_path / "tmp")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {path.name for path in (tmp_path / "project").iterdir()} == {
        ".ci",
        ".git",
        "Makefile",
        "README.md",
        "untracked",
    }


@pytest.mark.slow
def test_ci_installs_a_browser_and_needs_it(tmp_path):
    """As root and where there is apt. If it cannot be had, the tests say so: they are run with REQUIRE_BROWSER."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name != "chromedriver" and not os.path.lexists(programs / path.name):
                (programs / path.name).symlink_to(path)
    for name, text in {
        "apt-get": f'echo "$@" >> {tmp_path}/apt-get.log; echo no network; test $1 = update',
        "id": "echo 0",
        "python3.11": f'exec {sys.executable} "$@"',
    }.items():
        (programs / name).unlink(missing_ok=True)
        write_program(programs / name, text)
    readme = "pip install --help > /dev/null && echo pytest with REQUIRE_BROWSER=$REQUIRE_BROWSER\n"
    result = run_ci(tmp_path, readme, str(programs))
    assert result.returncode == 0, result.stderr
    assert "\npytest with REQUIRE_BROWSER=1\n" in result.stdout
    asked = (tmp_path / "apt-get.log").read_text().splitlines()
    assert asked == ["update", "install -y --no-install-recommends chromium chromium-driver"]
    assert "no network" in result.stderr
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_ci_fails_with_the_tests(tmp_path):
    result = run_ci(tmp_path, "pip install --help > /dev/null && sh -c 'exit 3' pytest\n")
    assert result.returncode == 3
    assert "quality of" not in result.stdout
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("commands", [[], ["pip install a && pytest", "pip install b && pytest"]], ids=["none", "two"])
def test_ci_refuses_a_readme_without_one_test_command(tmp_path, commands):
    result = run_ci(tmp_path, "\n".join(["# Title", "run pytest", "pip install something", *commands, ""]))
    assert result.returncode == 1
    assert "README.md must have exactly one line that starts with 'pip install' and runs pytest" in result.stderr
    assert result.stderr.splitlines()[1:] == (commands or ["none"])
    assert list((tmp_path / "tmp").iterdir()) == []
