"""The page and its files: a shell, modules and styles of ours, and plotly.min.js out of the installed package."""

import importlib.resources
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response
from starlette.types import Scope

STATIC = Path(str(importlib.resources.files("services.dashboard"))) / "static"
PLOTLY = Path(str(importlib.resources.files("plotly"))) / "package_data" / "plotly.min.js"


class _Files(StaticFiles):
    """Asked for again each time, and answered with 304 while unchanged: an update of the package shows at once."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def mount(app: FastAPI) -> None:
    """Serve ``/`` and ``/static``."""

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    def api_page() -> RedirectResponse:
        return RedirectResponse("./#/api")

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> FileResponse:
        return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")

    @app.get("/static/vendor/plotly.min.js", include_in_schema=False)
    def plotly() -> FileResponse:
        return FileResponse(PLOTLY, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})

    app.mount("/static", _Files(directory=STATIC), name="static")
