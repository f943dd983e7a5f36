"""What machine code was compiled from, as this process read it."""

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[2]


def digest(package: Path) -> str:
    """SHA-256 of all modules of a package; empty where there are no sources to be found."""
    found = hashlib.sha256()
    paths = sorted(path for path in package.rglob("*.py") if path.is_file())
    for path in paths:
        contents = path.read_bytes()
        found.update(f"{path.relative_to(package)} {len(contents)} ".encode() + contents)
    return found.hexdigest() if paths else ""


# Before the modules that go into machine code are imported: they may be edited later.
try:
    DIGEST = digest(PACKAGE)
except OSError:
    DIGEST = ""
