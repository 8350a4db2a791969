"""The schemas of a cloud. Making them takes half a minute of CPU, so later clouds get a copy of the first one's."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.openstack.lab.console import once, run, say
from tests.openstack.lab.infrastructure import dump, sql
from tests.openstack.lab.layout import Cloud, Lab
from tests.openstack.lab.processes import environment
from tests.openstack.lab.settings import config_file, database_url, service_tools

MIGRATION_TIMEOUT_S = 900.0  # Nova's takes 20 s on an idle machine


def fill(lab: Lab, cloud: Cloud) -> None:
    """Have all databases of the cloud with their tables. Raises LabError."""
    with once(cloud.home / "done/databases") as todo:
        if not todo:
            return
        sql(lab, "".join(f"create database if not exists {n} character set utf8mb3;" for n in cloud.databases.values()))
        work: Sequence[Callable[[], None]] = (
            lambda: _have(lab, cloud, "neutron", ["neutron-db-manage", *_file(cloud, "neutron"), "upgrade", "heads"]),
            lambda: _nova(lab, cloud),
            lambda: _have(lab, cloud, "keystone", ["keystone-manage", *_file(cloud, "keystone"), "db_sync"]),
            lambda: _have(lab, cloud, "placement", ["placement-manage", *_file(cloud, "placement"), "db", "sync"]),
            lambda: _have(lab, cloud, "glance", ["glance-manage", *_file(cloud, "glance", "glance-api"), "db_sync"]),
            lambda: _have(lab, cloud, "cinder", ["cinder-manage", *_file(cloud, "cinder"), "db", "sync"]),
        )
        with ThreadPoolExecutor(max_workers=3) as pool:
            for done in [pool.submit(job) for job in work]:
                done.result()
        say(f"{cloud.name}: databases")


def map_hosts(lab: Lab, cloud: Cloud) -> None:
    """Tell Nova's cell about compute hosts whose services have registered."""
    _manage_nova(lab, cloud, "discover_hosts", "--by-service")


def _file(cloud: Cloud, service: str, name: str = "") -> tuple[str, str]:
    return "--config-file", str(config_file(cloud, service, name))


def _have(lab: Lab, cloud: Cloud, schema: str, command: Sequence[str]) -> None:
    """Fill one database, by its copy or else by `command`, and keep a copy."""
    with once(cloud.home / f"done/database-{schema}") as todo:
        if not todo:
            return
        copy = _copy_of(lab, schema)
        if copy.exists():
            sql(lab, copy.read_text(), cloud.databases[schema])
            return
        log = lab.log / f"{cloud.name}-database-{schema}.out"
        run(command, log=log, env=environment(lab), timeout_s=MIGRATION_TIMEOUT_S)
        dump(lab, cloud.databases[schema], copy)


def _nova(lab: Lab, cloud: Cloud) -> None:
    nova = service_tools(cloud)
    _have(lab, cloud, "nova_api", ["nova-manage", *nova, "api_db", "sync"])
    with once(cloud.home / "done/cells") as todo:
        if not todo:
            return
        _manage_nova(lab, cloud, "map_cell0", "--database_connection", database_url(lab, cloud, "nova_cell0"))
        _have(lab, cloud, "nova", ["nova-manage", *nova, "db", "sync"])  # fills cell0 too, unless it came from the copy
        if not sql(lab, "show tables", cloud.databases["nova_cell0"]):
            sql(lab, _copy_of(lab, "nova").read_text(), cloud.databases["nova_cell0"])
        if "cell1" not in sql(lab, "select name from cell_mappings", cloud.databases["nova_api"]).split():
            _manage_nova(lab, cloud, "create_cell", "--name", "cell1")


def _manage_nova(lab: Lab, cloud: Cloud, *words: str) -> None:
    log = lab.log / f"{cloud.name}-cells.out"
    command = ["nova-manage", *service_tools(cloud), "cell_v2", *words]
    run(command, log=log, env=environment(lab), timeout_s=MIGRATION_TIMEOUT_S)


def _copy_of(lab: Lab, schema: str) -> Path:
    """Named after the packages' version: another one has other tables."""
    package = f"python3-{schema.partition('_')[0]}"
    version = run(["dpkg-query", "-W", "-f=${Version}", package]).translate(str.maketrans("/:~", "___"))
    return lab.home / "schemas" / f"{schema}-{version}.sql"
