"""The application: routers, pages, error documents and the checks that every request passes."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi

from services.dashboard import guards, pages
from services.dashboard.annotations import Annotations
from services.dashboard.connections import Crowd, file_limit
from services.dashboard.index import RunIndex
from services.dashboard.jobs import Jobs
from services.dashboard.problems import InvalidField, Problem, documented, handle_errors
from services.dashboard.routes import (
    actions,
    comparisons,
    details,
    evaluations,
    live,
    playback,
    runs,
    series,
    service,
    submissions,
)
from services.dashboard.routes import settings as settings_routes
from services.dashboard.security import Security
from services.dashboard.settings import Settings
from services.dashboard.stream import Hub
from services.store.catalog import Catalog

API = "/api/v1"

ROUTERS: tuple[APIRouter, ...] = (
    runs.tables,
    runs.router,
    series.tables,
    series.router,
    details.router,
    evaluations.router,
    settings_routes.tables,
    settings_routes.router,
    live.router,
    playback.router,
    comparisons.router,
    actions.router,
    submissions.router,
    service.api,
)
"""Every router of the API; its paths come below ``/api/v1``."""


def create_app(settings: Settings) -> FastAPI:
    """The service. ``app.state`` has ``settings``, ``security``, ``catalog`` (of the stores), ``annotations`` (what
    people wrote about runs), ``index`` (the runs at a glance), ``hub`` (event streams), ``crowd`` (connections),
    ``answers`` (how many, by method, route and status), ``jobs`` (Ray's Job API).

    Raises:
        ConfigError: when the address needs a better token, or the token file can't be used.
    """

    security = Security(settings)
    catalog = Catalog(settings.store_url or settings.runs_dir)
    annotations = Annotations(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            catalog.close()
            annotations.close()

    app = FastAPI(
        title="Unmask dashboard",
        version="1",
        description="Runs, their metrics, events, workers, samples and controls. Errors are RFC 9457 problem details. "
        "Runs can be read without a token; what writes, and what was submitted, wants it as a bearer token.",
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=documented(400, 500),
    )
    app.state.settings = settings
    app.state.security = security
    app.state.catalog = catalog
    app.state.annotations = annotations
    app.state.index = RunIndex(catalog, annotations)
    app.state.hub = Hub(file_limit())
    app.state.crowd = Crowd(file_limit())
    app.state.answers = Counter()
    app.state.jobs = Jobs(settings.ray_address, settings.ray_working_dir)
    app.include_router(service.router)
    for router in ROUTERS:
        app.include_router(router, prefix=API)
    pages.mount(app)
    handle_errors(app)
    guards.install(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description and the schema that all problem responses refer to."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        template = "#/components/schemas/{model}"
        problem = Problem.model_json_schema(ref_template=template, mode="serialization")
        problem.pop("$defs")
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas["Problem"] = problem
        schemas["InvalidField"] = InvalidField.model_json_schema()
        app.openapi_schema = document
    return app.openapi_schema
