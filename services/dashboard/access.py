"""The run of a request, and the reader of its store."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Request

from services.dashboard.problems import ProblemError
from services.store.catalog import Catalog
from services.store.reader import Reader

RunId = Annotated[str, Path(min_length=1, max_length=200, description="Name of the run", examples=["sudoku-1"])]


@dataclass(frozen=True)
class RunAccess:
    """A run that exists, and the reader of the store that holds it."""

    id: str
    reader: Reader


def access(catalog: Catalog, run_id: str) -> RunAccess:
    """Raises ProblemError (404) for a run that isn't listed, StoreError (503) for one whose store can't be read.

    The name is only ever compared with those that the catalog lists: it never becomes part of a path.
    """
    try:
        return RunAccess(run_id, catalog.reader(run_id))
    except KeyError:
        raise ProblemError(404, f"no run named {run_id!r} here") from None


def _of_request(request: Request, run_id: RunId) -> RunAccess:
    return access(request.app.state.catalog, run_id)


RunOfPath = Annotated[RunAccess, Depends(_of_request)]
"""Parameter of a route with ``{run_id}`` in its path: ends the request with 404 or 503 when there is no such reader."""
