"""Keepers of snapshots without Ray: in this process, on simulated nodes that can be lost."""

from ftexp.checkpoint.memory.keeper import Keeper, KeeperLostError


class Nodes:
    """Nodes by name, each with a keeper."""

    def __init__(self, *names, max_bytes=1 << 30):
        self.keepers = {name: Keeper(self.links(name), max_bytes) for name in names}
        self.calls = []

    def links(self, node):
        return _Links(self, node)

    def lose(self, node):
        del self.keepers[node]

    def restart(self, node, max_bytes=1 << 30):
        self.keepers[node] = Keeper(self.links(node), max_bytes)


class _Links:
    def __init__(self, nodes, node):
        self._nodes, self.node = nodes, node

    def nodes(self):
        return list(self._nodes.keepers)

    def call(self, node, method, *arguments, timeout_s):
        self._nodes.calls.append((self.node, node, method))
        if node not in self._nodes.keepers:
            raise KeeperLostError(node)
        return getattr(self._nodes.keepers[node], method)(*arguments)
