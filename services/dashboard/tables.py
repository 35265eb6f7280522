"""How routes read a request's parameters: those that nobody knows are refused, and what is a table comes as CSV too."""

import csv
import io
import json
import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import Depends, Query, Request, Response, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from services.dashboard.about import flat

MEDIA_TYPE = "text/csv"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def _require_known(request: Request) -> None:
    route = request.scope["route"]
    known = {each.alias for each in get_flat_params(route.dependant) if isinstance(each.field_info, params.Query)}
    unknown = sorted({name for name in request.query_params if name not in known})
    if unknown:
        told = f"there is no such parameter; this route has {', '.join(sorted(known)) or 'none'}"
        raise RequestValidationError([{"loc": ("query", name[:100]), "msg": told} for name in unknown])


def _format(
    format: Annotated[
        Literal["json", "csv"] | None, Query(description="csv: a table; without it, as the header Accept says")
    ] = None,
) -> None:
    """Read from the request by ``Table``; here for the description and the check."""


_REQUIRE_KNOWN, _FORMAT = Depends(_require_known), Depends(_format)


class Strict(APIRoute):
    """Ends a request with a parameter that the route doesn't have with 422."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **how: Any) -> None:
        given = [each for each in how.pop("dependencies", None) or [] if each is not _REQUIRE_KNOWN]
        super().__init__(path, endpoint, dependencies=[*given, _REQUIRE_KNOWN], **how)  # last: the token comes first


class Table(Strict):
    """The answer's rows as CSV for ``?format=csv`` or ``Accept: text/csv``."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **how: Any) -> None:
        given = [each for each in how.pop("dependencies", None) or [] if each is not _FORMAT]
        schema = {"schema": {"type": "string"}, "example": "id,status\r\nsudoku-1,finished\r\n"}
        responses = {200: {"content": {MEDIA_TYPE: schema}}} | (how.pop("responses", None) or {})
        super().__init__(path, endpoint, dependencies=[*given, _FORMAT], responses=responses, **how)

    def get_route_handler(self) -> Handler:
        """FastAPI's, and then the table."""
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            response = await answer(request)
            if response.status_code != 200 or not _wants_csv(request):
                return response
            name = re.sub(r"[^\w.-]+", "_", unquote(request.url.path).partition("/runs/")[2], flags=re.ASCII) or "runs"
            headers = {"Content-Disposition": f'attachment; filename="{name}.csv"', "Vary": "Accept"}
            text = to_csv(rows_of(json.loads(bytes(response.body))))
            return Response(text, media_type=MEDIA_TYPE, headers=headers)

        return handle


def rows_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an answer of the API: a list's items, the points of series, the settings of a configuration; of any
    other it is one row."""
    if "series" in answer:
        return [
            {"run": answer["run_id"], "metric": name, **dict(zip(columns, point, strict=True))}
            for name, columns in answer["series"].items()
            for point in zip(*columns.values(), strict=True)
        ]
    if "config" in answer:
        return [{"key": key, "value": value} for key, value in flat(answer["config"]).items()]
    return [flat(item) for item in answer.get("items", [answer])]


def to_csv(rows: Iterable[dict[str, Any]]) -> str:
    """With a line of names: all that some row has, in the order of appearance. Lists are JSON."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return json.dumps(value)
    return json.dumps(value) if isinstance(value, list | dict) else value


def _wants_csv(request: Request) -> bool:
    asked = request.query_params.get("format")
    if asked is not None:
        return asked == "csv"
    accepted = request.headers.get("accept", "")
    return MEDIA_TYPE in accepted and "application/json" not in accepted
