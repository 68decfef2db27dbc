"""What tests of commands need."""

from tests.cli.conftest import on_the_tests_device

__all__ = ["on_the_tests_device"]
