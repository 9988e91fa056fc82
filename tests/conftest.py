"""Settings for every test: one thread (the tests are tiny; two threads cost more than they give) and no network."""

import gc
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # of the scripts that tests start, too: on cores that
# other workers keep busy, a second thread that waits for its turn made their steps 40 times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.cli import GARBAGE_AFTER  # noqa: E402

gc.set_threshold(GARBAGE_AFTER)  # as scripts do

import torch  # noqa: E402

torch.set_num_threads(1)

import pytest  # noqa: E402
from tqdm import tqdm  # noqa: E402

# Its own lock is shared with forked processes: a test that kills one while it draws its bar would wait for the lock for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # nor a thread that could hold it while another process is forked


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the losses of this run to tests/golden/")


FIRST = ("test_scripts.py", "test_memory_plan.py", "test_compiling.py", "test_processes.py", "test_benchmarks.py")
"""Files with few tests that take long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are handed to whichever worker has nothing left to do, in this order: short ones last, so that all end together."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in FIRST, -tests[item.path]))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """What a test logged may hold names that are no text, and the workers' channel carries text alone."""
    outcome: Any = yield
    report = outcome.get_result()
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or leaves anything in the user's."""
    os.environ["XDG_CACHE_HOME"] = os.environ["LOCALAPPDATA"] = str(tmp_path_factory.mktemp("user-cache"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's."""
    from tests import tiny

    return tiny.write_clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.x checkpoint. No test changes it."""
    from tests import tiny

    return tiny.write_sd_checkpoint(tmp_path_factory.mktemp("sd1") / "sd1.safetensors")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, 2.x."""
    from tests import tiny

    return tiny.write_sd_checkpoint(tmp_path_factory.mktemp("sd2") / "sd2.safetensors", version="v2")


@pytest.fixture(scope="module")
def shared_model() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A UNet and a text encoder that no test changes for good."""
    from tests import network_models

    return network_models.tiny_unet(), network_models.tiny_text_encoder()


@pytest.fixture
def quiet_lycoris() -> Iterator[None]:
    """LyCORIS tells of every layer."""
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
