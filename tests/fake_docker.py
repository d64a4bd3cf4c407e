"""A Docker Engine for tests, as far as ``serve.containers`` uses the SDK: it keeps what it is told and does what a test says.

Requests are built by the SDK's own types, so what a real engine would be sent is what a test reads.
"""

import builtins

import docker
from docker import types

API = "1.41"


class Response:
    """As much of an HTTP answer as docker.errors.APIError looks at."""

    def __init__(self, status):
        self.status_code, self.reason, self.url = status, "", "/"


def refused(text, status=500):
    return docker.errors.APIError(text, response=Response(status), explanation=text)


class Handle:
    """A container. ``script``: what each reload finds: a status, or (status, exit code, killed for memory)."""

    def __init__(self, engine, name, labels, image="image", log=b"", script=("running",)):
        self.engine, self.name, self.labels, self.log, self.script = engine, name, labels, log, list(script)
        self.status, self.attrs = "created", {"State": {"ExitCode": 0}, "Config": {"Image": image}}
        self.stopped, self.end_code = [], 0

    def become(self, status, code=0, memory=False):
        self.status, self.attrs["State"] = status, {"ExitCode": code, "OOMKilled": memory}

    def reload(self):
        if self.script:
            now = self.script.pop(0)
            self.become(*([now] if isinstance(now, str) else now))

    def start(self):
        if self.engine.start_error:
            raise self.engine.start_error

    def logs(self, stream=False, follow=False, tail="all"):
        if stream:
            return iter([self.log[at : at + 7] for at in range(0, len(self.log), 7)])
        lines = self.log.splitlines(keepends=True)
        return b"".join(lines if tail == "all" else lines[-tail:])

    def stop(self, timeout):
        self.stopped.append(timeout)
        self.script = []
        self.become("exited", self.end_code)

    def wait(self):
        self.script = []
        self.become("exited", self.end_code)
        return {"StatusCode": self.end_code}

    def remove(self, force=False):
        self.engine.handles.remove(self)


class Image:
    def __init__(self, engine, digests=()):
        self.engine, self.attrs, self.id = engine, {"RepoDigests": list(digests)}, "sha256:1"

    def tag(self, repository, tag):
        self.engine.here["%s:%s" % (repository, tag)] = self


class Engine:
    """``here``: name -> Image; ``script`` and ``log``: of containers to come; ``pulls``: events that a pull answers with."""

    def __init__(self, *here, script=("running",), log=b"", end_code=0):
        self.here = {name: Image(self) for name in here}
        self.handles, self.created, self.script, self.log, self.end_code = [], [], script, log, end_code
        self.start_error = self.create_error = self.pull_error = None
        self.pulls, self.pulled, self.timeout = [], [], 60
        self.api = self.containers = self.images = self

    def create_host_config(self, **options):
        return types.HostConfig(API, **options)

    def create_container(self, image, command, **options):
        if self.create_error:
            raise self.create_error
        if options["name"] in [handle.name for handle in self.handles]:
            raise refused("Conflict. The container name is already in use", 409)
        self.created.append({"image": image, "command": command, **options})
        handle = Handle(self, options["name"], options["labels"], image, self.log, self.script)
        handle.end_code = self.end_code
        self.handles.append(handle)
        return {"Id": options["name"]}

    def pull(self, reference, stream, decode):
        if self.pull_error:
            raise self.pull_error
        self.pulled.append(reference)
        yield from self.pulls
        self.here.setdefault(reference, Image(self, [reference]))

    def get(self, name):
        """Of images and of containers."""
        for handle in self.handles:
            if handle.name == name:
                return handle
        if name in self.here:
            return self.here[name]
        raise docker.errors.ImageNotFound("No such image: " + name)

    def list(self, all, filters, ignore_removed):
        def has(handle, label):
            name, equals, value = label.partition("=")
            return handle.labels.get(name) == value if equals else name in handle.labels

        return [handle for handle in self.handles if builtins.all(has(handle, label) for label in filters["label"])]
