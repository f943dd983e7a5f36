"""What the CPU for which numba compiles can do."""

from numba.core import codegen, config


def has(*features: str) -> bool:
    """Whether machine code may use all of these, by LLVM's names.

    NUMBA_CPU_FEATURES counts, so that code for other CPUs can be tried on this one.
    """
    given = config.CPU_FEATURES
    there = codegen.get_host_cpu_features() if given is None else given
    return {f"+{feature}" for feature in features} <= {*there.split(",")}
