# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards of saved pipelines, made of what is in the folder and of what the caller knows.

The sections stand between comments. Another comment, the facts, has the hashes of the weights that they are about, and
the metadata as it was generated. What is generated is replaced when a new card is made, and dropped where it is about
other weights; what somebody writes outside of the comments, or changes in the metadata, stays.
"""

import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..files import hash_saved_weights, whole_file
from ..transformer_sit import SIT_PRESETS


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
EVAL_RESULTS_NAME = "eval_results.json"
PIPELINE_TAG = "unconditional-image-generation"
TAGS = ["class-conditional", "sit"]

LSEP_TAGS = ["lsep", "arxiv:2509.21565"]

REPA_TAGS = ["arxiv:2410.06940"]

SIT_TAGS = ["arxiv:2401.08740"]

# The metadata that is generated; everything else in a card is somebody's own.
METADATA = ("license", "library_name", "pipeline_tag", "tags", "datasets", "base_model", "model-index")

LSEP = "LSEP ([arXiv:2509.21565](https://arxiv.org/abs/2509.21565))"

REPA_PAPER = "[arXiv:2410.06940](https://arxiv.org/abs/2410.06940)"

SIT_PAPER = "[arXiv:2401.08740](https://arxiv.org/abs/2401.08740)"

PROBE = "a linear probe, which is used in training only, makes an early layer linearly separable"

# Of converted checkpoints: a sentence, and tags beyond the common ones.
CONVERTED = {
    "lsep": (f"Trained with {LSEP}: {PROBE}; no external encoder takes part.", LSEP_TAGS),
    "repa": (f"The weights are those of a REPA checkpoint ({REPA_PAPER}), not trained with LSEP.", REPA_TAGS),
    "sit": (f"The weights are those of a SiT checkpoint ({SIT_PAPER}), not trained with LSEP.", SIT_TAGS),
}

SOURCES = (*CONVERTED, "training")

METRIC_NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
    "kid": "KID",
    "kid_std": "KID, standard deviation over its subsets",
    "fd_dinov2": "FD-DINOv2",
}

CITATION = """\
```bibtex
@article{yun2025lsep,
  title = {No Alignment Needed for Generation: Learning Linearly Separable Representations in Diffusion Models},
  author = {Yun, Junno and Al\\c{c}alar, Ya\\c{s}ar Utku and Ak\\c{c}akaya, Mehmet},
  journal = {arXiv preprint arXiv:2509.21565},
  year = {2025}
}
```"""


def _section_pattern(name: str = r"\w+") -> re.Pattern:
    return re.compile(rf"<!-- diffusers_lsep: ({name}) -->\n\n(.*?)\n\n<!-- /diffusers_lsep -->\n*", flags=re.DOTALL)


def _render(name: str, content: str) -> str:
    return f"<!-- diffusers_lsep: {name} -->\n\n{content}\n\n<!-- /diffusers_lsep -->\n\n"


_FACTS = re.compile(r"\n*<!-- diffusers_lsep facts: (\{.*?\}) -->\n*")


def _read_facts(card: ModelCard) -> dict[str, Any]:
    """`weights`: hashes by component; `metadata`: as it was generated. Empty if the card has none that can be read."""
    match = _FACTS.search(card.text)
    try:
        facts = json.loads(match[1]) if match else {}
    except ValueError:
        return {}
    return facts if all(isinstance(facts.get(name), dict) for name in ("weights", "metadata")) else {}


def _set_facts(card: ModelCard, weights: Mapping[str, str], metadata: Mapping[str, Any]) -> ModelCard:
    facts = json.dumps({"weights": weights, "metadata": metadata}).replace(">", "\\u003e")  # it would end the comment
    card.text = f"{_FACTS.sub('', card.text).rstrip()}\n\n<!-- diffusers_lsep facts: {facts} -->\n"
    return card


def is_about_other_weights(card: ModelCard, weights: Mapping[str, str]) -> bool:
    """Whether a card says that it is about other weights than these, by their hashes ([`SavedPipeline`])."""
    before = _read_facts(card).get("weights", {})
    return any(before[name] != weights[name] for name in before.keys() & weights.keys())


@dataclass
class Gallery:
    """
    Images in a model card and how they were made.

    Args:
        image (`str`): File of the grid, relative to the pipeline's folder.
        class_labels (`list[int]` or `list[str]`): Classes of the images, row by row.
        seeds (`list[int]`): Seeds of their generators, one per image.
    """

    image: str
    class_labels: list[int] | list[str]
    seeds: list[int]


def write_model_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    license: str | None = None,
    source: str | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    training_args: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    gallery: Gallery | None = None,
) -> Path:
    """
    Writes the model card of a saved pipeline, `README.md`. If there is one, what was generated of it is replaced by
    what is known now, and what was written by hand stays. Paths on this machine lose their folders.

    Args:
        folder (`str` or `os.PathLike`):
            A folder that `LSEPPipeline.save_pretrained` wrote. Metrics are read from its `eval_results.json`, if there
            is one of these weights.
        repo_id (`str`, *optional*): Where the model is going to be on the Hub; the folder itself if not given.
        license (`str`, *optional*): Licence of the weights, as the Hub spells it. None is claimed if not given.
        source (`str`, *optional*):
            Where the weights come from: a checkpoint of the original projects, `"lsep"`, `"repa"` or `"sit"`, or
            `"training"` by `examples/train_lsep.py`, with a method that is told by `training_args`.
        dataset (`str`, *optional*): Id on the Hub of the data set that it was trained on.
        base_model (`str`, *optional*): Id on the Hub, or folder, of the model that it was fine-tuned from.
        training_args (`Mapping[str, Any]`, *optional*): Flags of the training run. Tokens are left out.
        sampling (`Mapping[str, Any]`, *optional*):
            Arguments for calling the pipeline, such as `num_inference_steps` and `guidance_scale`.
        gallery (`Gallery`, *optional*): Images to show.

    Returns:
        `Path`: the card.

    Raises:
        `ValueError`: if `folder` holds no pipeline of this package, if `source` is none of these, if the gallery's
        image is not in the folder or lacks seeds, or if `eval_results.json` is not what `evaluate` writes.
    """
    folder = Path(folder)
    if source is not None and source not in SOURCES:
        raise ValueError(f"`source` has to be one of {list(SOURCES)}, but is {source!r}.")
    if source == "training" and training_args is None:
        raise ValueError("`source` is 'training', so `training_args` has to be given, but is None.")
    if gallery is not None and not (folder / gallery.image).is_file():
        raise ValueError(f"`gallery` names {gallery.image!r}, but there is no such file in {folder}.")
    if gallery is not None and len(gallery.seeds) != len(gallery.class_labels):
        raise ValueError(
            f"`gallery` has to have one seed per image, but has {len(gallery.seeds)} seeds for"
            f" {len(gallery.class_labels)} images."
        )
    pipeline = SavedPipeline(folder)
    results = pipeline.read_evaluation()
    name = repo_id.split("/")[-1] if repo_id is not None else folder.resolve().name
    flags = without_folders(training_args or {})
    dataset = None if _is_local(dataset) else dataset
    sentence, tags = _method(source, flags, base_model)

    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        tags=[*TAGS, *tags],
        datasets=[dataset] if dataset is not None else None,
        base_model=None if _is_local(base_model) else base_model,
        model_name=name if results else None,
        eval_results=_model_index(results, dataset) if results else None,
    )
    sections = {
        "summary": pipeline.summary(name, sentence),
        "usage": pipeline.usage(repo_id if repo_id is not None else name, sampling or {}),
        "gallery": _gallery_section(gallery) if gallery is not None else None,
        "sampling": pipeline.sampling(sampling or {}),
        "training": _training_section(flags, dataset, base_model),
        "evaluation": _evaluation_section(results) if results else None,
        "license": None if license is not None else "No licence has been declared for these weights.",
        "citation": f"## Citation\n\n{CITATION}" if "lsep" in tags else None,
    }
    card = _card(data, sections, pipeline.hashes)
    path = folder / CARD_NAME
    if path.exists():
        card = merge_model_cards(_forget(ModelCard.load(path), _sections(card)), card)
    return _save(path, card)


def update_evaluation(folder: str | os.PathLike) -> Path:
    """
    Brings the metrics in the model card of a saved pipeline up to date with its `eval_results.json`, and nothing else:
    they are dropped if it is of other weights. Where there is no card of these weights yet, `write_model_card` writes
    one.

    Args:
        folder (`str` or `os.PathLike`): A folder that `LSEPPipeline.save_pretrained` wrote.

    Returns:
        `Path`: the card.

    Raises:
        `ValueError`: if there is no `eval_results.json` in `folder`, or if it is not what `evaluate` writes.
    """
    folder = Path(folder)
    pipeline, path = SavedPipeline(folder), folder / CARD_NAME
    if not (folder / EVAL_RESULTS_NAME).is_file():
        raise ValueError(f"`folder` has to hold {EVAL_RESULTS_NAME}, but there is none in {folder}.")
    old = ModelCard.load(path) if path.is_file() else None
    if old is None or is_about_other_weights(old, pipeline.hashes):
        return write_model_card(folder)
    results, data = pipeline.read_evaluation(), ModelCardData()
    if results:
        dataset = old.data.datasets[0] if isinstance(old.data.datasets, list) and old.data.datasets else None
        data.model_name = old.data.model_name or folder.resolve().name
        data.eval_results = _model_index(results, dataset)
    new = _card(data, {"evaluation": _evaluation_section(results) if results else None}, pipeline.hashes)
    kept = {*_sections(old)} - {"evaluation"} | {*_sections(new)}
    return _save(path, merge_model_cards(_forget(old, kept, ["model-index"]), new))


def _card(data: ModelCardData, sections: Mapping[str, str | None], weights: Mapping[str, str]) -> ModelCard:
    text = "".join(_render(name, content) for name, content in sections.items() if content is not None)
    return _set_facts(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"), weights, data.to_dict())


def _sections(card: ModelCard) -> dict[str, str]:
    return dict(_section_pattern().findall(card.text))


def _save(path: Path, card: ModelCard) -> Path:
    with whole_file(path) as partial:
        card.save(partial)
    return path


def _forget(card: ModelCard, kept_sections: Collection[str], metadata: Iterable[str] = METADATA) -> ModelCard:
    """
    A card without what was generated: other sections than these, and metadata under these keys, unless somebody has
    changed it. Sections without facts are of an older version, and all of this metadata counts as generated then.
    """
    data = card.data.to_dict()
    of_older = {key: data[key] for key in METADATA if key in data and _sections(card)}
    generated = _read_facts(card).get("metadata", of_older)
    forgotten = {key: generated[key] for key in metadata if key in generated}
    old = ModelCardData(**forgotten, ignore_metadata_errors=True)
    data = {key: value for key, value in data.items() if key not in forgotten or value != forgotten[key]}
    data["tags"] = [tag for tag in data.get("tags", []) if tag not in (old.tags or [])] or None
    data.pop("model-index", None)
    data["eval_results"] = [r for r in card.data.eval_results or [] if r not in (old.eval_results or [])] or None
    data["model_name"] = card.data.model_name if data["eval_results"] else data.get("model_name")
    text = _section_pattern().sub(lambda match: match[0] if match[1] in kept_sections else "", card.text)
    generated = {key: value for key, value in generated.items() if key not in forgotten}
    card = ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n{text}")
    return _set_facts(card, {}, generated)


def merge_model_cards(old: ModelCard, new: ModelCard, weights: Mapping[str, str] | None = None) -> ModelCard:
    """
    Brings a card up to date. The text is the old one with the sections of the new one; the text of a card that was
    written by hand, without sections, is left as it is. If the new one has text of its own, that is the text. Metadata
    of the new card goes before that of the old one. What was generated of the old one counts if it is about the same
    weights.

    Args:
        old (`ModelCard`): The card that is there.
        new (`ModelCard`): What is known now.
        weights (`Mapping[str, str]`, *optional*): Hashes of the weights that the new one is about, if it does not say.

    Returns:
        `ModelCard`: the card of both.
    """
    new_facts = _read_facts(new)
    weights = new_facts.get("weights", {}) if weights is None else weights
    if is_about_other_weights(old, weights) or (_sections(old) and not _read_facts(old)):
        old = _forget(old, _sections(new))
    old_facts = _read_facts(old)

    text = new.text
    if not _section_pattern().sub("", _FACTS.sub("", new.text)).strip():
        text = _FACTS.sub("\n", old.text)
        for name, content in _sections(new).items() if _sections(old) else ():
            block, pattern = _render(name, content), _section_pattern(name)
            if pattern.search(text):
                text = pattern.sub(lambda _, block=block: block, text)
            else:
                text = text.rstrip("\n") + "\n\n" + block

    old_data, new_data = old.data.to_dict(), new.data.to_dict()
    data = ModelCardData(**{**old_data, **new_data})
    data.tags = list(dict.fromkeys([*(old.data.tags or []), *(new.data.tags or [])])) or None
    if old.data.eval_results and new.data.eval_results:
        kept = [
            result
            for result in old.data.eval_results
            if not any(result.is_equal_except_value(other) for other in new.data.eval_results)
        ]
        data.eval_results = kept + new.data.eval_results
    if data.license is not None:
        text = _section_pattern("license").sub("", text)
    return _set_facts(
        ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"),
        {**old_facts.get("weights", {}), **weights},
        {**old_facts.get("metadata", {}), **new_facts.get("metadata", {})},
    )


def declare_license(card: ModelCard, license: str):
    """Gives a card a licence that counts as generated: it is dropped with the weights that it is for."""
    facts = _read_facts(card)
    card.data.license = license
    _set_facts(card, facts.get("weights", {}), {**facts.get("metadata", {}), "license": license})


def point_usage_at(card: ModelCard, repo_id: str):
    """Lets the code in a card load the model from `repo_id`, wherever it loaded it from."""

    def point(match: re.Match) -> str:
        code = re.sub(r'(DiffusionPipeline\.from_pretrained\()"[^"]*"', rf'\1"{repo_id}"', match[2])
        return _render(match[1], code)

    card.text = _section_pattern("usage").sub(point, card.text)


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (str, list)) else repr(value)


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


class SavedPipeline:
    """What the files of a saved pipeline say about it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = self._read("model_index.json")
        class_name = self.index.get("_class_name")
        self.has_code = isinstance(class_name, list)
        if (class_name[1] if self.has_code else class_name) != "LSEPPipeline":
            raise ValueError(f"`folder` has to hold a saved LSEPPipeline, but {folder} holds a {class_name}.")
        self.transformer = self._read("transformer/config.json")
        self.scheduler = self._read("scheduler/scheduler_config.json")
        self.vae = self._read("vae/config.json") if self.index.get("vae", [None])[0] is not None else None

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"`folder` has to hold a saved LSEPPipeline, but there is no {name} in {self.folder}.")
        return json.loads(path.read_text(encoding="utf-8"))

    def weights(self, component: str = "transformer") -> list[Path]:
        """The files of a component's weights, of one variant if there are several."""
        files = sorted((self.folder / component).glob("*.safetensors"))
        plain = [file for file in files if self._variant(file) is None]
        return plain or [file for file in files if self._variant(file) == self._variant(files[0])]

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of the weights that make the images, by component, and variant if it has to be asked for."""
        components = ("transformer",) if self.vae is None else ("transformer", "vae")
        files = {component: self.weights(component) for component in components}
        variants = {component: self._variant(paths[0]) for component, paths in files.items() if paths}
        return {
            component if variant is None else f"{component}.{variant}": hash_saved_weights(files[component])
            for component, variant in variants.items()
        }

    def find_differences(self, weights: Mapping[str, str]) -> list[str]:
        """The components whose weights have another hash than here, in whichever dtype they were loaded."""
        half = ((torch.bfloat16,), (torch.float16,))
        casts = ((), (torch.float32,), *half, *((*dtypes, torch.float32) for dtypes in half))  # a VAE may be cast back
        return [
            component
            for component, digest in weights.items()
            if digest is not None
            and all(hash_saved_weights(self.weights(component), *dtypes) != digest for dtypes in casts)
        ]

    def read_evaluation(self) -> dict[str, Any] | None:
        """`eval_results.json` without folders, if there is one and it is of these weights; else it says why not."""
        results = _read_eval_results(self.folder / EVAL_RESULTS_NAME)
        if results is None or results.get("weights") == self.hashes:
            return results
        problem = (
            "is of other weights than those" if "weights" in results else "does not say that it is of the weights"
        )
        logger.warning(
            f"{EVAL_RESULTS_NAME} {problem} in {self.folder}: the model card leaves it out. `diffusers-lsep evaluate"
            " --update_card` measures anew."
        )
        return None

    @staticmethod
    def _variant(file: Path) -> str | None:
        variant = re.fullmatch(r"[^.]+\.(.+?)(-\d{5}-of-\d{5})?\.safetensors", file.name)
        return variant[1] if variant else None

    @property
    def variant(self) -> str | None:
        """The variant that has to be asked for when loading, where there are no weights without one."""
        return self._variant(self.weights()[0]) if self.weights() else None

    @property
    def num_parameters(self) -> int:
        total = 0
        for path in self.weights():
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118, it is not a dictionary
                    size = 1
                    for length in file.get_slice(key).get_shape():
                        size *= length
                    total += size
        return total

    @property
    def architecture(self) -> str:
        """The name of the preset if it is one, otherwise its numbers."""
        config = self.transformer
        for name, preset in SIT_PRESETS.items():
            if config.get("mlp_ratio") == 4.0 and all(config.get(key) == value for key, value in preset.items()):
                return name
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return f"SiT with {config['num_layers']} blocks of width {width}, patch size {config['patch_size']}"

    @property
    def is_latent_without_vae(self) -> bool:
        return self.vae is None and self.transformer["in_channels"] not in (1, 3)

    def summary(self, name: str, sentence: str) -> str:
        side, channels = self.transformer["sample_size"], self.transformer["in_channels"]
        if self.vae is not None:
            factor = 2 ** (len(self.vae["block_out_channels"]) - 1)
            space = f"{side * factor} × {side * factor} pixels, in the latent space of a VAE"
        elif self.is_latent_without_vae:
            space = f"latents of shape {channels} × {side} × {side}; the repository has no VAE to decode them"
        else:
            space = f"{side} × {side} pixels, directly on pixels"
        rows = [
            ("Network", f"{self.architecture}, {self.num_parameters:,} parameters"),
            ("Images", space),
            ("Classes", f"{self.transformer['num_classes']:,}"),
            ("Path", self.index.get("path_type", "linear")),
        ]
        if (self.folder / "probe" / "config.json").is_file():
            rows.append(("Probe", "`probe/` holds the linear probe of the training; generating does not need it"))
        intro = (
            "A class-conditional flow-matching model for"
            " [diffusers](https://huggingface.co/docs/diffusers) and `diffusers_lsep`."
        )
        return f"# {name}\n\n{f'{intro} {sentence}'.rstrip()}\n\n{_table(('', ''), rows)}"

    def usage(self, repo_id: str, sampling: Mapping[str, Any]) -> str:
        load = [f'"{repo_id}"']
        if self.variant is not None:
            load.append(f'variant="{self.variant}"')
        if self.has_code:
            load.append("trust_remote_code=True")
        arguments = {"class_labels": self._example_labels(), "num_inference_steps": 250, **sampling}
        call = [f"    {key}={_literal(value)}," for key, value in arguments.items()]
        call.append("    generator=torch.Generator().manual_seed(0),")
        if self.is_latent_without_vae:
            call.append('    output_type="latent",')
            result = ["print(images.shape)"]
        else:
            result = ["for i, image in enumerate(images):", '    image.save(f"image_{i}.png")']
        code = [
            *([] if self.has_code else ["import diffusers_lsep  # makes diffusers know the pipeline", ""]),
            "import torch",
            "from diffusers import DiffusionPipeline",
            "",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({', '.join(load)})",
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            "images = pipe(",
            *call,
            ").images",
            *result,
        ]
        text = "## Usage\n\n```python\n" + "\n".join(code) + "\n```\n\n"
        if self.has_code:
            text += (
                "The repository brings its code along (the `.py` files, copied from diffusers_lsep, Apache-2.0), so"
                " diffusers alone is enough. `trust_remote_code=True` lets diffusers run that code: read it first."
            )
        else:
            text += "The import comes first: without it diffusers does not know `LSEPPipeline` and its components."
        if self.is_latent_without_vae:
            text += (
                " These are latents: for images, give `from_pretrained` the VAE of the training as"
                " `vae=AutoencoderKL.from_pretrained(...)` and leave out `output_type`."
            )
        return text

    def _example_labels(self) -> list[int] | list[str]:
        """Two classes, by name where a name belongs to one class only."""
        ids = sorted({0, self.transformer["num_classes"] // 2})
        id2label = self.index.get("id2label")
        if not id2label:
            return ids
        names = {int(class_id): [name.strip() for name in label.split(",")] for class_id, label in id2label.items()}
        count = Counter(name for of_class in names.values() for name in set(of_class))
        return [next((name for name in names.get(i, []) if count[name] == 1), i) for i in ids]

    def sampling(self, sampling: Mapping[str, Any]) -> str:
        # Not what the file holds beside the scheduler's own settings, for others that it may be swapped for
        class_name = self.index["scheduler"][1]
        scheduler_class = getattr(diffusers, class_name, None)
        own = inspect.signature(scheduler_class).parameters if scheduler_class is not None else self.scheduler
        rows = [("scheduler", f"`{class_name}`")]
        rows += [(f"`{key}`", f"`{value}`") for key, value in self.scheduler.items() if key in own]
        rows += [(f"`{key}`", f"`{value}`") for key, value in sampling.items()]
        return f"## Sampler\n\n{_table(('Setting', 'Value'), rows)}"


def _gallery_section(gallery: Gallery) -> str:
    rows = list(zip(range(1, len(gallery.seeds) + 1), gallery.class_labels, gallery.seeds))
    table = _table(("Image", "Class", "Seed"), rows)
    return (
        f"## Samples\n\n![Generated images]({gallery.image})\n\nRow by row; each image has a generator of its own."
        f"\n\n{table}"
    )


def _method(source: str | None, flags: Mapping[str, Any], base_model: str | None) -> tuple[str, list[str]]:
    """What the weights were trained with: a sentence, and tags beyond the common ones."""
    if source is None:
        return "", LSEP_TAGS
    if source in CONVERTED:
        return CONVERTED[source]
    start, part = ("Trained", "") if base_model is None else ("Fine-tuned", " in the fine-tuning")
    if flags.get("lora_rank"):
        start += f" through LoRA layers of rank {flags['lora_rank']}, which are merged into the weights,"
    aligned = f"tokens are aligned with those of an external encoder, `{flags.get('repa_encoder')}`"
    if flags.get("no_lsep") and flags.get("repa_encoder"):
        return f"{start} with REPA ({REPA_PAPER}), without LSEP's probe: {aligned}.", REPA_TAGS
    if flags.get("no_lsep"):
        return (
            f"{start} as a plain SiT ({SIT_PAPER}): neither LSEP's probe nor an external encoder takes part{part}.",
            SIT_TAGS,
        )
    if flags.get("repa_encoder"):
        return f"{start} with {LSEP} and, beside it, REPA ({REPA_PAPER}): {PROBE}, and {aligned}.", [
            *LSEP_TAGS,
            *REPA_TAGS,
        ]
    return f"{start} with {LSEP}: {PROBE}; no external encoder takes part{part}.", LSEP_TAGS


def _training_section(flags: Mapping[str, Any], dataset: str | None, base_model: str | None) -> str | None:
    lines = []
    if dataset is not None:
        lines.append(f"Trained on [{dataset}](https://huggingface.co/datasets/{dataset}).")
    if base_model is not None:
        link = f"[{base_model}](https://huggingface.co/{base_model})"
        local = f"`{without_folders(base_model)}`, a pipeline in a local folder"
        lines.append(f"Fine-tuned from {local if _is_local(base_model) else link}.")
    if flags:
        unused = ["probe_", "num_probe_weights", "crop_size_min", "coupled_dropout"] if flags.get("no_lsep") else []
        unused += [] if flags.get("repa_encoder") else ["repa_"]
        flags = {
            key: value
            for key, value in flags.items()
            if value is not None and "token" not in key.lower() and not key.startswith(tuple(unused))
        }
        rows = [(f"`{key}`", f"`{value}`") for key, value in sorted(flags.items())]
        lines.append(_table(("Flag", "Value"), rows))
    return "## Training\n\n" + "\n\n".join(lines) if lines else None


def _read_eval_results(path: Path) -> dict[str, Any] | None:
    """
    `eval_results.json`: `{"metrics": {name: number}}`, the hashes of the weights that they are of, `{"weights":
    {component: hash}}`, and beside it whatever describes how they were measured, such as `"dataset"`.
    """
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: float(value) for name, value in results["metrics"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has to be a JSON object with numbers under `metrics`: {error!r}") from error
    return {**without_folders(results), "metrics": metrics}


def _is_local(path: str | None) -> bool:
    return path is not None and (os.path.isabs(path) or os.path.exists(path))


def without_folders(value: Any) -> Any:
    """A value, or all that is in it, with paths on this machine as the names that they end in."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    path, separator, rest = value.partition(" (")  # as in `folder (train)`
    if os.path.exists(path):
        return os.path.basename(os.path.abspath(path)) + separator + rest
    return re.sub(r"(?<![\w:/.])/(?:[^/\s]+/)+", "", value)


def _model_index(results: dict[str, Any], dataset: str | None) -> list[EvalResult]:
    name = str(results.get("dataset") or dataset or "unknown")
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_value=value,
            metric_name=METRIC_NAMES.get(metric, metric),
        )
        for metric, value in results["metrics"].items()
    ]


def _evaluation_section(results: dict[str, Any]) -> str:
    rows = [(METRIC_NAMES.get(name, name), f"{value:.4g}") for name, value in results["metrics"].items()]
    settings = {}
    for key, value in results.items():
        if key not in ("metrics", "weights", "notes"):
            settings |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    settings = {key: value for key, value in settings.items() if value is not None and key != "sampling.weights"}
    text = f"## Evaluation\n\n{_table(('Metric', 'Value'), rows)}\n\n{_label_sampling(results.get('sampling') or {})}"
    if settings:
        text += f"\n\n{_table(('Setting', 'Value'), [(f'`{key}`', f'`{value}`') for key, value in settings.items()])}"
    if results.get("notes"):
        notes = "\n".join(f"- {note}" for note in results["notes"])
        text += f"\n\nTo be kept in mind when these numbers are compared with others:\n\n{notes}"
    return text


def _label_sampling(sampling: Mapping[str, Any]) -> str:
    how = str(sampling.get("label_sampling") or sampling.get("class_labels"))
    if how.startswith("random"):
        return "The classes of the samples were drawn at random, as the papers' protocol has it."
    if how.startswith("balanced"):
        return (
            "The samples are balanced: every class was drawn equally often, which gives a lower FID than classes at"
            " random, the papers' protocol."
        )
    return "How the classes of the samples were chosen is not recorded."
