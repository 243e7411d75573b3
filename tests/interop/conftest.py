import contextlib

import pytest

from .reference_venv import ReferenceUnavailableError, reference_python


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the environment before the first test, whose timeout would be too short for it.

    Where that fails, every test that needs it says so.
    """
    if session.config.option.collectonly:
        return
    if any(item.get_closest_marker("interop") for item in session.items):
        with contextlib.suppress(ReferenceUnavailableError):
            reference_python()
