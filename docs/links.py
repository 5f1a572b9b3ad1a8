# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: links from the pages to files of the repository that are no pages."""

import importlib.metadata
import os
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError


ROOT = Path(__file__).resolve().parents[1]


def on_config(config):
    """The address of the repository, if setup.py has it."""
    urls = importlib.metadata.metadata("diffusers_lsep").get_all("Project-URL") or []
    config.repo_url = next((url.removeprefix("Repository, ") for url in urls if url.startswith("Repository, ")), None)


def on_page_markdown(markdown, page, config, files):
    """Links that leave docs/ lead to the repository; without an address of it, their text stays."""

    def replace(match):
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        where = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), path))
        if target.startswith(("http", "#", "mailto:")) or where.startswith("docs/"):
            return match[0]
        if not os.path.exists(ROOT / where):
            raise PluginError(f"{page.file.src_uri} links to {target}, which is not in the repository")
        return (
            f"[{text}]({config.repo_url}/blob/main/{where}{'#' * bool(anchor)}{anchor})" if config.repo_url else text
        )

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", replace, markdown)
