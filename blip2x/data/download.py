"""Fetching files over http(s) into memory, pictures among them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import requests
from PIL import Image

from blip2x.data.pictures import Crop, decode_picture
from blip2x.errors import UserError

_CHUNK = 1 << 16


@dataclass(frozen=True)
class WebImage:
    """A picture at an address; each `open` fetches it."""

    url: str
    max_pixels: int

    @property
    def name(self) -> str:
        """The address."""
        return self.url

    @property
    def identity(self) -> str:
        """The address, and what size is refused; what is there now is known only by fetching it."""
        return f"{self.url} {self.max_pixels}"

    def open(self, crop: Crop | None = None) -> Image.Image:
        """Fetch and decode to RGB, see `decode_picture`; raises `UserError` if that is impossible."""
        return decode_picture(fetch(self.url), self.name, self.max_pixels, crop)


def is_web_address(text: str) -> bool:
    """Whether `fetch` is for it."""
    return text.lower().startswith(("http://", "https://"))


def fetch(url: str, *, timeout: float = 20, max_bytes: int = 100_000_000) -> bytes:
    """The content of `url`.

    Args:
        url: http:// or https://.
        timeout: seconds for the whole transfer, and for each wait within it.
        max_bytes: larger files are given up as soon as that is known.

    Raises:
        UserError: another scheme, no connection, an HTTP error, too slow, too large, or cut off.
    """
    if not is_web_address(url):
        raise UserError(f"{url} is no web address; it must start with http:// or https://")
    end = time.monotonic() + timeout
    content = bytearray()
    try:
        with requests.get(url, timeout=timeout, stream=True) as answer:
            if not answer.ok:
                raise UserError(f"{url} cannot be fetched: the server answers {answer.status_code} {answer.reason}")
            for chunk in answer.iter_content(_CHUNK):
                content += chunk
                if len(content) > max_bytes:
                    raise UserError(f"{url} is larger than {max_bytes:,} bytes; fetch it yourself and give the file")
                if time.monotonic() > end:
                    raise requests.Timeout
    except requests.Timeout as error:
        raise UserError(f"{url} cannot be fetched: no complete answer within {timeout:g} seconds") from error
    except requests.ConnectionError as error:
        raise UserError(
            f"{url} cannot be fetched: no connection, or it broke off; check the address and your network"
        ) from error
    except requests.RequestException as error:
        raise UserError(f"{url} cannot be fetched: {error}") from error
    return bytes(content)
