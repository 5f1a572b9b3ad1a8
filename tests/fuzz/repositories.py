# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
Hostile repositories: pickles, code, links, paths that lead elsewhere, damaged configs and cards.

Whatever is done with one, nothing of it is run, and what is uploaded or copied lies in its folder. A repository may be
refused, by the error of whatever finds out what is wrong with it, or give a pipeline with the weights that it has.
"""

import functools
import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from fuzz.cases import Case
from fuzz.data_files import TRAP, Trap, damage, without_code
from hypothesis import strategies as st
from safetensors import SafetensorError
from tiny_models import make_pipeline

from diffusers_lsep import SiTTransformer2DModel
from diffusers_lsep.hub import push
from diffusers_lsep.hub.model_card import write_model_card
from diffusers_lsep.hub.space import write_space


CODE = f"import os\nos.environ['{TRAP}'] = '1'\n"
SECRET = b"a secret of this machine"
JSON_FILES = ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json")
WEIGHTS = "transformer/diffusion_pytorch_model"


@functools.cache
def saved() -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """The files of a pipeline, with a card, and the weights of its transformer."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = make_pipeline(id2label={0: "ant", 1: "bee"}, in_channels=3, sample_size=4, num_layers=1)
        pipe.save_pretrained(folder)
        write_model_card(folder, license="mit")
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
        return files, pipe.transformer.state_dict()


HOSTILE_NAMES = (
    "a\nb",
    "<script>alert(1)</script>",
    "![x](/etc/passwd)",
    "---\nlicense: x",
    "|`*_",
    "\ud800",
    "x" * 5000,
    "",
)
VALUES = (None, 0, -1, 10**9, 2**62, 1.5, "x", "../../x", "/etc/passwd", [], {}, True, float("nan"), ["os", "system"])
TRICKS = ("json", "json", "value", "value", "names", "component", "pickle", "code", "link", "card", "weights", "none")


def draw_changes(draw, secret: str) -> tuple[str, dict[str, bytes | None], dict[str, str]]:
    """What is changed: the trick, files (None of those that go away), and links by their names."""
    files, links = saved()[0], {}
    trick = draw(st.sampled_from(TRICKS))
    changes: dict[str, bytes | None] = {}
    index = json.loads(files["model_index.json"])
    if trick == "json":
        name = draw(st.sampled_from(JSON_FILES))
        changes[name] = draw(
            st.sampled_from([b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, damage(draw, files[name])])
        )
    elif trick == "value":
        name = draw(st.sampled_from(JSON_FILES))
        config = json.loads(files[name])
        config[draw(st.sampled_from([*config, "extra"]))] = draw(st.sampled_from(VALUES))
        changes[name] = json.dumps(config).encode()
    elif trick == "names":
        index["id2label"] = {"0": draw(st.sampled_from(HOSTILE_NAMES)), "1": "bee"}
        changes["model_index.json"] = json.dumps(index).encode()
        changes["README.md"] = None
    elif trick == "component":
        name = draw(st.sampled_from([secret, "..", "../..", "vae", "transformer", "x/../.."]))
        index[name] = draw(
            st.sampled_from(
                [["diffusers_lsep", "X"], ["os", "system"], ["diffusers", "AutoencoderKL"], ["pipeline", "X"]]
            )
        )
        changes["model_index.json"] = json.dumps(index).encode()
    elif trick == "pickle":
        suffix = draw(st.sampled_from([".bin", ".pt", ".ckpt", ".pkl"]))
        changes[f"{WEIGHTS}{suffix}"] = pickle.dumps(Trap())
        if draw(st.booleans()):
            changes[f"{WEIGHTS}.safetensors"] = None
    elif trick == "code":
        module = draw(
            st.sampled_from(["pipeline.py", "transformer/transformer_sit.py", "scheduler/x.py", "diffusers.py"])
        )
        changes[module] = CODE.encode()
        index["_class_name"] = draw(st.sampled_from([["pipeline", "LSEPPipeline"], "LSEPPipeline", ["x", "X"]]))
        index["transformer"] = draw(
            st.sampled_from([["transformer_sit", "SiTTransformer2DModel"], index["transformer"]])
        )
        index["auto_map"] = {"AutoModel": "transformer_sit.SiTTransformer2DModel"}
        changes["model_index.json"] = json.dumps(index).encode()
    elif trick == "link":
        name = draw(st.sampled_from([*files, "a.png", "scheduler/more.txt", "transformer/more.json", "probe"]))
        changes[name] = None
        links[name] = secret
        changes.setdefault("README.md", b"---\nlicense: mit\n---\n![x](a.png)\n")
    elif trick == "card":
        targets = [secret, f"../{Path(secret).name}", "/etc/passwd", ".", "transformer", "x" * 5000, "%2e%2e/x.png"]
        text = f"![x]({draw(st.sampled_from(targets))})\n" * draw(st.sampled_from([1, 200]))
        head = draw(
            st.sampled_from(
                [
                    "---\nlicense: mit\n---\n",
                    "",
                    "---\n!!python/object/apply:os.system [true]\n---\n",
                    "---\n- 1\n---\n",
                ]
            )
        )
        changes["README.md"] = (head + text).encode()
    elif trick == "weights":
        changes[f"{WEIGHTS}.safetensors"] = damage(draw, files[f"{WEIGHTS}.safetensors"][:400]) + draw(
            st.sampled_from([files[f"{WEIGHTS}.safetensors"][400:], b""])
        )
    return trick, changes, links


def push_files(folder: Path) -> list[Path]:
    """What would be uploaded."""
    found: list[Path] = []

    def keep(folder, files, *_):
        found.extend(folder / name for name in [push.CARD_NAME, *files])

    with mock.patch.object(push, "_commit", keep):
        push.push_folder(folder, "somebody/model", "mit")
    return found


def copy_files(folder: Path) -> list[Path]:
    """What a Space would hold."""
    space = write_space(str(folder), folder.parent / "space")
    return [path for path in sorted((space / "model").rglob("*")) if path.is_file()]


@st.composite
def repositories(draw) -> Case:
    action = draw(st.sampled_from(["load", "load", "push", "push", "space", "card", "single file"]))
    place = Path(tempfile.gettempdir(), f"fuzz-{os.getpid()}")
    trick, changes, links = draw_changes(draw, str(place / "secret.png"))

    def call():
        shutil.rmtree(place, ignore_errors=True)
        folder = place / "repository"
        for name, data in {**saved()[0], **changes}.items():
            if data is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        (place / "secret.png").write_bytes(SECRET)
        for name, target in links.items():
            (folder / name).symlink_to(target)
        with without_code():
            if action == "load":
                return DiffusionPipeline.from_pretrained(folder)
            if action == "single file":
                return SiTTransformer2DModel.from_single_file(folder / f"{WEIGHTS}.safetensors")
            if action == "card":
                write_model_card(folder, license="mit")
                return [folder / "README.md"]
            files = push_files(folder) if action == "push" else copy_files(folder)
            return [(path, path.read_bytes()) for path in files]

    def check(result) -> str | None:
        if action in ("load", "single file"):
            if trick in ("json", "value", "weights", "link", "component"):
                return None  # another config is another model
            found = (result.transformer if action == "load" else result).state_dict()
            same = all(torch.equal(found[name], value) for name, value in saved()[1].items())
            return None if same else "other weights"
        if action == "card":
            # Between fences it is shown as it is.
            text = re.sub(r"^```.*?^```", "", result[0].read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            return "a name that is no text in the card" if "<script>" in text else None
        outside = [path for path, data in result if SECRET in data or not path.resolve().is_relative_to(place)]
        return f"{outside} leave the machine" if outside else None

    # Those of diffusers, which reads the folder first, are its own.
    errors = (OSError, SafetensorError) if action != "load" else (Exception,)
    anything = ["folder", "`", "", place.name]
    return Case(
        f"{action}, {trick} {list(changes)} {links}", call, [], anything if trick != "none" else [], check, errors
    )


SURFACES = {"repository": repositories()}
