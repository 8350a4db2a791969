"""MariaDB and RabbitMQ, which the clouds share: instances of the lab's own, beside any that the machine may run."""

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.openstack.lab.console import LabError, run, say, wait_until, write
from tests.openstack.lab.layout import Lab
from tests.openstack.lab.processes import Service, check_alive, environment, start

START_TIMEOUT_S = 180.0  # 5 to 15 s on an idle machine
DATABASE_USER = "lab"
_RABBIT_USER = "rabbitmq"


def port_open(port: int) -> bool:
    """Whether something listens there on 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start_database(lab: Lab) -> None:
    """MariaDB, tuned for tests: it may lose what was written in the last second before a power cut."""
    data, runtime = lab.home / "mariadb", lab.run / "mariadb"
    for directory in (data, runtime):
        directory.mkdir(parents=True, exist_ok=True)
        shutil.chown(directory, "mysql", "mysql")
    if not (data / "mysql").is_dir():
        run(
            [
                "mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={data}",
                "--auth-root-authentication-method=normal", "--skip-test-db",
            ],
            log=lab.log / "mariadb-install.out", env=environment(lab), timeout_s=START_TIMEOUT_S,
        )  # fmt: skip
    start(
        lab,
        Service(
            "mariadb",
            [
                "mariadbd", "--no-defaults", "--user=mysql", f"--datadir={data}", f"--socket={_socket(lab)}",
                f"--pid-file={runtime / 'pid'}", "--bind-address=127.0.0.1", f"--port={lab.database_port}",
                "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0",
                "--sync-binlog=0", "--innodb-flush-method=nosync", "--innodb-buffer-pool-size=192M",
                "--performance-schema=OFF", "--max-connections=1500", "--character-set-server=utf8mb3",
                "--collation-server=utf8mb3_general_ci",
            ],
        ),
    )  # fmt: skip


def start_messages(lab: Lab) -> None:
    """RabbitMQ with an Erlang port mapper of its own, in the foreground: one that it starts itself would outlive it."""
    start(lab, Service("epmd", ["epmd", "-address", "127.0.0.1", "-port", str(lab.epmd_port)]))
    wait_until(lambda: port_open(lab.epmd_port), START_TIMEOUT_S, "epmd listens", lab.log / "epmd.out")
    home = lab.home / "rabbitmq"
    home.mkdir(exist_ok=True)
    shutil.chown(home, _RABBIT_USER, _RABBIT_USER)
    config = lab.etc / "rabbitmq.conf"
    write(
        config,
        f"listeners.tcp.1 = 127.0.0.1:{lab.message_port}\n"
        f"default_user = {DATABASE_USER}\n"
        f"default_pass = {lab.password}\n"
        "loopback_users = none\n"
        "log.file.level = warning\n"
        "vm_memory_high_watermark.absolute = 1GB\n"
        "disk_free_limit.absolute = 100MB\n",
        mode=0o640,
    )
    shutil.chown(config, "root", _RABBIT_USER)
    command = [*_as_rabbit(), "/usr/lib/rabbitmq/bin/rabbitmq-server"]
    start(lab, Service("rabbitmq", command, env=_rabbit_env(lab), files=[config]))


def wait_database(lab: Lab) -> None:
    """Until MariaDB answers and the clouds' account is there."""

    def answers() -> bool:
        check_alive(lab, "mariadb")
        try:
            sql(lab, "select 1")
        except LabError:
            return False
        return True

    wait_until(answers, START_TIMEOUT_S, "MariaDB answers", lab.log / "mariadb.out")
    sql(
        lab,
        f"create user if not exists {DATABASE_USER}@'127.0.0.1' identified by '{lab.password}';"
        f"grant all on *.* to {DATABASE_USER}@'127.0.0.1';",
    )
    say("MariaDB answers")


def wait_messages(lab: Lab) -> None:
    """Until RabbitMQ listens."""

    def listens() -> bool:
        check_alive(lab, "rabbitmq")
        return port_open(lab.message_port)

    wait_until(listens, START_TIMEOUT_S, "RabbitMQ listens", lab.log / "rabbitmq.out")


def add_virtual_host(lab: Lab, name: str) -> None:
    """A cloud's own name space of queues."""
    if name in _rabbitmqctl(lab, ["-q", "list_vhosts", "--no-table-headers"]).split():
        return
    _rabbitmqctl(lab, ["-q", "add_vhost", name])
    _rabbitmqctl(lab, ["-q", "set_permissions", "-p", name, DATABASE_USER, ".*", ".*", ".*"])


def sql(lab: Lab, statements: str, database: str = "") -> str:
    """Rows, tab-separated, without header. Raises LabError."""
    command = ["mariadb", "--no-defaults", "-S", _socket(lab), "-u", "root", "-N", "-B"]
    return run([*command, *([database] if database else [])], stdin=statements, env=environment(lab), timeout_s=300.0)


def dump(lab: Lab, database: str, to: Path) -> None:
    """Write a database as SQL, whole or not at all."""
    to.parent.mkdir(parents=True, exist_ok=True)
    fresh = to.with_suffix(".new")
    text = run(["mariadb-dump", "--no-defaults", "-S", _socket(lab), "-u", "root", database], env=environment(lab))
    fresh.write_text(text)
    fresh.replace(to)


def _socket(lab: Lab) -> Path:
    return lab.run / "mariadb/socket"


def _as_rabbit() -> list[str]:
    return ["setpriv", f"--reuid={_RABBIT_USER}", f"--regid={_RABBIT_USER}", "--clear-groups"]


def _rabbit_env(lab: Lab) -> dict[str, str]:
    home = lab.home / "rabbitmq"
    return {
        "HOME": str(home),
        "RABBITMQ_NODENAME": "cloudfit-lab@localhost",
        "RABBITMQ_CONFIG_FILE": str(lab.etc / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": "/nonexistent",
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home),
        "RABBITMQ_PID_FILE": str(home / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
        "RABBITMQ_DIST_PORT": str(lab.erlang_port),
        "ERL_EPMD_PORT": str(lab.epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        # One scheduler that sleeps when idle: by default Erlang spins on every core.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none +S 1:1 "
        "-kernel inet_dist_use_interface {127,0,0,1}",
    }


def _rabbitmqctl(lab: Lab, arguments: Sequence[str]) -> str:
    program = "/usr/lib/rabbitmq/bin/rabbitmqctl"
    env = environment(lab) | _rabbit_env(lab)
    return run([*_as_rabbit(), program, *arguments], env=env, timeout_s=START_TIMEOUT_S)
