"""Security groups of Neutron's linuxbridge agent, where agents of several clouds share one host.

Every agent sees all taps of the host. One that its own server does not know it takes for a trusted port of its cloud,
and accepts whatever goes through it before the agent of the other cloud could filter. Here unknown ports are left
alone: the trusted ones of this cloud (DHCP) need no rule, because the host's FORWARD chain accepts by default.

The agents' protection by ebtables, beside the one by iptables, is left out: they would all keep one table. What two of
them delete at once fails for one; it begins anew, and then deletes rules, which ebtables 1.8.9 never does for lists of
MAC addresses (`RULE_DELETE failed (Invalid argument)`): it tries for ever, and no port of its cloud comes up again.
"""

from neutron.agent.linux.iptables_firewall import IptablesFirewallDriver
from neutron.plugins.ml2.drivers.linuxbridge.agent import arp_protect


def _nothing(*_):
    """Instead of a change of ebtables."""


arp_protect.setup_arp_spoofing_protection = _nothing
arp_protect.delete_arp_spoofing_protection = _nothing
arp_protect.delete_unreferenced_arp_protection = _nothing


class OwnPortsFirewall(IptablesFirewallDriver):
    """Filters the ports that have security groups, and touches no other."""

    def process_trusted_ports(self, port_ids):
        """No rules."""

    def remove_trusted_ports(self, port_ids):
        """There are none."""
