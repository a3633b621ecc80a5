"""What is to be trained, and how, as values.

| name | what it is |
|---|---|
| ``TrainConfig`` | the settings of ``fit``, frozen and checked |
| ``TaskSpec`` | what kind of problem it is, frozen and checked: it chooses loss, collator and metrics |
| ``make_task``, ``kinds`` | tasks by name |
| ``Intake``, ``take_in`` | what ``fit`` was given, made into what a plan is made of |
"""

from trainfn.task.config import TrainConfig
from trainfn.task.intake import Intake, take_in
from trainfn.task.spec import TaskSpec, kinds, make_task

__all__ = ["Intake", "TaskSpec", "TrainConfig", "kinds", "make_task", "take_in"]
