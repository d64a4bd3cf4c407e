"""A hub that cannot be reached is found out at once, not after the hub library's retries."""

import socket

import pytest

from pipeline_train import hub
from pipeline_train.errors import UserError

library = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")


@pytest.fixture
def nowhere(monkeypatch):
    """No name is known here; what is asked of the library, and whether only of its cache."""
    asked = []

    def lookup(host, port, **options):
        asked.append((host, port))
        raise socket.gaierror(-2, "Name or service not known")

    def download(name, *files, local_files_only, **options):
        asked.append((name, local_files_only))
        raise errors.LocalEntryNotFoundError("outgoing traffic has been disabled. To enable it, more words")

    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example:8443")
    monkeypatch.setattr(library, "snapshot_download", download)
    monkeypatch.setattr(library, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("ask", [hub.resolve, hub.config_of])
def test_without_a_network_only_the_cache_is_asked(nowhere, ask):
    with pytest.raises(UserError) as caught:
        ask("someone/model")
    assert str(caught.value) == (
        "someone/model: no such folder or file here, and the hub did not give a model of that name (no network: the name "
        "hub.example is not known here (Name or service not known)). "
        "Name a local folder, or download it first where there is a network."
    )
    assert nowhere == [("hub.example", 8443), ("someone/model", True)]


def test_a_proxy_or_the_offline_switch_settles_it_without_looking_up(nowhere, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    with pytest.raises(UserError, match=r"\(outgoing traffic has been disabled\)"):
        hub.config_of("someone/model")
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"\(outgoing traffic has been disabled\)"):
        hub.config_of("someone/model")
    assert nowhere == [("someone/model", False), ("someone/model", True)]
