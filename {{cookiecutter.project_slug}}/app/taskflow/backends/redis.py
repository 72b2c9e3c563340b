"""Redis: a turn as two calls of one script, and the reads along sorted sets.

Owns the connections, the arguments of `redis.lua` and what its answers mean. The script is atomic, but others may come
between a look and what was decided from it: it compares what was taken for granted, and writes nothing where that does
not hold any more. It remembers the answer of each instance's last turn, so that one whose answer was lost is not made
twice. What the server promises of a power loss is read at the start and said aloud.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import redis
import redis.asyncio
import redis.sentinel
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.engine import URL

from ..clock import offset_of
from ..errors import BackendUnavailable, Contended, OutcomeUnknown, TaskflowError
from ..loops import Throttle, pause_after
from ..models import (
    AuditFilter,
    Count,
    Cursor,
    ErrorGroup,
    InstanceRecord,
    LogEntry,
    QueueState,
    ScheduledOnce,
    ScheduleState,
    TaskEvent,
    TaskFilter,
    TaskPage,
    TaskRecord,
    TaskStatus,
    from_micros,
    to_micros,
    utc_now,
)
from ..rules.turns import Decision, decide, wants
from . import redis_copies
from .base import EVERY_ACT, AttemptId, Batch, Beat, GaugeRow, Instance, Pulse, Turn, TurnResult
from .changes import (
    RESCUE_BATCH,
    STAGE_BATCH,
    Snapshot,
    Wants,
)
from .redis_keys import SCHEMA_VERSION, Keys
from .redis_pages import Walk
from .redis_values import (
    applied_of,
    arguments_of,
    event_of,
    group_row,
    level_of,
    light,
    line_row,
    packed,
    pairs,
    row_of_instance,
    run_keys_of,
    schedule_row,
    stored_queue,
    stored_schedule,
    stored_task,
    task_row,
    texts,
    told,
    unknown_owner,
    unpacked,
)
from .rows import group_of, instance_of, log_of, one_off_of, page_of, pulse_of, record_of, schedule_of
from .search import SEARCH_WINDOW, Searches, is_act, is_scan, is_search, matches
from .stored import instance_row, merged_counts, queue_states

logger = logging.getLogger("taskflow")

MOST_TRIES = 20
"""Of one turn, while other processes change what it is about."""
TIMEOUT = 5.0
"""Seconds until a server that does not answer counts as away."""
READERS = 16
MOST_PRIORITIES = 32
"""Of one name in one queue, at whose oldest task somebody looks."""
SENTINEL_PORT = 26379
PAGE = 500
"""Tasks that a search reads at a time."""
INDEX_BATCH = 500
"""Older tasks that are indexed in one step, during which the server does nothing else."""
LATE = 60_000_000
"""Microseconds by which the clocks of those who store tasks may differ."""
AWAY = (redis.ConnectionError, redis.TimeoutError, OSError)
AWAY_ANSWERS = ("LOADING", "READONLY", "BUSY", "MASTERDOWN", "OOM", "MISCONF", "NOREPLICAS", "TRYAGAIN", "CLUSTERDOWN")
AWAY_KINDS = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
)
"""Answers whose word the client has taken away. Up to Redis 6 a script's answer has it in the middle, and keeps it."""
ANNOUNCE_INTERVAL = 0.02
SCRIPT = Path(__file__).with_name("redis.lua").read_text(encoding="utf-8")


class RedisBackend:
    """Storage of tasks in Redis. See `base.Backend` for what each method promises."""

    def __init__(self, url: URL | str) -> None:
        self._location = url if isinstance(url, str) else url.render_as_string(hide_password=False)
        parts = urlsplit(self._location)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self._sentinel = options.get("sentinel")
        self._sentinels = [host for host in options.get("sentinels", "").split(",") if host]
        self.keys = Keys(options.get("prefix", ""))
        self._plain_url = urlunsplit(parts._replace(query=""))
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._writer = self._client(1)
        self._reader = self._client(READERS)
        self._sync: redis.Redis | None = None
        self._sha = ""
        self._waits_for_disk = False
        self._turns = 0
        self._searches = Searches()
        self._doubt: tuple[str, Decision] | None = None
        self._news: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._announcing = Throttle(ANNOUNCE_INTERVAL)
        self.clock_offset = timedelta(0)

    # -- connections

    def _client(self, connections: int) -> redis.asyncio.Redis:
        options: dict[str, Any] = {
            "socket_timeout": TIMEOUT,
            "socket_connect_timeout": TIMEOUT,
            "retry": Retry(NoBackoff(), 0),
            "max_connections": connections,
        }
        if self._sentinel is None:
            pool = redis.asyncio.BlockingConnectionPool.from_url(self._plain_url, timeout=TIMEOUT, **options)
            return redis.asyncio.Redis(connection_pool=pool)
        options.pop("max_connections")
        sentinel = Sentinel(self._hosts(), socket_timeout=TIMEOUT)  # type: ignore[no-untyped-call]
        client: redis.asyncio.Redis = sentinel.master_for(self._sentinel, **self._database(), **options)
        return client

    def _hosts(self) -> list[tuple[str, int]]:
        """Of the sentinels."""
        parts = urlsplit(self._plain_url)
        return [(parts.hostname or "localhost", parts.port or SENTINEL_PORT), *map(host_and_port, self._sentinels)]

    def _database(self) -> dict[str, Any]:
        parts = urlsplit(self._plain_url)
        return {"db": int(parts.path.strip("/") or 0), "username": parts.username, "password": parts.password}

    def _apart(self) -> redis.Redis:
        """For the heartbeat's thread."""
        if self._sync is None:
            options: dict[str, Any] = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
            if self._sentinel is None:
                self._sync = redis.Redis.from_url(self._plain_url, **options)
            else:
                sentinel = redis.sentinel.Sentinel(self._hosts(), **options)  # type: ignore[no-untyped-call]
                self._sync = sentinel.master_for(self._sentinel, **self._database(), **options)  # type: ignore[no-untyped-call]
        return self._sync

    @property
    def name(self) -> str:
        parts = urlsplit(self._location)
        if parts.password is None:
            return self._location
        return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))

    # -- lifecycle

    async def open(self) -> None:
        if self._process != os.getpid():
            self._begin()
        with translated():
            await self._check_promises()
            began, told = utc_now(), await self._writer.time()
            self._compare_clocks(began, told)
            self._sha = await self._writer.script_load(SCRIPT)
            known = await self._writer.get(self.keys("schema"))
            self._require_version(known)
            if known is None:
                await self._writer.set(self.keys("schema"), SCHEMA_VERSION, nx=True)
            elif int(known) < SCHEMA_VERSION:
                await self._index_older_tasks()

    async def _index_older_tasks(self) -> None:
        """Those that were stored without an index of their tags. The number of the schema stays as it is while older
        code runs beside this, and may store more of them: the next who opens goes on."""
        counts: Any = await self._writer.hkeys(self.keys("counts"))
        for name in sorted({level_of(key, b"0")[1] for key in counts}):
            mark: Any = await self._writer.hget(self.keys("indexed"), name)
            after = max(0, int(mark or 0) - LATE)
            while last := await self._call("index", {"name": name, "after": after, "most": INDEX_BATCH}):
                after = int(last)
                await self._writer.hset(self.keys("indexed"), name, after)
        instances: Any = await self._writer.hvals(self.keys("instances"))
        if all(row.schema >= SCHEMA_VERSION for row in map(row_of_instance, instances) if row.lease_until):
            await self._writer.set(self.keys("schema"), SCHEMA_VERSION)
            await self._writer.delete(self.keys("indexed"))

    def _require_version(self, known: Any) -> None:
        if known is not None and int(known) > SCHEMA_VERSION:
            raise TaskflowError(
                f"{self.name} has schema version {int(known)}; this code knows up to {SCHEMA_VERSION}: deploy the "
                "newer code, or use another database"
            )

    async def _check_promises(self) -> None:
        """Says what this server does not keep. A server that does not tell its settings is taken at its word."""
        version = (await self._writer.info("server"))["redis_version"]
        newer = tuple(int(part) for part in version.split(".")[:2]) >= (7, 2)
        settings: dict[str, str] = {}
        with suppress(redis.ResponseError):
            for name in ("appendonly", "appendfsync", "maxmemory-policy", "maxmemory"):
                settings |= {str(key): str(value) for key, value in (await self._writer.config_get(name)).items()}
        keeps = settings.get("appendonly", "yes") == "yes"
        always = settings.get("appendfsync", "always") == "always"
        self._waits_for_disk = keeps and not always and newer
        if not keeps:
            logger.warning("redis: appendonly is off: what was accepted is lost when the server dies")
        elif not always and not newer:
            logger.warning("redis: appendfsync is %s: a power loss takes the last second", settings["appendfsync"])
        if settings.get("maxmemory", "0") != "0" and settings.get("maxmemory-policy", "noeviction") != "noeviction":
            logger.warning(
                "redis: maxmemory-policy is %s: tasks can vanish; set noeviction", settings["maxmemory-policy"]
            )

    async def is_current(self) -> bool:
        with translated():
            known = await self._reader.get(self.keys("schema"))
        self._require_version(known)
        return known is not None and int(known) == SCHEMA_VERSION

    async def close(self) -> None:
        if self._news is not None:
            self._news.cancel()
            self._news = None
        for client in (self._writer, self._reader):
            with suppress(*AWAY):
                await client.aclose(close_connection_pool=True)
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    # -- the turn

    async def turn(self, turn: Turn) -> TurnResult:
        self._turns += 1
        if (known := await self._resolved(turn)) is not None:
            return known
        for number in range(MOST_TRIES):
            careful = number > 0
            seen = wants(turn, careful=careful)
            snapshot = await self._look(seen)
            decision = decide(turn, snapshot, careful=careful, rotation=self._turns)
            answer = await self._apply(turn, decision, run_keys_of(snapshot))
            if answer is not False:
                return decision.result(applied_of(answer))
        raise Contended

    async def _resolved(self, turn: Turn) -> TurnResult | None:
        """The result of a turn that was made although its answer was lost."""
        if self._doubt is None:
            return None
        turn_id, decision = self._doubt
        with translated(OutcomeUnknown):
            packed = await self._writer.get(self.keys("turn", turn.instance))
        self._doubt = None
        known, answer = unpacked(packed) if packed else (b"", None)
        return decision.result(applied_of(answer)) if turn_id == turn.turn_id == known.decode() else None

    async def _look(self, seen: Wants) -> Snapshot:
        argument = {
            "now": seen.now,
            "me": seen.instance,
            "stage": seen.stage,
            "most_staged": STAGE_BATCH,
            "most_left": RESCUE_BATCH,
            "tasks": list(dict.fromkeys(seen.tasks)),
            "run_keys": list(dict.fromkeys(seen.run_keys)),
            "stamps": [[instance, stamp] for instance, stamp in seen.stamps.items()],
            "held": seen.held,
            "schedules": list(dict.fromkeys(seen.schedules)),
            "live": list(dict.fromkeys(seen.live)),
        }
        with translated():
            answer = await self._call("look", argument)
        levels, queues, first_due, tasks, one_offs, left, held, schedules, live = answer
        return Snapshot(
            levels=[level_of(key, n) for key, n in pairs(levels)],
            queues={queue.name: queue for queue in (stored_queue(*pair) for pair in pairs(queues))},
            first_due=int(float(first_due)) if first_due else None,
            tasks={row.task_id: row for row in map(stored_task, tasks)},
            one_offs={key.decode(): [stored_task(item) for item in items] for key, items in one_offs},
            left=[stored_task(item) for item in left],
            held=[stored_task(item) for item in held],
            schedules={row.name: row for row in (stored_schedule(*pair) for pair in schedules)},
            live=frozenset(texts(live)),
        )

    async def _apply(self, turn: Turn, decision: Decision, run_keys: Sequence[Any]) -> Any:
        changes = decision.changes
        remembers = bool(turn.turn_id and (turn.finishes or turn.drafts or turn.commands or turn.logs))
        argument = {**arguments_of(changes), "run_keys": run_keys, "turn_id": turn.turn_id, "remember": remembers}
        try:
            return await self._call("apply", argument, durably=True)
        except AWAY as error:
            if not remembers:
                raise BackendUnavailable(str(error)) from error
            self._doubt = (turn.turn_id, decision)
            raise OutcomeUnknown(str(error)) from error
        except redis.ResponseError as error:
            raise of_response(error) from error

    async def _call(
        self,
        function: str,
        argument: Mapping[str, Any],
        *,
        durably: bool = False,
        client: redis.asyncio.Redis | None = None,
    ) -> Any:
        words = (self.keys.root, function, packed(argument))
        try:
            if durably and self._waits_for_disk:
                async with self._writer.pipeline(transaction=False) as pipeline:
                    pipeline.evalsha(self._sha, 1, *words)
                    pipeline.execute_command("WAITAOF", 1, 0, int(TIMEOUT * 1000))
                    answer, _ = await pipeline.execute()
            else:
                answer = await (client or self._writer).evalsha(self._sha, 1, *words)
        except redis.exceptions.NoScriptError:  # a server that was restarted, or another one
            self._sha = await self._writer.script_load(SCRIPT)
            return await self._call(function, argument, durably=durably, client=client)
        return unpacked(answer)

    # -- instances

    def beat(self, instance: Instance, beat: Beat) -> None:
        with translated():
            self._run_apart("beat", {**instance_row(instance, beat), "schema": SCHEMA_VERSION})
            began, told = utc_now(), self._apart().time()
            self._compare_clocks(began, told)

    def _run_apart(self, function: str, argument: Mapping[str, Any]) -> None:
        self._apart().eval(SCRIPT, 1, self.keys.root, function, packed(argument))

    def _compare_clocks(self, began: datetime, told: Any) -> None:
        """`told`: seconds and microseconds."""
        now = from_micros(int(told[0]) * 1_000_000 + int(told[1]))
        self.clock_offset = offset_of(self.clock_offset, began, now, utc_now())

    def pulses(self) -> Sequence[Pulse]:
        with translated():
            client = self._apart()
            known: Any = client.hgetall(self.keys("instances"))
            runners: Any = client.smembers(self.keys("runners"))
        rows = [row_of_instance(value) for value in known.values()]
        live = [row for row in rows if row.lease_until or row.instance_id.encode() in runners]
        unknown = set(texts(runners)) - {row.instance_id for row in rows}
        return [*map(pulse_of, live), *(pulse_of(unknown_owner(owner)) for owner in unknown)]

    def leave(self, instance_id: str, stamp: int | None = None) -> None:
        with translated():
            self._run_apart("leave", {"instance_id": instance_id, "stamp": stamp})

    # -- reads

    async def get(self, task_id: str) -> TaskRecord | None:
        found = await self._tasks([task_id])
        return record_of(found[0]) if found else None

    async def _tasks(self, ids: Sequence[str]) -> list[SimpleNamespace]:
        if not ids:
            return []
        with translated():
            values = await self._reader.mget([self.keys("task", task_id) for task_id in ids])
        return [task_row(task_id, value) for task_id, value in zip(ids, values, strict=True) if value is not None]

    async def page(self, where: TaskFilter, before: Cursor | None, limit: int) -> TaskPage:
        with self._searches.one() if is_search(where) else nullcontext():
            found = await self._found(where, before, limit + 1)
        return page_of([light(row) for row in found], limit)

    async def _found(self, where: TaskFilter, before: Cursor | None, limit: int) -> list[SimpleNamespace]:
        """Newest first. Where something is looked for in rows, no more than a window of them are read."""
        found: list[SimpleNamespace] = []
        left, step = (SEARCH_WINDOW, PAGE) if is_scan(where) else (sys.maxsize, limit)
        with translated():
            async for ids in Walk(self._reader, self.keys, self._find).ids(where, before, limit):
                for start in range(0, len(ids), step):
                    some = ids[start : start + min(step, left)]
                    found += [row for row in await self._tasks(some) if matches(where, row)]
                    left -= len(some)
                    if len(found) >= limit or not left:
                        return found[:limit]
        return found

    async def _find(self, wanted: Mapping[str, Any]) -> Any:
        return await self._call("find", wanted, client=self._reader)

    async def events(self, task_id: str) -> Sequence[TaskEvent]:
        with translated():
            older: Any = await self._reader.lrange(self.keys("events", task_id), -10_000, -1)
        found = [event_of(task_id, unpacked(item)) for item in older]
        for row in await self._tasks([task_id]):
            found += [event_of(task_id, cells) for cells in row.events]
        return found

    async def events_after(self, seq: int, limit: int) -> Sequence[TaskEvent]:
        with translated():
            rows: Any = await self._reader.xrange(self.keys("feed"), min=f"({seq}-0", count=limit)
        return [told(fields) for _, fields in rows]

    async def audit(self, before: int | None, limit: int, where: AuditFilter = EVERY_ACT) -> Sequence[TaskEvent]:
        found: list[TaskEvent] = []
        size, looked, place = PAGE if where.asks else limit, 0, before
        with self._searches.one() if where.asks else nullcontext(), translated():
            while len(found) < limit and looked < SEARCH_WINDOW and (place is None or place > 1):
                newest = "+" if place is None else f"({place}-0"
                rows: Any = await self._reader.xrevrange(self.keys("audit"), max=newest, count=size)
                acts = [told(fields) for _, fields in rows]
                found += [act for act in acts if is_act(where, act)]
                if len(acts) < size:
                    break
                looked, place = looked + size, acts[-1].seq
        return found[:limit]

    async def is_revoked(self, session_id: str) -> bool:
        with translated():
            return await self._reader.zscore(self.keys("revoked"), session_id) is not None

    async def last_seq(self) -> int:
        with translated():
            return int(await self._reader.get(self.keys("seq")) or 0)

    async def logs(self, task_id: str, after: int, limit: int) -> Sequence[LogEntry]:
        with translated():
            rows: Any = await self._reader.xrange(self.keys("logs", task_id), min=f"({after}-0", count=limit)
        return [log_of(line_row(number, fields)) for number, fields in rows]

    async def counts(self) -> Sequence[Count]:
        with translated():
            counts: Any = await self._reader.hgetall(self.keys("counts"))
            micros: Any = await self._reader.hgetall(self.keys("micros"))
        rows = [(*level_of(key, n), int(micros.get(key, 0))) for key, n in counts.items() if int(n) > 0]
        return merged_counts(rows)

    async def queues(self) -> Sequence[QueueState]:
        with translated():
            known: Any = await self._reader.hgetall(self.keys("queues"))
        return queue_states((stored_queue(name, value) for name, value in known.items()), await self.counts())

    async def schedules(self) -> Sequence[ScheduleState]:
        with translated():
            known: Any = await self._reader.hgetall(self.keys("schedules"))
        rows = sorted((schedule_row(name, value) for name, value in known.items()), key=lambda row: row.name)
        last = {
            row.task_id: row.status for row in await self._tasks([row.last_task_id for row in rows if row.last_task_id])
        }
        for row in rows:
            row.last_status = last.get(row.last_task_id)
        return [schedule_of(row) for row in rows]

    async def scheduled(
        self, before: datetime | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[ScheduledOnce]:
        low = "-inf" if after is None else to_micros(after[0])
        high = "+inf" if before is None else f"({to_micros(before)}"
        place = None if after is None else (to_micros(after[0]), after[1])
        found: list[str] = []
        offset = 0
        while len(found) < limit:
            with translated():
                rows: Any = await self._reader.zrangebyscore(
                    self.keys("one_offs"), low, high, start=offset, num=limit, withscores=True
                )
            offset += len(rows)
            items = [(int(score), task_id.decode()) for task_id, score in rows]
            found += [task_id for score, task_id in items if place is None or (score, task_id) > place]
            if len(rows) < limit:
                break
        return [one_off_of(row) for row in await self._tasks(found[:limit])]

    async def groups(self, *, dismissed: bool, before: tuple[datetime, str] | None, limit: int) -> Sequence[ErrorGroup]:
        index = self.keys("failures_dismissed" if dismissed else "failures_open")
        high = "+inf" if before is None else to_micros(before[0])
        place = None if before is None else (to_micros(before[0]), before[1])
        found: list[str] = []
        offset = 0
        with translated():
            while len(found) < limit:
                rows: Any = await self._reader.zrevrangebyscore(
                    index, high, "-inf", start=offset, num=limit, withscores=True
                )
                offset += len(rows)
                items = [(int(score), key.decode()) for key, score in rows]
                found += [key for score, key in items if place is None or (score, key) < place]
                if len(rows) < limit:
                    break
            values: Any = await self._reader.hmget(self.keys("failures"), found[:limit]) if found else []
        rows = [group_row(key, value) for key, value in zip(found[:limit], values, strict=True) if value is not None]
        return [group_of(row) for row in rows]

    async def gauges(self, size: int, kind: str, since: datetime, series: str | None = None) -> Sequence[GaugeRow]:
        with translated():
            known: Any = await self._reader.zrangebyscore(
                self.keys("gauges", str(size), kind), to_micros(since), "+inf"
            )
            moments = [int(at) for at in known]
            async with self._reader.pipeline(transaction=False) as pipeline:
                for at in moments:
                    pipeline.hgetall(self.keys("gauge", str(size), kind, str(at)))
                hashes: Any = await pipeline.execute()
        found = []
        for at, cells in zip(moments, hashes, strict=True):
            for packed_key, sums in cells.items():
                name, _instance = texts(unpacked(packed_key))
                if series in (None, name):
                    found.append(GaugeRow(size, at, kind, name, sums.decode()))
        return found

    async def oldest(self, queues: Sequence[str]) -> Mapping[str, datetime]:
        with translated():
            levels: Any = await self._reader.hkeys(self.keys("levels"))
        waiting = [texts(unpacked(level)) for level in levels]
        found: dict[str, int] = {}
        for queue, name, status in waiting:
            if status == TaskStatus.PENDING and queue in queues:
                async for run_at in self._heads(self.keys("ready", queue, name)):
                    found[queue] = min(found.get(queue, run_at), run_at)
        return {queue: from_micros(run_at) for queue, run_at in found.items()}

    async def _heads(self, ready: str) -> AsyncIterator[int]:
        """When the first of each priority could start: ten digits of the priority, sixteen of the time."""
        place = "-"
        for _ in range(MOST_PRIORITIES):
            with translated():
                head: Any = await self._reader.zrangebylex(ready, place, "+", start=0, num=1)
            if not head:
                return
            yield int(head[0][10:26])
            place = f"({head[0][:10].decode()}:"  # behind all digits

    async def due(self, now: datetime) -> int:
        with translated():
            number = await self._reader.zcount(self.keys("due"), "-inf", to_micros(now))
        return min(int(number), STAGE_BATCH)

    async def instances(self) -> Sequence[InstanceRecord]:
        with translated():
            known: Any = await self._reader.hgetall(self.keys("instances"))
        rows = sorted(map(row_of_instance, known.values()), key=lambda row: row.started_at, reverse=True)
        return [instance_of(row) for row in rows if row.lease_until]

    async def cancels(self, instance_id: str) -> Sequence[AttemptId]:
        with translated():
            ids: Any = await self._reader.smembers(self.keys("stopping", instance_id))
        return [(row.task_id, row.attempt) for row in await self._tasks(texts(ids))]

    async def arguments(self, task_ids: Sequence[str], most: int) -> Mapping[str, str]:
        return {row.task_id: row.arguments[:most] for row in await self._tasks(task_ids)}

    # -- copies

    async def dump(self, kind: str, after: str, limit: int) -> Batch:
        with translated():
            return await redis_copies.Reader(self._reader, self.keys).read(kind, after, limit)

    async def load(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> int:
        with translated():
            return int(await self._call("load", redis_copies.argument(kind, rows), durably=True))

    # -- news

    def listen(self, wake: Callable[[], None]) -> None:
        self._news = asyncio.get_running_loop().create_task(self._hear(wake), name="taskflow-news")

    async def _hear(self, wake: Callable[[], None]) -> None:
        """Where nothing can be heard, the poll finds work a little later."""
        failures = 0
        while True:
            client = self._client(1)
            try:
                async with client.pubsub() as news:
                    await news.subscribe(self.keys("news"))
                    while True:
                        if await news.get_message(ignore_subscribe_messages=True, timeout=TIMEOUT / 2):
                            wake()
                        failures = 0
            except (redis.RedisError, OSError):
                failures += 1
                await asyncio.sleep(pause_after(failures))
            finally:
                with suppress(redis.RedisError, OSError):
                    await client.aclose(close_connection_pool=True)

    def announce(self) -> None:
        if self._announcing.permits():
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        with suppress(redis.RedisError, OSError):
            await self._reader.publish(self.keys("news"), b"")


def host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.partition(":")
    return host, int(port or SENTINEL_PORT)


# -- errors


def of_response(error: redis.ResponseError) -> Exception:
    """An answer that is no answer: of a server that starts, is full, or is no master any more, it is away; otherwise it
    is about what was sent."""
    away = isinstance(error, AWAY_KINDS) or any(word in str(error) for word in AWAY_ANSWERS)
    return BackendUnavailable(str(error)) if away else error


@contextmanager
def translated(kind: type[BackendUnavailable] = BackendUnavailable) -> Iterator[None]:
    try:
        yield
    except AWAY as error:
        raise kind(str(error)) from error
    except redis.ResponseError as error:
        raise of_response(error) from error
