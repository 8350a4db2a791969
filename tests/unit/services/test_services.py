"""The services: what they do, that they never raise, and that a refused operation changes nothing."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloudfit_orchestrator.bft.clients import MAX_RESULT
from cloudfit_orchestrator.bft.store import MAX_KEY, StateStore
from cloudfit_orchestrator.model.errors import BadError, BadInputError
from cloudfit_orchestrator.services import counter, kv
from cloudfit_orchestrator.services.registry import load


class Kv:
    def __init__(self) -> None:
        self.whole = StateStore()
        self.store = self.whole.service_view()
        self.service = load("kv")

    def __call__(self, operation: kv.Operation) -> kv.Result:
        return kv.decode_result(self.service.execute(self.store, kv.encode_operation(operation)))


def test_kv_reads_what_was_written():
    do = Kv()
    assert do(kv.Get(b"a")) == kv.Value(None)
    assert do(kv.Put(b"a", b"1")) == kv.Done(changed=True)
    assert do(kv.Put(b"a", b"1")) == kv.Done(changed=False)
    assert do(kv.Get(b"a")) == kv.Value(b"1")
    assert do(kv.Put(b"large", bytes(kv.MAX_STORED))) == kv.Done(changed=True)
    assert len(do.service.execute(do.store, kv.encode_operation(kv.Get(b"large")))) <= MAX_RESULT
    assert len(do.service.execute(do.store, kv.encode_operation(kv.List()))) <= MAX_RESULT
    assert do(kv.Delete(b"a")) == kv.Done(changed=True)
    assert do(kv.Delete(b"a")) == kv.Done(changed=False)
    assert do(kv.Get(b"a")) == kv.Value(None)


def test_kv_compare_and_swap():
    do = Kv()
    assert do(kv.CompareAndSwap(b"a", b"x", b"1")) == kv.Value(None)
    assert do(kv.CompareAndSwap(b"a", None, b"1")) == kv.Done(changed=True)
    assert do(kv.CompareAndSwap(b"a", b"0", b"2")) == kv.Value(b"1")
    assert do(kv.CompareAndSwap(b"a", b"1", None)) == kv.Done(changed=True)
    assert do(kv.Get(b"a")) == kv.Value(None)


def test_kv_lists_in_pages():
    do = Kv()
    for i in range(2500):
        do(kv.Put(b"k/%05d" % i, b"v"))
    do(kv.Put(b"z", b""))
    seen, after = [], None
    while True:
        page = do(kv.List(b"k/", after))
        assert isinstance(page, kv.Entries)
        assert len(page.items) <= kv.MAX_LIST_ENTRIES
        seen += [key for key, _ in page.items]
        if not page.more:
            break
        after = page.items[-1][0]
    assert seen == [b"k/%05d" % i for i in range(2500)]
    for i in range(4):
        do(kv.Put(b"big%d" % i, bytes(100 << 10)))
    page = do(kv.List(b"big"))
    assert isinstance(page, kv.Entries)
    assert (len(page.items), page.more) == (1, True)


@pytest.mark.parametrize(
    "operation",
    [
        kv.Put(b"", b"x"),
        kv.Put(b"\0clients", b"x"),
        kv.Get(b"\0clients"),
        kv.Put(b"k" * (MAX_KEY + 1), b""),
        kv.Put(b"k", bytes(kv.MAX_STORED + 1)),
        kv.CompareAndSwap(b"k", None, bytes(kv.MAX_STORED + 1)),
        kv.List(b"k" * (MAX_KEY + 1)),
    ],
)
def test_kv_refuses_and_changes_nothing(operation):
    do = Kv()
    before = do.whole.root()
    assert isinstance(do(operation), kv.Failed)
    assert do.whole.root() == before


@given(st.binary(max_size=40))
@example(b"\x92\xa2\xff\xff\xc4\x00")
@settings(max_examples=300)
def test_kv_never_raises_and_answers_equally(data):
    first, second = Kv(), Kv()
    answer = first.service.execute(first.store, data)
    assert answer == second.service.execute(second.store, data)
    kv.decode_result(answer)


def test_kv_result_of_a_stranger():
    with pytest.raises(BadError):
        kv.decode_result(b"\xc1")


def test_counter_counts_and_refuses():
    store = StateStore().service_view()
    service = load("counter")

    def do(operation: bytes) -> int | None:
        return counter.value(service.execute(store, operation))

    assert do(counter.add(5)) == 5
    assert do(counter.add(-7)) == -2
    assert do(b"junk") is None
    assert do(b"") is None
    assert do(counter.add(-(2**63))) is None
    assert do(counter.add(0)) == -2


def test_registry_loads_by_path_or_says_why_not():
    loaded = load("cloudfit_orchestrator.services.counter:CounterService")
    assert counter.value(loaded.execute(StateStore(), counter.add(1))) == 1
    for name in ["nothing", "no.such.module:Class", "cloudfit_orchestrator.services.kv:Nothing", "os:getcwd", ":"]:
        with pytest.raises(BadInputError):
            load(name)
