"""`lit-rlhf doctor`: what went wrong in a run, by the curves that it has written."""

import csv
import math
from pathlib import Path

from lit_rlhf.callbacks.alarm_rules import RULES, Curve, alarms
from lit_rlhf.errors import UserError, require_types

EVENTS, TABLE = "events.out.tfevents.*", "metrics.csv"


def doctor(run: str) -> None:
    """Look at the curves of a run, which may be under way, and say what is wrong, since when, and what helps.

    Args:
        run: the run's folder (runs/ppo), or that of one of its logs (runs/ppo/lightning_logs/version_0).

    Raises:
        UserError: there is no run, or it has written no curves.
    """
    require_types(doctor, locals())
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"run: there is no folder {folder.absolute()}; name that of a run, such as runs/ppo")
    file = newest(folder)
    curves = read_table(file) if file.name == TABLE else read_events(file.parent)
    if not any(curve.steps for curve in curves.values()):
        raise UserError(f"run: {file.absolute()} holds no curve: its run logged nothing, or the file is damaged")
    found = list(alarms(curves))
    steps = max(curve.steps[-1] for curve in curves.values() if curve.steps)
    print(f"{file.parent}: {len(curves)} curves up to step {steps}, {len(RULES)} rules, {len(found)} alarms")
    for alarm in found:
        print(f"\n{alarm.rule}\n  saw: {alarm.tag} {alarm.saw}\n  since: step {alarm.since}\n  try: {alarm.remedy}")


def newest(folder: Path) -> Path:
    """The file of curves that was written last.

    Raises:
        UserError: there is none.
    """
    files = [*folder.rglob(EVENTS), *folder.rglob(TABLE)]
    if not files:
        raise UserError(
            f"run: {folder.absolute()} has no curves: neither TensorBoard's ({EVENTS}) nor those of a CSVLogger "
            f"({TABLE}) are in it or below; name the folder of a run that has logged"
        )
    return max(files, key=lambda file: file.stat().st_mtime)


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
