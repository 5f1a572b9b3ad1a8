# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Gives a saved pipeline the code to load without this package, with `trust_remote_code=True`."""

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

from ..files import write_text
from ..registration import LIBRARY_NAME
from .saved_pipeline import SavedPipeline


# The component classes that a repository with code brings along: component and module.
REMOTE_COMPONENTS = {
    "SiTTransformer2DModel": ("transformer", "transformer_sit"),
    "FlowMatchSDEScheduler": ("scheduler", "scheduling_flow_match_sde"),
    "FlowMatchSDEMultistepScheduler": ("scheduler", "scheduling_flow_match_sde_multistep"),
    "FlowMatchHeunODEScheduler": ("scheduler", "scheduling_flow_match_heun_ode"),
    "FlowMapScheduler": ("scheduler", "scheduling_flow_map"),
}

# What goes in the place of a component's module in the code of the pipeline. That only names the class as a type, and
# diffusers executes the component's own file later, which makes another class of the same name.
REMOTE_STAND_INS = {"transformer_sit": "from diffusers import ModelMixin as SiTTransformer2DModel\n"}

# Methods that work only where this package is installed: the base class's stand in their place.
LEFT_TO_BASE_CLASS = {
    "LSEPSavingMixin": ("_dict_from_json_file", "save_pretrained", "push_to_hub"),
    "SiTSingleFileMixin": ("from_single_file",),
    "LSEPSingleFileMixin": ("from_single_file",),
}

REMOTE_PIPELINE_FILE = "pipeline.py"


def add_code(folder: str | os.PathLike):
    """
    Adds the code of the model, the scheduler and the pipeline to a saved pipeline, so that diffusers loads it with
    `trust_remote_code=True` where this package is not installed, and the transformer alone by `AutoModel`. From then
    on `DiffusionPipeline.from_pretrained` asks for that argument wherever the folder is loaded; `LSEPPipeline` takes
    the classes of the package, as do its commands. Components of other libraries are left as they are. Code that was
    added for another class of a component is removed.

    The files are made of this package's modules. Each stands alone and holds what it imports from other modules.

    Args:
        folder (`str` or `os.PathLike`): A folder that `LSEPPipeline.save_pretrained` wrote.

    Raises:
        `ValueError`: if `folder` holds no pipeline of this package.
    """
    folder = Path(folder)
    pipeline = SavedPipeline(folder)
    index = pipeline.index
    write_text(folder / REMOTE_PIPELINE_FILE, _standalone_source("pipeline_lsep"))
    index["_class_name"] = [REMOTE_PIPELINE_FILE.removesuffix(".py"), "LSEPPipeline"]
    for class_name, (component, module) in REMOTE_COMPONENTS.items():
        path = folder / component / f"{module}.py"
        if index[component][1] == class_name:
            write_text(path, _standalone_source(module))
            index[component] = [module, class_name]
        else:
            path.unlink(missing_ok=True)
    if index.get("guidance_transformer", [None])[0] is not None:
        _, module = REMOTE_COMPONENTS["SiTTransformer2DModel"]
        write_text(folder / "guidance_transformer" / f"{module}.py", _standalone_source(module))
        index["guidance_transformer"] = index["transformer"]
    # For `AutoModel`. It reads the index if there is one, else (`from_pretrained(folder / "transformer")`) the config.
    index["auto_map"] = {"AutoModel": ".".join(index["transformer"])}
    config = pipeline.transformer | {"auto_map": index["auto_map"]}
    write_text(folder / "transformer" / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def without_code(index: dict[str, Any]) -> dict[str, Any]:
    """The `model_index.json` of a folder as it was before [`add_code`]."""
    before = {name: value for name, value in index.items() if name != "auto_map"}
    if index.get("_class_name") == [REMOTE_PIPELINE_FILE.removesuffix(".py"), "LSEPPipeline"]:
        before["_class_name"] = "LSEPPipeline"
    for name, value in before.items():
        class_name = value[1] if isinstance(value, list) and len(value) == 2 else None
        if isinstance(class_name, str) and value[0] == REMOTE_COMPONENTS.get(class_name, (None, None))[1]:
            before[name] = [LIBRARY_NAME, class_name]
    return before


def _standalone_source(module: str, imported: set[str] | None = None) -> str:
    """
    The source of a module of this package with nothing left that needs the others: a module that it imports stands in
    place of the first import; a component class is replaced by its base class (`REMOTE_STAND_INS`); some methods are
    left to the base class (`LEFT_TO_BASE_CLASS`). `imported` holds the modules and imports of other libraries that
    stand in the text already.
    """
    source = Path(__file__).parents[1].joinpath(f"{module}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    is_whole_file = imported is None
    imported = set() if imported is None else imported
    edits: list[tuple[int, int | None, str]] = []
    for node in imports:
        own = node.module if isinstance(node, ast.ImportFrom) and node.level else None
        name = own or ast.unparse(node)
        if name in imported:
            edits.append((node.lineno, node.end_lineno, ""))
            continue
        imported.add(name)
        if own is not None:
            text = REMOTE_STAND_INS.get(name) or f"\n\n# {name}.py\n{_standalone_source(name, imported)}\n\n"
            edits.append((node.lineno, node.end_lineno, text))
    for definition in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        left_out: tuple[str, ...] = LEFT_TO_BASE_CLASS.get(definition.name, ())
        for method in definition.body:
            if isinstance(method, ast.FunctionDef) and method.name in left_out:
                start = min([method.lineno, *(decorator.lineno for decorator in method.decorator_list)])
                edits.append((start, method.end_lineno, ""))

    lines = source.splitlines(keepends=True)
    for start, end, text in sorted(edits, reverse=True):
        lines[start - 1 : end] = [text]
    text = "".join(lines)
    if not is_whole_file:
        text = "".join(text.splitlines(keepends=True)[2:])  # the licence is at the top of the file already
    return re.sub(r"\n{4,}", "\n\n\n", text)
