"""What clouds.yaml may say: a CA of one's own, no checks, several regions, whose credentials they are."""

import datetime as dt
import ipaddress
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloudfit_orchestrator.clouds.base import Demand
from cloudfit_orchestrator.clouds.openstack_api import Api
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError
from cloudfit_orchestrator.testing.openstack_fake import REGION, FakeOpenStack
from tests.unit.clouds.openstack_places import driving, quick, write_clouds

DEMAND = Demand(1, 384, 1, 256)


def certificate(subject, key, issuer, issuer_key, days, *, ca=False):
    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject)).issuer_name(name(issuer)).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=100)).not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    )  # fmt: skip
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def secure(monkeypatch, tmp_path):
    """A cloud over TLS with a certificate that ends in so many days, and its CA's file."""
    quick(monkeypatch)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = tmp_path / "ca.pem"
    ca.write_bytes(certificate("own CA", ca_key, "own CA", ca_key, 1000, ca=True))

    def serving(days):
        chain = tmp_path / "server.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        chain.write_bytes(private + certificate("cloud", key, "own CA", ca_key, days))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return FakeOpenStack().serving(context)

    return serving, str(ca)


def look(directory, fake, **entry):
    """Findings, and whether the driver may talk to the cloud at all."""
    document = fake.clouds_yaml()
    document["clouds"]["lisbon"] |= entry
    fake.clouds_yaml = lambda *_, **__: document
    with driving(directory, fake) as cloud:
        return cloud.preflight(DEMAND), cloud.facts


def test_a_ca_of_ones_own(secure, tmp_path):
    serving, ca = secure
    with serving(300) as fake:
        found, _ = look(tmp_path, fake, cacert=ca)
    assert not [f for f in found if f.verdict == "fail"]
    assert [f.verdict for f in found if f.name.startswith("certificate")] == ["ok"]
    assert fake.calls


def test_a_ca_that_nobody_knows(secure, tmp_path):
    serving, _ = secure
    with serving(300) as fake:
        found, _ = look(tmp_path, fake)
        with (
            driving(tmp_path, fake) as cloud,
            pytest.raises(PermanentError, match=r"TLS: .*certificate verify") as told,
        ):
            cloud.facts()
    assert told.value.next_command == "check cacert in clouds.yaml, and the certificate"
    assert [(f.name, f.verdict) for f in found] == [("credentials", "fail")]
    assert fake.calls == [], "nothing was sent, no password least of all"


def test_a_certificate_that_ended(secure, tmp_path):
    serving, ca = secure
    with serving(-1) as fake:
        (found,) = look(tmp_path, fake, cacert=ca)[0]
    assert found.verdict == "fail"
    assert "certificate has expired" in found.finding
    assert fake.calls == []


def test_a_certificate_that_ends_soon(secure, tmp_path):
    serving, ca = secure
    with serving(5) as fake:
        found, _ = look(tmp_path, fake, cacert=ca)
    (told,) = [f for f in found if f.name.startswith("certificate")]
    assert (told.verdict, told.fix) == ("warn", "renew it")


def test_no_checks_are_warned_of(secure, tmp_path):
    serving, _ = secure
    with serving(-1) as fake:
        found, _ = look(tmp_path, fake, verify=False)
    assert [f.verdict for f in found if f.name == "certificate"] == ["warn"]
    assert not [f for f in found if f.verdict == "fail"]


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        yield fake


def api_of(directory, fake, region="", **entry):
    document = fake.clouds_yaml()
    document["clouds"]["lisbon"] |= entry
    return Api("lisbon", region, files=[write_clouds(directory, document)], repeat_for_s=0.5)


def test_several_regions(tmp_path, fake):
    two = {"regions": ["Elsewhere", REGION], "region_name": None}
    assert api_of(tmp_path, fake, REGION, **two).endpoint("compute").startswith(fake.url)
    assert api_of(tmp_path, fake, "Elsewhere", **two).endpoint("compute") is None
    with pytest.raises(PermanentError, match="no endpoint for compute in the region") as told:
        api_of(tmp_path, fake, "Elsewhere", **two).get("compute", "/", "look")
    assert told.value.next_command.endswith("catalog list")
    with pytest.raises(BadInputError, match="Nowhere"):
        api_of(tmp_path, fake, "Nowhere", **two).endpoint("compute")


def test_credentials_of_the_whole_system_are_refused(tmp_path, fake):
    auth = {k: v for k, v in fake.clouds_yaml()["clouds"]["lisbon"]["auth"].items() if "project" not in k}
    with pytest.raises(BadInputError, match="machines belong to a project") as told:
        api_of(tmp_path, fake, auth={**auth, "system_scope": "all"}).project()
    assert "application credential create" in told.value.next_command
    assert fake.calls == []
