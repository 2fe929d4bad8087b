"""The `foldserve` command: thin, it loads `service` or `training` only when a subcommand needs them."""

__version__ = "0.1.0"
