"""Workers: the processes that serve these tasks, how busy they are, and which version each runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...models import InstanceRecord
from ..auth import actor_of
from .desk import Desk

MOST_LOST = 20
"""That are listed."""


def add_routes(router: APIRouter, desk: Desk) -> None:
    @router.get("/dashboard/workers")
    @desk.live
    async def workers(request: Request) -> Response:
        now = desk.now()
        instances = await desk.store.instances()
        # A process that was drained says of itself that it has no slots.
        resting = [item.instance_id for item in instances if not item.slots]
        drained = await asyncio.gather(*map(desk.store.is_drained, resting))
        rows = facts(instances, now, {one for one, is_drained in zip(resting, drained, strict=True) if is_drained})
        me, lost = desk.site.manager.instance_id, await desk.store.lost()
        return desk.renderer.page(
            request,
            "workers.html",
            now=now,
            workers=rows,
            me=me,
            lost=lost[:MOST_LOST],
            more=len(lost) > MOST_LOST,
        )

    @router.post("/dashboard/workers/{instance_id}/drain")
    async def drain(request: Request, instance_id: str) -> Response:
        await desk.store.drain_instance(instance_id, actor_of(request))
        return desk.go_to(request, "/workers")


@dataclass(frozen=True, slots=True)
class Worker:
    instance: InstanceRecord
    alive: bool
    differs: bool
    """Whether most others run another version."""
    drained: bool = False
    """Whether somebody had it start no more tasks."""

    @property
    def busy_kinds(self) -> list[tuple[str, int]]:
        """Executors that have calls under way, and how many."""
        vitals = self.instance.vitals
        return [(kind, calls) for kind, (calls, _) in vitals.busy.items() if calls] if vitals else []

    @property
    def busy(self) -> float:
        return min(1.0, self.instance.running / self.instance.slots) if self.instance.slots else 0.0


def facts(instances: Sequence[InstanceRecord], now: datetime, drained: Collection[str] = ()) -> list[Worker]:
    """Those alive first, the newest first among them."""
    alive = [item for item in instances if item.alive(now)]
    versions = Counter(item.version for item in alive)
    usual = versions.most_common(1)[0][0] if versions else ""
    rows = [Worker(item, item.alive(now), item.version != usual, item.instance_id in drained) for item in instances]
    return sorted(rows, key=lambda row: (not row.alive, -row.instance.started.timestamp()))
