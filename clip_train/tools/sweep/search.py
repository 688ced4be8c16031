"""The search itself: start runs while there is room, read what they measure, and remember how each trial ended."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from clip_train.config import load
from clip_train.errors import TrainingFailed, UserError
from clip_train.metrics.panel import say
from clip_train.sweep_config import Pruner
from clip_train.tools.sweep.study import WHOLE_RUN, State, Study, Trial
from clip_train.tools.sweep.summary import write_summary
from clip_train.tools.sweep.trial_run import Ended, Outcome, TrialRun, outcome_of

if TYPE_CHECKING:
    from clip_train.tools.sweep.devices import Slot
    from clip_train.tools.sweep.settings import Settings
    from clip_train.tools.trials import TrialProcesses

_SECONDS_BETWEEN_LOOKS = 0.3
_MOST_CHARACTERS = 200  # of a reason, in a line


class Search:
    """The trials under way, and what happens when one of their runs ends.

    Args:
        settings: the sweep.
        study: its memory, with the trials of earlier sessions.
        slots: room for runs.
        processes: starts them, and knows of a signal that asks for the end.
    """

    def __init__(self, settings: Settings, *, study: Study, slots: list[Slot], processes: TrialProcesses) -> None:
        self._settings, self._study, self._processes = settings, study, processes
        self._free = deque(slots)
        self._waiting: list[TrialRun] = []
        self._running: list[TrialRun] = []
        self._open: dict[int, Trial] = {}
        self._scores: dict[int, dict[int, float]] = {}  # number of the trial -> seed -> metric
        self._pruned: dict[int, str] = {}  # number of the trial -> where
        trials = study.trials()
        self._num_asked = len(trials)
        self._num_failed = sum(trial.state is State.failed for trial in trials)

    def run(self) -> None:
        """Go on until all trials have ended, too many have failed, or a signal asks for the end.

        Raises:
            UserError: a run has ended and gave other metrics than the one that is searched for.
        """
        for trial in self._study.unfinished():
            self._begin(trial)
        while True:
            self._collect()
            self._fill()
            if not self._running and not (self._may_start and (self._waiting or self._may_ask)):
                break
            self._judge()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    @property
    def has_failed_too_often(self) -> bool:
        """Whether more trials failed than `sweep.max_failures` allows."""
        limit = self._settings.options.max_failures
        return limit is not None and self._num_failed > limit

    @property
    def _may_start(self) -> bool:
        return not self._processes.stop_signal and not self.has_failed_too_often

    @property
    def _may_ask(self) -> bool:
        return self._num_asked < self._settings.options.trials

    def _collect(self) -> None:
        """Take the runs whose processes have ended."""
        for run in list(self._running):
            outcome = run.poll()
            if outcome is not None:
                assert run.slot is not None
                self._running.remove(run)
                self._free.appendleft(run.slot)
                self._end_run(run, outcome)

    def _fill(self) -> None:
        """Start runs while there is room: first those that wait, then those of new trials."""
        held = [run for run in self._waiting if run.is_elsewhere]  # it outlived the sweep before, and needs no start
        while len(self._free) > len(held) and self._may_start:
            run = next((run for run in self._waiting if run not in held), None)
            if run is not None:
                self._waiting.remove(run)
                self._start(run)
            elif self._may_ask:
                self._num_asked += 1
                self._begin(self._study.ask())
            else:
                break

    def _begin(self, trial: Trial) -> None:
        self._open[trial.number] = trial
        run = self._run_of(trial, seed=0)
        try:
            config = load("train", run.arguments)
            run.total_steps = config.total_steps(0) if config.epochs is None else None
        except UserError as error:
            self._fail(trial.number, str(error))
            return
        self._waiting.append(run)

    def _run_of(self, trial: Trial, *, seed: int) -> TrialRun:
        folder, arguments = self._settings.run_of(trial.values, number=trial.number, seed=seed)
        return TrialRun(folder, number=trial.number, seed=seed, arguments=arguments)

    def _start(self, run: TrialRun) -> None:
        outcome = outcome_of(run.folder)
        if outcome.ended in (Ended.finished, Ended.failed):  # while no sweep was there to see it
            self._end_run(run, outcome)
            return
        run.slot = self._free.popleft()
        run.start(self._processes, slot=run.slot)
        self._running.append(run)
        values = " ".join(f"{key}={value}" for key, value in self._open[run.number].values.items())
        seed = f", seed {run.seed + 1} of {self._settings.options.seeds}" if self._settings.options.seeds > 1 else ""
        say(f"trial {run.number}{seed}: {values}" + (f" on {run.slot.name}" if run.slot.name else ""))

    def _judge(self) -> None:
        """Show the pruner what is new, and stop the runs that it gives up."""
        if self._settings.options.pruner is Pruner.none:
            return
        for run in self._running:
            if run.seed or run.number in self._pruned or run.total_steps is None:
                continue
            history = self._settings.objective.history(run.folder)
            for step, value in history[run.num_judged :]:
                run.num_judged += 1
                percent = WHOLE_RUN * step // run.total_steps
                if percent < WHOLE_RUN and self._study.report(run.number, percent=percent, value=value):
                    self._pruned[run.number] = f"at step {step:,} of {run.total_steps:,}"
                    run.stop()
                    break

    def _end_run(self, run: TrialRun, outcome: Outcome) -> None:
        """Draw the conclusion for the run's trial."""
        if run.number not in self._open:  # another of its seeds has failed
            return
        if outcome.ended is Ended.finished:
            self._add_score(run)
        elif run.number in self._pruned:
            self._study.prune(run.number, reason=self._pruned[run.number])
            self._close(run.number, f"pruned {self._pruned[run.number]}")
        elif outcome.ended is Ended.failed:
            self._fail(run.number, outcome.reason)
        elif not self._processes.stop_signal:  # somebody killed or stopped it
            self._fail(run.number, outcome.reason, by_its_values=False)

    def _add_score(self, run: TrialRun) -> None:
        trial, objective = self._open[run.number], self._settings.objective
        scores = self._scores.setdefault(run.number, {})
        try:
            scores[run.seed] = objective.final(run.folder)
        except TrainingFailed as error:
            self._fail(run.number, str(error))
            return
        num_seeds = self._settings.options.seeds
        if run.seed == 0 and num_seeds > 1:
            self._waiting[:0] = [self._run_of(trial, seed=seed) for seed in range(1, num_seeds)]
        if len(scores) == num_seeds:
            self._study.finish(run.number, scores=[scores[seed] for seed in range(num_seeds)])
            self._close(run.number, f"{objective.metric} {self._standing(run.number)}")

    def _standing(self, number: int) -> str:
        """Return the score of a trial that has just finished, and the best one beside it."""
        score, best = self._study.trials()[number].score, self._study.best()
        assert score is not None and best is not None and best.score is not None
        beside = "the best so far" if best.number == number else f"best {best.score:.5g} (trial {best.number})"
        return f"{score:.5g}, {beside}"

    def _fail(self, number: int, reason: str, *, by_its_values: bool = True) -> None:
        self._num_failed += 1
        self._study.fail(number, reason=reason, by_its_values=by_its_values)
        self._close(number, f"failed: {reason[:_MOST_CHARACTERS]}")
        self._waiting = [run for run in self._waiting if run.number != number]
        for run in self._running:
            if run.number == number:
                run.stop()

    def _close(self, number: int, said: str) -> None:
        del self._open[number]
        say(f"trial {number}: {said}")
        write_summary(self._settings, study=self._study)
