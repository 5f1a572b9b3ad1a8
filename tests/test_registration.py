# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import diffusers
import pytest
from diffusers.hooks import _helpers
from diffusers.loaders import single_file_model
from diffusers.pipelines import pipeline_loading_utils
from tiny_models import make_pipeline

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


def test_other_names_are_those_of_diffusers():
    assert not hasattr(diffusers, "LSEPObjective")
    with pytest.raises(AttributeError, match="module diffusers has no attribute SiTTransformer"):
        _ = diffusers.SiTTransformer


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import diffusers_lsep; from diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline; import diffusers_lsep",
        # who only asks for it does not use the registration up
        "import diffusers_lsep, importlib.util; importlib.util.find_spec('diffusers');"
        " from diffusers.pipelines.pipeline_utils import DiffusionPipeline",
        # diffusers is imported in the middle of one of our modules
        "import diffusers_lsep.transformer_sit; from diffusers import DiffusionPipeline",
    ],
    ids=["before", "after", "asked", "within"],
)
def test_registered_whoever_imports_diffusers(tmp_path, imports):
    make_pipeline().save_pretrained(tmp_path)
    code = (
        f"{imports}\nimport pickle, sys\npipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})\n"
        "import diffusers, diffusers_lsep\n"
        "assert type(pipe) is diffusers.LSEPPipeline is diffusers_lsep.LSEPPipeline\n"
        "assert pickle.loads(pickle.dumps(type(pipe.transformer))) is diffusers.SiTTransformer2DModel\n"
        "assert not [finder for finder in sys.meta_path if 'diffusers_lsep' in type(finder).__module__]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_importing_diffusers_fails_each_time_where_it_changed():
    code = (
        "import diffusers_lsep, sys, types\n"
        "sys.modules['diffusers.pipelines.pipeline_loading_utils'] = types.ModuleType('changed')\n"
        "for _ in range(2):\n"
        "    try: import diffusers\n"
        "    except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.count("cannot register with diffusers") == 2, result.stdout


@pytest.mark.parametrize("moved", [None, {}, {"diffusers": {"ModelMixin": []}}])
def test_registering_fails_loudly_where_diffusers_changed(monkeypatch, moved):
    monkeypatch.setattr(pipeline_loading_utils, "LOADABLE_CLASSES", moved)
    with pytest.raises(
        ImportError, match=f"cannot register with diffusers {diffusers.__version__}: .*LOADABLE_CLASSES"
    ):
        register_with_diffusers({})


@pytest.mark.parametrize("moved", [None, {}, {"SD3Transformer2DModel": {"another_fn": None}}])
def test_registering_fails_loudly_where_single_files_changed(monkeypatch, moved):
    monkeypatch.setattr(single_file_model, "SINGLE_FILE_LOADABLE_CLASSES", moved)
    with pytest.raises(ImportError, match="cannot register with diffusers .*SINGLE_FILE_LOADABLE_CLASSES"):
        register_with_diffusers({})


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
