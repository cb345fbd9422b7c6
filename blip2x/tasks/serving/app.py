"""The page and the JSON API. All that is here runs in the server's thread; the model is asked through `Jobs`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

import blip2x
from blip2x.config.tools import ServeConfig
from blip2x.data.pictures import decode_picture
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.pages import render_page
from blip2x.tasks.common.conversation import conversation_prompt
from blip2x.tasks.serving.asked import MOST_TEXT, MOST_TURNS, AskRequest, CaptionRequest, Decoding
from blip2x.tasks.serving.guard import MOST_JSON, Guard, page_policy
from blip2x.tasks.serving.images import Encoded, KeptImages
from blip2x.tasks.serving.jobs import Abandoned, Full, Job, Jobs
from blip2x.tasks.serving.server import is_this_machine

PAGE = Path(__file__).with_name("page.html.jinja")
_CLOSE = {"Connection": "close"}
_RETRY_AFTER = {"Retry-After": "2"}  # seconds; most texts take less

T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """A text, its score (see `GenerationOutput`), and how many tokens it has, its end not counted."""

    text: str
    score: float
    tokens: int


class ServedModel(Protocol):
    """What the API asks of a model, in the working thread; while it works it calls `Jobs.look`."""

    answers: bool  # whether it can be asked questions

    def encode(self, picture: Image.Image) -> tuple[Any, int]:
        """An RGB picture's queries, and their memory in bytes."""

    def fits(self, prompt: str, settings: GenerationSettings) -> bool:
        """Whether the prompt leaves room for what is to be written behind it."""

    def write(self, queries: Any, prompt: str, settings: GenerationSettings) -> list[Written]:
        """Texts behind the prompt, best first; raises `UserError` where the prompt leaves no room for them."""


def build_app(cfg: ServeConfig, model: ServedModel, jobs: Jobs, *, name: str, checkpoint: str, max_pixels: int) -> ASGIApp:
    """The application.

    Args:
        cfg: decoding, prompts, limits; the host that it is bound to.
        model: called in the thread that calls ``jobs.work``.
        jobs: its queue.
        name: of the model, as shown.
        checkpoint: where it comes from, as shown.
        max_pixels: larger pictures are refused.
    """
    app = FastAPI(title="blip2x", version=blip2x.__version__, docs_url=None, redoc_url=None)  # both pages load from elsewhere
    kept = KeptImages(cfg.max_images, cfg.max_images_mb * 1e6)
    captions = GenerationSettings.from_config(cfg)
    answers = answer_settings(cfg)
    info = {
        "model": name,
        "checkpoint": checkpoint,
        "stage": cfg.stage,
        "answers": model.answers,
        "prompts": {"caption": cfg.prompt, "question": cfg.question_prompt if model.answers else None},
        "decoding": {"caption": asdict(captions), "answer": asdict(answers) if model.answers else None},
        "limits": {
            "upload_mb": cfg.max_upload_mb,
            "pixels": max_pixels,
            "new_tokens": cfg.limit_new_tokens,
            "prompt_tokens": cfg.limit_prompt_tokens,
            "beams": cfg.limit_beams,
            "text_characters": MOST_TEXT,
            "turns": MOST_TURNS,
            "json_bytes": MOST_JSON,
            "queue": cfg.max_queue,
            "seconds": cfg.max_seconds,
            "images": cfg.max_images,
            "images_mb": cfg.max_images_mb,
        },
    }
    page = render_page(PAGE, {}, info=info, version=blip2x.__version__)
    _tell_errors(app)

    def settings_of(asked: Decoding, usual: GenerationSettings) -> GenerationSettings:
        settings = asked.on(usual)
        for option, limit in (
            ("max_new_tokens", "limit_new_tokens"),
            ("num_beams", "limit_beams"),
            ("num_return_sequences", "limit_beams"),
        ):
            if getattr(settings, option) > getattr(cfg, limit):
                raise UserError(
                    f"{option}={getattr(settings, option)} is more than this server allows: task.{limit}={getattr(cfg, limit)}"
                )
        return settings

    def image_of(key: str) -> Encoded:
        image = kept.get(key)
        if image is None:
            raise HTTPException(404, "this image is not kept, or not any longer; send it again")
        return image

    async def write(
        request: Request, key: str, settings: GenerationSettings, make_prompt: Callable[[], tuple[str, int]]
    ) -> dict[str, Any]:
        """What is answered behind the prompt of `make_prompt`, which also says how many earlier turns stand in it."""
        image, deadline = image_of(key), time.monotonic() + cfg.max_seconds

        def work() -> tuple[str, int, list[Written]]:
            prompt, earlier = make_prompt()  # here, too: long texts take the tokenizer a while
            return prompt, earlier, model.write(image.queries, prompt, settings)

        with jobs.place():
            (prompt, earlier, texts), seconds = await _done(request, jobs, work, deadline, cfg)
        written = {"text": texts[0].text, "texts": [asdict(text) for text in texts]}
        return {"image": key, "prompt": prompt, "earlier": earlier, **written, "seconds": seconds}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> str:
        return page

    @app.get("/api/health")
    async def health() -> dict[str, Any]:
        """That the server answers, and how busy it is."""
        return {"status": "ok", "requests": jobs.taken, "places": jobs.places, "images": len(kept)}

    @app.get("/api/info")
    async def tell() -> dict[str, Any]:
        """The model, what decoding is like where a request does not say, and the limits."""
        return info

    body = {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}, "required": True}

    @app.post("/api/images", status_code=201, openapi_extra={"requestBody": body})
    async def add_image(request: Request, name: str = Query("upload", max_length=200)) -> dict[str, Any]:
        """Encode the picture that is the request's body; `name` is what error sentences call it."""
        if not request.headers.get("content-type", "").startswith("image/"):
            raise HTTPException(415, "send the picture itself as the body, with a Content-Type of image/*, e.g. image/png")
        deadline = time.monotonic() + cfg.max_seconds
        with jobs.place():
            data = await _within(_read(request, int(cfg.max_upload_mb * 1e6), cfg), cfg.max_seconds)
            # decoded there, too: two at a time would take twice the memory
            encoded, seconds = await _done(request, jobs, lambda: _encode(model, data, name, max_pixels), deadline, cfg)
        return {"id": kept.add(encoded), "width": encoded.width, "height": encoded.height, "seconds": seconds}

    @app.post("/api/caption")
    async def caption(request: Request, asked: CaptionRequest) -> dict[str, Any]:
        """Describe an image; `text` is the best of `texts`."""
        if asked.prompt and not model.answers:
            raise UserError("this model is of stage 1, whose Q-Former takes no prompt; leave it out")
        prompt = cfg.prompt if asked.prompt is None else asked.prompt
        return await write(request, asked.image, settings_of(asked, captions), lambda: (prompt.strip(), 0))

    @app.post("/api/ask")
    async def ask(request: Request, asked: AskRequest) -> dict[str, Any]:
        """Answer a question about an image; `text` is the best of `texts`, `earlier` how many turns of `history` were read."""
        if not model.answers:
            raise UserError("this model is of stage 1, which describes images and answers no questions; serve one of stage 2")
        if not asked.question.strip():
            raise UserError("the question is empty")
        settings, turns = settings_of(asked, answers), [(turn.question.strip(), turn.answer.strip()) for turn in asked.history]

        def prompt() -> tuple[str, int]:
            fits = partial(model.fits, settings=settings)
            return conversation_prompt(cfg.question_prompt, asked.question.strip(), turns, fits)

        return await write(request, asked.image, settings, prompt)

    return Guard(app, only_this_machine=is_this_machine(cfg.host), policy=page_policy(page))


def answer_settings(cfg: ServeConfig) -> GenerationSettings:
    """How answers are decoded: as captions, but for their length. Errors as `GenerationSettings`."""
    usual = GenerationSettings.from_config(cfg)
    least = min(usual.min_new_tokens, cfg.answer_max_new_tokens)
    return replace(
        usual, max_new_tokens=cfg.answer_max_new_tokens, min_new_tokens=least, length_penalty=cfg.answer_length_penalty
    )


def _encode(model: ServedModel, data: bytes, name: str, max_pixels: int) -> Encoded:
    picture = decode_picture(data, name, max_pixels)
    queries, memory = model.encode(picture)
    return Encoded(queries, memory, *picture.size)


async def _read(request: Request, most: int, cfg: ServeConfig) -> bytes:
    """The body, of at most `most` bytes."""
    size, chunks = 0, []
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
        elif size > 2 * most:  # until there what is too much is read, as most clients listen only when they have sent all
            break
    if size > most:
        sentence = f"the picture has more than {cfg.max_upload_mb:g} MB (task.max_upload_mb); scale it down"
        raise HTTPException(413, sentence, _CLOSE if size > 2 * most else None)
    return b"".join(chunks)


async def _within(what: Awaitable[T], seconds: float) -> T:
    try:
        return await asyncio.wait_for(what, seconds)
    except asyncio.TimeoutError:  # which Python 3.10 does not call TimeoutError
        raise HTTPException(408, f"the picture did not arrive within {seconds:g} seconds (task.max_seconds)") from None


async def _done(
    request: Request, jobs: Jobs, work: Callable[[], T], deadline: float, cfg: ServeConfig
) -> tuple[T, dict[str, float]]:
    """What `work` gives, and the seconds that it waited and took; ended where the client goes away or the time is over."""
    started: list[float] = []

    def timed() -> T:
        started.append(time.monotonic())
        return work()

    submitted = time.monotonic()
    job: Job = jobs.submit(timed)
    answer, gone = asyncio.wrap_future(job.future), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, timeout=max(0.0, deadline - submitted), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            waited, worked = started[0] - submitted if started else 0.0, time.monotonic() - (started or [submitted])[0]
            return answer.result(), {"waited": round(waited, 3), "worked": round(worked, 3)}
        if gone.done():
            raise ClientDisconnect
        raise HTTPException(
            503, f"this took more than {cfg.max_seconds:g} seconds (task.max_seconds); ask for less, or try again", _RETRY_AFTER
        )
    finally:
        jobs.abandon(job)
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        answer.cancel()  # that what it still raises is nobody's


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _tell_errors(app: FastAPI) -> None:
    """Every error is {"error": a sentence}."""

    def answer(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": sentence}, status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> Response:
        return answer(error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        if first["type"] == "json_invalid" or not where:
            return answer(422, "the body has to be a JSON object, with Content-Type: application/json")
        return answer(422, f"{where}: {first['msg']}")

    @app.exception_handler(UserError)
    async def wrong(_: Request, error: UserError) -> Response:
        return answer(422, str(error))

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> Response:
        return answer(503, "as many requests as the server takes are waiting (task.max_queue); try again soon", _RETRY_AFTER)

    @app.exception_handler(Abandoned)
    async def stopping(_: Request, error: Abandoned) -> Response:
        return answer(503, "the server is about to stop", _RETRY_AFTER)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # to nobody

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return answer(500, "the server failed; its terminal says why", _CLOSE)  # uvicorn prints the traceback, and closes
