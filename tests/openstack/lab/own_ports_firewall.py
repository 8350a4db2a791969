"""Security groups of Neutron's linuxbridge agent, where agents of several clouds share one host.

Every agent sees all taps of the host. One that its own server does not know it takes for a trusted port of its cloud,
and accepts whatever goes through it before the agent of the other cloud could filter. Here unknown ports are left
alone: the trusted ones of this cloud (DHCP) need no rule, because the host's FORWARD chain accepts by default.
"""

from neutron.agent.linux.iptables_firewall import IptablesFirewallDriver


class OwnPortsFirewall(IptablesFirewallDriver):
    """Filters the ports that have security groups, and touches no other."""

    def process_trusted_ports(self, port_ids):
        """No rules."""

    def remove_trusted_ports(self, port_ids):
        """There are none."""
