"""Settings of the whole suite: offline, quiet, one thread per worker, poisoned memory, no mechanism mostly skipped."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from pairs import mostly_skipped

torch.set_num_threads(1)  # tiny tensors, and several workers share the cores
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--first-cases", action="store_true", help="only the first case of every quick test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--first-cases"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            if item.get_closest_marker("slow") is None:
                first.setdefault(item.nodeid.split("[")[0], item)
        config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
        items[:] = first.values()


_outcomes: list[tuple[str, str]] = []


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fixed seed, and NaN in every `torch.empty`: whatever reads memory that nobody wrote fails loudly."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What the package logs during the test, at the verbosity that users have."""
    logger, kept = logging.getLogger("transformers.hf_efficient"), _Kept()
    transformers.logging.set_verbosity_warning()
    logger.addHandler(kept)
    yield kept.messages
    logger.removeHandler(kept)
    transformers.logging.set_verbosity_error()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.skipped:
        _outcomes.append((report.nodeid, report.outcome))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    # workers report to the controller, which alone sees every outcome
    if not hasattr(session.config, "workerinput") and mostly_skipped(_outcomes):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, (skipped, total) in mostly_skipped(_outcomes).items():
        terminalreporter.write_line(
            f"FAILED {name}: {skipped} of its {total} cases are skipped, more than half", red=True
        )
