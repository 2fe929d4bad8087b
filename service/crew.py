"""The processes that serve together, as one of them sees them: are all ready, and tell all. Knows no process."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.independence.certificate import Certificate

Order = Callable[[Mapping[str, Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class View:
    """The whole service as its supervisor sees it."""

    is_ready: bool
    workers: int
    workers_ready: int


class Crew(Protocol):
    """The others, and this process among them."""

    @property
    def view(self) -> View | None:
        """What the supervisor last said, or None where there is none."""
        ...

    @property
    def number(self) -> int | None:
        """This process's number among the workers, or None where there is no supervisor."""
        ...

    @property
    def certificates(self) -> Mapping[str, Certificate]:
        """Certificates that another process of this crew made here, by the digest of their fingerprint."""
        ...

    def on(self, name: str, order: Order) -> None:
        """Let `order` be what `tell_all(name, …)` does in this process."""
        ...

    @property
    def loaded(self) -> Sequence[Mapping[str, Any]] | None:
        """The orders to load that say what the others serve: to be served here too, whatever the disk says now.

        None where there are no others yet.
        """
        ...

    async def joined(self, loaded: Sequence[Mapping[str, Any]]) -> None:
        """This process serves what it was asked to; `loaded` as the order `load` gives it, for each model."""
        ...

    def leave(self, reason: str) -> None:
        """This process takes nothing more."""
        ...

    async def tell_all(self, name: str, arguments: Mapping[str, Any], *, kept_as: str | None = None) -> Any:
        """Have every process carry out an order; return what it gave.

        Without `kept_as` all do it at once. With it this process goes first; where it fails, nobody else tries and the
        error is raised; where it succeeds the others follow, and so does each that starts later, with the last order
        that was kept under this name. Where the result has an `order`, that is what they follow; its `certificates`
        spare them the probe.
        """
        ...


class Alone:
    """A crew of one."""

    def __init__(self) -> None:
        self._orders: dict[str, Order] = {}

    @property
    def view(self) -> View | None:
        """None: there is no supervisor."""
        return None

    @property
    def number(self) -> int | None:
        """None: there is no supervisor."""
        return None

    @property
    def certificates(self) -> Mapping[str, Certificate]:
        """None were made elsewhere."""
        return {}

    def on(self, name: str, order: Order) -> None:
        """Remember the order."""
        self._orders[name] = order

    @property
    def loaded(self) -> Sequence[Mapping[str, Any]] | None:
        """None: the disk says what to serve."""
        return None

    async def joined(self, loaded: Sequence[Mapping[str, Any]]) -> None:
        """Nobody follows."""

    def leave(self, reason: str) -> None:
        """Nobody hands anything over."""

    async def tell_all(self, name: str, arguments: Mapping[str, Any], *, kept_as: str | None = None) -> Any:  # noqa: ARG002
        """Do it here."""
        return await self._orders[name](arguments)
