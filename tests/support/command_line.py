"""The `hf-efficient` command, called within the test process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from hf_efficient.cli.app import app


def run(*arguments: Any, code: int = 0, columns: int = 400) -> Any:
    # wide enough that no table folds what the tests look for
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


def document(*arguments: Any, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def error(*arguments: Any) -> str:
    """The message of a command that must fail: on stderr, once, without a traceback, nothing on stdout."""
    for extra in ([], ["--json"]):
        result = run(*arguments, *extra, code=1)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert result.stderr.count("error: ") == 1
    return result.stderr[result.stderr.index("error: ") :].removeprefix("error: ").strip()
