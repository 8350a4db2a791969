"""Requests to OpenStack: which are repeated, how errors are told apart, and how many connections there are."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloudfit_orchestrator.clouds import openstack_api
from cloudfit_orchestrator.clouds.openstack_api import BusyError, RejectedError, UnclearError
from cloudfit_orchestrator.model.errors import PermanentError, TemporaryError
from cloudfit_orchestrator.testing.openstack_fake import FakeOpenStack
from tests.unit.clouds.openstack_places import driving, quick

GROUPS = {"server_group": {"name": "x", "policy": "soft-anti-affinity"}}


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        yield fake


@pytest.fixture
def api(fake, tmp_path):
    with driving(tmp_path, fake, repeat_for_s=1.5) as cloud:
        yield cloud.api


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "Bad flavor", RejectedError),
        (403, "Quota exceeded", RejectedError),
        (404, "no such type", RejectedError),
        (409, "task state deleting", BusyError),
        (413, "VolumeSizeExceedsAvailableQuota", RejectedError),
        (429, "slow down", TemporaryError),
        (500, "unexpected", UnclearError),
        (502, "bad gateway", UnclearError),
        (503, "unavailable", UnclearError),
        (504, "time-out", UnclearError),
    ],
)
def test_errors_are_told_apart_and_a_creation_is_asked_for_once(fake, api, status, message, kind):
    fake.wrong.deny = {"POST compute:/os-server-groups": (status, message)}
    with pytest.raises(kind, match=f"make a group: lisbon answers {status}: {message}") as caught:
        api.make("compute", "/os-server-groups", GROUPS, "make a group")
    assert isinstance(caught.value, PermanentError) == (kind is RejectedError)
    asked = fake.calls.count("POST compute:/os-server-groups")
    assert asked == 1 if status != 429 else asked > 1, "only what was certainly not carried out is repeated"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_look_is_repeated_until_its_time_is_over(fake, api, status):
    fake.wrong.deny = {"GET compute:/os-server-groups": (status, "later")}
    began = time.monotonic()
    with pytest.raises(TemporaryError, match="later"):
        api.list("compute", "/os-server-groups", "server_groups", "look")
    assert len(fake.calls) > 2 or status == 429  # which says itself when to come again
    assert time.monotonic() - began < 5


def test_what_is_not_there_is_none(api):
    assert api.get("compute", "/servers/none", "look") is None
    assert api.delete("volume", "/volumes/none", "delete") is False


def test_a_token_that_ended_is_renewed(fake, api):
    assert api.list("compute", "/os-server-groups", "server_groups", "look") == []
    with api.connection() as connection:
        fake.expired.add(connection.session.get_token())
    assert api.list("compute", "/os-server-groups", "server_groups", "look") == []


def test_a_listing_goes_over_all_its_pages(fake, api, monkeypatch):
    pages = {"": ["a", "b"], "b": ["b", "c"], "c": []}

    def listing(method, path, query, body, raw):
        now = pages[query.get("marker", "")]
        link = {"rel": "next", "href": f"http://elsewhere/servers/detail?limit=2&marker={now[-1] if now else ''}"}
        return 200, {"servers": [{"id": i} for i in now], "servers_links": [link] if now else []}

    monkeypatch.setattr(fake, "_compute", listing)
    found = api.list("compute", "/servers/detail", "servers", "look", tags="x")
    assert [s["id"] for s in found] == ["a", "b", "c"]
    pages["c"] = ["a", "b"]  # an API that begins again
    with pytest.raises(TemporaryError, match="has no end"):
        api.list("compute", "/servers/detail", "servers", "look", tags="x")


def test_threads_share_a_bounded_number_of_connections(fake, api):
    used, busy, most = set(), 0, 0
    lock, full = threading.Lock(), threading.Event()

    def work():
        nonlocal busy, most
        with api.connection() as mine:
            with lock:
                used.add(id(mine))
                busy += 1
                most = max(most, busy)
                if busy == openstack_api.MAX_CONNECTIONS:
                    full.set()
            with api.connection() as again:
                assert again is mine
            assert full.wait(30)
            with lock:
                busy -= 1

    threads = [threading.Thread(target=work) for _ in range(3 * openstack_api.MAX_CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == len(used) == openstack_api.MAX_CONNECTIONS


def test_waiting_ends_with_what_was_seen_last(api):
    def step():
        raise BusyError("it is BUILD, spawning")

    with pytest.raises(TemporaryError, match=r"boot it: lisbon: not done after 0 s; last: it is BUILD, spawning"):
        api.until("boot it", step, 0.05)


def test_a_closed_cloud_asks_nothing(api):
    api.close()
    with pytest.raises(RuntimeError, match="is closed"):
        api.get("compute", "/servers/x", "look")


def test_a_silent_cloud_is_waited_for_once(fake, api):
    def look():
        before = len(fake.calls)
        with pytest.raises(TemporaryError, match="later"):
            api.list("compute", "/os-server-groups", "server_groups", "look")
        return len(fake.calls) - before

    fake.wrong.deny = {"GET compute:/os-server-groups": (500, "later")}
    assert look() > 2
    assert look() == 1
    fake.wrong.deny = {}
    api.list("compute", "/os-server-groups", "server_groups", "look")
    fake.wrong.deny = {"GET compute:/os-server-groups": (500, "later")}
    assert look() > 2


def test_what_is_forgotten_while_it_is_looked_up_is_found_all_the_same(api):
    def look():
        api.forget()  # as another thread may
        return "found"

    assert api.remembered(("flavor",), look) == "found"
    assert api.remembered(("flavor",), lambda: "found anew") == "found anew"


def test_threads_that_miss_the_same_make_it_once(api):
    began, second = threading.Barrier(8), threading.Barrier(2)

    def make():
        with contextlib.suppress(threading.BrokenBarrierError):
            second.wait(0.3)
            pytest.fail("two threads make the same")
        return "made"

    def want(_):
        began.wait(10)
        return api.remembered(("security group", "ledger"), make)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(want, range(8))) == ["made"] * 8


def test_a_failure_to_make_it_is_not_remembered(api):
    def fail():
        raise TemporaryError("later")

    with pytest.raises(TemporaryError, match="later"):
        api.remembered(("flavor",), fail)
    assert api.remembered(("flavor",), lambda: "found") == "found"
