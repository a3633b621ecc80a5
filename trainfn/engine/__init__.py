"""Ways to run a step faster without changing what it means.

| name | what it is |
|---|---|
| ``compile`` | a step as one compiled program, with the same signature and the same numbers |
| ``CompiledStep`` | what ``compile`` returns |
| ``collecting_at_rows`` | Python's garbage, looked for at good moments only |
"""

from trainfn.engine.compile import CompiledStep, compile
from trainfn.engine.memory import collecting_at_rows

__all__ = ["CompiledStep", "collecting_at_rows", "compile"]
