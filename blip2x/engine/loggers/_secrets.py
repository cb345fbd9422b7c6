"""What must not leave the machine, taken out of what is sent to a service."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "***"

_NAMES = r"password|passwd|passphrase|secret|api_?key|access_key|private_key|authorization|credentials?"
_TOKEN = r"(?<!(?:bos|eos|pad|unk|sep|cls|dec)_)(?<!mask_)token"  # not a tokenizer's, nor max_new_tokens
_SECRET_NAME = rf"(?:[\w.-]*[_.-])?(?:{_NAMES}|{_TOKEN})"
_SECRET_KEY = re.compile(_SECRET_NAME, re.IGNORECASE)
_SECRET_WORD = re.compile(rf"(?<![\w.-])(\+*{_SECRET_NAME}=)(?!null\b)[^\s,}}\]]+", re.IGNORECASE)  # an override
_SECRET_VALUE = re.compile(rf"(\+*{_SECRET_NAME}=)(?!null$).+", re.IGNORECASE | re.DOTALL)  # one alone, as of task.overrides
_USER = re.compile(r"(\w[\w+.-]*://)(?:[^/\s]*|[^/\s:]+:[^\s'\",]*)@")  # https://user:password@host, with a slash in it, too
_QUERY = re.compile(r"(\w[\w+.-]*://[^\s?#]+\?)[^\s'\",\]}]+")  # https://host/file?signature=...
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|AUTHORIZATION|CREDENTIALS?)(_ID)?$", re.IGNORECASE)
_SHORTEST = 8  # characters of an environment variable's value that is looked for: "1" and "true" are no secrets


class Secrets:
    """Hides credentials: by their key, in URLs, and whatever a variable of the environment with a telling name holds.

    A path in the user's home starts with ~ afterwards: the name of the account is nobody's business, and the path says as much.

    Args:
        environment: None: this process's.
        home: of the user; None: of who runs this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, home: str | None = None):
        values = {
            value
            for name, value in (os.environ if environment is None else environment).items()
            if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST
        }
        self._values = sorted(values, key=len, reverse=True)
        home = os.path.expanduser("~") if home is None else home
        self._home = re.compile(rf"(?:(?<=://)|(?<![\w.~/-])){re.escape(home)}(?=/|$|\W)") if Path(home) != Path("/") else None

    def text(self, value: str) -> str:
        """`value` without any."""
        for secret in self._values:
            value = value.replace(secret, HIDDEN)
        value = _SECRET_WORD.sub(rf"\1{HIDDEN}", _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", value)))
        return self._home.sub("~", value) if self._home else value

    def clean(self, value: Any, *, is_secret: bool = False) -> Any:
        """A config or a part of one, without any; `is_secret` is what stands below a secret's key, at whatever depth."""
        if isinstance(value, dict):
            return {
                key: self.clean(inner, is_secret=is_secret or _SECRET_KEY.fullmatch(str(key)) is not None)
                for key, inner in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.clean(inner, is_secret=is_secret) for inner in value]
        if is_secret:
            return value if value is None or isinstance(value, bool) else HIDDEN
        if isinstance(value, str):
            override = _SECRET_VALUE.fullmatch(value)
            return f"{override[1]}{HIDDEN}" if override else self.text(value)
        return value
