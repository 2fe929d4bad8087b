"""API keys: made once, stored as salted hashes, checked in constant time, re-read when their file changes.

One key per line of the keys file, `role:name:salt:sha256`, both in hexadecimal. Knows no HTTP.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from service.errors import ConfigurationError, NotAuthenticated, NotPermitted

Role = Literal["predict", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
CALLS: dict[Role, str] = {"predict": "predict", "admin": "make admin calls"}
KEY_BYTES = 32  # 256 random bits: nothing to guess, so a fast hash is enough and a slow one would only cost requests
SALT_BYTES = 16
PREFIX = "fsk_"  # lets scanners of source code find a key that was committed by mistake
LINE = re.compile(r"(predict|admin):([\w.@-]{1,64}):([0-9a-f]{32}):([0-9a-f]{64})", re.ASCII)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What is kept of a key; the key itself is shown once and never stored."""

    role: Role
    name: str
    salt: bytes
    digest: bytes

    def opens(self, key: str) -> bool:
        """True when `key` is the one that this was made from; takes as long for every wrong key."""
        return hmac.compare_digest(_hash(key, self.salt), self.digest)

    def line(self) -> str:
        """Return this key's line of the keys file."""
        return f"{self.role}:{self.name}:{self.salt.hex()}:{self.digest.hex()}"


def make_key(role: Role, name: str) -> tuple[str, StoredKey]:
    """Return a new random key and what to store of it. Raises ConfigurationError for a name that cannot be stored."""
    key, salt = PREFIX + secrets.token_urlsafe(KEY_BYTES), secrets.token_bytes(SALT_BYTES)
    stored = StoredKey(role, name, salt, _hash(key, salt))
    if LINE.fullmatch(stored.line()) is None:
        raise ConfigurationError(f"key name {name!r}: expected 1 to 64 of letters, digits, _ . @ -")
    return key, stored


def parse_keys(text: str, where: str) -> tuple[StoredKey, ...]:
    """Return the keys of a keys file; empty lines and # comments are skipped. Raises ConfigurationError."""
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (stripped := line.strip()) or stripped.startswith("#"):
            continue
        if (found := LINE.fullmatch(stripped)) is None:  # the line is not shown: it may hold a key in the clear
            raise ConfigurationError(
                f"{where}, line {number}: expected role:name:salt:sha256 as `foldserve keys add` writes it"
            )
        role: Role = "admin" if found[1] == "admin" else "predict"
        keys.append(StoredKey(role, found[2], bytes.fromhex(found[3]), bytes.fromhex(found[4])))
    return tuple(keys)


def read_keys(path: Path) -> tuple[StoredKey, ...]:
    """Return the keys of a file. Raises ConfigurationError when it cannot be read or is not a keys file."""
    try:
        return parse_keys(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigurationError(f"api_keys_file {path}: {reason}; make it with `foldserve keys add`") from None


def write_keys(path: Path, keys: Iterable[StoredKey]) -> None:
    """Replace a keys file as a whole: a new one readable by its owner alone, one that is there with its mode and owner.

    Raises ConfigurationError when it cannot be written, or not with its owner.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            if path.exists():
                _keep_access(file.fileno(), path.stat())
            file.writelines(f"{key.line()}\n" for key in keys)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None


def _keep_access(descriptor: int, found: os.stat_result) -> None:
    """Give an open file the owner and mode that another was found with, so that whoever read that one reads this."""
    own = os.fstat(descriptor)
    if (own.st_uid, own.st_gid) != (found.st_uid, found.st_gid):
        os.fchown(descriptor, found.st_uid, found.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(found.st_mode))


class KeyRing:
    """Which keys may do what. Without a file everybody may predict and nobody may administer."""

    def __init__(self, path: Path | None, *, public_predict: bool = False) -> None:
        """Read the file. Raises ConfigurationError."""
        self._path = path
        self.is_public = path is None or public_predict
        self._seen = self._stamp()
        self._keys = read_keys(path) if path is not None else ()

    def check(self, role: Role, key: str | None) -> None:
        """Return when `key` has the role.

        Raises NotAuthenticated for no key or an unknown one, NotPermitted for one of the other role.
        """
        if role == "predict" and self.is_public:
            return
        keys = self._current()
        if role == "admin" and not any(one.role == "admin" for one in keys):
            raise NotPermitted(
                "admin calls are off: no admin key is set; make one with `foldserve keys add NAME --role admin` "
                "and start the service with --api-keys-file"
            )
        if key is None:
            raise NotAuthenticated("an API key is needed: send Authorization: Bearer KEY, or X-API-Key: KEY")
        roles = {one.role for one in [one for one in keys if one.opens(key)]}  # all are tried, whichever fits
        if not roles:
            raise NotAuthenticated("the API key is not known, or no longer")
        if role not in roles:
            raise NotPermitted(f"the API key may not {CALLS[role]}; it has the role {', '.join(sorted(roles))}")

    def _current(self) -> tuple[StoredKey, ...]:
        """Return the keys, read anew when the file has changed; a file that cannot be read leaves the old ones."""
        if self._path is not None and (stamp := self._stamp()) != self._seen:
            self._seen = stamp
            try:
                self._keys = read_keys(self._path)
                logger.info("%s changed: %d keys", self._path, len(self._keys))
            except ConfigurationError as error:
                logger.error("the old API keys stay in force: %s", error)
        return self._keys

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self._path.stat() if self._path is not None else None
        except OSError:
            found = None
        return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino) if found is not None else ()


def _hash(key: str, salt: bytes) -> bytes:
    return hashlib.sha256(salt + key.encode(errors="surrogateescape")).digest()
