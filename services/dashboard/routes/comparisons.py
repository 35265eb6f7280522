"""Comparisons of methods."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from pydantic import Field

from services.dashboard.comparisons import Comparison, comparison_files, read_comparison
from services.dashboard.models import Model
from services.dashboard.problems import ProblemError, documented
from services.dashboard.settings import Settings
from services.dashboard.tables import Strict

router = APIRouter(tags=["comparisons"], route_class=Strict)

Name = Annotated[str, Path(min_length=1, max_length=255, description="Name of the comparison's folder")]


class ComparisonSummary(Model):
    """A comparison in the list."""

    name: str
    """Of its folder."""
    methods: list[str]
    complete: bool


class ComparisonList(Model):
    """The comparisons beside the runs."""

    items: list[ComparisonSummary] = Field(description="By name")


@router.get("/comparisons", operation_id="listComparisons", summary="List of comparisons")
def list_comparisons(request: Request) -> ComparisonList:
    """Of methods, as learner.compare leaves them in the folder of runs or in a folder in it."""
    settings: Settings = request.app.state.settings
    found = {name: read_comparison(path) for name, path in comparison_files(settings.runs_dir).items()}
    items = [
        ComparisonSummary(name=name, methods=list(comparison.methods), complete=comparison.complete)
        for name, comparison in sorted(found.items())
        if comparison is not None
    ]
    return ComparisonList(items=items)


@router.get("/comparisons/{name}", operation_id="getComparison", summary="A comparison", responses=documented(404, 422))
def get_comparison(request: Request, name: Name) -> Comparison:
    """Solve rates with intervals, curves and cost of each method."""
    settings: Settings = request.app.state.settings
    path = comparison_files(settings.runs_dir).get(name)  # the name is compared, and never becomes part of a path
    comparison = read_comparison(path) if path is not None else None
    if comparison is None:
        raise ProblemError(404, f"no comparison named {name!r} here")
    return comparison
