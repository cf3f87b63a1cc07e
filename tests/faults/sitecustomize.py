"""Kills the process at a chosen call of the operating system, so that a test can stop a run at an exact place.

RUNNER_TEST_KILL = "<call>:<part of the path>:<n>:<before|after>" kills at the n-th such call. Calls are `rename`
(os.rename and os.replace, by destination) and `fsync` (by the file's path). Python loads this file by itself when its
folder is on PYTHONPATH; the program under test knows nothing of it.
"""

import os
import signal

_spec = os.environ.get("RUNNER_TEST_KILL")

if _spec:
    _call, _part, _count, _when = _spec.split(":")
    _left = [int(_count)]

    def _hit(path):
        if _part in str(path):
            _left[0] -= 1
            return _left[0] == 0
        return False

    def _die():
        os.kill(os.getpid(), signal.SIGKILL)

    def _wrap(original, path_of):
        def wrapped(*args, **kwargs):
            hit = _hit(path_of(*args))
            if hit and _when == "before":
                _die()
            result = original(*args, **kwargs)
            if hit and _when == "after":
                _die()
            return result

        return wrapped

    if _call == "rename":
        os.rename = _wrap(os.rename, lambda source, destination, *rest: destination)
        os.replace = _wrap(os.replace, lambda source, destination, *rest: destination)
    elif _call == "fsync":
        os.fsync = _wrap(os.fsync, lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
