"""The `foldserve` command and the Python client: thin, a half is loaded only when it is needed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldserve.client import AsyncClient, Client
    from foldserve.conversation import KeyRefused, Policy, RequestRefused, ServerUnreachable
    from foldserve.progress import progress_bar

__all__ = ["AsyncClient", "Client", "KeyRefused", "Policy", "RequestRefused", "ServerUnreachable", "progress_bar"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the client, and httpx with it, when it is first asked for."""
    if name == "progress_bar":
        from foldserve import progress

        return progress.progress_bar
    if name in __all__:
        from foldserve import client, conversation

        return getattr(client, name, None) or getattr(conversation, name)
    raise AttributeError(f"module foldserve has no attribute {name}")
