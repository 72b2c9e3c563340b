"""Encryption of arguments and results at rest.

Owns the sealed form: AES-256-GCM with the task's id and name as associated data, so that a payload moved to another row
does not open. Keys rotate: the newest seals, all of them open. A key is 32 bytes in URL-safe base64, as
`Fernet.generate_key()` makes them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

from .errors import TaskflowError

PREFIX = "sealed:1:"
"""How a sealed text starts; stored JSON never does."""
NONCE_BYTES = 12


class Cipher(Protocol):
    def seal(self, text: str, task_id: str, name: str) -> str: ...

    def open(self, text: str, task_id: str, name: str) -> str:
        """Raises ValueError when the text was sealed for another task, with an unknown key, or was changed."""


class PlainText:
    """No key: texts are stored as they are. What an earlier key sealed cannot be read."""

    def seal(self, text: str, task_id: str, name: str) -> str:
        return text

    def open(self, text: str, task_id: str, name: str) -> str:
        if is_sealed(text):
            raise ValueError("it is encrypted and this process has no key (encrypt_args_key)")
        return text


class AesCipher:
    def __init__(self, keys: Sequence[bytes]) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._keys = {fingerprint(key): AESGCM(key) for key in keys}
        self._newest = fingerprint(keys[0])

    def seal(self, text: str, task_id: str, name: str) -> str:
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._keys[self._newest].encrypt(nonce, text.encode(), associated(task_id, name))
        return f"{PREFIX}{self._newest}:{base64.b64encode(nonce + sealed).decode()}"

    def open(self, text: str, task_id: str, name: str) -> str:
        from cryptography.exceptions import InvalidTag

        if not is_sealed(text):
            return text  # stored before encryption was switched on
        key, _, payload = text.removeprefix(PREFIX).partition(":")
        if key not in self._keys:
            raise ValueError("it was encrypted with a key that this process does not have")
        try:
            data = base64.b64decode(payload, validate=True)
            return self._keys[key].decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], associated(task_id, name)).decode()
        except (InvalidTag, binascii.Error, ValueError) as error:
            raise ValueError("it was not encrypted for this task, or was changed since") from error


def make_cipher(keys: str | bytes | Sequence[str | bytes] | None) -> Cipher:
    """Raises TaskflowError, without showing it, for a key that is not 32 bytes in URL-safe base64."""
    if keys is None:
        return PlainText()
    listed = [keys] if isinstance(keys, str | bytes) else list(keys)
    if not listed:
        raise TaskflowError("encrypt_args_key: an empty list; give one key or more, newest first")
    return AesCipher([raw_key(key) for key in listed])


def raw_key(key: str | bytes) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(key)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 32:
        raise TaskflowError(
            "encrypt_args_key: a key must be 32 bytes in URL-safe base64; make one with "
            "`python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'`"
        )
    return raw


def is_sealed(text: str) -> bool:
    return text.startswith(PREFIX)


def fingerprint(key: bytes) -> str:
    """Names a key without giving it away."""
    return hashlib.sha256(key).hexdigest()[:8]


def associated(task_id: str, name: str) -> bytes:
    return f"{task_id}\0{name}".encode()
