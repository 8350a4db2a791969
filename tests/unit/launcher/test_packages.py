import hashlib
import zipfile

import pytest

from cloudfit_orchestrator.launcher import packages
from cloudfit_orchestrator.launcher.packages import Apt, Package, extract_wheel, fetch_wheels
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError


def fetch(requirement, cache, work):
    return fetch_wheels([requirement], python="3.11", platforms=["any"], cache=cache, work=work, progress=print)


@pytest.mark.parametrize("requirement", ["msgspec", "msgspec==1", "msgspec>=1 --hash=sha256:" + "a" * 64, "-r evil"])
def test_a_wheel_without_an_exact_version_and_hash_is_refused(tmp_path, requirement):
    with pytest.raises(BadInputError, match="NAME==VERSION"):
        fetch(requirement, tmp_path, tmp_path)


def make_wheel(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mine/__init__.py", "value = 1\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_cached_wheel_needs_no_network(tmp_path):
    digest = make_wheel(tmp_path / "wheel")
    (tmp_path / "wheel").rename(tmp_path / f"{digest}.whl")
    (wheel,) = fetch(f"mine==1 --hash=sha256:{digest}", tmp_path, tmp_path)
    assert str(wheel) == "mine=1"
    extract_wheel(wheel, tmp_path, tmp_path / "site")
    assert (tmp_path / "site/mine/__init__.py").read_text() == "value = 1\n"


def test_a_damaged_blob_is_fetched_again_and_a_wrong_download_is_refused(tmp_path, monkeypatch):
    digest = make_wheel(tmp_path / "wheel")
    (tmp_path / f"{digest}.whl").write_bytes(b"damaged")
    calls = []

    def download(*arguments, **_):
        calls.append(arguments)
        (tmp_path / "wheels").mkdir()
        (tmp_path / "wheels" / "mine.whl").write_bytes(b"something else")
        return ""

    monkeypatch.setattr(packages, "run", download)
    with pytest.raises(PermanentError, match="mine=1 has not the hash"):
        fetch(f"mine==1 --hash=sha256:{digest}", tmp_path, tmp_path)
    assert "--require-hashes" in calls[0]


def test_a_release_that_apt_does_not_know_is_an_error_with_its_remedy(tmp_path):
    with pytest.raises(PermanentError, match="no packages of Debian potato") as caught:
        Apt("potato", tmp_path)
    assert caught.value.next_command == "apt-get update"


def test_packages_resolve_to_one_version_each_in_order(tmp_path):
    apt = Apt("bookworm", tmp_path)
    found = apt.resolve(["zlib1g", "libc6", "zlib1g"])
    assert [p.name for p in found] == ["libc6", "zlib1g"]
    assert all(len(p.sha256) == 64 and p.version for p in found)
    assert apt.depends_on("linux-image-cloud-amd64").startswith("linux-image-")
    with pytest.raises(PermanentError, match="no package"):
        apt.resolve(["libc6", "no-such-package-at-all"])


def test_a_package_s_name_shows_its_version():
    assert str(Package("a", "1-2", "0" * 64)) == "a=1-2"
