"""What every test shares: the environment of the engines, and which skips are allowed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

# Before anything imports torch or vLLM. What the caller has set stays.
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_CI_ENV": "1",  # small defaults, so that an engine starts in seconds
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared: no thread is bound to one
    ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

from tests import ports, results, skips  # noqa: E402  (after the environment)

os.environ["VLLM_PORT"] = ports.for_vllm()

LONG = (
    "tests/engines/",
    "tests/audit/",
    "tests/verify/",
    "tests/examples/",
    "tests/kl/",
    "tests/demo/",
)
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")
STRICT = pytest.StashKey[bool]()
ALLOWED = pytest.StashKey["list[skips.AllowedSkip]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail a test that skips without being listed in tests/allowed_skips.txt",
    )
    parser.addoption(
        "--results",
        type=Path,
        metavar="FILE",
        help="append a JSON line for each test: outcome, seconds, commit, GPUs, versions",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Workers of xdist pass their reports on.
    if (path := config.getoption("--results")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(results.Results(path, results.about_here()))
    config.stash[STRICT] = config.getoption("--strict-skips")
    config.stash[ALLOWED] = skips.parse(ALLOWED_SKIPS.read_text(encoding="utf-8"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, for reasons of allowed_skips.txt; long tests come first."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    for item in items:
        if reason := skips.missing_hardware(item):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Let engines in processes of their own compile nothing, where there is no GPU.

    It would be how log-probabilities are ranked, for seconds of each engine's start. This process, which
    compiles what is under test, reads the variable before it is set.
    """
    if "torch" in sys.modules and not skips.cuda_devices():
        import torch._dynamo  # noqa: F401

        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):
        _refuse_unlisted(report, item.config)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_unlisted(report, collector.config)
    return report


def _refuse_unlisted(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config):
    if not (report.skipped and config.stash[STRICT]):
        return
    reason = skips.reason_of(report)
    if not skips.is_allowed(config.stash[ALLOWED], report.nodeid, reason):
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid} was skipped, and tests/allowed_skips.txt does not list it "
            f"with this reason: {reason}"
        )
