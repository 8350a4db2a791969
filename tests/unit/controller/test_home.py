import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.local import routed_networks
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError, RefusedError
from cloudfit_orchestrator.model.signing import private_bytes, public_bytes


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("h")
    return Home(root)


def test_keys_are_private_and_the_same_in_every_process(home: Home) -> None:
    first = [home.controller_key(), home.image_key(), home.client("ann").key]
    again = Home(home.root)
    second = [again.controller_key(), again.image_key(), again.client("ann").key]
    assert [private_bytes(k) for k in first] == [private_bytes(k) for k in second]
    assert len({public_bytes(k) for k in first}) == 3
    assert {stat.S_IMODE(p.stat().st_mode) for p in (home.root / "keys").iterdir()} == {0o600}
    assert stat.S_IMODE((home.root / "keys").stat().st_mode) == 0o700


def test_keys_made_by_threads_at_once_are_one_key(home: Home) -> None:
    made: list[bytes] = []
    threads = [threading.Thread(target=lambda: made.append(private_bytes(home.controller_key()))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == 8
    assert len(set(made)) == 1


def test_a_clients_certificate_holds_its_key(home: Home) -> None:
    identity = home.client("ann")
    certificate = x509.load_der_x509_certificate(identity.certificate)
    assert certificate.public_key() == identity.key.public_key()
    assert (identity.public.name, identity.public.key) == ("ann", public_bytes(identity.key))


def test_a_damaged_key_is_named(home: Home) -> None:
    home.controller_key()
    (home.root / "keys" / "controller.key").write_text("nonsense")
    with pytest.raises(PermanentError, match=r"controller\.key cannot be used"):
        home.controller_key()


def test_only_one_command_works_on_a_group(home: Home) -> None:
    with (
        home.lock("group-ledger"),
        pytest.raises(RefusedError, match="another cloudfit command"),
        home.lock("group-ledger"),
    ):
        pass
    with home.lock("group-ledger"):
        pass


def test_a_home_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="too long for unix sockets"):
        Home(tmp_path / ("x" * 80))


def test_routed_networks_leave_the_default_route_out(tmp_path: Path) -> None:
    table = tmp_path / "route"
    table.write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
        "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\n"
        "virbr1\t0003540A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n"
    )
    assert routed_networks(table) == ["10.84.3.0/24"]
