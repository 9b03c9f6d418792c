"""Fixtures that all tests share: ranks, backends, options, and the check for leftovers.

ranks      R ranks kept for the whole session; `ranks.run(function, ...)`. R is the test's
           parameter `num_ranks`, 2 if it has none
launch     fresh ranks for tests that kill or stop some of them
backend    the name of a Buffer implementation, see `cases.make_buffer`
over_nodes the name of one over several nodes: "nodes", or those that --backend names
ll_backend of low-latency tests: "cpu", "nodes" or "cuda"; ranks know it as `ll_cases.backend()`
"""

import functools
import os

import ll_cases
import pytest
import torch
from backends import BACKENDS, BY_NAME, OVER_NODES, param

from ep_kernels.testing import RankPool, RankServer, launch

LL_BACKENDS = ("cpu", "cuda", *OVER_NODES)


def pytest_addoption(parser):
    parser.addoption(
        "--run-benchmark", action="store_true", help="run tests marked benchmark, which are timed"
    )
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run tests marked exhaustive and multiply the random ones by 10 (half an hour)",
    )
    parser.addoption(
        "--backend",
        choices=(*BACKENDS, *BY_NAME),
        action="append",
        help="only this backend; may be repeated",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: slow; runs only with --exhaustive")
    config.addinivalue_line("markers", "one_node(reason): of a low-latency test, not for several")
    config.addinivalue_line("markers", "cpu_only(reason): of a low-latency test, not for CUDA")
    config.addinivalue_line("markers", "large: needs about 8 GiB of memory")
    config.addinivalue_line(
        "markers",
        "without_mps: kills ranks whose kernels run; behind an MPS server that is undefined",
    )
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    deselect_backends(config, items)
    num_gpus = torch.cuda.device_count()
    for item in items:
        for name in ("benchmark", "exhaustive"):
            option = "--run-benchmark" if name == "benchmark" else "--exhaustive"
            if item.get_closest_marker(name) and not config.getoption(option):
                item.add_marker(pytest.mark.skip(reason=f"{name}: needs {option}"))
        gpu = item.get_closest_marker("gpu")
        if gpu and gpu.args[0] > num_gpus:
            item.add_marker(pytest.mark.skip(reason=f"needs {gpu.args[0]} GPUs, has {num_gpus}"))
        if item.get_closest_marker("without_mps") and _is_on_gpu_through_mps(item):
            item.add_marker(pytest.mark.skip(reason="without_mps: an MPS server is in use"))
        if item.get_closest_marker("large") and _available_gib() < 10:
            item.add_marker(pytest.mark.skip(reason="large: needs 10 GiB of free memory"))


def deselect_backends(config, items):
    """Also of tests that name their own: those that --backend leaves out."""
    others = {*BACKENDS, *BY_NAME} - set(config.getoption("--backend") or BACKENDS)

    def is_left_out(item):
        return hasattr(item, "callspec") and item.callspec.params.get("backend") in others

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


def pytest_generate_tests(metafunc):
    """`backend` runs over all backends, unless the test names its own with parametrize."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "backend" in metafunc.fixturenames and not any("backend" in mark.args[0] for mark in marks):
        names = metafunc.config.getoption("--backend") or BACKENDS
        metafunc.parametrize("backend", [param(name) for name in names])
    if "over_nodes" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backend") or ["nodes"]
        metafunc.parametrize("over_nodes", [param(name) for name in names if name in OVER_NODES])
    if "ll_backend" in metafunc.fixturenames:
        metafunc.parametrize("ll_backend", list(ll_backends(metafunc)))


def ll_backends(metafunc):
    """Those that low-latency tests run on."""
    cpu_only = metafunc.definition.get_closest_marker("cpu_only")
    one_node = metafunc.definition.get_closest_marker("one_node")
    for backend in metafunc.config.getoption("--backend") or BACKENDS:
        if backend in LL_BACKENDS and not (backend in OVER_NODES and one_node):
            is_skipped = cpu_only and backend in ("cuda", "cuda_nodes")
            marks = [pytest.mark.skip(reason=cpu_only.args[0])] if is_skipped else []
            yield pytest.param(backend, marks=marks) if marks else param(backend)


@pytest.fixture(scope="session")
def rank_server():
    with RankServer(preload=["pytest", "cases"]) as server:
        yield server


@pytest.fixture(scope="session")
def session_pool(rank_server):
    with RankPool(rank_server) as pool:
        yield pool


@pytest.fixture
def ll_backend():
    """The backend of a low-latency test, for all ranks that it runs functions on."""
    return "cpu"


def ll_backend_of(request):
    return request.getfixturevalue("ll_backend") if "ll_backend" in request.fixturenames else "cpu"


@pytest.fixture
def rank_pool(request, session_pool):
    backend = ll_backend_of(request)
    return session_pool if backend == "cpu" else ll_cases.PoolOn(backend, session_pool)


@pytest.fixture
def num_ranks():
    return 2


@pytest.fixture
def ranks(rank_pool, num_ranks):
    return rank_pool.get(num_ranks)


@pytest.fixture(name="launch")
def launch_fixture(request, rank_server):
    backend = ll_backend_of(request)
    if backend == "cpu":
        return functools.partial(launch, rank_server)
    return functools.partial(launch, rank_server, ll_cases.run_on, backend)


@pytest.fixture
def is_exhaustive(request):
    return request.config.getoption("--exhaustive")


def _is_on_gpu_through_mps(item):
    """scripts/with_mps.sh sets the variable."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    is_on_gpu = params.get("backend") == "cuda" or params.get("over_nodes") == "cuda_nodes"
    return is_on_gpu and "CUDA_MPS_PIPE_DIRECTORY" in os.environ


def _available_gib():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
