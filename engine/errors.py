"""Reason codes, causes, and the exceptions of the engine's own making.

A plugin's trouble is a value (`Cause`, `Outcome`); an exception here always means that the *caller* of the
engine asked for something impossible, or that the engine itself cannot work.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class ReasonCode(StrEnum):
    """Why a plugin is not in service, or a call was not answered. The same cause, the same code."""

    # Something it needs is missing: UNAVAILABLE.
    SANDBOX_UNSUPPORTED = "sandbox_unsupported"
    GPU_ABSENT = "gpu_absent"
    GPU_DRIVER = "gpu_driver"
    TORCH_CPU_BUILD = "torch_cpu_build"
    TORCH_MISSING = "torch_missing"
    GPU_CHECK_TIMEOUT = "gpu_check_timeout"
    PACKAGE_MISSING = "package_missing"
    PACKAGE_VERSION = "package_version"
    MODEL_MISSING = "model_missing"
    MODEL_UNREADABLE = "model_unreadable"
    MODEL_CORRUPT = "model_corrupt"

    # It was tried and broke: FAILED.
    MANIFEST_INVALID = "manifest_invalid"
    IMPORT_ERROR = "import_error"
    INIT_ERROR = "init_error"
    VALIDATE_FAILED = "validate_failed"
    START_TIMEOUT = "start_timeout"
    TOOL_EXCEPTION = "tool_exception"
    TOOL_TIMEOUT = "tool_timeout"
    MEMORY_LIMIT = "memory_limit"
    PROCESS_LIMIT = "process_limit"
    SCRATCH_LIMIT = "scratch_limit"
    WORKER_SIGNAL = "worker_signal"
    WORKER_EXIT = "worker_exit"
    PROTOCOL_ERROR = "protocol_error"
    RESULT_INVALID = "result_invalid"
    RESULT_TOO_LARGE = "result_too_large"
    KILLED_EXTERNALLY = "killed_externally"

    # A call that was not made; the plugin's state is untouched.
    UNKNOWN_PLUGIN = "unknown_plugin"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_INPUT = "bad_input"
    INPUT_TOO_LARGE = "input_too_large"
    QUEUE_FULL = "queue_full"
    NOT_IN_SERVICE = "not_in_service"
    RESTARTED = "restarted"
    ENGINE_STOPPING = "engine_stopping"
    ENGINE_FAULT = "engine_fault"


class Cause(msgspec.Struct, frozen=True):
    """Why a plugin left service: a code for machines and a reason for people (fact, cause, next step)."""

    reason_code: ReasonCode
    reason: str


class HoldfastError(Exception):
    """Base of every exception the engine raises on purpose."""


class IllegalTransition(HoldfastError):
    """A lifecycle trigger that the table does not allow from the present state; nothing was changed."""


class UnknownPlugin(HoldfastError):
    """No plugin of that name is registered."""


class StreamStalled(HoldfastError):
    """Raised by a stream whose consumer came back after the stream had given it up: items are missing."""


class SetupError(HoldfastError):
    """The engine cannot start as asked (data folder, log, port, settings): one line, with the next step."""
