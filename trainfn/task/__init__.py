"""What is to be trained, and how, as values.

| name | what it is |
|---|---|
| ``TrainConfig`` | the settings of ``fit``, frozen and checked |
| ``ConfigDiff`` | in what two of them differ |
| ``TaskSpec`` | what kind of problem it is, frozen and checked: it chooses loss, collator and metrics |
| ``make_task``, ``kinds`` | tasks by name |
| ``Intake``, ``take_in`` | what ``fit`` was given, made into what a plan is made of |
"""

from trainfn.task.config import TrainConfig
from trainfn.task.difference import ConfigDiff
from trainfn.task.intake import Intake, take_in
from trainfn.task.kinds import kinds
from trainfn.task.spec import TaskSpec, make_task

__all__ = ["ConfigDiff", "Intake", "TaskSpec", "TrainConfig", "kinds", "make_task", "take_in"]
