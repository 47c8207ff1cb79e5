"""What Ray's own errors mean to someone who ran a command."""

import ray.exceptions as lost

GOES_ON = "the same command goes on from here"


def explain_failure(error: BaseException) -> str | None:
    """One message for an error that Ray itself raised; None for any other, also one of a task's."""
    cause: BaseException = error
    while getattr(cause, "cause", None) is not None:
        cause = cause.cause  # type: ignore[attr-defined]
    if not isinstance(cause, lost.RayError) or isinstance(cause, lost.RayTaskError):
        return None
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, lost.OutOfDiskError | lost.ObjectStoreFullError):
        return (
            "Ray's object store is full and could not spill to disk; free disk on the nodes, or "
            f"give them a larger object store or spill directory, then {GOES_ON}"
        )
    if isinstance(cause, lost.RayActorError) and cause.actor_init_failed:
        return lines[-1]  # of the traceback in its constructor
    return f"Ray gave up after its retries: {lines[0]}; {GOES_ON}"
