"""The screens of the dashboard, in the order in which they are shown: the one list of them.

`base.html` draws it, its keys are read from there by `app.js`, and tests visit what is in it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    label: str
    path: str
    """Below the site's base."""
    icon: str
    """An SVG path in a square of 16."""
    key: str
    """After `g`."""


NAVIGATION = (
    Entry("overview", "Overview", "/dashboard", "M2 9l6-6 6 6v5H2z", "o"),
    Entry("tasks", "Tasks", "/dashboard/tasks", "M2 4h12M2 8h12M2 12h8", "t"),
    Entry("queues", "Queues", "/dashboard/queues", "M2 3h12v3H2zM2 10h7v3H2z", "q"),
    Entry("schedules", "Schedules", "/dashboard/schedules", "M8 2a6 6 0 1 0 .1 0M8 5v3l2 2", "s"),
    Entry("workers", "Workers", "/dashboard/workers", "M2 3h12v4H2zM2 9h12v4H2zM4.5 5h.1M4.5 11h.1", "w"),
    Entry("dead", "Dead letters", "/dashboard/dead", "M2 4h12v8H2zM2 4l6 5 6-5", "d"),
    Entry("audit", "Audit", "/dashboard/audit", "M4 2h8v12H4zM6 5h4M6 8h4M6 11h2", "a"),
)
