"""Every documented behaviour has a test that names it, or stands on the list of later work."""

from __future__ import annotations

import pytest

from tests.behaviours import LATER, NUMBERS, find_tests, table


@pytest.fixture(scope="module")
def tests() -> dict[int, list[str]]:
    return find_tests()


@pytest.mark.parametrize("number", [number for number in NUMBERS if number not in LATER])
def test_a_behaviour_is_shown_by_a_test(tests: dict[int, list[str]], number: int) -> None:
    assert tests.get(number), f"no test has _b{number:03d}_ in its name"


@pytest.mark.parametrize("number", LATER)
def test_a_behaviour_of_later_work_is_not_shown_yet(
    tests: dict[int, list[str]], number: int
) -> None:
    assert number not in tests, f"{tests[number]} shows it: take it off LATER"


def test_tests_name_behaviours_that_exist(tests: dict[int, list[str]]) -> None:
    assert set(tests) <= set(NUMBERS)


def test_the_table_has_a_line_for_each() -> None:
    assert len(table().splitlines()) == len(NUMBERS) + 2
