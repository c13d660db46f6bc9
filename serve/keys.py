"""Who asks, how often, and whose turn it is: API keys, a rate for each, fair shares of the places in work."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from gtl.config.names import check_name
from gtl.types import UserError
from serve.errors import rate_limited, unauthorized

log = logging.getLogger(__name__)

Clock = Callable[[], float]
"""Seconds that only grow."""

BURSTS = 6
"""A key may send at once what it may send in a sixth of a minute."""
FULL_AGAIN = 1000
"""From this many buckets on those that are full again are dropped."""

_LINE = re.compile(r"(\S+)\s+([0-9a-fA-F]{64})")
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)


def new_key(name: str) -> tuple[str, str]:
    """A key for somebody of this name, and the line of the file that lets it in. The key itself is kept nowhere.

    Raises:
        UserError: the name is malformed.
    """
    key = f"gtl-{secrets.token_urlsafe(32)}"
    return key, f"{check_name(name)} {hash_key(key)}"


def hash_key(key: str) -> str:
    """What the file holds of a key. Keys are 32 random bytes, so that a plain hash is as good as a slow one."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str, where: str) -> dict[str, str]:
    """{hash: name} of a file of lines `NAME SHA256`; a name may have several keys, `#` begins a comment.

    Raises:
        UserError: a line is none, a key is given twice, or there is none at all.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        place = f"{where}:{number}"
        if not (match := _LINE.fullmatch(line)):
            # What stands there may be a key itself, so that it is not shown.
            raise UserError(f"{place}: expected NAME and the SHA-256 of a key in 64 hexadecimal digits")
        name, digest = check_name(match[1], place), match[2].lower()
        if digest in found:
            raise UserError(f"{place}: {name}: the key of {found[digest]} once more")
        found[digest] = name
    if not found:
        raise UserError(f"{where}: holds no key; expected lines of NAME and the SHA-256 of a key")
    return found


class KeyFile:
    """The keys of a file, which is read again when it changes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the file.

        Raises:
            UserError: it cannot be read, or a line is wrong.
        """
        self._path = Path(path)
        self._stamp = self._stamp_of_file()  # before the text: a change in between is then seen next time
        self._names = self._read()

    def _read(self) -> dict[str, str]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"keys {self._path}: cannot be read: {error}") from error
        return parse_keys(text, f"keys {self._path}")

    def _stamp_of_file(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _refresh(self) -> None:
        """Follow the file. While it is missing or wrong the keys that it had last go on to hold."""
        stamp = self._stamp_of_file()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._names = self._read()
        except UserError as error:
            log.error("the keys that were read before go on to hold: %s", error)

    def check(self, authorization: str | None) -> str:
        """The name of who sends this header `Authorization`.

        Raises:
            ApiError: 401; there is no key in it, or none that is known.
        """
        self._refresh()
        if not authorization:
            raise unauthorized("no API key; send it as the header Authorization: Bearer KEY")
        if not (match := _BEARER.fullmatch(authorization.strip())):
            raise unauthorized("Authorization: expected Bearer KEY")
        found, sent = None, hash_key(match[1])
        for digest, name in self._names.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, sent):
                found = name
        if found is None:
            raise unauthorized("this API key is not known")
        return found


class RateLimiter:
    """A token bucket for each key: `burst` requests at once, `per_minute` over time.

    Each ingress has its own and lets pass an equal share, so that all of them together stay below what is allowed. A
    key that comes to one of them alone gets no more than the share. All of it runs in one thread.
    """

    def __init__(self, per_minute: float, burst: int, clock: Clock = time.monotonic, ingresses: int = 1) -> None:
        """`per_minute` > 0 and `burst` >= 1, of one of so many ingresses."""
        assert per_minute > 0 and burst >= 1 and ingresses >= 1
        self.per_minute, self.burst, self.ingresses = per_minute, burst, ingresses
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Key -> tokens, and when it had them."""

    def admit(self, key: str) -> None:
        """Count one request.

        Raises:
            ApiError: 429 with Retry-After; there were too many.
        """
        if wait := self.take(key):
            raise rate_limited(wait, self.per_minute, self.ingresses)

    def take(self, key: str) -> float:
        """Count one request and return 0, or count none and return the seconds until there is one to be had."""
        now, rate = self._clock(), self.per_minute / 60
        tokens, since = self._buckets.get(key, (float(self.burst), now))
        tokens = min(self.burst, tokens + (now - since) * rate)
        if tokens < 1 - 1e-9:
            return (1 - tokens) / rate
        self._buckets[key] = max(0.0, tokens - 1), now
        if len(self._buckets) > FULL_AGAIN:
            self._drop_full(now, rate)
        return 0.0

    def _drop_full(self, now: float, rate: float) -> None:
        full = [k for k, (tokens, since) in self._buckets.items() if tokens + (now - since) * rate >= self.burst]
        for key in full:
            del self._buckets[key]


def share_out(per_minute: float | None, ingresses: int) -> RateLimiter | None:
    """For one of so many ingresses; None where a key may ask as often as it likes."""
    if per_minute is None:
        return None
    share = per_minute / ingresses
    return RateLimiter(share, max(1, round(share / BURSTS)), ingresses=ingresses)
