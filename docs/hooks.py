"""What the built site leaves out, and what it must have."""

import importlib
import inspect
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

_REFERENCE = Path(__file__).parent / "reference"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Drop the 404 page where the site's address is not given.

    A server shows that page at any path, so that its links must be whole; those of all other pages are relative.
    """
    if not config.site_url:
        config.theme.static_templates -= {"404.html"}
    return config


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a reference in which a public name of its modules is missing.

    A function that is called as the module it stands in is there by its whole name alone.
    """
    shown = config.plugins["mkdocstrings"].handlers.inventory
    for page in sorted(_REFERENCE.glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
            try:
                room = importlib.import_module(path)
            except ModuleNotFoundError:  # a function
                continue
            for name in getattr(room, "__all__", ()):
                whole = f"{path}.{name}"
                if not (inspect.ismodule(getattr(room, name)) or whole in shown or f"{whole}.{name}" in shown):
                    raise PluginError(
                        f"{page.name} has no {whole}: it needs a docstring or a comment of #:, and a line in members"
                    )
