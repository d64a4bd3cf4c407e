"""The errors a client sees as ``{"error": text, "error_type": kind}``: one class, one constructor per kind."""


class ApiError(Exception):
    """``status``: HTTP code outside streams; ``kind``: the ``error_type``; ``label``: the ``err`` label of tgi_request_failure."""

    def __init__(self, status: int, kind: str, text: str, label: str = "") -> None:
        super().__init__(text)
        self.status, self.kind, self.text, self.label = status, kind, text, label

    def body(self) -> dict:
        return {"error": self.text, "error_type": self.kind}


def invalid(text: str) -> ApiError:
    return ApiError(422, "validation", "Input validation error: " + text, "validation")


def overloaded() -> ApiError:
    return ApiError(429, "overloaded", "Model is overloaded", "overloaded")


def failed(text: str) -> ApiError:
    return ApiError(424, "generation", "Request failed during generation: Server error: " + text, "generation")


def bad_template(text: str) -> ApiError:
    return ApiError(422, "template_error", "Template error: " + text, "template")


def bad_tools(text: str) -> ApiError:
    return ApiError(422, "tool_error", "Tool error: " + text, "validation")


def unhealthy() -> ApiError:
    return ApiError(503, "healthcheck", "unhealthy")
