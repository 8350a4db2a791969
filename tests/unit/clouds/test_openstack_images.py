"""How our images stand in Glance: a disk for UEFI, hidden, protected, signed; and what is removed, is ours."""

import base64
import copy
from dataclasses import replace

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from cloudfit_orchestrator.clouds.base import Demand
from cloudfit_orchestrator.model.errors import BadError, PermanentError
from cloudfit_orchestrator.model.image import Part
from cloudfit_orchestrator.model.signing import sha256
from cloudfit_orchestrator.testing.openstack_fake import PROJECT, FakeOpenStack
from tests.unit.clouds.openstack_places import PLACE, driving, machine_spec, manifest, owner, quick

CERTIFICATE = "0b9c8a1e-6f0f-4f0e-9d53-6f0c8f2b7a10"
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        yield fake


def with_disk(directory, name="replica"):
    """The manifest of an image that UEFI boots too: ESP and second table lie in one file, root and tree in another."""
    content = {"esp": b"esp" * 500, "gpt": b"gpt" * 50, "root": b"root" * 1000, "verity": b"tree" * 100}
    (directory / "boot.img").write_bytes(content["esp"] + content["gpt"])
    (directory / "root.img").write_bytes(content["root"] + content["verity"])
    at = {"esp": 0, "gpt": len(content["esp"]), "root": 0, "verity": len(content["root"])}
    file = {"esp": "boot.img", "gpt": "boot.img", "root": "root.img", "verity": "root.img"}
    plain = manifest(directory, name)
    (directory / "root.img").write_bytes(content["root"] + content["verity"])
    parts = tuple(Part(n, file[n], at[n], len(c), sha256(c).hex()) for n, c in content.items())
    return replace(plain, parts=(*plain.parts[:2], *parts)), b"".join(
        content[n] for n in ("esp", "root", "verity", "gpt")
    )


def images(fake, *kinds):
    return [i for i in fake.objects["images"].values() if i["cloudfit_kind"] in kinds]


def write_key(directory, key=KEY, mode=0o600, name="images.pem"):
    path = directory / "keys" / name
    path.parent.mkdir(exist_ok=True)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key if isinstance(key, bytes) else key.private_bytes(*form))
    path.chmod(mode)


def test_by_uefi_one_image_is_the_whole_disk(tmp_path, fake):
    said, disk = with_disk(tmp_path)
    long = replace(said, command_line="x" * 1000)  # Nova is not told of it
    with driving(tmp_path, fake, replace(PLACE, boot="uefi")) as cloud:
        machine = cloud.create(machine_spec(tmp_path, cloud, manifest=long))
        (image,) = images(fake, "disk", "root", "kernel", "initramfs")
        assert fake.objects["servers"][machine.id]["image"]["id"] == image["id"]
        assert fake.files[image["id"]] == disk
        assert (image["hw_firmware_type"], image["hw_machine_type"]) == ("uefi", "q35")
        assert image["hw_qemu_guest_agent"] == "yes"
        assert not {"kernel_id", "ramdisk_id", "os_command_line"} & set(image)
        cloud.create(machine_spec(tmp_path, cloud, owner("r2"), manifest=long))
        assert len(images(fake, "disk")) == 1


@pytest.mark.parametrize(("file", "byte"), [("boot.img", 0), ("boot.img", -1), ("root.img", 0), ("root.img", -1)])
def test_a_disk_of_other_bytes_is_never_uploaded(tmp_path, fake, file, byte):
    said, _ = with_disk(tmp_path)
    data = bytearray((tmp_path / file).read_bytes())
    data[byte] ^= 1
    (tmp_path / file).write_bytes(data)
    with (
        driving(tmp_path, fake, replace(PLACE, boot="uefi")) as cloud,
        pytest.raises(BadError, match="is not what its manifest says"),
    ):
        cloud.create(machine_spec(tmp_path, cloud, manifest=said))
    assert all(i["status"] == "queued" for i in images(fake, "disk"))


def test_an_image_without_a_disk_is_not_asked_for_by_uefi(tmp_path, fake):
    with driving(tmp_path, fake, replace(PLACE, boot="uefi")) as cloud:
        with pytest.raises(PermanentError, match="image replica has no disk that UEFI boots"):
            cloud.create(machine_spec(tmp_path, cloud))
        assert not fake.objects["images"]


def test_another_way_to_boot_replaces_the_images_once_nothing_runs_from_them(tmp_path, fake):
    said, _ = with_disk(tmp_path)
    with driving(tmp_path, fake) as cloud:
        old = cloud.create(machine_spec(tmp_path, cloud, manifest=said))
    with driving(tmp_path, fake, replace(PLACE, boot="uefi", protected=True)) as cloud:
        cloud.create(machine_spec(tmp_path, cloud, owner("r2"), manifest=said))
        assert len(images(fake, "root", "kernel", "initramfs", "disk")) == 4
        cloud.destroy(old)
        assert [i["cloudfit_kind"] for i in images(fake, "root", "kernel", "initramfs", "disk")] == ["disk"]


def test_hidden_and_protected_as_the_spec_says_now_and_removed_only_if_ours(tmp_path, fake):
    theirs = fake._new("images", {"name": "x", "status": "active", "owner": PROJECT, "tags": [], "protected": True,
                                  "os_hidden": True, "cloudfit_deployment": "dep"})  # fmt: skip
    before = copy.deepcopy(theirs)
    changes = ((True, True), (False, True), (True, False), (False, False), (True, True))
    for number, (hidden, protected) in enumerate(changes):
        with driving(tmp_path, fake, replace(PLACE, hidden=hidden, protected=protected)) as cloud:
            cloud.create(machine_spec(tmp_path, cloud, owner(f"r{number}")))
            assert [(i["os_hidden"], i["protected"]) for i in fake.objects["images"].values() if i is not theirs] == [
                (hidden, protected)
            ] * 4
    with driving(tmp_path, fake) as cloud:  # another spec, as when the group is destroyed without its file
        assert any(o.name == "images of dep" for o in cloud.orphans("dep", []))
        for machine in cloud.machines("dep"):
            cloud.destroy(machine)
        cloud.delete_network("dep", "dep-lisbon")
    assert fake.objects["images"] == {theirs["id"]: before}


def test_old_images_are_collected_though_they_are_protected(tmp_path, fake):
    with driving(tmp_path, fake, replace(PLACE, hidden=True, protected=True)) as cloud:
        first = cloud.create(machine_spec(tmp_path, cloud))
        newer = replace(manifest(tmp_path), command_line="console=ttyS0 loud")
        cloud.create(machine_spec(tmp_path, cloud, owner("r2"), manifest=newer))
        cloud.destroy(first)
    assert [i["os_command_line"] for i in images(fake, "root")] == ["console=ttyS0 loud"]


def test_every_image_is_signed_for_the_cloud_s_certificate(tmp_path, fake):
    write_key(tmp_path)
    with driving(tmp_path, fake, replace(PLACE, certificate=CERTIFICATE, signing_key="images.pem")) as cloud:
        cloud.create(machine_spec(tmp_path, cloud))
        found = list(fake.objects["images"].values())
        assert len(found) == 4
        for image in found:
            assert image["img_signature_certificate_uuid"] == CERTIFICATE
            assert (image["img_signature_hash_method"], image["img_signature_key_type"]) == ("SHA-256", "RSA-PSS")
            signature = base64.b64decode(image["img_signature"])
            scheme = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
            KEY.public_key().verify(signature, fake.files[image["id"]], scheme, hashes.SHA256())
            with pytest.raises(InvalidSignature):
                KEY.public_key().verify(signature, fake.files[image["id"]] + b"x", scheme, hashes.SHA256())
        cloud.api.forget()
        cloud.create(machine_spec(tmp_path, cloud, owner("r2")))
        assert list(fake.objects["images"].values()) == found, "a signature is made once, though it differs each time"
    assert not [line for line in fake.calls if "PRIVATE" in line]


def test_unsigned_images_do_not_stand_for_signed_ones(tmp_path, fake):
    with driving(tmp_path, fake) as cloud:
        cloud.create(machine_spec(tmp_path, cloud))
    write_key(tmp_path)
    with driving(tmp_path, fake, replace(PLACE, certificate=CERTIFICATE, signing_key="images.pem")) as cloud:
        machine = cloud.create(machine_spec(tmp_path, cloud, owner("r2")))
    booted = fake.objects["images"][fake.objects["servers"][machine.id]["image"]["id"]]
    assert booted["img_signature"]
    assert all(fake.objects["images"][booted[k]]["img_signature"] for k in ("kernel_id", "ramdisk_id"))


@pytest.mark.parametrize(
    ("key", "mode", "why"),
    [
        (KEY, 0o640, "images.pem can be read by others"),
        (b"no key", 0o600, "images.pem is no key in PEM"),
        (ec.generate_private_key(ec.SECP256R1()), 0o600, "images.pem is no RSA key of 2048 bits"),
        (None, 0o600, "images.pem: No such file"),
    ],
)
def test_a_key_that_cannot_sign_is_told_before_anything_is_made(tmp_path, fake, key, mode, why):
    if key is not None:
        write_key(tmp_path, key, mode)
    with driving(tmp_path, fake, replace(PLACE, certificate=CERTIFICATE, signing_key="images.pem")) as cloud:
        found = [f for f in cloud.preflight(Demand(1, 384, 1, 256)) if f.verdict == "fail"]
        assert [f.name for f in found] == ["signature"]
        assert why in found[0].finding
        assert found[0].fix
        with pytest.raises(PermanentError, match=why):
            cloud.create(machine_spec(tmp_path, cloud))
    assert not fake.objects["images"]


def test_preflight_says_which_way_to_boot_works(tmp_path, fake):
    def told(boot, **demand):
        with driving(tmp_path, fake, replace(PLACE, boot=boot)) as cloud:
            found = [f for f in cloud.preflight(Demand(1, 384, 1, 256, **demand)) if f.name == "boot"]
        return [(f.verdict, f.finding, f.fix) for f in found]

    assert told("kernel") == [("ok", "by kernel_id, ramdisk_id and os_command_line, or boot: uefi in the spec", "")]
    assert told("uefi")[0][0] == "ok"
    ((verdict, text, fix),) = told("kernel", command_line="x" * 300)
    assert (verdict, "300 characters" in text, fix.endswith(", or boot: uefi in the spec")) == ("fail", True, True)
    assert told("uefi", command_line="x" * 300)[0][0] == "ok"
    ((verdict, text, fix),) = told("uefi", no_disk=("replica",))
    assert (verdict, text) == ("fail", "images without a disk that UEFI boots: replica")
    assert fix == "cloudfit image build replica, or boot: kernel in the spec"
    fake.image_formats = ["raw", "qcow2"]
    ((verdict, text, fix),) = told("kernel")
    assert (verdict, text, fix.endswith(", or boot: uefi in the spec")) == (
        "fail",
        "Glance does not take aki, ari",
        True,
    )
    assert told("uefi") == [("ok", "by UEFI; that the hosts have OVMF for q35 shows with the first server", "")]
