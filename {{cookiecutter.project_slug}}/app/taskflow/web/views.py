"""What people type and read: the search box's language, and values as words.

Owns parsing of searches and times, and the formatting that templates use. Pure: the present moment is an argument.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from .. import failures
from ..models import RETRYABLE, EventKind, TaskEvent, TaskFilter, TaskRecord, TaskStatus

GLYPHS: Mapping[str, str] = {
    TaskStatus.PENDING: "○",
    TaskStatus.RUNNING: "◐",
    TaskStatus.SUCCESS: "●",
    TaskStatus.FAILED: "✕",
    TaskStatus.INTERRUPTED: "◧",
    TaskStatus.CANCELLED: "⊘",
    TaskStatus.REJECTED: "⊝",
}
"""Beside the word, never instead of it: colour and shape say the same."""

EVENT_WORDS: Mapping[str, tuple[str, str]] = {
    EventKind.ACCEPTED: ("Accepted", "pending"),
    EventKind.REJECTED: ("Rejected, its queue was full", "rejected"),
    EventKind.STARTED: ("Started", "running"),
    EventKind.SUCCEEDED: ("Succeeded", "success"),
    EventKind.RETRYING: ("To be tried again", "interrupted"),
    EventKind.FAILED: ("Failed", "failed"),
    EventKind.CANCEL_REQUESTED: ("Asked to stop", "cancelled"),
    EventKind.CANCELLED: ("Cancelled", "cancelled"),
    EventKind.INTERRUPTED: ("Interrupted", "interrupted"),
    EventKind.RESCUED: ("Rescued from a lost instance", "interrupted"),
    EventKind.RETURNED: ("Given back by an instance that stopped", "pending"),
    EventKind.REQUEUED: ("Queued again", "pending"),
    EventKind.DISMISSED: ("Dismissed", "cancelled"),
    EventKind.RESTORED: ("Restored to the dead letters", "failed"),
    EventKind.RUN_BY_HAND: ("Run by hand", "pending"),
    EventKind.COPIED: ("Retried as a new task", "pending"),
    EventKind.MOVED: ("Given another time", "pending"),
    EventKind.RUN_SCHEDULE: ("Its schedule was run by hand", "pending"),
    EventKind.CANCEL_SCHEDULED: ("Cancelled before its time", "cancelled"),
    EventKind.MOVE_SCHEDULED: ("Given another time", "pending"),
    EventKind.DRAIN_INSTANCE: ("Told to start no more tasks", "pending"),
    EventKind.LEASE_LOST: ("A late result was refused", "rejected"),
}
"""Event kind -> what it says, and the status whose colour it has."""


# -- times in searches

AGO = re.compile(r"(\d{1,6})([mhd])")
UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def parse_moment(text: str, now: datetime) -> datetime:
    """An ISO 8601 time, UTC where it names no zone, or "<N>m", "<N>h", "<N>d" ago. Raises ValueError."""
    try:
        if ago := AGO.fullmatch(text):
            return now - timedelta(**{UNITS[ago[2]]: int(ago[1])})
        moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)  # "+" in a URL is a space
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r}: expected an ISO 8601 time, or <N>m, <N>h or <N>d ago") from None


def parse_time(text: str) -> datetime:
    """What was typed as a moment: ISO 8601, UTC where it names no zone. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:40]!r}: expected an ISO 8601 time, such as 2026-01-31T12:00") from None


# -- schedules in words

DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
ONE = {1.0: "second", 60.0: "minute", 3_600.0: "hour", 86_400.0: "day"}
EVERY_SECONDS = re.compile(r"every ([0-9.]+) s")
NUMBER, STEP = re.compile(r"\d{1,2}"), re.compile(r"\*/(\d{1,2})")


def trigger_words(text: str) -> str:
    """A schedule's trigger as people say it; as it is written where there are no shorter words for it."""
    if found := EVERY_SECONDS.fullmatch(text):
        return f"every {ONE.get(float(found[1])) or seconds(float(found[1]))}"
    fields = text.split()
    if len(fields) != 5 or fields[3] != "*":
        return text
    minute, hour, day, _, weekday = fields
    days = days_words(day, weekday)
    if NUMBER.fullmatch(minute) and NUMBER.fullmatch(hour) and days:
        return f"{days} at {int(hour):02}:{int(minute):02}"
    if (day, weekday) != ("*", "*"):
        return text
    if NUMBER.fullmatch(minute) and hour == "*":
        return f"every hour at :{int(minute):02}"
    if minute == "*" and hour == "*":
        return "every minute"
    if (found := STEP.fullmatch(minute)) and hour == "*":
        return f"every {int(found[1])} minutes"
    if (found := STEP.fullmatch(hour)) and minute == "0":
        return f"every {int(found[1])} hours"
    return text


def days_words(day: str, weekday: str) -> str:
    """Of a cron expression's fields; nothing where they say more than one word does."""
    match day, weekday.lower():
        case "*", "*":
            return "every day"
        case "*", "1-5" | "mon-fri":
            return "every weekday"
        case "*", "0,6" | "6,0" | "6,7" | "sat,sun":
            return "every Saturday and Sunday"
        case "*", name if name.isdecimal() and int(name) < 8:
            return f"every {DAYS[int(name) % 7]}"
        case "*", name if found := [full for full in DAYS if full[:3].lower() == name]:
            return f"every {found[0]}"
        case number, "*" if NUMBER.fullmatch(number):
            return f"on day {int(number)} of the month"
    return ""


# -- the search box

TOKEN = re.compile(r'(?P<key>[A-Za-z][\w.-]*):(?P<value>"[^"]*"|\S*)|"(?P<phrase>[^"]*)"|(?P<word>\S+)')
MOST_SEARCH_CHARACTERS = 512
PLAIN_VALUE = re.compile(r'[^\s":]+')


TEXTS = ("name", "queue", "source", "since", "until", "id", "key", "error", "args", "attempts", "group")
"""Qualifiers with one text each."""
ATTEMPTS = re.compile(r"([<>=]?)(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Search:
    """What a search asks for. `problems` are the parts that were not understood, and why."""

    statuses: tuple[TaskStatus, ...] = ()
    name: str | None = None
    queue: str | None = None
    source: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    since: str | None = None
    until: str | None = None
    id: str | None = None
    key: str | None = None
    error: str | None = None
    args: str | None = None
    attempts: str | None = None
    group: str | None = None
    """Of failures."""
    dismissed: bool | None = None
    words: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def filter(self, now: datetime) -> TaskFilter:
        return TaskFilter(
            statuses=self.statuses,
            func_name=self.name,
            queue=self.queue,
            source=self.source,
            tags=self.tags,
            since=parse_moment(self.since, now) if self.since else None,
            until=parse_moment(self.until, now) if self.until else None,
            task_id=self.id,
            key=self.key,
            error=self.error,
            arguments=self.args,
            attempts=parse_attempts(self.attempts) if self.attempts else None,
            error_key=self.group,
            dismissed=self.dismissed,
            text=" ".join(self.words) or None,
        )

    def __str__(self) -> str:
        """As it could be typed; what was not understood is left out."""
        parts = [f"status:{','.join(self.statuses)}"] if self.statuses else []
        parts += [f"{key}:{quoted(value)}" for key in TEXTS if (value := getattr(self, key))]
        if self.dismissed is not None:
            parts.append(f"is:{'dismissed' if self.dismissed else 'open'}")
        parts += [f"tag.{key}:{quoted(value)}" for key, value in self.tags]
        parts += [word if PLAIN_VALUE.fullmatch(word) else f'"{word}"' for word in self.words]
        return " ".join(parts)

    def toggled(self, status: TaskStatus) -> Search:
        """The same search with this status added, or taken out."""
        if status in self.statuses:
            return replace(self, statuses=tuple(other for other in self.statuses if other is not status))
        return replace(self, statuses=(*self.statuses, status))

    @property
    def looks_through_all(self) -> bool:
        """Whether some part has no index, so that only the newest tasks are looked at."""
        looked_for = (self.words, self.source, self.id, self.key, self.error, self.args, self.attempts)
        return any(looked_for) or sum(map(bool, (self.statuses, self.name, self.queue, self.tags))) > 1


def parse_search(text: str, now: datetime) -> Search:
    """Never fails: what is not understood becomes a problem, and the rest is searched for."""
    search = Search()
    for token in TOKEN.finditer(text.replace("\0", " ")[:MOST_SEARCH_CHARACTERS]):
        key, value = token["key"], (token["value"] or "").strip('"')
        if key is None:
            word = token["phrase"] if token["word"] is None else token["word"]
            search = replace(search, words=(*search.words, word)) if word.strip() else search
            continue
        try:
            search = with_qualifier(search, key.lower(), key, value, now)
        except ValueError as problem:
            search = replace(search, problems=(*search.problems, str(problem)))
    return search


def with_qualifier(search: Search, kind: str, key: str, value: str, now: datetime) -> Search:
    """Raises ValueError naming the part and what would have been understood."""
    if not value:
        raise ValueError(f"{key}: needs a value, with no space after the colon")
    if kind == "status":
        found = dict.fromkeys((*search.statuses, *(status_named(part) for part in value.split(",") if part)))
        return replace(search, statuses=tuple(found))
    if kind == "is":
        if value not in ("dismissed", "open"):
            raise ValueError(f"is:{value}: is dismissed or open")
        return replace(search, dismissed=value == "dismissed")
    if kind in TEXTS:
        check_text(kind, value, now)
        return replace(search, **{kind: value})  # type: ignore[arg-type]
    if kind.startswith("tag.") and len(kind) > 4:
        return replace(search, tags=(*search.tags[-19:], (key[4:], value)))
    raise ValueError(f'{key}: is no qualifier of this search; put quotes around it to search for the text "{key}:..."')


def check_text(kind: str, value: str, now: datetime) -> None:
    """Raises ValueError."""
    match kind:
        case "source" if value not in ("manual", "scheduled"):
            raise ValueError(f"source:{value}: is manual or scheduled")
        case "since" | "until":
            try:
                parse_moment(value, now)
            except ValueError as error:
                raise ValueError(f"{kind}:{error}") from None
        case "attempts":
            parse_attempts(value)


def parse_attempts(text: str) -> tuple[Literal["<", "=", ">"], int]:
    """`3`, `>1`, `<5`. Raises ValueError."""
    found = ATTEMPTS.fullmatch(text)
    if found is None:
        raise ValueError(f"attempts:{text}: is a number, or one after < or >")
    sign: Any = found[1] or "="
    return sign, int(found[2])


def status_named(text: str) -> TaskStatus:
    try:
        return TaskStatus(text.lower())
    except ValueError:
        raise ValueError(f"status:{text}: is one of {', '.join(TaskStatus)}") from None


def quoted(value: str) -> str:
    return value if re.fullmatch(r'[^\s"]+', value) else f'"{value}"'


# -- values as words


def seconds(value: float | None) -> str:
    """A duration, short: two units at most."""
    if value is None:
        return ""
    if value < 0.0005:
        return "0 ms"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms" if value >= 0.0095 else f"{value * 1000:.1f} ms"
    if value < 9.95:
        return f"{value:.1f} s".replace(".0 s", " s")
    whole = round(value)
    for unit, size, smaller, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size:,} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def age(moment: datetime, now: datetime) -> str:
    """How long ago, in one unit; `app.js` keeps it true with the same words."""
    past = max(0, int((now - moment).total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if past >= size:
            return f"{past // size} {unit} ago"
    return f"{past} s ago" if past >= 5 else "just now"


def clock(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%H:%M:%S}"


def full(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"


def day_clock(moment: datetime, now: datetime) -> str:
    """The time of day, with the date where it is not today's."""
    return f"{moment:%H:%M:%S}" if moment.date() == now.date() else f"{moment:%b} {moment.day}, {moment:%H:%M}"


def number(value: float) -> str:
    return f"{value:,}"


def short_number(value: int) -> str:
    """In at most seven characters."""
    for limit, size, unit in ((10**6, 1, ""), (10**9, 10**6, "M"), (10**12, 10**9, "B")):
        if value < limit:
            return f"{value:,}" if size == 1 else f"{value / size:.2f} {unit}"
    return f"{value:.2g}"


def size(value: int | None) -> str:
    """Bytes, in three digits."""
    if value is None:
        return ""
    for limit, unit, power in ((10**6, "kB", 3), (10**9, "MB", 6)):
        if value < limit:
            return f"{value / 10**power:.0f} {unit}"
    return f"{value / 10**9:.1f} GB"


def percent(part: float, whole: float) -> str:
    if not whole:
        return "0 %"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.0f} %" if share in (0, 100) else f"{share:.1f} %"


def short_id(task_id: str) -> str:
    """Its last characters: the first ones are the time, and equal for all tasks of a minute."""
    return task_id[-8:]


def first_line(text: str | None, limit: int = 120) -> str:
    return failures.first_line(text, limit)


def event_detail(event: TaskEvent) -> str:
    """What an event adds to its kind. What people did carries its facts as JSON, which is put in words."""
    detail = event.detail or ""
    if event.actor is None:
        return detail
    try:
        facts = json.loads(detail)
    except ValueError:
        return detail
    return facts_words(facts) if isinstance(facts, dict) else detail


def facts_words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value is not None)


def until(moment: datetime, now: datetime) -> str:
    """How long from now."""
    left = (moment - now).total_seconds()
    return f"in {seconds(max(1.0, left))}" if left > 0 else "now"


def compact(value: object, limit: int = 200) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A log line's extra fields, as words."""
    return [(key, value if isinstance(value, str) else json.dumps(value, default=str)) for key, value in values.items()]


# -- a task in words


def glyph(status: str) -> str:
    return GLYPHS[status]


def waiting_for(task: TaskRecord, now: datetime, *, known: bool) -> str:
    """What a pending task waits for; nothing when it is simply next."""
    if not known:
        return "waits for a process that knows this function"
    left = (task.run_at - now).total_seconds()
    if left <= 0:
        return ""
    if task.attempt > task.excused:
        return f"retry {task.retries_used + 1} of {task.max_attempts - 1} in {seconds(left)}"
    return f"starts in {seconds(left)}"


def wait_seconds(task: TaskRecord, now: datetime) -> float | None:
    """How long the present or last attempt waited, or has waited so far, once it was due."""
    until = now if task.status is TaskStatus.PENDING else task.start_time
    if until is None or until < task.run_at:
        return None
    return (until - task.run_at).total_seconds()


def run_seconds(task: TaskRecord, now: datetime) -> float | None:
    if task.status is TaskStatus.RUNNING and task.start_time is not None:
        return max(0.0, (now - task.start_time).total_seconds())
    return None if task.status is TaskStatus.PENDING else task.duration


def can_retry(task: TaskRecord) -> bool:
    return task.status in RETRYABLE


def can_cancel(task: TaskRecord) -> bool:
    return not task.status.terminal and not task.cancel_requested


def progress_words(progress: Mapping[str, Any]) -> str:
    """`40 of 100 · reading`, as far as the task said so."""
    number = " of ".join(str(progress[key]) for key in ("done", "total") if progress.get(key) is not None)
    return " · ".join(str(part) for part in (number, progress.get("message")) if part)


def progress_share(progress: Mapping[str, Any]) -> float | None:
    """Between 0 and 1; None where the task did not say out of how much."""
    done, total = progress.get("done"), progress.get("total")
    if not isinstance(done, int | float) or not isinstance(total, int | float) or total <= 0:
        return None
    return min(1.0, max(0.0, done / total))


FILTERS: Mapping[str, Callable[..., Any]] = {
    "age": age,
    "can_cancel": can_cancel,
    "can_retry": can_retry,
    "clock": clock,
    "day_clock": day_clock,
    "event_detail": event_detail,
    "compact": compact,
    "first_line": first_line,
    "full": full,
    "glyph": glyph,
    "number": number,
    "size": size,
    "pairs": pairs,
    "percent": percent,
    "pretty": pretty,
    "progress_share": progress_share,
    "progress_words": progress_words,
    "run_seconds": run_seconds,
    "seconds": seconds,
    "short_id": short_id,
    "short_number": short_number,
    "wait_seconds": wait_seconds,
    "until": until,
    "waiting_for": waiting_for,
}
