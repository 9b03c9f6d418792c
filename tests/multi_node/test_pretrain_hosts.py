"""A training on several hosts has the losses of the same ranks on one."""

import hosts
import pytest
import training

NUM_HOSTS = 2
RANKS_PER_HOST = 2
TIMEOUT_S = 300.0
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return training.make_data(tmp_path_factory.mktemp("data"))


# deepep sums inside a host first, so its last bits depend on which ranks share one.
@pytest.mark.parametrize(
    ("dispatcher", "tolerance"),
    [
        pytest.param("alltoall", 0.0, marks=pytest.mark.exhaustive),
        ("deepep", 1e-5),
    ],
)
def test_two_hosts_give_the_losses_of_one(make_network, data, tmp_path, dispatcher, tolerance):
    def flags(run):
        settings = ["--config", training.CONFIGS / "small_2x2.yaml", "--save", tmp_path / run]
        settings += ["--train-iters", STEPS, "--lr-warmup-iters", 4, "--data-path", data]
        settings += ["--no-save-at-end", "--moe-token-dispatcher-type", dispatcher]
        return [str(setting) for setting in settings]

    network = make_network(num_hosts=NUM_HOSTS)
    before = [host.link_bytes() for host in network.hosts]
    finished = hosts.run_on_hosts(
        network.hosts,
        hosts.torchrun(
            network,
            ranks_per_host=RANKS_PER_HOST,
            program=["-m", "megatron_ep.pretrain", *flags("on_hosts")],
        ),
        timeout=TIMEOUT_S,
        env=training.environment() | {"GLOO_SOCKET_IFNAME": hosts.INTERFACE},
        cwd=tmp_path,
    )
    output = "\n".join(part.output for part in finished)
    assert [part.status for part in finished] == [0] * NUM_HOSTS, output
    for host, earlier in zip(network.hosts, before):
        assert (host.link_bytes() - earlier).sent > 1_000_000  # gradients and tokens did travel
    training.run_here(NUM_HOSTS * RANKS_PER_HOST, flags("on_one"))
    on_hosts, on_one = training.losses(tmp_path / "on_hosts"), training.losses(tmp_path / "on_one")
    assert on_hosts == pytest.approx(on_one, rel=tolerance, abs=0.0)
    assert list(on_hosts) == list(range(1, STEPS + 1))
    assert on_hosts[STEPS] < on_hosts[1]
