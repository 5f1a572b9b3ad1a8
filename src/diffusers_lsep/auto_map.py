# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What `AutoModel` of diffusers reads in the configs of a repository that brings its code along."""

from typing import Any


class AutoMapMixin:
    """
    For classes whose config may have an `auto_map`: it tells diffusers where the class is, and is no argument of it.
    diffusers would warn of it, and keep it where the config is saved without the code.
    """

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]
