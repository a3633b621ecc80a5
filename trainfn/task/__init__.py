"""What is to be trained, and how, as values.

| name | what it is |
|---|---|
| ``TrainConfig`` | the settings of ``fit``, frozen and checked |
"""

from trainfn.task.config import TrainConfig

__all__ = ["TrainConfig"]
