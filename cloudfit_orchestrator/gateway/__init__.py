"""How programs outside a group use it: the client SDK."""
