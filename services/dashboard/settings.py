"""What the dashboard serves and where."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from rewards.errors import ConfigError

DEFAULT_PORT = 8420
MIN_TOKEN_LENGTH = 32
TOKEN_VARIABLE = "UNMASK_DASHBOARD_TOKEN"


@dataclass(frozen=True)
class Settings:
    """``port`` 0 is any free one. ``token_file`` None: ``.dashboard-token`` in ``runs_dir``. ``ray_address``: URL of
    the Ray dashboard that runs are submitted to, None: no submission; ``ray_working_dir``: a checkout that jobs take
    along."""

    runs_dir: Path
    store_url: str | None = None
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    token_file: Path | None = None
    ray_address: str | None = None
    ray_working_dir: Path | None = None

    @property
    def token_path(self) -> Path:
        """Where the token lies when the environment gives none."""
        return self.token_file or self.runs_dir / ".dashboard-token"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether the name or address (without port, IPv6 without brackets) is this machine's own."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_binding(settings: Settings, environment_token: str | None) -> None:
    """Refuses a token that nobody could send, and to be reached from other machines without a token that was chosen for
    it. Raises ConfigError."""
    if environment_token is not None and not re.fullmatch(r"[!-~]*", environment_token):
        raise ConfigError(f"{TOKEN_VARIABLE} may have letters, digits and punctuation of ASCII only, and no blanks")
    if environment_token is not None and len(environment_token) < MIN_TOKEN_LENGTH:
        raise ConfigError(
            f"{TOKEN_VARIABLE} has {len(environment_token)} characters and needs at least {MIN_TOKEN_LENGTH}; "
            'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    if not settings.loopback and environment_token is None:
        raise ConfigError(
            f"--host {settings.host} can be reached from other machines, which needs a token in {TOKEN_VARIABLE} of at "
            f"least {MIN_TOKEN_LENGTH} characters; set it, or stay on 127.0.0.1 and use an ssh tunnel"
        )
