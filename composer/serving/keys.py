"""API keys: made once, shown once, kept as hashes."""

import hashlib
import hmac
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from composer.artefacts import write_text
from composer.errors import ServeError
from composer.value import Value

PREFIX = "mc-"


class ApiKey(Value):
    """What is kept of a key."""

    name: str
    sha256: str
    """Of the whole key. Keys are 256 random bits, which no table of hashes and no slow hash is needed against."""
    created: str


class Keyring(Value):
    """The keys that open an endpoint."""

    keys: tuple[ApiKey, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Keyring":
        """Return the keys of a file; none if there is no file.

        Raises:
            ServeError: if the file is not one of keys.
        """
        if not path.exists():
            return cls()
        try:
            return cls.load(path)
        except ValueError:
            raise ServeError(
                f"{path} is no file of API keys; move it away and make keys with 'model-composer keys'"
            ) from None

    def opens(self, key: str) -> str | None:
        """Return the name of the key that this is, or None; all are compared, each in constant time."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        found = [one.name for one in self.keys if hmac.compare_digest(one.sha256, digest)]
        return found[0] if found else None


class KeyFile:
    """A file of keys, which is read again when it changes: a key that is removed opens nothing any more."""

    def __init__(self, path: Path) -> None:
        """Read the keys.

        Raises:
            ServeError: if the file is not one of keys.
        """
        self.path = path
        self.own = PREFIX + secrets.token_urlsafe(32)
        """Opens the endpoint to the process that serves it, as long as it does."""
        self._stamp = self._changed()
        self.ring = Keyring.read(path)

    def opens(self, key: str) -> str | None:
        """Return the name of the key that this is, or None."""
        if hmac.compare_digest(key.encode("utf-8", "surrogateescape"), self.own.encode()):
            return "the endpoint's own"
        stamp = self._changed()
        if stamp != self._stamp:
            self.ring, self._stamp = Keyring.read(self.path), stamp
        return self.ring.opens(key)

    def _changed(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_mtime_ns, found.st_ino


def make_key(path: Path, name: str) -> str:
    """Add a key to a file and return it; it cannot be shown again.

    Raises:
        ServeError: if there is one of that name.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    with FileLock(_lock(path)):
        ring = Keyring.read(path)
        if any(one.name == name for one in ring.keys):
            raise ServeError(f"there is a key named '{name}' in {path}; choose another name, or remove it first")
        digest = hashlib.sha256(key.encode()).hexdigest()
        made = ApiKey(name=name, sha256=digest, created=datetime.now(UTC).isoformat(timespec="seconds"))
        _write(path, Keyring(keys=(*ring.keys, made)))
    return key


def remove_key(path: Path, name: str) -> None:
    """Remove a key from a file.

    Raises:
        ServeError: if there is none of that name.
    """
    with FileLock(_lock(path)):
        ring = Keyring.read(path)
        left = tuple(one for one in ring.keys if one.name != name)
        if len(left) == len(ring.keys):
            known = ", ".join(one.name for one in ring.keys) or "none"
            raise ServeError(f"there is no key named '{name}' in {path}; there are: {known}")
        _write(path, Keyring(keys=left))


def _lock(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_suffix(".lock")


def _write(path: Path, ring: Keyring) -> None:
    write_text(path, json.dumps(ring.model_dump(mode="json"), indent=2) + "\n")
    path.chmod(0o600)
