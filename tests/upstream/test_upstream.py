# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
diffusers' own tests of models, schedulers and pipelines, run on ours. They are in its repository, not in the wheel:

    PYTHONPATH=/path/to/diffusers pytest tests/upstream

The checkout gives the tests only, the `diffusers` under test stays the installed one. Skipped where there is no
checkout; what these tests check is also covered by the other files of `tests/`.

A test that does not apply is set to None, with its reason.
"""

import functools
import importlib.util
import sys
import unittest
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import AutoencoderKL
from original_checkpoints import original_weights
from torch import nn

from diffusers_lsep import (
    SIT_PRESETS,
    FlowMapScheduler,
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
    LinearProbe,
    LSEPPipeline,
    SiTTransformer2DModel,
)


def import_tests_of_checkout():
    """
    Imports the package `tests` of a diffusers checkout as `diffusers_tests`: under its own name it would meet ours.
    Its modules import each other by relative names, so they do not notice.
    """
    for folder in sys.path:
        package = Path(folder, "tests", "__init__.py")
        if package.is_file() and Path(folder, "src", "diffusers").is_dir():
            spec = importlib.util.spec_from_file_location("diffusers_tests", package)
            sys.modules["diffusers_tests"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["diffusers_tests"])
            return
    pytest.skip("needs a checkout of diffusers: PYTHONPATH=/path/to/diffusers", allow_module_level=True)


import_tests_of_checkout()
with warnings.catch_warnings():
    # Tests of an older checkout use what newer diffusers deprecates, and declare their marks in a conftest of theirs.
    warnings.simplefilter("ignore")
    from diffusers_tests.models import testing_utils as model_tests
    from diffusers_tests.pipelines import test_pipelines_common as unittest_pipeline_tests
    from diffusers_tests.pipelines import testing_utils as pipeline_tests
    from diffusers_tests.schedulers import test_schedulers as scheduler_tests
    from diffusers_tests.testing_utils import torch_device

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # as in diffusers' own conftest
needs_accelerators = pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
needs_accelerator = pytest.mark.skipif(torch_device == "cpu", reason="needs an accelerator")


@pytest.fixture(autouse=True, scope="module")
def weights_that_matter():
    """A fresh model gives zero whatever its input, which would hide most of what the tests look for."""
    initialize_weights = SiTTransformer2DModel.initialize_weights

    def initialize_all_weights(model):
        initialize_weights(model)
        for block in model.transformer_blocks:
            nn.init.normal_(block.norm1.linear.weight, std=0.5)
        nn.init.normal_(model.norm_out.linear.weight, std=0.5)
        nn.init.normal_(model.proj_out.weight, std=0.5)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(SiTTransformer2DModel, "initialize_weights", initialize_all_weights)
        yield


@pytest.fixture(autouse=True)
def no_streams_on_cpu(monkeypatch):
    """The tests of group offloading ask for CUDA streams throughout. Without them they run on a CPU as well."""
    if torch_device == "cpu":
        enable_group_offload = SiTTransformer2DModel.enable_group_offload

        def enable_without_streams(model, *args, use_stream=False, record_stream=False, **kwargs):
            return enable_group_offload(model, *args, **kwargs)

        monkeypatch.setattr(SiTTransformer2DModel, "enable_group_offload", enable_without_streams)


ACCELERATOR = ("hardware accelerator", "accelerator+", "CUDA")


def on_any_device(mixin, needless=ACCELERATOR):
    """
    A copy of one of diffusers' mixins, and of what it is made of, without the marks that skip its tests where there is
    no accelerator (or whatever is `needless`, by a part of the reasons): most of them pass on a CPU too.
    """
    if torch_device != "cpu" or mixin is object:
        return mixin
    namespace = {name: value for name, value in vars(mixin).items() if name not in ("__dict__", "__weakref__")}
    for name, value in namespace.items():
        if name.startswith("test_") and hasattr(value, "pytestmark"):
            namespace[name] = functools.wraps(value)(lambda *args, test=value, **kwargs: test(*args, **kwargs))
            namespace[name].pytestmark = [mark for mark in value.pytestmark if not is_one_of(mark, needless)]
    if "pytestmark" in namespace:
        namespace["pytestmark"] = [mark for mark in namespace["pytestmark"] if not is_one_of(mark, needless)]
    copy = type(mixin.__name__, tuple(on_any_device(base, needless) for base in mixin.__bases__), {})
    for name, value in namespace.items():
        setattr(copy, name, value)
    return copy


def is_one_of(mark, reasons):
    return mark.name == "skipif" and any(reason in (mark.kwargs.get("reason") or "") for reason in reasons)


# Models


class ModelConfig(model_tests.BaseModelTesterConfig):
    model_class = SiTTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = (4, 8, 8)

    def get_init_dict(self):
        return {
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_classes": 10,
            "qk_norm": True,
        }

    def get_dummy_inputs(self, batch_size=2):
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.tensor([0.25, 0.75]),
            "class_labels": torch.tensor([3, 10]),
        }
        return {name: value[:batch_size].to(torch_device) for name, value in inputs.items()}


class TestModel(ModelConfig, on_any_device(model_tests.ModelTesterMixin)):
    # No part of the model has to stay in float32.
    test_keep_in_fp32_modules = None
    test_keep_in_fp32_modules_as_str = None
    test_keep_in_fp32_modules_layerwise_casting = None
    test_to_keep_in_fp32_modules_warns = None
    if torch_device == "cpu":
        test_model_parallelism = None  # needs two accelerators


class TestAttention(ModelConfig, model_tests.AttentionTesterMixin):
    pass


class TestAttentionBackends(ModelConfig, model_tests.AttentionBackendTesterMixin):
    pass


class TestFirstBlockCache(ModelConfig, model_tests.FirstBlockCacheTesterMixin):
    pass


class TestTaylorSeerCache(ModelConfig, model_tests.TaylorSeerCacheTesterMixin):
    pass


class TestMagCache(ModelConfig, model_tests.MagCacheTesterMixin):
    pass


class TestPyramidAttentionBroadcast(ModelConfig, model_tests.PyramidAttentionBroadcastTesterMixin):
    pass


class TestFasterCache(ModelConfig, model_tests.FasterCacheTesterMixin):
    pass


class SavedModelConfig(ModelConfig):
    """For the tests that load a model from the Hub or, as here, from a folder."""

    @pytest.fixture(autouse=True, scope="class")
    def saved_model(self, request, weights_that_matter, tmp_path_factory):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("model")
        self.model_class(**self.get_init_dict()).save_pretrained(folder)
        request.cls.pretrained_model_name_or_path = str(folder)


class TestQuanto(SavedModelConfig, on_any_device(model_tests.QuantoTesterMixin)):
    test_quanto_device_map = None  # fails in diffusers, which looks for a module named None
    test_quanto_dequantize = None  # which diffusers has not implemented for quanto
    test_quanto_modules_to_not_convert = None  # compares sizes that do not count quanto's weights
    if torch_device == "cpu":
        test_quanto_quantization_memory_footprint = None  # asks the accelerator for the memory in use

    @pytest.mark.parametrize("weight_type_name", ["float8", "int8"])  # the others compile an extension, for minutes
    def test_quanto_quantization_inference(self, weight_type_name):
        super().test_quanto_quantization_inference(weight_type_name)


class TestTorchAo(SavedModelConfig, on_any_device(model_tests.TorchAoTesterMixin)):
    modules_to_not_convert_for_test = ["proj_out"]
    if torch_device == "cpu":
        test_torchao_cpu_disk_offload_device_map = None  # quantizes what is on the accelerator

    def get_dummy_inputs(self, batch_size=2):  # in the dtype that diffusers loads such models in
        inputs = super().get_dummy_inputs(batch_size)
        return {**inputs, "hidden_states": inputs["hidden_states"].to(torch.bfloat16)}


@needs_accelerators
class TestContextParallel(ModelConfig, model_tests.ContextParallelTesterMixin):
    """Two processes on a CPU: `tests/test_parallelism.py`."""


@needs_accelerators
class TestTensorParallel(ModelConfig, model_tests.TensorParallelTesterMixin):
    pass


class TestSingleFile(SavedModelConfig, on_any_device(model_tests.SingleFileTesterMixin, ("auth token", "nightly"))):
    """An original checkpoint of a model whose heads follow from its width; theirs are on the Hub."""

    pretrained_model_kwargs: ClassVar = {}

    def get_init_dict(self):
        return {**SIT_PRESETS["SiT-S/8"], "num_classes": 10}

    def get_dummy_single_file_state_dict(self):  # with values, as weights without any are refused
        model = self.model_class.from_pretrained(self.pretrained_model_name_or_path)
        return original_weights(model, LinearProbe(model.inner_dim, 10))

    @property
    def ckpt_path(self):
        path = Path(self.pretrained_model_name_or_path, "original.pt")
        torch.save(self.get_dummy_single_file_state_dict(), path)
        return str(path)


class TestTraining(ModelConfig, model_tests.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"SiTTransformer2DModel"})


@needs_accelerator
class TestCPUOffload(ModelConfig, model_tests.CPUOffloadTesterMixin):
    pass


class TestGroupOffload(ModelConfig, on_any_device(model_tests.GroupOffloadTesterMixin)):
    pass


class TestLayerwiseCasting(ModelConfig, on_any_device(model_tests.LayerwiseCastingTesterMixin)):
    pass


class TestLora(ModelConfig, model_tests.LoraTesterMixin):
    pass


class TestLoraHotSwapping(ModelConfig, on_any_device(model_tests.LoraHotSwappingForModelTesterMixin)):
    pass


class TestCompile(ModelConfig, on_any_device(model_tests.TorchCompileTesterMixin)):
    test_compile_on_different_shapes = None  # a model has one size, that of its position table


# Schedulers


class TestSDEScheduler(scheduler_tests.SchedulerCommonTest):
    scheduler_classes = (FlowMatchSDEScheduler,)
    forward_default_kwargs = (("num_inference_steps", 10),)
    test_trained_betas = None  # flow matching has no betas

    def get_scheduler_config(self, **kwargs):
        return {"num_train_timesteps": 1000, **kwargs}

    def test_forms(self):
        for path_type in ("linear", "cosine"):
            for diffusion_form in ("constant", "sigma", "linear", "decreasing", "increasing-decreasing"):
                self.check_over_configs(time_step=None, path_type=path_type, diffusion_form=diffusion_form)
        for last_step in ("mean", "tweedie", "euler"):
            self.check_over_configs(time_step=None, last_step=last_step)


class TestSDEMultistepScheduler(TestSDEScheduler):
    scheduler_classes = (FlowMatchSDEMultistepScheduler,)


class TestEulerScheduler(TestSDEScheduler):
    test_forms = None  # those of the SDE
    test_compatibles = None  # one of them, FlowMatchSDEMultistepScheduler, refuses the ODE

    def get_scheduler_config(self, **kwargs):
        return {"num_train_timesteps": 1000, "diffusion_form": "none", **kwargs}


class TestHeunODEScheduler(TestSDEScheduler):
    scheduler_classes = (FlowMatchHeunODEScheduler,)
    test_forms = None


class TestFlowMapScheduler(TestSDEScheduler):
    scheduler_classes = (FlowMapScheduler,)

    def test_forms(self):
        for renoising in (0.0, 0.5, 1.0):
            self.check_over_configs(time_step=None, renoising=renoising)


class TestFlowMap(TestModel):
    def get_init_dict(self):
        return {**super().get_init_dict(), "flow_map_depth": 1}

    def get_dummy_inputs(self, *args, **kwargs):
        return {**super().get_dummy_inputs(*args, **kwargs), "r_timestep": 0.25}


# Pipelines


def tiny_vae(latent_channels):
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
    )


class PipelineConfig(pipeline_tests.BasePipelineTesterConfig):
    pipeline_class = LSEPPipeline
    required_input_params_in_call_signature = frozenset({"class_labels", "guidance_scale", "guidance_interval"})
    batch_input_params = frozenset({"class_labels"})
    # One image per class label: a class is repeated in the list.
    optional_input_params = pipeline_tests.BasePipelineTesterConfig.optional_input_params - {"num_images_per_prompt"}
    output_shape = (3, 16, 16)

    # Three channels are images without the VAE, an optional component.
    def get_dummy_components(self, channels=3, num_layers=2):
        torch.manual_seed(0)
        sizes = {"in_channels": channels, "num_layers": num_layers}
        transformer = SiTTransformer2DModel(**{**ModelConfig().get_init_dict(), **sizes})
        others = {"scheduler": FlowMatchSDEScheduler(), "vae": tiny_vae(channels), "guidance_transformer": None}
        return {"transformer": transformer, **others}

    def get_dummy_inputs(self):
        return {
            "class_labels": 3,
            "guidance_scale": 1.5,
            "num_inference_steps": 3,
            "generator": self.get_generator(),
            "output_type": "pt",
        }


class TestPipeline(PipelineConfig, on_any_device(pipeline_tests.PipelineTesterMixin)):
    test_num_images_per_prompt = None  # no such argument, see above
    test_encode_prompt_works_in_isolation = None  # no text


class TestPixelPipeline(TestPipeline):
    output_shape = (3, 8, 8)

    def get_dummy_components(self):
        return {**super().get_dummy_components(), "vae": None}


@needs_accelerator
class TestPipelineOffload(PipelineConfig, pipeline_tests.PipelineOffloadTesterMixin):
    pass


class TestPipelineGroupOffload(PipelineConfig, on_any_device(pipeline_tests.GroupOffloadTesterMixin)):
    pass


class TestPipelineLayerwiseCasting(PipelineConfig, pipeline_tests.LayerwiseCastingTesterMixin):
    pass


class TestPipelineFirstBlockCache(PipelineConfig, pipeline_tests.FirstBlockCacheTesterMixin):
    pass


class TestPipelineTaylorSeerCache(PipelineConfig, pipeline_tests.TaylorSeerCacheTesterMixin):
    pass


class TestPipelineMagCache(PipelineConfig, pipeline_tests.MagCacheTesterMixin):
    pass


class TestPipelinePyramidAttentionBroadcast(PipelineConfig, pipeline_tests.PyramidAttentionBroadcastTesterMixin):
    pass


class TestPipelineFasterCache(PipelineConfig, pipeline_tests.FasterCacheTesterMixin):
    pass


class TestPipelineLora(PipelineConfig, pipeline_tests.LoraTesterMixin):
    pass


class TestUnittestPipeline(
    unittest_pipeline_tests.PipelineLatentTesterMixin, unittest_pipeline_tests.PipelineTesterMixin, unittest.TestCase
):
    """The older generation of the same tests; those of output types and of other VAEs are there only."""

    pipeline_class = LSEPPipeline
    params = PipelineConfig.required_input_params_in_call_signature
    batch_params = PipelineConfig.batch_input_params
    required_optional_params = PipelineConfig.optional_input_params
    image_params = image_latents_params = frozenset()
    test_layerwise_casting = True
    test_group_offloading = True
    test_save_load_optional_components = None  # four channels, as those of the other VAEs, are no images without one

    def get_dummy_components(self):
        return PipelineConfig().get_dummy_components(channels=4)

    def get_dummy_inputs(self, device, seed=0):
        return {**PipelineConfig().get_dummy_inputs(), "generator": self.get_generator(seed), "output_type": "np"}
