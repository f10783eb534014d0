"""The converted model of the tests of its files, whole and to damage; taken in with pytest_plugins."""

import shutil
from pathlib import Path

import pytest
from records import write_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine") / "model"
    write_model(directory)
    return directory


@pytest.fixture
def model(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))
