# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import diffusers
import pytest
from diffusers.hooks import _helpers
from diffusers.loaders import single_file_model
from diffusers.pipelines import pipeline_loading_utils

import diffusers_lsep
from diffusers_lsep.registration import register_with_diffusers, register_with_hooks
from diffusers_lsep.transformer_sit import SiTAttention, SiTAttnProcessor, SiTTransformerBlock


def test_classes_are_attributes_of_diffusers():
    schedulers = (
        "FlowMatchSDEScheduler",
        "FlowMatchSDEMultistepScheduler",
        "FlowMatchHeunODEScheduler",
        "FlowMapScheduler",
    )
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


def test_hooks_know_the_block_and_its_attention():
    """What diffusers' own hooks look up, which `test_caches.py` has them do."""
    metadata = _helpers.TransformerBlockRegistry.get(SiTTransformerBlock)
    assert (metadata.return_hidden_states_index, metadata.return_encoder_hidden_states_index) == (0, None)
    attention = SiTAttention(8, heads=2, dim_head=4)
    assert attention.is_cross_attention is False
    skip = _helpers.AttentionProcessorRegistry.get(SiTAttnProcessor).skip_processor_output_fn
    assert skip(attention, "tokens") == skip(attention, hidden_states="tokens") == "tokens"


def test_registering_with_hooks_fails_loudly_where_diffusers_changed(monkeypatch):
    monkeypatch.delattr(_helpers, "TransformerBlockRegistry")
    message = f"cannot register with the hooks of diffusers {diffusers.__version__}: .*diffusers.hooks._helpers"
    with pytest.raises(ImportError, match=message):
        register_with_hooks(SiTTransformerBlock, SiTAttnProcessor)
