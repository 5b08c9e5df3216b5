"""The reaper and the fork server: `python -P engine/worker/__main__.py CONTROL_FD SCRATCH_ROOT PRIVATE…`.

Run by path and not by `-m`, so that the folder Holdfast lies in is on `sys.path` only while its own modules are
imported: a plugin must not find `engine` or `plugins` there by accident.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, root)
    from engine.worker import reaper
    from engine.worker.forkserver import ForkServer

    sys.path.remove(root)
    control_fd, scratch_root, private = int(sys.argv[1]), Path(sys.argv[2]), [Path(each) for each in sys.argv[3:]]
    reaper_pid = os.getpid()
    reaper.watch_over(
        control_fd, scratch_root, lambda: ForkServer(control_fd, reaper_pid, scratch_root, private).run()
    )
