"""docs/methods.md is what the code says of itself."""

from pathlib import Path

from offline_compress.allocation import ALLOCATORS
from offline_compress.catalogue import markdown
from offline_compress.methods import METHODS
from offline_compress.planning import accepts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_the_page_is_made_from_the_code():
    assert PAGE.read_text() == markdown(), "run python -m offline_compress.catalogue"


def test_the_page_names_every_method_and_allocator():
    page = markdown()
    for name in (*METHODS, *ALLOCATORS):
        assert f"| `{name}` | " in page
        assert f"### {name}\n" in page


def test_every_method_names_an_allocator_that_accepts_it():

    for method in METHODS.values():
        assert accepts(method, ALLOCATORS[method.allocator]().asks)
