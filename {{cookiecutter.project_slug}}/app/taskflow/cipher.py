"""Encryption of arguments and results at rest.

Owns the sealed form: AES-256-GCM with the task's id, its name and the column as associated data, so that a payload
moved to another place does not open. Keys rotate: the newest seals, all of them open. A key is 32 bytes in URL-safe
base64, as `Fernet.generate_key()` makes them. With a key, a text that is not sealed is refused: whoever can write into
the database could otherwise choose what a task is called with.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple, Protocol

from .errors import TaskDefinitionError

PREFIX = "sealed:2:"
"""How a sealed text starts; stored JSON never does."""
FIRST_FORM = "sealed:1:"
"""How one starts that is not bound to its column: it still opens."""
NONCE_BYTES = 12


class Place(NamedTuple):
    """Where a text is stored: sealed for it, it opens nowhere else."""

    task_id: str
    name: str
    column: Literal["arguments", "result"]
    created_at: datetime
    """Of the task. It binds nothing; it tells whether the text may be older than the key."""


class Cipher(Protocol):
    def seal(self, text: str, place: Place) -> str: ...

    def open(self, text: str, place: Place) -> str:
        """Raises ValueError when the text was sealed for another place, with an unknown key, or was changed, and when
        it should have been sealed."""


class PlainText:
    """No key: texts are stored as they are. What an earlier key sealed cannot be read."""

    def seal(self, text: str, place: Place) -> str:
        return text

    def open(self, text: str, place: Place) -> str:
        if is_sealed(text):
            raise ValueError("it is encrypted and this process has no key (encrypt_args_key)")
        return text


class AesCipher:
    def __init__(self, keys: Sequence[bytes], since: datetime | None) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._keys = {fingerprint(key): AESGCM(key) for key in keys}
        self._newest = fingerprint(keys[0])
        self._since = since

    def seal(self, text: str, place: Place) -> str:
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._keys[self._newest].encrypt(nonce, text.encode(), associated(PREFIX, place))
        return f"{PREFIX}{self._newest}:{base64.b64encode(nonce + sealed).decode()}"

    def open(self, text: str, place: Place) -> str:
        from cryptography.exceptions import InvalidTag

        if not is_sealed(text):
            if self._since is not None and place.created_at < self._since:
                return text  # stored before encryption was switched on
            raise ValueError(
                "it is not encrypted and not older than encrypted_since: somebody else may have written it"
            )
        form, rest = text[: len(PREFIX)], text[len(PREFIX) :]
        key, _, payload = rest.partition(":")
        if key not in self._keys:
            raise ValueError("it was encrypted with a key that this process does not have")
        try:
            data = base64.b64decode(payload, validate=True)
            return self._keys[key].decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], associated(form, place)).decode()
        except (InvalidTag, binascii.Error, ValueError) as error:
            raise ValueError("it was not encrypted for this task, or was changed since") from error


def make_cipher(keys: str | bytes | Sequence[str | bytes] | None, since: datetime | None = None) -> Cipher:
    """What is not sealed is read only of tasks that were added before `since`. Raises TaskDefinitionError, without
    showing it, for a key that is not 32 bytes in URL-safe base64, and for a time without a zone."""
    if since is not None and (not isinstance(since, datetime) or since.utcoffset() is None):
        raise TaskDefinitionError(f"encrypted_since={since!r}: needs a time zone")
    if keys is None:
        return PlainText()
    listed: Sequence[Any] = list(keys) if isinstance(keys, list | tuple) else [keys]
    if not listed:
        raise TaskDefinitionError("encrypt_args_key: an empty list; give one key or more, newest first")
    return AesCipher([raw_key(key) for key in listed], since)


def raw_key(key: str | bytes) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(key)
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != 32:
        raise TaskDefinitionError(
            "encrypt_args_key: a key must be 32 bytes in URL-safe base64; make one with "
            "`python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'`"
        )
    return raw


def is_sealed(text: str) -> bool:
    return text.startswith((PREFIX, FIRST_FORM))


def fingerprint(key: bytes) -> str:
    """Names a key without giving it away."""
    return hashlib.sha256(key).hexdigest()[:8]


def associated(form: str, place: Place) -> bytes:
    column = "" if form == FIRST_FORM else f"\0{place.column}"
    return f"{place.task_id}\0{place.name}{column}".encode()
