"""Whether Ray has gone: nothing is asked of it then, since it would never answer. Loads no Ray."""

from rewards.errors import RayLost

_given_up: list[str] = []


def give_ray_up(why: str) -> None:
    """From now on every wait raises RayLost, in every thread: Ray would never answer. ``why``: a sentence."""
    _given_up.append(why)


def ray_given_up() -> bool:
    """Whether nothing is to be asked of Ray any more."""
    return bool(_given_up)


def require_ray() -> None:
    """Raises RayLost when Ray was given up."""
    if _given_up:
        raise RayLost(_given_up[0])
