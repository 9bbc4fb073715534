"""`lit-rlhf doctor`: what went wrong in a run, by the curves that it has written."""

import csv
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from lit_rlhf.callbacks.alarm_rules import RULES, Curve, alarms
from lit_rlhf.errors import UserError, require_types

EVENTS, TABLE = "events.out.tfevents.*", "metrics.csv"
CONFIG = "config.yaml"  # that the command line writes beside the curves of a run
NOT_OF_TRAINING = re.compile("val/|test/|perf/|memory/|hp_metric|epoch")
Curves = dict[str, Curve]
NOTHING = Curve([], [])


class Log(NamedTuple):
    """What a Trainer has written at one go."""

    folder: Path
    curves: Curves

    @property
    def steps(self) -> list[int]:
        """Those at which training was logged, in order; none where nothing was trained."""
        return sorted({step for tag, curve in self.curves.items() if trained(tag) for step in curve.steps})


def doctor(run: str) -> None:
    """Look at the curves of a run, which may be under way, and say what is wrong, since when, and what helps.

    Of the logs of one run (version_0, version_1 ...) it judges the newest that training has written, and what that
    went on from. Logs of `validate`, `test` and of a `fit` that was refused are passed over.

    Args:
        run: the run's folder (runs/ppo), that of one of its logs (runs/ppo/lightning_logs/version_0), or a folder of
            runs, each of which is judged.

    Raises:
        UserError: there is no run, or none has written curves of training.
    """
    require_types(doctor, locals())
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"run: there is no folder {folder.absolute()}; name that of a run, such as runs/ppo")
    runs = {place: [read(log) for log in logs] for place, logs in logs_below(folder).items()}
    if not any(curve.steps for logs in runs.values() for log in logs for curve in log.curves.values()):
        where = " and ".join(str(log.folder.absolute()) for logs in runs.values() for log in logs[-1:])
        raise UserError(f"run: {where} holds no curve: its run logged nothing, or the file is damaged")
    if not any(log.steps for logs in runs.values() for log in logs):
        raise UserError(
            f"run: the logs in {folder.absolute()} hold no curve of training, only of validation: the run has not "
            "begun, or has logged no step (trainer.log_every_n_steps)"
        )
    for place, logs in runs.items():
        judge(place, logs)


def judge(place: Path, logs: list[Log]) -> None:
    """Print what is wrong with one run.

    Args:
        place: the folder of its logs.
        logs: oldest first.
    """
    learnt = [log for log in logs if log.steps]
    if not learnt:
        print(f"{place}: passed over, it holds no curve of training")
        return
    for log in logs[logs.index(learnt[-1]) + 1 :]:
        print(f"{log.folder}: passed over, it holds no curve of training")
    parts, curves = joined(learnt)
    found = list(alarms(curves))
    steps = max(curve.steps[-1] for curve in curves.values() if curve.steps)
    names = " and ".join([str(parts[0].folder), *(part.folder.name for part in parts[1:])])
    print(f"{names}: {len(curves)} curves up to step {steps}, {len(RULES)} rules, {len(found)} alarms")
    for alarm in found:
        print(f"\n{alarm.rule}\n  saw: {alarm.tag} {alarm.saw}\n  since: step {alarm.since}\n  try: {alarm.remedy}")


def joined(logs: list[Log]) -> tuple[list[Log], Curves]:
    """The newest log with those that it goes on from, each up to where the next begins.

    Args:
        logs: of training, oldest first.

    Returns:
        The logs that are read, oldest first, and their curves.
    """
    parts, curves = [logs[-1]], logs[-1].curves
    for earlier in reversed(logs[:-1]):
        begins = parts[0].steps[0]
        if goes_on(earlier, parts[0]):
            parts.insert(0, earlier)
            curves = {
                tag: upto(earlier.curves.get(tag, NOTHING), begins, curves.get(tag, NOTHING))
                for tag in {**earlier.curves, **curves}
            }
    return parts, curves


def upto(before: Curve, step: int, after: Curve) -> Curve:
    """A curve as far as a step, and another from there."""
    kept = [(at, value) for at, value in zip(before.steps, before.values, strict=True) if at < step]
    return curve_of([*kept, *zip(after.steps, after.values, strict=True)])


def goes_on(before: Log, after: Log) -> bool:
    """Whether training went on in a log from a checkpoint of the run of another, by its steps and by its config."""
    config = after.folder / CONFIG
    if config.is_file():
        with config.open(encoding="utf-8") as stream:
            asked = yaml.safe_load(stream)
        if isinstance(asked, Mapping) and asked.get("ckpt_path", "unknown") is None:
            return False
    steps = before.steps
    # A checkpoint lies within an interval of logging after the last point, and the next point within another.
    interval = max(late - early for early, late in zip([-1, *steps], steps, strict=False))
    return steps[0] < after.steps[0] <= steps[-1] + 2 * interval


def trained(tag: str) -> bool:
    """Whether a curve is of what was learnt."""
    return NOT_OF_TRAINING.match(tag) is None


def logs_below(folder: Path) -> dict[Path, list[Path]]:
    """By run, the files of curves of its logs, oldest first.

    Raises:
        UserError: there is none.
    """
    files = [*folder.rglob(EVENTS), *folder.rglob(TABLE)]
    if not files:
        raise UserError(
            f"run: {folder.absolute()} has no curves: neither TensorBoard's ({EVENTS}) nor those of a CSVLogger "
            f"({TABLE}) are in it or below; name the folder of a run that has logged"
        )
    newest = {file.parent: file for file in sorted(files, key=lambda file: file.stat().st_mtime)}
    runs: dict[Path, list[Path]] = {}
    for log in sorted(newest, key=lambda log: (log.parent, version_of(log))):
        place = log.parent if version_of(log) >= 0 and log != folder else log
        runs.setdefault(place, []).append(newest[log])
    return runs


def version_of(folder: Path) -> int:
    """N of version_N, as loggers number the logs of a run; -1 of others."""
    number = folder.name.removeprefix("version_")
    return int(number) if number != folder.name and number.isdigit() else -1


def read(file: Path) -> Log:
    """What is in a file of curves, or beside it."""
    return Log(file.parent, read_table(file) if file.name == TABLE else read_events(file.parent))


def read_events(folder: Path) -> dict[str, Curve]:
    """The scalars that TensorBoard shows of a folder, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    read = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: curve_of([(one.step, one.value) for one in points]) for tag, points in read.items()}


def read_table(file: Path) -> dict[str, Curve]:
    """The same of a CSVLogger's table, which has a column for each metric and gaps where it was not logged.

    Raises:
        UserError: it has other columns, or values that are no numbers.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            for tag, value in row.items():
                if tag not in ("step", "epoch") and value:
                    try:
                        points.setdefault(tag, []).append((int(row["step"]), float(value)))
                    except (KeyError, ValueError) as error:
                        raise UserError(f"{file.absolute()}, line {number}: expected a step and numbers") from error
    return {tag: curve_of(found) for tag, found in points.items()}


def curve_of(points: list[tuple[int, float]]) -> Curve:
    """Points in order; those that are no finite numbers are left out."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return Curve([step for step, _ in finite], [value for _, value in finite])
