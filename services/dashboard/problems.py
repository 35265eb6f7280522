"""Errors of the API as RFC 9457 problem details (application/problem+json), unknown paths and our own faults included.

A route raises ``ProblemError`` and lists its statuses with ``documented``.
"""

import logging
from http import HTTPStatus
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from rewards.errors import StoreError
from services.dashboard.rate import Rate
from services.store.schema import short_reason

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2

log = logging.getLogger("services.dashboard")

_lines = Rate(burst=10, every_s=1.0)  # each answer says the same, and anybody may ask


class InvalidField(BaseModel):
    """One value of a request that was refused."""

    where: str = Field(description="Place of the value, such as query.limit", examples=["query.limit"])
    message: str = Field(description="What is wrong with it", examples=["Input should be less than or equal to 500"])


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(
        default="about:blank", description="URI of the kind of problem; about:blank: the status says it all"
    )
    title: str = Field(description="Short name of the status", examples=["Not Found"])
    status: int = Field(description="HTTP status", examples=[404])
    detail: str = Field(description="What happened and what to do about it", examples=["no run named sudoku-1"])
    instance: str = Field(description="Path of the request", examples=["/api/v1/runs/sudoku-1"])
    errors: list[InvalidField] = Field(default=[], description="The values that were refused (status 422)")


class ProblemError(Exception):
    """Ends a request with this status and sentence."""

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a route or router that can end with these statuses."""
    return {status: _documentation(status) for status in statuses}


def problem_response(
    status: int,
    detail: str,
    path: str,
    *,
    headers: dict[str, str] | None = None,
    errors: list[InvalidField] | None = None,
) -> JSONResponse:
    """The document as a response."""
    body = Problem(title=_title(status), status=status, detail=detail, instance=path, errors=errors or [])
    headers = {"Cache-Control": "no-store"} | (headers or {})
    return JSONResponse(
        body.model_dump(exclude_defaults=True) | {"type": body.type}, status, media_type=MEDIA_TYPE, headers=headers
    )


def handle_errors(app: FastAPI) -> None:
    """Make every error that ``app`` knows a problem document; the others become one in ``guards``."""
    app.add_exception_handler(ProblemError, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StoreError, _store)
    app.add_exception_handler(sa.exc.SQLAlchemyError, _store)


def _known(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemError)
    return problem_response(error.status, error.detail, request.url.path, headers=error.headers)


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    details = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not done at {request.url.path}",
    }
    detail = details.get(error.status_code, str(error.detail))
    return problem_response(error.status_code, detail, request.url.path, headers=dict(error.headers or {}))


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [
        InvalidField(where=".".join(map(str, item["loc"]))[:200], message=str(item["msg"])[:500])
        for item in error.errors()[:20]
    ]
    detail = "; ".join(f"{item.where}: {item.message}" for item in found)
    return problem_response(422, detail, request.url.path, errors=found)


def _store(request: Request, error: Exception) -> JSONResponse:
    reason = short_reason(error) if isinstance(error, sa.exc.SQLAlchemyError) else str(error)
    if not _lines.wait_s():
        log.warning("store unreadable at %s: %s", request.url.path, reason)
    detail = f"the run store can't be read now ({reason}); try again"
    return problem_response(503, detail, request.url.path, headers={"Retry-After": str(RETRY_AFTER_S)})


def _title(status: int) -> str:
    return HTTPStatus(status).phrase


_DESCRIPTIONS = {
    400: "The Host header names another machine",
    401: "No token, or a wrong one",
    403: "The request comes from a page of another origin",
    404: "There is no such thing",
    409: "It can't be done in the state that things are in",
    413: "The request's body is too large",
    422: "A value of the request was refused",
    429: "Too many requests at once",
    500: "A fault of the dashboard",
    502: "Ray refused",
    503: "The run store can't be read at the moment",
}


def _documentation(status: int) -> dict[str, Any]:
    example = {
        "type": "about:blank",
        "title": _title(status),
        "status": status,
        "detail": _DESCRIPTIONS[status],
        "instance": "/api/v1/runs",
    }
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": _DESCRIPTIONS[status],
        "content": {MEDIA_TYPE: {"schema": schema, "example": example}},
    }
