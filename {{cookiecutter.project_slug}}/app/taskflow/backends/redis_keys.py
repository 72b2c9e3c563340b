"""What each key of Redis holds. All begin with the prefix and one hash tag, so that a cluster keeps them together.

- `task:<id>`: a task, the packed list of `redis.lua`'s COLUMNS, its newest events among them
- `events:<id>`: the older events of a task that has many, and those of a schedule (`schedule:<name>`)
- `subjects`: set, what such events are about that are of no task
- `logs:<id>`: stream, its log lines by their number
- `status:<status>`, `name:<name>`, `queue:<queue>`, `schedule:<name>`: sorted sets, ids by the time they were added
- `tag:<key>:<value>`: sorted set, ids of tasks that have a tag by the time they were added
- `error:<error_key>`: sorted set, ids of failures of one group by the time they were added
- `failures`: hash, error_key -> packed map; `failures_open`, `failures_dismissed`, `failures_empty`: sorted sets,
  those that have such tasks, or none, by the time of the last
- `gauge:<size>:<kind>:<at>`: hash, packed (series, instance) -> sums; goes by itself when it is old enough
- `gauges:<size>:<kind>`: sorted set, the times for which there are such hashes
- `ready:<queue>:<name>`: sorted set, what may start now; its members sort by priority, time and id
- `due`: sorted set, ids by the time at which they become ready
- `running:<instance>`, `stopping:<instance>`, `runners`: sets, what an instance runs and is to stop; who runs anything
- `run_key:<key>`, `one_offs`: the one-offs that wait, ids under a key, and all of them by their time
- `live:<schedule>`: set, its tasks that wait or run
- `counts`, `micros`: hashes, how many tasks there are and how long they ran, by packed (queue, name, status)
- `levels`, `totals`: hashes, those that wait or run, by (queue, name, status) and by (queue, status)
- `queues`, `schedules`, `instances`: hashes, name -> packed map
- `feed`, `audit`: streams of events, the newest of all, and what people did; `seq`, `log_seq`: the last numbers given
- `revoked`: sorted set, sessions that were ended, by the time at which they would have ended
- `turn:<instance>`: the id and the answer of its last turn
- `schema`: the version of all this; `indexed`: hash, how far the tasks of each name have indexes that came with it
"""

from __future__ import annotations

SCHEMA_VERSION = 2
COLUMNS = (
    "name",
    "queue",
    "priority",
    "executor",
    "source",
    "status",
    "attempt",
    "excused",
    "crashes",
    "max_attempts",
    "created_at",
    "run_at",
    "started_at",
    "finished_at",
    "instance",
    "requeue",
    "cancel_requested",
    "arguments",
    "result",
    "error",
    "stacktrace",
    "tags",
    "progress",
    "idempotency_key",
    "retry_of",
    "trace",
    "schedule",
    "run_key",
    "revision",
    "events",
    "error_key",
    "dismissed_at",
)
"""Of a packed task, in their order; `redis.lua` has the same. One that was packed by older code has fewer."""


class Keys:
    def __init__(self, prefix: str) -> None:
        self.root = prefix + "{taskflow}:"

    def __call__(self, *parts: str) -> str:
        return self.root + ":".join(parts)
