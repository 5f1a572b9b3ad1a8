# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Likelihoods by the ODE, where they are known, and the command."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from image_folders import save_class_folders, save_images
from tiny_models import make_pipeline, make_vae

from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline
from diffusers_lsep.cli import main
from diffusers_lsep.evaluation.likelihood import log_likelihood, measure_likelihood
from diffusers_lsep.interpolants import get_interpolant


MEANS, STD = torch.tensor([[-0.1, 0.1, 0.1, 0.0], [0.1, 0.0, 0.1, 0.1]], dtype=torch.float64), 0.25
MIXING = torch.tensor([[1, 0, 0, 0], [0.5, 0.8, 0, 0], [0.3, -0.4, 0.6, 0], [0, 0.2, 0.7, 0.9]], dtype=torch.float64)
COVARIANCE = STD**2 * MIXING @ MIXING.T


class CorrelatedFlow(ModelMixin, ConfigMixin):
    """The exact velocity of two classes of 2 x 2 pixels, Gaussians whose pixels depend on each other."""

    @register_to_config
    def __init__(self, sample_size=2, in_channels=1, num_classes=2, path_type="linear"):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.path = get_interpolant(path_type)

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        path, t = self.path, float(timestep[0])
        noisy = path.alpha(t) ** 2 * COVARIANCE + path.sigma(t) ** 2 * torch.eye(4, dtype=torch.float64)
        change = path.alpha(t) * path.d_alpha(t) * COVARIANCE
        change = change + path.sigma(t) * path.d_sigma(t) * torch.eye(4, dtype=torch.float64)
        means = MEANS[class_labels]
        centred = hidden_states.flatten(1).double() - path.alpha(t) * means
        velocity = path.d_alpha(t) * means + centred @ torch.linalg.solve(noisy, change)
        return (velocity.view_as(hidden_states).to(hidden_states.dtype),)


def make_gaussians(path_type="linear") -> LSEPPipeline:
    return LSEPPipeline(CorrelatedFlow(path_type=path_type), FlowMatchSDEScheduler(path_type=path_type))


def exact_log_likelihood(images: torch.Tensor, class_id: int) -> torch.Tensor:
    gaussian = torch.distributions.MultivariateNormal(MEANS[class_id], COVARIANCE)
    return gaussian.log_prob(images.flatten(1).double())


def draw_images(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return (MEANS[labels] + STD * noise @ MIXING.T).float().view(-1, 1, 2, 2), labels


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_gaussians_have_their_likelihood(path_type):
    """With the exact trace, to the solver's accuracy, which is of fourth order."""
    images, labels = draw_images(4)
    expected = torch.stack([exact_log_likelihood(images, c)[i] for i, c in enumerate(labels.tolist())])
    pipe = make_gaussians(path_type)
    errors = [(log_likelihood(pipe, images, labels, n) - expected).abs().max().item() for n in (8, 16, 64)]
    assert errors[1] < errors[0] / 10 and errors[2] < 2e-5


def test_hutchinsons_estimate_has_no_bias():
    """The mean over all vectors of signs is the trace; a single one is not."""
    images, labels = draw_images(3)
    pipe = make_gaussians()
    exact = log_likelihood(pipe, images, labels, 4)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).view(16, 1, 1, 2, 2).expand(-1, 3, -1, -1, -1)
    estimates = [log_likelihood(pipe, images, labels, 4, directions) for directions in signs.unsqueeze(1)]
    assert (estimates[0] - exact).abs().min() > 0.01
    torch.testing.assert_close(torch.stack(estimates).mean(dim=0), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_likelihood(pipe, images, labels, 4, signs), exact, rtol=1e-6, atol=1e-6)


class Pixels:
    """Images as a source."""

    kind = "images"

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels.numpy()

    def load(self, rows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        return self.images[rows]


def test_bits_of_pixels_and_classes_by_bayes():
    images, labels = draw_images(120)
    images = ((images + 1) * 127.5).round() / 127.5 - 1  # levels
    pipe, source = make_gaussians(), Pixels(images, labels)
    given = torch.stack([exact_log_likelihood(images, c) for c in (0, 1)], dim=1)
    own = given[torch.arange(120), labels]

    options = {"trace": "exact", "num_steps": 12, "batch_size": 50}
    found = measure_likelihood(pipe, source, labels.numpy(), **options)
    assert found["space"] == "pixels" and found["given"] == "the class" and found["num_images"] == 120
    # The probability of a level is the density times its width, as far as the density is even over it.
    bits = -(own / 4 + math.log(2 / 255)) / math.log(2)
    assert found["bits_per_dim"] == pytest.approx(bits.mean().item(), abs=5e-3)
    assert found["bits_per_dim_standard_error"] == pytest.approx(bits.std().item() / math.sqrt(120), rel=0.05)
    assert found["nats_per_dim"] == pytest.approx(own.mean().item() / 4, abs=5e-3)
    assert 0 < found["solver_error"] < 1e-2

    classified = measure_likelihood(pipe, source, labels.numpy(), classify=True, **options)
    mixture = torch.logsumexp(given, dim=1) - math.log(2)
    assert classified["given"] == "no class" and "num_directions" not in classified
    assert classified["nats_per_dim"] == pytest.approx(mixture.mean().item() / 4, abs=5e-3)
    accuracy = (given.argmax(dim=1) == labels).double().mean().item()
    assert 0.6 < accuracy < 1 and classified["classifier"]["accuracy"] == pytest.approx(accuracy, abs=0.02)
    entropy = torch.nn.functional.cross_entropy(given, labels).item()
    assert classified["classifier"]["cross_entropy"] == pytest.approx(entropy, abs=0.01)
    assert classified["classifier"]["chance"] == 0.5

    # The noise of an image is its own, and the same under every class.
    few = measure_likelihood(pipe, Pixels(images[:3], labels[:3]), labels[:3].numpy(), num_steps=4, batch_size=2)
    again = measure_likelihood(pipe, Pixels(images[:3], labels[:3]), labels[:3].numpy(), num_steps=4, batch_size=3)
    assert few["nats_per_dim"] == pytest.approx(again["nats_per_dim"], rel=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline for 8 x 8 grey pixels, one with a VAE, and images of its classes, in a split of their own."""
    folder = tmp_path_factory.mktemp("likelihood")
    names = {0: "ant", 1: "bee", 2: "cat"}
    make_pipeline(id2label=names, num_classes=3, in_channels=1).save_pretrained(folder / "pixels")
    make_pipeline(id2label=names, num_classes=3, vae=make_vae()).save_pretrained(folder / "latents")
    for split in ("train", "test"):
        save_class_folders(folder / "images" / split, ["bee", "cat"], [(9, 8)] * 4)
    return folder


def read(folder) -> dict:
    return json.loads((folder / "likelihood_results.json").read_text())


def test_models_and_images_without_classes(folders, tmp_path, capsys):
    save_images(tmp_path / "flat", np.zeros((2, 8, 8), np.uint8))
    make_pipeline(id2label={0: "unconditional"}, num_classes=1, in_channels=1).save_pretrained(tmp_path / "none")
    data = ("--data", str(tmp_path / "flat"), "--num_steps", "2", "--num_images", "1")
    for name, flags in ((folders / "pixels", ["--unconditional"]), (tmp_path / "none", [])):
        out = tmp_path / f"out-{name.name}"
        main(["likelihood", str(name), *data, *flags, "--output_dir", str(out)])
        assert read(out)["given"] == "no class" and read(out)["bits_per_dim_standard_error"] is None
        assert "±" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="`--classify` needs a model with classes"):
        main(["likelihood", str(tmp_path / "none"), *data, "--classify", "--output_dir", str(tmp_path / "c")])


@pytest.mark.slow
def test_command(folders, tmp_path, capsys):
    data = ("--data", str(folders / "images"), "--num_steps", "2")
    main(["likelihood", str(folders / "pixels"), *data, "--output_dir", str(tmp_path / "a")])
    found = read(tmp_path / "a")
    assert found["split"] == "test" and found["num_images"] == 4 and found["dimensions"] == 64
    assert found["trace"] == "hutchinson" and found["num_directions"] == 1
    assert f"bits per dim, given the class: {found['bits_per_dim']:.4f}" in capsys.readouterr().out
    options = ("--unconditional", "--num_images", "3", "--num_directions", "2", "--output_dir", str(tmp_path / "b"))
    main(["likelihood", str(folders / "pixels"), *data, *options])
    assert read(tmp_path / "b")["num_images"] == 3 and read(tmp_path / "b")["given"] == "no class"
    assert read(tmp_path / "b")["bits_per_dim"] != found["bits_per_dim"]

    options = ("--classify", "--trace", "exact", "--split", "train", "--overwrite_output_dir")
    main(["likelihood", str(folders / "pixels"), *data, *options, "--output_dir", str(tmp_path / "b")])
    found = read(tmp_path / "b")
    assert found["split"] == "train" and found["classifier"]["chance"] == pytest.approx(1 / 3)
    assert f"taken for their class: {found['classifier']['accuracy']:.4f} (chance 0.3333)" in capsys.readouterr().out

    main(["likelihood", str(folders / "latents"), *data, "--output_dir", str(tmp_path / "c")])
    found = read(tmp_path / "c")
    assert found["space"] == "latents, without what the VAE loses" and found["dimensions"] == 4 * 8 * 8
    assert "bits_per_dim" not in found and "nats per dim, given the class" in capsys.readouterr().out

    # Classes go by their names: the model's numbers are others than those of the data.
    pipe = LSEPPipeline.from_pretrained(folders / "pixels")
    pipe.register_to_config(id2label={0: "bee", 1: "cat", 2: "ant"})
    pipe.save_pretrained(tmp_path / "renamed")
    main(["likelihood", str(tmp_path / "renamed"), *data, "--output_dir", str(tmp_path / "d")])
    assert read(tmp_path / "d")["nats_per_dim"] != read(tmp_path / "a")["nats_per_dim"]


def test_what_is_wrong_is_named(folders, tmp_path):
    def refused(message, *arguments, pipeline=folders / "pixels", data=folders / "images"):
        with pytest.raises(ValueError, match=message):
            main(["likelihood", str(pipeline), "--data", str(data), "--output_dir", str(tmp_path), *arguments])

    refused("`--split` has to name a split of `--data`, one of .*, but is 'valid'", "--split", "valid")
    save_class_folders(tmp_path / "others", ["bee", "dog"], [(9, 8)] * 2)
    refused("`--data`: there is no class 'dog'", data=tmp_path / "others")
    refused("`PIPELINE` .* cannot be loaded", pipeline=tmp_path / "nothing")
    pipe = LSEPPipeline.from_pretrained(folders / "pixels")
    pipe.transformer.proj_out.bias.data.fill_(math.nan)
    pipe.save_pretrained(tmp_path / "damaged")
    refused("no finite numbers: its weights may be damaged", "--num_steps", "2", pipeline=tmp_path / "damaged")
    assert not (tmp_path / "likelihood_results.json").exists()
    (tmp_path / "likelihood_results.json").touch()
    refused("`--output_dir` already holds .*; `--overwrite_output_dir` replaces it")
