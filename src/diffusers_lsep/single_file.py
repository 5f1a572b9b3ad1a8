# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`from_single_file` of the model and the pipeline."""

import os
from typing import Any

from diffusers.loaders import FromOriginalModelMixin, FromSingleFileMixin


class SiTSingleFileMixin(FromOriginalModelMixin):
    """Loads the weights of a [`SiTTransformer2DModel`] from one file."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike | dict[str, Any] | None = None,
        *,
        source: str | None = None,
        weights: str = "ema",
        **kwargs,
    ):
        r"""
        Makes a model of one file of weights, in evaluation mode: a checkpoint of the original LSEP, REPA or SiT code
        (`.pt`, `.safetensors`), of which no code is run, see [`convert_original_checkpoint`]; or a file in diffusers'
        layout (`.safetensors`, and `.gguf` with the `gguf` package). It has to hold exactly the weights of the model.

        Args:
            pretrained_model_link_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A file, a link to one on the Hub (`https://huggingface.co/<repo_id>/blob/main/<file>`), or what such a
                file holds.
            source (`str`, *optional*):
                The project that an original file comes from, `"lsep"`, `"repa"` or `"sit"`, where its content does
                not decide it.
            weights (`str`, defaults to `"ema"`): Which weights of an original checkpoint, `"ema"` or `"model"`.
            kwargs:
                - `config`: folder or Hub id with the model's `config.json`, with `subfolder` (`"transformer"` is found
                  by itself). A file in diffusers' layout needs it where no `config.json` lies beside it; an original
                  file only for the number of heads of a model that is none of `SIT_PRESETS`.
                - `dtype` (or `torch_dtype`, defaults to float32), `device`, `device_map`, `quantization_config`,
                  `low_cpu_mem_usage`, `disable_mmap`, and for what is on the Hub `token`, `revision`,
                  `config_revision`, `cache_dir`, `force_download`, `local_files_only`: as in
                  [`~loaders.FromOriginalModelMixin.from_single_file`].
                - arguments of the model, such as `sample_size` and `num_attention_heads`, which go before its config;
                  `path_type` where an original file does not say it.

        Returns:
            [`SiTTransformer2DModel`]

        Raises:
            `ValueError`: if an argument is none of these, or if the file is not one of such a model.
        """
        from .single_file_loading import load_model

        return load_model(cls, pretrained_model_link_or_path_or_dict, source, weights, **kwargs)[0]


class LSEPSingleFileMixin(FromSingleFileMixin):
    """Makes an [`LSEPPipeline`] of one file."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike | dict[str, Any],
        *,
        source: str | None = None,
        weights: str = "ema",
        **kwargs,
    ):
        r"""
        Makes a pipeline of the file of its transformer's weights, see [`SiTSingleFileMixin.from_single_file`]. What is
        not in the file comes from `config`, or is given.

        Args:
            pretrained_model_link_or_path (`str`, `os.PathLike` or `dict`): The transformer's weights.
            source (`str`, *optional*): The project that the file comes from, where its content does not decide it.
            weights (`str`, defaults to `"ema"`): Which weights of an original checkpoint, `"ema"` or `"model"`.
            kwargs:
                - `config`: folder or Hub id of an [`LSEPPipeline`] with all the rest. Without it there is no VAE
                  unless it is given, the scheduler is [`FlowMatchSDEScheduler`], the path is the file's, that of
                  the pipeline in whose folder `transformer` the file lies, or linear, and the 1,000 classes of an
                  original file are ImageNet's.
                - `vae`, `scheduler`, `id2label` and `path_type` of the pipeline, which go before those of `config`.
                - All others of [`SiTSingleFileMixin.from_single_file`] but `subfolder`, `device` and `device_map`.

        Returns:
            [`LSEPPipeline`]

        Raises:
            `ValueError`: if an argument is none of these, or if the file is not one of such a model.
        """
        from .single_file_loading import load_pipeline

        return load_pipeline(cls, pretrained_model_link_or_path, source, weights, **kwargs)
