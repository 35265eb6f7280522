"""How often something may happen."""

import threading
import time


class Rate:
    """Lets ``burst`` through at once, and one more every ``every_s`` seconds. Thread-safe."""

    def __init__(self, *, burst: int, every_s: float) -> None:
        self._burst, self._every_s = burst, every_s
        self._left, self._at = float(burst), time.monotonic()
        self._lock = threading.Lock()

    def wait_s(self) -> float:
        """0: it is let through now. Otherwise how long it should have waited."""
        with self._lock:
            now = time.monotonic()
            self._left = min(self._burst, self._left + (now - self._at) / self._every_s)
            self._at = now
            if self._left >= 1:
                self._left -= 1
                return 0.0
            return (1 - self._left) * self._every_s
