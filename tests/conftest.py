# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import os
import tempfile

import pytest
import torch


# The libraries read these when they are imported, and the processes that tests start inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches out to the Hub by accident
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the loopback Hub of the tests speaks plain LFS
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Neither the caches nor accelerate's settings of whoever runs the tests. Removed with the interpreter.
hf_home = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ["HF_HOME"] = hf_home.name


@pytest.fixture
def tiny_transformer():
    """Makes `SiTTransformer2DModel`s with random weights everywhere: fresh ones give zero."""
    from diffusers_lsep import SiTTransformer2DModel

    def make(seed=0, **config):
        defaults = {
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_classes": 10,
        }
        model = SiTTransformer2DModel(**{**defaults, **config})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                offset = 1.0 if "norm_q.weight" in name or "norm_k.weight" in name else 0.0
                parameter.copy_(offset + torch.randn(parameter.shape, generator=generator) * 0.2)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights for Inception in torch-fidelity's layout, with activations of order one throughout."""
    import io

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class WithoutWeights(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    state = WithoutWeights("random", ["2048"], nothing).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("bias"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(state, path)
    return path
