import pytest

from tests.containers.compose import Compose


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Built once for all tests here."""
    Compose(tmp_path_factory.mktemp("build"))("build", "train", "serve", timeout=1800)
