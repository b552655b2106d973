"""How commands end: statuses, and errors as one line unless they are our own mistakes."""

from collections.abc import Callable

import pytest

from fivefold.parallel_core.commands import run_command
from fivefold.parallel_core.errors import ConfigError, RankError
from fivefold.parallel_core.launcher import launch


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize("status", [0, 1, 130])
def test_the_status_is_the_command_s(status: int) -> None:
    assert run_command("tool", lambda: status) == status


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigError("width=3; it must be even"), 1, "error: width=3; it must be even"),
        (ImportError("tqdm is missing"), 1, "error: tqdm is missing"),
        (OSError(28, "No space left", "run"), 1, "error: [Errno 28] No space left: 'run'"),
        (KeyError("theirs"), 1, "error: 'theirs'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_expected_is_one_line(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("tool", raising(error), expected=(KeyError,)) == status
    assert capsys.readouterr() == ("", f"tool: {text}\n")


def test_debug_and_mistakes_are_let_through() -> None:
    with pytest.raises(ConfigError):
        run_command("tool", raising(ConfigError("no")), debug=True)
    with pytest.raises(ZeroDivisionError):
        run_command("tool", raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("error", "summary"),
    [
        (ConfigError("width=3"), "rank 0 of 1: width=3"),
        (FileNotFoundError(2, "No such file", "x"), "rank 0 of 1: [Errno 2] No such file: 'x'"),
    ],
)
def test_an_expected_error_of_a_rank_is_one_line(
    error: Exception, summary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankError, match=r"(?s)^rank 0 of 1 failed: .*Traceback") as caught:
        launch(raising(error), 1, init=False)
    assert caught.value.summary == summary
    assert run_command("tool", raising(caught.value)) == 1
    assert capsys.readouterr().err == f"tool: error: {summary}\n"


def test_a_mistake_in_a_rank_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_command("tool", lambda: len(launch(raising(ZeroDivisionError()), 1, init=False))) == 1
    )
    error = capsys.readouterr().err
    assert error.startswith("tool: error: rank 0 of 1 failed: ZeroDivisionError")
    assert "Traceback" in error
    assert RankError("died").summary == "died"
