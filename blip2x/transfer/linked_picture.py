"""One picture from the server of a stranger: fetched within limits, checked, made smaller where that is wanted."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageOps

ToRgb = Callable[[Image.Image, str], Image.Image]

WAITS = (1, 4, 16)  # seconds before another attempt
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}  # Pillow's names -> endings
_CHUNK = 1 << 16
# Some servers refuse what names itself a script. Pictures are compressed already
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; blip2x)", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Limits:
    """Of one picture, and of all."""

    connections: int  # at a time
    timeout: float  # seconds, for a whole picture
    attempts: int  # in one run
    max_bytes: int
    max_pixels: int
    max_side: int | None  # larger ones are made smaller, as JPEG; None: they stay as they are
    retry_failed: bool  # ask again for what an earlier run could not fetch, or what has been removed since


class FetchFailed(Exception):
    """Why a picture cannot be had."""

    def __init__(self, reason: str, *, passing: bool = False, network: bool = False, local: bool = False):
        super().__init__(reason)
        self.passing = passing  # another attempt may help
        self.network = network  # it may be this machine that has no connection
        self.local = local  # maybe no server was asked at all


class PictureFetcher:
    """Fetches pictures, from several threads at a time.

    Args:
        limits: of sizes, time and attempts.
        to_rgb: for pictures that are made smaller: (opened picture, its address) -> RGB.
    """

    def __init__(self, limits: Limits, to_rgb: ToRgb):
        self._limits, self._to_rgb = limits, to_rgb
        self._local = threading.local()

    def fetch(self, url: str) -> tuple[str, bytes]:
        """As `checked`, of what is served there; raises `FetchFailed`."""
        for attempt in range(self._limits.attempts):
            try:
                return self.checked(self._download(url), url)
            except FetchFailed as failure:
                if not failure.passing or attempt + 1 == self._limits.attempts:
                    raise
            time.sleep(WAITS[min(attempt, len(WAITS) - 1)])
        raise AssertionError("there is at least one attempt")

    def _download(self, url: str) -> bytes:
        import requests
        from urllib3.exceptions import HTTPError, TimeoutError

        from blip2x.transfer import strangers

        if not hasattr(self._local, "session"):
            self._local.session = strangers.session()
        content = bytearray()
        try:
            end = time.monotonic() + self._limits.timeout
            with strangers.ask(self._local.session, url, end, _HEADERS) as answer:
                if not answer.ok:
                    busy = answer.status_code in (408, 429) or answer.status_code >= 500
                    raise FetchFailed(f"HTTP {answer.status_code}", passing=busy)
                while chunk := answer.raw.read1(_CHUNK):
                    content += chunk
                    if len(content) > self._limits.max_bytes:
                        raise FetchFailed(f"more than {self._limits.max_bytes:,} bytes")
        except strangers.NotPublicError as error:
            raise FetchFailed(
                "an address of this machine's own network", network=True
            ) from error  # a hotel's page to log in, maybe
        except requests.exceptions.ConnectTimeout as error:
            raise FetchFailed("no connection", passing=True, network=True) from error
        except (requests.Timeout, TimeoutError) as error:
            raise FetchFailed("too slow", passing=True) from error
        except HTTPError as error:
            raise FetchFailed("broke off", passing=True) from error
        except requests.ConnectionError as error:
            raise FetchFailed("no connection", passing=True, network=True) from error
        except (requests.RequestException, UnicodeError, ValueError) as error:  # addresses that are none, endless redirects
            raise FetchFailed(f"no answer that is one ({type(error).__name__})", local=True) from error
        return bytes(content)

    def checked(self, content: bytes, url: str) -> tuple[str, bytes]:
        """The ending for a picture's name, and what to store of `content`; raises `FetchFailed` where that is no picture."""
        try:
            with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as picture:
                # MPO is what phones make: a JPEG that has others, of depth or another view, behind it
                ending = FORMATS["JPEG" if picture.format == "MPO" else picture.format]
                width, height = picture.size
                if width * height > self._limits.max_pixels:
                    raise FetchFailed("too many pixels")
                if self._limits.max_side is not None and max(width, height) > self._limits.max_side:
                    return "jpg", _smaller(picture, self._limits.max_side, self._to_rgb, url)
                picture.load()  # what was cut off has a whole header
        except Image.DecompressionBombError:
            raise FetchFailed("too many pixels") from None
        except FetchFailed:
            raise
        except Exception as error:  # of Pillow's readers, which raise all sorts on what is broken
            raise FetchFailed("no picture that can be read") from error
        return ending, content


def _smaller(picture: Image.Image, side: int, to_rgb: ToRgb, url: str) -> bytes:
    picture.draft("RGB", (side, side))
    picture = to_rgb(ImageOps.exif_transpose(picture), url)  # the new file says nothing of how it is to be turned
    picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=95)
    return out.getvalue()
