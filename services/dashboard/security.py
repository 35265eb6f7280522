"""Who may write: a bearer token and an origin check; and who may read: not pages that lie about the host's name.

No cookie exists, so a page of another origin has nothing to borrow; the origin check is the second lock.
"""

import contextlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from rewards.errors import ConfigError
from services.dashboard.audit import WrongTokens
from services.dashboard.problems import ProblemError
from services.dashboard.settings import MIN_TOKEN_LENGTH, TOKEN_VARIABLE, Settings, check_binding, is_loopback
from services.store.files import opened

_bearer = HTTPBearer(auto_error=False, description="The token in RUNS/.dashboard-token, or UNMASK_DASHBOARD_TOKEN")


class Security:
    """The token of one service. It is never part of a message, a log line or a ``repr``."""

    def __init__(self, settings: Settings) -> None:
        """Takes the token from the environment, or from the token file, which is made when it is missing.

        Raises:
            ConfigError: when the address needs a better token, or the token file can't be used.
        """
        given = os.environ.get(TOKEN_VARIABLE)
        check_binding(settings, given)
        self.wrong_tokens = WrongTokens()
        self.place = str(settings.token_path) if given is None else f"{TOKEN_VARIABLE} where the dashboard was started"
        self._loopback = settings.loopback
        self._token = (given if given is not None else _token_of(settings.token_path)).encode()

    def authorised(self, token: str) -> bool:
        """Whether this is the token, in constant time."""
        return hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token)

    def host_allowed(self, host: str) -> bool:
        """Whether a Host header may be served: on loopback only this machine's own names, so that no other site's
        page reads runs through a name that it points here (DNS rebinding)."""
        if not self._loopback:
            return True
        with contextlib.suppress(ValueError):
            return is_loopback(urlsplit(f"//{host}").hostname or "")
        return False


def require_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Ends a request with 403 (another page's), 401 (without the token) or 429 (with too many wrong ones)."""
    site = request.headers.get("sec-fetch-site", "same-origin")  # old browsers don't say; they send Origin
    if not _same_origin(request) or site not in ("same-origin", "none"):
        raise ProblemError(403, "this page is not the dashboard's own; use the dashboard's page, or no browser at all")
    security: Security = request.app.state.security
    if credentials is None or not security.authorised(credentials.credentials):
        security.wrong_tokens.note(request, given=credentials is not None)
        said = "no token was given" if credentials is None else "this is not the token"
        detail = f"{said}; it is in {security.place}"
        raise ProblemError(401, detail, headers={"WWW-Authenticate": "Bearer"})


RequireToken = Depends(require_token)
"""``dependencies=[RequireToken]`` of every route that writes, or tells what was submitted."""


def _same_origin(request: Request) -> bool:
    """Without the scheme, which a proxy that speaks TLS changes. No browser leaves Origin out of a foreign POST."""
    origin = request.headers.get("origin")
    if origin is None:
        return True
    _, found, place = origin.partition("://")  # "null": a page of no origin
    return bool(found) and place.lower() == request.headers.get("host", "").lower()


def _token_of(path: Path) -> str:
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another dashboard was quicker: its token is as good
                _make(path)
        with opened(path, follow=True) as descriptor:  # what is checked is what is read, whatever is renamed meanwhile
            about, token = os.fstat(descriptor), os.read(descriptor, 4096).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"the token file {path} can't be used: {reason}; give another with --token-file") from None
    mode = stat.S_IMODE(about.st_mode)
    if about.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"the token file {path} belongs to another user, who knows the token; delete it")
    if mode & 0o077:
        raise ConfigError(f"the token file {path} can be read by others (mode {mode:o}); chmod 600 it, or delete it")
    if len(token) < MIN_TOKEN_LENGTH:
        raise ConfigError(f"the token in {path} is shorter than {MIN_TOKEN_LENGTH} characters; delete the file")
    return token


def _make(path: Path) -> None:
    """Under another name first: whoever finds the file finds the whole token in it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask takes away
            file.write(secrets.token_urlsafe(32) + "\n")
        os.link(draft, path)
    finally:
        draft.unlink()
