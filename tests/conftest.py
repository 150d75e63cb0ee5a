"""Every cache in a temporary folder, and no network: set here, before any test imports a library."""

import os
import shutil
import tempfile


CACHES = tempfile.mkdtemp(prefix="vit_custom_tests_")
os.environ |= {
    name: os.path.join(CACHES, name.lower())
    for name in (
        "GRADIO_TEMP_DIR",
        "HF_ASSETS_CACHE",
        "HF_DATASETS_CACHE",
        "HF_EVALUATE_CACHE",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_METRICS_CACHE",
        "HF_MODULES_CACHE",
        "HF_XET_CACHE",
        "MPLCONFIGDIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_HOME",
        "TRITON_CACHE_DIR",
        "XDG_CACHE_HOME",
    )
}
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}
# Tiny models are fastest on one thread, and on a busy machine several of them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from loopback_hub import WRITE_TOKEN, LoopbackHub  # noqa: E402
from tiny_models import ARCHITECTURES  # noqa: E402


def pytest_unconfigure(config):
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    """The name of each architecture in turn, for `tiny_config`."""
    return request.param


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on the loopback interface, which the client of this process talks to as somebody who may write there."""
    with LoopbackHub() as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        yield server
