"""How long a training will take on this machine, said in plain words as soon as its pace is known."""

from datetime import datetime, timedelta

from wavedistill.recipe.recipe import Recipe

UNTIMED, TIMED = 10, 20
"""Steps that are not timed, because networks are compiled in them, and those after them that are."""
SHORT, LONG = timedelta(minutes=5), timedelta(days=1)
"""Nothing is said of what takes less than the one; what takes more than the other is called long."""


class Pace:
    """Times the steps of one call."""

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0

    def count(self, seconds: float) -> float | None:
        """Seconds that a step takes, right after the last that is timed; else None."""
        self._steps += 1
        if self._steps > UNTIMED:
            self._seconds += seconds
        return self._seconds / TIMED if self._steps == UNTIMED + TIMED else None


def forecast(recipe: Recipe, name: str, left: timedelta, now: datetime) -> str | None:
    """What a user should know of a training that has so much time left; None where it is over soon."""
    if left < SHORT:
        return None
    names = list(recipe.training)
    after = names[names.index(name) + 1 :]
    end = now + left
    lines = [
        f"{name}: about {duration(left)} on this machine"
        + (f", and then the training of {' and '.join(after)}" if after else ""),
        f"ends about {end:%H:%M}" if end.date() == now.date() else f"ends about {end:%H:%M on %a %d %b}",
        "interrupt at any time: the same command resumes",
        f"--set training.{name}.steps=N for less",
    ]
    if left >= LONG:
        lines.append(
            f"that is long: smaller models.{name}.network, as in the recipe that `wavedistill new` writes, learn faster"
        )
    return "; ".join(lines)


def duration(time: timedelta) -> str:
    """A duration as one says it: "3 days 4 h", "5 h 20 min", "12 min"."""
    minutes = round(time.total_seconds() / 60)
    if minutes < 60:
        return f"{minutes} min"
    if time < LONG:
        hours, rest = divmod(5 * round(minutes / 5), 60)
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    days, hours = divmod(round(minutes / 60), 24)
    return f"{days} day{'s' * (days > 1)}" + (f" {hours} h" if hours else "")
