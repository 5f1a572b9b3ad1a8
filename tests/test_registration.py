# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import diffusers
import pytest
from diffusers.loaders import single_file_model
from diffusers.pipelines import pipeline_loading_utils

import diffusers_lsep
from diffusers_lsep.registration import register_with_diffusers


def test_classes_are_attributes_of_diffusers():
    schedulers = ("FlowMatchSDEScheduler", "FlowMatchSDEMultistepScheduler", "FlowMatchHeunODEScheduler")
    for name in ("SiTTransformer2DModel", *schedulers, "LSEPPipeline"):
        assert getattr(diffusers, name) is getattr(diffusers_lsep, name)


def test_the_library_is_loadable_and_exposes_the_base_classes():
    entry = pipeline_loading_utils.LOADABLE_CLASSES["diffusers_lsep"]
    for name in entry:
        assert getattr(diffusers_lsep, name) is getattr(diffusers, name)
    assert set(entry) == {"ModelMixin", "SchedulerMixin"}


@pytest.mark.parametrize("moved", [None, {}, {"diffusers": {"ModelMixin": []}}])
def test_registering_fails_loudly_where_diffusers_changed(monkeypatch, moved):
    monkeypatch.setattr(pipeline_loading_utils, "LOADABLE_CLASSES", moved)
    with pytest.raises(
        ImportError, match=f"cannot register with diffusers {diffusers.__version__}: .*LOADABLE_CLASSES"
    ):
        register_with_diffusers()


@pytest.mark.parametrize("moved", [None, {}, {"SD3Transformer2DModel": {"another_fn": None}}])
def test_registering_fails_loudly_where_single_files_changed(monkeypatch, moved):
    monkeypatch.setattr(single_file_model, "SINGLE_FILE_LOADABLE_CLASSES", moved)
    with pytest.raises(ImportError, match="cannot register with diffusers .*SINGLE_FILE_LOADABLE_CLASSES"):
        register_with_diffusers()
