"""Directories that are slow to make, kept in the user's cache: made once, under a lock, never seen half made."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

KEPT = 2  # versions of one kind: this recipe's and the one used before it, so that switching branches rebuilds nothing


def cache_directory() -> Path:
    """Return where everything of this package is cached, whether or not it exists yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skeyd" / "emulated"


@dataclass(frozen=True)
class CachedDirectory:
    """One finished directory, named by its kind ("bookworm") and by a digest of the recipe that made it.

    Synchronization: safe between threads and processes; one makes it, the others wait and use what it made.
    """

    kind: str
    recipe: str

    @property
    def path(self) -> Path:
        """Where the directory is when it is finished; nothing is there before."""
        return cache_directory() / f"{self.kind}-{self.recipe}"

    def is_finished(self) -> bool:
        """Tell whether it is there."""
        return self.path.is_dir()

    def obtain(self, make: Callable[[Path, int], None], *, again: bool = False) -> Path:
        """Return the finished directory, calling `make` if it is absent or wanted again.

        `make` fills the empty directory it is given. Its second argument is the file descriptor of the lock:
        a process that inherits it keeps others waiting for as long as it lives, whatever becomes of this one.
        What `make` raises is raised here, and leaves nothing behind.
        """
        if again or not self.is_finished():
            with self._locked() as lock:
                self._remove_dead()
                if again or not self.is_finished():
                    self._make(make, lock)
        with contextlib.suppress(PermissionError):  # root made it for somebody else
            os.utime(self.path)  # its age is what _prune goes by
        return self.path

    def _make(self, make: Callable[[Path, int], None], lock: int) -> None:
        fresh = Path(tempfile.mkdtemp(prefix=f".{self.kind}.", dir=cache_directory()))
        try:
            make(fresh, lock)
            fresh.chmod(0o755)
            if self.is_finished():
                self.path.rename(fresh.with_name(fresh.name + ".old"))
            fresh.rename(self.path)
        finally:
            self._remove_dead()
        self._prune()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        cache_directory().mkdir(parents=True, exist_ok=True)
        lock = os.open(cache_directory() / f".{self.kind}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _remove_dead(self) -> None:
        # Unfinished directories are made under the lock: whoever holds it and isn't making one finds only
        # dead ones.
        for unfinished in cache_directory().glob(f".{self.kind}.*"):
            if unfinished.is_dir():
                shutil.rmtree(unfinished)

    def _prune(self) -> None:
        versions = [path for path in cache_directory().glob(f"{self.kind}-*") if path != self.path]
        versions.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for version in versions[KEPT - 1 :]:
            shutil.rmtree(version)
