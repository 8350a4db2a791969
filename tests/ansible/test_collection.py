"""What of the collection shows without a host: its form, what it refuses on the control node, what it renders."""

import base64
import dataclasses
import importlib.util
import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.spec import parse_spec
from cloudfit_orchestrator.model.signing import private_bytes, public_bytes
from cloudfit_orchestrator.wormhole.main import parser
from tests.ansible import collection
from tests.ansible.target import ROLE_PACKAGES

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(900)]

ROLE = collection.SOURCE / "roles/agent"
OPENSTACK = {
    "cloud": "lisbon",
    "flavor": "m1.small",
    "network": "replicas",
    "boot": "uefi",
    "clients": ["192.0.2.0/24"],
}
KEY = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVoxMjM0NTY="
SMALL_ORDER = bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")  # 8 times it is nothing


def lookup(name: str):
    """Read at first use: Ansible is an extra, and this file is collected without it."""
    spec = importlib.util.spec_from_file_location(name, collection.SOURCE / f"plugins/lookup/{name}.py")
    loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


public_key, release = lookup("public_key"), lookup("release")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the collection installed, a home, and a file that passes for a wheel."""
    work = tmp_path_factory.mktemp("collection")
    collection.install(work)
    home = Home(work / "home")
    home.public_file("controller")
    home.public_file("image")
    write_wheel(work / "agent.whl", "")
    return work


def write_wheel(path: Path, text: str, entry: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(entry or release.ENTRY), text)
    return path


def run(work: Path, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [collection.program(str(words[0])), *words[1:]],
        cwd=cwd or work, env=collection.environment(work), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def settings(work: Path, **variables: object) -> dict[str, object]:
    return {
        "agent_wheel": str(work / "agent.whl"),
        "agent_controller_keys": [str(work / "home/keys/controller.pub")],
        "agent_image_keys": [str(work / "home/keys/image.pub")],
        "agent_enrolment_dir": str(work / "enrolled"),
    } | variables


def write_book(work: Path, name: str, book: dict[str, object], hosts: dict[str, dict[str, object]]) -> list[Path]:
    """A playbook and its inventory, as arguments."""
    (work / f"{name}.yml").write_text(json.dumps([book]))
    (work / f"{name}-hosts.yml").write_text(json.dumps({"all": {"hosts": hosts}}))
    return [Path("-i"), work / f"{name}-hosts.yml", work / f"{name}.yml"]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """What the role would write on a host."""

    unit: str
    setup: str
    packages: list[str]
    entry: str
    ended: list[str]


@pytest.fixture(scope="module")
def rendered(work: Path) -> dict[str, Rendered]:
    """Of some hosts, in one play."""
    (work / "templates").symlink_to(ROLE / "templates")
    more = write_key(work / "more.pub", public_bytes(Ed25519PrivateKey.generate()))
    image_keys = [str(work / "home/keys/image.pub"), str(more)]
    hosts = {
        # what the role says of a host whose restart has ended epochs
        "passau": {"agent_run": {"ended": ["ledger/r0#1"]}, "ansible_user": "root", "ansible_port": 2222},
        "ulm": {},
        "lisbon": {"agent_openstack": OPENSTACK},
        "porto": {"agent_image_keys": image_keys, "agent_name": "ulm"},
        "faro": {"ansible_managed": "by hand", "agent_name": "ulm"},
    }
    results = {
        "unit": "{{ agent_unit_text }}",
        "setup": "{{ agent_setup }}",
        "packages": "{{ agent_packages }}",
        "entry": "{{ lookup('ansible.builtin.template', 'cloud.yaml.j2') }}",
        "ended": "{{ agent_ended_so_far }}",
    }
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    for name, variables in hosts.items():
        here = {"ansible_connection": "local", "ansible_host": f"{name}.example.org", "agent_key": KEY}
        hosts[name] = defaults | settings(work) | here | variables
    write = {"copy": {"content": "{{ results | to_json }}", "dest": f"{work}/{{{{ inventory_hostname }}}}.json"}}
    book = {
        "hosts": "all",
        "gather_facts": False,
        "serial": 1,
        "vars_files": [str(ROLE / "vars/main.yml")],
        "vars": {"results": results, "ansible_python_interpreter": "{{ ansible_playbook_python }}"},
        "tasks": [write],
    }
    done = run(work, "ansible-playbook", *write_book(work, "render", book, hosts))
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: Rendered(**json.loads((work / f"{name}.json").read_text())) for name in hosts}


def test_the_linter_passes_it_as_production_code(work: Path) -> None:
    done = run(work, "ansible-lint", "--offline", "--strict", "--profile", "production", cwd=collection.SOURCE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_target_has_in_its_cache_what_the_role_installs() -> None:
    always = yaml.safe_load((ROLE / "vars/main.yml").read_text())["agent_packages_always"]
    assert {*always, "ovmf"} == set(ROLE_PACKAGES)


def test_each_plugin_is_documented(work: Path) -> None:
    plugins = collection.SOURCE / "plugins"
    for kind, folder in (("module", "modules"), ("lookup", "lookup")):
        names = [f"cloudfit.orchestrator.{path.stem}" for path in sorted((plugins / folder).glob("*.py"))]
        done = run(work, "ansible-doc", "--type", kind, "--json", *names)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert all("doc" in found[name] for name in names), done.stdout


def test_every_variable_has_a_meaning(work: Path) -> None:
    done = run(work, "ansible-doc", "--type", "role", "--json", "cloudfit.orchestrator.agent")
    points = json.loads(done.stdout)["cloudfit.orchestrator.agent"]["entry_points"]
    assert set(points) == {"main", "tidy", "uninstall"}
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    assert defaults.keys() <= points["main"]["options"].keys()


def test_the_example_of_the_readme_is_the_inventory() -> None:
    readme = (collection.SOURCE / "README.md").read_text()
    example = yaml.safe_load(re.search(r"```yaml\n(hypervisors:.*?)```", readme, re.DOTALL)[1])
    shipped = yaml.safe_load((collection.SOURCE / "inventory/hosts.yml").read_text())
    # my-hosts/ lies one directory higher than ansible/inventory/ does
    text = json.dumps(shipped).replace("inventory_dir }}/../..", "inventory_dir }}/..")
    assert json.loads(text) == example


# ---- what is refused before any host is asked


REFUSED = {
    "no-wheel": ({"agent_wheel": None}, "missing required arguments: agent_wheel"),
    "unknown-word": (
        {"agent_openstack": OPENSTACK | {"flavour": "m1"}},
        "agent_openstack.flavour. Supported parameters",
    ),
    "no-network": ({"agent_openstack": {"cloud": "lisbon", "flavor": "m1"}}, "must name cloud, flavor and network"),
    "bad-choice": ({"agent_openstack": OPENSTACK | {"boot": "bios"}}, "boot must be one of: kernel, uefi, got: bios"),
    "bad-name": ({"agent_name": "Passau_1"}, "agent_name Passau_1 must be a name as in a group's spec"),
    "no-key": ({"agent_image_keys": []}, "at least one controller's key and one image key"),
    "private-key": ({"agent_controller_keys": ["KEYS/controller.key"]}, "KEYS/controller.key does not end in .pub"),
    "other-file": ({"agent_wheel": "KEYS/image.pub"}, "agent_wheel KEYS/image.pub is no wheel; build it"),
    "no-such-file": ({"agent_wheel": "KEYS/none.whl"}, "KEYS/none.whl cannot be read: No such file or directory"),
    "empty-house": ({"agent_wheelhouse": "KEYS"}, "there is no wheel in agent_wheelhouse KEYS"),
}


def test_bad_variables_are_refused_on_the_control_node(work: Path) -> None:
    """And good ones go on to the host: nobody answers there."""
    keys = str(work / "home/keys")
    hosts = {}
    for name, (variables, _) in (REFUSED | {"good": ({"agent_openstack": OPENSTACK}, "")}).items():
        asked = json.loads(json.dumps(settings(work, **variables)).replace("KEYS", keys))
        hosts[name] = {key: value for key, value in asked.items() if value is not None}
        hosts[name] |= {"ansible_host": "127.0.0.1", "ansible_port": 1}
    book = {"hosts": "all", "gather_facts": False, "roles": [{"role": "cloudfit.orchestrator.agent"}]}
    done = run(work, "ansible-playbook", *write_book(work, "refused", book, hosts))
    said = dict(re.findall(r"^fatal: \[(.*?)\]: (.*)$", done.stdout, re.MULTILINE))
    assert said.keys() == hosts.keys(), done.stdout + done.stderr
    assert said.pop("good").startswith("UNREACHABLE!")
    for name, message in said.items():
        assert REFUSED[name][1].replace("KEYS", keys) in message, name
    for secret in ("controller", "image"):
        assert (work / f"home/keys/{secret}.key").read_text().strip() not in done.stdout + done.stderr


# ---- public keys


def write_key(path: Path, raw: bytes) -> Path:
    path.write_bytes(base64.b64encode(raw) + b"\n")
    return path


def test_keys_as_cloudfit_writes_them_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("h")  # sockets of a home limit the length of its path
    home = Home(tmp_path / "home")
    for name, key in (("controller", home.controller_key()), ("image", home.image_key())):
        path = home.public_file(name)
        assert public_key.read(path)["key"] == base64.b64encode(public_bytes(key)).decode()
        link = tmp_path / f"{name}.pub"
        link.symlink_to(path)
        assert public_key.read(link) == public_key.read(path)
    assert len({public_key.read(home.public_file(name))["id"] for name in ("controller", "image")}) == 2


def test_no_seed_makes_a_public_key_that_is_refused(tmp_path: Path) -> None:
    for seed in range(40):
        key = Ed25519PrivateKey.from_private_bytes(seed.to_bytes(32, "big"))
        assert public_key.is_public(public_bytes(key))


def test_most_private_keys_are_no_public_keys() -> None:
    """One of two is a point of the curve, and of these one of eight in the right group."""
    passed = sum(public_key.is_public(private_bytes(Ed25519PrivateKey.generate())) for _ in range(400))
    assert passed < 80, "25 are expected of 400; more than 80 never come by chance"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.key", "PUBLIC", "does not end in .pub"),
        ("a", "PUBLIC", "does not end in .pub"),
        ("a.pub", "-----BEGIN PRIVATE KEY-----\nMC4CAQ\n-----END PRIVATE KEY-----", "holds a private key"),
        ("a.pub", "-----BEGIN OPENSSH PRIVATE KEY-----", "holds a private key"),
        ("a.pub", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI operator@host", "does not hold 32 bytes in base64"),
        ("a.pub", "", "does not hold 32 bytes"),
        ("a.pub", "PUBLIC PUBLIC", "does not hold 32 bytes"),
        ("a.pub", "PUBLIC\nmore", "does not hold 32 bytes"),
        ("a.pub", base64.b64encode(bytes(31)).decode(), "does not hold 32 bytes"),
        ("a.pub", "A" * 100_000, "does not hold 32 bytes"),
        ("a.pub", base64.b64encode(b"\2" + bytes(31)).decode(), "no Ed25519 public key"),  # no point
        ("a.pub", base64.b64encode(SMALL_ORDER).decode(), "no Ed25519 public key"),
        ("a.pub", base64.b64encode(b"\1" + bytes(31)).decode(), "no Ed25519 public key"),  # of order 1
        ("a.pub", base64.b64encode(b"\xff" * 32).decode(), "no Ed25519 public key"),  # beyond the field
    ],
)
def test_other_files_are_refused_and_not_shown(tmp_path: Path, name: str, content: str, said: str) -> None:
    public = base64.b64encode(public_bytes(Ed25519PrivateKey.generate())).decode()
    (tmp_path / name).write_text(content.replace("PUBLIC", public))
    with pytest.raises(public_key.AnsibleLookupError, match=re.escape(said)) as refusal:
        public_key.read(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)
    assert len(content) < 20 or content not in str(refusal.value)
    assert public not in str(refusal.value)


def test_a_private_key_under_a_public_name_is_refused(tmp_path: Path) -> None:
    """Even one that could be a public key, as one of sixteen is by chance."""
    secret = next(
        key for key in iter(lambda: private_bytes(Ed25519PrivateKey.generate()), None) if public_key.is_public(key)
    )
    write_key(tmp_path / "controller.key", secret)
    write_key(tmp_path / "controller.pub", secret)
    with pytest.raises(public_key.AnsibleLookupError, match=r"the same as controller\.key beside it"):
        public_key.read(tmp_path / "controller.pub")
    link = tmp_path / "link.pub"
    link.symlink_to(tmp_path / "controller.key")
    with pytest.raises(public_key.AnsibleLookupError, match=r"does not end in \.pub"):
        public_key.read(link)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(public_key.AnsibleLookupError, match="cannot be read: No such file"):
        public_key.read(tmp_path / "none.pub")
    with pytest.raises(public_key.AnsibleLookupError, match="is no file"):
        public_key.read(tmp_path)


# ---- releases


def test_a_release_is_named_after_all_that_it_consists_of(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "agent.whl", "1")
    library = tmp_path / "library.whl"
    library.write_bytes(b"1")
    names = [release.name(wheel, [], []), release.name(wheel, [], ["a"]), release.name(wheel, [library], ["a"])]
    library.write_bytes(b"2")
    names.append(release.name(wheel, [library], ["a"]))
    again = release.name(write_wheel(tmp_path / "agent.whl", "1"), [library], ["a"])
    names.append(release.name(write_wheel(tmp_path / "agent.whl", "2"), [library], ["a"]))
    assert len(set(names)) == len(names) == 5
    assert again == names[3]


def test_what_is_no_agent_is_no_release(tmp_path: Path) -> None:
    with pytest.raises(public_key.AnsibleLookupError, match="has no agent in it"):
        release.name(write_wheel(tmp_path / "other.whl", "", "other/main.py"), [], [])
    with pytest.raises(public_key.AnsibleLookupError, match="cannot be read: No such file"):
        release.name(tmp_path / "none.whl", [], [])


# ---- what is rendered


def test_the_unit_and_its_set_up(work: Path, rendered: dict[str, Rendered]) -> None:
    units = {name: found.unit for name, found in rendered.items()}
    setups = {name: found.setup for name, found in rendered.items()}
    assert units["faro"] != units["ulm"]
    assert setups.pop("faro") == setups["ulm"], "another comment is no other set-up"
    assert len(set(setups.values())) == 4, "another name, cloud or key is"
    assert all(re.fullmatch(r"[0-9a-f]{16}", setup) for setup in setups.values())
    command = re.search(r"^ExecStart=(.*)$", units["ulm"].replace("\\\n", ""), re.MULTILINE)[1].split()
    assert re.fullmatch(r"/opt/cloudfit-agent/releases/[0-9a-f]{16}/venv/bin/python", command[0])
    assert command[1:4] == ["-I", "-m", "cloudfit_orchestrator.wormhole.main"]
    options = parser().parse_args(command[4:])
    assert (options.name, str(options.socket)) == ("ulm", "/run/cloudfit/agent.sock")
    key = public_key.read(work / "home/keys/controller.pub")
    assert options.controller_key == [Path(f"/etc/cloudfit-agent/controller-{key['id']}.pub")]
    assert units["porto"].count("--image-key") == 2
    assert "SupplementaryGroups=root libvirt-qemu\n" in units["ulm"]
    assert "SupplementaryGroups=root libvirt-qemu libvirt\n" in units["lisbon"]
    assert all(unit.count("[Service]") == 1 and unit.endswith("\n") for unit in units.values())


def test_firmware_is_for_hosts_whose_machines_boot_by_uefi(rendered: dict[str, Rendered]) -> None:
    assert [name for name, found in rendered.items() if "ovmf" in found.packages] == ["lisbon"]


def test_all_hosts_know_whose_epochs_a_restart_has_ended(rendered: dict[str, Rendered]) -> None:
    """So that no second restart silences more replicas of a group in the same run."""
    assert all(found.ended == ["ledger/r0#1"] for name, found in rendered.items() if name != "passau")


def test_entries_are_fit_for_a_spec(rendered: dict[str, Rendered]) -> None:
    clouds = rendered["passau"].entry + rendered["lisbon"].entry
    spec = parse_spec(f"apiVersion: cloudfit/v1\ngroup: g\nservice: kv\nf: 0\nclouds:\n{clouds}", "spec")
    passau, lisbon = spec.clouds
    assert passau.uri == "qemu+ssh://root@passau.example.org:2222/system"
    assert lisbon.uri == "openstack+ssh://root@lisbon.example.org"
    assert {passau.agent_socket, lisbon.agent_socket} == {"/run/cloudfit/agent.sock"}
    assert {passau.agent_key, lisbon.agent_key} == {KEY}
    expected = OPENSTACK | {"clients": ("192.0.2.0/24",)}
    assert dataclasses.asdict(lisbon.openstack).items() >= expected.items()
