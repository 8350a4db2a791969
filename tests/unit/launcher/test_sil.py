import base64
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from cloudfit_orchestrator.launcher.sil import find_image, list_images, verify_image
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError
from cloudfit_orchestrator.model.image import open_manifest
from cloudfit_orchestrator.model.signing import public_bytes

from .images import KEY, TRUSTED, flip, make_image, sign


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return make_image(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def image(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def part_of(image: Path, name: str):
    return open_manifest((image / "manifest.json").read_bytes(), TRUSTED).part(name)


def test_an_untouched_image_is_accepted(image):
    manifest = verify_image(image, TRUSTED)
    assert [p.name for p in manifest.parts] == ["kernel", "initramfs", "root", "verity", "esp", "gpt"]
    assert [p.name for p in manifest.disk] == ["esp", "root", "verity", "gpt"]
    assert manifest.disk_bytes == sum((image / name).stat().st_size for name in ("boot.img", "root.img"))


def test_an_image_without_what_uefi_needs_is_accepted(image):
    (image / "boot.img").unlink()
    with pytest.raises(BadError, match=r"manifest: its parts are not exactly kernel, initramfs, root, verity\n"):
        verify_image(image, TRUSTED)
    whole = open_manifest((image / "manifest.json").read_bytes(), TRUSTED)
    manifest = verify_image(sign(image, dataclasses.replace(whole, parts=whole.parts[:4])), TRUSTED)
    assert manifest.disk == ()
    assert manifest.disk_bytes == manifest.part("verity").offset + manifest.part("verity").size


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["kernel", "initramfs", "root", "verity", "esp", "gpt"])
def test_a_flipped_byte_is_refused_naming_the_part(image, name, where):
    part = part_of(image, name)
    offset = {"first": 0, "middle": part.size // 2, "last": part.size - 1}[where]
    flip(image / part.file, part.offset + offset)
    with pytest.raises(BadError, match=rf"refused: {name}: "):
        verify_image(image, TRUSTED)


def rewrite(image: Path, change) -> None:
    envelope = json.loads((image / "manifest.json").read_bytes())
    change(envelope)
    (image / "manifest.json").write_text(json.dumps(envelope, sort_keys=True, separators=(",", ":")))


def flipped(text: str, offset: int) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[offset] ^= 1
    return base64.b64encode(raw).decode()


def test_a_flipped_byte_of_the_manifest_is_refused(image):
    rewrite(image, lambda e: e.update(payload=flipped(e["payload"], 100)))
    with pytest.raises(BadError, match="refused: manifest: signature of the envelope does not match"):
        verify_image(image, TRUSTED)


def test_a_flipped_byte_of_the_signature_is_refused(image):
    rewrite(image, lambda e: e["signatures"][0].update(sig=flipped(e["signatures"][0]["sig"], 5)))
    with pytest.raises(BadError, match="refused: manifest: signature of the envelope does not match"):
        verify_image(image, TRUSTED)


def test_any_flipped_byte_of_the_manifest_file_is_refused(image):
    whole = (image / "manifest.json").read_bytes()
    for offset in range(0, len(whole), 37):
        (image / "manifest.json").write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        with pytest.raises(BadError, match="refused: manifest: "):
            verify_image(image, TRUSTED)


def test_a_manifest_that_is_re_encoded_is_another_image(image):
    rewrite(image, lambda e: e.update(extra=1))
    with pytest.raises(BadError, match="manifest: its digest is sha256:"):
        verify_image(image, TRUSTED)


def test_a_stranger_s_signature_is_refused(image):
    stranger = public_bytes(Ed25519PrivateKey.from_private_bytes(b"s" * 32))
    with pytest.raises(BadError, match="none of which is trusted"):
        verify_image(image, [stranger])
    with pytest.raises(BadError, match="none of which is trusted"):
        verify_image(image, [])


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("vmlinuz", "kernel"),
        ("initramfs", "initramfs"),
        ("root.img", "(root and )?verity"),
        ("manifest.json", "manifest"),
    ],
)
def test_missing_truncated_and_extended_files_are_refused(pristine, tmp_path, file, parts):
    for name, change in (
        ("missing", lambda p: p.unlink()),
        ("link", lambda p: (p.rename(tmp_path / "elsewhere"), p.symlink_to(tmp_path / "elsewhere"))),
        ("truncated", lambda p: p.write_bytes(p.read_bytes()[:-1])),
        ("extended", lambda p: p.write_bytes(p.read_bytes() + b"\0")),
        ("empty", lambda p: p.write_bytes(b"")),
    ):
        image = Path(shutil.copytree(pristine, tmp_path / name / pristine.name))
        change(image / file)
        with pytest.raises(BadError, match=f"refused: {parts}: "):
            verify_image(image, TRUSTED)


def test_an_extra_file_is_refused(image):
    (image / "readme").touch()
    with pytest.raises(BadError, match="'readme' is no part"):
        verify_image(image, TRUSTED)


def test_an_oversize_manifest_is_refused_without_reading_it_all(image):
    with (image / "manifest.json").open("ab") as file:
        file.truncate(1 << 33)
    with pytest.raises(BadError, match="the limit is"):
        verify_image(image, TRUSTED)


def test_an_adversary_is_refused_unless_allowed(tmp_path):
    image = make_image(tmp_path, adversary=True)
    with pytest.raises(RefusedError, match="adversary"):
        verify_image(image, TRUSTED)
    assert verify_image(image, TRUSTED, allow_adversary=True).adversary


@pytest.mark.parametrize(
    "command_line",
    ["console=ttyS0", "cloudfit.verity=1,2,3", "cloudfit.verity=1,2,{0},{0} cloudfit.verity=1,2,{0},{0}",
     "cloudfit.verity=1,2,{0},{0}"],
)  # fmt: skip
def test_a_signed_but_incoherent_command_line_is_refused(tmp_path, command_line):
    image = make_image(tmp_path, command_line=command_line.format("ab" * 32))
    with pytest.raises(BadError, match="refused: manifest: "):
        verify_image(image, TRUSTED)


def resign(image: Path, **changed) -> Path:
    manifest = open_manifest((image / "manifest.json").read_bytes(), TRUSTED)
    return sign(image, dataclasses.replace(manifest, **changed))


def test_a_signed_verity_root_that_is_not_the_root_s_is_refused(image):
    manifest = open_manifest((image / "manifest.json").read_bytes(), TRUSTED)
    wrong = "ab" * 32
    image = resign(image, verity_root=wrong, command_line=manifest.command_line.replace(manifest.verity_root, wrong))
    with pytest.raises(BadError, match="refused: root: its blocks do not hash"):
        verify_image(image, TRUSTED)


def test_a_signed_hash_tree_that_is_not_the_root_s_is_refused(image):
    manifest = open_manifest((image / "manifest.json").read_bytes(), TRUSTED)
    root, verity = manifest.part("root"), manifest.part("verity")
    flip(image / "root.img", verity.offset + 2 * 4096 + 7)  # behind superblock and top level: a leaf
    from cloudfit_orchestrator.launcher.measure import range_digest

    digest = range_digest(image / "root.img", verity.offset, verity.size)
    parts = (*manifest.parts[:2], root, dataclasses.replace(verity, sha256=digest), *manifest.parts[4:])
    with pytest.raises(BadError, match="refused: verity: the stored hash tree"):
        verify_image(resign(image, parts=parts), TRUSTED)


def test_signed_parts_that_overlap_or_leave_bytes_unmeasured_are_refused(image):
    manifest = open_manifest((image / "manifest.json").read_bytes(), TRUSTED)
    kernel, initramfs, root, verity, esp, gpt = manifest.parts
    for parts in (
        manifest.parts[:3],
        manifest.parts[:4],
        (kernel, initramfs, root, root, esp, gpt),
        (kernel, initramfs, root, dataclasses.replace(verity, offset=0), esp, gpt),
        (kernel, initramfs, root, verity, esp, dataclasses.replace(gpt, offset=0)),
        (dataclasses.replace(kernel, file="../vmlinuz"), initramfs, root, verity, esp, gpt),
        (dataclasses.replace(kernel, size=0), initramfs, root, verity, esp, gpt),
    ):
        image = resign(image, parts=parts)
        with pytest.raises(BadError, match="refused: manifest: "):
            verify_image(image, TRUSTED)


def test_securesystemslib_verifies_our_envelope(image):
    envelope = Envelope.from_dict(json.loads((image / "manifest.json").read_bytes()))
    assert envelope.payload_type == "application/vnd.in-toto+json"
    name = next(iter(envelope.signatures))
    public = SSlibKey(name, "ed25519", "ed25519", {"public": public_bytes(KEY).hex()})
    assert list(envelope.verify([public], 1)) == [name]
    statement = json.loads(envelope.payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {s["name"] for s in statement["subject"]} == {
        p.name for p in open_manifest((image / "manifest.json").read_bytes(), TRUSTED).parts
    }


def test_a_store_lists_good_and_bad_images_and_finds_them_by_name(tmp_path):
    store = tmp_path / "store"
    (store / "names").mkdir(parents=True)
    good = shutil.move(make_image(tmp_path / "a"), store)
    bad = shutil.move(make_image(tmp_path / "b", lineage="other"), store)
    (Path(bad) / "manifest.json").write_text("{}")
    (store / "names" / "small").symlink_to(Path("..", Path(good).name))
    listed = {i.directory: i for i in list_images(store, TRUSTED)}
    assert listed[Path(good)].names == ("small",)
    assert listed[Path(good)].manifest is not None
    assert listed[Path(bad)].manifest is None
    assert "malformed" in listed[Path(bad)].problem
    digest = listed[Path(good)].digest
    assert {find_image(store, r) for r in ("small", digest, f"small@{digest}")} == {Path(good)}
    for unknown in ("other", "sha256:00", "small@sha256:00", "../small", "", ".."):
        with pytest.raises(BadInputError, match="no image"):
            find_image(store, unknown)


def test_no_directory_is_not_a_bad_image(tmp_path):
    with pytest.raises(BadInputError, match="no image directory"):
        verify_image(tmp_path / "none", TRUSTED)
