"""`clip-train sweep`: search, and say what was found."""

from __future__ import annotations

import signal

from clip_train.checkpoint.lock import RunLock
from clip_train.errors import Preempted
from clip_train.metrics.panel import say
from clip_train.tools.sweep.batch_size import learning_rate_hints
from clip_train.tools.sweep.devices import slots_of
from clip_train.tools.sweep.search import Search
from clip_train.tools.sweep.settings import Settings, read_settings
from clip_train.tools.sweep.study import State, Study, require_optuna
from clip_train.tools.sweep.summary import print_summary, write_summary
from clip_train.tools.trials import TrialProcesses, require_no_launcher


def sweep_command(overrides: list[str]) -> int:
    """Search, print the trials in order of their metric and the best command, and return the exit code.

    The same command goes on where it stood: trials that have ended are not run again, one that was under way continues
    from its checkpoint. SIGINT and SIGTERM end the trials, which save, and the sweep.

    Raises:
        UserError: the command is wrong, Optuna is missing, or the folder is another sweep's or in use.
    """
    require_no_launcher("sweep")
    require_optuna()
    settings = read_settings(overrides)
    slots = slots_of(settings.options, device=settings.base.device)
    settings.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(settings.folder, key="sweep.dir", say=say)
    try:
        settings.require_same()
        study = Study(
            settings.folder, space=settings.space, options=settings.options, direction=settings.objective.direction
        )
        for hint in learning_rate_hints(settings):
            say(hint)
        with TrialProcesses() as processes:
            search = Search(settings, study=study, slots=slots, processes=processes)
            search.run()
        print_summary(settings, study=study)
        say(f"summary: {write_summary(settings, study=study)}")
        return _exit_code(search, study=study, stopped_by=processes.stop_signal, settings=settings)
    finally:
        lock.release()


def _exit_code(search: Search, *, study: Study, stopped_by: int, settings: Settings) -> int:
    """Like a run's: 0 after its end or Ctrl-C, 85 after SIGTERM, 1 if nothing came of it."""
    if stopped_by:
        say("stopped: every trial saved what it had; the same command goes on")
        return Preempted.exit_code if stopped_by == signal.SIGTERM else 0
    if search.has_failed_too_often:
        say(f"ended: more trials failed than sweep.max_failures={settings.options.max_failures}")
        return 1
    return 0 if any(trial.state is State.finished for trial in study.trials()) else 1
