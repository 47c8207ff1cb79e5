"""Log lines: for people by default, or one JSON object a line for a log system.

    {"time": ..., "level": ..., "message": ..., "run": ..., "stage": ..., "part": ...}

`log_context` says which run and stage the lines of a block belong to; what a single line is about
goes with it, as in `logger.warning("...", extra={"part": name})`. Ray's workers write to files of
the session's log folder, which a cluster's log agent collects.
"""

import contextlib
import contextvars
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

Format = Literal["text", "json"]

# Says the format to Ray's workers, and may be set instead of the command line's option.
FORMAT_VARIABLE = "FIFA_LOG_FORMAT"
CONTEXT_FIELDS = ("run", "stage", "part", "block")

_NO_CONTEXT: Mapping[str, str] = MappingProxyType({})
_context = contextvars.ContextVar[Mapping[str, str]]("log_context", default=_NO_CONTEXT)


def set_up_logging(log_format: Format | None = None, level: int = logging.INFO) -> None:
    """Send this package's lines of `level` and above to standard error, all others' warnings.

    log_format: None: `FIFA_LOG_FORMAT`, else text. Ray calls this in its workers, by name.
    """
    chosen = log_format or os.environ.get(FORMAT_VARIABLE) or "text"
    os.environ[FORMAT_VARIABLE] = chosen
    handler = logging.StreamHandler(sys.stderr)
    if chosen == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("fifa_ray").setLevel(level)


def writes_json() -> bool:
    """Whether this process was told to write JSON lines."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def context() -> Mapping[str, str]:
    """The fields of the innermost `log_context`."""
    return _context.get()


@contextlib.contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Lines written in this block carry these fields (run, stage, part or block)."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; time is UTC with milliseconds."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """Context of the block, overridden by what the line itself says."""
        milliseconds = int(record.msecs)
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{milliseconds:03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context.get(),
        }
        own = {name: getattr(record, name) for name in CONTEXT_FIELDS if hasattr(record, name)}
        if record.exc_info:
            own["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields | own, ensure_ascii=False, default=str)
