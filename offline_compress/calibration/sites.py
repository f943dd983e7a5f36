"""In which order the linear layers of a block can be compressed, given what comes before them."""

from collections.abc import Iterable


def stages(sites: Iterable[str]) -> list[list[str]]:
    """Sites of one block, in execution order, grouped by the last part of their path.

    A llama layer has four: what attention reads, what o_proj reads, what the MLP reads and what
    down_proj reads. All experts of a mixture are compressed together.
    """
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(site.rpartition(".")[2], []).append(site)
    return list(found.values())
