"""The tries below the buckets: their form and hash follow from the content alone, and their depth is bounded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudfit_orchestrator.bft import keyindex, trie
from cloudfit_orchestrator.bft.keyindex import KeyIndex
from cloudfit_orchestrator.model.errors import BadError

VALUES = st.sampled_from([b"", b"v", b"w", bytes(100), bytes(1500), bytes(5000)])
# Keys whose places share all bits but the last few, none of them, or everything: what 2^k work could find at worst.
KEYS = st.builds(lambda kind, i: b"%s%d" % (kind, i), st.sampled_from([b"deep", b"flat", b"same"]), st.integers(0, 60))
CONTENT = st.dictionaries(KEYS, VALUES, max_size=80)


@pytest.fixture(autouse=True)
def chosen_places(monkeypatch):
    """Places as a client would choose them who can do any amount of work."""
    real = trie.place

    def place(key: bytes) -> int:
        if key.startswith(b"same"):
            return 0
        if key.startswith(b"deep"):
            return int(key[4:]) << 58
        return real(key) >> trie.BUCKET_BITS << trie.BUCKET_BITS

    monkeypatch.setattr(trie, "place", place)


def depth(node: trie.Node) -> int:
    return 0 if node[2] is not None else 1 + max(map(depth, node[4:]))


def changed(node: trie.Node, changes: dict[bytes, bytes | None]) -> trie.Node:
    return trie.updated(node, trie.placed(changes.items(), 0))


def same_form(a: trie.Node, b: trie.Node) -> bool:
    return a == b  # tuples of tuples: hashes, sizes, numbers, all of it


@given(CONTENT, st.lists(st.dictionaries(KEYS, st.none() | VALUES, max_size=30), max_size=6))
@settings(max_examples=150, deadline=None)
def test_form_and_hash_follow_from_the_content(content, history):
    node = trie.build(content.items(), 0)
    for changes in history:
        before, was = node, dict(content)
        node = changed(node, changes)
        content |= {key: value for key, value in changes.items() if value is not None}
        content = {key: value for key, value in content.items() if changes.get(key, b"") is not None}
        assert same_form(node, trie.build(content.items(), 0))
        assert trie.entries(before) == was, "a node never changes"
        assert changed(before, trie.differences(before, node)) == node
        expected = {k: content.get(k) for k in was.keys() | content.keys() if was.get(k) != content.get(k)}
        assert trie.differences(before, node) == expected
        if content == was:
            assert node is before
    assert trie.entries(node) == content
    assert sorted(trie.keys(node)) == sorted(content)
    assert trie.count(node) == len(content)
    assert node[1] == sum(8 + len(key) + len(value) for key, value in content.items())
    for key in content.keys() | {b"deep99", b"flat99", b"same99"}:
        assert trie.lookup(node, trie.place(key) >> trie.BUCKET_BITS, key) == content.get(key)
    assert depth(node) <= trie.MAX_DEPTH


def test_keys_that_share_all_bits_make_the_deepest_leaf_and_no_more():
    content = {b"same%d" % i: bytes(100) for i in range(1000)}
    node = trie.build(content.items(), 0)
    assert depth(node) == trie.MAX_DEPTH
    assert changed(node, dict.fromkeys(content)) == trie.EMPTY
    few = {b"same%d" % i: bytes(100) for i in range(3)}
    assert changed(node, dict.fromkeys(content.keys() - few.keys())) == trie.build(few.items(), 0)


def test_a_change_hashes_no_more_than_a_leaf_of_bounded_size():
    node = trie.build({b"flat%d" % i: bytes(200) for i in range(5000)}.items(), 0)
    for leaf in trie.leaves(node):
        assert leaf[2] <= 1 or (leaf[1] <= trie.LEAF_BYTES and leaf[2] <= trie.LEAF_ENTRIES)
    large = trie.build({b"flat%d" % i: bytes(50_000) for i in range(100)}.items(), 0)
    assert all(leaf[2] <= 1 for leaf in trie.leaves(large)), "a large value has a leaf of its own"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({b"flat": b"x"}, {b"fla": b"tx"}),
        ({b"flat": b""}, {}),
        ({b"flat1": b"a", b"flat2": b"b"}, {b"flat1": b"b", b"flat2": b"a"}),
        ({b"flat1": b"", b"flat2": b"x"}, {b"flat1": b"x", b"flat2": b""}),
    ],
)
def test_other_content_has_another_hash(one, other):
    assert trie.build(one.items())[0] != trie.build(other.items())[0]


def test_a_leaf_cannot_pass_as_a_branch():
    branch = trie.build({b"flat%d" % i: b"" for i in range(100)}.items(), 0)
    hashed = b"".join(child[0] for child in branch[4:])
    assert trie.build({b"flat": hashed}.items())[0] != branch[0]
    assert trie.build({hashed: b""}.items())[0] != branch[0]


def test_a_key_of_another_bucket_is_refused(monkeypatch):
    monkeypatch.setattr(trie, "place", lambda key: key[0])
    with pytest.raises(BadError, match="belongs to chunk 2"):
        trie.build([(b"\1", b""), (b"\2", b"")])


@given(st.lists(st.tuples(st.sets(KEYS), st.sets(KEYS)), max_size=8), KEYS, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_the_key_index_agrees_with_a_sorted_set(rounds, after, length):
    index, model, earlier = KeyIndex([]), set(), []
    before = keyindex.BLOCK
    keyindex.BLOCK = 4
    try:
        for added, removed in rounds:
            index = index.updated(added - removed, removed)
            model = (model | (added - removed)) - removed
            earlier.append((index, sorted(model)))
            prefix = after[:length]
            assert list(index.begin_with(prefix, None)) == sorted(k for k in model if k.startswith(prefix))
            expected = sorted(k for k in model if k.startswith(prefix) and k > after)
            assert list(index.begin_with(prefix, after)) == expected
    finally:
        keyindex.BLOCK = before
    assert all(list(index.begin_with(b"", None)) == keys for index, keys in earlier), "an index never changes"
