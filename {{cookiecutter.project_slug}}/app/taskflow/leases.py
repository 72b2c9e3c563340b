"""Whose lease has lapsed, judged by what this process saw itself.

Owns the memory of other instances' heartbeats. Clocks of machines differ and are stepped, and a database that was away
held everybody's heartbeat up. So nobody's word about the time counts here: a lease has lapsed when its owner's
heartbeat stayed the same for the whole of it, on the monotonic clock of an observer that could read and write all the
while. Whatever kept the observer from looking begins the observation anew. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .backends.base import Pulse

LOOKS_PER_LEASE = 6


class Sighting(NamedTuple):
    stamp: int
    since: float
    """Monotonic seconds at which this stamp was first seen."""


class Watch:
    def __init__(self, lease: float, interval: float) -> None:
        """`lease`: seconds granted to who named none. `interval`: seconds between two looks when nothing is amiss."""
        self._lease = lease
        self._interval = interval
        self._sightings: dict[str, Sighting] = {}
        self._looked = 0.0

    def restart(self) -> None:
        """Nothing that was seen so far counts: this process could not read or write for a while."""
        self._sightings = {}

    def forget(self, instances: Iterable[str]) -> None:
        for instance_id in instances:
            self._sightings.pop(instance_id, None)

    def look(self, pulses: Sequence[Pulse], now: float) -> list[Pulse]:
        """Those whose lease has lapsed. `now` is monotonic."""
        gap, self._looked = now - self._looked, now
        self._sightings = {pulse.instance.instance_id: self._seen(pulse, now, gap) for pulse in pulses}
        return [pulse for pulse in pulses if self._has_lapsed(pulse, now)]

    def _seen(self, pulse: Pulse, now: float, gap: float) -> Sighting:
        known = self._sightings.get(pulse.instance.instance_id)
        was_away = gap > max(3 * self._interval, (pulse.lease or self._lease) / 2)
        if known is None or known.stamp != pulse.stamp or was_away:
            return Sighting(pulse.stamp, now)
        return known

    def _has_lapsed(self, pulse: Pulse, now: float) -> bool:
        if pulse.signed_off:
            return True
        return now - self._sightings[pulse.instance.instance_id].since >= (pulse.lease or self._lease)
