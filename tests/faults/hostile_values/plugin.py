"""Returns and raises what nobody expects."""

import locale
import os
import socket
import sys
import time


class Plugin:
    def __init__(self, context):
        self.context = context

    def validate(self): ...

    def returns_nan_and_infinity(self) -> list:
        return [float("nan"), float("inf"), -float("inf")]

    def returns_a_lone_surrogate(self) -> str:
        return "\ud800"

    def returns_10_000_levels(self) -> list:
        nested: list = []
        for _ in range(10_000):
            nested = [nested]
        return nested

    def returns_10_million_items(self) -> list:
        return [0] * 10_000_000

    def returns_integer_keys(self) -> dict:
        return {1: "one", -2: "minus two"}

    def returns_an_integer_of_100_digits(self) -> int:
        return 10**99

    def returns_what_lies_about_itself(self) -> object:
        class Liar:
            @property
            def __array_interface__(self):
                raise SystemExit(3)

        return [Liar()]

    def raises_100_mb(self) -> None:
        raise ValueError("x" * 100_000_000)

    def raises_a_lone_surrogate(self) -> None:
        class Odd(Exception): ...

        Odd.__qualname__ = "Odd\ud800"
        raise Odd("mess \ud800 age")

    def raises_a_cycle(self) -> None:
        first, second = ValueError("first"), KeyError("second")
        first.__cause__, second.__cause__ = second, first
        raise first

    def raises_a_group(self) -> None:
        raise ExceptionGroup("all at once", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])

    def raises_a_base_exception(self) -> None:
        raise BaseException("below them all")

    def raises_keyboard_interrupt(self) -> None:
        raise KeyboardInterrupt

    def raises_generator_exit(self) -> None:
        raise GeneratorExit("no more")

    def raises_what_hides_its_class(self) -> None:
        class Meta(type):
            def __getattribute__(cls, name):
                raise RuntimeError("do not look at me")

        raise Meta("Shy", (Exception,), {})("shy")

    def logs_a_lone_surrogate(self) -> str:
        self.context.log.info("\ud800")
        print("\ud800")
        return "logged"

    def reports_no_number(self, progress) -> str:
        progress(float("nan"), float("inf"))
        progress(-1e308, 1e308)
        return "reported"

    def changes_its_surroundings(self) -> str:
        os.environ.clear()
        os.umask(0o777)
        os.chdir("/")
        os.nice(5)
        locale.setlocale(locale.LC_ALL, "C")
        time.tzset()
        socket.setdefaulttimeout(0.001)
        sys.stdout = sys.stderr = sys.stdin = None
        sys.path.clear()
        self.context.scratch.chmod(0)
        return "changed"
