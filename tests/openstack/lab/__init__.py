"""Real OpenStack clouds on one Debian 12 machine, for tests: `python -m tests.openstack.lab up|down|purge|status`.

Each cloud is complete and separate: its own Keystone, Glance, Placement, Nova, Neutron, Cinder, databases and libvirtd.
Only MariaDB and RabbitMQ are shared. Nothing needs systemd or hardware virtualization. Read `layout` first.
"""
