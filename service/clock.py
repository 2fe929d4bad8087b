"""Does the clock of this machine contradict what it is shown? Answers and deadlines do not hang on it; records do."""

from datetime import UTC, datetime, timedelta

ALLOWED = timedelta(minutes=1)  # between the clocks of two machines that keep a certificate in one folder
A_DAY = timedelta(days=1)  # a model's date has no hour and no time zone


def contradiction(now: datetime, *, certified: str | None, trained: object) -> str | None:
    """Return what to say of a clock that is behind the making of a certificate or a model, or None.

    `now` is aware. `certified` is a time and `trained` a date, both ISO 8601; what is neither is passed over. A clock
    that is ahead contradicts nothing.
    """
    made = _moment(certified), _moment(trained)
    for what, moment, allowed in zip(("certificate", "model"), made, (ALLOWED, A_DAY), strict=True):
        if moment is not None and now + allowed < moment:
            return (
                f"this machine's clock says {now.isoformat(timespec='seconds')}, but its {what} was made at "
                f"{moment.isoformat(timespec='seconds')}: set the clock. Answers and deadlines do not hang on it; "
                "the times in logs, traces, metrics and certificates are wrong"
            )
    return None


def _moment(text: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
