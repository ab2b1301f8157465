"""Places of a cluster, given away one by one: which worker would be on which node. Ray does it for real."""

from collections.abc import Collection, Mapping, Sequence

from orchestrator.policy.cluster.capacity import fits, places

Resources = Mapping[str, float]
Ledger = dict[str, dict[str, float]]


class NodePacking:
    """What is left on each node while places are given away. Runs are named, and each has workers that are all alike.

    A worker stays where it is; a run that gets fewer places lets its youngest workers go. What nobody holds is given
    away before what others would have to leave.

    Args:
        free: what nobody holds, by node.
        homes: nodes of the workers that each run has now, oldest first; what they hold is given away anew.
        requests: what a worker of each run takes.
        avoid: nodes on which a run puts nobody new.
    """

    def __init__(
        self,
        free: Mapping[str, Resources],
        homes: Mapping[str, Sequence[str]],
        requests: Mapping[str, Resources],
        avoid: Mapping[str, Collection[str]],
    ) -> None:
        self._free: Ledger = {node: dict(amounts) for node, amounts in free.items()}
        self._left: Ledger = {node: dict(amounts) for node, amounts in free.items()}
        self._homes, self._requests, self._avoid = homes, requests, avoid
        self._kept = dict.fromkeys(requests, 0)  # how many workers keep their homes
        self._new: dict[str, list[str]] = {run: [] for run in requests}  # other places that a run was given
        for run, nodes in homes.items():
            for node in nodes:
                _add(self._left.setdefault(node, {}), requests[run])

    def copy(self) -> "NodePacking":
        """The same places, to try something out."""
        other = NodePacking({}, {}, self._requests, self._avoid)
        other._free = {node: dict(amounts) for node, amounts in self._free.items()}
        other._left = {node: dict(amounts) for node, amounts in self._left.items()}
        other._homes, other._kept = self._homes, dict(self._kept)
        other._new = {run: list(nodes) for run, nodes in self._new.items()}
        return other

    def num_placed(self, run: str) -> int:
        """How many places the run has been given."""
        return self._kept[run] + len(self._new[run])

    def keep(self, run: str, workers: int) -> None:
        """Give the run so many places in all, as far as its workers have them already."""
        homes = self._homes.get(run, ())
        while self.num_placed(run) < workers and self._kept[run] < len(homes):
            node = homes[self._kept[run]]
            if not fits(self._left[node], self._requests[run]):
                return
            _take(self._left[node], self._requests[run])
            self._kept[run] += 1

    def place(self, run: str, workers: int, avoid: Collection[str] = ()) -> bool:
        """Give the run so many places in all, or as many as there are. One whose worker has to go gets no other place
        for it at once.

        Args:
            avoid: nodes that are kept for others; the run's own places there are not.

        Returns:
            whether it has them all.
        """
        self.keep(run, workers)
        if self._kept[run] == len(self._homes.get(run, ())):
            for ledger in (self._free, self._left):
                for node in ledger:
                    while node not in avoid and self.num_placed(run) < workers and self._give(run, node, ledger):
                        pass
        return self.num_placed(run) >= workers

    def place_on(self, run: str, nodes: Collection[str]) -> None:
        """Give the run these places, which it was given in a copy."""
        for node in nodes:
            self._give(run, node, self._left)

    def new_places(self, run: str) -> tuple[str, ...]:
        """Where the places are that the run has been given, apart from those that it has."""
        return tuple(self._new[run])

    def places(self, run: str) -> tuple[str, ...]:
        """Where all the places are that the run has been given."""
        return (*self._homes.get(run, ())[: self._kept[run]], *self._new[run])

    def has_homes(self, run: str) -> bool:
        """Whether it has workers somewhere, whatever they are given now."""
        return bool(self._homes.get(run, ()))

    def withhold(self, nodes: Collection[str]) -> None:
        """Give nothing away that is left on these nodes; what is taken back from a run there may be given again."""
        for ledger in (self._free, self._left):
            ledger.update({node: {} for node in nodes})

    def unseat(self, run: str) -> None:
        """Take all its places away again."""
        for node in self.places(run):
            _add(self._left[node], self._requests[run])
        for node in self._new[run]:
            _add(self._free[node], self._requests[run])
        self._kept[run], self._new[run] = 0, []

    def usable(self, run: str) -> set[str]:
        """Nodes that could hold a worker of the run if nobody else were there."""
        return {n for n, amounts in self._whole(run).items() if fits(amounts, self._requests[run])}

    def capacity(self, run: str) -> int:
        """How many workers of the run the cluster could hold if nobody else were there."""
        return places(list(self._whole(run).values()), self._requests[run])

    def _whole(self, run: str) -> Ledger:
        """What there is on the nodes that the run may use."""
        whole = {node: dict(amounts) for node, amounts in self._left.items()}
        for other in self._requests:
            for node in self.places(other):
                _add(whole[node], self._requests[other])
        return {node: amounts for node, amounts in whole.items() if node not in self._avoid[run]}

    def _give(self, run: str, node: str, ledger: Ledger) -> bool:
        """Give the run a place on a node, out of what nobody holds first. Args: ledger: in which it has to fit, too."""
        request, left = self._requests[run], self._left.get(node)
        if left is None or node in self._avoid[run] or not (fits(left, request) and fits(ledger[node], request)):
            return False
        _take(left, request)
        free = self._free.setdefault(node, {})
        for name, amount in request.items():
            free[name] = max(0.0, free.get(name, 0.0) - amount)
        self._new[run].append(node)
        return True


def _take(amounts: dict[str, float], request: Resources) -> None:
    for name, amount in request.items():
        amounts[name] = amounts.get(name, 0.0) - amount


def _add(amounts: dict[str, float], request: Resources) -> None:
    for name, amount in request.items():
        amounts[name] = amounts.get(name, 0.0) + amount
