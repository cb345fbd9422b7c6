"""What requests say, as FastAPI reads and describes it."""

from __future__ import annotations

from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from blip2x.generation.settings import GenerationSettings

MOST_TEXT = 2000  # characters of a question, an answer, a prompt
MOST_TURNS = 20


class Decoding(BaseModel):
    """Options of ``GenerationSettings``; what is left out is as the server was started with."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    num_beams: int | None = Field(None, description="1: greedy, or sampling where do_sample is true")
    do_sample: bool | None = None
    # the bounds of the four numbers keep powers and quotients finite
    temperature: float | None = Field(None, ge=0.01, le=100)
    top_p: float | None = Field(None, description="sampling: smallest set of tokens with this probability; 1: all")
    top_k: int | None = Field(None, description="sampling: the k likeliest tokens; 0: all")
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    length_penalty: float | None = Field(None, ge=-10, le=10)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    num_return_sequences: int | None = None
    early_stopping: bool | None = None

    def on(self, usual: GenerationSettings) -> GenerationSettings:
        """`usual`, but for what is given."""
        given = self.model_dump(include=set(Decoding.model_fields), exclude_none=True)
        return replace(usual, **given)


class CaptionRequest(Decoding):
    """Describe an image."""

    image: str = Field(description="the id that /api/images gave")
    prompt: str | None = Field(None, max_length=MOST_TEXT, description="what the text goes on from")


class Turn(BaseModel):
    """A question that was answered before."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = Field(min_length=1, max_length=MOST_TEXT)
    answer: str = Field(max_length=MOST_TEXT)


class AskRequest(Decoding):
    """Ask about an image."""

    image: str = Field(description="the id that /api/images gave")
    question: str = Field(min_length=1, max_length=MOST_TEXT)
    history: list[Turn] = Field(
        default=[],
        max_length=MOST_TURNS,
        description="read before the question, oldest first; without the oldest where there is no room for all",
    )
