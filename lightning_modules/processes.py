"""The limit on the processes that a command may start."""

import os

from tnlayers.errors import UserError

__all__ = ["check_processes"]

_LEAST, _PER_CPU = 64, 4


def check_processes(option: str, number: int) -> None:
    """Refuses a number of processes that would bring the machine down, before the first one is there.

    It leaves room for configurations that were written for a larger machine.

    Raises:
        UserError: the number is above 64 and above four for each CPU.
    """
    cpus = os.cpu_count() or 1
    most = max(_LEAST, _PER_CPU * cpus)
    if number > most:
        name = option.rpartition(".")[2]
        raise UserError(
            f"{name} is {number}: a machine of {cpus} CPUs takes at most {most} processes; give fewer, such as --{option} {cpus}"
        )
