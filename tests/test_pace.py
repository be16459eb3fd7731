"""What a training says of the time it will take."""

from datetime import datetime, timedelta

import pytest

from wavedistill.recipe.recipe import Recipe
from wavedistill.training.pace import TIMED, UNTIMED, Pace, duration, forecast

NOON = datetime(2026, 11, 26, 12)


@pytest.mark.parametrize(
    ("minutes", "said"),
    [(11.6, "12 min"), (59.4, "59 min"), (61, "1 h"), (322, "5 h 20 min"), (1438, "24 h"), (1440, "1 day")],
)
def test_a_duration_is_said_as_people_do(minutes: float, said: str) -> None:
    assert duration(timedelta(minutes=minutes)) == said


def test_days_are_said_with_hours() -> None:
    assert duration(timedelta(days=3, hours=4, minutes=10)) == "3 days 4 h"


def test_a_forecast_says_how_long_until_when_and_what_to_do(tiny: Recipe) -> None:
    assert forecast(tiny, "student", timedelta(minutes=4), NOON) is None
    assert forecast(tiny, "student", timedelta(hours=5, minutes=20), NOON) == (
        "student: about 5 h 20 min on this machine; ends about 17:20; interrupt at any time: the same command resumes; "
        "--set training.student.steps=N for less"
    )
    long = forecast(tiny, "teacher", timedelta(days=3, hours=4), NOON)
    assert long is not None
    assert long.startswith("teacher: about 3 days 4 h on this machine, and then the training of student; ends about")
    assert "16:00 on Sun 29 Nov" in long
    assert "that is long: smaller models.teacher.network" in long


def test_the_first_steps_which_compile_are_not_timed() -> None:
    pace = Pace()
    told = [pace.count(60 if step < UNTIMED else 2) for step in range(UNTIMED + TIMED + 5)]
    assert [step for step, seconds in enumerate(told, 1) if seconds is not None] == [UNTIMED + TIMED]
    assert told[UNTIMED + TIMED - 1] == 2
