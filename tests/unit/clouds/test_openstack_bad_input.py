"""What people, strangers and administrators do to the OpenStack driver: each time one clear error, nothing touched."""

import copy

import pytest

from cloudfit_orchestrator.clouds import openstack_images
from cloudfit_orchestrator.clouds.base import DiskSnapshot, MachineState, OrphanKind
from cloudfit_orchestrator.clouds.openstack import OpenStackCloud
from cloudfit_orchestrator.clouds.openstack_api import Api
from cloudfit_orchestrator.model.errors import BadError, BadInputError, PermanentError, RefusedError, TemporaryError
from cloudfit_orchestrator.testing.openstack_fake import PASSWORD, FakeOpenStack
from cloudfit_orchestrator.testing.openstack_objects import PROJECT
from tests.unit.clouds.openstack_places import PLACE, driving, machine_spec, manifest, owner, quick, write_clouds


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        yield fake


@pytest.fixture
def cloud(fake, tmp_path):
    with driving(tmp_path, fake) as cloud:
        yield cloud


def kinds(fake):
    return {kind for kind, found in fake.objects.items() if found}


def from_file(directory, path):
    return OpenStackCloud(home=directory, place=PLACE, api=Api("lisbon", files=[path], repeat_for_s=0.1))


# clouds.yaml


def test_no_clouds_yaml(tmp_path):
    with pytest.raises(BadInputError, match=r"there is no clouds.yaml: looked for .*nowhere"):
        from_file(tmp_path, tmp_path / "nowhere.yaml").facts()


def test_a_cloud_that_clouds_yaml_does_not_know(tmp_path, fake):
    document = fake.clouds_yaml()
    document["clouds"]["porto"] = document["clouds"].pop("lisbon")
    with pytest.raises(BadInputError, match="has no cloud 'lisbon'; it has porto"):
        from_file(tmp_path, write_clouds(tmp_path, document)).facts()


@pytest.mark.parametrize("text", [f"clouds:\n  lisbon: {{auth: {{password: {PASSWORD}\n", f"[{PASSWORD}]", "\x00"])
def test_a_clouds_yaml_that_cannot_be_read_is_not_quoted(tmp_path, text, caplog):
    (tmp_path / "clouds.yaml").write_text(text)
    with pytest.raises(BadInputError) as caught:
        from_file(tmp_path, tmp_path / "clouds.yaml").facts()
    assert PASSWORD not in f"{caught.value}{caught.value.__cause__}{caplog.text}"


def test_an_auth_section_with_parts_missing(tmp_path, fake):
    document = fake.clouds_yaml()
    del document["clouds"]["lisbon"]["auth"]["auth_url"]
    with pytest.raises(BadInputError, match=r"auth section is not complete|auth_url"):
        from_file(tmp_path, write_clouds(tmp_path, document)).facts()


def test_a_wrong_password_is_said_and_never_shown(tmp_path, fake, caplog):
    caplog.set_level("DEBUG")
    refused = pytest.raises(PermanentError, match="Keystone refuses the credentials")
    with driving(tmp_path, fake, password="hunter2-wrong") as cloud, refused as caught:
        cloud.facts()
    assert "hunter2" not in f"{caught.value}{caught.value.__cause__}{caplog.text}"


def test_no_log_line_of_a_whole_life_holds_the_password(tmp_path, fake, caplog):
    caplog.set_level("DEBUG")
    with driving(tmp_path, fake) as cloud:
        cloud.destroy(cloud.create(machine_spec(tmp_path, cloud)))
    assert caplog.text
    assert PASSWORD not in caplog.text


def test_nobody_answers(tmp_path, fake):
    with driving(tmp_path, fake, url="http://127.0.0.1:9", repeat_for_s=0.1) as cloud:  # noqa: SIM117
        with pytest.raises(TemporaryError, match=r"127\.0\.0\.1"):
            cloud.facts()


def test_a_service_that_the_catalogue_does_not_have(tmp_path, fake):
    fake.wrong.services = {"network"}
    with driving(tmp_path, fake) as cloud, pytest.raises(PermanentError, match="no endpoint for network"):
        machine_spec(tmp_path, cloud)


# Names in the spec


def place(**changes):
    return type(PLACE)(**{field: getattr(PLACE, field) for field in PLACE.__slots__} | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flavor": "huge"}, "has no flavor 'huge'; it has small"),
        ({"network": "elsewhere"}, "has 0 networks 'elsewhere' that we see"),
        ({"volume_type": "golden"}, "Volume type with name golden could not be found"),
    ],
)
def test_a_name_that_the_cloud_does_not_know(tmp_path, fake, changes, said):
    with driving(tmp_path, fake, place(**changes)) as cloud, pytest.raises(PermanentError, match=said):
        cloud.create(machine_spec(tmp_path, None if "network" in changes else cloud))
    assert not kinds(fake) & {"servers", "ports", "volumes"}


@pytest.mark.parametrize(
    ("flavor", "said"),
    [
        ({"ram": 128}, "128 MiB of memory, the spec wants 384"),
        ({"vcpus": 0}, "0 CPUs, the spec wants 1"),
        ({"swap": 512}, "would take the place of the state disk"),
        ({"OS-FLV-EXT-DATA:ephemeral": 1}, "would take the place of the state disk"),
    ],
)
def test_a_flavor_that_does_not_do(tmp_path, fake, cloud, flavor, said):
    fake.flavors[0] |= flavor
    with pytest.raises(PermanentError, match=said):
        cloud.create(machine_spec(tmp_path, cloud))
    assert not kinds(fake) & {"servers", "images", "volumes"}


def test_a_flavor_too_small_for_the_image(tmp_path, fake, cloud):
    big = manifest(tmp_path)
    root = big.part("root")
    larger = type(root)("verity", root.file, 2 << 30, 4096, root.sha256)
    big = type(big)(**{f: getattr(big, f) for f in big.__slots__} | {"parts": (*big.parts, larger)})
    with pytest.raises(PermanentError, match="a disk of 1 GiB, the machine wants 3"):
        cloud.create(machine_spec(tmp_path, cloud, manifest=big))


def test_a_command_line_that_nova_would_cut(tmp_path, cloud):
    long = manifest(tmp_path)
    long = type(long)(**{f: getattr(long, f) for f in long.__slots__} | {"command_line": "x" * 256})
    with pytest.raises(PermanentError, match="256 characters, Nova keeps 255"):
        cloud.create(machine_spec(tmp_path, cloud, manifest=long))


def test_a_network_without_dhcp_will_do(tmp_path, fake, cloud):
    fake.subnets[0]["enable_dhcp"] = False  # guests are told their address by the wormhole
    assert cloud.create(machine_spec(tmp_path, cloud)).state is MachineState.RUNNING


def test_a_network_that_changed(tmp_path, fake, cloud):
    given = cloud.given_network("dep-lisbon")
    cloud.ensure_network("dep", given)
    fake.subnets[0]["gateway_ip"] = "127.77.0.9"
    with pytest.raises(RefusedError, match=r"has now the gateway 127\.77\.0\.9/24"):
        cloud.ensure_network("dep", given)


# Quotas and faults


def test_a_quota_that_is_used_up(tmp_path, fake, cloud):
    spec = machine_spec(tmp_path, cloud)
    fake.wrong.deny = {"POST compute:/servers": (403, "Quota exceeded for instances: Requested 1, but already used 10")}
    with pytest.raises(PermanentError, match="Quota exceeded for instances"):
        cloud.create(spec)
    assert not kinds(fake) & {"servers", "ports", "volumes"}, "a creation that failed leaves nothing"


def test_a_server_in_error_shows_its_fault_and_leaves_nothing(tmp_path, fake, cloud):
    fake.wrong.server_fault = "No valid host was found. There are not enough hosts available."
    with pytest.raises(PermanentError, match="ended in ERROR: No valid host was found"):
        cloud.create(machine_spec(tmp_path, cloud))
    assert not kinds(fake) & {"servers", "ports", "volumes"}


def test_a_server_in_error_of_an_earlier_attempt_is_made_anew(tmp_path, fake, cloud):
    spec = machine_spec(tmp_path, cloud)
    made = cloud.create(spec)
    fake.objects["servers"][made.id] |= {"status": "ERROR", "OS-SRV-USG:launched_at": None, "fault": {"message": "x"}}
    again = cloud.create(spec)
    assert again.id != made.id
    assert len(fake.objects["servers"]) == len(fake.objects["ports"]) == len(fake.objects["volumes"]) == 1


def test_a_volume_in_error_says_why(tmp_path, fake, cloud):
    fake.wrong.volume_error = True
    with pytest.raises(PermanentError, match="made an error volume: schedule allocate volume: no back end has room"):
        cloud.create(machine_spec(tmp_path, cloud))
    assert not kinds(fake) & {"servers", "ports", "volumes"}


def test_a_volume_stuck_in_error_deleting(tmp_path, fake, cloud):
    machine = cloud.create(machine_spec(tmp_path, cloud))
    fake.wrong.error_deleting = True
    with pytest.raises(PermanentError, match="error_deleting") as caught:
        cloud.destroy(machine)
    assert "openstack volume set --state error" in caught.value.next_command
    assert OrphanKind.DISK in [o.kind for o in cloud.orphans("dep", [], networks=["dep-lisbon"])]
    fake.wrong.error_deleting = False
    for volume in fake.objects["volumes"].values():
        volume["status"] = "error"  # what the administrator was asked for
    cloud.destroy(machine)
    assert not kinds(fake) & {"servers", "ports", "volumes"}


# Images


def test_a_file_that_is_not_what_the_manifest_says_is_never_uploaded(tmp_path, fake, cloud):
    spec = machine_spec(tmp_path, cloud)
    (tmp_path / "vmlinuz").write_bytes(b"something else")
    with pytest.raises(BadError, match="vmlinuz is not what its manifest says"):
        cloud.create(spec)
    assert all(i["status"] == "queued" for i in fake.objects["images"].values())


def test_bytes_that_arrive_spoilt_are_sent_again(tmp_path, fake, cloud):
    fake.wrong.spoil_uploads = 1
    cloud.create(machine_spec(tmp_path, cloud))
    assert len(fake.objects["images"]) == 4


def test_bytes_that_always_arrive_spoilt(tmp_path, fake, cloud):
    fake.wrong.spoil_uploads = 99
    with pytest.raises(BadError, match=f"other bytes than the manifest says, after {openstack_images.MAX_UPLOADS}"):
        cloud.create(machine_spec(tmp_path, cloud))
    assert "images" not in kinds(fake)


def test_an_image_whose_bytes_were_exchanged_is_not_booted(tmp_path, fake):
    with driving(tmp_path, fake) as cloud:
        cloud.create(machine_spec(tmp_path, cloud))
    old = {i["id"]: i for i in fake.objects["images"].values() if i["cloudfit_kind"] != "state"}
    for image in old.values():
        image["os_hash_value"] = "0" * 128
    with driving(tmp_path, fake) as cloud:
        machine = cloud.create(machine_spec(tmp_path, cloud, owner("r2")))
    assert fake.objects["servers"][machine.id]["image"]["id"] not in old


def test_an_image_name_that_somebody_else_has(tmp_path, fake, cloud):
    cloud.destroy(cloud.create(machine_spec(tmp_path, cloud)))
    name = next(i["name"] for i in fake.objects["images"].values() if i["cloudfit_kind"] == "kernel")
    cloud.delete_network("dep", "dep-lisbon")
    theirs = fake._new("images", {"name": name, "status": "active", "owner": PROJECT, "tags": []})
    before = copy.deepcopy(theirs)
    with pytest.raises(RefusedError, match="wears the name of one of ours, but not its tags"):
        cloud.create(machine_spec(tmp_path, cloud))
    cloud.delete_network("dep", "dep-lisbon")
    assert fake.objects["images"] == {theirs["id"]: before}


def test_old_images_are_collected_when_nothing_runs_from_them(tmp_path, fake, cloud):
    first = cloud.create(machine_spec(tmp_path, cloud))
    newer = manifest(tmp_path)
    newer = type(newer)(**{f: getattr(newer, f) for f in newer.__slots__} | {"command_line": "console=ttyS0 loud"})
    cloud.create(machine_spec(tmp_path, cloud, owner("r2"), manifest=newer))
    roots = [i for i in fake.objects["images"].values() if i["cloudfit_kind"] == "root"]
    assert len(roots) == 2, "a machine runs from the old one"
    cloud.destroy(first)
    cloud.create(machine_spec(tmp_path, cloud, owner("r3"), manifest=newer))
    roots = [i for i in fake.objects["images"].values() if i["cloudfit_kind"] == "root"]
    assert [r["os_command_line"] for r in roots] == ["console=ttyS0 loud"]


# Strangers, and what goes on behind our back


def test_a_server_that_wears_our_name_but_not_our_tags(tmp_path, fake, cloud):
    spec = machine_spec(tmp_path, cloud)
    theirs = fake._new("servers", {"name": owner().name, "status": "ACTIVE", "metadata": {}, "tags": []})
    before = copy.deepcopy(theirs)
    with pytest.raises(RefusedError, match="wears the name of a machine of ours"):
        cloud.create(spec)
    with pytest.raises(RefusedError, match="not touched"):
        cloud.find(owner())
    assert cloud.machines("dep") == []
    assert fake.objects["servers"] == {theirs["id"]: before}


def test_a_server_whose_tags_were_taken_off_is_let_be(tmp_path, fake, cloud):
    machine = cloud.create(machine_spec(tmp_path, cloud))
    del fake.objects["servers"][machine.id]["metadata"]["cloudfit_group"]
    for act in (cloud.pause, cloud.stop, cloud.start, cloud.resume):
        with pytest.raises(RefusedError, match="does not carry our tags any more"):
            act(machine)
    assert fake.objects["servers"][machine.id]["status"] == "ACTIVE"


def test_another_specification_under_the_same_identity(tmp_path, cloud):
    spec = machine_spec(tmp_path, cloud)
    cloud.create(spec)
    with pytest.raises(RefusedError, match="exists in lisbon with another specification"):
        cloud.create(machine_spec(tmp_path, cloud, memory_mib=200))


def test_a_server_deleted_behind_our_back(tmp_path, fake, cloud):
    spec = machine_spec(tmp_path, cloud)
    machine = cloud.create(spec)
    fake._server_gone(fake.objects["servers"][machine.id])
    assert cloud.find(owner()) is None
    for act in (cloud.pause, cloud.resume, cloud.stop, cloud.start):
        with pytest.raises(PermanentError, match="does not exist"):
            act(machine)
    with pytest.raises(PermanentError, match="does not exist"):
        cloud.snapshot(machine, "rec")
    again = cloud.create(spec)  # on its old volume and address
    assert again.state_disk == machine.state_disk
    fake._server_gone(fake.objects["servers"][again.id])
    cloud.destroy(again)
    assert not kinds(fake) & {"servers", "ports", "volumes", "security_groups", "server_groups"}


def test_a_port_deleted_behind_our_back(tmp_path, fake, cloud):
    spec = machine_spec(tmp_path, cloud)
    fake.objects["ports"].clear()
    cloud.create(spec)
    assert [p["fixed_ips"][0]["ip_address"] for p in fake.objects["ports"].values()] == [spec.network.address]


def test_an_address_that_a_stranger_has_taken(tmp_path, fake, cloud):
    spec = machine_spec(tmp_path, cloud)
    (port,) = fake.objects["ports"].values()
    port["description"] = "mine"
    with pytest.raises(RefusedError, match="does not carry its tags: not touched"):
        cloud.create(spec)
    assert port["id"] in fake.objects["ports"]


def test_a_port_of_ours_that_a_strangers_server_uses(tmp_path, fake, cloud):
    spec = machine_spec(tmp_path, cloud)
    (port,) = fake.objects["ports"].values()
    stranger = fake._new("servers", {"name": "theirs", "status": "ACTIVE", "metadata": {}, "tags": [], "_ports": []})
    port["device_id"] = stranger["id"]
    with pytest.raises(RefusedError, match=f"is used by a server that is not ours, {stranger['id']}"):
        cloud.create(spec)
    assert list(fake.objects["ports"]) == [port["id"]]
    assert list(fake.objects["servers"]) == [stranger["id"]]


def test_a_snapshot_that_is_not_ours_is_let_be(tmp_path, fake, cloud):
    machine = cloud.create(machine_spec(tmp_path, cloud))
    taken = cloud.snapshot(cloud.pause(machine), "rec1")
    fake.objects["snapshots"][taken.id]["metadata"] = {}
    with pytest.raises(RefusedError, match="does not carry our tags"):
        cloud.delete_snapshot(taken)
    assert taken.id in fake.objects["snapshots"]


def test_a_snapshot_under_a_machine_stays(tmp_path, cloud):
    machine = cloud.create(machine_spec(tmp_path, cloud))
    taken = cloud.snapshot(cloud.pause(machine), "rec1")
    reader = owner(incarnation=2, operation="rec1")
    cloud.create(machine_spec(tmp_path, cloud, reader, disk=False, attach=taken))
    with pytest.raises(RefusedError, match="stands on the snapshot"):
        cloud.delete_snapshot(taken)


def test_a_snapshot_that_is_gone(tmp_path, cloud):
    gone = DiskSnapshot("no-such", owner(), "rec", tmp_path, "cinder", "")
    with pytest.raises(PermanentError, match="snapshot no-such is gone"):
        cloud.create(machine_spec(tmp_path, cloud, owner(incarnation=2), disk=False, attach=gone))
    cloud.delete_snapshot(gone)


def test_a_running_disk_is_not_frozen(tmp_path, cloud):
    machine = cloud.create(machine_spec(tmp_path, cloud))
    with pytest.raises(PermanentError, match="is running: its disk changes"):
        cloud.snapshot(machine, "rec1")


def test_a_snapshot_is_attached_to_a_running_machine(tmp_path, fake, cloud):
    machine = cloud.create(machine_spec(tmp_path, cloud))
    taken = cloud.snapshot(cloud.pause(machine), "rec1")
    reader = cloud.create(machine_spec(tmp_path, cloud, owner(incarnation=2, operation="rec1"), disk=False))
    assert reader.state_disk is None
    attached = cloud.attach(reader, taken)
    assert attached.state_disk is not None
    assert cloud.attach(reader, taken) == attached
    assert len(fake.objects["volumes"]) == 2
    with pytest.raises(RefusedError, match="has the second disk"):
        cloud.attach(machine, taken)


# Doors and orphans


def test_only_members_and_clients_are_let_in(tmp_path, fake):
    with driving(tmp_path, fake, place(clients=("192.0.2.0/24",))) as cloud:
        spec = machine_spec(tmp_path, cloud)
        cloud.create(spec)
        (group,) = fake.objects["security_groups"]
        fake._make_security_group_rule(
            {"security_group_id": group, "direction": "ingress", "protocol": "tcp", "port_range_min": 22,
             "port_range_max": 22, "remote_ip_prefix": "0.0.0.0/0"}
        )  # fmt: skip
        cloud.admit("dep", "ledger", [spec.network.address, "10.1.1.1"], 7000)
        cloud.admit("dep", "ledger", [spec.network.address, "10.1.1.2"], 7000)
    rules = fake.objects["security_group_rules"].values()
    doors = {(r["protocol"], r["port_range_min"], r["remote_ip_prefix"]) for r in rules}
    sources = {f"{spec.network.address}/32", "10.1.1.2/32", "192.0.2.0/24", "127.0.0.1/32"}
    assert doors == {("tcp", 7000, source) for source in sources}


def test_orphans_are_found_and_swept_and_others_are_let_be(tmp_path, fake, cloud):
    stranger = fake._new("volumes", {"name": "theirs", "status": "available", "metadata": {"cloudfit_group": "x"}})
    other = cloud.create(machine_spec(tmp_path, cloud, owner(deployment="other")))
    known = cloud.create(machine_spec(tmp_path, cloud))
    cloud.create(machine_spec(tmp_path, cloud, owner("r2")))
    half = cloud.create(machine_spec(tmp_path, cloud, owner("r3")))
    fake._server_gone(fake.objects["servers"][half.id])
    cloud.reserve_address("dep", "ledger", "r4", owner().role, "op9")
    found = cloud.orphans("dep", [known.owner], networks=["dep-lisbon"])
    assert [o.kind for o in found] == [OrphanKind.MACHINE, OrphanKind.DISK, OrphanKind.NETWORK]
    cloud.sweep("dep", found)
    assert cloud.orphans("dep", [known.owner], networks=["dep-lisbon"]) == []
    assert {m.id for m in cloud.machines("dep")} == {known.id}
    cloud.destroy(known)
    left = cloud.orphans("dep", [])
    assert [(o.kind, o.name) for o in left] == [(OrphanKind.NETWORK, "images of dep")]
    cloud.sweep("dep", left)
    assert cloud.find(other.owner).id == other.id
    assert stranger["id"] in fake.objects["volumes"]
    assert len(fake.objects["ports"]) == len(fake.objects["security_groups"]) == 1
    with pytest.raises(RefusedError, match="does not carry the tags of dep"):
        cloud.sweep("dep", cloud.orphans("other", []))
