"""Never finishes its import."""

import threading


def wait_for_nobody():
    threading.Event().wait()


wait_for_nobody()
