# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards of saved pipelines, made of what is in the folder and of what the caller knows.

The sections stand between comments. Another comment, the facts, has the hashes of the weights that they are about, and
the metadata as it was generated. What is generated is replaced when a new card is made, and dropped where it is about
other weights; what somebody writes outside of the comments, or changes in the metadata, stays.
"""

import ast
import importlib.metadata
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..files import hash_saved_weights, whole_file
from ..labels import as_markdown
from ..regularizers import REGULARIZERS, regularizer_key
from .gallery import Gallery
from .local_paths import is_local, without_folders
from .saved_pipeline import EVAL_RESULTS_NAME, SavedPipeline


CARD_NAME = "README.md"
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # diffusers' name
TEMPLATE = Path(__file__).with_name("model_card_template.md")  # of Jinja2, which torch brings along
LORA_TEMPLATE = Path(__file__).with_name("lora_card_template.md")

PIPELINE_TAG = "unconditional-image-generation"
TAGS = ["class-conditional", "sit"]

# By the method that the weights were trained with.
METHOD_TAGS = {
    "lsep": ["lsep", "arxiv:2509.21565"],
    "repa": ["arxiv:2410.06940"],
    "lsep+repa": ["lsep", "arxiv:2509.21565", "arxiv:2410.06940"],
    "sit": ["arxiv:2401.08740"],
}

# Checkpoints of the original projects, and the training of this one.
SOURCES = ("lsep", "repa", "sit", "training")

# The metadata that is generated; everything else in a card is somebody's own.
METADATA = (
    *("license", "library_name", "pipeline_tag", "tags", "datasets"),
    *("base_model", "base_model_relation", "model-index"),
)

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


def load_card(path: str | Path, **options) -> Any:
    """A [`ModelCard`]. Raises a `ValueError` if its metadata cannot be read."""
    try:
        return ModelCard.load(path, **options)
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"`folder` has to hold a card with metadata in YAML, but {path}: {error}") from None


def _section_pattern(name: str = r"\w+") -> re.Pattern:
    return re.compile(rf"<!-- diffusers_lsep: ({name}) -->\n\n(.*?)\n\n<!-- /diffusers_lsep -->\n*", flags=re.DOTALL)


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
    text = _FACTS.sub("\n\n", card.text).rstrip()  # what stood around them stays apart
    card.text = f"{text}\n\n<!-- diffusers_lsep facts: {facts} -->\n"
    return card


def is_about_other_weights(card: ModelCard, weights: Mapping[str, str]) -> bool:
    """Whether a card says that it is about other weights than these, by their hashes ([`SavedPipeline`])."""
    before = _read_facts(card).get("weights", {})
    return any(before[name] != weights[name] for name in before.keys() & weights.keys())


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
    training_facts: Sequence[str] = (),
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
            `"training"` by `examples/train_lsep.py`, with a method that is told by `training_args`. The card names no
            method if not given.
        dataset (`str`, *optional*): Id on the Hub of the data set that it was trained on.
        base_model (`str`, *optional*): Id on the Hub, or folder, of the model that it was fine-tuned from.
        training_args (`Mapping[str, Any]`, *optional*): Flags of the training run. Tokens are left out.
        sampling (`Mapping[str, Any]`, *optional*):
            Arguments for calling the pipeline, such as `num_inference_steps` and `guidance_scale`.
        gallery (`Gallery`, *optional*): Images to show.
        training_facts (`Sequence[str]`, defaults to `()`): Sentences about the training: data, length, results.

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
    results = without_folders(pipeline.read_evaluation())
    name = repo_id.split("/")[-1] if repo_id is not None else folder.resolve().name
    flags = without_folders(training_args or {})
    dataset = None if is_local(dataset) else dataset
    method = _method_of(flags) if source == "training" else source
    losses = [REGULARIZERS[key] for key in flags.get("regularizers") or ()]
    arguments = {"class_labels": pipeline.example_labels, "num_inference_steps": 250, **(sampling or {})}

    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        tags=[
            *(TAGS[1:] if pipeline.is_unconditional else TAGS),
            *(METHOD_TAGS[method] if method is not None else []),
            *(f"arxiv:{loss.paper}" for loss in losses),
            *(["flow-map", "arxiv:2510.24474"] if flags.get("flow_map") else []),
        ],
        datasets=[dataset] if dataset is not None else None,
        base_model=None if is_local(base_model) else base_model,
        model_name=name if results else None,
        eval_results=_model_index(results, dataset) if results else None,
    )
    card = _card(
        data,
        pipeline.hashes,
        results,
        pipeline=pipeline,
        name=name,
        source=source,
        method=method,
        losses=losses,
        local_base_model=without_folders(base_model) if is_local(base_model) else None,
        lora_rank=flags.get("lora_rank"),
        repa_encoder=flags.get("repa_encoder"),
        repo_id=repo_id if repo_id is not None else name,
        arguments={key: _literal(value) for key, value in arguments.items()},
        gallery=gallery,
        sampling=sampling or {},
        flags=_flags_to_show(flags),
        training_facts=training_facts,
        classes=_describe_classes(pipeline),
        repository=repository_address(),
    )
    path = folder / CARD_NAME
    if path.exists():
        card = merge_model_cards(_forget(load_card(path), _sections(card)), card)
    return save_card(path, card)


def repository_address() -> str | None:
    """Where this package is developed, if `setup.py` says so."""
    urls = importlib.metadata.metadata("diffusers_lsep").get_all("Project-URL") or []
    return next((url.removeprefix("Repository, ") for url in urls if url.startswith("Repository, ")), None)


def write_lora_card(
    folder: str | os.PathLike,
    base_model: str,
    training_args: Mapping[str, Any],
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """
    Writes the model card of an adapter, `README.md`.

    Args:
        folder (`str` or `os.PathLike`): Holds `pytorch_lora_weights.safetensors`, with its metadata.
        base_model (`str`): Id on the Hub, or folder, of the pipeline that it is for.
        training_args (`Mapping[str, Any]`): Flags of the training run. Tokens are left out.
        repo_id (`str`, *optional*): Where the adapter is going to be on the Hub; the folder itself if not given.
        license (`str`, *optional*): Licence of the layers, as the Hub spells it. None is claimed if not given.

    Returns:
        `Path`: the card.
    """
    folder = Path(folder)
    with safe_open(folder / LORA_WEIGHTS_NAME, framework="np") as file:
        metadata = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    flags = without_folders(training_args)
    dataset = None if is_local(training_args.get("dataset_name")) else training_args.get("dataset_name")
    names = list((metadata.get("pipeline.id2label") or {}).values())
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        tags=["lora", *TAGS, *METHOD_TAGS[_method_of(flags)]],
        datasets=[dataset] if dataset is not None else None,
        base_model=None if is_local(base_model) else base_model,
        base_model_relation=None if is_local(base_model) else "adapter",
    )
    card = ModelCard.from_template(
        data,
        str(LORA_TEMPLATE),
        name=repo_id.split("/")[-1] if repo_id is not None else folder.resolve().name,
        repo_id=repo_id or without_folders(str(folder)),
        base_name=without_folders(base_model),
        metadata=metadata,
        size=(folder / LORA_WEIGHTS_NAME).stat().st_size / 1e6,
        names=names,
        example=_literal(names[0]) if names else 0,
        scale=flags.get("validation_guidance_scale", 1.0),
        flags=_flags_to_show(flags),
        repository=repository_address(),
    )
    # Not of the file, whose metadata have no fixed order.
    facts = {"lora": hash_saved_weights([folder / LORA_WEIGHTS_NAME])}
    return save_card(folder / CARD_NAME, _set_facts(card, facts, data.to_dict()))


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
    old = load_card(path) if path.is_file() else None
    if old is None or is_about_other_weights(old, pipeline.hashes):
        return write_model_card(folder)
    results, data = without_folders(pipeline.read_evaluation()), ModelCardData()
    if results:
        dataset = old.data.datasets[0] if isinstance(old.data.datasets, list) and old.data.datasets else None
        data.model_name = old.data.model_name or folder.resolve().name
        data.eval_results = _model_index(results, dataset)
    new = _card(data, pipeline.hashes, results)
    kept = {*_sections(old)} - {"evaluation"} | {*_sections(new)}
    return save_card(path, merge_model_cards(_forget(old, kept, ["model-index"]), new))


def _card(data: ModelCardData, weights: Mapping[str, str], results: dict[str, Any] | None, **known) -> ModelCard:
    """A card of what is generated: `results`, and beside them what is known of the pipeline, if anything."""
    settings = _evaluation_settings(results) if results else None
    known |= {"results": results, "evaluation_settings": settings, "metric_names": METRIC_NAMES}
    return _set_facts(ModelCard.from_template(data, str(TEMPLATE), **known), weights, data.to_dict())


def _sections(card: ModelCard) -> dict[str, str]:
    """The sections by name, with the comments around them."""
    return {match[1]: match[0].rstrip("\n") + "\n\n" for match in _section_pattern().finditer(card.text)}


def save_card(path: Path, card: ModelCard) -> Path:
    """Writes a card, whole or not at all, and returns its path."""
    with whole_file(path) as partial:
        card.save(partial)
    return path


def _forget(card: ModelCard, kept_sections: Collection[str], metadata: Iterable[str] = METADATA) -> ModelCard:
    """
    A card without what was generated: other sections than these, and metadata under these keys, unless somebody has
    changed it. Sections without facts are of an older version, and all of this metadata counts as generated then.
    """
    card_data: Any = card.data
    data = card_data.to_dict()
    of_older = {key: data[key] for key in METADATA if key in data and _sections(card)}
    generated = _read_facts(card).get("metadata", of_older)
    forgotten = {key: generated[key] for key in metadata if key in generated}
    old = ModelCardData(**forgotten, ignore_metadata_errors=True)
    data = {key: value for key, value in data.items() if key not in forgotten or value != forgotten[key]}
    data["tags"] = [tag for tag in data.get("tags", []) if tag not in (old.tags or [])] or None
    data.pop("model-index", None)
    data["eval_results"] = [r for r in card_data.eval_results or [] if r not in (old.eval_results or [])] or None
    data["model_name"] = card_data.model_name if data["eval_results"] else data.get("model_name")
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
        for name, block in _sections(new).items() if _sections(old) else ():
            pattern = _section_pattern(name)
            if pattern.search(text):
                text = pattern.sub(block.replace("\\", r"\\"), text)
            else:
                text = text.rstrip("\n") + "\n\n" + block

    old_data: Any = old.data
    new_data: Any = new.data
    data = ModelCardData(**{**old_data.to_dict(), **new_data.to_dict()})
    data.tags = list(dict.fromkeys([*(old_data.tags or []), *(new_data.tags or [])])) or None
    if old_data.eval_results and new_data.eval_results:
        kept = [
            result
            for result in old_data.eval_results
            if not any(result.is_equal_except_value(other) for other in new_data.eval_results)
        ]
        data.eval_results = kept + new_data.eval_results
    if data.license is not None:
        text = _section_pattern("license").sub("", text)
    old_metadata, metadata = old_facts.get("metadata", {}), new_facts.get("metadata", {})
    tags = list(dict.fromkeys([*old_metadata.get("tags", ()), *metadata.get("tags", ())]))
    return _set_facts(
        ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"),
        {**old_facts.get("weights", {}), **weights},
        {**old_metadata, **metadata, **({"tags": tags} if tags else {})},
    )


def declare_license(card: ModelCard, license: str):
    """Gives a card a licence that counts as generated: it is dropped with the weights that it is for."""
    facts, data = _read_facts(card), cast(Any, card.data)
    data.license = license
    _set_facts(card, facts.get("weights", {}), {**facts.get("metadata", {}), "license": license})


def point_usage_at(card: ModelCard, repo_id: str):
    """Lets the code in a card load the model or the adapter from `repo_id`, wherever it loaded it from."""

    def point(match: re.Match) -> str:
        call = "load_lora_weights" if "load_lora_weights" in match[0] else r"DiffusionPipeline\.from_pretrained"
        return re.sub(rf'({call}\()"[^"]*"', rf'\1"{repo_id}"', match[0])

    card.text = _section_pattern("usage").sub(point, card.text)


def read_sampling(card: ModelCard) -> dict[str, Any]:
    """
    The arguments of the call in a generated card but for its labels, for `write_model_card`. A `ValueError` if one was
    changed into something else than a literal.
    """
    call = re.findall(r"^    (\w+)=(.+),$", _sections(card).get("usage", ""), flags=re.MULTILINE)
    left_out = ("class_labels", "generator", "output_type")
    try:
        return {name: ast.literal_eval(value) for name, value in call if name not in left_out}
    except SyntaxError as error:
        raise ValueError(f"the call in the model card is no Python: {error}") from None


def _describe_classes(pipeline: SavedPipeline) -> str:
    """How many classes there are, and their names if these are few."""
    count, labels = pipeline.transformer["num_classes"], pipeline.index.get("id2label") or {}
    names = ", ".join(as_markdown(name.split(",")[0]) for name in labels.values()) if len(labels) <= 20 else ""
    return f"{count:,}" + (f": {names}" if names else "")


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (str, list)) else repr(value)


def _method_of(flags: Mapping[str, Any]) -> str:
    """What a run with these flags trained with, one of `METHOD_TAGS`."""
    parts = [] if flags.get("no_lsep") else ["lsep"]
    parts += ["repa"] if flags.get("repa_encoder") else []
    return "+".join(parts) or "sit"


def _flags_to_show(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a run that had an effect, without secrets, sorted."""
    unused = ["probe_", "num_probe_weights", "crop_size_min", "coupled_dropout"] if flags.get("no_lsep") else []
    unused += [] if flags.get("repa_encoder") else ["repa_"]
    unused += [] if flags.get("flow_map") else ["flow_map"]
    unused += [f"{regularizer_key(name)}_" for name in REGULARIZERS if name not in (flags.get("regularizers") or ())]
    return {
        key: value
        for key, value in sorted(flags.items())
        if value not in (None, []) and "token" not in key.lower() and not key.startswith(tuple(unused))
    }


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


def _evaluation_settings(results: Mapping[str, Any]) -> dict[str, Any]:
    """How the metrics were measured, on one level."""
    settings: dict[str, Any] = {}
    for key, value in results.items():
        if key not in ("metrics", "weights", "notes"):
            settings |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in settings.items() if value is not None and key != "sampling.weights"}
