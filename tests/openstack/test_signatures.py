"""Signed images on real clouds (make openstack-lab), whose key manager holds the certificate."""

import datetime as dt
import uuid
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from cloudfit_orchestrator.model.errors import PermanentError
from tests.openstack.lab.hosts import spare_host
from tests.openstack.lab.layout import DEFAULT_CLOUDS, Lab
from tests.openstack.machines import GREETING, HOME, driving, greetings, listing, owner, spec_for
from tests.openstack.test_driver import GUEST
from tests.vm.tiny_guest import tiny_image, tiny_manifest

UP = f"""#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /dev
mount -t devtmpfs dev /dev
echo "{GREETING} up" >/dev/ttyS0
while true; do sleep 1000; done
"""

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]


@pytest.fixture
def certificate(lab):
    """(UUID, key): a certificate in the cloud's key manager, and the key that belongs to it."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "images")])
    now = dt.datetime.now(dt.UTC)
    # Nova trusts by certificate authorities, so this one is its own.
    may = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    usage = x509.KeyUsage(digital_signature=True, key_cert_sign=True, **may)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    identity = str(uuid.uuid4())
    keys = Lab(HOME).cloud(lab["name"]).keys
    keys.mkdir(mode=0o700, exist_ok=True)
    path = keys / f"{identity}.der"
    path.write_bytes(made.public_bytes(serialization.Encoding.DER))
    yield identity, key
    path.unlink()


def write_key(directory, key):
    path = directory / "keys/images.pem"
    path.parent.mkdir(exist_ok=True)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.touch(0o600)
    path.write_bytes(key.private_bytes(*form))


def test_what_is_signed_is_taken_and_booted(lab, tmp_path, deployment, certificate):
    write_key(tmp_path, certificate[1])
    directory = tiny_image(GUEST)
    with (
        driving(lab, tmp_path, certificate=certificate[0], signing_key="images.pem") as cloud,
        listing(lab, lab["name"]) as c,
    ):
        spec = spec_for(cloud, lab, (directory, tiny_manifest(directory)), owner(deployment, 1, "op1"))
        try:
            image = cloud.images.ensure_boot(spec)
            # In this order: what a host has in its cache Nova does not verify again.
            for trusted, status in ((str(uuid.uuid4()), "ERROR"), (certificate[0], "ACTIVE")):
                _nova_boots(c, image, trusted, status)
            assert greetings(lab, cloud.create(spec), word=GREETING)
            ours = [c.image.get_image(i["id"]) for i in cloud.images.of_deployment(deployment)]
            assert {i.properties["img_signature_certificate_uuid"] for i in ours} == {certificate[0]}
            assert len(ours) == 4, "the state disk, which Cinder made a volume of, is signed too"
        finally:
            for machine in cloud.machines(deployment):
                cloud.destroy(machine)
            cloud.delete_network(deployment, "replicas")


@pytest.mark.parametrize("lab", DEFAULT_CLOUDS[:1], indirect=True)
def test_a_host_that_boots_signed_images_only_boots_ours(lab, tmp_path, deployment, certificate):
    """`verify_glance_signatures` of Nova, which then looks at kernel, initramfs and root."""
    write_key(tmp_path, certificate[1])
    directory = tiny_image(UP)
    image = directory, tiny_manifest(directory)
    where = Lab(HOME)
    cloud_of_lab = where.cloud(lab["name"])

    def boot(incarnation, **how):
        with driving(lab, tmp_path, **how) as cloud:
            spec = spec_for(cloud, lab, image, owner(deployment, incarnation, f"op{incarnation}"), disk=False)
            try:
                return greetings(lab, cloud.create(replace(spec, network=None)), word=GREETING)
            finally:
                for machine in cloud.machines(deployment):
                    cloud.destroy(machine)
                cloud.delete_network(deployment, "replicas")

    with spare_host(where, cloud_of_lab), listing(lab, lab["accounts"]["admin"]) as admin:
        (usual,) = admin.compute.services(host=cloud_of_lab.host.name, binary="nova-compute")
        admin.compute.disable_service(usual)
        try:
            # In this order: what a host has in its cache Nova does not verify again.
            with pytest.raises(PermanentError, match=r"[Ss]ignature"):
                boot(1)
            assert boot(2, certificate=certificate[0], signing_key="images.pem")
        finally:
            admin.compute.enable_service(usual)


def _nova_boots(c, image, trusted, status):
    """What becomes of a server by that image where only one certificate is trusted."""
    flavor = c.compute.find_flavor("cloudfit.tiny").id
    body = {"name": f"signed-{status}", "imageRef": image, "networks": "none", "flavorRef": flavor,
            "trusted_image_certificates": [trusted]}  # fmt: skip
    answer = c.compute.post("/servers", json={"server": body}, microversion="2.64")
    assert answer.status_code == 202, answer.text
    made = c.compute.get_server(answer.json()["server"]["id"])
    try:
        c.compute.wait_for_server(made, status=status, failures=[], interval=2, wait=300)
    finally:
        c.compute.delete_server(made)
        c.compute.wait_for_delete(made, wait=300)


def test_what_another_key_signed_is_refused_by_glance(lab, tmp_path, deployment, certificate):
    write_key(tmp_path, rsa.generate_private_key(public_exponent=65537, key_size=2048))
    directory = tiny_image(GUEST)
    with driving(lab, tmp_path, certificate=certificate[0], signing_key="images.pem") as cloud:
        with pytest.raises(PermanentError, match=r"[Ss]ignature verification"):
            cloud.create(spec_for(cloud, lab, (directory, tiny_manifest(directory)), owner(deployment, 1, "op1")))
        assert all(i["status"] != "active" for i in cloud.images.of_deployment(deployment))
        cloud.delete_network(deployment, "replicas")
