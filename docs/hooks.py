"""What the built site leaves out."""

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Drop the 404 page where the site's address is not given.

    A server shows that page at any path, so that its links must be whole; those of all other pages are relative.
    """
    if not config.site_url:
        config.theme.static_templates -= {"404.html"}
    return config
