"""The API document: built off the event loop, which its 0.1 s would hold up, when somebody first needs it."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse
from starlette.routing import Route


class ApiDocument:
    """What /openapi.json shows; also says what a call takes, for messages about one that is wrong."""

    def __init__(self) -> None:
        self.route = Route("/openapi.json", self._show, include_in_schema=False)
        self._building = asyncio.Lock()

    async def of(self, app: FastAPI) -> dict[str, Any]:
        """Return the document of `app`."""
        async with self._building:  # a crowd waits for one, and does not build its own
            if app.openapi_schema is None:
                await asyncio.to_thread(app.openapi)
            return app.openapi()

    async def parameters(self, request: Request, place: str) -> list[str]:
        """Return the names of what a call takes in its `query`, `path` or `header`."""
        path, method = getattr(request.scope.get("route"), "path", ""), request.method.lower()
        operation = (await self.of(request.app))["paths"].get(path, {}).get(method, {})
        return [one["name"] for one in operation.get("parameters", ()) if one["in"] == place]

    async def _show(self, request: Request) -> JSONResponse:
        return JSONResponse(await self.of(request.app))
