"""What a search has spent and promised, in device-seconds: never more than it may spend.

A trial takes its devices under a lease with a limit in seconds. Everything that leases could still
cost, used or not, counts as committed, and committed never exceeds the budget: a lease that would
is not granted. Who holds devices gives them back, or is killed, before the limit (`tune_worker`).
Each event is written to `ledger.jsonl` before it counts; what a killed search left open is charged.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fifa_ray.run_dir import RunDir

FILE = "ledger.jsonl"
# Added to what work is expected to take: for giving the devices back before the limit.
MARGIN_SECONDS = 2.0
Purpose = Literal["search", "final"]


@dataclass
class Lease:
    """Devices that a trial holds: for at most `limit` seconds, from `started` on its ledger's clock
    (None: not yet), which is charged to the trial.
    """

    trial: str
    purpose: Purpose
    devices: float
    limit: float
    opened_at: float
    started: float | None = None
    charge: float | None = None


class Ledger:
    """The one account of a search. Amounts are device-seconds, `final_share` of them kept for the
    re-run of its winner.
    """

    def __init__(
        self,
        run: RunDir,
        folder: str,
        *,
        budget: float,
        final_share: float,
        safety: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Go on from what is in `folder`; leases that were left open are closed and charged."""
        self.run, self.folder = run, folder
        self.budget, self.final_share, self.safety = budget, final_share, safety
        self.clock, self.wall_clock = clock, wall_clock
        self.leases: dict[str, Lease] = {}
        # Part of the work -> the longest that one unit of it has taken, in seconds.
        self.rates: dict[str, float] = {}
        self.lines: list[str] = []
        self.refusals = 0
        if run.exists(folder, FILE):
            self._read(run.read_text(folder, FILE))

    # Amounts

    def spent(self, trial: str | None = None) -> float:
        """Device-seconds charged so far, with what open leases have used, for one trial or all."""
        leases = [x for x in self.leases.values() if trial is None or x.trial == trial]
        return sum(self._used(x) if x.charge is None else x.charge for x in leases)

    def charges(self) -> dict[str, float]:
        """Device-seconds by trial."""
        return {t: self.spent(t) for t in {lease.trial for lease in self.leases.values()}}

    def committed(self) -> float:
        """Device-seconds charged, and the most that open leases may come to."""
        return sum(
            lease.devices * lease.limit if lease.charge is None else lease.charge
            for lease in self.leases.values()
        )

    def free(self, purpose: Purpose) -> float:
        """Device-seconds that nobody has a claim to, as far as this purpose may use them."""
        share = self.final_share if purpose == "search" else 0.0
        return self.budget * (1 - share) - self.committed()

    def room(self, purpose: Purpose, units: Mapping[str, float], devices: float) -> str:
        """Whether such work could start: "yes", "later" (when others give back), or "no"."""
        seconds = self.estimate(units)
        needed = devices * (MARGIN_SECONDS if seconds is None else seconds)
        if self.refusals >= 3:
            return "no"
        if needed <= self.free(purpose):
            return "yes"
        unused = sum(x.devices * x.limit - self._used(x) for x in self._open().values())
        return "later" if needed <= self.free(purpose) + unused and unused else "no"

    # Rates

    def measure(self, part: str, units: float, seconds: float) -> None:
        """Learn that `units` of a part of the work took so many seconds."""
        if units > 0 and seconds > self.rates.get(part, 0.0) * units:
            self.rates[part] = seconds / units
            self._write({"event": "rate", "part": part, "seconds": seconds / units})

    def estimate(self, units: Mapping[str, float]) -> float | None:
        """Seconds to set aside for units of parts; None where one was never measured."""
        used = {part: count for part, count in units.items() if count > 0}
        if not set(used) <= set(self.rates):
            return None
        expected = sum(self.rates[part] * count for part, count in used.items())
        return self.safety * expected + MARGIN_SECONDS

    # Leases

    def open(
        self, trial: str, purpose: Purpose, devices: float, units: Mapping[str, float]
    ) -> str | None:
        """A lease for so much work; for all that is free where it was never measured.

        None where that is not free, or the trial holds one already.
        """
        seconds = self.estimate(units)
        if seconds is None:
            seconds = self.free(purpose) / devices
        held = any(lease.trial == trial for lease in self._open().values())
        if held or seconds <= 0 or seconds * devices > self.free(purpose) + 1e-9:
            self.refusals += not held
            return None
        self.refusals = 0
        name = f"{trial}-{len(self.leases):04d}"
        entry = {"trial": trial, "purpose": purpose, "devices": devices, "limit": seconds}
        self._write({"event": "open", "lease": name, **entry})
        self.leases[name] = Lease(trial, purpose, devices, seconds, self.wall_clock())
        return name

    def start(self, lease: str, held: float) -> float:
        """The devices are there, and have been for `held` seconds; seconds that remain."""
        if self.leases[lease].started is None:
            self.leases[lease].started = self.clock() - held
            self._write({"event": "start", "lease": lease, "held": held})
        return self.remaining(lease)

    def remaining(self, lease: str) -> float:
        """Seconds until the lease's limit; 0 for one that is closed."""
        found = self.leases[lease]
        return found.limit - self._held(found) if found.charge is None else 0.0

    def renew(self, lease: str, units: Mapping[str, float]) -> bool:
        """Let the lease last for so much more work from now on, if that is free."""
        found, seconds = self.leases[lease], self.estimate(units)
        if found.charge is not None:
            return False
        if seconds is None:
            return True
        return self._set_limit(lease, self._held(found) + seconds)

    def prolong(self, lease: str, seconds: float) -> float:
        """Add seconds to the limit, as far as they are free; the seconds that remain then."""
        found = self.leases[lease]
        more = min(seconds, self.free(found.purpose) / found.devices)
        if found.charge is None and more > 0:
            self._set_limit(lease, found.limit + more)
        return self.remaining(lease)

    def close(self, lease: str) -> float:
        """The devices are given back: the trial is charged what it held them for.

        From the beginning where they never said that they are there, which may be too much.
        """
        found = self.leases[lease]
        if found.charge is None:
            since_opened = self.wall_clock() - found.opened_at
            held = since_opened if found.started is None else self._held(found)
            self._charge(lease, min(held, found.limit))
        assert found.charge is not None
        return found.charge

    def close_trial(self, trial: str | None = None) -> None:
        """Close every lease of a trial; None: of all."""
        for name, lease in self._open().items():
            if trial is None or lease.trial == trial:
                self.close(name)

    # Inside

    def _open(self) -> dict[str, Lease]:
        return {name: lease for name, lease in self.leases.items() if lease.charge is None}

    def _held(self, lease: Lease) -> float:
        return 0.0 if lease.started is None else self.clock() - lease.started

    def _used(self, lease: Lease) -> float:
        """Device-seconds of an open lease so far; its holder dies before the limit."""
        return lease.devices * min(self._held(lease), lease.limit)

    def _set_limit(self, name: str, limit: float) -> bool:
        lease = self.leases[name]
        if lease.devices * (limit - lease.limit) > self.free(lease.purpose) + 1e-9:
            return False
        self._write({"event": "limit", "lease": name, "limit": limit})
        lease.limit = limit
        return True

    def _charge(self, name: str, seconds: float, **why: Any) -> None:
        lease = self.leases[name]
        charge = lease.devices * max(0.0, seconds)
        self._write(
            {"event": "close", "lease": name, "trial": lease.trial, "charge": charge, **why}
        )
        lease.charge = charge

    def _write(self, entry: dict[str, Any]) -> None:
        self.lines.append(json.dumps({"at": round(self.wall_clock(), 3)} | entry))
        self.run.write_text("\n".join(self.lines) + "\n", self.folder, FILE)

    def _read(self, text: str) -> None:
        self.lines = text.splitlines()
        for line in self.lines:
            entry = json.loads(line)
            if entry["event"] == "rate":
                self.rates[entry["part"]] = entry["seconds"]
                continue
            name = entry["lease"]
            if entry["event"] == "open":
                self.leases[name] = Lease(
                    entry["trial"], entry["purpose"], entry["devices"], entry["limit"], entry["at"]
                )
            elif entry["event"] == "limit":
                self.leases[name].limit = entry["limit"]
            elif entry["event"] == "close":
                self.leases[name].charge = entry["charge"]
        for name, lease in self._open().items():
            # Nobody knows when its processes died: no later than now, nor than their limit.
            held = min(lease.limit, self.wall_clock() - lease.opened_at)
            self._charge(name, held, interrupted=True)
