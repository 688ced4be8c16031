"""One attempt at a run, from the start of its process to its end: who is gone, how it ended, what it cost.

`exit.json` says how the newest attempt ended; `attempts.jsonl` has a line for each, so that costs add up over restarts.
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from clip_train.checkpoint.lock import is_held_by_another, live_owner
from clip_train.data.audit import AUDIT_NAME, read_audit
from clip_train.distributed.ranks import own_rank
from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World, set_timeout
from clip_train.errors import ClipTrainError, IntegrityError, Preempted, UserError, writing
from clip_train.exit_record import EXIT_NAME, ExitRecord, launch_id, now, restart_count
from clip_train.files import replace_file
from clip_train.metrics.panel import say
from clip_train.redact import redact

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from clip_train.distributed.config import DistributedConfig

ATTEMPTS_NAME = "attempts.jsonl"
SECONDS_FOR_RECORD = 30.0  # ranks that end in order wait so long for rank 0 to have written exit.json
_REASON_CHARACTERS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """A line of `attempts.jsonl`. It is written when training begins and completed at the end."""

    start: str  # UTC, ISO 8601
    end: str | None = None  # of a killed attempt: when its last step began; null until the next one begins
    host: str  # of rank 0
    world: int  # ranks
    device: str
    first_step: int  # steps done before it
    last_step: int | None = None
    code: int | None = None  # null: killed, or under way
    launch_id: str

    @property
    def device_hours(self) -> float:
        """Hours of one device, which is an accelerator or else a process on the CPU."""
        until = datetime.fromisoformat(self.end) if self.end else datetime.now(UTC)
        return self.world * (until - datetime.fromisoformat(self.start)).total_seconds() / 3600


class Attempt:
    """Follows a run in this process and writes down its end. A context manager around all of it.

    If a collective failed since another rank is gone, the error that leaves it names that rank.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._start = now()
        self._world: World | None = None
        self._timeout_seconds = 0.0
        self._step: int | None = None
        self._finished = False
        self._record: AttemptRecord | None = None

    def __enter__(self) -> Attempt:
        if self._is_main and not restart_count():
            with writing(f"run_dir={self._run_dir}"):  # what an earlier launch left: from here on the run is alive
                (self._run_dir / EXIT_NAME).unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        roll_call = self._world.roll_call if self._world else None
        missing = roll_call.explain(error) if roll_call and error else None
        code, reason = _code_and_reason(missing or error)
        if roll_call is not None:
            roll_call.leave(code=code, reason=reason, followed=missing is not None)
        if self._is_main and not (self._finished and code in (0, Preempted.exit_code)):
            self.record_end(code=code, reason=reason)
        if missing is not None:
            raise missing from error

    def join(self, world: World, *, config: DistributedConfig) -> World:
        """Take part with the other ranks, and return `world`."""
        self._world, self._timeout_seconds = world, config.timeout_seconds
        if world.roll_call is not None:
            world.roll_call.start()
        return world

    def begin(self, step: int) -> None:
        """Note where training begins. Rank 0 holds the lock of the run directory by now.

        Raises:
            UserError: the directory cannot be written.
            IntegrityError: `attempts.jsonl` is damaged.
        """
        assert self._world is not None
        self._step = step
        if self._world.roll_call is not None:
            self._world.roll_call.step = step
        if self._world.is_main:
            self._record = AttemptRecord(
                start=self._start, host=socket.gethostname(), world=self._world.size, device=self._world.device.type,
                first_step=step, launch_id=launch_id(),
            )  # fmt: skip
            with writing(f"run_dir={self._run_dir}"):
                _write_attempts(self._run_dir, [*_completed(self._run_dir), self._record])

    def stepped(self, step: int) -> None:
        """Note that so many steps are done."""
        if self._timeout_seconds:
            set_timeout(self._timeout_seconds)
            self._timeout_seconds = 0.0
        self._step = step
        if self._world is not None and self._world.roll_call is not None:
            self._world.roll_call.step = step

    def finish(self, reason: StopReason) -> None:
        """Write down why training ends, with everything saved. Every rank calls it."""
        self._finished = True
        roll_call = self._world.roll_call if self._world else None
        if self._is_main:
            preempted = reason is StopReason.preempted
            text = f"stopped: {reason.name.replace('_', ' ')}" if reason else "finished"
            self.record_end(code=Preempted.exit_code if preempted else 0, reason=text)
            if roll_call is not None:
                roll_call.announce("recorded")
        elif roll_call is not None:
            # A launcher ends the others when the first rank leaves, and rank 0 still has to write.
            roll_call.await_announcement("recorded", seconds=SECONDS_FOR_RECORD)

    def record_end(self, *, code: int, reason: str) -> None:
        """Write `exit.json` and complete `attempts.jsonl`, unless another process holds the run. Rank 0 calls it."""
        if code == UserError.exit_code and not self._run_dir.exists():
            return  # a mistyped command leaves no folder behind
        record = ExitRecord(code=code, reason=redact(reason), step=self._step, time=now(), launch_id=launch_id())
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            if is_held_by_another(self._run_dir):
                return
            record.write(self._run_dir)
            if self._record is not None:
                ended = replace(self._record, end=record.time, last_step=self._step, code=code)
                lines = read_attempts(self._run_dir)
                _write_attempts(self._run_dir, [ended if line == self._record else line for line in lines])
        except OSError as error:  # why the run ended matters more than that this could not be written down
            say(f"{self._run_dir}: its end could not be written down ({error})")

    @property
    def _is_main(self) -> bool:
        if self._world is not None:
            return self._world.is_main
        return own_rank() == "0"


def read_attempts(run_dir: Path) -> list[AttemptRecord]:
    """Return the attempts at a run in order; none if it was never begun.

    Raises:
        IntegrityError: `attempts.jsonl` is damaged.
    """
    path = run_dir / ATTEMPTS_NAME
    if not path.exists():
        return []
    try:
        return [AttemptRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{path}: not a list of attempts ({error}); delete it to count from now on") from error


def attempts_so_far(run_dir: Path) -> list[AttemptRecord]:
    """Return the attempts as `read_attempts` does; one that was killed ends with the step that it noted last."""
    return read_attempts(run_dir) if live_owner(run_dir) else _completed(run_dir)


def _completed(run_dir: Path) -> list[AttemptRecord]:
    attempts, audit = read_attempts(run_dir), run_dir / AUDIT_NAME
    if attempts and attempts[-1].end is None:
        end, step = attempts[-1].start, attempts[-1].first_step
        if audit.exists():
            noted = datetime.fromtimestamp(audit.stat().st_mtime, UTC).isoformat(timespec="seconds")
            end, step = max(end, noted), max(step, len(read_audit(run_dir)))
        attempts[-1] = replace(attempts[-1], end=end, last_step=step)
    return attempts


def _write_attempts(run_dir: Path, attempts: list[AttemptRecord]) -> None:
    replace_file(run_dir / ATTEMPTS_NAME, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))


def _code_and_reason(error: BaseException | None) -> tuple[int, str]:
    if error is None:
        return 0, "finished"
    text = str(error) if isinstance(error, ClipTrainError) else repr(error)
    reason = text.strip().split("\n")[0][:_REASON_CHARACTERS]
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else int(error.code is not None)), reason
    return (error.exit_code if isinstance(error, ClipTrainError) else 1), reason
