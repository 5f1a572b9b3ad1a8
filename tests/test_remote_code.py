# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Pipelines that bring their code along, where this package is not installed."""

import ast
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from client_process import run_client
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from hub_server import HubServer
from tiny_models import make_pipeline

import diffusers_lsep
from diffusers_lsep import (
    FlowMapScheduler,
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
    LSEPPipeline,
    SiTTransformer2DModel,
)
from diffusers_lsep.hub.remote_code import LEFT_TO_BASE_CLASS, REMOTE_COMPONENTS, add_code
from diffusers_lsep.sampling import load_pipeline
from diffusers_lsep.training.fine_tuning import read_pretrained


# Both processes start with this. The images do not depend on the process, only on the number of threads.
COMMON = """
import logging, os, sys

IMAGES, RECORDS = {}, []

def error_of(function, *arguments, **kwargs):
    try:
        function(*arguments, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def generate(pipe):
    import torch

    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe([1, "b"], num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="np").images
"""

PUSH = """
import diffusers_lsep
from diffusers import DiffusionPipeline

for name in ("linear", "multistep", "heun"):
    pipe = DiffusionPipeline.from_pretrained(f"{os.environ['FOLDERS']}/plain/{name}")
    pipe.push_to_hub(f"lsep/{name}", license="mit", with_code=True, token="hf_owner")
pipe.push_to_hub("lsep/plain", token="hf_owner")
"""

LOAD_WITHOUT_PACKAGE = """
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_lsep":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())

import numpy as np
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

handler = logging.Handler()
handler.emit = lambda record: RECORDS.append(record.getMessage())
diffusers_logging.add_handler(handler)

REPORT["imported"] = error_of(__import__, "diffusers_lsep")
REPORT["not trusted, local"] = error_of(DiffusionPipeline.from_pretrained, os.environ["FOLDERS"] + "/linear")
REPORT["not trusted, hub"] = error_of(DiffusionPipeline.from_pretrained, "lsep/linear")
for name in ("linear", "cosine", "multistep", "heun", "euler"):
    pipe = DiffusionPipeline.from_pretrained(f"{os.environ['FOLDERS']}/{name}", trust_remote_code=True)
    IMAGES[name] = generate(pipe)
for name in ("multistep", "heun", "linear"):
    pipe = DiffusionPipeline.from_pretrained(f"lsep/{name}", trust_remote_code=True)
    IMAGES[f"{name}, hub"] = generate(pipe)
REPORT["modules"] = [type(part).__module__ for part in (pipe, pipe.transformer, pipe.scheduler)]
for name, where in {
    "AutoModel, local": {"pretrained_model_or_path": os.environ["FOLDERS"] + "/linear", "subfolder": "transformer"},
    "AutoModel, hub": {"pretrained_model_or_path": "lsep/linear", "subfolder": "transformer"},
    "AutoModel, folder": {"pretrained_model_or_path": os.environ["FOLDERS"] + "/linear/transformer"},
}.items():
    pipe.transformer = AutoModel.from_pretrained(**where, trust_remote_code=True)
    IMAGES[name] = generate(pipe)
    REPORT[name] = [type(pipe.transformer).__name__, type(pipe.transformer).__module__.split(".")[0]]
    RECORDS[:] = [record for record in RECORDS if not record.startswith("`trust_remote_code` is enabled")]
REPORT["not trusted, AutoModel"] = error_of(AutoModel.from_pretrained, "lsep/linear", subfolder="transformer")
REPORT["without code, local"] = error_of(DiffusionPipeline.from_pretrained, os.environ["FOLDERS"] + "/plain/linear")
REPORT["without code, hub"] = error_of(DiffusionPipeline.from_pretrained, "lsep/plain")
pipe.scheduler = type(pipe.scheduler)(path_type="cosine")
REPORT["wrong path"] = error_of(generate, pipe)
REPORT["records"] = RECORDS
np.savez("images.npz", **IMAGES)
"""


@pytest.fixture(scope="module")
def pipelines():
    id2label = {0: "a", 1: "b", 2: "c"}
    schedulers = {
        "linear": FlowMatchSDEScheduler(),
        "cosine": FlowMatchSDEScheduler(path_type="cosine"),
        "multistep": FlowMatchSDEMultistepScheduler(),
        "heun": FlowMatchHeunODEScheduler(),
        "flow-map": FlowMapScheduler(renoising=0.5),
        "euler": FlowMatchEulerDiscreteScheduler(),
    }
    return {
        name: make_pipeline(
            scheduler, id2label=id2label, sample_size=4, in_channels=3, num_classes=3, flow_map_depth=1
        )
        for name, scheduler in schedulers.items()
    }


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    folders = tmp_path_factory.mktemp("folders")
    for name, pipe in pipelines.items():
        pipe.save_pretrained(folders / "plain" / name)
        pipe.save_pretrained(folders / name)
        add_code(folders / name)
    return folders


@pytest.fixture(scope="module")
def expected(pipelines):
    """The images of the installed package."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scope = {}
    exec(COMMON, scope)
    images = {name: scope["generate"](pipe) for name, pipe in pipelines.items()}
    torch.set_num_threads(threads)
    return images


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub"), {"hf_owner": "lsep"}) as server:
        yield server


@pytest.fixture(scope="module")
def loaded(hub, folders, tmp_path_factory):
    """Pushes with the package, loads without it."""
    work = tmp_path_factory.mktemp("work")
    run_client(COMMON + PUSH, hub.environment(work / "home", FOLDERS=str(folders)), work)
    report = run_client(
        COMMON + LOAD_WITHOUT_PACKAGE, hub.environment(work / "other home", FOLDERS=str(folders)), work
    )
    return report, dict(np.load(work / "images.npz"))


@pytest.mark.slow
def test_the_package_is_not_there(loaded):
    assert loaded[0]["imported"] == "ModuleNotFoundError: No module named 'diffusers_lsep'"
    assert loaded[0]["modules"] == [
        "diffusers_modules.local.pipeline",
        "diffusers_modules.local.transformer_sit",
        "diffusers_modules.local.scheduling_flow_match_sde",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "cosine", "multistep", "heun", "euler"])
def test_same_images_from_a_folder(loaded, expected, name):
    assert np.array_equal(loaded[1][name], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "multistep", "heun"])
def test_same_images_from_the_hub(loaded, expected, name):
    assert np.array_equal(loaded[1][f"{name}, hub"], expected[name])


@pytest.mark.slow
def test_checks_work_without_the_package(loaded):
    # The scheduler is recognised although its class is not the one that the pipeline's code saw.
    assert loaded[0]["wrong path"].startswith("ValueError: `scheduler` has `path_type='cosine'`")


@pytest.mark.slow
def test_loads_without_warnings(loaded):
    assert loaded[0]["records"] == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "hub", "folder"])
def test_the_transformer_loads_alone(loaded, expected, where):
    assert loaded[0][f"AutoModel, {where}"] == ["SiTTransformer2DModel", "diffusers_modules"]
    assert np.array_equal(loaded[1][f"AutoModel, {where}"], expected["linear"])


@pytest.mark.slow
def test_what_is_seen_without_the_package_is_explained(hub, loaded):
    """Whoever searches for the message finds what to do: in the README and in the first lines of the card."""
    card = hub.files("lsep/plain")["README.md"].decode().split("\n---\n")[1]
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for where, message in {
        "local": "module diffusers has no attribute LSEPPipeline",
        "hub": "diffusers_lsep.py as defined in `model_index.json` does not exist",
    }.items():
        for text in (loaded[0][f"without code, {where}"], "\n".join(card.splitlines()[:8]), " ".join(readme.split())):
            assert message in text
    assert "write `import diffusers_lsep` before" in card
    assert "has no attribute" not in hub.files("lsep/linear")["README.md"].decode()


@pytest.mark.slow
def test_code_is_run_on_request_only(loaded):
    assert "contains custom code. Pass `trust_remote_code=True`" in loaded[0]["not trusted, AutoModel"]
    for where in ("local", "hub"):
        message = loaded[0][f"not trusted, {where}"]
        assert message.startswith("ValueError: The ")
        assert "contains custom code in pipeline.py" in message and "`trust_remote_code=True`" in message


@pytest.mark.slow
def test_layout(folders, hub, loaded):
    index = json.loads((folders / "linear" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LSEPPipeline"]
    assert index["transformer"] == ["transformer_sit", "SiTTransformer2DModel"]
    assert index["scheduler"] == ["scheduling_flow_match_sde", "FlowMatchSDEScheduler"]
    assert json.loads((folders / "euler" / "model_index.json").read_text())["scheduler"][0] == "diffusers"
    code = ["pipeline.py", "scheduler/scheduling_flow_match_sde.py", "transformer/transformer_sit.py"]
    assert sorted(str(path.relative_to(folders / "linear")) for path in folders.glob("linear/**/*.py")) == code
    assert [path for path in hub.files("lsep/linear") if path.endswith(".py")] == code
    for name, module in (
        ("multistep", "scheduling_flow_match_sde_multistep"),
        ("heun", "scheduling_flow_match_heun_ode"),
    ):
        assert list(hub.files(f"lsep/{name}")).count(f"scheduler/{module}.py") == 1
        assert json.loads(hub.files(f"lsep/{name}")["model_index.json"])["scheduler"][0] == module


@pytest.mark.slow
def test_card_says_that_the_repository_brings_code(hub, loaded):
    card = hub.files("lsep/linear")["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("lsep/linear", trust_remote_code=True)' in card
    assert "import diffusers_lsep" not in card


def test_code_stands_alone(folders):
    paths = [path for name in ("linear", "multistep", "heun") for path in folders.glob(f"{name}/**/*.py")]
    assert len(paths) == 9
    for path in paths:
        tree = ast.parse(path.read_text())
        bound = defaultdict(set)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}:{node.lineno}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert not module.startswith("diffusers_lsep"), f"{path.name}:{node.lineno}"
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    bound[alias.asname or alias.name].add((getattr(node, "module", None), alias.name))
            elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                bound[node.name].add(node.lineno)
        # What one module calls by a name must not be something else in the module that it is put into.
        assert {name for name, places in bound.items() if len(places) > 1} == set()


def imports_from_the_package(node):
    names = [part.module or "" for part in ast.walk(node) if isinstance(part, ast.ImportFrom) and not part.level]
    names += [alias.name for part in ast.walk(node) if isinstance(part, ast.Import) for alias in part.names]
    is_relative = any(isinstance(part, ast.ImportFrom) and part.level for part in ast.walk(node))
    return is_relative or any(name.partition(".")[0] == "diffusers_lsep" for name in names)


def test_methods_that_need_the_package_are_named(folders):
    """What a method imports while it runs would be missed only when somebody calls it, far from here."""
    source = Path(diffusers_lsep.__file__).parent
    waiting, modules = ["pipeline_lsep", *(module for _, module in REMOTE_COMPONENTS.values())], {}
    while waiting:
        name = waiting.pop()
        if name not in modules:
            modules[name] = ast.parse((source / f"{name}.py").read_text())
            imports = [node for node in modules[name].body if isinstance(node, ast.ImportFrom) and node.level]
            waiting += [node.module for node in imports]
    assert {"pipeline_lsep", "transformer_sit", "scheduling_flow_match", "interpolants"} <= set(modules)
    found = set()
    for name, tree in modules.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found |= {(node.name, part.name) for part in node.body if imports_from_the_package(part)}
            elif not isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not imports_from_the_package(node), f"{name}:{node.lineno}"
    assert found == {(name, method) for name, methods in LEFT_TO_BASE_CLASS.items() for method in methods}

    tree = ast.parse((folders / "linear" / "pipeline.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = {node.name: {part.name for part in node.body if isinstance(part, ast.FunctionDef)} for node in classes}
    assert "__call__" in methods["LSEPPipeline"] and LEFT_TO_BASE_CLASS["LSEPSavingMixin"]
    for name in ("LSEPPipeline", "LSEPSavingMixin"):
        assert not methods[name].intersection(LEFT_TO_BASE_CLASS["LSEPSavingMixin"])


def test_code_of_another_scheduler_goes(pipelines, tmp_path):
    for name, module in (
        ("linear", "scheduling_flow_match_sde"),
        ("heun", "scheduling_flow_match_heun_ode"),
        ("multistep", "scheduling_flow_match_sde_multistep"),
        ("euler", None),
    ):
        pipelines[name].save_pretrained(tmp_path)
        (tmp_path / "scheduler" / "mine.py").write_text("")
        add_code(tmp_path)
        code = {path.name for path in (tmp_path / "scheduler").glob("*.py")}
        assert code == {"mine.py", *([f"{module}.py"] if module else [])}
        pipe = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(pipe.scheduler).__name__ == type(pipelines[name].scheduler).__name__


def test_adding_code_again_changes_nothing(folders):
    files = {path: path.read_bytes() for path in (folders / "linear").rglob("*") if path.is_file()}
    add_code(folders / "linear")
    assert {path: path.read_bytes() for path in (folders / "linear").rglob("*") if path.is_file()} == files


def test_with_the_package_such_a_folder_needs_trust_too(folders):
    with pytest.raises(ValueError, match="contains custom code in pipeline.py"):
        DiffusionPipeline.from_pretrained(folders / "linear")
    model = SiTTransformer2DModel.from_pretrained(folders / "linear", subfolder="transformer")
    assert model.config.num_classes == 3 and "auto_map" not in model.config
    assert read_pretrained(str(folders / "linear")).config == read_pretrained(str(folders / "plain" / "linear")).config


def test_the_package_and_its_commands_take_their_own_classes(folders, tmp_path):
    """Nothing of the folder is executed, so that nothing asks for trust."""
    images = []
    for folder in (folders / "linear", folders / "plain" / "linear"):
        pipe = load_pipeline(folder, "cpu")
        assert [type(part) for part in (pipe, pipe.transformer)] == [LSEPPipeline, SiTTransformer2DModel]
        images.append(pipe(1, num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images)
        file = next((folder / "transformer").glob("*.safetensors"))
        assert type(LSEPPipeline.from_single_file(file, config=folder)) is LSEPPipeline
        pipe.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "LSEPPipeline"
    assert (images[0] == images[1]).all()


def test_refuses_other_pipelines(tmp_path):
    with pytest.raises(
        ValueError, match="`folder` has to hold a saved LSEPPipeline, but there is no model_index.json"
    ):
        add_code(tmp_path)
