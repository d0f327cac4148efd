"""What operators send: pauses, and rate limits of sources."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sheratan_hub.web.forms import Form, Moment, Name, Text

Most = Annotated[int, Meta(ge=0, le=1_000_000)]


class PauseForm(Form, frozen=True):
    """Stop leasing jobs of a kind, or of all, until a time or for so long."""

    kind: Name | None = None
    seconds: Annotated[float, Meta(gt=0, le=31_536_000)] | None = None
    until: Moment | None = None
    reason: Text | None = None


class ResumeForm(Form, frozen=True):
    """End the pause of a kind, or every pause."""

    kind: Name | None = None


class RateForm(Form, frozen=True):
    """What a source may do; 0 is without that limit."""

    per_minute: Most = 10
    concurrent: Most = 5
