"""What a process of `worker_processes` runs: stdin has a function, then items; stdout results."""

import os
import pickle
import sys
from typing import Any


def serve() -> None:
    """Answer until the parent asks no more, or is gone."""
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is not an answer
    function = _read(asked)
    while True:
        item = _read(asked)
        failure = result = None
        try:
            result = function(item)
        except ValueError as error:
            failure = error
        try:
            pickle.dump((failure, result), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            os._exit(0)  # flushing at exit would raise again


def _read(asked: Any) -> Any:
    try:
        return pickle.load(asked)
    except (EOFError, pickle.UnpicklingError):  # between two, or within one
        sys.exit(0)


if __name__ == "__main__":
    serve()
