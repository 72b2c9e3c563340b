"""Workers: the processes that serve these tasks, how busy they are, and which version each runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...models import InstanceRecord
from .desk import Desk


def add_routes(router: APIRouter, desk: Desk) -> None:
    @router.get("/dashboard/workers")
    async def workers(request: Request) -> Response:
        seq = await desk.feed.head()
        now = desk.now()
        rows = facts(await desk.store.instances(), now)
        me = desk.site.manager.instance_id
        return desk.renderer.page(request, "workers.html", seq=seq, now=now, workers=rows, me=me)


@dataclass(frozen=True, slots=True)
class Worker:
    instance: InstanceRecord
    alive: bool
    differs: bool
    """Whether most others run another version."""

    @property
    def busy(self) -> float:
        return min(1.0, self.instance.running / self.instance.slots) if self.instance.slots else 0.0


def facts(instances: Sequence[InstanceRecord], now: datetime) -> list[Worker]:
    """Those alive first, the newest first among them."""
    alive = [item for item in instances if item.alive(now)]
    versions = Counter(item.version for item in alive)
    usual = versions.most_common(1)[0][0] if versions else ""
    rows = [Worker(item, item.alive(now), item.version != usual) for item in instances]
    return sorted(rows, key=lambda row: (not row.alive, -row.instance.started.timestamp()))
