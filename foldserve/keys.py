"""`foldserve keys`: make, list and remove API keys. A key is shown once, when it is made; its file holds a hash."""

import argparse
import sys
from pathlib import Path

from service.errors import ConfigurationError, FoldserveError
from service.security import ROLES, StoredKey, make_key, read_keys, write_keys


class NoSuchKey(FoldserveError):
    """The keys file has no key of that name."""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser("keys", help="make and remove API keys", description="Make and remove API keys.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a key and print it, once", description="Make a key and print it, once.")
    add.add_argument("--role", choices=ROLES, default="predict", help="what the key may do [predict]")
    remove = actions.add_parser("remove", help="remove a key; running services notice", description="Remove a key.")
    show = actions.add_parser("list", help="list names and roles", description="List names and roles.")
    for action, run in ((add, _add), (remove, _remove), (show, _list)):
        if action is not show:
            action.add_argument("name", metavar="NAME", help="whose key it is: letters, digits, _ . @ -")
        action.add_argument(
            "--api-keys-file", type=Path, metavar="FILE", help="file of hashed keys [FOLDSERVE_API_KEYS_FILE]"
        )
        action.set_defaults(run=run)


def _add(arguments: argparse.Namespace) -> int:
    path = _file(arguments)
    keys = read_keys(path) if path.exists() else ()
    if any(one.name == arguments.name for one in keys):
        raise ConfigurationError(
            f"{path} has a key named {arguments.name}; choose another name or remove that one first"
        )
    key, stored = make_key(arguments.role, arguments.name)
    write_keys(path, [*keys, stored])
    print(key)
    print(f"added to {path}; the key is shown this once", file=sys.stderr)
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    path = _file(arguments)
    keys = read_keys(path)
    kept: list[StoredKey] = [one for one in keys if one.name != arguments.name]
    if len(kept) == len(keys):
        raise NoSuchKey(f"{path} has no key named {arguments.name}; see `foldserve keys list`")
    write_keys(path, kept)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    for one in read_keys(_file(arguments)):
        print(f"{one.role:8} {one.name}")
    return 0


def _file(arguments: argparse.Namespace) -> Path:
    from service.config import Settings

    path: Path | None = arguments.api_keys_file or Settings.load().api_keys_file
    if path is None:
        raise ConfigurationError("which file? give --api-keys-file FILE or set FOLDSERVE_API_KEYS_FILE")
    return path
