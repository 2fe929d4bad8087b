"""The endpoints, grouped by audience. They parse, call and return; errors pass through to `service.app`."""

from typing import Annotated

from fastapi import Depends, Request

from service.inference import Service


def _get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_get_service)]
