import json
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloudfit_orchestrator.bench import plot, state
from cloudfit_orchestrator.cli.main import cli
from cloudfit_orchestrator.model.errors import BadInputError

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cf", dir="/var/tmp") as name:
        yield Path(name)


def test_state_is_measured_by_size(directory: Path) -> None:
    arguments = ["bench", "state", "--sizes", "4MB,1MB", "--changed", "100", "--repeat", "2", "-f", "json"]
    done = CliRunner().invoke(cli, [*arguments, "--directory", str(directory)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [p["size_mb"] for p in found["points"]] == [1, 4]
    for point in found["points"]:
        assert all(point[f"{step}_ms"] > 0 for step in state.STEPS)
        assert 0 < point["written_mb"] <= 1.1 * point["size_mb"]
        assert point["keys"] == pytest.approx(point["size_mb"] * 1000, rel=0.1)
    assert set(found["growth"]) == set(found["flat"]) == {"change", "checkpoint", "save"}
    assert found["profile"][0]["own_ms"] >= found["profile"][-1]["own_ms"] > 0
    assert list(directory.iterdir()) == []


def test_only_what_changed_is_written(directory: Path) -> None:
    measured = state.State(2 * 10**6, 1000, directory)
    few, many = state.checkpoint(measured, 1), state.checkpoint(measured, 1000)
    assert 0 < few["written_mb"] < many["written_mb"] / 20
    for _ in range(state.KEPT):
        measured.save()
    assert len(measured._files.indexes) == state.KEPT, "old snapshots go, as a replica lets them go"


@pytest.mark.parametrize("text", ["", "MB", "10", "-1MB", "10TB", "1KB", "5GB", "1.5GB"])
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="is no size"):
        state.parse_size(text)


def result(path: Path, clients: list[int], *, peer: bool) -> Path:
    points = []
    for c in clients:
        point = {"clients": c, "ops_s": 100.0 * c, "p50_ms": 2.0 + c}
        points.append(point | ({"peer": {"name": "etcd", "ops_s": 200.0 * c, "p50_ms": 1.0 + c}} if peer else {}))
    parameters = {"algorithm": "ebawa", "n": 3}
    path.write_text(json.dumps({"bench": "ordering", "parameters": parameters, "points": points}))
    return path


def test_plot_draws_each_point_of_each_curve_where_it_belongs(directory: Path) -> None:
    files = [result(directory / "a<b.json", [16, 1, 4], peer=True), result(directory / "c.json", [1], peer=False)]
    output = directory / "out.svg"
    done = CliRunner().invoke(cli, ["bench", "plot", *map(str, files), "-o", str(output)])
    assert done.exit_code == 0, done.output
    root = ET.fromstring(output.read_text())
    lines = root.findall(f"{SVG}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 3, 1]
    first = [tuple(map(float, p.split(","))) for p in lines[0].attrib["points"].split()]
    assert first == sorted(first), "more callers, more throughput: to the right"
    assert [y for _, y in first] == sorted((y for _, y in first), reverse=True), "more latency: upwards, so smaller y"
    peer = [tuple(map(float, p.split(","))) for p in lines[1].attrib["points"].split()]
    assert peer[0][0] - plot.LEFT == pytest.approx(2 * (first[0][0] - plot.LEFT), abs=0.2)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a<b: ebawa n=3", "a<b: etcd", "c: ebawa n=3", "16"} <= set(texts)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"bench": "state"}', '{"bench": "ordering", "points": [{}]}'])
def test_what_is_no_result_is_not_plotted(directory: Path, content: str) -> None:
    (directory / "x.json").write_text(content)
    done = CliRunner().invoke(cli, ["bench", "plot", str(directory / "x.json"), "-o", str(directory / "out.svg")])
    assert done.exit_code == 1
    assert "x.json" in done.output
    assert not (directory / "out.svg").exists()


@pytest.mark.parametrize(("span", "step"), [(8, 1), (9, 2), (41, 10), (800, 100), (0.5, 0.1)])
def test_steps_are_round(span: float, step: float) -> None:
    assert plot.nice_step(span, 8) == pytest.approx(step)
