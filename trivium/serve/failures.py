"""Errors as OpenAI's clients expect to read them."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from trivium.kit.errors import TriviumError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestRefused(Exception):
    """A request the server will not serve, with the status, parameter and code to tell its client."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        parameter: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.parameter, self.code = message, status, parameter, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict:
        """The JSON object that carries this refusal."""
        return error_body(self.message, self.status, self.parameter, self.code)


def error_body(message: str, status: int, parameter: str | None = None, code: str | None = None) -> dict:
    """The JSON object of an error, in OpenAI's shape."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    printable = message.encode("utf-8", "replace").decode("utf-8")
    return {"error": {"message": printable, "type": kind, "param": parameter, "code": code}}


def refusal_response(refusal: RequestRefused) -> JSONResponse:
    """The HTTP answer to a refused request."""
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body, refusal.status, headers)


def install(application: FastAPI) -> None:
    """Make every error of the application leave in OpenAI's shape."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestRefused)
        return refusal_response(error)

    async def impossible(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(str(error), 400), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return JSONResponse(error_body(message, error.status_code), error.status_code, error.headers)

    async def broken(request: Request, error: Exception) -> JSONResponse:
        message = "the server failed on this request; its log says why"
        return JSONResponse(error_body(message, 500), 500)

    application.add_exception_handler(RequestRefused, refused)
    application.add_exception_handler(TriviumError, impossible)
    application.add_exception_handler(HTTPException, http)
    application.add_exception_handler(Exception, broken)
