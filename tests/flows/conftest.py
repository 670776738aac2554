"""A checkout and Prefect servers for the tests of the flows; nothing of the person's own Prefect is read or written."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checkout import TINIEST


def write_tiny(checkout: Path) -> None:
    (checkout / "params.yaml").write_text(yaml.safe_dump(TINIEST))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with tiny params, as the current one."""
    path = tmp_path_factory.mktemp("checkout")
    write_tiny(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server for the flows of this process."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401  sets what Prefect reads when it is imported

    home = {PREFECT_HOME: tmp_path_factory.mktemp("prefect")}
    with temporary_settings(home), prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()
