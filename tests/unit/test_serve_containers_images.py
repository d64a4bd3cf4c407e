"""Images of ``pipedock serve --engine tgi|vllm``: here, pulled, held against a digest, or not to be had; Docker is a fake here."""

import pytest

pytest.importorskip("docker", reason="the Docker SDK is in the serve extra, for Python 3.10 and newer")
from pipeline_train.errors import RunFailed, UserError  # noqa: E402
from serve.containers import images  # noqa: E402
from tests.docker_fixtures import TGI, engine_fixture, fails, folder_fixture, surroundings  # noqa: E402, F401
from tests.fake_docker import Engine, Image, refused  # noqa: E402


@pytest.mark.parametrize(
    "error, text",
    [
        (refused("manifest for x:1 not found: manifest unknown"), "there is no such image; see --version and --image"),
        (
            refused("pull access denied for x, repository does not exist"),
            "docker login, or --image NAME of a copy that you may read",
        ),
        (
            refused("Get https://r/v2/: dial tcp: lookup r: no such host"),
            "load it (docker load -i FILE), or --image NAME of a mirror",
        ),
    ],
)
def test_an_image_that_cannot_be_pulled(folder, engine, error, text):
    engine.here.clear()
    engine.pull_error = error
    said = fails(UserError, folder)
    assert (
        said.startswith("the image %s is not here and cannot be pulled: %s; %s" % (TGI, error.explanation, text))
        and "\n" not in said
    )
    assert engine.created == []


def test_a_pull_that_breaks_off(folder, engine):
    engine.here.clear()
    engine.pulls = [{"status": "Downloading"}, {"error": "unexpected EOF"}]
    assert "cannot be pulled: unexpected EOF; load it" in fails(UserError, folder)
    engine.pulls = [{"error": "write /var/lib/docker/tmp/1: no space left on device"}]
    assert fails(RunFailed, folder).startswith(TGI + ": no room for the image (write /var/lib")


def test_progress_of_a_pull(monkeypatch):
    monkeypatch.setattr(images, "EVERY_S", 0)
    fake, said = Engine(), []
    fake.pulls = [
        {"status": "Downloading", "id": "a", "progressDetail": {"current": 1000000000, "total": 2000000000}},
        {"status": "Downloading", "id": "b", "progressDetail": {"current": 0, "total": 2000000000}},
        {"status": "Download complete", "id": "a"},
    ]
    images.ensure(fake, "r/x:1", None, said.append)
    assert said == ["pulling r/x:1", "pulling r/x:1 ... 1.0 of 2.0 GB, 0 s", "pulling r/x:1 ... 1.0 of 4.0 GB, 0 s",
                    "pulling r/x:1 ... 2.0 of 4.0 GB, 0 s"]  # fmt: skip


def test_a_known_digest_is_held_against_the_image():
    fake, digest = Engine(), "sha256:abc"
    fake.here["r/x:1"] = Image(fake, ["r/x@sha256:other"])
    with pytest.raises(
        UserError, match="r/x:1: the image here is not the one that was pinned .sha256:abc.; pull it again: docker pull"
    ):
        images.ensure(fake, "r/x:1", digest, print)
    fake.here["r/x:1"] = Image(fake, ["r/x@" + digest])
    images.ensure(fake, "r/x:1", digest, print)
    fake.here.clear()
    images.ensure(fake, "r/x:1", digest, print)
    assert fake.pulled == ["r/x@" + digest] and "r/x:1" in fake.here  # found by its tag the next time
